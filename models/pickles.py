"""What a pickle names, builds and calls, found by following it without running it.

Where this and PyTorch's own reader could differ, an operation is refused.
"""

import pickletools
import re
from typing import IO, Any

from models import limits

# What a pickle may name: what is made empty, and then filled; what copies a small part; what makes tensors;
# and what is never called, the kinds of values in a tensor.
EMPTY = "collections OrderedDict", "argparse Namespace"
COPIES = "collections Counter", "torch Size"
MAKES_TENSORS = "torch._utils _rebuild_tensor", "torch._utils _rebuild_tensor_v2"
MAKES = (*MAKES_TENSORS, "torch._utils _rebuild_parameter", "torch device")
KNOWN = {*EMPTY, *COPIES, *MAKES}
KINDS = re.compile(r"torch (\w+Storage|(u?int|bfloat|float|complex)\d+|bool)")
CODES = {  # that PyTorch's reader knows
    "PROTO", "STOP", "MARK", "GLOBAL", "BINGET", "LONG_BINGET", "BINPUT", "LONG_BINPUT", "NONE",
    "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "BINFLOAT", "LONG1", "BINUNICODE",
    "SHORT_BINSTRING", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_DICT", "EMPTY_LIST",
    "APPEND", "APPENDS", "SETITEM", "SETITEMS", "BINPERSID", "REDUCE", "NEWOBJ", "BUILD"}


class Name(str):
    """A global, "module name", which is no text."""


class Keys(list):
    """The keys of a dict: what is followed of it."""


class Unknown:
    """A value that is not followed."""


UNKNOWN, OBJECT, MARK = Unknown(), Unknown(), Unknown()  # the second is one of EMPTY


class ForeignError(ValueError):
    """A pickle does what it may not."""


