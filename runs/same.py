"""Whether two settings are those of one run, and what has changed between them."""

import os
from dataclasses import asdict, replace
from typing import Any

from models.build import named_start
from models.checkpoint import place_of
from settings.command import OF_THE_COMMAND, Command
from settings.schema import (
    NOT_OF_THE_RUN,
    PATHS,
    BlockConf,
    DataConf,
    ModelConf,
    OptimConf,
    TrainerConf,
    same_everywhere,
)
from settings.values import differ, flat

# With whatever values of these.
SAME_RUN = (*OF_THE_COMMAND, *NOT_OF_THE_RUN)
GROUPS = {"model": ModelConf, "block": BlockConf, "data": DataConf, "optim": OptimConf,
          "trainer": TrainerConf}
# What a file that lacks a knob means: its default, but for the start of blocks (see `BlockConf.init`).
LATER_KNOBS = flat({group: asdict(conf()) for group, conf in GROUPS.items()}) | {"block.init": None}


def as_begun(command: Command, stored: dict[str, Any] | None) -> Command:
    """The command as a run of these settings began: it keeps its start and its positions.

    A new one has its start by name, where the command says `auto`.
    """
    if stored is not None:
        defaults = {"init": "auto", "positions": None}
        kept = {key: stored.get("block", {}).get(key) for key, value in defaults.items()
                if getattr(command.block, key) == value}
        command = replace(command, block=replace(command.block, **kept))
    if command.block.init != "auto":
        return command
    warm = command.model.pretrained or command.model.weights is not None
    return replace(command, block=replace(command.block, init=named_start("auto", warm)))


def differences(stored: dict[str, Any] | None, command: Command) -> list[str]:
    """The knobs in which a command's training is not that of stored settings."""
    old, new = of_the_training(stored or {}), of_the_training(command.stored())
    return [key for key, value in new.items() if _differ(key, old.get(key, LATER_KNOBS.get(key)), value)]


def _differ(knob: str, old: Any, new: Any) -> bool:
    """As `differ`; of a path that is a link by now, to where it was moved, it is the same place."""
    if knob in PATHS and isinstance(old, str) and isinstance(new, str):
        return os.path.realpath(old) != os.path.realpath(new)
    return differ(old, new)


def of_the_training(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings, flat, that make a run what it is.

    The command's own are left out, and where it is logged, and how its images are fetched.
    """
    known = flat(settings)
    ignored = set(SAME_RUN)
    if same_everywhere(known.get("data.name"), known.get("data.root")):
        ignored.add("data.root")
    return {key: value for key, value in known.items() if not {key, key.split(".")[0]} & ignored}


def not_taken(config: dict[str, Any], stored: dict[str, Any], command: Command) -> list[str]:
    """What a run's config.yaml says, and neither its checkpoint nor a command: perhaps it was edited."""
    said, old, new = map(of_the_training, (config, stored, command.stored()))
    return [f"{key}={value}" for key, value in said.items() if key in new and _differ(key, value, new[key])
            and _differ(key, value, old.get(key, value))]


def is_further(last: dict[str, Any], asked: dict[str, Any], command: Command) -> bool:
    """Whether a checkpoint is of a training that went on from another one, as a command would."""
    stored = asked["dbb"]["settings"]
    expected = [*asked["dbb"].get("changed", []), *changes(stored, command, *place_of(asked))]
    later = " images: ", "processes: "  # which the data, and the devices, say
    known, expected = ([change for change in of if not any(part in change for part in later)]
                       for of in (last["dbb"].get("changed", []), expected))
    return (known == expected and last["global_step"] >= asked["global_step"]
            and not differences(last["dbb"]["settings"], command))


def changes(stored: dict[str, Any], command: Command, done: int, batches: int = 0) -> list[str]:
    """Settings of the training that differ from a checkpoint's, a sentence each.

    `done` epochs and `batches` of the next one are trained.
    """
    place = f"epoch {done}" + (f" and {batches} batches" if batches else "")
    old, new = LATER_KNOBS | of_the_training(stored), of_the_training(command.stored())
    return [f"{key}: {old[key]} until {place}, then {value}" for key, value in new.items()
            if key in old and _differ(key, old[key], value)]
