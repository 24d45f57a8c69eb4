"""Read a checkpoint of train.py: an untrusted file of plain values and tensors."""

import json
import re
from functools import lru_cache
from pathlib import Path
from types import UnionType
from typing import Any

import torch

from models import limits
from models.plain import are_weights, damage, sparse, strange

OF_LIGHTNING = {"epoch": int, "global_step": int, "loops": dict, "callbacks": dict, "optimizer_states": list,
                "lr_schedulers": list}  # that train.py goes on with

VERSION = r"2(\.\d{1,4}){1,3}((a|b|rc|\.post|\.dev)\d{1,8})?"
DIGESTS = "weights_digest", "image_digest", "test_digest"  # in hexadecimal
GROUPS = ("model", "block", "data", "optim", "trainer")  # of the settings; an old file has no others


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
    wrong = sparse(Path(path)) or damage(Path(path))
    if wrong is not None:
        raise ValueError(f"ckpt={path} cannot be read: it is damaged, or no checkpoint of plain tensors "
                         f"({wrong})")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds, depending on what is pickled
        raise ValueError(f"ckpt={path} cannot be read: it is damaged, or no checkpoint of plain "
                         "tensors") from error
    wrong = strange(checkpoint, Path(path).stat().st_size)
    if wrong is not None:
        raise ValueError(f"ckpt={path} was not written by train.py: {wrong}")
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("dbb"), dict) \
            or not isinstance(checkpoint["dbb"].get("settings"), dict):
        raise ValueError(f"ckpt={path} was not written by train.py: it holds no settings of ours")
    _refuse_strange(checkpoint, path)
    for name in {"state_dict", "current_model_state"} & checkpoint.keys():
        checkpoint[name] = dict(checkpoint[name])  # an attribute may have them assigned, of whatever type
    return checkpoint


def _refuse_strange(checkpoint: dict[str, Any], path: str | Path) -> None:
    """Refuse what train.py never writes."""
    about = checkpoint["dbb"]
    classes, size = about.get("classes"), about.get("image_size")
    place, settings = about.get("place", (0, 0)), about["settings"]
    counts = [about.get(name, 0) for name in ("images", "test_images", "processes")]
    digests = [about[name] for name in DIGESTS if about.get(name) is not None]
    changed = about.get("changed", [])
    good = (all(isinstance(checkpoint.get(key), kind) for key, kind in OF_LIGHTNING.items())
            and _is_plain(settings)
            and min(checkpoint["epoch"], checkpoint["global_step"]) >= 0
            and all(isinstance(settings.get(group), dict) for group in GROUPS)
            and isinstance(classes, list) and 0 < len(classes) <= limits.CLASSES
            and all(isinstance(name, str) for name in classes)
            and isinstance(size, int) and 0 < size <= limits.IMAGE_SIZE
            and settings["data"].get("image_size") in (None, size)
            and are_weights(checkpoint.get("state_dict"))
            and are_weights(checkpoint.get("current_model_state", {}))  # beside their average
            and {*map(type, counts)} == {int} and isinstance(changed, list)
            and all(isinstance(change, str) for change in changed)
            and len(str(changed)) <= limits.CHANGES
            and all(isinstance(digest, str) and re.fullmatch("[0-9a-f]{1,64}", digest) for digest in digests)
            and isinstance(settings.get("logger") or {}, dict)  # an old file has none
            and _are_counts(checkpoint["loops"], int)
            and _are_counts(checkpoint["callbacks"].get("Timer", {}), int | float)  # seconds
            and _has_its_average(checkpoint) and _has_its_masks(checkpoint)
            and isinstance(version := checkpoint.get("pytorch-lightning_version", "2.6"), str)
            and re.fullmatch(VERSION, version)
            and isinstance(place, list | tuple) and [type(number) for number in place] == [int, int]
            and min(place) >= 0 and max(place) < 2**31 and place[0] - checkpoint["epoch"] in (0, 1)
            and _is_loss(checkpoint["callbacks"].get("EpochLoss"), place[1])
            and len(str(settings)) <= 2 * limits.SETTINGS  # with quotes and brackets
            and "${" not in str(settings))  # which would be resolved, with what is secret here
    if not good:
        raise ValueError(f"ckpt={path} was not written by train.py: its settings, classes, image size, "
                         "counts or weights are of another form")


def _is_plain(settings: dict[str, Any]) -> bool:
    """Whether settings hold no tensors, whose comparisons are tensors too."""
    try:
        json.dumps(settings)
        return True
    except (TypeError, ValueError, RecursionError):
        return False


def _is_loss(found: Any, batches: int) -> bool:
    """Whether something is the state of `training.callbacks.EpochLoss` after so many batches of an epoch."""
    if found is None:  # in an old file
        return batches == 0
    return (isinstance(found, dict) and isinstance(found.get("total"), float)
            and _are_counts(found.get("count"), int) and found["count"] > 0
            and batches in (0, found["count"]))


def _are_counts(found: Any, kind: type | UnionType) -> bool:
    """Whether something has, in dicts of dicts, only what Lightning counts, of some type."""
    if isinstance(found, dict):
        return all(_are_counts(value, kind) for value in found.values())
    return isinstance(found, kind) and 0 <= found < 2**40  # of seconds, more overflow


def _has_its_average(checkpoint: dict[str, Any]) -> bool:
    """Whether there is an average of the weights if the settings want one, and only then.

    One that says of more steps than the training has would take none for as long.
    """
    callback, state = checkpoint["callbacks"].get("EMAWeightAveraging"), checkpoint.get("averaging_state")
    if checkpoint["dbb"]["settings"]["optim"].get("ema_decay") is None:
        return callback is state is None and "current_model_state" not in checkpoint
    if not (isinstance(callback, dict) and callback.keys() == {"latest_update_step"}
            and isinstance(state, dict) and state.keys() == {"n_averaged"}
            and "current_model_state" in checkpoint):
        return False
    last, taken, most = callback["latest_update_step"], state["n_averaged"], checkpoint["global_step"]
    return (_are_counts(last, int) and last <= most and isinstance(taken, torch.Tensor)
            and taken.dtype == torch.int64 and not taken.ndim and 0 <= taken <= most)


def _has_its_masks(checkpoint: dict[str, Any]) -> bool:
    """Whether there is the state of `training.sgs.ScaleGradients` if the settings want one, and only then."""
    found = checkpoint["callbacks"].get("ScaleGradients")
    if checkpoint["dbb"]["settings"]["block"].get("sgs_every_n_epochs") is None:
        return found is None
    return (isinstance(found, dict) and _are_counts(found.get("epoch"), int)
            and are_weights(found.get("masks"))
            and all(mask.is_floating_point() for mask in found["masks"].values()))


def place_of(checkpoint: dict[str, Any]) -> tuple[int, int]:
    """How many epochs are done, and how many batches of the next one, by a checkpoint of train.py.

    One that does not say stands at the end of an epoch.
    """
    return tuple(checkpoint["dbb"].get("place", (checkpoint["epoch"] + 1, 0)))