class Pickle:
    """One pickle, followed: `value` is what it makes, `storages` are the keys of the tensors' values in it.

    Texts, small whole numbers and None are themselves; lists and tuples have what is followed of their parts.

    Raises:
        ForeignError: for what fills a memory, copies a part as often as that is named, or takes for ever.
    """

    def __init__(self, pickled: IO[bytes]):
        self.stack, self.memo, self.storages, self.copies, self.numbers = [], {}, set(), 0, 0
        for done, (code, argument, _) in enumerate(pickletools.genops(pickled)):
            if done > limits.OPERATIONS:
                raise ForeignError(f"it takes more than {limits.OPERATIONS:,} steps to read")
            if code.name not in CODES:
                raise ForeignError("it holds more than plain tensors")
            if code.name.endswith("BINPUT"):
                if argument > len(self.memo) + 1:  # Python 2 began with 1
                    raise ForeignError("it numbers its parts as no pickle does")
                self.memo[argument] = self.stack[-1]
                continue
            taken = self._take([kind.name for kind in code.stack_before])
            self._check(code.name, argument, taken)
            self.stack += [self._left(code.name, argument, taken)] * len(code.stack_after)
            if code.name == "STOP":
                self.value = taken[0]

    def _take(self, kinds: list[str]) -> list[Any]:
        """Take from the stack what an operation takes, without the mark in it."""
        above = []
        if "mark" in kinds:
            while (part := self.stack.pop()) is not MARK:
                above.append(part)
            kinds = kinds[:kinds.index("mark")]
        below = len(self.stack) - len(kinds)
        taken = self.stack[below:] + above[::-1]
        del self.stack[below:]
        return taken

    def _check(self, code: str, argument: Any, taken: list[Any]) -> None:
        """Refuse an operation that may not be done with what it takes."""
        if code == "GLOBAL" and argument not in KNOWN and not KINDS.fullmatch(argument):
            raise ForeignError(f"it holds a GLOBAL {argument.replace(' ', '.')}")
        of_values = code == "NEWOBJ" and taken[0] not in EMPTY
        if code in ("REDUCE", "NEWOBJ") and (of_values or not _may_call(*taken)):
            called = taken[0].replace(" ", ".") if isinstance(taken[0], Name) else "something"
            raise ForeignError(f"it calls {called} with values")
        if code == "BUILD" and not (taken[0] is OBJECT and _is_small(taken[1])):
            raise ForeignError("it fills more than plain tensors")
        if code == "BINPERSID" and not _is_storage(taken[0]):
            raise ForeignError("it names the values of a tensor otherwise than PyTorch does")
        if code in ("SETITEM", "SETITEMS"):  # other keys, or many numbers, may take for ever to hash
            self.numbers += sum(isinstance(key, int) for key in taken[1::2])
            if not all(map(_is_plain, taken[1::2])) or self.numbers > limits.NUMBERS:
                raise ForeignError("it has keys that are neither texts nor small numbers, or many of these")
        self.copies += code == "BUILD" or code == "REDUCE" and taken[0] not in MAKES and taken[1] != ()
        if self.copies > limits.COPIES:
            raise ForeignError("it holds more than plain tensors, or copies them")

    def _left(self, code: str, argument: Any, taken: list[Any]) -> Any:
        """What is followed of what an operation leaves."""
        match code:
            case "BININT" | "BININT1" | "BININT2" | "BINUNICODE":
                return argument
            case "SHORT_BINSTRING":  # of Python 2: a sign for each byte here, UTF-8 to PyTorch
                return argument.encode("latin-1").decode()
            case "LONG1" if abs(argument) < 2**31:
                return argument
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                return {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[code]
            case "EMPTY_TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3" | "TUPLE":
                return tuple(taken)
            case "BINGET" | "LONG_BINGET":
                return self.memo[argument]
            case "MARK":
                return MARK
            case "GLOBAL":
                return Name(argument)
            case "EMPTY_DICT":
                return Keys()
            case "EMPTY_LIST":
                return []
            case "BINPERSID":
                self.storages.add(taken[0][2])
            case "REDUCE" | "NEWOBJ" if taken[0] in EMPTY:
                return OBJECT
            case "APPEND" | "APPENDS" | "SETITEM" | "SETITEMS" | "BUILD":
                if isinstance(taken[0], list):
                    taken[0].extend(taken[1::2] if isinstance(taken[0], Keys) else taken[1:])
                return taken[0]
        return UNKNOWN


def _may_call(function: Any, arguments: Any) -> bool:
    if not isinstance(function, Name) or function not in KNOWN or not isinstance(arguments, tuple):
        return False
    if function in EMPTY:
        return arguments == () or len(arguments) == 1 and _are_pairs(arguments[0])
    if function in COPIES:
        return len(arguments) == 1 and _is_small(arguments[0])
    if function == "torch device":
        return len(arguments) <= 2 and all(map(_is_plain, arguments))
    sizes = arguments[2:4] if function in MAKES_TENSORS else ()
    return all(isinstance(part, tuple) and len(part) <= limits.DIMENSIONS for part in sizes)


def _is_storage(value: Any) -> bool:
    """Whether a value names a tensor's values: "storage", a kind, a key, a device, a number, perhaps None."""
    if not isinstance(value, tuple) or len(value) not in (5, 6) or value[5:] not in ((), (None,)):
        return False
    return [type(part) for part in value[:5]] == [str, Name, str, str, int]


def _are_pairs(value: Any) -> bool:
    """Whether a value is a short list of pairs, as Python 2 made an OrderedDict of."""
    return (isinstance(value, list) and len(value) <= limits.PARTS
            and all(isinstance(pair, list) and len(pair) == 2 and _is_plain(pair[0]) for pair in value))


def _is_plain(value: Any) -> bool:
    """Whether a value is a text, a name or a small number, or None."""
    return value is None or isinstance(value, str | bytes | int)


def _is_small(value: Any) -> bool:
    """Whether a dict, or a tuple of plain values, may be copied."""
    if not isinstance(value, tuple | Keys) or len(value) > limits.PARTS:
        return False
    return isinstance(value, Keys) or all(map(_is_plain, value))
