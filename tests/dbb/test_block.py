"""The block against plain references: in training, in eval, after conversion."""

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn

from dbb import AsymmetricConvBlock, DiverseBranchBlock, ReparamConv2d, branches, branchwise
from tests.dbb.blocks import ALL, CHANNELS, geometry_id
from tests.dbb.reference import PublishedBlock, check_training, import_published, reference
from tests.helpers import randomize, relative_error

KERNELS = [1, 2, 3, 4, 5, (3, 5), (1, 4)]


def make(kernel_size, stride, channels, branches=ALL, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    c_in, c_out, groups = channels
    kh, kw = kernel_size if isinstance(kernel_size, tuple) else (kernel_size, kernel_size)
    padding = (kh // 2, kw // 2)
    block = ReparamConv2d(c_in, c_out, kernel_size, stride, padding, groups=groups, branches=branches,
                          dtype=dtype)
    return randomize(block, seed), torch.randn(3, c_in, 9, 8, dtype=dtype)


GRID = pytest.mark.parametrize(("kernel_size", "stride", "channels"),
                               list(itertools.product(KERNELS, [1, 2, (2, 1)], CHANNELS)), ids=geometry_id)


@GRID
def test_training_equals_the_reference(kernel_size, stride, channels):
    check_training(*make(kernel_size, stride, channels))


@GRID
def test_merged_equals_branches(kernel_size, stride, channels):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        block, x = make(kernel_size, stride, channels, dtype=dtype)
        block.eval()
        with torch.no_grad():
            with branchwise(block):
                expected = block(x)
            assert relative_error(block(x), expected) < tolerance
            conv = block.fuse()
            assert type(conv) is nn.Conv2d
            assert relative_error(conv(x), expected) < tolerance
            block.switch_to_deploy()
            assert relative_error(block(x), expected) < tolerance


@pytest.mark.parametrize(("k", "stride", "channels"), list(itertools.product([3, 5], [1, 2], CHANNELS[:4])))
def test_published_block_is_the_same_function_in_eval(k, stride, channels):
    torch.manual_seed(0)
    c_in, c_out, groups = channels
    published = randomize(PublishedBlock(c_in, c_out, k, stride, groups).double()).eval()
    block = DiverseBranchBlock(c_in, c_out, k, stride, k // 2, groups=groups, dtype=torch.float64).eval()
    import_published(published, block)
    x = torch.randn(2, c_in, 9, 8, dtype=torch.float64)
    with torch.no_grad():
        assert relative_error(block(x), published(x)) < 1e-12
        assert relative_error(block.fuse()(x), published(x)) < 1e-12
        if c_in == c_out and not published.depthwise:  # both padded maps have as many channels
            wrong = published(x, pad_value=torch.zeros(c_in, dtype=torch.float64))
            assert relative_error(block(x), wrong) > 1e-3, "zeros around a shifted map: another function"


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [0, 1, (2, 0), "same"])
def test_padding(padding_mode, padding):
    block = ReparamConv2d(4, 6, (3, 4), 1, padding, dilation=(2, 1), branches=ALL, padding_mode=padding_mode,
                          dtype=torch.float64)
    randomize(block).eval()
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    with torch.no_grad(), branchwise(block):
        assert relative_error(block.fuse()(x), block(x)) < 1e-12


@pytest.mark.parametrize("images", [1, 40])
def test_composed_and_layerwise_training_agree(images):
    """Few positions run the 1x1 layer, many compose it into the kernel: 9 * 8 outputs lie between the two."""
    block, _ = make(3, 1, (8, 8, 1), branches=("1x1_kxk",))
    x = torch.randn(images, 8, 5, 5, dtype=torch.float64)
    called, merge = [], branches.merge_1x1_kxk
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(branches, "merge_1x1_kxk", lambda *args: called.append(1) or merge(*args))
        actual = block.train()(x)
    assert bool(called) == (images == 40)
    block, _ = make(3, 1, (8, 8, 1), branches=("1x1_kxk",))
    assert relative_error(actual, reference(block, x)[0]) < 1e-12


def test_dilated_average_skips_pixels():
    block = ReparamConv2d(2, 2, 3, padding=2, dilation=2, groups=2, branches=("avg",), dtype=torch.float64)
    block.eval().branches["avg"].bn.eps = 0.0
    x = torch.randn(1, 2, 9, 9, dtype=torch.float64)
    padded = nn.functional.pad(x, [2] * 4)
    expected = sum(padded[:, :, 2 * i:2 * i + 9, 2 * j:2 * j + 9] for i in range(3) for j in range(3)) / 9
    assert relative_error(block(x), expected) < 1e-12


def test_every_branch_learns_in_every_step():
    block, x = make(3, 1, (8, 8, 1))
    block.train()(x).square().sum().backward()
    assert all(p.grad is not None for p in block.parameters())


def test_frozen_norms_are_the_merged_convolution():
    block, x = make(3, 1, (8, 8, 1))
    block.train()
    for module in block.modules():  # the usual loop
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    before = copy.deepcopy(block.state_dict())
    y = block(x)
    assert all(torch.equal(before[key], value) for key, value in block.state_dict().items())
    with torch.no_grad():
        assert relative_error(y, block.eval()(x)) < 1e-12


def test_one_frozen_norm_freezes_its_inner_scale():
    block, x = make(3, 1, (8, 8, 1))
    block.train()
    frozen, free = block.branches["1x1_kxk"], block.branches["1x1_avg"]
    frozen.bn.eval()
    kept, left = frozen.scale.running_var.clone(), free.scale.running_var.clone()
    block(x)
    assert torch.equal(kept, frozen.scale.running_var)
    assert not torch.equal(left, free.scale.running_var)


def test_cumulative_average_of_momentum_none():
    block, x = make(3, 1, (8, 8, 1), branches=("kxk", "1x1_avg"))
    branch = block.train().branches["1x1_avg"]
    branch.bn.momentum = None
    branch.bn.reset_running_stats()
    xs = [x, 2 * x + 1, x.flip(0) - 3]
    for batch in xs:
        block(batch)
    u = [nn.functional.conv2d(batch, branch.first).var((0, 2, 3)) for batch in xs]
    assert relative_error(branch.scale.running_var, torch.stack(u).mean(0)) < 1e-12


def test_variance_survives_a_large_mean():
    torch.manual_seed(0)
    block = ReparamConv2d(4, 4, 3, padding=1, branches=("1x1_avg",)).train()
    x = torch.randn(8, 4, 16, 16)
    block(x + 1000)
    wide = copy.deepcopy(block).double()
    exact = nn.functional.conv2d((x + 1000).double(), wide.branches["1x1_avg"].first).var((0, 2, 3))
    # float32 holds x + 1000 to 6e-5 of its deviation
    assert relative_error(block.branches["1x1_avg"].scale.running_var, 0.9 + 0.1 * exact) < 1e-4


def test_conversion_keeps_what_a_convolution_has():
    block, x = make(3, 2, (8, 12, 4), dtype=torch.bfloat16)
    conv = block.eval().to(memory_format=torch.channels_last).fuse()
    assert conv.weight.dtype == conv.bias.dtype == torch.bfloat16
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert not conv.weight.is_contiguous()
    assert all(p.requires_grad for p in conv.parameters())
    assert (conv.stride, conv.padding, conv.groups, conv.training) == ((2, 2), (1, 1), 4, False)
    block.float()
    block.switch_to_deploy()
    first = block.reparam
    block.switch_to_deploy()
    assert block.reparam is first
    assert block.fuse() is first
    block.train()(x.float()).sum().backward()
    assert first.weight.grad is not None


def test_conversion_in_training_mode_raises():
    block, _ = make(3, 1, (8, 8, 1))
    for convert in (block.fuse, block.switch_to_deploy):
        with pytest.raises(ValueError, match="eval"):
            convert()
    block.eval().branches["1x1"].bn.train()
    with pytest.raises(ValueError, match="eval"):
        block.fuse()


def test_deployed_block_loads_converted_weights():
    block = randomize(DiverseBranchBlock(4, 6, 3, padding=1)).eval()
    deployed = DiverseBranchBlock(4, 6, 3, padding=1, deploy=True)
    x, expected = torch.randn(2, 4, 8, 8), None
    block.switch_to_deploy()
    deployed.load_state_dict(block.state_dict())
    expected = block(x)
    assert torch.equal(deployed(x), expected)


def test_nonlinear_survives_conversion():
    block = randomize(DiverseBranchBlock(4, 6, 3, padding=1, nonlinear=nn.ReLU())).eval()
    x = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        y = block(x)
        assert y.min() == 0
        assert relative_error(block.fuse()(x), y) < 1e-5


@pytest.mark.parametrize("block", [
    DiverseBranchBlock(6, 6, 3, padding=1), DiverseBranchBlock(6, 6, 3, padding=1, groups=6),
    AsymmetricConvBlock(6, 6, 3, padding=1)], ids=["dense", "depthwise", "acb"])
def test_published_branches(block):
    names = {3: {"kxk", "avg", "1x1_kxk"} if isinstance(block, DiverseBranchBlock) else {"kxk", "1xk", "kx1"},
             4: {"kxk", "1x1", "1x1_avg", "1x1_kxk"}}
    assert set(block.branches) == names[len(block.branches)]
    if block.geometry.depthwise:
        assert len(block.branches["1x1_kxk"].first) == 12, "twice the channels inside a depthwise block"


def test_published_initial_values():
    block = DiverseBranchBlock(6, 6, 3, padding=1)
    assert not block.branches["1x1_kxk"].first.any()
    assert torch.equal(block.branches["1x1_kxk"].inner().flatten(1), torch.eye(6))
    block.init_gamma(0.25)
    assert all((branch.bn.weight == 0.25).all() for branch in block.branches.values())
    single = DiverseBranchBlock(6, 6, 3, padding=1, single_init=True)
    assert {name: branch.bn.weight.sum().item() for name, branch in single.branches.items()} == \
        {"kxk": 6, "1x1": 0, "1x1_avg": 0, "1x1_kxk": 0}


def test_autocast_keeps_statistics_in_float32():
    block, x = make(3, 1, (8, 8, 1), dtype=torch.float32)
    block.train()
    full = copy.deepcopy(block)
    expected = full(x)
    with torch.autocast("cpu", torch.bfloat16):
        actual = block(x)
    assert relative_error(actual, expected) < 2e-2
    found, wanted = (net.branches["1x1_kxk"].scale.running_var for net in (block, full))
    assert relative_error(found, wanted) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_modules(dtype):
    block, x = make(3, 1, (8, 8, 1), dtype=torch.float32)
    expected = block.train()(x)
    assert relative_error(copy.deepcopy(block).to(dtype)(x.to(dtype)), expected) < 5e-2


def test_copies_and_files():
    block, x = make(3, 1, (8, 8, 1))
    for other in (copy.deepcopy(block.eval()), pickle.loads(pickle.dumps(block))):
        assert torch.equal(other(x), block(x))


def test_kernel_is_differentiable():
    block, _ = make(3, 1, (8, 8, 1))
    kernel, bias = block.get_equivalent_kernel_bias()
    (kernel.abs().sum() + bias.square().sum()).backward()
    assert all(p.grad is not None for p in block.parameters())


@pytest.mark.parametrize(("arguments", "message"), [
    (dict(branches=("kxk", "2x2")), "2x2.*known are"),
    (dict(branches=("identity",), stride=2), "spans the kernel"),
    (dict(groups=3), "divisible by groups=3")])
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ReparamConv2d(4, 4, 3, padding=1, **arguments)


def test_branch_that_does_not_fit_is_left_out():
    block = ReparamConv2d(4, 4, 3, 2, 1, branches=("kxk", "identity", "kxk"))
    assert list(block.branches) == ["kxk", "kxk_2"]
