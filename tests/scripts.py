"""Starting the scripts: as a user does, or in this process."""

import io
import os
import runpy
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from types import SimpleNamespace

import pytest
from hydra.core.hydra_config import HydraConfig

from tests.conftest import ROOT

TINY = ("data=digits", "trainer.max_epochs=1", "trainer.limit_train_batches=8", "optim.lr=0.02", "logger=csv")


def run(script, *overrides, cwd, env=()):
    """Start a script as a user does."""
    env = {k: v for k, v in os.environ.items() if k != "WANDB_MODE"} | {"OMP_NUM_THREADS": "1"} | dict(env)
    return subprocess.run([sys.executable, os.path.join(ROOT, script), *overrides], cwd=cwd, env=env,
                          capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)


def call(script, *overrides, cwd):
    """The same, top to bottom, in this process: without the seconds in which a new one imports PyTorch."""
    path, code = os.path.join(ROOT, script), 0
    with pytest.MonkeyPatch.context() as patch, \
            redirect_stdout(io.StringIO()) as stdout, redirect_stderr(io.StringIO()) as stderr:
        patch.chdir(cwd)
        patch.setattr(sys, "argv", [path, *overrides])
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as stop:  # what the interpreter makes of it
            code = stop.code or 0
            if isinstance(code, str):
                print(code, file=stderr)
                code = 1
        finally:
            HydraConfig.instance().cfg = None  # else the next training believes that it is a job of this one
    return SimpleNamespace(returncode=code, stdout=stdout.getvalue(), stderr=stderr.getvalue())
