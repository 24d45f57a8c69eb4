"""What happens at the end of steps and epochs: speed, memory, one printed line, the branches, checkpoints."""

import resource
import sys
import time

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, EMAWeightAveraging, LearningRateMonitor

from dbb import ReparamConv2d, branch_shares
from runs.folder import RunFolder
from settings.schema import Settings
from training.divergence import StopAtNaN
from training.saving import LastCheckpoint
from training.sgs import ScaleGradients


class Speed(Callback):
    """Log seconds per training step, images per second of all processes, peak memory (MiB), each epoch."""

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()  # of an earlier job in this process

        self.start, self.steps, self.seconds = None, 0, 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.start, self.steps, self.seconds = None, 0, 0.0

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        now = time.perf_counter()
        if self.start is None:  # the first step also starts workers and compiles: not counted
            self.start = now
        else:
            self.steps, self.seconds = self.steps + 1, now - self.start

    def on_train_epoch_end(self, trainer, module) -> None:
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated()
        else:
            unit = 1 if sys.platform == "darwin" else 1024
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        module.log("train/peak_memory_mib", peak / 2**20)
        if self.steps:
            per_step = self.seconds / self.steps
            module.log("train/seconds_per_step", per_step)
            module.log("train/images_per_second", module.settings.data.batch_size / per_step)


class EpochLoss(Callback):
    """Log the mean training loss of each epoch; a checkpoint has the sum of the part that is done."""

    def __init__(self):
        self.total, self.count = torch.zeros(()), 0

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        loss = outputs["loss"] * trainer.accumulate_grad_batches  # by which Lightning has divided it
        before = self.total.to(loss) if batch_idx else torch.zeros_like(loss)
        self.total, self.count = before + loss, batch_idx + 1

    def on_train_epoch_end(self, trainer, module) -> None:
        module.log("train/loss_epoch", self.total / self.count)

    def state_dict(self) -> dict[str, float]:
        return {"total": self.total.item(), "count": self.count}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        self.total = torch.tensor(state_dict["total"], dtype=torch.float64)
        self.count = state_dict["count"]


class EpochLine(Callback):
    """One printed line an epoch, for where there is no progress bar."""

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            shown = ["train/loss_epoch", "train/images_per_second"]
            if (trainer.current_epoch + 1) % trainer.check_val_every_n_epoch == 0:
                shown[1:1] = ["test/loss", "test/top1", "test/top5", "val/top1"]
            values = [f"{key.removesuffix('_epoch')} {float(trainer.callback_metrics[key]):.4g}"
                      for key in shown if key in trainer.callback_metrics]
            print(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}", *values, sep="  ", flush=True)


class Averaging(EMAWeightAveraging):
    """The moving average of the weights, which an evaluation borrows.

    Lightning's own swaps it with the weights, and so rounds it where these are of half precision.
    """

    own = None  # the weights, while the average is in their place
    state_key = "EMAWeightAveraging"  # in checkpoints

    def _swap_models(self, module: pl.LightningModule) -> None:
        tensors = [*module.parameters(), *module.buffers()]
        if self.own is None:
            self.own = [tensor.detach().clone() for tensor in tensors]
            self._copy_average_to_current(module)
            return
        for tensor, value in zip(tensors, self.own, strict=True):
            tensor.data.copy_(value)
        self.own = None


class Branches(Callback):
    """Log the branches each epoch, to W&B and TensorBoard, layer by layer.

    Of every branch its share of the merged kernel, and its gammas' mean size.
    """

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        values = {f"share/{layer}/{branch}": share
                  for layer, of in branch_shares(module.net).items() for branch, share in of.items()}
        for layer, block in module.net.named_modules():
            if isinstance(block, ReparamConv2d):
                for name, gamma in block.gammas().items():
                    values[f"gamma/{layer}/{name}"] = gamma.detach().abs().mean().item()
        for logger in trainer.loggers[1:]:  # not the CSV file, which would get too many columns
            logger.log_metrics(values, trainer.global_step)


def make_callbacks(settings: Settings, folder: RunFolder) -> list[Callback]:
    """The callbacks of a run."""
    divergence = StopAtNaN()
    callbacks = [
        divergence,
        Speed(),
        EpochLoss(),
        LearningRateMonitor(logging_interval="step"),
        LastCheckpoint(folder, settings.checkpoint, divergence),
    ]
    if settings.logger.name != "csv" and (settings.block.branches or settings.block.layers):
        callbacks.append(Branches())
    if settings.block.sgs_every_n_epochs is not None:
        callbacks.append(ScaleGradients(settings.block, settings.data.batch_size))
    if not shows_progress_bar(settings):
        callbacks.append(EpochLine())
    if settings.optim.ema_decay is not None:
        callbacks.append(Averaging(decay=settings.optim.ema_decay))
    return callbacks


def shows_progress_bar(settings: Settings) -> bool:
    """As `trainer.enable_progress_bar` says, and by default on a terminal."""
    wanted = settings.trainer.enable_progress_bar
    return sys.stdout.isatty() if wanted is None else wanted
