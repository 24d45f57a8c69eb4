"""How many operators a training step runs.

Every operator that computes or copies something counts, as a GPU pays for a launch each time, however small
the work. Views and memory without values are free.
"""

import pytest
import torch

from benchmarks.gpu_model import GPUS, MEASURED, Trace, seconds, trace
from benchmarks.step_time import DrawnBlock, published
from dbb import DiverseBranchBlock, OnlineReparamBlock
from models import build_model


@pytest.mark.parametrize(("mode", "shape", "budget"), [
    ("online", "dense", 59), ("online", "stride 2", 64),
    ("online", "grouped 5x5", 77), ("online", "depthwise", 50),
    ("exact", "dense", 68), ("exact", "stride 2", 70),
    ("exact", "grouped 5x5", 95), ("exact", "depthwise", 53),
    ("linear", "dense", 30), ("linear", "stride 2", 30)])
def test_how_many_operators_a_step_launches(mode, shape, budget):
    """Forward and backward of one block. The published block launches 93, depthwise 53."""
    kernel_size, stride, groups = {"dense": (3, 1, 1), "stride 2": (3, 2, 1), "grouped 5x5": (5, 1, 4),
                                   "depthwise": (3, 1, 128)}[shape]
    kind = OnlineReparamBlock if mode == "linear" else DiverseBranchBlock
    block = kind(128, 128, kernel_size, stride, kernel_size // 2, groups=groups, mode=mode, positions=256)
    x = torch.randn(8, 128, 16, 16, requires_grad=True)
    with Trace() as traced:
        y = block.train()(x)
        y.backward(torch.ones_like(y))
    names = [operator.name for operator in traced.operators]
    assert len(names) <= budget + 1, names  # and the ones


@pytest.mark.slow
def test_the_gpu_model_agrees_with_published_times():
    """ResNet-18 on a V100: the plain network's milliseconds, and the published block's ratio to them."""
    plain = build_model("resnet18", 1000, image_size=224)
    drawn = published(DrawnBlock, build_model("resnet18", 1000, "dbb", image_size=224))
    plain, drawn = (seconds(trace(net, 64, 224, torch.float32), GPUS[0], 5e-6) for net in (plain, drawn))
    measured, ratio = MEASURED["resnet18"]
    assert plain == pytest.approx(measured, rel=0.1)
    assert drawn / plain == pytest.approx(ratio, rel=0.1)
