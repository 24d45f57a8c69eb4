"""Kernels in half precision, norms in float32, and types that come later."""

import pytest
import torch
from torch import nn

from dbb import (
    MODES,
    AsymmetricConvBlock,
    DiverseBranchBlock,
    OnlineReparamBlock,
    ReparamConv2d,
    branchwise,
    reparameterize,
    replace_convs,
)
from tests.helpers import pair, randomize, relative_error


@pytest.mark.parametrize("kind", [DiverseBranchBlock, AsymmetricConvBlock, OnlineReparamBlock])
def test_half_precision_with_norms_in_float32(kind):
    block = kind(8, 8, 3, padding=1).bfloat16()
    for norm in block.norms():
        norm.float()
    x = torch.randn(4, 8, 10, 10, dtype=torch.bfloat16)
    block(x).float().square().mean().backward()
    y = block.eval()(x)
    assert y.dtype == torch.bfloat16
    assert relative_error(reparameterize(block)(x), y) < 0.02


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("groups", [1, 8])
def test_half_precision_with_norms_in_float32_and_branches_without_a_kernel(mode, groups):
    block = ReparamConv2d(8, 8, 3, padding=1, groups=groups, branches=["kxk", "identity", "avg"],
                          mode=mode, positions=8).bfloat16()
    for norm in block.norms():
        norm.float()
    x = torch.randn(4, 8, 10, 10, dtype=torch.bfloat16)
    block(x).float().square().mean().backward()
    y = block.eval()(x)
    with branchwise(block):
        assert relative_error(block(x), y) < 0.02
    assert relative_error(reparameterize(block)(x), y) < 0.02
    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize("key", ["weight", "bias", "running_mean", "running_var"])
def test_a_value_that_half_precision_cannot_hold_stays_in_a_float32_norm(key):
    net = pair()
    with torch.no_grad():
        net[1].state_dict(keep_vars=True)[key][3] = 1e5
    net[0].half()
    net, _ = replace_convs(net, "dbb", example_input=torch.zeros(1, 8, 9, 9).half(), init="ones")
    assert net[0].branches["kxk"].bn.state_dict()[key][3] == 1e5


def test_a_merged_value_that_half_precision_cannot_hold_is_named():
    block = DiverseBranchBlock(8, 8, 3, padding=1).half().eval()
    block.init_gamma(6e4)
    with torch.no_grad():
        block.branches["kxk"].weight.fill_(2)
    message = "the merged kernel has the value .*, which torch.float16 cannot hold"
    with pytest.raises(ValueError, match=message):
        block.fuse()


class Casts(nn.Conv2d):
    """Casts its weight to the type of its input."""

    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.conv2d(x, self.weight.to(x.dtype), bias, 1, 1)


def test_types_that_come_later():
    plain = randomize(nn.Sequential(Casts(4, 4, 3, bias=False), nn.BatchNorm2d(4))).eval()
    x = torch.randn(2, 4, 6, 6)
    net, _ = replace_convs(plain, "dbb", example_input=x, init="single")
    assert net(x.bfloat16()).dtype == plain(x.bfloat16()).dtype == torch.bfloat16
    assert relative_error(net(x.bfloat16()), plain(x)) < 0.05
    assert relative_error(reparameterize(net)(x.bfloat16()), plain(x)) < 0.05

    block, half = DiverseBranchBlock(4, 4, 3, padding=1, groups=4), DiverseBranchBlock(4, 4, 3, groups=4)
    block.load_state_dict(half.bfloat16().state_dict(), assign=True)
    assert block.train()(x.bfloat16()).dtype == block.eval()(x.bfloat16()).dtype == torch.bfloat16


def test_half_kernels_and_float32_norms_stay_so():
    net = nn.Sequential(nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4)).bfloat16()
    net[1].float()
    x = torch.randn(2, 4, 6, 6).bfloat16()
    net, _ = replace_convs(net, "dbb", example_input=x)
    block = net[0]
    types = {name.split(".")[-1]: value.dtype for name, value in block.state_dict().items()}
    assert types["running_var"] == torch.float32
    assert block.branches["kxk"].weight.dtype == torch.bfloat16
    assert block(x).dtype == torch.bfloat16
    merged = reparameterize(net.eval())
    with branchwise(net):
        by_branch = net(x)
    assert merged(x).dtype == by_branch.dtype == torch.bfloat16
    assert relative_error(merged(x), by_branch) < 0.05
