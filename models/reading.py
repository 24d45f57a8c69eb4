"""Weights in files of many makers: tensors by name, and what the file says of them."""

import json
import math
import multiprocessing
import re
import resource
from argparse import Namespace
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from models import limits
from models.plain import are_weights, damage, sparse, strange
from models.say import say, shown

AVERAGED = ("state_dict_ema", "model_ema")  # timm's and torchvision's names
WRAPPERS = (*AVERAGED, "state_dict", "model_state_dict", "model")
ABOUT = {"model": str, "classes": list, "mean": list, "std": list, "interpolation": str,
         "crop_pct": int | float, "image_size": int}
ABOUT_PARTS = {"classes": str, "mean": int | float, "std": int | float}
PREPARED = ("mean", "std", "interpolation", "crop_pct", "image_size")  # what images were prepared with


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file of weights onto the CPU: .safetensors, .hdf5 and .h5, all others as PyTorch writes them.

    A dict under one of `WRAPPERS` is unwrapped: averaged weights first, which timm and torchvision test by;
    under another key, if it is the only one of tensors. What DataParallel, torch.compile and our own
    checkpoints set before a key is taken off.

    Returns:
        The weights, and what the file says of them: `model`, the name in `models.BACKBONES` or timm's; of a
        file of ours also `classes`; of ours and of timm's script, some of `PREPARED`.

    Raises:
        ValueError: if the file is missing, damaged, or holds more than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file of weights")
    about = {}
    kind = path.suffix.lower()
    try:
        _refuse(sparse(path))
        if kind == ".safetensors":
            weights, about = load_file(path), _header(path)
        elif kind in (".hdf5", ".h5"):
            weights = {key: torch.as_tensor(value) for key, value in _in_a_process(_of_hdf5, path).items()}
        else:
            _refuse(damage(path))
            weights = torch.load(path, map_location="cpu", weights_only=True)
        _refuse(strange(weights, path.stat().st_size))
    except Exception as error:  # whatever its reader raises on an untrusted file
        held = re.search(r"GLOBAL ([\w.]+)", str(error))
        why = (str(error).splitlines() or [type(error).__name__])[0]
        more = f"a {held[1]}: save its tensors alone, torch.save(state_dict, FILE)" if held else shown(why)
        raise ValueError(f"{path} cannot be read: it is damaged, or holds more than plain tensors ({more})"
                         ) from error
    prefix = r"(module\.|_orig_mod\.)+"
    if isinstance(weights, dict) and "dbb" in weights:
        prefix, about = r"net\.", _of_our_checkpoint(weights["dbb"], path)
    elif isinstance(weights, dict) and isinstance(weights.get("arch"), str):
        about = _of_timms_script(weights)
    weights = _unwrapped(weights, path)
    weights.pop("n_averaged", None)
    named = {re.sub(f"^{prefix}", "", key): value for key, value in weights.items()}
    if len(named) < len(weights):
        raise ValueError(f"{path} holds tensors of one name twice, with and without a prefix: save those of "
                         "one network alone")
    return named, _known(about)


def _refuse(wrong: str | None) -> None:
    """Raise a ValueError with what is wrong with a file, if anything is."""
    if wrong is not None:
        raise ValueError(wrong)


def _known(about: Any) -> dict[str, Any]:
    """What a file says of itself, of the types that this must have."""
    found = {} if not isinstance(about, dict) else \
        {key: about[key] for key, kind in ABOUT.items() if isinstance(about.get(key), kind)}
    return {key: value for key, value in found.items()
            if not isinstance(value, list) or all(isinstance(part, ABOUT_PARTS[key]) for part in value)}


