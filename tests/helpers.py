"""What tests of several packages use: random statistics, relative errors, networks, images, scripts."""

import io
import itertools
import os
import runpy
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hydra.core.hydra_config import HydraConfig
from PIL import Image
from torch import nn

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
EVERY_BRANCH = ("kxk", "1x1", "1x1_avg", "1x1_kxk", "1x1_prior", "dw_1x1", "1x1_kxk_1x1", "identity", "avg",
                "1xk", "kx1")
TINY = ("data=digits", "trainer.max_epochs=1", "trainer.limit_train_batches=8", "optim.lr=0.02", "logger=csv")


def pair(channels: int = 8) -> nn.Sequential:
    """A convolution and its norm, which a block replaces."""
    return nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random norm parameters and statistics: with the default ones, no conversion bug shows."""
    draw = torch.Generator().manual_seed(seed)

    def uniform_(tensor, low, high):
        with torch.no_grad():
            tensor.copy_(torch.rand(tensor.shape, generator=draw, dtype=torch.float64) * (high - low) + low)

    for module in model.modules():
        if "running_var" in dict(module.named_buffers(recurse=False)):
            uniform_(module.running_var, 0.5, 2)
            uniform_(module.weight, 0.5, 1.5)
        if isinstance(module, nn.BatchNorm2d):
            uniform_(module.running_mean, -1, 1)
            uniform_(module.bias, -1, 1)
        if isinstance(getattr(module, "factor", None), nn.Parameter):
            uniform_(module.factor, 0.5, 1.5)
        if isinstance(getattr(module, "first", None), nn.Parameter):  # 0 at first, added to the identity
            uniform_(module.first, -0.5, 0.5)
    return model


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over norm of the expected tensor."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm().clamp_min(torch.finfo(torch.float64).tiny))


class Stranger:
    """What no file of weights may hold."""


def write_tree(root, splits, classes, count, size, seed=0):
    """An image-folder tree of random images; `size` (width, height)."""
    draw = np.random.default_rng(seed)
    for split, name, i in itertools.product(splits, classes, range(count)):
        folder = root / split / name
        folder.mkdir(parents=True, exist_ok=True)
        pixels = draw.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


def run(script, *overrides, cwd, env=()):
    """Start a script as a user does."""
    env = {k: v for k, v in os.environ.items() if k != "WANDB_MODE"} | {"OMP_NUM_THREADS": "1"} | dict(env)
    try:
        return subprocess.run([sys.executable, os.path.join(ROOT, script), *overrides], cwd=cwd, env=env,
                              capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired as error:
        pytest.fail(f"it hung, and had printed: {error.stderr.decode()[-5000:]}")


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
