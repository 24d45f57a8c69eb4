"""metrics.csv: written by Lightning's logger, which is made to go on with a file and to leave it whole."""

import csv
import io
import warnings
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.utilities import rank_zero_only

from models.say import say
from runs.folder import RunFolder
from runs.rows import read_rows
from runs.safety import free_number, set_aside, write_text


def csv_logger(folder: RunFolder, epochs: int = 0, step: int = 0) -> CSVLogger:
    """A logger that goes on with a run's metrics.csv, which Lightning's own deletes.

    Args:
        folder: of the run.
        epochs: that are done, where the run goes on from.
        step: of the optimiser, likewise. Rows of later ones go: they are done again. If both are 0, epochs
            that are there are kept in a file beside it.
    """
    path, kept = folder.metrics, folder.metrics_before
    writes = rank_zero_only.rank == 0
    if kept.exists() and writes:
        # Of a process that was killed here; or, beside metrics.csv, of somebody else.
        set_aside(kept) if path.exists() else kept.rename(path)
    if path.exists() and writes:
        _keep_until(path, epochs, step)
        path.rename(kept)
    logger = CSVLogger(folder.path, name="", version="")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Experiment logs directory")  # its metrics.csv was moved away
        writer = logger.experiment
    writer._rewrite_with_new_header = partial(_widen, path)
    if kept.exists() and writes:
        kept.rename(path)
        with path.open(newline="") as file:
            writer.metrics_keys = next(csv.reader(file), [])
    return logger


def _keep_until(path: Path, epochs: int, step: int) -> None:
    """Leave out damaged lines, and rows of what comes after; a file without a header is set aside."""
    try:
        names, rows, damaged, cut = read_rows(path)
    except ValueError as error:
        raise ValueError(f"{path} was not written by a run ({error}): remove it") from error
    if not names:
        if damaged or cut:
            aside = set_aside(path)
            say(f"{path} has no line of names with step in it: it is now {aside.name}")
        write_text(path, "")
        return
    if epochs == step == 0 and any(_of_an_epoch(dict(zip(names, row, strict=True))) for row in rows):
        def earlier(number):
            return path.with_name(f"metrics-earlier{number}.csv")
        kept = path.rename(earlier(free_number(earlier)))
        write_text(path, "")
        say(f"{path} has epochs of a training that is not gone on with: it is now {kept.name}")
        return
    if damaged or cut:
        say(f"{path}: damaged lines are left out: {damaged + cut}")
    kept = [row for row in rows if not _comes_after(dict(zip(names, row, strict=True)), epochs, step)]
    if len(kept) < len(rows):
        say(f"{path}: rows of what is done again are left out: {len(rows) - len(kept)}")
    columns = sorted(set(names))  # the logger adds columns to a sorted list
    places = [names.index(name) for name in columns]
    write_text(path, _csv([columns, *([row[place] for place in places] for row in kept)]))


def _comes_after(row: dict[str, str], epochs: int, step: int) -> bool:
    """Whether a row is of a step, or says something of an epoch, that is not done at that place."""
    def number(name):
        try:
            return float(row.get(name, ""))
        except ValueError:
            return -1.0
    return number("step") >= step or (_of_an_epoch(row) and number("epoch") >= epochs)


def _of_an_epoch(row: dict[str, str]) -> bool:
    of_steps = ("train/loss_step", "lr-", "epoch", "step")
    return any(value for name, value in row.items() if not name.startswith(of_steps))


def _widen(path: Path, columns: Sequence[str]) -> None:
    """Add columns, as Lightning's `_rewrite_with_new_header` does, which a kill leaves with an empty file."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    write_text(path, _csv([columns, *([row.get(name, "") for name in columns] for row in rows)]))


def _csv(rows: Iterable[Sequence[str]]) -> str:
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue()
