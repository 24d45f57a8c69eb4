"""Two networks side by side: how far are their logits apart? And what is each branch's part in a block?"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dbb.block import ReparamConv2d
from dbb.flow import Inputs, call


@dataclass(frozen=True)
class Comparison:
    """What `compare` measured over `images` images."""

    images: int
    absolute_error: float  # largest |difference| of a logit
    relative_error: float  # largest, over images, of largest |difference| / largest |logit|
    predictions_changed: int  # top-1 predictions that differ, ties not counted
    ties: int  # those that differ while the two leading logits lie closer than `absolute_error`


def compare_logits(batches: Iterable[tuple[Tensor, Tensor]]) -> Comparison:
    """Compare pairs of logits `[N, classes]`, batch by batch."""
    images, absolute, relative, gaps = 0, 0.0, 0.0, []
    for before, after in batches:
        if not isinstance(before, Tensor):
            raise ValueError(f"logits [N, classes] are compared, and the network returns a "
                             f"{type(before).__name__}: wrap both so that they return a tensor")
        if not len(before):
            continue
        before, after = before.double(), after.double()
        difference = (before - after).abs().amax(1)
        largest = before.abs().amax(1).clamp_min(torch.finfo(torch.float64).tiny)
        images += len(before)
        # Unlike Python's max, torch's hand on a NaN.
        absolute = difference.max().clamp_min(absolute).item()
        relative = (difference / largest).max().clamp_min(relative).item()
        leading = before.topk(2).values if before.shape[1] > 1 else before.expand(-1, 2)
        gaps.append((leading[:, 0] - leading[:, 1])[before.argmax(1) != after.argmax(1)])
    gaps = torch.cat(gaps) if gaps else torch.empty(0, device="cpu")
    ties = int((gaps < absolute).sum())
    return Comparison(images, absolute, relative, len(gaps) - ties, ties)


@torch.no_grad()
def compare(a: nn.Module, b: nn.Module, batches: Iterable[Inputs]) -> Comparison:
    """Run two networks on the same batches and compare their logits `[N, classes]`.

    A batch is a tensor `[N, C, H, W]`; or several inputs, in order or by name. Training mode is a ValueError.
    """
    if a.training or b.training:
        raise ValueError("networks in training mode cannot be compared: call .eval() on both first")
    return compare_logits((call(a, x), call(b, x)) for x in batches)


@torch.no_grad()
def branch_shares(net: nn.Module) -> dict[str, dict[str, float]]:
    """By block, the norm of each branch's part of the merged kernel over the sum of these norms."""
    result = {}
    for name, block in net.named_modules():
        if isinstance(block, ReparamConv2d):
            norms = {key: branch.equivalent()[0].double().norm().item()
                     for key, branch in block.branches.items()}
            total = sum(norms.values()) or 1.0
            result[name] = {key: value / total for key, value in norms.items()}
    return result
