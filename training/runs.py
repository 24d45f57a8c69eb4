"""What a run's folder says of the run: whether it is this one, whether it is finished, and what came of it."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from training.settings import OF_THE_COMMAND, Settings

SAME_RUN = (*OF_THE_COMMAND, "logger")  # with whatever values of these


def read_config(run_dir: Path) -> dict[str, Any] | None:
    """The settings in a run's config.yaml, as plain values; None where there is none."""
    path = run_dir / "config.yaml"
    return OmegaConf.to_container(OmegaConf.load(path)) if path.is_file() else None


def read_result(run_dir: Path) -> dict[str, Any] | None:
    """What a finished run's result.json holds; None if it is not finished."""
    path = run_dir / "result.json"
    return json.loads(path.read_text()) if path.is_file() else None


def take_up(settings: Settings, run_dir: Path) -> Settings:
    """Go on where a folder's run stopped, if it is the run that these settings describe: a sweep or a job started again.

    Returns:
        The settings, with the checkpoint and the W&B id of that run, where there are any.

    Raises:
        ValueError: if the folder holds another run.
    """
    stored, last = read_config(run_dir), run_dir / "checkpoints" / "last.ckpt"
    if settings.ckpt is not None:
        if last.exists() and Path(settings.ckpt).resolve() != last.resolve():
            raise ValueError(f"{run_dir} already holds another run than ckpt={settings.ckpt}: choose another folder with out=DIR")
        return settings
    if stored is None:
        return settings
    different = [key for key, value in flat(asdict(settings)).items()
                 if key.split(".")[0] not in SAME_RUN and flat(stored).get(key) != value]
    if not different:
        identity = replace(settings.logger, id=stored["logger"]["id"])
        return replace(settings, ckpt=str(last) if last.exists() else None, logger=identity)
    if last.exists():
        raise ValueError(f"{run_dir} already holds a run with another {', '.join(different[:4])}: choose another folder with out=DIR, or "
                         f"go on with that run by ckpt={last}")
    return settings


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under their names on the command line, e.g. `optim.lr`."""
    result = {}
    for key, value in settings.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return result
