"""What other people's code does to modules: hooks, truth values, attributes, losses over two modes."""

import copy
import pickle
from dataclasses import dataclass
from functools import partial
from multiprocessing.pool import ThreadPool
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from dbb import (
    AsymmetricConvBlock,
    DiverseBranchBlock,
    NothingSwappedError,
    branchwise,
    compare,
    reparameterize,
    replace_convs,
    restore_norms,
)
from tests.conftest import randomize, relative_error


def test_a_norm_that_was_taken_in_is_still_true():
    """Code asks `if self.bn:`; an empty Sequential is false."""
    class Asks(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

        def forward(self, x):
            x = self.conv(x)
            return self.bn(x).relu() if self.bn else x

    plain, x = randomize(Asks()).eval(), torch.randn(2, 4, 6, 6)
    net, _ = replace_convs(plain, "dbb", example_input=x, init="single")
    assert relative_error(net.eval()(x), plain(x)) < 1e-5


@pytest.mark.parametrize("mode", ["exact", "online"])
def test_eval_then_training_then_backward(mode):
    """Consistency losses do so: a training forward moves running statistics in between."""
    block = randomize(DiverseBranchBlock(4, 4, 3, padding=1, mode=mode, positions=16))
    x = torch.randn(4, 4, 8, 8)
    in_eval = block.eval()(x).square().sum()
    (in_eval + block.train()(x).square().sum()).backward()
    assert block.branches["kxk"].weight.grad.isfinite().all()


def test_one_value_per_channel_moves_no_statistics():
    """By the size of the output, not of the input: as BatchNorm."""
    block = DiverseBranchBlock(4, 4, 3, stride=2, groups=4)
    with pytest.raises(ValueError, match="more than 1 value"):
        block(torch.randn(1, 4, 3, 3))
    assert all(buffer.isfinite().all() for buffer in block.buffers())
    wider = AsymmetricConvBlock(4, 4, 3, padding=2, groups=4)
    assert wider(torch.randn(1, 4, 1, 1)).shape == (1, 4, 3, 3)


def test_shape_hooks_on_every_module_and_pruned_scales():
    block, x = DiverseBranchBlock(4, 4, 3, padding=1), torch.randn(4, 4, 8, 8)
    nn.utils.prune.l1_unstructured(block.branches["1x1_avg"].scale, "weight", 0.5)
    shapes = []
    for module in block.modules():
        module.register_forward_hook(lambda module, args, output: shapes.append(args[0].shape))
    for _ in range(2):
        block(x).sum().backward()
    assert (block.branches["1x1_avg"].scale.weight == 0).sum() == 2
    assert shapes


@pytest.mark.parametrize("hook", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_hooks_of_the_backward_pass_keep_a_pair_plain(hook):
    net = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    getattr(net[0], hook)(lambda *args: None)
    _, report = replace_convs(net, "dbb", example_input=torch.randn(2, 4, 9, 9))
    assert [row.block is None for row in report] == [True, False]
    assert "has hooks" in report[0].reason


def test_what_a_block_cannot_change_is_refused():
    block = DiverseBranchBlock(4, 4, 3, padding=1)
    with pytest.raises(AttributeError, match="the dilation of a block is fixed"):
        block.dilation = (2, 2)
    plain = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    plain[1].num_batches_tracked = None
    net, report = replace_convs(plain, "dbb", example_input=torch.randn(2, 4, 9, 9))
    for batches, message in ((torch.randn(2, 4, 9, 9), "a list of batches"), ([], "two values a channel")):
        with pytest.raises(ValueError, match=message):
            restore_norms(net.eval(), report, plain, batches)


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


class Same(nn.Conv2d):
    """Pads its input itself, as timm's `Conv2dSame`."""

    def forward(self, x):
        return nn.functional.conv2d(nn.functional.pad(x, [1] * 4), self.weight, self.bias)


def test_what_is_left_of_a_subclass_is_no_convolution_to_others():
    """Code that initialises, prunes or collects all convolutions would find a weight that is not there."""
    net, _ = replace_convs(nn.Sequential(Same(4, 4, 3), nn.BatchNorm2d(4)), "dbb",
                           example_input=torch.randn(2, 4, 6, 6))
    assert [module for module in net.modules() if isinstance(module, nn.Conv2d)] == []
    again = copy.deepcopy(net).double()
    assert again(torch.randn(2, 4, 6, 6).double()).dtype == torch.float64
    assert net(torch.randn(2, 4, 6, 6)).shape == (2, 4, 6, 6)


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


class ActivatedNorm(nn.BatchNorm2d):
    """With an activation that has parameters, as timm's BatchNormAct2d may."""

    def __init__(self, channels, act):
        super().__init__(channels)
        self.act = act

    def forward(self, x):
        return self.act(super().forward(x))


def test_a_child_of_a_norm_that_others_share_stays_shared():
    act = nn.PReLU(4)
    plain = nn.Sequential(nn.Conv2d(4, 4, 3), ActivatedNorm(4, act), nn.Conv2d(4, 4, 1), act)
    net, _ = replace_convs(plain, "dbb", example_input=torch.randn(2, 4, 6, 6))
    assert net[1][0] is net[3]
    assert net[3] is not act
    assert net[3].weight in {*net.parameters()}


@pytest.mark.parametrize("norm", [nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
                                  nn.BatchNorm2d(4, affine=False), BiasedNorm(4)], ids=repr)
@pytest.mark.parametrize("training", [True, False])
def test_norms_put_in_afterwards_that_normalise_otherwise_are_refused(norm, training):
    block = DiverseBranchBlock(4, 4, 3, padding=1)
    block.branches["1x1"].bn = norm
    with pytest.raises(ValueError, match="replace norms before"):
        block.train(training)(torch.randn(2, 4, 6, 6))


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


class Silent(nn.Module):
    """Its `train` returns nothing, as in many a repository."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

    def train(self, mode=True):
        super().train(mode)

    def forward(self, x):
        return self.bn(self.conv(x))


def test_a_train_method_that_returns_nothing():
    plain, x = Silent(), torch.randn(2, 4, 6, 6)
    net, report = replace_convs(plain, "dbb", example_input=x)
    net.eval()
    restored = restore_norms(net, report, plain, [x])
    assert relative_error(restored(x), net(x)) < 1e-5


@pytest.mark.parametrize("mode", ["exact", "online", "linear"])
def test_shapes_on_meta(mode):
    block, x = DiverseBranchBlock(4, 8, 3, padding=1, mode=mode, device="meta"), torch.empty(2, 4, 6, 6)
    for training in (True, False):
        assert block.train(training)(x.to("meta")).shape == (2, 8, 6, 6)


class Centres(nn.Conv2d):
    """Subtracts a mean of its own, and casts its bias."""

    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("mean", torch.full((4, 1, 1), 0.3))

    def forward(self, x):
        return nn.functional.conv2d(x - self.mean, self.weight, self.bias.to(x.dtype))


def test_a_subclass_with_a_buffer_is_no_convolution_to_others_either():
    plain, x = nn.Sequential(Centres(4, 4, 3), nn.BatchNorm2d(4)), torch.randn(2, 4, 6, 6).double()
    randomize(plain.double()).eval()
    net, _ = replace_convs(plain, "dbb", example_input=x, init="single")
    assert "0.outer.mean" in net.state_dict()
    assert not any(isinstance(module, nn.Conv2d) for module in net.modules())
    net.load_state_dict({**net.state_dict(), "0.outer.mean": torch.ones(4, 1, 1)})
    plain[0].mean.fill_(1)
    copied = copy.deepcopy(net)
    for same in (copied, reparameterize(copied)):
        assert relative_error(same(x), plain(x)) < 1e-12
    net.float()
    with FakeTensorMode(allow_non_fake_inputs=True):
        net(torch.randn(2, 4, 6, 6))
    pickle.loads(pickle.dumps(net))


def test_dropout_as_a_function_is_seen():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.bn(nn.functional.dropout2d(self.conv(x), 0.2, self.training))

    with pytest.raises(NothingSwappedError, match="also goes to dropout2d"):
        replace_convs(Net(), "dbb", example_input=torch.randn(2, 4, 6, 6))


def test_modules_of_torchscript_beside_convolutions():
    x = torch.randn(2, 4, 6, 6)
    net = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), torch.jit.script(nn.ReLU()))
    assert replace_convs(net, "dbb", example_input=x)[0](x).min() == 0


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


def test_blocks_that_keep_a_subclass_run_in_threads():
    pairs = [module for _ in range(4) for module in (Same(4, 4, 3), nn.BatchNorm2d(4))]
    net, x = nn.Sequential(*pairs).eval(), torch.randn(2, 4, 6, 6)
    net, _ = replace_convs(net, "dbb", example_input=x)
    with ThreadPool(4) as pool, torch.no_grad():
        found = pool.map(lambda _: net.eval()(x), range(60))
    assert all(torch.equal(y, found[0]) for y in found)


def test_a_frozen_part_of_a_subclass_stays_frozen():
    conv = Centres(4, 4, 3)
    conv.shift = nn.Module()
    conv.shift.value = nn.Parameter(torch.zeros(1), requires_grad=False)
    plain = nn.Sequential(conv, nn.BatchNorm2d(4))
    net, _ = replace_convs(plain, "dbb", example_input=torch.randn(2, 4, 6, 6))
    assert not net[0]._modules["outer"].shift.value.requires_grad


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


class Tagged(torch.Tensor):
    """As MONAI's MetaTensor and fastai's TensorImage."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs or {})
        return result.as_subclass(cls) if type(result) is torch.Tensor else result


@pytest.mark.parametrize("mode", ["exact", "online", "linear"])
@pytest.mark.parametrize("groups", [1, 4])
def test_subclasses_of_tensors_keep_their_class(mode, groups):
    block = DiverseBranchBlock(4, 4, 3, groups=groups, mode=mode, positions=16)
    net, x = nn.Sequential(block, nn.ReLU(inplace=True)), torch.randn(8, 4, 9, 9)
    y = net(x.as_subclass(Tagged))
    y.sum().backward()
    assert type(y) is Tagged
    assert torch.equal(y.as_subclass(torch.Tensor), net(x))
    assert type(net.eval()(x.as_subclass(Tagged))) is Tagged
