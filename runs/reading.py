"""The small files in a run's folder, whoever wrote them: plain values, of a bounded size."""

import json
from collections.abc import Callable
from math import isfinite
from pathlib import Path
from typing import Any

import yaml

from models import limits
from runs.same import GROUPS
from settings.cli import typed


class PlainLoader(yaml.SafeLoader):
    """Without aliases, which train.py does not write, and by which a small file could fill a memory."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise ValueError("it has aliases")
        return super().compose_node(parent, index)


def read_config(path: Path) -> dict[str, Any] | None:
    """The settings in a config.yaml, as plain values; None where there is none.

    Raises:
        ValueError: if it is damaged.
    """
    return _read(path, lambda text: yaml.load(text, PlainLoader), limits.SETTINGS)


def read_own_config(path: Path) -> dict[str, Any] | None:
    """As `read_config`, where the file must be a run's."""
    stored = read_config(path)
    if stored is None:
        return None
    groups = [stored.get(group) for group in (*GROUPS, "logger")]
    named = all(isinstance(group, dict) and {*map(type, group)} <= {str} for group in groups)
    if not named or not isinstance(stored["block"].get("positions"), int | None) \
            or not isinstance(stored["block"].get("init"), str | None):
        raise _damaged(path)
    return stored


def read_result(path: Path) -> dict[str, Any] | None:
    """What a result.json holds, which has numbers at least for the accuracy; None where there is none.

    Raises:
        ValueError: if it is damaged.
    """
    def parse(text):
        result = json.loads(text)
        if not all(isinstance(result[name], int | float) and isfinite(result[name])
                   for name in ("top1", "top5", "loss")):
            raise ValueError("an accuracy is no number")
        return result
    return _read(path, parse, limits.RESULT)


def identity(settings: dict[str, Any]) -> str | None:
    """A run's id at W&B, which all runs have, by stored settings."""
    logger = settings.get("logger")
    return logger.get("id") if isinstance(logger, dict) else None


def read_text(path: Path, longest: int = 2**20) -> str:
    """What a small file says, up to a length; of a folder in its place, nothing that is ours."""
    if not path.is_file():
        return "a folder"
    with path.open("rb") as file:
        return file.read(longest).decode(errors="replace")


def _read(path: Path, parse: Callable, largest: int) -> dict[str, Any] | None:
    if path.is_symlink():  # to a file of whoever opens the folder, whose words would be shown
        raise ValueError(f"{path} is a link, which no run writes: remove it")
    if not path.is_file():
        return None
    try:
        text = read_text(path, largest + 1)
        if len(text) > largest:
            raise ValueError("no run writes as much")
        found = dict(parse(text))
        json.dumps(found, ensure_ascii=False, allow_nan=False).encode()  # plain values alone
        return found
    except Exception as error:  # of many kinds, depending on the text
        raise _damaged(path) from error


def _damaged(path: Path) -> ValueError:
    last = typed("ckpt", path.parent / "checkpoints" / "last.ckpt")
    return ValueError(f"{path} is damaged: remove it, and go on with the run by {last}")
