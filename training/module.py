"""The Lightning module: a classifier, its loss, its metrics, its optimiser."""

import math
from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
import timm.layers
import timm.optim
import torch
from lightning_utilities import apply_to_collection
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy
from torchvision.transforms import v2

from evaluation.networks import build_network, start_network
from images.random import seed_of
from models.checkpoint import place_of
from settings.command import Command

SPLITS = ("test", "val")  # in the order of `ImageData.val_dataloader`
ROUGH_RATE = 0.05  # see rough_start


class Classifier(pl.LightningModule):
    """Trains the network of the settings with cross-entropy.

    Args:
        settings: of the run; they go into the checkpoint as plain values.
        classes: names of the classes, in the order of the logits.
        image_size: side of the images in pixels.
        changed: settings that changed after the first epoch, a sentence each; kept in the checkpoint.
    """

    def __init__(self, settings: Command, classes: list[str], image_size: int, changed: Sequence[str] = ()):
        super().__init__()
        self.settings, self.classes, self.image_size = settings, classes, image_size
        self.changed = list(changed)
        self.place = 0, 0  # epochs, and batches of the next one, that are done when training starts
        self.begins_at = None  # the step of the checkpoint that it goes on from
        self.weights_digest = None  # of the file `model.weights` as it was when training began
        self.net = start_network(settings, classes, image_size) if settings.ckpt is None else \
            build_network(settings, len(classes), image_size)
        if settings.trainer.sync_batchnorm:
            # torch's own converter, which Lightning's flag calls, drops the activation in BatchNormAct2d.
            self.net = timm.layers.convert_sync_batchnorm(self.net)
        if settings.model.channels_last:
            self.net = self.net.to(memory_format=torch.channels_last)
        if settings.model.compile:
            # Graphs of a sweep's earlier jobs count against the recompilation limit, past which all is eager.
            torch.compiler.reset()
            mode = None if settings.model.compile is True else settings.model.compile
            self.net.compile(mode=mode)  # in place: the keys of the state dict stay as they are
        count = len(classes) if len(classes) > 1 else None  # torchmetrics takes no 1
        self.metrics = nn.ModuleDict({split: MetricCollection({
            "top1": MulticlassAccuracy(count, top_k=1, average="micro"),
            "top5": MulticlassAccuracy(count, top_k=min(5, len(classes)), average="micro"),
            "loss": MeanMetric()}, compute_groups=False) for split in SPLITS})

        alphas = {v2.MixUp: settings.data.mixup, v2.CutMix: settings.data.cutmix}
        mixes = [mix(alpha=alpha, num_classes=len(classes)) for mix, alpha in alphas.items() if alpha]
        self.mix = v2.RandomChoice(mixes) if mixes else None

    def forward(self, images: Tensor) -> Tensor:
        images = images.to(next(self.net.parameters()).dtype)  # for precision=bf16-true and the like
        if self.settings.model.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        # What mixup, dropout and the like draw depends on the place alone: a resumed run draws the same.
        torch.manual_seed(seed_of(self.settings.seed, self.current_epoch, batch_idx, self.global_rank))
        images, targets = batch if self.mix is None else self.mix(*batch)
        loss = F.cross_entropy(self(images), targets, label_smoothing=self.settings.optim.label_smoothing)
        self.log("train/loss_step", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        images, targets = batch
        logits = self(images).float()
        real = targets >= 0  # images that only fill up a process's share do not count
        metrics = self.metrics[SPLITS[dataloader_idx]]
        metrics["top1"].update(logits[real], targets[real])
        metrics["top5"].update(logits[real], targets[real])
        metrics["loss"].update(F.cross_entropy(logits[real], targets[real], reduction="none"))

    def on_validation_epoch_end(self) -> None:
        for split in SPLITS[:1 + bool(self.settings.data.val_size)]:
            self.log_dict({f"{split}/{name}": value for name, value in self.metrics[split].compute().items()})
            self.metrics[split].reset()

    def configure_optimizers(self) -> dict[str, Any]:
        conf, optimizer = self.settings.optim, make_optimizer(self.settings, self.net)
        self.fresh_options = [{key: value for key, value in group.items() if key != "params"}
                              for group in optimizer.param_groups]
        steps = int(self.trainer.estimated_stepping_batches)
        warmup = steps * conf.warmup_epochs // self.trainer.max_epochs
        schedule = LambdaLR(optimizer, lambda step: warmup_cosine(step, steps, warmup))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        # A checkpoint has its optimiser's options; those of the settings count, as the command line may
        # change them. The schedule goes on at epochs done out of epochs wanted, whatever steps an epoch has.
        optimizer, schedule = self.optimizers(), self.lr_schedulers()
        steps, (epochs, batches) = int(self.trainer.estimated_stepping_batches), self.place
        if epochs and not batches:  # which Lightning tells by the batches that an epoch has now
            done = self.trainer.fit_loop.epoch_loop.batch_progress.current
            done.completed = self.trainer.num_training_batches
        schedule.last_epoch = steps * epochs // self.trainer.max_epochs
        schedule.last_epoch += batches // self.trainer.accumulate_grad_batches
        schedule.base_lrs = [fresh["lr"] for fresh in self.fresh_options]
        factor = schedule.lr_lambdas[0](schedule.last_epoch)
        for group, fresh in zip(optimizer.param_groups, self.fresh_options, strict=True):
            group.update(fresh | {"initial_lr": fresh["lr"], "lr": fresh["lr"] * factor})

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        step, self.begins_at = self.begins_at, None
        if step not in (None, checkpoint["global_step"]):
            raise ValueError(f"the checkpoint was replaced while this run started, by one of step "
                             f"{checkpoint['global_step']} for one of step {step}: start this again, from a "
                             "copy if its run still trains")
        self.place = place_of(checkpoint)
        averaged = checkpoint["dbb"]["settings"]["optim"].get("ema_decay") is not None
        if averaged and self.settings.optim.ema_decay is None and "current_model_state" in checkpoint:
            checkpoint["state_dict"] = checkpoint["current_model_state"]  # the weights, not their average
        # Each tensor in memory of its own, which a file's may share.
        states = checkpoint["optimizer_states"]
        checkpoint["optimizer_states"] = apply_to_collection(states, Tensor, Tensor.clone)
        checkpoint["loops"]["fit_loop"]["epoch_progress"] = progress_at(checkpoint["epoch"])
        checkpoint["lr_schedulers"] = []  # a schedule takes any attribute; `on_train_start` places it

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        epoch, batches = self.current_epoch, self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        place = (epoch + 1, 0) if batches == self.trainer.num_training_batches else (epoch, batches)
        checkpoint["loops"]["fit_loop"]["epoch_progress"] = progress_at(epoch)
        checkpoint["dbb"] = {"place": place, "settings": self.settings.stored(), "classes": self.classes,
                             "image_size": self.image_size, "changed": self.changed,
                             "images": len(self.trainer.datamodule.train_indices),
                             "test_images": len(self.trainer.datamodule.test_indices),
                             "weights_digest": self.weights_digest, "processes": self.trainer.world_size,
                             **self.trainer.datamodule.digests}


def progress_at(epoch: int) -> dict[str, dict[str, int]]:
    """What Lightning counts of epochs at the end of one, or within.

    It does not count the first epoch after it has gone on from an epoch's last batch, and would take a later
    place within an epoch for another.
    """
    counts = {"ready": epoch + 1, "started": epoch + 1, "processed": epoch, "completed": epoch}
    return {"total": counts, "current": dict(counts)}


def make_optimizer(settings: Command, net: nn.Module) -> Optimizer:
    """The optimiser, one of timm's, of a network, by the settings."""
    conf = settings.optim
    return timm.optim.create_optimizer_v2(net, conf.name, learning_rate(settings), conf.weight_decay,
                                          conf.momentum, filter_bias_and_bn=not conf.decay_norm_and_bias)


def stepped_once(settings: Command, net: nn.Module) -> Optimizer:
    """The optimiser of a network, after a step with gradients of zero."""
    optimizer = make_optimizer(settings, net)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with torch.compiler.set_stance("force_eager"):  # some compile their step, for a minute
        optimizer.step()
    return optimizer


def try_optimizer(settings: Command, device: torch.device) -> None:
    """Take one step with the optimiser, on two numbers.

    Raises:
        ValueError: if it cannot: it needs a package, a GPU, gradients of gradients or another momentum.
    """
    try:
        stepped_once(settings, nn.ParameterDict({"weight": torch.ones(1, 2, device=device)}))
    except Exception as error:  # whatever timm and its packages raise
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"optim.name={settings.optim.name} cannot train here ({why}): choose another, such "
                         "as adamw, or fix what it names") from error


