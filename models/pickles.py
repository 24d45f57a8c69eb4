"""What a pickle names, builds and calls, found by following it without running it."""

import pickletools
import re
from typing import IO, Any

from models import limits

# What a pickle may name: what is made empty, and then filled; what copies a small part; what makes tensors;
# and what is never called, the kinds of values in a tensor.
EMPTY = "collections OrderedDict", "argparse Namespace"
COPIES = "collections Counter", "torch Size", "torch device"
MAKES_TENSORS = "torch._utils _rebuild_tensor", "torch._utils _rebuild_tensor_v2"
KNOWN = {*EMPTY, *COPIES, *MAKES_TENSORS, "torch._utils _rebuild_parameter"}
KINDS = re.compile(r"torch (\w+Storage|(u?int|bfloat|float|complex)\d+|bool)")

# What is followed of a value: of a global its name; of a tuple its parts; of a dict, as a list, its keys; and
# of the others whether it is one of EMPTY, or a text or small number: another key may take for ever to hash.
OBJECT, PLAIN, MARK = "object", "plain", "mark"
PLAINS = {"NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "BINUNICODE", "SHORT_BINSTRING"}
TUPLES = {"EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "TUPLE"}
CODES = {*PLAINS, *TUPLES, "PROTO", "STOP", "MARK", "GLOBAL", "BINGET", "LONG_BINGET", "EMPTY_DICT",
         "EMPTY_LIST", "BINFLOAT", "LONG1", "APPEND", "APPENDS", "SETITEM", "SETITEMS", "BINPERSID", "REDUCE",
         "NEWOBJ", "BUILD"}  # that PyTorch's reader knows


def foreign(pickled: IO[bytes]) -> str | None:
    """What one pickle names or calls that it may not; None if nothing is.

    PyTorch's own reader runs nothing either, but calls more: what fills a memory, or copies a part as often
    as that is named.
    """
    stack, memo, copies = [], {}, 0
    for done, (code, argument, _) in enumerate(pickletools.genops(pickled)):
        name = code.name
        if done > limits.OPERATIONS:
            return f"it takes more than {limits.OPERATIONS:,} steps to read"
        if name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
            continue
        if name not in CODES:
            return "it holds more than plain tensors"
        taken = _take(stack, [kind.name for kind in code.stack_before])
        wrong = _wrong(name, argument, taken)
        copies += name == "BUILD" or name == "REDUCE" and taken[0] in COPIES
        if wrong is not None or copies > limits.COPIES:
            return wrong or "it holds more than plain tensors, or copies them"
        left = memo.get(argument) if name.endswith("BINGET") else _left(name, argument, taken)
        stack += [left] * len(code.stack_after)
    return None


def _take(stack: list[Any], kinds: list[str]) -> list[Any]:
    """Take from the stack what an operation takes, without the mark in it."""
    above = []
    if "mark" in kinds:
        while (part := stack.pop()) != MARK:
            above.append(part)
        kinds = kinds[:kinds.index("mark")]
    below = len(stack) - len(kinds)
    taken = stack[below:] + above[::-1]
    del stack[below:]
    return taken


def _wrong(name: str, argument: Any, taken: list[Any]) -> str | None:
    """Why an operation may not be done with what it takes; None if it may."""
    if name == "GLOBAL" and argument not in KNOWN and not KINDS.fullmatch(argument):
        return f"it holds a GLOBAL {argument.replace(' ', '.')}"
    if name in ("REDUCE", "NEWOBJ") and not _may_call(*taken):
        called = taken[0].replace(" ", ".") if isinstance(taken[0], str) else "something"
        return f"it calls {called} with values"
    if name == "BUILD" and not (taken[0] == OBJECT and _is_small(taken[1])):
        return "it fills more than plain tensors"
    if name in ("SETITEM", "SETITEMS") and any(key != PLAIN for key in taken[1::2]):
        return "it has keys that are neither texts nor small numbers"
    return None


def _may_call(function: Any, arguments: Any) -> bool:
    if function not in KNOWN or not isinstance(arguments, tuple):
        return False
    if function in EMPTY:
        return arguments == ()
    if function in COPIES:
        return all(part == PLAIN or _is_small(part) for part in arguments)
    sizes = arguments[2:4] if function in MAKES_TENSORS else ()
    return all(isinstance(part, tuple) and len(part) <= limits.DIMENSIONS for part in sizes)


def _is_small(value: Any) -> bool:
    """Whether a dict, or a tuple of plain values, may be copied."""
    plain = isinstance(value, tuple) and all(part == PLAIN for part in value)
    return (plain or isinstance(value, list)) and len(value) <= limits.PARTS


def _left(name: str, argument: Any, taken: list[Any]) -> Any:
    """What is known of what an operation leaves."""
    if name == "GLOBAL":
        return argument
    if name == "MARK":
        return MARK
    if name in PLAINS:
        return PLAIN
    if name in TUPLES:
        return tuple(taken)
    if name == "EMPTY_DICT":
        return []
    if name in ("SETITEM", "SETITEMS") and isinstance(taken[0], list):
        taken[0].extend(taken[1::2])
    if name in ("SETITEM", "SETITEMS", "APPEND", "APPENDS", "BUILD"):
        return taken[0]
    return OBJECT if name in ("REDUCE", "NEWOBJ") and taken[0] in EMPTY else None
