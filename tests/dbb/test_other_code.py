"""What other people's code does to modules: hooks, truth values, attributes, losses over two modes."""

import copy
import pickle
from multiprocessing.pool import ThreadPool

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from dbb import (
    AsymmetricConvBlock,
    DiverseBranchBlock,
    reparameterize,
    replace_convs,
    restore_norms,
)
from tests.helpers import pair, randomize, relative_error

pytestmark = pytest.mark.slow


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


def test_modules_of_torchscript_beside_convolutions():
    x = torch.randn(2, 4, 6, 6)
    net = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), torch.jit.script(nn.ReLU()))
    assert replace_convs(net, "dbb", example_input=x)[0](x).min() == 0


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


class Routed(nn.Module):
    """Reads what a network has set on its own layers, as detection models do."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(pair(4))
        for layer, source in zip(self.layers, (-1, 0), strict=True):
            layer.source = source

    def forward(self, x):
        outputs = []
        for layer in self.layers:
            x = layer(x if layer.source == -1 else outputs[layer.source])
            outputs.append(x)
        return x


def test_attributes_that_a_network_set_stay():
    plain, x = randomize(Routed()).eval(), torch.randn(2, 4, 8, 8)
    net, _ = replace_convs(plain, "dbb", example_input=x, init="single")
    for changed in (net, reparameterize(net)):
        assert [layer.source for layer in changed.layers] == [-1, 0]
        assert relative_error(changed(x), plain(x)) < 1e-5
