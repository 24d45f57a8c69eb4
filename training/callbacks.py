"""What is seen of a run: speed, memory, one line an epoch, and the loggers."""

import csv
import os
import resource
import sys
import time
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
import wandb
from pytorch_lightning.callbacks import Callback, EMAWeightAveraging, LearningRateMonitor, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, Logger, WandbLogger
from pytorch_lightning.utilities import rank_zero_only

from dbb.surgery import Report, Row
from training.settings import LoggerConf, Settings


class Speed(Callback):
    """Log seconds per training step, images per second over all processes, and peak memory (MiB), each epoch."""

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()  # of an earlier job in this process

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.start, self.steps, self.seconds = None, 0, 0.0

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        now = time.perf_counter()
        if self.start is None:  # the first step also starts workers and compiles: not counted
            self.start = now
        else:
            self.steps, self.seconds = self.steps + 1, now - self.start

    def on_train_epoch_end(self, trainer, module) -> None:
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else \
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        module.log("train/peak_memory_mib", peak / 2**20)
        if self.steps:
            per_step = self.seconds / self.steps
            module.log("train/seconds_per_step", per_step)
            module.log("train/images_per_second", module.settings.data.batch_size / per_step)


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


def make_callbacks(settings: Settings, run_dir: Path) -> list[Callback]:
    """The callbacks of a run. The checkpoint kept is the last: nothing is selected on test data."""
    callbacks = [
        Speed(),
        LearningRateMonitor(logging_interval="step"),
        ModelCheckpoint(run_dir / "checkpoints", filename="last", save_on_train_epoch_end=True, enable_version_counter=False),
    ]
    if not shows_progress_bar(settings):
        callbacks.append(EpochLine())
    if settings.optim.ema_decay is not None:
        callbacks.append(EMAWeightAveraging(decay=settings.optim.ema_decay))
    return callbacks


def shows_progress_bar(settings: Settings) -> bool:
    """As `trainer.enable_progress_bar` says, and by default on a terminal."""
    wanted = settings.trainer.enable_progress_bar
    return sys.stdout.isatty() if wanted is None else wanted


def make_loggers(conf: LoggerConf, run_dir: Path) -> list[Logger]:
    """CSV, and W&B unless `logger=csv`; both go on where an earlier session of the same run stopped."""
    return [_csv(run_dir), *([wandb_logger(conf, run_dir)] if conf.name == "wandb" else [])]


def log_convolutions(logger: Logger, report: Report, run_dir: Path) -> None:
    """Write what became of every convolution to convolutions.csv, and to W&B as a table."""
    rows = [[row.module, "x".join(map(str, row.kernel_size)), row.block, row.reason, row.norm] for row in report]
    with (run_dir / "convolutions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([Row._fields, *rows])
    if isinstance(logger, WandbLogger) and rows:
        logger.log_table("convolutions", list(Row._fields), rows)


def wandb_logger(conf: LoggerConf, run_dir: Path) -> WandbLogger:
    """The W&B run of a run's folder, new or gone on with."""
    # Without a key there is nobody to ask: run offline, to be sent later with `wandb sync`.
    offline = conf.offline or not wandb.login(prompt=False, verify=False)
    mode = os.environ.get("WANDB_MODE") or ("offline" if offline else "online")
    return WandbLogger(run_dir.parent.name, run_dir, id=conf.id, project=conf.project, entity=conf.entity, group=conf.group,
                       tags=list(conf.tags), mode=mode)


def _csv(run_dir: Path) -> CSVLogger:
    """Lightning's logger deletes an existing metrics.csv; this one goes on after its last row."""
    path, kept = run_dir / "metrics.csv", run_dir / "metrics-before-resume.csv"
    if path.exists() and rank_zero_only.rank == 0:
        path.rename(kept)
    logger = CSVLogger(run_dir, name="", version="")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Experiment logs directory")  # the file it would delete was moved away
        writer = logger.experiment
    if kept.exists():
        kept.rename(path)
        with path.open(newline="") as file:
            writer.metrics_keys = next(csv.reader(file), [])
    return logger
