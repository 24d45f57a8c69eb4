"""Spatial gradient scaling: the mask against plainly counted histograms, and what it does to a step."""

import copy
import math
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn

from dbb import SpatialGradientScaling, spatial_gradient_scale
from tests.helpers import relative_error


def entropy(counts):
    shares = [count / sum(counts.values()) for count in counts.values()]
    return -sum(share * math.log2(share) for share in shares)


def binned(values):
    bins, low, high = 1 + math.ceil(math.log2(len(values))), min(values), max(values)
    if low == high:
        return [0] * len(values)
    width = np.float32(bins) / (high - low)
    return [min(int((value - low) * width), bins - 1) for value in values]


def count(cells):
    return {cell: cells.count(cell) for cell in set(cells)}


def reference(maps, size, dilation=(1, 1), k=5):
    """Pair by pair, as the paper's section 3 says it."""
    images, channels, height, width = maps.shape
    mask = np.full(size, np.nan)
    for tap in product(range(size[0]), range(size[1])):
        down, right = ((tap[dim] - (size[dim] - 1) // 2) * dilation[dim] for dim in (0, 1))
        shares = [] if (down, right) != (0, 0) else [1.0]
        for channel in range(channels) if (down, right) != (0, 0) else ():
            pairs = [(maps[n, channel, y, x], maps[n, channel, y + down, x + right])
                     for n, y, x in product(range(images), range(height), range(width))
                     if 0 <= y + down < height and 0 <= x + right < width]
            if not pairs:
                continue
            here, there = (binned(values) for values in zip(*pairs, strict=True))
            of_both = entropy(count(list(zip(here, there, strict=True))))
            if of_both == 0:
                continue
            share = (entropy(count(here)) + entropy(count(there)) - of_both) / of_both
            shares.append(k * share / ((k - 1) * share + 1))
        if shares:
            mask[tap] = np.mean(shares)
    mask /= np.nanmean(mask)
    return np.where(np.isnan(mask), 1, mask)


DRAW = np.random.default_rng(0)
MAPS = {"smooth": np.cumsum(DRAW.normal(size=(2, 3, 7, 6)), axis=3),
        "ties": DRAW.integers(0, 3, (2, 2, 5, 6)),
        "one channel constant": DRAW.normal(size=(3, 2, 5, 5)) * [[[[1]], [[0]]]],
        "constant": np.ones((1, 2, 5, 5)),
        "smaller than the kernel": DRAW.normal(size=(4, 2, 2, 1)), "a pixel": DRAW.normal(size=(2, 2, 1, 1))}


@pytest.mark.parametrize("size", [(3, 3), (2, 2), (4, 3), (1, 5), (3, 1)], ids=str)
@pytest.mark.parametrize("name", MAPS)
def test_mask(name, size):
    maps = MAPS[name].astype(np.float32)
    for dilation in ((1, 1), (2, 1)):
        found = spatial_gradient_scale(torch.from_numpy(maps), size, dilation=dilation)
        assert relative_error(found, torch.from_numpy(reference(maps, size, dilation))) < 1e-12
        assert abs(found.mean() - 1) < 1e-12
    if name == "constant":
        assert (found == 1).all()


def test_mask_does_not_depend_on_how_many_channels_are_counted_at_once(monkeypatch):
    maps = torch.randn(4, 7, 6, 6)
    whole = spatial_gradient_scale(maps, 3)
    monkeypatch.setattr("dbb.sgs.AT_ONCE", 300)
    assert relative_error(spatial_gradient_scale(maps, 3), whole) < 1e-12
    turned = maps.to(memory_format=torch.channels_last)
    assert relative_error(spatial_gradient_scale(turned, 3), whole) < 1e-12


class Network(nn.Module):
    """Dense with circular padding, depthwise and dilated, 1x1; one layer is for training only."""

    def __init__(self):
        super().__init__()
        self.dense = nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular")
        self.depthwise = nn.Conv2d(4, 4, (2, 3), padding="same", dilation=2, groups=4, bias=False)
        self.point = nn.Conv2d(4, 2, 1)
        self.extra = nn.Conv2d(3, 2, 3, padding=1)

    def forward(self, x):
        y = self.point(self.depthwise(input=self.dense(x)))
        return y + self.extra(x) if self.training else y


def test_masks_of_a_network():
    """Of each layer's padded input, in eval; the network is as before, and layers without one are named."""
    net, x = Network().double(), torch.randn(2, 3, 6, 6).double()
    net.point.eval()
    before, modes = copy.deepcopy(net.state_dict()), [module.training for module in net.modules()]
    scaling = SpatialGradientScaling(net)
    assert list(scaling.masks) == ["dense", "depthwise", "extra"]
    assert all((mask == 1).all() for mask in scaling.masks.values())
    assert scaling.update(x) == {"extra": "no image reaches it"}
    assert [module.training for module in net.modules()] == modes
    assert all(torch.equal(net.state_dict()[key], value) for key, value in before.items())
    circular = nn.functional.pad(x, (1, 1, 1, 1), mode="circular")
    middle = nn.functional.pad(net.dense(x), (2, 2, 1, 1))
    assert relative_error(scaling.masks["dense"], spatial_gradient_scale(circular, 3)) < 1e-12
    wanted = spatial_gradient_scale(middle, (2, 3), dilation=2)
    assert relative_error(scaling.masks["depthwise"], wanted) < 1e-12
    assert (scaling.masks["extra"] == 1).all()
    with torch.no_grad():
        net.dense.weight.zero_()
        net.dense.bias.zero_()
    assert scaling.update(x)["depthwise"] == "its input is constant"


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_gradients_are_scaled_before_all_else(compiled):
    """Over two accumulated batches, clipping, momentum and weight decay; after `remove`, no more."""
    net, batches = Network().double(), torch.randn(2, 2, 3, 6, 6).double()
    plain = copy.deepcopy(net)
    scaling = SpatialGradientScaling(net, exclude=["extra"])
    scaling.update(batches[0])
    run = torch.compile(net, backend="aot_eager") if compiled else net
    optimizers = [torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
                  for model in (net, plain)]
    for step in range(3):
        if step == 2:
            scaling.remove()
        for model, forward, optimizer in zip((net, plain), (run, plain), optimizers, strict=True):
            optimizer.zero_grad()
            for batch in batches:
                forward(batch).square().sum().backward()
            if model is plain and step < 2:
                for name, mask in scaling.masks.items():
                    plain.get_submodule(name).weight.grad *= mask
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        for found, wanted in zip(net.parameters(), plain.parameters(), strict=True):
            assert relative_error(found, wanted) < 1e-12


def test_what_cannot_be_scaled():
    net = Network()
    with pytest.raises(ValueError, match="matches no convolution"):
        SpatialGradientScaling(net, include=["nothing"])
    with pytest.raises(ValueError, match="of 4 convolutions, none is a Conv2d with a kernel size of 7"):
        SpatialGradientScaling(net, kernel_sizes=[7])
    net.requires_grad_(False)
    with pytest.raises(ValueError, match="no gradient can be scaled"):
        SpatialGradientScaling(net)
