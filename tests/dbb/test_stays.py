"""What keeps a pair of convolution and norm plain: each reason is told."""

from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dbb import (
    DiverseBranchBlock,
    NothingSwappedError,
    compare,
    replace_convs,
)

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("hook", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_hooks_of_the_backward_pass_keep_a_pair_plain(hook):
    net = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    getattr(net[0], hook)(lambda *args: None)
    _, report = replace_convs(net, "dbb", example_input=torch.randn(2, 4, 9, 9))
    assert [row.block is None for row in report] == [True, False]
    assert "has hooks" in report[0].reason


@pytest.mark.parametrize("twice", [True, False], ids=["a norm called twice on one map", "modules in a list"])
def test_a_pair_that_is_used_besides_stays_plain(twice):
    """Two results would be one tensor; and a list would keep the old modules, so that no block would run."""
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
            self.steps = ["conv", "bn"] if twice else [self.conv, self.bn]

        def forward(self, x):
            y = self.conv(x)
            return self.bn(y).relu_() + self.bn(y) if twice else self.steps[1](self.steps[0](x))

    with pytest.raises(ValueError, match="used elsewhere"):
        replace_convs(Net(), "dbb", example_input=torch.randn(2, 4, 6, 6))


class Kept(nn.Module):
    """Keeps what its convolution returns somewhere besides giving it to the norm."""

    def __init__(self, keep):
        super().__init__()
        self.conv, self.bn, self.keep = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), keep

    def forward(self, x):
        y = self.conv(x)
        return self.keep(self, y, self.bn(y))


@dataclass(slots=True)
class Slots:
    raw: torch.Tensor
    out: torch.Tensor


STASH = []


@pytest.mark.parametrize("keep", [
    lambda net, raw, out: (raw, out), lambda net, raw, out: Slots(raw, out),
    lambda net, raw, out: setattr(net, "features", raw) or out, lambda net, raw, out: lambda: (raw, out),
    lambda net, raw, out: STASH.append(raw) or out,
], ids=["returned", "in slots", "as an attribute", "in a closure", "in a global"])
def test_what_a_network_keeps_of_a_convolution_is_found(keep):
    with pytest.raises(NothingSwappedError, match="also goes to what the network returns or keeps"):
        replace_convs(Kept(keep), "dbb", example_input=torch.randn(2, 4, 6, 6))
    _, report = replace_convs(Kept(lambda net, raw, out: out), "dbb", example_input=torch.randn(2, 4, 6, 6))
    assert report[0].block is not None


class BiasedNorm(nn.BatchNorm2d):
    """Moves its running variance towards the biased one."""

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                self.running_mean.lerp_(x.mean((0, 2, 3)), self.momentum)
                self.running_var.lerp_(x.var((0, 2, 3), unbiased=False), self.momentum)
        statistics = (None, None) if self.training else (self.running_mean, self.running_var)
        return nn.functional.batch_norm(x, *statistics, self.weight, self.bias, self.training, eps=self.eps)


def test_a_norm_with_statistics_of_its_own_stays():
    with pytest.raises(NothingSwappedError, match="BiasedNorm, which does more"):
        replace_convs(nn.Sequential(nn.Conv2d(4, 4, 3), BiasedNorm(4)), "dbb",
                      example_input=torch.randn(2, 4, 6, 6))


@pytest.mark.parametrize("norm", [nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
                                  nn.BatchNorm2d(4, affine=False), BiasedNorm(4)], ids=repr)
@pytest.mark.parametrize("training", [True, False])
def test_norms_put_in_afterwards_that_normalise_otherwise_are_refused(norm, training):
    block = DiverseBranchBlock(4, 4, 3, padding=1)
    block.branches["1x1"].bn = norm
    with pytest.raises(ValueError, match="replace norms before"):
        block.train(training)(torch.randn(2, 4, 6, 6))


def test_one_value_where_several_are_meant():
    net, x = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)), torch.randn(2, 4, 6, 6)
    for knob, message in ({"exclude": "head"}, r"give a list of them, \['head'\]"), \
            ({"kernel_sizes": 3}, r"give all of them, \[3\]"):
        with pytest.raises(ValueError, match=message):
            replace_convs(net, "dbb", example_input=x, **knob)
    named = Kept(lambda net, raw, out: {"logits": out}).eval()
    with pytest.raises(ValueError, match="returns a dict"):
        compare(named, named, [x])


class InPlace(nn.Conv2d):
    """Activates its output in place: the tensor is the one that its convolution returned."""

    def forward(self, x):
        return nn.functional.relu(super().forward(x), inplace=True)


