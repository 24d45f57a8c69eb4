"""Jobs of a sweep (`-m`): one that fails is noted, and the others go on."""

import math
import sys
from collections.abc import Callable

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from runs.folder import FolderTakenError, RunFolder
from settings.cli import as_sentence, print_failure

_failed = []  # names of jobs


def in_a_sweep() -> bool:
    """Whether this is a job of a sweep."""
    return HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN


def job(run: Callable[[DictConfig, RunFolder], float | None], cfg: DictConfig) -> float | None:
    """What `run(cfg, folder)` returns, in the folder that Hydra made for the job; nan if it fails."""
    folder = RunFolder(HydraConfig.get().runtime.output_dir)
    try:
        return run(cfg, folder)
    except Exception as error:
        if not isinstance(error, FolderTakenError):
            folder.fail(as_sentence(error))
        _failed.append(folder.path.name)
        print_failure(folder.path.name, error)
        return math.nan


def exit_if_jobs_failed() -> None:
    """End the script with status 1 and the names of the jobs that failed, if any did."""
    names = list(_failed)
    _failed.clear()
    if names:
        sys.exit(f"error: {len(names)} jobs failed, see above: {', '.join(names)}")
