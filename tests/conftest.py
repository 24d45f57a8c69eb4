"""Shared by all tests: settings from the real configs, a pair, random norm statistics, relative errors."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # the processes share the cores
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import nn

from settings.command import resolve

EVERY_BRANCH = ("kxk", "1x1", "1x1_avg", "1x1_kxk", "1x1_prior", "dw_1x1", "identity", "avg", "1xk", "kx1")
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@pytest.fixture
def make_settings(tmp_path):
    """Compose settings as the command line does: `make_settings("model=resnet20", "data=digits")`."""
    def make(*overrides: str, config_name: str = "train"):
        with initialize_config_dir(os.path.join(ROOT, "configs"), version_base="1.3"):
            cfg = compose(config_name, list(overrides))
        return resolve(cfg, list(overrides))
    return make


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
