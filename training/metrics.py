"""metrics.csv: written by Lightning's logger, which is made to go on with a file and to leave it whole."""

import csv
import io
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.utilities import rank_zero_only

from models.say import say
from runs.folder import RunFolder
from runs.safety import write_text


def csv_logger(folder: RunFolder) -> CSVLogger:
    """A logger that appends to a run's metrics.csv; Lightning's own deletes it."""
    path, kept = folder.metrics, folder.metrics_before
    if path.exists() and rank_zero_only.rank == 0:
        _leave_out_damaged_lines(path)
        path.rename(kept)
    logger = CSVLogger(folder.path, name="", version="")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Experiment logs directory")  # its metrics.csv was moved away
        writer = logger.experiment
    writer._rewrite_with_new_header = partial(_widen, path)
    if kept.exists():
        kept.rename(path)
        with path.open(newline="") as file:
            writer.metrics_keys = next(csv.reader(file), [])
    return logger


def _leave_out_damaged_lines(path: Path) -> None:
    """Keep the lines with as many cells as the first. A disk that was full within a line has cut it."""
    *lines, rest = path.read_bytes().decode(errors="replace").splitlines(keepends=True) or [""]
    whole = [*lines, rest] if rest.endswith("\n") else lines
    cells = [len(next(csv.reader([line]))) for line in whole]
    kept = [line for line, count in zip(whole, cells, strict=True) if count == cells[0]]
    left_out = len(lines) + bool(rest) - len(kept)
    if left_out:
        say(f"{path}: damaged lines are left out: {left_out}")
        write_text(path, "".join(kept))


def _widen(path: Path, columns: Sequence[str]) -> None:
    """Add columns, as Lightning's `_rewrite_with_new_header` does, which a kill leaves with an empty file."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
