"""What a command was asked: a run's settings, from the command line or a checkpoint, and what to do.

Modules that import timm or Lightning are imported where they are needed: a wrong knob is answered before.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import settings.folders  # noqa: F401  the configs name its functions
from settings.cli import printable
from settings.overrides import changes_branches, named, parsed, wants_no_block
from settings.schema import FILE_SETS, BlockConf, Settings
from settings.values import at_least, check_name, differ, flat


@dataclass
class Command(Settings):
    """A run's settings, and what is not of the run.

    `ckpt` is the checkpoint or published file to work on, `source` says whose file it is, and `out` is where
    to write. The last three are convert.py's.
    """

    ckpt: str | None = None
    out: str | None = None
    source: str | None = None
    tolerance: float = at_least(0, 1e-4)
    export: list[str] = field(default_factory=lambda: ["onnx"])
    hub: bool = False

    def __post_init__(self):
        """Check as `Settings` does, and what convert.py was asked for."""
        super().__post_init__()
        if self.source is not None:
            from models.published import SOURCES
            check_name("source", self.source, list(SOURCES))
        if self.export != ["onnx"]:
            from export.formats import FORMATS
            for kind in self.export:
                check_name("export", kind, list(FORMATS))
        if "int8" in self.export and self.data.name == "none":
            raise ValueError("export=[int8] needs training images to calibrate with, and data=none has none")


OF_THE_COMMAND = tuple(part.name for part in fields(Command)[len(fields(Settings)):])
ConfigStore.instance().store(name="schema", node=Command)


def resolve(cfg: DictConfig, overrides: Sequence[str]) -> Command:
    """What a command was asked, checked.

    With `ckpt`, every setting is the checkpoint's unless the command line gives it; changes are printed.

    Args:
        cfg: what Hydra composed.
        overrides: the command line, `key=value` each.

    Raises:
        ValueError: if a setting is wrong, or cannot be changed on a checkpoint.
    """
    words = parsed(overrides)
    try:
        if changes_branches(words):
            cfg.block.name = "custom"
        if wants_no_block(words):  # the plain network of a sweep, whatever else is said about blocks
            cfg.block = OmegaConf.structured(BlockConf)
        for knob in ("ckpt", "out"):
            if cfg.get(knob) == "":
                raise ValueError(f"{knob}= is empty: give a path, or leave it out")
            if cfg.get(knob) is not None:
                cfg[knob] = str(_expanded(knob, cfg[knob]))
        if cfg.ckpt is not None and cfg.source is None:
            cfg = _on_checkpoint(cfg, words)
        cfg = OmegaConf.merge(OmegaConf.structured(Command), OmegaConf.to_container(cfg, resolve=True))
        command = OmegaConf.to_object(cfg)
    except (OmegaConfBaseException, OverflowError) as error:
        key = getattr(error, "full_key", None) or "a setting"
        raise ValueError(f"{key}: {str(error).splitlines()[0]}") from error
    if command.data.root is not None:
        command.data.root = _absolute("data.root", command.data.root)
    if command.model.weights is not None:
        command.model.weights = _absolute("model.weights", command.model.weights)
    if command.model.pretrained and command.ckpt is None:
        _prepare_as_trained(command, words)
    return command


def _expanded(knob: str, path: str) -> Path:
    """A path with the home that its ~ stands for; a ValueError if there is none, or it leads in a circle."""
    try:
        found = Path(path).expanduser()
        found.resolve()
        return found
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{knob}={printable(path)} is no path: {error}") from error


def _absolute(knob: str, path: str) -> str:
    """A path from the root, as config.yaml keeps it; a ValueError if that could not be read again.

    Links are left in it: they may lead to another disk tomorrow.
    """
    found = os.path.abspath(_expanded(knob, path))
    try:
        found.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{knob}={printable(found)} is not UTF-8: rename the file or the folder") from error
    return found


def _prepare_as_trained(settings: Settings, words: Sequence[Override]) -> None:
    """Prepare images as they were for timm's weights, except for what the command line gives."""
    import timm

    from models.build import UNTRAINED, timms_name
    from models.say import say
    try:
        trained = timm.get_pretrained_cfg(timms_name(settings.model.name)[0])
    except RuntimeError as error:  # of a tag behind the dot
        raise ValueError(f"model.name={settings.model.name}: {error}") from error
    if trained is None or settings.model.name in UNTRAINED:  # no weights to fetch, which the builder says
        return
    taken = {"mean": list(trained.mean), "std": list(trained.std), "interpolation": trained.interpolation}
    if settings.data.name in FILE_SETS:
        taken["crop_pct"] = trained.crop_pct
    taken = {knob: value for knob, value in taken.items() if f"data.{knob}" not in named(words)}
    for knob, value in taken.items():
        setattr(settings.data, knob, value)
    told = " ".join(f"data.{knob}={value}" for knob, value in taken.items())
    weights = f"{trained.architecture}.{trained.tag}"
    say(f"model.pretrained=true: images as for timm's weights ({weights}): "
        f"{told or 'none; the command line sets them all'}")
    if settings.data.name in FILE_SETS and trained.crop_mode != "center":
        say(f"timm's own crop_mode is {trained.crop_mode} for these weights: it is not "
            "followed, test images keep their proportions, and their centre is taken")


def _on_checkpoint(cfg: DictConfig, words: Sequence[Override]) -> DictConfig:
    from models.checkpoint import load_checkpoint
    stored = load_checkpoint(cfg.ckpt)["dbb"]["settings"]
    own = {key: cfg[key] for key in OF_THE_COMMAND if key in cfg}
    if "logger.id" not in named(words):  # `logger=wandb` names a logger, not another run of W&B
        cfg.logger.id = (stored.get("logger") or {}).get("id")
    result = OmegaConf.merge(OmegaConf.structured(Command), stored, own)
    for override in words:
        key, text = override.key_or_group, override.input_line
        if key in ("experiment", "debug") or override.is_add() or override.is_delete():
            raise ValueError(f"{text} cannot be used with ckpt=, which takes every setting from the "
                             "checkpoint: name the settings to change themselves")
        if key in ("model.weights", "model.pretrained"):
            raise ValueError(f"{text} cannot be used with ckpt=: the checkpoint's own weights are "
                             "loaded; leave out one of them")
        for changed in (["model", "block"] if key == "model" else [key]):
            before = flat(OmegaConf.to_container(result))
            OmegaConf.update(result, changed, OmegaConf.select(cfg, changed), merge=False)
            for knob, value in flat(OmegaConf.to_container(result)).items():
                if differ(before.get(knob), value):
                    print(printable(f"changed from the checkpoint: {knob}: {before.get(knob)} -> {value}"))
    if "data.download" not in named(words):  # into a folder that a file names
        result.data.download = False
    if "data.num_workers" not in named(words):
        result.data.num_workers = min(result.data.num_workers, os.cpu_count() or 1)
    if "logger.entity" not in named(words) and result.logger.entity is not None:
        # Somebody else's, perhaps, to whom images and figures would be sent.
        print(printable(f"logger.entity={result.logger.entity} is the checkpoint's, and not taken from it: "
                        "W&B writes to your own, or to the one that you name"))
        result.logger.entity = None
    if result.block.init == "auto":  # another mode of the same blocks, which are trained already
        result.block.init = stored.get("block", {}).get("init")
    return result
