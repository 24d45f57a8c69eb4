"""What a file of PyTorch's may hold, whoever wrote it: tensors, and plain values around them."""

import pickletools
import re
import zipfile
from pathlib import Path
from typing import IO, Any

import torch

from models import limits

# What a pickle may name: what is made empty; what copies a part of it, which it may do a few times; what
# makes tensors; and what is never called, the kinds of values in a tensor.
EMPTY = "collections OrderedDict", "argparse Namespace"
COPIES = "collections Counter", "torch Size", "torch device", "builtins set", "__builtin__ set"
MAKES_TENSORS = tuple(f"torch._utils _rebuild_{kind}" for kind in ("tensor", "tensor_v2", "parameter"))
KNOWN = {*EMPTY, *COPIES, *MAKES_TENSORS}
KINDS = re.compile(r"torch (\w+Storage|(u?int|bfloat|float|complex)\d+|bool)")
PICKLES = 5  # at the start of a file in PyTorch's old format


def damage(path: Path) -> str | None:
    """What is wrong with a file by its own checksums, or by what it would make; None if nothing is."""
    try:
        with path.open("rb") as file:
            if file.read(4) != b"PK\x03\x04":  # by which torch.load tells the old format
                file.seek(0)
                return next(filter(None, (foreign(file) for _ in range(PICKLES))), None)
        with zipfile.ZipFile(path) as file:
            if file.start_dir != _directory(path):
                return "its list of contents is not where its end says: other readers find another"
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in file.infolist()):
                return "it is compressed, as PyTorch writes none"  # perhaps to fill a memory
            for entry in file.infolist():
                if entry.filename.lower().endswith(".pkl") and (wrong := foreign(file.open(entry))):
                    return wrong
            broken = file.testzip()
    except (OSError, MemoryError):  # of the machine, perhaps for a moment
        raise
    except Exception as error:  # of many kinds, depending on the bytes
        return str(error)
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


def foreign(pickled: IO[bytes]) -> str | None:
    """What one pickle names or calls that it may not; None if nothing is.

    PyTorch's own reader runs nothing either, but calls more: what fills a memory, or copies a part as often
    as that is named.
    """
    stack, memo, copies = [], {}, 0
    for done, (code, argument, _) in enumerate(pickletools.genops(pickled)):
        if done > limits.OPERATIONS:
            return f"it takes more than {limits.OPERATIONS:,} steps to read"
        name, before = code.name, [kind.name for kind in code.stack_before]
        if name in ("REDUCE", "NEWOBJ"):
            function, arguments = stack[-2:]
            empty = function in EMPTY and arguments == ()
            if not empty and function not in (*COPIES, *MAKES_TENSORS):
                return f"it calls {(function or 'something').replace(' ', '.')} with values"
            copies += function in COPIES
        copies += name == "BUILD"
        if copies > limits.COPIES or name in ("OBJ", "INST", "STACK_GLOBAL", "NEWOBJ_EX"):
            return "it holds more than plain tensors"
        if name in ("BINPUT", "LONG_BINPUT", "PUT"):
            memo[argument] = stack[-1]
            continue
        if "mark" in before:
            while stack.pop() != "MARK":
                pass
            before = before[:before.index("mark")]
        del stack[len(stack) - len(before):]
        stack += {"MARK": ["MARK"], "EMPTY_TUPLE": [()], "GLOBAL": [argument],
                  "BINGET": [memo.get(argument)], "LONG_BINGET": [memo.get(argument)],
                  "GET": [memo.get(argument)]}.get(name, [None] * len(code.stack_after))
        if name == "GLOBAL" and argument not in KNOWN and not KINDS.fullmatch(argument):
            return f"it holds a GLOBAL {argument.replace(' ', '.')}"
    return None


def strange(found: Any, size: int) -> str | None:
    """What is wrong with nested values of a file of `size` bytes; None if nothing is.

    It may name one of them many times; its tensors together must not be far larger than what it holds.
    """
    waiting, count, held = [(found, 0)], 0, 0
    while waiting:
        (value, depth), count = waiting.pop(), count + 1
        if count > limits.VALUES or depth > limits.DEPTH:
            return f"it has more than {limits.VALUES:,} values, or nests them {limits.DEPTH} deep"
        if isinstance(value, dict):
            waiting += [(part, depth + 1) for part in (*value, *value.values())]
        elif isinstance(value, list | tuple):
            waiting += [(part, depth + 1) for part in value]
        elif isinstance(value, torch.Tensor):
            held += value.numel() * value.element_size()
        elif isinstance(value, str | bytes):
            held += len(value)
        elif isinstance(value, int):
            held += value.bit_length() // 8
        if held > limits.UNPACKED * size:
            return "its tensors and texts are larger than what the file holds of them"
    return None
