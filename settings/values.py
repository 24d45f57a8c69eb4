"""What the schema asks of values, and how settings are written flat and compared."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import field, fields, is_dataclass
from difflib import get_close_matches
from typing import Any

from omegaconf import MISSING


def at_least(least: float, default: Any = MISSING, most: float = math.inf) -> Any:
    """A field whose number, if there is one, must not be smaller, nor larger than `most`."""
    return field(default=default, metadata={"least": least, "most": most})


def numbers(settings: Any, prefix: str = "") -> Iterator[tuple[str, Any, Mapping[str, float]]]:
    """Name, value and limits (`least` and `most`, or none) of every plain value; of a list, of each in it.

    Raises:
        ValueError: for a list within a list.
    """
    for part in fields(settings):
        value = getattr(settings, part.name)
        if is_dataclass(value):
            yield from numbers(value, f"{prefix}{part.name}.")
        else:
            for one in value if isinstance(value, list) else [value]:
                if one is not value and isinstance(one, list | dict):
                    raise ValueError(f"{prefix}{part.name}={value} has a list or a mapping within: "
                                     "give plain values")
                yield prefix + part.name, one, part.metadata


def check_numbers(settings: Any, prefix: str = "") -> None:
    """Refuse numbers that are not finite, or beyond their limits.

    Raises:
        ValueError: with the knob, whose name `prefix` begins.
    """
    for knob, value, limits in numbers(settings, prefix):
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{knob}={value} must be a finite number")
        if limits and value is not None and value < limits["least"]:
            raise ValueError(f"{knob}={value} must be at least {limits['least']}")
        if limits and value is not None and value > limits["most"]:
            raise ValueError(f"{knob}={value} must be at most {limits['most']}")


def check_name(knob: str, value: str, known: list[str]) -> None:
    """Refuse a name that is not known.

    Raises:
        ValueError: with the knob, and names that are like it.
    """
    if value not in known:
        nearest = get_close_matches(value, known, n=3)
        hint = f"; did you mean {' or '.join(nearest)}?" if nearest else ""
        names = ", ".join(known) if len(known) <= 12 else f"{len(known)} names"
        raise ValueError(f"{knob}={value} is unknown; known are {names}{hint}")


def seconds(knob: str, time: str | None) -> int | None:
    """A time as Lightning's Timer takes it, DD:HH:MM:SS, in seconds.

    Raises:
        ValueError: if it is none, or 0.
    """
    if time is None:
        return None
    found = re.fullmatch(r"(\d{1,4}):(\d\d):(\d\d):(\d\d)", time)
    days, hours, minutes, rest = map(int, found.groups()) if found else [0] * 4
    total = ((days * 24 + hours) * 60 + minutes) * 60 + rest
    if not total:
        raise ValueError(f"{knob}={time} must be longer than 0, written DD:HH:MM:SS, as in 00:12:00:00 for "
                         "twelve hours")
    return total


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under their names on the command line, e.g. `optim.lr`."""
    result = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"  # a key of a file's may be a number
        result |= flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return result


def differ(old: Any, new: Any) -> bool:
    """Whether two values of a knob are two settings: 1 is one batch of `limit_train_batches`, 1.0 is all."""
    return old != new or isinstance(old, float) != isinstance(new, float)
