"""metrics.csv as it lies in a run's folder, whoever wrote it."""

import csv
from pathlib import Path
from typing import NamedTuple

from models import limits


class Rows(NamedTuple):
    """The columns, the whole rows below their names, how many lines are damaged, whether the last is cut."""

    names: list[str]
    rows: list[list[str]]
    damaged: int
    cut: bool


def read_rows(path: Path) -> Rows:
    """Read a metrics.csv line by line; one without a line of names that has `step` has no names and no rows.

    Raises:
        ValueError: if it is no plain file, or holds more than a run writes.
    """
    if path.is_symlink() or not path.is_file():
        raise ValueError("it is a link, or no file")
    names, rows, damaged, cut, held = [], [], 0, False, 0
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        while line := file.readline(limits.LINE):
            held += 4 + max(line.count(","), len(line) // 8)
            if held > limits.CELLS:
                raise ValueError(f"it has more than {limits.CELLS:,} values")
            began, cut = not cut, not line.endswith("\n")  # a full disk cuts the last line
            cells = next(csv.reader([line])) if began and not cut else []
            if not names and "step" in cells:
                names = cells
            elif names and len(cells) == len(names):
                rows.append(cells)
            else:
                damaged += began
    return Rows(names, rows, damaged - cut, cut)
