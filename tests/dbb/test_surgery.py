"""Blocks put into small networks, and into those of timm and torchvision."""

import pytest
import timm
import torch
import torchvision
from timm.layers import BatchNormAct2d
from torch import nn

from dbb import DiverseBranchBlock, ReparamConv2d, reparameterize, replace_convs
from tests.helpers import pair, randomize, relative_error


def test_tracing_leaves_the_random_state_alone():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout())  # nothing to initialise
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="no convolution of the network can become a block"):
        replace_convs(net, "dbb", example_input=torch.zeros(1, 3, 8, 8))
    assert torch.equal(before, torch.get_rng_state())


def test_block_takes_over_convolution_and_norm():
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 8, 3, padding=1, bias=True), nn.BatchNorm2d(8, eps=1e-2, momentum=0.03)
    net = randomize(nn.Sequential(conv, norm)).double().eval()
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    new, _ = replace_convs(net, "dbb", example_input=torch.zeros_like(x[:1]), init="ones")
    block = new[0]
    assert not new.training
    assert block.branches["kxk"].weight.dtype == torch.float64
    for branch in block.branches.values():
        assert (branch.bn.eps, branch.bn.momentum) == (1e-2, 0.03)
        assert torch.equal(branch.bn.weight, net[1].weight)
    assert block.branches["1x1_avg"].scale.eps == 1e-2
    for name in ("1x1", "1x1_avg", "1x1_kxk"):
        del block.branches[name]
    with torch.no_grad():
        assert relative_error(new(x), net(x)) < 1e-12, "the kxk branch alone is the old pair"


def test_activation_inside_the_norm_stays():
    net = timm.create_model("mobilenetv1_100", num_classes=5).eval()
    new, report = replace_convs(net, "dbb", example_input=torch.zeros(1, 3, 64, 64))
    assert sum(row.block is not None for row in report) == 14
    kept = [m for m in new.modules() if isinstance(m, nn.ReLU6)]
    assert len(kept) == sum(isinstance(m, nn.ReLU6) for m in net.modules()) == 27
    seen = []
    for module in kept:
        module.register_forward_hook(lambda module, args, output: seen.append(output.min().item()))
    new(torch.randn(1, 3, 64, 64))
    assert len(seen) == 27
    assert min(seen) >= 0


def test_activation_with_parameters_stays():
    net = randomize(nn.Sequential(nn.Conv2d(3, 4, 3), BatchNormAct2d(4, act_layer=nn.PReLU))).eval()
    new, _ = replace_convs(net, "dbb", init="single")
    x = torch.randn(2, 3, 8, 8)
    assert relative_error(new(x), net(x)) < 1e-5


def test_include_and_exclude():
    net = timm.create_model("resnet18", num_classes=5)
    small = torch.zeros(1, 3, 64, 64)
    _, report = replace_convs(net, "dbb", include=["layer1.*", "layer2.*"], exclude=["*.conv2"],
                              example_input=small)
    swapped = [row.module for row in report if row.block]
    assert swapped == ["layer1.0.conv1", "layer1.1.conv1", "layer2.0.conv1", "layer2.1.conv1"]
    with pytest.raises(ValueError, match="layer9"):
        replace_convs(net, "dbb", include=["layer9.*"], example_input=small)
    with pytest.raises(ValueError, match="dbbb.*known are dbb, acb"):
        replace_convs(net, "dbbb")


def test_frozen_stays_frozen_and_modes_are_kept():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train().requires_grad_(False)
    net[1].eval()
    new, _ = replace_convs(net.to(memory_format=torch.channels_last), "dbb")
    assert new[0].training
    assert not any(branch.bn.training for branch in new[0].branches.values())
    assert not any(p.requires_grad for p in new.parameters())
    assert not new[0].branches["kxk"].weight.is_contiguous(), "channels_last"


