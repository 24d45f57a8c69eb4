"""Each transformation against the two convolutions it merges."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dbb import transforms
from tests.helpers import randomize, relative_error


def rand(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_fuse_conv_norm():
    x, kernel, bias = rand(2, 3, 7, 6), rand(4, 3, 3, 2), rand(4)
    bn = randomize(nn.BatchNorm2d(4).double()).eval()
    statistics = bn.running_mean, bn.running_var
    fused = transforms.fuse_conv_norm(kernel, bias, *statistics, bn.weight, bn.bias, bn.eps)
    assert relative_error(F.conv2d(x, *fused), bn(F.conv2d(x, kernel, bias))) < 1e-12


def test_add_branches():
    x, kernels = rand(2, 3, 7, 6), [rand(4, 3, 3, 4), rand(4, 3, 1, 2), rand(4, 3, 3, 4)]
    biases = [rand(4), rand(4), rand(4)]
    large = [transforms.embed_kernel(kernel, (3, 4)) for kernel in kernels]
    for some in ([0], [1], [0, 2], [1, 0, 2]):
        kernel, bias = transforms.add_branches([kernels[i] for i in some], [biases[i] for i in some], (3, 4))
        expected = sum(F.conv2d(x, large[i], biases[i]) for i in some)
        assert relative_error(F.conv2d(x, kernel, bias), expected) < 1e-12
    leaves = [kernel.clone().requires_grad_() for kernel in (large[0], large[2], kernels[1])]
    for _ in range(3):  # gradients of leaves are added up in place
        transforms.add_branches(leaves, biases, (3, 4))[0].sum().backward()
    assert all((leaf.grad == 3).all() for leaf in leaves)
    added = [kernel.requires_grad_() for kernel in kernels]
    assert torch.autograd.gradcheck(lambda *k: transforms.add_branches(k, biases, (3, 4))[0], added)


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_merge_1x1_kxk(groups):
    x, k1, b1 = rand(2, 6, 7, 6), rand(12, 6 // groups, 1, 1), rand(12)
    k2, b2 = rand(18, 12 // groups, 3, 2), rand(18)
    kernel, bias = transforms.merge_1x1_kxk(k1, k2, groups, b1, b2)
    expected = F.conv2d(F.conv2d(x, k1, b1, groups=groups), k2, b2, groups=groups)
    assert relative_error(F.conv2d(x, kernel, bias, groups=groups), expected) < 1e-12
    without, none = transforms.merge_1x1_kxk(k1, k2, groups)
    assert none is None
    assert torch.equal(without, kernel)


def test_concat():
    x, (k1, k2), (b1, b2) = rand(2, 3, 7, 6), (rand(4, 3, 3, 3), rand(2, 3, 3, 3)), (rand(4), rand(2))
    expected = torch.cat([F.conv2d(x, k1, b1), F.conv2d(x, k2, b2)], 1)
    assert relative_error(F.conv2d(x, *transforms.concat([k1, k2], [b1, b2])), expected) < 1e-12


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_average_kernel(groups):
    x, kernel = rand(2, 4, 7, 6), transforms.average_kernel(4, (3, 2), groups, torch.float64)
    expected = F.avg_pool2d(x, (3, 2), 1, padding=1)
    assert relative_error(F.conv2d(x, kernel, padding=1, groups=groups), expected) < 1e-12


@pytest.mark.parametrize(("small", "large"), [
    ((1, 1), (3, 5)), ((1, 5), (3, 5)), ((3, 1), (3, 5)), ((1, 1), (4, 2))])
def test_embed_kernel(small, large):
    x, kernel = rand(2, 3, 9, 8), rand(4, 3, *small)
    top, left = ((large[0] - 1) // 2 - (small[0] - 1) // 2, (large[1] - 1) // 2 - (small[1] - 1) // 2)
    full = F.conv2d(x, transforms.embed_kernel(kernel, large))
    cropped = F.conv2d(x[:, :, top:, left:], kernel)[:, :, :full.shape[2], :full.shape[3]]
    assert relative_error(full, cropped) < 1e-12
