"""The comparison must see what changed."""

import pytest
import torch
from torch import nn

from dbb import compare, compare_logits


def test_counts():
    before = torch.tensor([[1.0, 0.0, 0.0], [0.0, 4.0, 3.9], [0.0, 1.0, 5.0], [2.0, 2.05, 0.0]])
    after = torch.tensor([[1.1, 0.0, 0.0], [0.0, 3.9, 4.0], [7.0, 1.0, 5.0], [2.06, 2.05, 0.0]])
    big = compare_logits([(before[:2], after[:2]), (before[2:], after[2:])])
    assert big.images == 4
    assert big.absolute_error == pytest.approx(7)
    assert big.relative_error == pytest.approx(7 / 5)
    assert (big.predictions_changed, big.ties) == (0, 3), "every gap lies below the measured difference"
    small = compare_logits([(before[[0, 3]], torch.tensor([[-0.01, 0.0, 0.0], [2.06, 2.05, 0.0]]))])
    assert (small.predictions_changed, small.ties) == (0, 2)
    clear = compare_logits([(torch.tensor([[10.0, 0.0]]), torch.tensor([[4.0, 5.0]]))])
    assert (clear.predictions_changed, clear.ties) == (1, 0)


def test_nan_is_no_success():
    result = compare_logits([(torch.tensor([[1.0, 0.0]]), torch.tensor([[float("nan"), 0.0]]))])
    assert not result.relative_error <= 1e-4


class Named(nn.Module):
    """Takes more than an image."""

    def forward(self, x, y):
        return x + y


def test_networks():
    a = nn.Linear(3, 2).eval()
    batches = [torch.randn(4, 3), torch.randn(2, 3)]
    assert compare(a, a, batches).images == 6
    assert compare(a, a, batches).relative_error == 0
    named, x = Named().eval(), torch.randn(3, 2)
    assert compare(named, named, [{"x": x, "y": 1}, (x, 1)]).images == 6
    with pytest.raises(ValueError, match="eval"):
        compare(a, nn.Linear(3, 2), batches)
