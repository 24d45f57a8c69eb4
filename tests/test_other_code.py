"""What other people's code does to modules: hooks, truth values, attributes, losses over two modes."""

import copy

import pytest
import torch
from torch import nn

from dbb import AsymmetricConvBlock, DiverseBranchBlock, replace_convs, restore_norms
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