def learning_rate(settings: Command) -> float:
    """`optim.lr`, scaled linearly from `optim.lr_batch_size` to the images of an optimiser step.

    See Goyal et al. 2017, section 2.1.
    """
    images = settings.data.batch_size * settings.trainer.accumulate_grad_batches
    return settings.optim.lr * images / (settings.optim.lr_batch_size or images)


def rough_start(settings: Command) -> str | None:
    """A sentence if the blocks are known to lose the first epochs of a new run.

    See benchmarks/README.md, "The first steps".
    """
    block, rate = settings.block, learning_rate(settings)
    from_ones = block.init in ("ones", None)
    with_norms = (block.branches or block.layers) and block.mode != "linear"
    careful = settings.ckpt is not None or settings.optim.warmup_epochs or rate < ROUGH_RATE
    if not with_norms or not from_ones or careful:
        return None
    return (f"block.init={block.init or 'ones'} with a learning rate of {rate:g} and no warm-up is a rough "
            "start: expect a test accuracy near chance for the first epochs. optim.warmup_epochs=5 or "
            "block.init=auto avoids it")


def warmup_cosine(step: int, steps: int, warmup: int) -> float:
    """Factor of the learning rate: linear over `warmup` steps, then a cosine that reaches 0 after `steps`."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))
