"""Going on from an earlier checkpoint of a run's folder: what was trained since then is kept beside it.

The newest state becomes `last-left.ckpt`, its rows `metrics-left.csv`; both can be gone back to in turn.
"""

import filecmp
from pathlib import Path

from models import limits
from models.checkpoint import load_checkpoint
from models.say import say
from runs.folder import RunFolder
from runs.reading import identity
from runs.safety import copy_whole, free_number, is_whole, previous, set_aside, write_text


def go_back(folder: RunFolder, ckpt: str | None) -> None:
    """Have last.ckpt be what the run goes on from, if that is another checkpoint of its folder.

    What was the newest state is kept as last-left.ckpt, its rows as metrics-left.csv, and these come back
    with it.

    Raises:
        ValueError: if rows are more than a run writes; nothing is renamed then.
    """
    if not folder.goes_back(ckpt):
        return
    last, asked = folder.last, Path(ckpt).resolve()
    for path in filter(Path.is_file, (folder.metrics, _rows_of(asked))):
        if path.stat().st_size > 8 * limits.CELLS:
            raise ValueError(f"{path} is larger than any that a run writes: remove it")
    coming = folder.checkpoints / ".last-coming.ckpt"
    copy_whole(asked, coming)  # first, so that a full disk changes nothing
    try:
        _leave_newest(folder, asked)
        coming.replace(last)
    finally:
        coming.unlink(missing_ok=True)
    if _has_rows(asked):
        write_text(folder.metrics, _rows_of(asked).read_text(errors="replace"))


def _leave_newest(folder: RunFolder, asked: Path) -> None:
    """Rename the newest state and keep its rows, unless that is what is asked for, or a copy of it."""
    last = folder.last
    newest = next(filter(is_whole, (last, previous(last))), None)
    kept_ones = [asked, *filter(_has_rows, folder.checkpoints.glob("last-left*.ckpt"))]
    if newest == last and any(filecmp.cmp(newest, path, shallow=False) for path in kept_ones):
        newest.unlink()  # the copy of one of them: an earlier attempt saved nothing
    elif newest is not None and not newest.samefile(asked):
        kept = _free_place(folder)
        if folder.metrics.is_file():
            write_text(_rows_of(kept), folder.metrics.read_text(errors="replace"))
        newest.rename(kept)
        say(f"going on from {asked}: {newest} is now {kept.name}")
    if asked == previous(last).resolve():
        say(f"{asked.name} is replaced as training goes on: copy it first, to start from it again")
    set_aside(last)
    folder.result.unlink(missing_ok=True)


def has_rows_of(folder: RunFolder, ckpt: str | None) -> bool:
    """Whether metrics.csv is of the run that wrote a checkpoint, wherever that lies."""
    known, newest_ones = identity(folder.read_config() or {}), (folder.last, previous(folder.last))
    if ckpt is None or known is None or Path(ckpt).resolve() in map(Path.resolve, newest_ones):
        return folder.has_state
    if folder.goes_back(ckpt) and _has_rows(Path(ckpt).resolve()):
        return True
    return known == identity(load_checkpoint(ckpt)["dbb"]["settings"])


def _free_place(folder: RunFolder) -> Path:
    def left(number):
        return folder.checkpoints / f"last-left{number}.ckpt"
    return left(free_number(left, lambda number: _rows_of(left(number))))


def _rows_of(left: Path) -> Path:
    """The rows of a checkpoint that was left, `metrics-left.csv` of `last-left.ckpt`."""
    return left.parent.parent / f"{left.stem.replace('last', 'metrics', 1)}.csv"


def _has_rows(ckpt: Path) -> bool:
    return ckpt.name.startswith("last-left") and _rows_of(ckpt).is_file()
