"""Norms frozen after the swap, in whatever way, mean running statistics; what was frozen stays so."""

import copy
from functools import partial

import pytest
import timm
import torch
import torchvision
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from dbb import (
    AsymmetricConvBlock,
    DiverseBranchBlock,
    NothingSwappedError,
    OnlineReparamBlock,
    reparameterize,
    replace_convs,
)
from dbb.norms import running
from tests.helpers import pair, randomize, relative_error


def _eval_and_freeze(net):
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval().requires_grad_(False)
    return net


def _torchvisions(net):
    """As a user puts in torchvision's own frozen norm, which knows nothing of timm's."""
    for name, module in list(net.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(module.num_features, module.eps).to(module.weight.dtype)
            frozen.load_state_dict({key: module.state_dict()[key] for key in frozen.state_dict()})
            net.set_submodule(name, frozen)
    return net


class Detrs(nn.Module):
    """DETR's frozen norm, which has its epsilon in its code."""

    def __init__(self, norm, hidden=1e-5):
        super().__init__()
        self.hidden = hidden
        for key in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(key, getattr(norm, key).detach().clone())

    def forward(self, x):
        w, b, mean, var = (buffer.reshape(1, -1, 1, 1) for buffer in self.buffers())
        scale = w * (var + self.hidden).rsqrt()
        return x * scale + (b - mean * scale)


def _detrs(net):
    for name, module in list(net.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            net.set_submodule(name, Detrs(module))
    return net


def _timms(net):
    timm.utils.freeze(net, [name for name, _ in net.named_children()])
    return net


@pytest.mark.parametrize("block", ["dbb", "acb", "orepa", "online"])
@pytest.mark.parametrize("freeze", [
    timm.layers.freeze_batch_norm_2d, _timms, _torchvisions, _detrs, _eval_and_freeze])
def test_frozen_norms_of_any_class_mean_running_statistics(block, freeze):
    """In training, a block whose norms are frozen computes what it does in eval, and moves no statistic."""
    torch.manual_seed(0)
    kind = {"dbb": DiverseBranchBlock, "acb": AsymmetricConvBlock, "orepa": OnlineReparamBlock,
            "online": partial(DiverseBranchBlock, mode="online", positions=4)}[block]
    for groups in (1, 8):
        net = nn.Sequential(nn.Sequential(kind(8, 8, 3, padding=1, groups=groups)))
        randomize(net.double())
        x = torch.randn(4, 8, 9, 9, dtype=torch.float64)
        expected = net.eval()(x)
        frozen = freeze(net.train()) if freeze is _eval_and_freeze else freeze(net).train()
        before = copy.deepcopy(frozen.state_dict())
        assert relative_error(frozen(x), expected) < 1e-12
        assert all(torch.equal(value, before[key]) for key, value in frozen.state_dict().items())
        assert relative_error(reparameterize(frozen.eval())(x), expected) < 1e-12
        kernels = [p for p in frozen.parameters() if p.ndim == 4]
        if freeze is not _timms:  # which freezes the kernels too
            frozen.train()(x).square().sum().backward()
            assert all(p.grad is not None for p in kernels)


@pytest.mark.parametrize("eps", [0.0, 1e-5, 1e-3])
def test_an_epsilon_in_the_code_is_found(eps):
    norm = Detrs(randomize(nn.BatchNorm2d(8)), eps).to(torch.float16)
    before = copy.deepcopy(norm.state_dict())
    assert running(norm)[-1] == pytest.approx(eps, rel=1e-12, abs=0)
    assert all(torch.equal(value, before[key]) for key, value in norm.state_dict().items())


@pytest.mark.parametrize("block", ["dbb", "orepa"])
def test_what_is_no_norm_is_named(block):
    net, _ = replace_convs(pair(), block, example_input=torch.zeros(1, 8, 9, 9))
    for outer in net[0].norms():
        name = next(name for name, module in net.named_modules() if module is outer)
        net.set_submodule(name, nn.GroupNorm(2, 8))
    message = "a block's norm was replaced by a GroupNorm, .* no attribute 'running_mean'"
    with pytest.raises(ValueError, match=message):
        net(torch.zeros(2, 8, 9, 9))


def test_a_swap_keeps_what_is_frozen():
    """Per parameter, and for Lightning's way to freeze a norm, which is before the swap."""
    net = pair()
    net[1].track_running_stats = False
    net[0].weight.requires_grad_(False)
    net[1].weight.requires_grad_(False)
    new, _ = replace_convs(net, "dbb", example_input=torch.zeros(1, 8, 9, 9))
    assert {key.split(".")[-1] for key, p in new.named_parameters() if p.requires_grad} == {"bias"}
    before = copy.deepcopy(new.state_dict())
    new.train()(torch.randn(4, 8, 9, 9))
    assert all(torch.equal(value, before[key]) for key, value in new.state_dict().items())


def test_torchvisions_frozen_backbones_say_why():
    net = torchvision.models.resnet18(norm_layer=FrozenBatchNorm2d)
    with pytest.raises(NothingSwappedError, match="no BatchNorm2d follows"):
        replace_convs(net, "dbb", example_input=torch.zeros(1, 3, 64, 64))


def test_a_hidden_epsilon_is_found_on_any_default_device():
    norm = randomize(nn.BatchNorm2d(8))
    with torch.device("meta"):
        *_, eps = running(Detrs(norm, 1e-3))
    assert eps == pytest.approx(1e-3, rel=1e-6)
