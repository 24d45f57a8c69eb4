"""Read the runs of a study: their settings, their results, their epochs."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from runs.folder import RunFolder
from runs.same import of_the_training

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
    found = {path.parent.resolve(): path.parent for folder in folders
             for name in RunFolder.signs for path in sorted(folder.rglob(name))}
    runs, epochs = [], []
    for place in found.values():
        run = {"folder": str(place), "settings": {}}
        try:
            about, rows = _read_run(RunFolder(place))
        except ValueError as damage:
            runs.append(run | {"state": str(damage)})
            continue
        if about is not None:
            runs.append(run | about)
        if rows is not None:
            epochs.append(rows)
    if not any(run["state"] == "finished" for run in runs):
        raise ValueError(f"no finished run below {', '.join(map(str, folders))}"
                         + "".join(f"\n  {run['folder']}: {run['state']}" for run in runs))
    return pd.DataFrame(runs), pd.concat([rows for rows in epochs if len(rows)] or epochs, ignore_index=True)


def _read_run(folder: RunFolder) -> tuple[dict[str, Any] | None, pd.DataFrame | None]:
    """What a folder says of its run, None if it holds none; and its epochs, None if it never began."""
    config, result, rows = folder.read_config(), folder.read_result(), read_epochs(folder)
    failed = folder.error.exists()
    why = folder.error.read_text().strip() if failed else "stopped before it began"
    if config is None:
        return {"state": why}, None
    settings = {key: str(value) if isinstance(value, list) else value
                for key, value in of_the_training(config).items()}
    if "seed" not in settings or "trainer.max_epochs" not in settings:
        return None, None  # a config.yaml of something else, as W&B writes one into its own folder
    if not isinstance(settings["seed"], int):
        raise ValueError(f"{folder.config} is damaged: its seed is {settings['seed']!r}")
    run = {"seed": settings.pop("seed"), "settings": settings, "epochs": len(rows)}
    if changed := (result or {}).pop("changed", None):
        return run | {"state": f"went on with other settings ({'; '.join(changed)})"}, rows
    if result is None:
        why = why if failed else "not finished"
        return run | {"state": f"{why} ({len(rows)} of {settings['trainer.max_epochs']} epochs)"}, rows
    unknown = dict.fromkeys(("train_loss", "seconds_per_step", "seconds"), np.nan)
    numbers = {name: value for name, value in result.items() if isinstance(value, int | float)}
    return run | {"state": "finished"} | unknown | numbers | _cost(rows, settings), rows


def _cost(rows: pd.DataFrame, settings: dict[str, Any]) -> dict[str, float]:
    """The final training loss, seconds a step (median) and in all; nothing without epochs."""
    if rows.empty:
        return {}
    per_step = rows["seconds_per_step"].median()  # of a batch; the steps are the optimiser's
    batches = (rows["step"].iloc[-1] + 1) * settings["trainer.accumulate_grad_batches"]
    return {"train_loss": rows["train_loss"].iloc[-1], "seconds_per_step": per_step,
            "seconds": batches * per_step}


def read_epochs(folder: RunFolder) -> pd.DataFrame:
    """A run's epochs by metrics.csv, a row each; of one that was run again after an interruption, the last.

    Raises:
        ValueError: if the file is damaged.
    """
    try:
        rows = pd.read_csv(folder.metrics)
    except (FileNotFoundError, pd.errors.EmptyDataError):
        rows = pd.DataFrame()
    except ValueError as error:
        raise ValueError(f"{folder.metrics} is damaged ({error})") from error
    rows = rows.reindex(columns=["epoch", "step", *METRICS]).rename(columns=METRICS)
    rows = rows.apply(pd.to_numeric, errors="coerce").dropna(subset=list(METRICS.values()), how="all")
    rows = rows.groupby("epoch").last()
    return rows.assign(folder=str(folder.path), epoch=rows.index.astype(int) + 1)