class NoBias(nn.Conv2d):
    """Never reads its bias, where a converted one has its norm's."""

    def forward(self, x):
        return self._conv_forward(x, self.weight, None)


def changed(conv, **attributes):
    vars(conv).update(attributes)
    return conv


def grey(conv):
    conv.weight = nn.Parameter(conv.weight.sum(1, keepdim=True))
    return conv


def tiled(conv):
    conv._conv_forward = lambda x, weight, bias: nn.functional.conv2d(
        nn.functional.pad(x, (1, 1, 0, 0), mode="circular"), weight, bias, 1, (1, 0))
    return conv


@pytest.mark.parametrize(("conv", "reason"), [
    (InPlace(4, 4, 3, padding=1), "changes what its convolution returns"),
    (tiled(nn.Conv2d(4, 4, 3, padding=1)), "methods of its own"),
    (NoBias(4, 4, 3, padding=1, bias=False), "computes its kernel from its weight"),
    (grey(nn.Conv2d(4, 4, 3, padding=1)), "not what its settings say"),
    (changed(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), padding=(2, 2)), "not what its settings"),
], ids=["in place", "patched", "no bias", "grey stem", "padding changed"])
def test_convolutions_that_are_not_what_they_seem_stay(conv, reason):
    x = torch.randn(2, conv.weight.shape[1], 9, 9)
    with pytest.raises(NothingSwappedError, match=reason):
        replace_convs(nn.Sequential(conv, nn.BatchNorm2d(4)), "dbb", example_input=x)


HOLDERS = {
    "an object": lambda conv, bn: SimpleNamespace(steps=[conv, bn]),
    "methods": lambda conv, bn: SimpleNamespace(steps=[conv.__call__, bn.__call__]),
    "a module in a list": lambda conv, bn: SimpleNamespace(steps=[nn.Sequential(conv, bn)]),
    "a partial": lambda conv, bn: SimpleNamespace(steps=[partial(conv), bn]),
    "an optimizer": lambda conv, bn: SimpleNamespace(
        steps=[], optimizer=torch.optim.SGD([*conv.parameters(), *bn.parameters()], 0.1)),
    "a key": lambda conv, bn: SimpleNamespace(steps={conv: 0, bn: 1}),
}


@pytest.mark.parametrize("holder", HOLDERS.values(), ids=HOLDERS)
def test_modules_that_something_else_holds_stay(holder):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
            self.held = holder(self.conv, self.bn)

        def forward(self, x):
            for step in self.held.steps or [self.conv, self.bn]:
                x = step(x)
            return x

    with pytest.raises(NothingSwappedError, match="used elsewhere too"):
        replace_convs(Net(), "dbb", example_input=torch.randn(2, 4, 6, 6))


def test_dropout_between_a_convolution_and_its_norm_is_seen():
    """As in WideResNet; in eval it returns its very input."""
    net = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Dropout(0.3), nn.BatchNorm2d(4))
    with pytest.raises(NothingSwappedError, match="also goes to Dropout"):
        replace_convs(net, "dbb", example_input=torch.randn(2, 4, 6, 6))
    net[1] = nn.Identity()
    replace_convs(net, "dbb", example_input=torch.randn(2, 4, 6, 6))


class Gated(nn.BatchNorm2d):
    """With a parameter that is neutral at first."""

    def __init__(self, channels):
        super().__init__(channels)
        self.gate = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, x):
        y = super().forward(x)
        return y + self.gate * y.relu()


def test_a_norm_with_parameters_of_its_own_stays():
    with pytest.raises(NothingSwappedError, match="Gated, which has gate besides"):
        replace_convs(nn.Sequential(nn.Conv2d(4, 4, 3), Gated(4)), example_input=torch.randn(2, 4, 6, 6))


def test_dropout_as_a_function_is_seen():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.bn(nn.functional.dropout2d(self.conv(x), 0.2, self.training))

    with pytest.raises(NothingSwappedError, match="also goes to dropout2d"):
        replace_convs(Net(), "dbb", example_input=torch.randn(2, 4, 6, 6))


def test_a_parameter_of_two_modules_is_not_swapped():
    """As in `self.weight = self.conv.weight`, or a list of parameters for a penalty."""
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
            self.penalised = nn.ParameterList([self.conv.weight])

        def forward(self, x):
            return self.bn(self.conv(x))

    with pytest.raises(NothingSwappedError, match="used elsewhere too"):
        replace_convs(Net(), "dbb", example_input=torch.randn(2, 4, 6, 6))
