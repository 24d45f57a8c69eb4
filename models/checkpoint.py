"""Read a checkpoint of train.py: an untrusted file of plain values and tensors."""

import zipfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch


def load_checkpoint(path: str | Path | None) -> dict[str, Any]:
    """Load a checkpoint of train.py onto the CPU; whoever asks for the same file again gets the same object.

    Raises:
        ValueError: if it is missing, damaged, not of plain values and tensors only, or not one of ours.
    """
    if path is None:
        raise ValueError("ckpt=PATH is needed: the checkpoint of a run, outputs/.../checkpoints/last.ckpt")
    if not Path(path).is_file():
        raise ValueError(f"ckpt={path}: there is no such file; a run keeps its own under "
                         "outputs/.../checkpoints/last.ckpt")
    state = Path(path).stat()
    return _load(path, (state.st_ino, state.st_size, state.st_mtime_ns))


@lru_cache(maxsize=1)
def _load(path: str | Path, version: tuple[int, ...]) -> dict[str, Any]:
    wrong = damage(Path(path))
    if wrong is not None:
        raise ValueError(f"ckpt={path} cannot be read: it is damaged, or no checkpoint of plain tensors "
                         f"({wrong})")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds, depending on what is pickled
        raise ValueError(f"ckpt={path} cannot be read: it is damaged, or no checkpoint of plain "
                         "tensors") from error
    if not isinstance(checkpoint, dict) or "settings" not in checkpoint.get("dbb", ()):
        raise ValueError(f"ckpt={path} was not written by train.py: it holds no settings of ours")
    return checkpoint


def place_of(checkpoint: dict[str, Any]) -> tuple[int, int]:
    """How many epochs are done, and how many batches of the next one, by a checkpoint of train.py.

    One that does not say stands at the end of an epoch.
    """
    return tuple(checkpoint["dbb"].get("place", (checkpoint["epoch"] + 1, 0)))


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint file by its own checksums; None if nothing is."""
    try:
        with zipfile.ZipFile(path) as file:
            broken = file.testzip()
    except Exception as error:  # of many kinds, depending on the bytes
        return str(error)
    return None if broken is None else f"the checksum of {broken} is wrong"