def test_nested_blocks_are_all_converted():
    inner = nn.Sequential(nn.ReLU(), DiverseBranchBlock(4, 4, 3, padding=1))
    block = randomize(DiverseBranchBlock(3, 4, 3, padding=1, nonlinear=inner)).eval()
    x = torch.randn(1, 3, 8, 8)
    for net in (block, nn.Sequential(block)):
        merged = reparameterize(net)
        assert not any(isinstance(module, ReparamConv2d) for module in merged.modules())
        assert relative_error(merged(x), net(x)) < 1e-5


def test_shared_module_becomes_one_shared_block():
    conv, norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
    net = nn.Sequential(conv, norm, nn.ReLU(), conv, norm)
    new, _ = replace_convs(net, "dbb", example_input=torch.zeros(1, 4, 8, 8))
    assert isinstance(new[0], ReparamConv2d)
    assert new[0] is new[3]
    merged = reparameterize(randomize(new).eval())
    assert merged[0] is merged[3]


def test_different_blocks_for_different_layers():
    net, small = timm.create_model("resnet18", num_classes=5), torch.zeros(1, 3, 64, 64)
    blocks = {"*": "dbb", "layer1.*": ["kxk", "1x1", "identity"], "layer4.*": None, "layer4.1.conv2": "acb"}
    _, report = replace_convs(net, blocks, example_input=small, kernel_sizes=range(2, 8))
    rows = {row.module: row for row in report}
    assert rows["layer2.0.conv1"].block == "kxk + 1x1 + 1x1_avg + 1x1_kxk"
    assert rows["conv1"].block == rows["layer2.0.conv1"].block, "7x7 as well"
    assert rows["layer1.1.conv2"].block == "kxk + 1x1 + identity"
    assert rows["layer4.0.conv1"].reason == "no block is meant for it"
    assert rows["layer4.1.conv2"].block == "kxk + 1xk + kx1"
    _, report = replace_convs(net, ["kxk"], example_input=small, kernel_sizes=[7])
    assert [row.module for row in report if row.block] == ["conv1"]


@pytest.mark.parametrize(("arguments", "message"), [
    (dict(block=["kxk", "3x3"]), "layer1.0.conv1: branches: there is no branch '3x3'"),
    (dict(block=["1x1", "identity"]), r"layer1.0.conv1: branches=.* spans the kernel of \(3, 3\); add kxk"),
    (dict(block=["1xk", "kx1"], init="single"),
     "layer1.0.conv1: init=single, a warm start, needs a kxk branch"),
    (dict(include=["layer9.*"]), "include: the pattern 'layer9.*' matches no convolution; there are layer"),
    (dict(exclude=["stem.*"]), "exclude: the pattern 'stem.*' matches no convolution"),
    (dict(block={"laier1.*": "acb"}),
     "block: the pattern 'laier1.*' matches no convolution; there are layer"),
    (dict(init="half"), "init='half' is unknown; known are mixed, mean, ones, third, single"),
    (dict(example_input=torch.zeros(1, 4, 64, 64)),
     r"cannot run on example_input of shape \[1, 4, 64, 64\]")])
def test_bad_arguments(arguments, message):
    net, image = timm.create_model("resnet18", num_classes=5), torch.zeros(1, 3, 64, 64)
    with pytest.raises(ValueError, match=message):
        replace_convs(net, **{"example_input": image} | arguments)


def test_default_image_has_the_channels_of_the_first_convolution():
    _, report = replace_convs(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)))
    assert report[0].block


def test_several_inputs():
    class Two(nn.Sequential):
        def forward(self, x, y):
            return super().forward(x + y)
    two = [torch.zeros(1, 2, 8, 8)] * 2
    _, report = replace_convs(Two(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)), example_input=two)
    assert report[0].block


