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
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor

from dbb import ReparamConv2d, Report, branch_shares
from dbb.surgery import Row
from training.data import ImageData
from training.safety import StopAtNaN
from training.settings import LoggerConf, Settings

WANDB_WAIT = 10  # seconds, at the start
WANDB_FINISH = 600  # seconds, at the end: W&B would wait for a lost server without end


class Speed(Callback):
    """Log seconds per training step, images per second of all processes, peak memory (MiB), each epoch."""

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


def make_callbacks(settings: Settings, run_dir: Path) -> list[Callback]:
    """The callbacks of a run. The checkpoint kept is the last: nothing is selected on test data."""
    callbacks = [
        StopAtNaN(),
        Speed(),
        LearningRateMonitor(logging_interval="step"),
        ModelCheckpoint(run_dir / "checkpoints", filename="last", save_on_train_epoch_end=True,
                        enable_version_counter=False),
    ]
    if settings.logger.name != "csv" and (settings.block.branches or settings.block.layers):
        callbacks.append(Branches())
    if not shows_progress_bar(settings):
        callbacks.append(EpochLine())
    if settings.optim.ema_decay is not None:
        callbacks.append(EMAWeightAveraging(decay=settings.optim.ema_decay))
    return callbacks


def shows_progress_bar(settings: Settings) -> bool:
    """As `trainer.enable_progress_bar` says, and by default on a terminal."""
    wanted = settings.trainer.enable_progress_bar
    return sys.stdout.isatty() if wanted is None else wanted


def make_loggers(settings: Settings, run_dir: Path) -> list[Logger]:
    """CSV, and W&B or TensorBoard as `logger.name` says; all go on where an earlier session stopped."""
    more = {"csv": [], "wandb": [wandb_logger], "tensorboard": [tensorboard_logger]}
    made = [make(settings, run_dir) for make in more[settings.logger.name]]
    return [_csv(run_dir), *(logger for logger in made if logger is not None)]


def tensorboard_logger(settings: Settings, run_dir: Path) -> TensorBoardLogger | None:
    """TensorBoard's files in a run's folder; None, with a sentence, where it is not installed."""
    try:
        return TensorBoardLogger(run_dir, "", "")
    except ImportError:
        rank_zero_only(print)("logger=tensorboard: it is not installed (pip install tensorboard): the run "
                              "goes on without it; metrics.csv has all of its metrics")
        return None


def log_convolutions(logger: Logger, report: Report, run_dir: Path) -> None:
    """Write what became of every convolution to convolutions.csv, and to W&B as a table."""
    rows = [[row.module, "x".join(map(str, row.kernel_size)), row.block, row.reason, row.norm]
            for row in report]
    with (run_dir / "convolutions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([Row._fields, *rows])
    if isinstance(logger, WandbLogger) and rows:
        logger.log_table("convolutions", list(Row._fields), rows)


def wandb_logger(settings: Settings, run_dir: Path) -> WandbLogger | None:
    """The W&B run of a run's folder, new or not; named by model, block, seed; grouped by model and data.

    Without a key it is offline, to be sent later with `wandb sync`. It is offline too, with a printed
    sentence, if W&B cannot be reached within `WANDB_WAIT` seconds or refuses. None if it cannot write offline
    either: a logger must not stop a run.
    """
    os.environ.setdefault("WANDB_FINISH_TIMEOUT", str(WANDB_FINISH))
    conf, model, block = settings.logger, settings.model.name, settings.block.name
    trained = settings.block.mode if settings.block.branches else None
    tags = [tag for tag in (model, settings.data.name, block, trained, *conf.tags) if tag is not None]
    name, group = f"{model}_{block}_s{settings.seed}", conf.group or f"{model}_{settings.data.name}"
    for wanted, instead in ((_wandb_mode, f"offline; later: wandb sync {run_dir}/wandb/offline-run-*"),
                            (lambda conf: "offline", "without W&B; metrics.csv has all of its metrics")):
        try:
            mode = wanted(conf)
            # W&B prints nothing about an offline run, and where to see an online one.
            options = wandb.Settings(init_timeout=WANDB_WAIT, quiet=True, silent=mode != "online")
            logger = WandbLogger(name, run_dir, id=conf.id, project=conf.project, entity=conf.entity,
                                 group=group, tags=tags, mode=mode, settings=options)
            logger._wandb_init.pop("anonymous")  # Lightning always passes it, and W&B warns of it
            logger.experiment  # noqa: B018  the run, which W&B starts when it is asked for
            return logger
        except Exception as error:  # of many kinds, W&B's own and others'
            wandb.teardown()  # otherwise W&B would think that the run has started
            why = (str(error) or type(error).__name__).splitlines()[0]
            rank_zero_only(print)(f"logger=wandb: W&B did not start ({why}): the run goes on {instead}")
    return None


def _wandb_mode(conf: LoggerConf) -> str:
    """What the environment says, or else online where there is a key."""
    if named := os.environ.get("WANDB_MODE"):
        return named
    return "online" if not conf.offline and wandb.login(prompt=False, verify=False) else "offline"


def log_predictions(logger: Logger, data: ImageData, logits: Tensor, targets: Tensor) -> None:
    """Add to W&B the confusion matrix (up to 100 classes), and images of the most confident mistakes."""
    if not isinstance(logger, WandbLogger):
        return
    sure, predicted = logits.softmax(1).max(1)
    names = data.classes
    if len(names) <= 100:
        matrix = wandb.plot.confusion_matrix(y_true=targets.tolist(), preds=predicted.tolist(),
                                             class_names=names)
        logger.experiment.log({"confusion_matrix": matrix})
    wrong = predicted != targets
    worst = (sure * wrong).argsort(descending=True)[:int(min(wrong.sum(), 36))].tolist()
    if worst:
        keys = [(0, int(data.test_indices[i]), True) for i in worst]
        images, *_ = data.test_set.collate(data.test_set.__getitems__(keys))
        captions = [f"{names[targets[i]]}, taken for {names[predicted[i]]} ({sure[i]:.2f})" for i in worst]
        logger.log_image("wrongly_classified", list(images.cpu()), caption=captions)


def _csv(run_dir: Path) -> CSVLogger:
    """Lightning's logger deletes an existing metrics.csv; this one appends to it."""
    path, kept = run_dir / "metrics.csv", run_dir / "metrics-before-resume.csv"
    if path.exists() and rank_zero_only.rank == 0:
        path.rename(kept)
    logger = CSVLogger(run_dir, name="", version="")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Experiment logs directory")  # its metrics.csv was moved away
        writer = logger.experiment
    if kept.exists():
        kept.rename(path)
        with path.open(newline="") as file:
            writer.metrics_keys = next(csv.reader(file), [])
    return logger
