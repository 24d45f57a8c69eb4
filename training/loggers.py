"""The loggers of a run: CSV, and W&B or TensorBoard beside it."""

import csv
import io
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import wandb
from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger
from torch import Tensor

from dbb import Report
from dbb.surgery import Row
from export.place import GRAPHS, REPORTS
from images.data import ImageData
from models.say import say
from reports.conversion import rows
from runs.folder import RunFolder
from runs.going_back import has_rows_of
from runs.safety import write_text
from settings.command import Command
from settings.schema import LoggerConf, Settings
from training.metrics import csv_logger
from training.wandb_settings import refuse_settings_of_folder

WANDB_WAIT = 10  # seconds, at the start
WANDB_FINISH = 600  # seconds, at the end: W&B would wait for a lost server without end


def make_loggers(settings: Command, folder: RunFolder, epochs: int = 0, step: int = 0) -> list[Logger]:
    """CSV, and W&B or TensorBoard as `logger.name` says; all go on where an earlier session stopped.

    `epochs` and `step` as in `csv_logger`. Rows of another training go.
    """
    if not has_rows_of(folder, settings.ckpt):
        epochs = step = 0
    more = {"csv": [], "wandb": [wandb_logger], "tensorboard": [tensorboard_logger]}
    made = [make(settings, folder) for make in more[settings.logger.name]]
    return [csv_logger(folder, epochs, step), *(_harmless(logger) for logger in made if logger is not None)]


def _harmless(logger: Logger) -> Logger:
    """The same logger, which ends with a printed sentence where it would have ended the run."""
    for name in ("log_metrics", "log_hyperparams", "save", "finalize"):
        setattr(logger, name, partial(_tried, logger, getattr(logger, name)))
    return logger


def _tried(logger: Logger, method: Callable, *args, **kwargs) -> None:
    if getattr(logger, "ended", False):
        return
    try:
        method(*args, **kwargs)
    except Exception as error:  # of many kinds: a disk's, a server's, those of a helper process that died
        logger.ended = True
        why = (str(error) or type(error).__name__).splitlines()[0]
        say(f"{type(logger).__name__} failed ({why}): the run goes on without it; "
            "metrics.csv has all of its metrics")


def finish() -> None:
    """End the run of W&B, if there is one: one run a job, also in a sweep."""
    try:
        wandb.finish()
    except Exception as error:  # its helper process died, which a later job of a sweep would ask too
        print(f"logger=wandb: W&B did not finish ({error})")
        with suppress(Exception):
            wandb.teardown()
        wandb.run = None  # else Lightning's logger would take the lost run for the next one's


def tensorboard_logger(settings: Settings, folder: RunFolder) -> TensorBoardLogger | None:
    """TensorBoard's files in a run's folder; None, with a sentence, where it is not installed."""
    try:
        return TensorBoardLogger(folder.path, "", "")
    except ImportError:
        say("logger=tensorboard: it is not installed (pip install tensorboard): the run "
            "goes on without it; metrics.csv has all of its metrics")
        return None


def log_convolutions(logger: Logger, report: Report, folder: RunFolder) -> None:
    """Write what became of every convolution to convolutions.csv, and to W&B as a table."""
    rows = [[row.module, "x".join(map(str, row.kernel_size)), row.block, row.reason, row.norm]
            for row in report]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([Row._fields, *rows])
    write_text(folder.convolutions, text.getvalue())
    if isinstance(logger, WandbLogger) and rows:
        _tried(logger, logger.log_table, "convolutions", list(Row._fields), rows)


def wandb_logger(settings: Settings, folder: RunFolder) -> WandbLogger | None:
    """The W&B run of a run's folder, new or not; named by model, block, seed; grouped by model and data.

    Without a key it is offline, to be sent later with `wandb sync`. It is offline too, with a printed
    sentence, if W&B cannot be reached within `WANDB_WAIT` seconds or refuses. None if it cannot write offline
    either: a logger must not stop a run.
    """
    os.environ.setdefault("WANDB_FINISH_TIMEOUT", str(WANDB_FINISH))
    refuse_settings_of_folder()
    conf, model, block = settings.logger, settings.model.name, settings.block.name
    trained = settings.block.mode if settings.block.branches else None
    tags = [tag for tag in (model, settings.data.name, block, trained, *conf.tags) if tag is not None]
    name, group = f"{model}_{block}_s{settings.seed}", conf.group or f"{model}_{settings.data.name}"
    for wanted, instead in ((_wandb_mode, f"offline; later: wandb sync {folder.path}/wandb/offline-run-*"),
                            (lambda conf: "offline", "without W&B; metrics.csv has all of its metrics")):
        try:
            mode = wanted(conf)
            logging.raiseExceptions = False  # of W&B's own log, on a disk that is full
            # W&B prints nothing about an offline run, and where to see an online one.
            # To save code it would run git in the run's folder, and with it what a stranger's .git names.
            options = wandb.Settings(init_timeout=WANDB_WAIT, quiet=True, silent=mode != "online",
                                     save_code=False)
            # W&B's helper process may be another's, which started it in another folder.
            logger = WandbLogger(name, folder.path.absolute(), id=conf.id, project=conf.project,
                                 entity=conf.entity, group=group, tags=tags, mode=mode, settings=options)
            logger._wandb_init.pop("anonymous")  # Lightning always passes it, and W&B warns of it
            logger.experiment  # noqa: B018  the run, which W&B starts when it is asked for
            if settings.ckpt is not None:  # whose run it may be
                say(f"logger=wandb: run {conf.id} of project {conf.project}")
            return logger
        except Exception as error:  # of many kinds, W&B's own and others'
            wandb.teardown()  # otherwise W&B would think that the run has started
            why = (str(error) or type(error).__name__).splitlines()[0]
            say(f"logger=wandb: W&B did not start ({why}): the run goes on {instead}")
    return None


def _wandb_mode(conf: LoggerConf) -> str:
    """What the environment says, or else online where there is a key."""
    if named := os.environ.get("WANDB_MODE"):
        return named
    return "online" if not conf.offline and wandb.login(prompt=False, verify=False) else "offline"


def log_predictions(logger: Logger, data: ImageData, logits: Tensor, targets: Tensor) -> None:
    """Add to W&B the confusion matrix (up to 100 classes), and images of the most confident mistakes."""
    if isinstance(logger, WandbLogger):
        _tried(logger, _show_predictions, logger, data, logits, targets)


def _show_predictions(logger: WandbLogger, data: ImageData, logits: Tensor, targets: Tensor) -> None:
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


def log_conversion(report: dict, command: Command, out: Path, folder: RunFolder) -> None:
    """Add the table, its figures, the picture and all files to the W&B run of the training."""
    logger = wandb_logger(command, folder)
    if logger is not None:
        _tried(logger, _send_conversion, logger.experiment, report, out)
        finish()


def _send_conversion(run: Any, report: dict, out: Path) -> None:
    run.log({"convert": wandb.Table(["measure", "before", "after"], rows(report)),
             "convert/report": wandb.Image(str(out / "report.png"))})
    for when in ("before", "after"):
        run.summary.update({f"convert/{when}/{name}": value for name, value in report[when].items()})
    compared = ("predictions_changed", "ties", "relative_error")
    run.summary.update({f"convert/{name}": report[name] for name in compared})
    artifact = wandb.Artifact(f"converted-{run.id}", "model", metadata=report["about"])
    for name in (*report["files"], *report["hub"], *REPORTS, *([GRAPHS] if "graphs" in report else [])):
        if (out / name).exists():
            artifact.add_file(str(out / name), name)
    run.log_artifact(artifact)
