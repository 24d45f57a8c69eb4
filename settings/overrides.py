"""What the words of a command line say, by Hydra's own parser."""

from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

BRANCH_LISTS = {"block.branches", "block.depthwise", "block.layers"}


def parsed(overrides: Sequence[str]) -> list[Override]:
    """The words, each with its key, its value and how it was given."""
    return OverridesParser.create().parse_overrides(list(overrides))


def named(overrides: Sequence[Override]) -> set[str]:
    """The knobs and groups that the words give."""
    return {override.key_or_group for override in overrides}


def changes_branches(overrides: Sequence[Override]) -> bool:
    """Whether they make another block of the one that a file in configs/block describes."""
    keys = named(overrides)
    return bool(keys & BRANCH_LISTS) and "block.name" not in keys


def wants_no_block(overrides: Sequence[Override]) -> bool:
    """Whether they ask for the plain network, by `block=none`."""
    return any(override.key_or_group == "block" and override.value() == "none" for override in overrides)
