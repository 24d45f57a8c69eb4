"""The environment of all tests, and settings from the real configs."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # the processes share the cores
# On CPUs with AMX, oneDNN in torch 2.14 computes some bf16 convolutions wrongly, plain ones too: of a kernel
# of (1, 2) with stride and dilation (1, 2), of two channels, on 7x4 pixels.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")

import pytest
from hydra import compose, initialize_config_dir

from evaluation import cost
from settings.command import resolve
from tests.helpers import ROOT


@pytest.fixture(autouse=True)
def _no_time_for_latencies(monkeypatch):
    """No test looks at a latency's value."""
    monkeypatch.setattr(cost, "TIMED", 0.01)


@pytest.fixture
def make_settings(tmp_path):
    """Compose settings as the command line does: `make_settings("model=resnet20", "data=digits")`."""
    def make(*overrides: str, config_name: str = "train"):
        with initialize_config_dir(os.path.join(ROOT, "configs"), version_base="1.3"):
            cfg = compose(config_name, list(overrides))
        return resolve(cfg, list(overrides))
    return make
