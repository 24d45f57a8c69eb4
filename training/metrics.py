"""metrics.csv: written by Lightning's logger, which is made to go on with a file and to leave it whole."""

import csv
import io
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.utilities import rank_zero_only

from models import limits
from models.say import say
from runs.folder import RunFolder
from runs.safety import set_aside, write_text


def csv_logger(folder: RunFolder, epochs: int = 0, step: int = 0) -> CSVLogger:
    """A logger that goes on with a run's metrics.csv, which Lightning's own deletes.

    Args:
        folder: of the run.
        epochs: that are done, where the run goes on from.
        step: of the optimiser, likewise. Rows of later ones go: they are done again.
    """
    path, kept = folder.metrics, folder.metrics_before
    writes = rank_zero_only.rank == 0
    if path.is_symlink() and not path.exists() and writes:
        path.unlink()  # by which a file would be made where it points to
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
    lines = path.read_bytes().decode("utf-8-sig", errors="replace").splitlines(keepends=True)
    parsed = [next(csv.reader([line])) for line in lines  # a full disk cuts the last
              if line.endswith("\n") and len(line) < limits.LINE]
    first = next((place for place, cells in enumerate(parsed) if "step" in cells), None)
    if first is None:
        if lines:
            aside = set_aside(path)
            say(f"{path} has no line of names with step in it: it is now {aside.name}")
        write_text(path, "")
        return
    names = parsed[first]
    whole = [cells for cells in parsed[first + 1:] if len(cells) == len(names)]
    if len(whole) < len(lines) - 1:
        say(f"{path}: damaged lines are left out: {len(lines) - 1 - len(whole)}")
    rows = [dict(zip(names, cells, strict=True)) for cells in whole]
    kept = [row for row in rows if not _comes_after(row, epochs, step)]
    if len(kept) < len(rows):
        say(f"{path}: rows of what is done again are left out: {len(rows) - len(kept)}")
    write_text(path, _csv(sorted(names), kept))  # the logger adds columns to a sorted list


def _comes_after(row: dict[str, str], epochs: int, step: int) -> bool:
    """Whether a row is of a step, or says something of an epoch, that is not done at that place."""
    def number(name):
        try:
            return float(row.get(name, ""))
        except ValueError:
            return -1.0
    of_steps = ("train/loss_step", "lr-", "epoch", "step")
    of_an_epoch = any(value for name, value in row.items() if not name.startswith(of_steps))
    return number("step") >= step or (of_an_epoch and number("epoch") >= epochs)


def _widen(path: Path, columns: Sequence[str]) -> None:
    """Add columns, as Lightning's `_rewrite_with_new_header` does, which a kill leaves with an empty file."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    write_text(path, _csv(columns, rows))


def _csv(columns: Sequence[str], rows: Sequence[dict[str, str]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
