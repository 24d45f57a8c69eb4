"""What a file of PyTorch's may hold, whoever wrote it: tensors, and plain values around them."""

import errno
import os
import tarfile
import zipfile
from argparse import Namespace
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch

from models import limits
from models.pickles import Pickle


def are_weights(found: Any) -> bool:
    """Whether something is a state dict: tensors by name."""
    return isinstance(found, dict) and all(isinstance(key, str) and isinstance(value, torch.Tensor)
                                           for key, value in found.items())


def sparse(path: Path) -> str | None:
    """What is wrong with a file of which the disk holds a small part; None if nothing is.

    The rest are holes, which are read as zeros: as many gigabytes of them as its maker likes.
    """
    size, end, held = path.stat().st_size, 0, 0
    with path.open("rb") as file:
        try:
            while end < size:
                start = file.seek(end, os.SEEK_DATA)
                end = file.seek(start, os.SEEK_HOLE)
                held += end - start
        except OSError as error:
            if error.errno != errno.ENXIO:  # which says that nothing but a hole follows
                return None
    return "most of it is a hole" if held * limits.UNPACKED < size else None


def damage(path: Path) -> str | None:
    """What is wrong with a file by its own checksums, or by what it would make; None if nothing is."""
    try:
        with path.open("rb") as file:
            if file.read(4) != b"PK\x03\x04":  # by which torch.load tells the old format
                file.seek(0)
                return _damage_of_old_format(file)
        with zipfile.ZipFile(path) as file:
            return _damage_of_zip(file, path)
    except (OSError, MemoryError):  # of the machine, perhaps for a moment
        raise
    except Exception as error:  # of many kinds, depending on the bytes
        return str(error) or type(error).__name__


def _damage_of_old_format(file: IO[bytes]) -> str | None:
    """Five pickles, of which the fourth is what is wanted, and then the values of tensors."""
    with suppress(tarfile.HeaderError):  # torch.load would read it as that first, perhaps for ever
        tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
        return "it is an archive of tar"
    file.seek(0)
    *_, wanted, keys = [Pickle(file) for _ in range(5)]
    named = isinstance(keys.value, list) and all(type(key) is str for key in keys.value)
    if not named or wanted.storages != {*keys.value}:
        return "it does not have the values of all its tensors"  # which would be what the memory had
    return None


def _damage_of_zip(file: zipfile.ZipFile, path: Path) -> str | None:
    entries = file.infolist()
    if file.start_dir != _directory(path):
        return "its list of contents is not where its end says: other readers find another"
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        return "it is compressed, as PyTorch writes none"  # perhaps to fill a memory
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        return "its parts share their bytes"
    names = [entry.orig_filename for entry in entries]  # as PyTorch reads them
    pickles = [entry for entry, name in zip(entries, names, strict=True) if name.lower().endswith(".pkl")]
    if len(pickles) != 1 or len({name.lower() for name in names}) != len(names):
        return "it does not hold one pickle, or two parts by one name"
    root = pickles[0].orig_filename.rpartition("/")[0]
    if not {f"{root}/data/{key}" for key in Pickle(file.open(pickles[0])).storages} <= {*names}:
        return "it does not have the values of all its tensors"
    broken = file.testzip()
    return None if broken is None else f"the checksum of {broken} is wrong"


def _directory(path: Path) -> int | None:
    """Where a zip's list of contents is, by its last bytes; PyTorch reads it there, Python before the end."""
    with path.open("rb") as file:
        start = file.seek(max(0, path.stat().st_size - 98))
        tail = file.read().rjust(98)
        wide, locator, end = tail[:56], tail[56:76], tail[76:]
    if not end.startswith(b"PK\x05\x06") or end[20:] != bytes(2):  # a comment behind it
        return None
    if not locator.startswith(b"PK\x06\x07"):
        return int.from_bytes(end[16:20], "little")
    if int.from_bytes(locator[8:16], "little") != start or not wide.startswith(b"PK\x06\x06"):
        return None
    return int.from_bytes(wide[48:56], "little")


def strange(found: Any, size: int) -> str | None:
    """What is wrong with nested values of a file of `size` bytes; None if nothing is.

    It may name one of them many times; its tensors together must not be far larger than what it holds.
    """
    waiting, count, held = [(found, 0)], 0, 0
    while waiting:
        (value, depth), count = waiting.pop(), count + 1
        if count > limits.VALUES or depth > limits.DEPTH:
            return f"it has more than {limits.VALUES:,} values, or nests them {limits.DEPTH} deep"
        attributes = vars(value) if isinstance(value, OrderedDict | Namespace) else {}
        if isinstance(value, OrderedDict) and not attributes.keys() <= {"_metadata"}:
            return "it holds an OrderedDict with attributes, which may take the place of its methods"
        waiting += [(part, depth + 1) for pair in attributes.items() for part in pair]
        if isinstance(value, dict):
            waiting += [(part, depth + 1) for part in (*value, *value.values())]
        elif isinstance(value, list | tuple):
            waiting += [(part, depth + 1) for part in value]
        elif isinstance(value, torch.Tensor):
            held += value.numel() * value.element_size()
            if value.ndim > limits.DIMENSIONS:
                return f"it holds a tensor of more than {limits.DIMENSIONS} dimensions"
        elif isinstance(value, str | bytes):
            held += len(value)
        elif isinstance(value, int):
            held += value.bit_length() // 8
        elif value is not None and not isinstance(value, float | Namespace | torch.device | torch.dtype):
            return f"it holds a {type(value).__name__}"
        if held > limits.UNPACKED * size:
            return "its tensors and texts are larger than what the file holds of them"
    return None
