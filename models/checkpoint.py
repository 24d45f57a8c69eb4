"""Read a checkpoint of train.py: an untrusted file of plain values and tensors."""

import zipfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from models import limits

OF_LIGHTNING = {"epoch": int, "global_step": int, "loops": dict, "callbacks": dict, "optimizer_states": list,
                "lr_schedulers": list}  # that train.py goes on with


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
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("dbb"), dict) \
            or not isinstance(checkpoint["dbb"].get("settings"), dict):
        raise ValueError(f"ckpt={path} was not written by train.py: it holds no settings of ours")
    _refuse_strange(checkpoint, path)
    return checkpoint


def _refuse_strange(checkpoint: dict[str, Any], path: str | Path) -> None:
    """Refuse what train.py never writes, and what would take more memory than the file has."""
    wrong = strange(checkpoint)
    if wrong is not None:
        raise ValueError(f"ckpt={path} was not written by train.py: {wrong}")
    about, weights = checkpoint["dbb"], checkpoint.get("state_dict")
    classes, size = about.get("classes"), about.get("image_size")
    place, data = about.get("place", (0, 0)), about["settings"].get("data")
    images = about.get("images", 0)
    good = (isinstance(classes, list) and 0 < len(classes) <= limits.CLASSES
            and all(isinstance(name, str) for name in classes)
            and isinstance(size, int) and 0 < size <= limits.IMAGE_SIZE
            and (not isinstance(data, dict) or data.get("image_size") in (None, size))
            and isinstance(weights, dict) and isinstance(images, int)
            and isinstance(place, list | tuple) and [type(number) for number in place] == [int, int]
            and all(isinstance(checkpoint.get(key), kind) for key, kind in OF_LIGHTNING.items())
            and all(isinstance(value, torch.Tensor) for value in weights.values())
            and "${" not in str(about["settings"]))  # which would be resolved, with what is secret here
    if not good:
        raise ValueError(f"ckpt={path} was not written by train.py: its settings, classes, image size or "
                         "weights are of another form")


def strange(found: Any) -> str | None:
    """What is wrong with nested values of a file, which may name one of them many times; None if nothing is.

    Tensors must be dense, and not larger than what the file holds of them.
    """
    waiting, count = [found], 0
    while waiting:
        value, count = waiting.pop(), count + 1
        if count > limits.VALUES:
            return f"it has more than {limits.VALUES:,} values"
        if isinstance(value, dict):
            waiting += [*value, *value.values()]
        elif isinstance(value, list | tuple):
            waiting += value
        elif isinstance(value, torch.Tensor):
            if value.layout != torch.strided or value.is_meta:
                return "it has a tensor without plain values"
            if value.numel() * value.element_size() > value.untyped_storage().nbytes():
                return "a tensor is larger than what the file holds of it"
    return None


def place_of(checkpoint: dict[str, Any]) -> tuple[int, int]:
    """How many epochs are done, and how many batches of the next one, by a checkpoint of train.py.

    One that does not say stands at the end of an epoch.
    """
    return tuple(checkpoint["dbb"].get("place", (checkpoint["epoch"] + 1, 0)))


def asks_for_memory(pickled: bytes) -> bool:
    """Whether a pickle calls what takes any number of bytes; PyTorch's reader allows it."""
    return b"\nbytearray\n" in pickled


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint file by its own checksums; None if nothing is."""
    try:
        with zipfile.ZipFile(path) as file:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in file.infolist()):
                return "it is compressed, as train.py writes none"  # perhaps to fill a memory
            if any(asks_for_memory(file.read(entry)) for entry in file.infolist()
                   if entry.filename.endswith(".pkl")):
                return "it asks for memory that it does not fill"
            broken = file.testzip()
    except (OSError, MemoryError):  # of the machine, perhaps for a moment
        raise
    except Exception as error:  # of many kinds, depending on the bytes
        return str(error)
    return None if broken is None else f"the checksum of {broken} is wrong"
