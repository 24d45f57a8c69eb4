"""How many operators a training step runs.

Every operator that computes or copies something counts, as a GPU pays for a launch each time, however small
the work. Views and memory without values are free.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dbb import DiverseBranchBlock, OnlineReparamBlock


class Operators(TorchDispatchMode):
    """The names of all operators that run something: not views, and no memory without values."""

    free = {"detach", "view", "_unsafe_view", "expand", "alias", "t", "transpose", "permute", "slice",
            "select", "unsqueeze", "squeeze", "as_strided", "split", "split_with_sizes", "unbind", "unfold",
            "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not view and name not in self.free:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("mode", "shape", "budget"), [
    ("online", "dense", 57), ("online", "stride 2", 63),
    ("online", "grouped 5x5", 77), ("online", "depthwise", 51),
    ("exact", "dense", 69), ("exact", "stride 2", 65),
    ("exact", "grouped 5x5", 91), ("exact", "depthwise", 53),
    ("linear", "dense", 35), ("linear", "stride 2", 35)])
def test_how_many_operators_a_step_launches(mode, shape, budget):
    """Forward and backward of one block. The published block launches 93, depthwise 53."""
    kernel_size, stride, groups = {"dense": (3, 1, 1), "stride 2": (3, 2, 1), "grouped 5x5": (5, 1, 4),
                                   "depthwise": (3, 1, 128)}[shape]
    kind = OnlineReparamBlock if mode == "linear" else DiverseBranchBlock
    block = kind(128, 128, kernel_size, stride, kernel_size // 2, groups=groups, mode=mode).train()
    x = torch.randn(8, 128, 16, 16, requires_grad=True)
    with Operators() as operators:
        y = block(x)
        y.backward(torch.ones_like(y))
    assert len(operators.names) <= budget + 1, operators.names  # and the ones