def _in_a_process(read: Callable, path: Path) -> Any:
    """What a function makes of a file, in a process of its own with a limit of time.

    By a list that names itself, a small file has libhdf5 read for ever, or end the process.
    """
    context = multiprocessing.get_context("fork")  # which imports nothing again
    limit = limits.HDF5_SECONDS, limits.HDF5_SECONDS
    with ProcessPoolExecutor(1, context, resource.setrlimit, (resource.RLIMIT_CPU, limit)) as pool:
        try:
            return pool.submit(read, path).result()
        except BrokenProcessPool as error:
            raise ValueError(f"reading it crashed, or took over {limits.HDF5_SECONDS} seconds") from error


def _of_hdf5(path: Path) -> dict[str, np.ndarray]:
    """The data sets of a file, which hold no more than it has room for, and lie in it."""
    with h5py.File(path) as file:
        if any(type(file.get(key, getlink=True)) is not h5py.HardLink for key in file):
            raise ValueError("it points to other files")
        sets = {key: value for key, value in file.items() if isinstance(value, h5py.Dataset)}
        size = sum(value.nbytes for value in sets.values())
        if any(value.external or value.is_virtual for value in sets.values()):
            raise ValueError("it points to other files")
        if any(value.dtype.hasobject or value.id.get_create_plist().get_nfilters()
               for value in sets.values()):
            raise ValueError("it is compressed, or holds more than numbers")  # perhaps to fill a memory
        if any(value.id.get_storage_size() < value.nbytes or value.chunks and value.id.get_num_chunks()
               < math.prod(-(-size // part) for size, part in zip(value.shape, value.chunks, strict=True))
               for value in sets.values()):
            raise ValueError("it lacks values")
        if size > limits.UNPACKED * path.stat().st_size:
            raise ValueError("it is larger unpacked than weights are")
        return {key: value[()] for key, value in sets.items()}


def _unwrapped(weights: Any, path: Path) -> dict[str, Tensor]:
    while not are_weights(weights):
        inner = weights if isinstance(weights, dict) else {}
        named = [key for key in WRAPPERS if isinstance(inner.get(key), dict) and inner[key]]
        others = [key for key, value in inner.items()
                  if isinstance(value, dict) and value and are_weights(value)]
        key = named[0] if named else others[0] if len(others) == 1 else None
        if key is None:
            raise ValueError(f"{path} is no file of weights: it must hold tensors by name, alone or under "
                             "state_dict or model")
        if key in AVERAGED:
            say(f"{path}: its averaged weights are taken ({key})")
        weights = inner[key]
    return weights


def _header(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        return parse_header((file.metadata() or {}).get("dbb", "{}"))


def parse_header(text: str) -> Any:
    """The JSON in the header of a file of weights; a ValueError if it is longer than any of ours, or none."""
    if len(text) > limits.HEADER:
        raise ValueError("its header is longer than any of ours")
    return json.loads(text)


def _of_our_checkpoint(stored: Any, path: Path) -> dict[str, Any]:
    try:
        if not isinstance(stored, dict) or not isinstance(stored["settings"], dict):
            raise TypeError("it is no dict")
        about = {"model": stored["settings"]["model"]["name"]}
        about |= {key: stored[key] for key in ("classes", "image_size") if key in stored}
        data = stored["settings"].get("data", {})
        return {key: data[key] for key in PREPARED if key in data} | about
    except (AttributeError, KeyError, RuntimeError, TypeError) as error:  # of tensors among them, too
        raise ValueError(f"{path}: its key dbb is that of a checkpoint of train.py, with settings of another "
                         "form") from error


def _of_timms_script(stored: dict[str, Any]) -> dict[str, Any]:
    # A name, perhaps with a hub before and a tag behind it; or a class's name, or one that timm has given up,
    # which say nothing here: then keys and shapes decide.
    name = stored["arch"].rpartition("/")[2].split(".")[0]
    about = {"model": name} if name in timm.list_models() else {}
    asked = vars(stored["args"]) if isinstance(stored.get("args"), Namespace) else {}
    asked = asked | {"image_size": asked.get("img_size")}
    for key in PREPARED:
        if asked.get(key) is not None:
            about[key] = list(asked[key]) if isinstance(asked[key], tuple) else asked[key]
    return about
