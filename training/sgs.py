"""Spatial Gradient Scaling in a run: when its masks are computed, kept, and shown."""

from itertools import islice

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.utils import make_grid

from dbb import SpatialGradientScaling
from dbb.sgs import scalable
from models.say import say
from settings.schema import BlockConf

SIDE = 64  # pixels of a mask's picture


def scaled_layers(conf: BlockConf, net: nn.Module) -> str | None:
    """A sentence about whose gradients are scaled; None if none are to be.

    Raises:
        ValueError: if none can be.
    """
    if conf.sgs_every_n_epochs is None:
        return None
    count = len(scalable(net, conf.include, conf.exclude, conf.kernel_sizes))
    return (f"block={conf.name}: the gradients of {count} convolutions are scaled, "
            f"with masks from the end of epoch {conf.sgs_every_n_epochs} on")


class ScaleGradients(Callback):
    """Scales gradients by masks that are computed anew every few epochs, from the same training images.

    A checkpoint has the masks: a run that goes on within an epoch has those that the epoch began with.
    """

    def __init__(self, conf: BlockConf, batch_size: int):
        self.conf, self.images = conf, conf.sgs_batches * batch_size
        self.masks, self.epoch = {}, 0

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        conf = self.conf
        self.scaling = SpatialGradientScaling(module.net, conf.include, conf.exclude, conf.kernel_sizes)
        known = self.scaling.masks
        masks = {layer: self.masks[layer] for layer in self.masks.keys() & known.keys()}
        for layer, mask in masks.items():
            if mask.shape != known[layer].shape:
                raise ValueError(f"ckpt: the mask of {layer} is {list(mask.shape)}, which is not the size of "
                                 "its kernel: it was not written by train.py")
        self.scaling.masks |= masks

    def on_train_batch_start(self, trainer, module, batch, batch_idx: int) -> None:
        # Not at an epoch's start, which Lightning passes over where a run goes on from an epoch's end.
        epoch = trainer.current_epoch
        if epoch % self.conf.sgs_every_n_epochs or epoch == self.epoch:
            return
        if trainer.is_global_zero:  # so that all have the same masks, to the bit
            batches = list(islice(trainer.datamodule.calibration_images(self.images), self.conf.sgs_batches))
            with torch.compiler.set_stance("force_eager"):
                without = self.scaling.update(torch.cat(batches).to(next(module.net.parameters())))
            for layer, why in without.items():
                say(f"block=sgs: the gradient of {layer} is not scaled in epoch {epoch + 1}: {why}")
        self.scaling.masks = trainer.strategy.broadcast(self.scaling.masks)
        self.epoch = epoch
        for logger in trainer.loggers:
            show_masks(logger, self.scaling.masks, trainer.global_step)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.scaling.remove()

    def state_dict(self) -> dict[str, int | dict[str, Tensor]]:
        return {"epoch": self.epoch, "masks": {name: mask.cpu() for name, mask in self.scaling.masks.items()}}

    def load_state_dict(self, state_dict: dict[str, int | dict[str, Tensor]]) -> None:
        self.epoch, self.masks = state_dict["epoch"], state_dict["masks"]


def show_masks(logger, masks: dict[str, Tensor], step: int) -> None:
    """Add to W&B or TensorBoard one picture of all masks, in the order of the layers; 2 and more is white."""
    shown = [F.interpolate(mask[None, None].float().cpu() / 2, (SIDE, SIDE))[0] for mask in masks.values()]
    picture = make_grid(shown, pad_value=0.5).clamp(0, 1)
    if isinstance(logger, WandbLogger):
        logger.log_image("sgs/masks", [picture], caption=[", ".join(masks)])
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image("sgs/masks", picture, step)
