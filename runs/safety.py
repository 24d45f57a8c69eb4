"""What keeps a run's work: files that are whole or not there."""

import copy
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain, count
from pathlib import Path
from typing import IO, Any

import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.utilities import rank_zero_only

from models.checkpoint import load_checkpoint
from models.say import say


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, to the disk itself, and then renames. Keeps the checkpoint before, too."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options=None) -> None:
        path = Path(path)
        part = path.with_name(f".{path.name}.part")
        try:
            path.parent.mkdir(exist_ok=True)
            with _to_the_disk(part, "wb") as file:
                torch.save(checkpoint, file)
            if path.exists():
                path.replace(previous(path))
            part.replace(path)
        except (OSError, RuntimeError) as error:  # the latter is torch's, for a disk that is full
            why = getattr(error, "strerror", None) or "the disk may be full"
            forbidden = getattr(error, "errno", None) in (errno.EPERM, errno.EACCES, errno.EROFS)
            first = "let this user write there" if forbidden else "make room"
            if isinstance(error, FileNotFoundError):
                first = "go on where the run's folder lies now, if it was renamed"
            raise OSError(f"{path} could not be written ({why}): {first}, and the same command goes on "
                          "from the checkpoint before") from error

    def load_checkpoint(self, path: str | Path, *args, **kwargs) -> dict[str, Any]:
        """Give Lightning a copy of its own, which an optimiser then writes into."""
        return copy.deepcopy(load_checkpoint(path))


def previous(path: Path) -> Path:
    """Where the checkpoint before this one is kept."""
    return path.with_name(f"{path.stem}-previous{path.suffix}")


def is_whole(ckpt: Path) -> bool:
    """Whether a checkpoint is there, and can be read."""
    try:
        load_checkpoint(ckpt)
    except ValueError:
        return False
    return True


def newest(last: Path) -> Path | None:
    """The checkpoint to go on from, None if there is none.

    That is `last`; where it is missing or damaged, the one before it, with a printed sentence.
    """
    try:
        load_checkpoint(last)
        return last
    except ValueError as error:
        wrong = error
    before = previous(last)
    try:
        load_checkpoint(before)
    except ValueError:
        if before.exists():
            say(f"{before} cannot be read" + (" either" if last.exists() else ": it is left out"))
        return last if last.exists() else None
    say(f"{wrong}; going on from the one before, {before.name}")
    return before


def set_aside(path: Path) -> Path | None:
    """Rename a damaged file, so that no other takes its place; returned is its new name."""
    if rank_zero_only.rank or not path.exists():
        return None

    def damaged(number):
        return path.with_name(f"{path.stem}-damaged{number}{path.suffix}")
    return path.rename(damaged(free_number(damaged)))


def free_number(*names: Callable[[str], Path]) -> str:
    """The first of "", "2", "3" ... by which none of some files exists."""
    numbers = map(str, chain([""], count(2)))
    return next(number for number in numbers if not any(name(number).exists() for name in names))


def copy_whole(source: Path, target: Path) -> None:
    """Copy a file whole or not at all."""
    part = target.with_name(f".{target.name}.part")
    with source.open("rb") as read, _to_the_disk(part, "wb") as file:
        shutil.copyfileobj(read, file)
    part.replace(target)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all: a process that is killed leaves no half of one."""
    part = path.with_name(f".{path.name}.part")
    with _to_the_disk(part, "w") as file:
        file.write(text)
    part.replace(path)


@contextmanager
def _to_the_disk(path: Path, mode: str) -> Iterator[IO]:
    """Open a file whose content is on the disk itself, not in a cache, when it is closed."""
    path.unlink(missing_ok=True)  # of a killed process; or somebody's link, which may lead anywhere
    try:
        with path.open(mode.replace("w", "x")) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError):  # a full disk, mostly, which the part would keep full
        with suppress(OSError):
            path.unlink(missing_ok=True)
        raise