def test_a_network_that_reads_its_convolutions():
    class Reads(nn.Sequential):
        def forward(self, x):
            assert self[0].out_channels == self[0].weight.shape[0] == len(self[0].bias) == 4
            return super().forward(x.to(self[0].weight.dtype))
    net = randomize(Reads(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).eval()
    new, _ = replace_convs(net, "acb", init="single")
    x = torch.randn(2, 3, 8, 8)
    assert relative_error(new(x), net(x)) < 1e-5
    assert new[0].kernel_size == (3, 3)


def test_synchronised_norms_stay_synchronised():
    norm = nn.SyncBatchNorm(4)
    norm.process_group = None
    new, _ = replace_convs(randomize(nn.Sequential(nn.Conv2d(3, 4, 3), norm)).eval(), "dbb")
    assert all(isinstance(branch.bn, nn.SyncBatchNorm) for branch in new[0].branches.values())


def test_gammas():
    net = randomize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    third = [1 / 3] * 3
    for init, factors in (("mixed", third), ("mean", third), ("third", third), ("ones", [1, 1, 1]),
                          ("single", [1, 0, 0])):
        new, _ = replace_convs(net, "acb", init=init)
        for factor, branch in zip(factors, new[0].branches.values(), strict=True):
            assert torch.allclose(branch.bn.weight, factor * net[1].weight)
    published = [0.25, 0.25, 0, 0.5, 1, 0.5]
    depthwise = randomize(nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4)))
    for branches, factors in ((["kxk", "avg"], [1, 0]), (["1xk", "kx1", "avg"], third)):
        new, _ = replace_convs(depthwise, branches, example_input=torch.zeros(1, 4, 8, 8), init="mixed")
        for factor, branch in zip(factors, new[0].branches.values(), strict=True):
            assert torch.allclose(branch.bn.weight, factor * depthwise[1].weight)
    for init, factors in (("mixed", published), ("mean", published), ("ones", published),
                          ("single", [1, 0, 0, 0, 0, 0])):
        new, _ = replace_convs(net, "orepa", init=init)
        assert [gamma[0].item() for gamma in new[0].gammas().values()] == factors
        assert torch.equal(new[0].bn.weight, net[1].weight)  # one norm, the old one
        assert torch.equal(new[0].bn.running_var, net[1].running_var)


def test_blocks_are_left_alone_the_second_time():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    once, _ = replace_convs(net, "dbb", include=["0"])
    twice, report = replace_convs(once, "acb")
    assert [row.module for row in report] == ["2"]
    assert list(twice[0].branches) == ["kxk", "1x1", "1x1_avg", "1x1_kxk"]


def test_report_is_a_table():
    net = timm.create_model("resnet18", num_classes=5)
    _, report = replace_convs(net, "acb", example_input=torch.zeros(1, 3, 64, 64))
    lines = str(report).splitlines()
    assert lines[0] == "16 of 20 convolutions became blocks"
    first = "layer1.0.conv1, layer1.0.conv2, layer1.1.conv1, ..."
    assert " ".join(lines[1].split()) == f"16 3x3 became kxk + 1xk + kx1 ({first})"
    assert lines[2].split()[:3] == ["1", "7x7", "stayed:"]


@pytest.mark.slow
def test_torchvision_and_timms_own_walker():
    net = torchvision.models.resnet18(num_classes=5).eval()
    new, report = replace_convs(net, "dbb", example_input=torch.zeros(1, 3, 64, 64))
    assert sum(row.block is not None for row in report) == 16
    randomize(new)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        merged, by_timm = reparameterize(new), timm.utils.reparameterize_model(new)
        assert torch.equal(merged(x), by_timm(x))
        assert torch.equal(reparameterize(merged)(x), merged(x)), "converting twice is harmless"
    assert isinstance(new.layer1[0].conv1, ReparamConv2d), "the argument is left as it was"
    assert all(p.requires_grad for p in merged.parameters())
    with pytest.raises(ValueError, match="eval"):
        reparameterize(new.train())


def test_layers_that_are_called_by_keyword():
    """`input` is what torch's own layers call what they take."""
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = pair(3)

        def forward(self, x):
            return self.bn(input=self.conv(input=x))
    net, x = randomize(Named()).eval(), torch.randn(2, 3, 8, 8)
    new, report = replace_convs(net, example_input=x, init="single")
    assert [row.block is None for row in report] == [False]
    with torch.no_grad():
        assert relative_error(new(x), net(x)) < 1e-5
        assert torch.equal(new.conv(input=x), new.conv(x))
