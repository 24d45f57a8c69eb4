"""Names of folders, for the configs: resolvers that Hydra calls while it composes."""

import hashlib
import os
import re
from itertools import product
from pathlib import Path

from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf

from settings.cli import output_folder, plain_errors
from settings.overrides import named, parsed, wants_no_block
from settings.schema import NOT_OF_THE_RUN, PATHS, same_everywhere


def job_name(data: str, overrides: list[str], sweep: str = ".") -> str:
    """The folder of a sweep's job: its settings in one order, so that a job keeps it when the sweep grows.

    A word may be typed in several ways, the default seed also not at all: of these names, that of a folder
    which is there is taken.
    """
    ignored = {"out", *NOT_OF_THE_RUN}
    words = parsed(overrides)
    roots = [word.value() for word in words if word.key_or_group == "data.root"]
    if same_everywhere(data, roots[-1] if roots else None):
        ignored.add("data.root")
    plain = wants_no_block(words)
    if plain:  # see settings.command.resolve
        ignored.add("block")
    spellings = [["block=none"]] if plain else []
    for override in words:
        key = override.key_or_group
        if not {key, key.split(".")[0]} & ignored:
            spellings.append(_spellings(override))
        elif key.startswith("trainer."):  # folders of before 2026-11-28 are named by it
            spellings.append(["", override.input_line])
    if "seed" not in named(words):
        spellings.append(["", "seed=0"])
    names = [_as_folder([*filter(None, choice)]) for choice in product(*spellings)]
    return next((name for name in names if Path(sweep, name).is_dir()), names[0])


def _spellings(override: Override) -> list[str]:
    """A word of the command line in all the ways that it may have been typed; "" is not at all."""
    line, key, value = override.input_line, override.key_or_group, override.value()
    found = [line]
    if key in PATHS and isinstance(value, str):
        path = os.path.normpath(os.path.expanduser(value))
        found = [f"{key}={path}", f"{key}={os.path.abspath(path)}", line]
    elif isinstance(value, float):
        found = [f"{key}={value}", line]
    elif line == "seed=0":
        found = [line, ""]
    return list(dict.fromkeys(found))


def _as_folder(words: list[str]) -> str:
    wanted = "+".join(sorted(words)).replace("=", "-") or "defaults"
    # Only what Hydra takes unquoted in ckpt=PATH, and a file system as one name.
    name = re.sub(r"[^\w.+-]", "_", wanted, flags=re.ASCII)[:150]
    return name if name == wanted else f"{name[:140]}-{hashlib.sha256(wanted.encode()).hexdigest()[:8]}"


def slurm_job() -> str:
    with plain_errors():
        if "SLURM_JOB_ID" not in os.environ:
            raise ValueError("trainer=slurm: SLURM_JOB_ID, which names the run's folder, is set in jobs of "
                             "SLURM only: elsewhere take trainer=ddp, or out=DIR")
    return os.environ["SLURM_JOB_ID"]


def sweep_folder(out: str | None, default: str) -> str:
    """The folder of a sweep, made before Hydra does, whose error would be a traceback."""
    with plain_errors():
        folder = output_folder(out or default)
        written = folder / "multirun.yaml"
        if written.is_symlink() or written.exists() and not written.is_file():
            raise ValueError(f"{written}, which Hydra writes, is a link, a pipe or a folder: remove it, or "
                             "choose another folder with out=DIR")
        return str(folder)


OmegaConf.register_new_resolver("sweep_folder", sweep_folder)
OmegaConf.register_new_resolver("job_name", job_name)
OmegaConf.register_new_resolver("slurm_job", slurm_job)
