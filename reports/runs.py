"""Read the runs of a study: their settings, their results, their epochs."""

import hashlib
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from omegaconf import OmegaConf

from models import limits
from runs.folder import RunFolder
from runs.rows import read_rows
from runs.same import LATER_KNOBS, of_the_training
from settings.cli import printable
from settings.schema import Settings
from settings.values import flat

RESULT = ("top1", "top5", "loss", "converted_top1", "predictions_changed", "activations_mib")
# What the same words may stand for, by its name in a report: the settings that name such files, and their
# hashes in result.json. Likewise, of `trainer.devices=auto`, the number of processes.
FILES = {"images": (("data.name", "data.root"), ("image_digest", "test_digest")),
         "weights": (("model.weights",), ("weights_digest",))}
KNOBS = OmegaConf.structured(Settings)  # of the types that they must have
SECONDS = 1e-9, 1e9  # of a step, at least and at most
LARGEST = 1e18  # value of a file, which a column of whole numbers can hold
METRICS = {"train/loss_epoch": "train_loss", "test/loss": "test_loss", "test/top1": "test_top1",
           "train/seconds_per_step": "seconds_per_step"}


def read_runs(folders: list[Path]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Every run below some folders.

    Returns:
        The runs, a row each: `folder`, `settings` (flat, without the seed), `seed`, `state` (finished, or why
        not) and, if finished, what result.json holds, the final training loss and the seconds; and their
        epochs, a row each.

    Raises:
        ValueError: if none is finished.
    """
    found = {path.parent.resolve(): path.parent for path in under(folders, *RunFolder.signs)}
    runs, epochs = [], []
    for place in found.values():
        run = {"folder": str(place), "settings": {}}
        try:
            about, rows = _read_run(RunFolder(place))
        except (ValueError, OSError, ArithmeticError, TypeError) as damage:  # a file's, of any type
            runs.append(run | {"state": printable(str(damage))})
            continue
        if about is not None:
            runs.append(run | about)
        if rows is not None:
            epochs.append(rows)
    for name, (knobs, _) in FILES.items():
        _tell_apart(runs, name, knobs)
    _tell_apart(runs, "processes", ("trainer.devices", "trainer.num_nodes"))
    _leave_out_repeated(runs)
    if not any(run["state"] == "finished" for run in runs):
        raise ValueError(f"no finished run below {', '.join(map(str, folders))}"
                         + "".join(f"\n  {printable(run['folder'])}: {run['state']}" for run in runs))
    return pd.DataFrame(runs), pd.concat([rows for rows in epochs if len(rows)] or epochs, ignore_index=True)


def under(folders: Sequence[Path], *names: str) -> list[Path]:
    """The files of these names below folders; a ValueError if those are nested too deep."""
    try:
        return [path for folder in folders for name in names for path in sorted(folder.rglob(name))]
    except RecursionError as error:
        raise ValueError(f"{', '.join(map(str, folders))}: folders are nested too deep") from error


def _tell_apart(runs: list[dict[str, Any]], name: str, knobs: tuple[str, ...]) -> None:
    """Add `images`, say, to the settings of runs whose knobs are the same and stood for something else.

    Images were added between two of them, say, or another file took the place of `model.weights`. Older runs
    do not say what they had.
    """
    alike = defaultdict(list)
    for run in runs:
        place = str([run["settings"].get(knob) for knob in knobs])
        alike[place].append((run, run.pop(name, None)))
    for same in alike.values():
        if len({had for _, had in same if had}) > 1:
            for run, had in same:
                run["settings"][name] = had


def _leave_out_repeated(runs: list[dict[str, Any]]) -> None:
    """Say of a run that ended exactly as another one of its settings and seed that it is no further one."""
    first = {}
    for run in runs:
        if run["state"] == "finished":
            ended = [run[name] for name in ("seed", "top1", "loss")]
            ended.append(f"{run['train_loss']:.5g}")  # tools/keep_runs.py rounds it
            earlier = first.setdefault(str([*ended, sorted(run["settings"].items())]), run["folder"])
            if earlier != run["folder"]:
                run["state"] = printable(f"ended exactly as {earlier}, of the same settings and seed")


def _read_run(folder: RunFolder) -> tuple[dict[str, Any] | None, pd.DataFrame | None]:
    """What a folder says of its run, None if it holds none; and its epochs, None if it never began."""
    config, result, rows = folder.read_config(), folder.read_result(), read_epochs(folder)
    why = folder.why_failed()
    if config is None:
        return {"state": why or "stopped before it began"}, None
    trainer = config.get("trainer")
    if "seed" not in config or not isinstance(trainer, dict) or "max_epochs" not in trainer:
        return None, None  # a config.yaml of something else, as W&B writes one into its own folder
    settings = _settings(config, folder)
    run = {"seed": settings.pop("seed"), "settings": settings,
           "epochs": 0 if rows.empty else int(rows["epoch"].iloc[-1])}  # the first may be logged elsewhere
    if changed := (result or {}).get("changed"):
        what = "; ".join(map(str, changed)) if isinstance(changed, list) else changed
        return run | {"state": printable(f"went on with other settings ({what})")}, rows
    if result is None:
        why = why or "not finished"
        return run | {"state": f"{why} ({run['epochs']} of {settings['trainer.max_epochs']} epochs)"}, rows
    unknown = dict.fromkeys(("train_loss", "seconds_per_step", "seconds"), np.nan)
    numbers = {name: result.get(name) for name in RESULT}
    numbers |= {name: result[name] for name in ("parameters", "val_top1") if name in result}
    for name, value in numbers.items():
        most = 1 if name.endswith(("top1", "top5")) else LARGEST
        if type(value) not in (int, float) or not 0 <= value <= most:
            raise ValueError(f"{folder.result} has {name}={str(value)[:40]}, which is none of a run's")
    for name, (_, digests) in FILES.items():
        if all(isinstance(result.get(digest), str) for digest in digests):
            text = "".join(result[digest] for digest in digests)
            run[name] = hashlib.sha256(text.encode()).hexdigest()[:8]
    if type(result.get("processes")) is int:
        run["processes"] = result["processes"]
    return run | {"state": "finished"} | unknown | numbers | _cost(rows, settings), rows


def _settings(config: dict[str, Any], folder: RunFolder) -> dict[str, Any]:
    """The settings that make a run what it is, flat, of the types that they must have.

    Raises:
        ValueError: if one has another, or is unknown.
    """
    try:
        # An older file has what its command was asked, too, and fewer knobs: see `LATER_KNOBS`.
        known = {part.name: config[part.name] for part in fields(Settings) if part.name in config}
        if "${" in str(known):
            raise ValueError("it has ${...}, which would be resolved")
        known = OmegaConf.merge(KNOBS, known)
        whole = OmegaConf.to_container(known, resolve=False)
        if any(isinstance(value, float) and not math.isfinite(value) for value in flat(whole).values()):
            raise ValueError("it has numbers that are not finite")
        asked = flat(config)
    except Exception as error:  # of OmegaConf's many kinds
        raise ValueError(f"{folder.config} is damaged: {str(error).splitlines()[0]}") from error
    settings = {key: value if key in asked else LATER_KNOBS.get(key, value)
                for key, value in of_the_training(whole).items()}
    if not 0 <= settings["seed"] < 2**32:
        raise ValueError(f"{folder.config} is damaged: its seed is {settings['seed']}")
    if settings["block.name"] == "none":  # to plain convolutions, a block's knobs mean nothing
        settings = {key: value for key, value in settings.items()
                    if key == "block.name" or not key.startswith("block.")}
    return {key: str(value) if isinstance(value, list) else value for key, value in settings.items()}


def _cost(rows: pd.DataFrame, settings: dict[str, Any]) -> dict[str, float]:
    """The final training loss, seconds a step (median) and in all; nothing without epochs."""
    if rows.empty:
        return {}
    per_step = rows["seconds_per_step"].median()  # of a batch; the steps are the optimiser's
    batches = (rows["step"].iloc[-1] + 1) * settings["trainer.accumulate_grad_batches"]
    return {"train_loss": rows["train_loss"].iloc[-1], "seconds_per_step": per_step,
            "seconds": batches * per_step}


def read_columns(path: Path, columns: list[str] | None = None) -> pd.DataFrame:
    """Some columns of a metrics.csv, or all, as text; without rows where there is no file.

    Raises:
        ValueError: if it is damaged, but for a last line that is still being written.
    """
    if not path.is_symlink() and not path.exists():
        return pd.DataFrame(columns=columns)
    names, rows, damaged, cut = read_rows(path)
    if damaged or not names and cut:
        raise ValueError(f"lines that are cut, or have other columns than its first: {damaged}")
    columns = list(dict.fromkeys(names)) if columns is None else columns
    known = [name for name in columns if name in names]
    places = [names.index(name) for name in known]
    return pd.DataFrame([[row[place] for place in places] for row in rows], columns=known).reindex(
        columns=columns)


def read_epochs(folder: RunFolder) -> pd.DataFrame:
    """A run's epochs by metrics.csv, a row each; of one that was run again after an interruption, the last.

    Raises:
        ValueError: if the file is damaged.
    """
    try:
        rows = read_columns(folder.metrics, ["epoch", "step", *METRICS]).rename(columns=METRICS)
        rows = rows.apply(pd.to_numeric, errors="coerce").dropna(subset=list(METRICS.values()), how="all")
        rows = rows.astype(float)
        odd = (rows["epoch"] % 1 != 0) | (rows["epoch"] < 0) | (rows["epoch"] > limits.EPOCHS)
        odd |= rows["seconds_per_step"].notna() & ~rows["seconds_per_step"].between(*SECONDS)
        if odd.any() or (rows[np.isfinite(rows)].abs() > LARGEST).any(axis=None):
            raise ValueError("an epoch or a value is none of a training's")
        rows = rows.groupby("epoch").last()
        return rows.assign(folder=str(folder.path), epoch=rows.index.astype(int) + 1)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{folder.metrics} is damaged ({error})") from error
