"""What a run's folder says of the run: whether it is this one, whether it is finished, what its result is."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import OmegaConf
from pytorch_lightning.utilities import rank_zero_only

from models.build import named_start
from training.safety import newest
from training.settings import OF_THE_COMMAND, TENSOR_SETS, DataConf, Settings, flat

SAME_RUN = (*OF_THE_COMMAND, "logger", "data.num_workers", "data.download")  # with whatever values of these
LOCK = ".lock"


class FolderTakenError(ValueError):
    """The folder is another run's, or another process is at work in it."""


@contextmanager
def alone_in(run_dir: Path) -> Iterator[None]:
    """Keep other processes from training in a folder; processes of the same run do not wait.

    Raises:
        FolderTakenError: if one does.
    """
    if rank_zero_only.rank:
        yield
        return
    lock = FileLock(run_dir / LOCK, blocking=False)
    try:
        lock.acquire()
    except NotImplementedError:
        pass  # a file system without locks cannot keep others out
    except Timeout as error:
        raise FolderTakenError(f"another process is training in {run_dir}: let it finish, or choose another "
                               "folder with out=DIR") from error
    try:
        yield
    finally:
        lock.release()


def read_config(run_dir: Path) -> dict[str, Any] | None:
    """The settings in a run's config.yaml, as plain values; None where there is none.

    Raises:
        ValueError: if it is damaged.
    """
    return _read(run_dir / "config.yaml", lambda text: OmegaConf.to_container(OmegaConf.create(text)))


def read_result(run_dir: Path) -> dict[str, Any] | None:
    """What a finished run's result.json holds; None if it is not finished.

    Raises:
        ValueError: if it is damaged.
    """
    return _read(run_dir / "result.json", json.loads)


def _read(path: Path, parse: Callable) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        return dict(parse(path.read_text()))
    except Exception as error:  # of many kinds, depending on the text
        raise ValueError(f"{path} is damaged: remove it, and go on with the run by "
                         f"ckpt={path.parent}/checkpoints/last.ckpt") from error


def take_up(settings: Settings, run_dir: Path) -> Settings:
    """Go on where a folder's run stopped, if it is the run that these settings describe.

    A sweep or a job may thus be started again.

    Returns:
        The settings, with the checkpoint and the W&B id of that run, where there are any.

    Raises:
        FolderTakenError: if the folder holds another run.
    """
    last = run_dir / "checkpoints" / "last.ckpt"
    if settings.ckpt is not None:
        if last.exists() and Path(settings.ckpt).resolve() != last.resolve():
            raise FolderTakenError(f"{run_dir} already holds another run than ckpt={settings.ckpt}: choose "
                                   "another folder with out=DIR")
        return settings
    stored = read_config(run_dir)
    if stored is not None:  # a run keeps its start and its positions, whatever a new one has by default
        defaults = {"init": "auto", "positions": None}
        kept = {key: stored.get("block", {}).get(key) for key, value in defaults.items()
                if getattr(settings.block, key) == value}
        settings = replace(settings, block=replace(settings.block, **kept))
    settings = with_start(settings)
    old, new = of_the_training(stored or {}), of_the_training(asdict(settings))
    before = flat({"data": asdict(DataConf())})  # the meaning of a knob that an older file does not have
    different = [key for key, value in new.items() if old.get(key, before.get(key)) != value]
    if stored is not None and not different:
        identity = replace(settings.logger, id=stored["logger"]["id"])
        going_on = newest(last)
        return replace(settings, ckpt=None if going_on is None else str(going_on), logger=identity)
    if last.exists() or (run_dir / "result.json").exists():
        continued = f", or go on with that run by ckpt={last}" * last.exists()
        raise FolderTakenError(f"{run_dir} already holds a run with another {', '.join(different[:4])}: "
                               f"choose another folder with out=DIR{continued}")
    return settings


def with_start(settings: Settings) -> Settings:
    """Say by name how blocks start, where the settings say `auto`."""
    if settings.block.init != "auto":
        return settings
    warm = settings.model.pretrained or settings.model.weights is not None
    return replace(settings, block=replace(settings.block, init=named_start("auto", warm)))


def of_the_training(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings, flat, that make a run what it is.

    The command's own are left out, and where it is logged, and how its images are fetched.
    """
    known = flat(settings)
    ignored = set(SAME_RUN)
    if known.get("data.name") in TENSOR_SETS:  # the same images in every place
        ignored.add("data.root")
    return {key: value for key, value in known.items() if not {key, key.split(".")[0]} & ignored}


def changes(stored: dict[str, Any], settings: Settings, done: int) -> list[str]:
    """Settings of the training that differ from a checkpoint's, of `done` epochs, a sentence each."""
    old, new = of_the_training(stored), of_the_training(asdict(settings))
    return [f"{key}: {old[key]} until epoch {done}, then {value}" for key, value in new.items()
            if key in old and old[key] != value]
