"""Names of folders, for the configs: resolvers that Hydra calls while it composes."""

import hashlib
import os
import re

from omegaconf import OmegaConf

from settings.cli import plain_errors
from settings.overrides import parsed, wants_no_block
from settings.schema import NOT_OF_THE_RUN, TENSOR_SETS


def job_name(data: str, overrides: list[str]) -> str:
    """The folder of a sweep's job: its settings in one order, so that a job keeps it when the sweep grows."""
    ignored = {"out", *NOT_OF_THE_RUN}
    if data in TENSOR_SETS:  # the same images in every place
        ignored.add("data.root")
    words = parsed(overrides)
    plain = wants_no_block(words)
    if plain:  # see settings.command.resolve
        ignored.add("block")
    kept = ["block=none"] if plain else []
    for override in words:
        key = override.key_or_group
        if not {key, key.split(".")[0]} & ignored:
            kept.append(override.input_line)
    wanted = "+".join(sorted(kept)).replace("=", "-") or "defaults"
    # Only what Hydra takes unquoted in ckpt=PATH, and a file system as one name.
    name = re.sub(r"[^\w.+-]", "_", wanted, flags=re.ASCII)[:150]
    return name if name == wanted else f"{name[:140]}-{hashlib.sha256(wanted.encode()).hexdigest()[:8]}"


def slurm_job() -> str:
    with plain_errors():
        if "SLURM_JOB_ID" not in os.environ:
            raise ValueError("trainer=slurm: SLURM_JOB_ID, which names the run's folder, is set in jobs of "
                             "SLURM only: elsewhere take trainer=ddp, or out=DIR")
    return os.environ["SLURM_JOB_ID"]


OmegaConf.register_new_resolver("first", lambda *values: os.path.expanduser(next(filter(None, values))))
OmegaConf.register_new_resolver("job_name", job_name)
OmegaConf.register_new_resolver("slurm_job", slurm_job)
