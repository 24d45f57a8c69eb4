"""A run's folder: every path in it, what it says of the run, and who works in it."""

import json
import os
import platform
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import OmegaConf
from pytorch_lightning.utilities import rank_zero_only

from models import limits
from models.checkpoint import load_checkpoint, place_of
from models.say import say
from runs.reading import read_config, read_own_config, read_result, read_text
from runs.safety import is_whole, newest, previous, write_text
from runs.same import as_begun, changes, differences, is_further
from settings.cli import output_folder, printable, typed
from settings.command import Command

# Where the first process of a job tells those that it starts which folder is the run's.
FOLDER_VARIABLE = "DBB_RUN_FOLDER"
HELD: dict[str, int] = {}  # by folder, the lock that this process holds, as the file system numbers files
LONGEST = 1000  # bytes of error.txt that are read


class FolderTakenError(ValueError):
    """The folder is another run's, or another process is at work in it."""


class RunFolder:
    """The folder of a run, at `path`; it need not exist yet."""

    signs = (".lock", "config.yaml", "error.txt")  # that a run began here, or was to
    writes = ("config.yaml", "result.json", "metrics.csv", "metrics-before-resume.csv", "convolutions.csv",
              "checkpoints")

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.lock, self.config, self.error = (self.path / name for name in self.signs)
        self.result = self.path / "result.json"
        self.metrics = self.path / "metrics.csv"
        self.metrics_before = self.path / "metrics-before-resume.csv"  # for a moment, while a logger starts
        self.convolutions = self.path / "convolutions.csv"
        self.checkpoints = self.path / "checkpoints"
        self.last = self.checkpoints / "last.ckpt"

    @classmethod
    def of(cls, command: Command) -> "RunFolder":
        """The folder that a command works in: `out`, its checkpoint's, or a new one.

        Raises:
            ValueError: if it cannot be written into.
        """
        if os.environ.get("LOCAL_RANK", "0") != "0" and FOLDER_VARIABLE in os.environ:
            return cls(os.environ[FOLDER_VARIABLE])
        path = command.out
        if path is None and command.ckpt is not None:
            folder = cls.of_checkpoint(command.ckpt)
            if folder is not None:
                return folder
        if rank_zero_only.rank:
            return cls(path or ".")
        if path is None:
            block = command.block.name
            name = command.model.name if block == "none" else f"{command.model.name}_{block}"
            kind = re.sub(r"[^\w.+-]", "_", f"{name}_{command.data.name}")  # a checkpoint may say ../..
            path = _new_folder(Path("outputs", kind))
        if cls(path).result.is_file():  # of a finished run, nothing needs to be written
            return cls(path)
        return cls(output_folder(path))

    @classmethod
    def of_checkpoint(cls, ckpt: str | Path) -> "RunFolder | None":
        """The folder of the run that wrote a checkpoint; None if the file lies somewhere else."""
        path = Path(ckpt).absolute()
        folder = cls(path.parent.parent)
        return folder if path.parent == folder.checkpoints and folder.is_ours() else None

    def is_ours(self) -> bool:
        """Whether config.yaml, or else the checkpoint, says that this is the folder of a run."""
        try:
            if {"model", "block", "data", "trainer"} <= (self.read_config() or {}).keys():
                return True
        except ValueError:  # a damaged one, which cannot be told from somebody else's
            pass
        return is_whole(self.last)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other processes from training here; processes of the same run do not wait.

        Raises:
            FolderTakenError: if one does.
        """
        if rank_zero_only.rank:
            yield
            return
        os.environ[FOLDER_VARIABLE] = str(self.path.absolute())
        lock = FileLock(self.lock, blocking=False)
        if self.lock.exists() and not f"{read_text(self.lock)}process ".startswith("process "):
            raise FolderTakenError(f"{self.lock} is of no run: choose another folder with out=DIR")
        try:
            lock.acquire()
            self.lock.write_text(f"process {os.getpid()} of {platform.node()}")
            HELD[os.environ[FOLDER_VARIABLE]] = self.lock.stat().st_ino
        except NotImplementedError:
            pass  # a file system without locks cannot keep others out
        except PermissionError as error:
            if not self.result.is_file():  # of a finished run, nothing needs to be written
                raise ValueError(f"cannot write into {self.path} ({error.strerror}): choose another folder "
                                 "with out=DIR") from error
        except Timeout as error:
            raise FolderTakenError(f"another process is training in {self.path} ({read_text(self.lock)}): "
                                   "let it finish, or choose another folder with out=DIR; if it is dead, "
                                   f"remove {self.lock}") from error
        try:
            yield
        finally:
            HELD.pop(str(self.path.absolute()), None)
            lock.release()

    @property
    def has_state(self) -> bool:
        """Whether there is a checkpoint to go on from; of a kill or of damage, the one before may be all."""
        return self.last.exists() or previous(self.last).exists()

    def remove_if_unused(self) -> None:
        """Remove the folder, if a run of ours was to begin in it and did not."""
        if not rank_zero_only.rank and {path.name for path in self.path.iterdir()} <= {self.lock.name}:
            shutil.rmtree(self.path)

    def _go_on(self, command: Command) -> Command:
        """Go on from another checkpoint of this run than the last one.

        If the last is of this command, which was thus stopped before, it goes on there.
        """
        try:
            if not is_further(load_checkpoint(self.last), load_checkpoint(command.ckpt), command):
                return command
        except ValueError:  # whatever cannot be read
            return command
        say(f"{self.last} has these settings, and is further: going on from it")
        return replace(command, ckpt=str(self.last))

    def _say_what_changed(self, ckpt: Path, command: Command) -> None:
        """Of a run that was stopped after its settings changed, before it saved with them."""
        checkpoint = load_checkpoint(ckpt)
        for change in changes(checkpoint["dbb"]["settings"], command, *place_of(checkpoint)):
            say(f"changed since {ckpt.name}: {change}")

    def refuse_links(self) -> None:
        """Refuse a folder by which somebody else's files could be replaced, read without end, or made.

        Raises:
            FolderTakenError: if something in it is a link, a pipe or a device.
        """
        for place in self.path.iterdir() if self.path.is_dir() else ():
            if place.is_symlink() or not (place.is_file() or place.is_dir()):
                raise FolderTakenError(f"{place} is a link or a device, and a run's folder has files and "
                                       "folders of its own alone: remove it, or choose another folder with "
                                       "out=DIR (a whole folder may be moved, and linked to)")

    def goes_back(self, ckpt: str | None) -> bool:
        """Whether a checkpoint is another one of this folder than the last."""
        asked = None if ckpt is None else Path(ckpt).resolve()
        return asked not in (None, self.last.resolve()) and asked.parent == self.checkpoints.resolve()

    def read_config(self) -> dict[str, Any] | None:
        """The settings in config.yaml, as plain values; None where there is none.

        Raises:
            ValueError: if it is damaged.
        """
        return read_config(self.config)

    def read_result(self) -> dict[str, Any] | None:
        """What a finished run's result.json holds; None if it is not finished.

        Raises:
            ValueError: if it is damaged.
        """
        return read_result(self.result)

    def begin(self, command: Command) -> None:
        """Write the settings, and clear what an earlier session left of its end.

        Raises:
            ValueError: if they are longer than any file of settings that is read.
        """
        text = OmegaConf.to_yaml(OmegaConf.create(command.stored()))
        if len(text) > limits.SETTINGS:
            raise ValueError(f"the settings take {len(text):,} letters; {limits.SETTINGS:,} are the most: "
                             "name fewer layers, branches or tags")
        self.result.unlink(missing_ok=True)
        if not self._has_others_error():
            self.error.unlink(missing_ok=True)
        write_text(self.config, text)

    def refuse_taken(self) -> None:
        """Refuse to write where another process works now: somebody renamed this run's folder.

        Raises:
            FolderTakenError: if one does.
        """
        held = HELD.get(str(self.path.absolute()))
        if held is not None and self.lock.exists() and self.lock.stat().st_ino != held:
            raise FolderTakenError(f"{self.path} is another run's now, and this run's folder was renamed: go "
                                   "on where it lies, from its last.ckpt")

    def finish(self, result: dict[str, Any]) -> None:
        """Write result.json, which says that the run is finished."""
        write_text(self.result, json.dumps(result, indent=2) + "\n")

    def fail(self, sentence: str) -> None:
        """Write error.txt, which says why the run stopped; not over one of somebody else's.

        Where that fails, the sentence is printed all the same.
        """
        if not rank_zero_only.rank and not self._has_others_error():
            with suppress(OSError):
                write_text(self.error, f"{sentence}\n")

    def why_failed(self) -> str | None:
        """The sentence in error.txt; None where there is none of ours."""
        if not self.error.exists() or self._has_others_error():
            return None
        return printable(read_text(self.error, LONGEST).strip().splitlines()[0])

    def _has_others_error(self) -> bool:
        return self.error.exists() and not read_text(self.error, LONGEST).startswith("error: ")

    def take_up(self, command: Command) -> Command:
        """Go on where the folder's run stopped, if it is the run that a command describes.

        A sweep or a job may thus be started again.

        Returns:
            The command, with the checkpoint and the W&B id of that run, where there are any.

        Raises:
            FolderTakenError: if the folder holds another run, or what no run has written.
        """
        self.refuse_links()
        there = [name for name in self.writes if (self.path / name).exists()]
        if self._has_others_error():
            there.append(self.error.name)
        if there and not self.is_ours():
            raise FolderTakenError(f"{self.path} has {there[0]}, which no run wrote: it is somebody else's; "
                                   "choose another folder with out=DIR")
        holds_run = self.has_state or self.result.exists()
        asked = None if command.ckpt is None else Path(command.ckpt).resolve()
        if asked is not None and (asked == self.last.resolve() or not holds_run):
            return command
        if self.goes_back(command.ckpt):
            return self._go_on(command)
        stored = read_own_config(self.config)
        command = as_begun(command, stored)
        different = differences(stored, command)
        if stored is not None and not different:
            logger = replace(command.logger, id=stored["logger"].get("id"))
            going_on = newest(self.last)
            if going_on and asked is None and not self.result.exists():
                self._say_what_changed(going_on, command)
            if going_on and asked and not is_further(*map(load_checkpoint, (going_on, asked)), command):
                raise FolderTakenError(f"{self.path} holds a run of these settings that did not go on from "
                                       f"ckpt={asked}: choose another folder with out=DIR")
            return replace(command, ckpt=None if going_on is None else str(going_on), logger=logger)
        if holds_run:
            what = f"with another {', '.join(different[:4])}" if stored else "and has lost its config.yaml"
            text = f"{self.path} already holds a run {what}: choose another folder with out=DIR"
            if self.has_state:
                text += f", or go on with that run by {typed('ckpt', self.last)}"
            raise FolderTakenError(text)
        return command


def _new_folder(parent: Path) -> Path:
    """A folder named by the time; of runs that begin in one second, each has its own."""
    while True:
        path = parent / f"{datetime.now():%Y-%m-%d_%H-%M-%S}"
        try:
            path.mkdir(parents=True)
            return path
        except OSError:
            if not os.path.lexists(path):
                return path  # `output_folder` explains why not
            time.sleep(0.1)
