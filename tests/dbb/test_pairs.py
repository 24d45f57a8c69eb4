"""Pairs of convolution and norm are found by where tensors flow; a block for any other would be wrong."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dbb import replace_convs


class Difficult(nn.Module):
    """Convolutions whose output goes wherever a swap would be wrong, and some where it is right."""

    def __init__(self):
        super().__init__()
        def conv(*args, **kwargs):
            return nn.Conv2d(*args, **{"padding": 1} | kwargs)
        self.paired, self.paired_norm = conv(3, 8, 3), nn.BatchNorm2d(8, eps=1e-3, momentum=0.02)
        self.to_relu, self.to_relu_norm = conv(8, 8, 3), nn.BatchNorm2d(8)
        self.to_add, self.to_add_norm = conv(8, 8, 3), nn.BatchNorm2d(8)
        self.to_cat, self.to_cat_norm = conv(8, 4, 3), nn.BatchNorm2d(8)
        self.norm_twice_a, self.norm_twice_b = conv(8, 8, 3), conv(8, 8, 3)
        self.norm_twice = nn.BatchNorm2d(8)
        self.reused, self.reused_norm = conv(8, 8, 3), nn.BatchNorm2d(8)
        self.point, self.point_norm = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.big, self.big_norm = conv(8, 8, 7, padding=3), nn.BatchNorm2d(8)
        self.lonely = conv(8, 8, 3)
        self.group, self.group_norm = conv(8, 8, 3), nn.GroupNorm(2, 8)
        self.plain_gamma, self.plain_gamma_norm = conv(8, 8, 3), nn.BatchNorm2d(8, affine=False)
        self.output, self.output_norm = conv(8, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x):
        x = F.relu(self.paired_norm(self.paired(x)))
        x = self.to_relu_norm(F.relu(self.to_relu(x)))
        y = self.to_add(x)
        x = self.to_add_norm(y) + y
        x = self.to_cat_norm(torch.cat([self.to_cat(x), x[:, :4]], 1))
        x = self.norm_twice(self.norm_twice_a(x)) + self.norm_twice(self.norm_twice_b(x))
        for _ in range(2):
            x = self.reused_norm(self.reused(x))
        x = self.big_norm(self.big(self.point_norm(self.point(x))))
        x = self.plain_gamma_norm(self.plain_gamma(self.group_norm(self.group(x))))
        y = self.output(x)
        return self.output_norm(y), y


def test_pairs_are_found_by_the_flow_of_tensors():
    net, image = Difficult(), torch.zeros(1, 3, 12, 12)
    state = copy.deepcopy(net.state_dict())
    net.train()
    _, report = replace_convs(net, "acb", example_input=image)
    rows = {row.module: row for row in report}
    assert {name for name, row in rows.items() if row.block} == {"paired", "reused"}
    for name, reason in {
            "to_relu": "relu", "to_add": "also goes to add", "to_cat": "cat",
            "output": "what the network returns",
            "norm_twice_a": "norm_twice", "norm_twice_b": "norm_twice", "lonely": "not reached",
            "point": "only kernel sizes", "big": "only kernel sizes",
            "group": "native_group_norm", "plain_gamma": "no gamma"}.items():
        assert rows[name].block is None
        assert reason in rows[name].reason, rows[name]
    assert "2 of 13 convolutions became blocks" in str(report)
    assert net.training
    unchanged = [torch.equal(state[key], value) for key, value in net.state_dict().items()]
    assert all(unchanged), "the argument is left as it was"
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_norm_that_does_more_than_is_known_stays():
    class Odd(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) + 1
    with pytest.raises(ValueError, match="its norm is a Odd, which does more"):
        replace_convs(nn.Sequential(nn.Conv2d(3, 4, 3), Odd(4)), "dbb")


def test_hooks_keep_a_pair_as_it_is():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    net[1].register_forward_hook(lambda module, args, output: output * 2)
    with pytest.raises(ValueError, match="has hooks"):
        replace_convs(net, "dbb")


class Uses(nn.Module):
    """A convolution and its norm, used in ways that a block cannot take over."""

    def __init__(self, forward):
        super().__init__()
        self.c, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.d = nn.Conv2d(4, 4, 3, padding=1)
        self.forward = partial(forward, self)


@pytest.mark.parametrize(("forward", "reason"), [
    (lambda s, x: s.b(s.c(x)) + F.conv2d(x, s.c.weight, padding=1), "its weight is used elsewhere"),
    (lambda s, x: (s.b(s.c(x)), (s.c.weight ** 2).sum()), "its weight is used elsewhere"),
    (lambda s, x: s.b(s.c(x)) * s.b.bias.view(1, -1, 1, 1), "its parameters are used elsewhere")])
def test_what_is_used_elsewhere_stays(forward, reason):
    with pytest.raises(ValueError, match=f"c .3x3. stays, .*{reason}"):
        replace_convs(Uses(forward), "dbb")


def test_tied_weights_stay_tied():
    net = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    net[2].weight = net[0].weight
    with pytest.raises(ValueError, match="its weight is used elsewhere"):
        replace_convs(net, "dbb")


def test_a_forward_of_its_own_and_pruning_are_told():
    net = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    net[0].forward = lambda x: F.conv2d(x, net[0].weight * 2)
    with pytest.raises(ValueError, match="methods of its own|used elsewhere"):
        replace_convs(net, "dbb")
    net = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    nn.utils.prune.l1_unstructured(net[0], "weight", 0.5)
    net(torch.zeros(2, 4, 8, 8))
    with pytest.raises(ValueError, match="the network cannot be copied"):
        replace_convs(net, "dbb")


def test_a_norm_that_differs_in_training_stays():
    class Odd(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) * (2 if self.training else 1)
    with pytest.raises(ValueError, match="does more than is known"):
        replace_convs(nn.Sequential(nn.Conv2d(3, 4, 3), Odd(4)), "dbb")


def test_conv3d_is_told_why():
    video = torch.zeros(1, 3, 5, 8, 8)
    with pytest.raises(ValueError, match="0 .3x3x3. stays, Conv3d is no Conv2d"):
        replace_convs(nn.Sequential(nn.Conv3d(3, 4, 3), nn.BatchNorm3d(4)), "dbb", example_input=video)
