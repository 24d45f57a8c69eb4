"""What keeps a run's work: files that are whole or not there."""

import os
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.utilities import rank_zero_only

from models.checkpoint import damage


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, to the disk itself, and then renames. Keeps the checkpoint before, too."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options=None) -> None:
        path = Path(path)
        part = path.with_name(f".{path.name}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            if path.exists():
                path.replace(previous(path))
            part.replace(path)
        except (OSError, RuntimeError) as error:  # the latter is torch's, for a disk that is full
            part.unlink(missing_ok=True)
            why = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise OSError(f"{path} could not be written ({why}): make room, and the same command goes on "
                          "from the checkpoint before") from error


def previous(path: Path) -> Path:
    """Where the checkpoint before this one is kept."""
    return path.with_name(f"{path.stem}-previous{path.suffix}")


def newest(last: Path) -> Path | None:
    """The checkpoint to go on from, None if there is none.

    That is `last`; where it is missing or damaged, the one before it, with a printed sentence. A damaged one
    is renamed, so that it does not take the place of the good one at the next save.
    """
    wrong = damage(last) if last.exists() else "it is missing"
    if wrong is None:
        return last
    before = previous(last)
    if before.exists() and damage(before) is None:
        rank_zero_only(print)(f"{last} cannot be used ({wrong}): going on from the one before, {before.name}")
        if rank_zero_only.rank == 0 and last.exists():
            last.replace(last.with_name(f"{last.stem}-damaged{last.suffix}"))
        return before
    return last if last.exists() else None


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all: a process that is killed leaves no half of one."""
    part = path.with_name(f".{path.name}")
    part.write_text(text)
    part.replace(path)
