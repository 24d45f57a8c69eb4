"""Every backbone with DBB, and every block in two of them."""

from functools import partial
from itertools import product

import pytest
import torch

from dbb import BLOCKS, DiverseBranchBlock
from models import BACKBONES, build_model

ONLINE = partial(DiverseBranchBlock, mode="online")
# Every backbone with DBB, and every block in a dense and in a depthwise one.
OTHERS = [*(block for block in BLOCKS if block != "dbb"), ONLINE]
PAIRS = [*product(BACKBONES, ["dbb"]), *product(("resnet20", "mobilenet_v1"), OTHERS)]
EVERY = pytest.mark.parametrize(("name", "block"), PAIRS, ids=[
    f"{name}-{'online' if block is ONLINE else block}" for name, block in PAIRS])
SIZE = {"alexnet": 224, "smallnet_16": 16}  # pixels; the others take 32


def build(name, block=None):
    return build_model(name, 10, block, SIZE.get(name, 32))


def images(name, n=2, **kwargs):
    return torch.randn(n, 3, SIZE.get(name, 32), SIZE.get(name, 32), **kwargs)
