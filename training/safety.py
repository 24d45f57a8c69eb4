"""What keeps a run's work: checkpoints that are whole or not there, and an end to training that diverged."""

import os
import zipfile
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor


class DivergedError(ValueError):
    """The training loss is not finite any more."""


class StopAtNaN(Callback):
    """Stop when the loss is not finite, before any checkpoint holds what came of it.

    The first such step is kept on the device. It is read every `log_every_n_steps`, and at the end of an
    epoch, so that no step waits for the GPU.
    """

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.first = torch.full((), float("inf"), device=module.device)

    def on_train_batch_end(self, trainer, module, outputs: dict[str, Tensor], batch, batch_idx: int) -> None:
        step = trainer.global_step
        bad = ~outputs["loss"].isfinite()
        self.first = torch.where(bad, self.first.clamp(max=step), self.first)
        if step % trainer.log_every_n_steps == 0:
            self.check(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.check(trainer)  # before ModelCheckpoint, which Lightning calls last

    def check(self, trainer: pl.Trainer) -> None:
        """Raise in all processes at once: one that went on would wait for the others."""
        first = trainer.strategy.reduce(self.first, reduce_op="min")
        if first.isfinite():
            rate = trainer.optimizers[0].param_groups[0]["lr"]
            raise DivergedError(
                f"the training loss is not finite from step {int(first)} on (learning rate now {rate:g}): "
                "nothing was saved after it. Lower optim.lr, or set optim.warmup_epochs or "
                "trainer.gradient_clip_val")


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, to the disk itself, and then renames. Keeps the checkpoint before, too."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options=None) -> None:
        path = Path(path)
        part = path.with_name(f".{path.name}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            if path.exists():
                path.replace(previous(path))
            part.replace(path)
        except (OSError, RuntimeError) as error:  # the latter is torch's, for a disk that is full
            part.unlink(missing_ok=True)
            why = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise OSError(f"{path} could not be written ({why}): make room, and the same command goes on "
                          "from the checkpoint before") from error


def previous(path: Path) -> Path:
    """Where the checkpoint before this one is kept."""
    return path.with_name(f"{path.stem}-previous{path.suffix}")


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint file by its own checksums; None if nothing is."""
    try:
        with zipfile.ZipFile(path) as file:
            broken = file.testzip()
    except Exception as error:  # of many kinds, depending on the bytes
        return str(error)
    return None if broken is None else f"the checksum of {broken} is wrong"


def newest(last: Path) -> Path | None:
    """The checkpoint to go on from, None if there is none.

    That is `last`; where it is missing or damaged, the one before it, with a printed sentence. A damaged one
    is renamed, so that it does not take the place of the good one at the next save.
    """
    wrong = damage(last) if last.exists() else "it is missing"
    if wrong is None:
        return last
    before = previous(last)
    if before.exists() and damage(before) is None:
        rank_zero_only(print)(f"{last} cannot be used ({wrong}): going on from the one before, {before.name}")
        if rank_zero_only.rank == 0 and last.exists():
            last.replace(last.with_name(f"{last.stem}-damaged{last.suffix}"))
        return before
    return last if last.exists() else None
