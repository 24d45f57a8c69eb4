"""Runs that are stopped at a place, and what they leave."""

import multiprocessing
import os
import signal
from pathlib import Path

import pandas as pd
import pytest
import torch
from pytorch_lightning.callbacks import Callback

from models.checkpoint import load_checkpoint, place_of

SHORT = ("model=resnet8_dbb", "data=digits", "data.max_images=320", "data.batch_size=32", "logger=csv",
         "trainer.max_epochs=2", "trainer.limit_train_batches=5", "trainer.log_every_n_steps=1",
         "trainer.check_val_every_n_epoch=1")


class At(Callback):
    """Do something at the start of one batch."""

    def __init__(self, epoch: int, batch: int, action, validation: bool = False):
        self.place, self.action, self.validation = (epoch, batch), action, validation

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if not self.validation and (trainer.current_epoch, batch_idx) == self.place:
            self.action(trainer)

    def on_validation_batch_start(self, trainer, module, batch, batch_idx, dataloader_idx=0):
        if self.validation and (trainer.current_epoch, batch_idx) == self.place:
            self.action(trainer)


class Batches(Callback):
    """Notes the place of each step, and the learning rate there."""

    def __init__(self):
        self.seen, self.rates = [], []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.seen.append((trainer.current_epoch, batch_idx))
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def terminate(trainer):
    """As whoever stops a job does: all of its processes get the signal, those that load images first."""
    for worker in multiprocessing.active_children():
        for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGINT, signal.SIGTERM):
            os.kill(worker.pid, number)
    os.kill(os.getpid(), signal.SIGTERM)


def interrupt(trainer):
    os.kill(os.getpid(), signal.SIGINT)


def fail(trainer):
    raise RuntimeError("power failure")


def place(folder: Path) -> tuple[int, int]:
    return place_of(load_checkpoint(folder / "checkpoints" / "last.ckpt"))


def check_same(one: Path, other: Path, cut: int | None = None) -> None:
    """The weights, bit by bit; what metrics.csv says of steps and epochs, once each, but of step `cut`."""
    first, second = (load_checkpoint(folder / "checkpoints" / "last.ckpt") for folder in (one, other))
    for name in ("state_dict", "current_model_state"):
        assert first.get(name, {}).keys() == second.get(name, {}).keys()
        for key, value in first.get(name, {}).items():
            assert torch.equal(value, second[name][key]), key
    tables = [pd.read_csv(folder / "metrics.csv") for folder in (one, other)]
    for name in ("train/loss_step", "lr-SGD", "train/loss_epoch", "test/top1", "test/loss", "final/top1"):
        whole, found = (table.dropna(subset=[name])[["step", name]] for table in tables)
        whole = whole[(whole["step"] != cut) | (name != "train/loss_step")]
        assert found.to_numpy() == pytest.approx(whole.to_numpy(), rel=1e-6), name
