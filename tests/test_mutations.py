"""Break the conversion on purpose, one named bug at a time: the equivalence check must notice each of them."""

import pytest
import torch
from torch.nn import functional as F

from dbb import ReparamConv2d, branches, branchwise, transforms
from tests.conftest import randomize, relative_error
from tests.test_block import ALL

fuse_conv_norm, merge, embed = transforms.fuse_conv_norm, transforms.merge_1x1_kxk, transforms.embed_kernel


def drops_running_mean(kernel, bias, mean, var, weight, beta, eps):
    return fuse_conv_norm(kernel, bias, torch.zeros_like(mean), var, weight, beta, eps)


def drops_beta(kernel, bias, mean, var, weight, beta, eps):
    return fuse_conv_norm(kernel, bias, mean, var, weight, torch.zeros_like(beta), eps)


def var_for_std(kernel, bias, mean, var, weight, beta, eps):
    return fuse_conv_norm(kernel, bias, mean, (var + eps) ** 2 - eps, weight, beta, eps)


def drops_gamma(kernel, bias, mean, var, weight, beta, eps):
    return fuse_conv_norm(kernel, bias, mean, var, torch.ones_like(weight), beta, eps)


def forgets_eps(kernel, bias, mean, var, weight, beta, eps):
    return fuse_conv_norm(kernel, bias, mean, var, weight, beta, 0.0)


def swaps_height_and_width(kernel, kernel_size):
    """F.pad counts from the last dimension: the order (top, bottom, left, right) pads W with what is meant for H."""
    top, left = transforms.offsets(kernel.shape[2:], kernel_size)
    bottom, right = kernel_size[0] - kernel.shape[2] - top, kernel_size[1] - kernel.shape[3] - left
    padded = F.pad(kernel, (top, bottom, left, right))
    # Cut and filled to size, since else the sum of the branches would not even have one shape.
    return F.pad(padded, (0, max(0, kernel_size[1] - padded.shape[3]), 0, max(0, kernel_size[0] - padded.shape[2])))[
        :, :, :kernel_size[0], :kernel_size[1]]


def wrong_tap(kernel, kernel_size):
    moved = embed(kernel, kernel_size)
    return moved if kernel.shape[2:] == tuple(kernel_size) else moved.roll(1, 3)


def wrong_group_order(first, second, groups=1, *biases):
    if groups == 1:
        return merge(first, second, groups, *biases)
    return merge(first.reshape(groups, -1, *first.shape[1:]).flip(0).flatten(0, 1), second, groups, *biases)


def composes_transposed(first, second, groups=1, *biases):
    return merge(first.transpose(0, 1), second, groups, *biases) if first.shape[0] == first.shape[1] else merge(first, second, groups)


def float32_box(self, moments=None):
    kh, kw = self.geometry.kernel_size
    box = torch.full((kh, kw), 1 / (kh * kw), dtype=torch.float32)
    return self.scaled(moments) * box.to(self.first.dtype)


def pads_a_shifted_map_with_zeros(kernel, bias, mean, var, weight, beta, eps):
    """What a map shifted by 0.1 and padded with zeros would give inside: right there, wrong at the border."""
    return fuse_conv_norm(kernel, bias + 0.1 * kernel.sum((1, 2, 3)), mean, var, weight, beta, eps)


MUTATIONS = {  # name: (where, attribute, the bug)
    "drops running_mean": (branches, "fuse_conv_norm", drops_running_mean),
    "drops beta": (branches, "fuse_conv_norm", drops_beta),
    "drops gamma": (branches, "fuse_conv_norm", drops_gamma),
    "var for std": (branches, "fuse_conv_norm", var_for_std),
    "forgets eps": (branches, "fuse_conv_norm", forgets_eps),
    "pads a shifted map with zeros": (branches, "fuse_conv_norm", pads_a_shifted_map_with_zeros),
    "swaps H and W": (branches, "embed_kernel", swaps_height_and_width),
    "wrong tap": (branches, "embed_kernel", wrong_tap),
    "wrong group order": (branches, "merge_1x1_kxk", wrong_group_order),
    "composes with the transposed 1x1": (branches, "merge_1x1_kxk", composes_transposed),
    "float32 box": (branches.PointwiseAverage, "kernel", float32_box),
}


def error(groups, mutation=None, monkeypatch=None):
    """Largest relative error of the merged convolution against the branches as drawn, over a few shapes."""
    largest = 0.0
    for kernel_size, channels in ((3, 8), ((3, 5), 8), (4, 8)):
        torch.manual_seed(0)
        padding = (1, 2) if kernel_size == (3, 5) else 1
        block = ReparamConv2d(channels, channels, kernel_size, padding=padding, groups=groups, branches=ALL, dtype=torch.float64)
        randomize(block).eval()
        x = torch.randn(2, channels, 9, 8, dtype=torch.float64)
        with torch.no_grad():
            with branchwise(block):
                drawn = block(x)
            if mutation is None:
                merged = block.fuse()(x)
            else:
                with monkeypatch.context() as patch:
                    patch.setattr(*mutation)
                    merged = block.fuse()(x)
        largest = max(largest, relative_error(merged, drawn))
    return largest


@pytest.mark.parametrize("groups", [1, 4])
def test_unmutated(groups):
    assert error(groups) < 1e-12


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_is_noticed(name, monkeypatch):
    assert max(error(groups, MUTATIONS[name], monkeypatch) for groups in (1, 4)) > 1e-12
