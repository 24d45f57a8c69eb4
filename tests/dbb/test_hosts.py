"""Other libraries' own steps that fuse or merge: they work on blocks, or what they read stays plain."""

import copy

import pytest
import timm
import torch
import torchvision
from timm.layers import ConvNormAct
from timm.models.byobnet import RepVggBlock
from torch import nn

from dbb import (
    NothingSwappedError,
    ReparamConv2d,
    fold_norms,
    reparameterize,
    replace_convs,
    restore_norms,
)
from tests.helpers import pair, randomize, relative_error

pytestmark = pytest.mark.slow


def _ultralytics_fuse(net: nn.Module) -> nn.Module:
    """What Ultralytics' `fuse` does with its units: a convolution's bias counts, the norm is folded in."""
    for unit in net.modules():
        if isinstance(unit, ConvNormAct):
            conv, norm = unit.conv, unit.bn
            fused = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride,
                              conv.padding, conv.dilation, conv.groups, bias=True).to(conv.weight)
            scale = norm.weight.div(torch.sqrt(norm.eps + norm.running_var))
            kernel = torch.mm(torch.diag(scale), conv.weight.view(conv.out_channels, -1))
            bias = torch.zeros(len(scale)).to(scale) if conv.bias is None else conv.bias
            bias = torch.mm(torch.diag(scale), bias.reshape(-1, 1)).reshape(-1)
            bias = bias + norm.bias - scale * norm.running_mean
            fused.weight.data.copy_(kernel.view(fused.weight.shape))
            fused.bias.data.copy_(bias)
            unit.conv = fused
            unit.bn = copy.deepcopy(norm) if isinstance(norm, nn.Sequential) else nn.Identity()
    return net


@pytest.mark.parametrize("before", [False, True])
def test_a_host_that_folds_norms_itself(before):
    torch.manual_seed(0)
    net = nn.Sequential(ConvNormAct(3, 8, 3), ConvNormAct(8, 8, 3, stride=2))
    new, report = replace_convs(net, "dbb", example_input=torch.zeros(1, 3, 12, 12))
    assert all(row.block for row in report)
    randomize(new.double()).eval()
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    expected = new(x)
    with torch.no_grad():
        fused = _ultralytics_fuse(copy.deepcopy(new) if before else reparameterize(new))
    assert relative_error(fused(x), expected) < 1e-12
    assert not any(isinstance(module, ReparamConv2d) for module in fused.modules())


@pytest.mark.parametrize("name", [
    "repvgg_a0", "mobileone_s0", "fastvit_t8", "repvit_m0_9", "repghostnet_050"])
def test_families_that_merge_their_own_branches(name):
    """What another library's unit merges itself stays, with the reason; its own conversion then works."""
    net, x = timm.create_model(name, num_classes=3).eval(), torch.randn(1, 3, 64, 64)
    try:
        net, report = replace_convs(net, "acb", example_input=x)
    except NothingSwappedError as error:
        report = error.report
    assert any("which merges its branches itself" in row.reason for row in report if row.block is None)
    with torch.no_grad():
        assert relative_error(timm.utils.reparameterize_model(net)(x), net(x)) < 1e-4


def test_what_merges_itself_can_be_included():
    net, x = timm.create_model("repghostnet_050", num_classes=3).eval(), torch.randn(1, 3, 64, 64)
    _, report = replace_convs(net, "acb", example_input=x)
    included, all_of_it = replace_convs(net, "acb", include=["*"], example_input=x)
    assert sum(row.block is not None for row in report) == 10
    assert sum(row.block is not None for row in all_of_it) == 42
    with torch.no_grad():
        assert relative_error(reparameterize(included)(x), included(x)) < 1e-4
        folded = fold_norms(included, x)
        assert relative_error(folded(x), included(x)) < 1e-4
    left = [name for name, module in folded.named_modules() if isinstance(module, nn.BatchNorm2d)]
    without_a_convolution = [".fusion_bn." in name for name in left]
    assert all(without_a_convolution), "all others are folded, inside such modules too"


def test_a_network_that_torch_fuses():
    """Torch's `fuse_modules` takes BatchNorm2d alone: such a network stays, or gets its norms back."""
    plain = torchvision.models.quantization.shufflenet_v2_x0_5(num_classes=3).eval()
    x = torch.randn(4, 3, 64, 64)
    with pytest.raises(NothingSwappedError, match=r"part of a QuantizableShuffleNetV2, .* \(fuse_model\)"):
        replace_convs(plain, "acb", example_input=x)
    net, report = replace_convs(plain, "acb", include=["*"], example_input=x)
    with torch.no_grad():
        restored = restore_norms(net, report, plain, [x])
        restored.fuse_model(is_qat=False)
        assert relative_error(restored(x), net(x)) < 1e-4


def test_a_network_with_a_fuse_of_its_own_is_swapped():
    class Root(nn.Sequential):
        def fuse(self):
            raise AssertionError

    class Neck(nn.Sequential):
        def fuse(self, x, y):
            """Joins two maps: no step of a conversion."""

    _, report = replace_convs(Root(Neck(*pair())), "dbb", example_input=torch.zeros(1, 8, 9, 9))
    assert report[0].block


@pytest.mark.parametrize("step", ["repvgg_convert", "local_inject", "switch_to_deploy"])
def test_units_that_merge_themselves_by_any_name_stay(step):
    """Their steps leave out a convolution's bias, which is where a block's norms end up."""
    unit = type("Unit", (nn.Sequential,), {step: lambda self: None})
    plain = nn.Sequential(unit(*pair()), *pair())
    _, report = replace_convs(plain, "dbb", example_input=torch.zeros(1, 8, 9, 9))
    assert [row.block is not None for row in report] == [False, True]
    assert step in report[0].reason


def test_an_included_host_fails_loudly():
    """Its step would leave out the merged bias."""
    net = randomize(nn.Sequential(nn.Conv2d(3, 8, 3), RepVggBlock(8, 8, 3))).eval()
    new, _ = replace_convs(net, "acb", include=["1.*"], example_input=torch.zeros(1, 3, 9, 9))
    for network in (new, reparameterize(new)):
        with pytest.raises(AttributeError, match="running_mean"):
            network[1].reparameterize()


def test_a_network_in_a_wrapper_is_no_unit():
    class Detector(nn.Sequential):
        def fuse(self):
            raise AssertionError

        def is_fused(self):
            return False

    net = nn.Sequential(Detector(*pair(), *pair()))
    _, report = replace_convs(net, "dbb", example_input=torch.zeros(1, 8, 9, 9))
    assert all(row.block for row in report)
