"""Break the code on purpose, one named bug at a time: the equivalence checks must notice each of them.

The key mapping of published files is broken in tests/models/test_published.py.
"""

from contextlib import contextmanager
from itertools import product

import pytest
import torch

from dbb import MODES, ReparamConv2d, block, branch, branches, branchwise, geometry, modes, rows, transforms
from tests.dbb.blocks import ALL, sample_of
from tests.dbb.reference import reference
from tests.helpers import randomize, relative_error

affine, merge, summed = transforms.norm_affine, transforms.merge_1x1_kxk, block.ReparamConv2d.summed


def drops_running_mean(mean, var, weight, beta, eps):
    return affine(torch.zeros_like(mean), var, weight, beta, eps)


def drops_beta(mean, var, weight, beta, eps):
    return affine(mean, var, weight, torch.zeros_like(beta), eps)


def var_for_std(mean, var, weight, beta, eps):
    return affine(mean, (var + eps) ** 2 - eps, weight, beta, eps)


def drops_gamma(mean, var, weight, beta, eps):
    return affine(mean, var, torch.ones_like(weight), beta, eps)


def forgets_eps(mean, var, weight, beta, eps):
    return affine(mean, var, weight, beta, 0.0)


def pads_a_shifted_map_with_zeros(self):
    """What a map shifted by 0.1 and padded with zeros would give inside: right there, wrong at the border."""
    kernel, bias = summed(self)
    return kernel, bias + 0.1 * kernel.sum((1, 2, 3))


def swaps_height_and_width(kernel, kernel_size):
    """Counts padding from the last dimension, as F.pad does not."""
    top, left = transforms.offsets(kernel.shape[2:], kernel_size)
    bottom, right = kernel_size[0] - kernel.shape[2] - top, kernel_size[1] - kernel.shape[3] - left
    swapped = torch.nn.functional.pad(kernel, (top, bottom, left, right))
    if swapped.shape[2:] == tuple(kernel_size):
        return swapped
    return transforms.embed_kernel(kernel, kernel_size).flip(3)


def wrong_tap(kernel, kernel_size):
    return transforms.embed_kernel(kernel, kernel_size).roll(int(kernel.shape[3] < kernel_size[1]), 3)


def wrong_group_order(first, second, groups=1, *biases):
    if groups == 1:
        return merge(first, second, groups, *biases)
    return merge(first.reshape(groups, -1, *first.shape[1:]).flip(0).flatten(0, 1), second, groups, *biases)


def composes_transposed(first, second, groups=1, *biases):
    square = first.shape[0] == first.shape[1]
    return merge(first.transpose(0, 1) if square else first, second, groups, *biases)


def float32_box(self, first=None):
    kh, kw = self.geometry.kernel_size
    box = torch.full((kh, kw), 1 / (kh * kw), dtype=torch.float32)
    return self.point(first) * box.to(self.first.dtype)


MUTATIONS = {  # name: (where, attribute, the bug)
    "drops running_mean": (branch, "norm_affine", drops_running_mean),
    "drops beta": (branch, "norm_affine", drops_beta),
    "drops gamma": (branch, "norm_affine", drops_gamma),
    "var for std": (branch, "norm_affine", var_for_std),
    "forgets eps": (branch, "norm_affine", forgets_eps),
    "pads a shifted map with zeros": (block.ReparamConv2d, "summed", pads_a_shifted_map_with_zeros),
    "swaps H and W": (rows, "embed_kernel", swaps_height_and_width),
    "wrong tap": (rows, "embed_kernel", wrong_tap),
    "wrong group order": (branches, "merge_1x1_kxk", wrong_group_order),
    "composes with the transposed 1x1": (branches, "merge_1x1_kxk", composes_transposed),
    "float32 box": (branches.PointwiseAverage, "kernel", float32_box),
}


@contextmanager
def applied(mutation):
    """Within this context the bug (where, attribute, bug) is in the code; None stands for no bug."""
    with pytest.MonkeyPatch.context() as patch:
        if mutation is not None:
            patch.setattr(*mutation)
        yield


def error(groups, mutation=None):
    """Largest relative error of the merged convolution against the branches as drawn, over a few shapes."""
    largest = 0.0
    for kernel_size, channels in ((3, 8), ((3, 5), 8), (4, 8)):
        torch.manual_seed(0)
        padding = (1, 2) if kernel_size == (3, 5) else 1
        block = ReparamConv2d(channels, channels, kernel_size, padding=padding, groups=groups, branches=ALL,
                              dtype=torch.float64)
        randomize(block).eval()
        x = torch.randn(2, channels, 9, 8, dtype=torch.float64)
        with torch.no_grad():
            with branchwise(block):
                drawn = block(x)
            with applied(mutation):
                merged = block.fuse()(x)
        largest = max(largest, relative_error(merged, drawn))
    return largest


@pytest.mark.parametrize("groups", [1, 4])
def test_unmutated(groups):
    assert error(groups) < 1e-12


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_is_noticed(name):
    assert max(error(groups, MUTATIONS[name]) for groups in (1, 4)) > 1e-12


def follows_half_way(norms, running, values):
    FOLLOW(norms, running, [0.5 * value for value in values])


def uncentred(x, groups, group):
    seen = x.transpose(0, 1).flatten(1).reshape(groups, x.shape[1] // groups, -1)
    return seen.mean(2, keepdim=True), seen @ seen.mT / seen.shape[2], seen.shape[2]


def over_all_channels_alike(x, groups, group):
    mean, spread, count = COVARIANCE(x, groups, group)
    return mean, spread.flip(0), count


def counts_one_more(x, groups, group):
    mean, spread, count = COVARIANCE(x, groups, group)
    return mean, spread, count + 1


def counts_all_positions(kernels, sample, eps, group):
    """A sample that takes itself for the whole map."""
    z, inverse, variance = NORMALISED(kernels, sample, eps, group)
    n, whole = sample.shape[2], 4 * 9 * 8
    return z, inverse, variance * (n - 1) / n * whole / (whole - 1)


def next_position(cls, *args):
    lattice = WITHIN(*args)
    places = tuple((first and first - 1, step, count) for first, step, count in lattice.places)
    return lattice._replace(places=places)


def of_the_first_image(self, x):
    return MEAN(self, x[:1])


def forgets_factors(self):
    return AFFINE(self) if self.factor is None else (0 * self.factor + 1, 0.0)


def forgets_the_variances_gradient(kernels, d_sum):
    return torch.zeros_like(DOTS(kernels, d_sum))


FOLLOW, COVARIANCE, NORMALISED, DOTS = modes.follow, modes.covariance, rows._normalised, rows.dots
WITHIN, MEAN, AFFINE = geometry.Lattice.within, geometry.Geometry.mean_window, branch.Branch.affine
TRAINING_MUTATIONS = {
    "running statistics are not updated": (modes, "follow", lambda norms, running, values: None),
    "running statistics follow other values": (modes, "follow", follows_half_way),
    "running variance is not the unbiased one": (modes, "covariance", counts_one_more),
    "covariance is not centred": (modes, "covariance", uncentred),
    "covariance of another group": (modes, "covariance", over_all_channels_alike),
    "centre tap at k // 2": (geometry, "offsets", lambda small, large: [
        b // 2 - a // 2 for a, b in zip(small, large, strict=True)]),
    "group composition": (branches, "merge_1x1_kxk", wrong_group_order),
    "sample counts as the whole map": (rows, "_normalised", counts_all_positions),
    "sample of other positions": (geometry.Lattice, "within", classmethod(next_position)),
    "mean of one image": (geometry.Geometry, "mean_window", of_the_first_image),
    "gradient of gammas and variances": (rows, "dots", forgets_the_variances_gradient),
    "factors are forgotten": (branch.Branch, "affine", forgets_factors),
}


def training_error(groups, mutation=None):
    """Largest relative error against the reference: outputs, running statistics, gradients in training."""
    errors = []
    for kernel_size, mode in product((3, 4), MODES):
        torch.manual_seed(0)
        made = ReparamConv2d(8, 8, kernel_size, padding=1, groups=groups, branches=ALL, mode=mode,
                             positions=64, dtype=torch.float64)
        randomize(made).train()
        x = (torch.randn(4, 8, 9, 8, dtype=torch.float64) + 1).requires_grad_()
        expected, stats = reference(made, x, sample_of(made, x) if mode == "online" else None)
        inputs, cotangent = [x, *made.parameters()], torch.randn_like(expected)
        wanted = torch.autograd.grad(expected, inputs, cotangent)
        with applied(mutation):
            actual = made(x)
            found = torch.autograd.grad(actual, inputs, cotangent)
        errors.append(relative_error(actual, expected))
        errors += [relative_error(made.state_dict()[key], value) for key, value in stats.items()]
        flat, flat_wanted = (torch.cat([grad.flatten() for grad in grads]) for grads in (found, wanted))
        errors.append(relative_error(flat, flat_wanted))
    return max(errors)


@pytest.mark.parametrize("groups", [1, 4])
def test_unmutated_training(groups):
    assert training_error(groups) < 1e-12


@pytest.mark.parametrize("name", TRAINING_MUTATIONS)
def test_mutation_in_training_is_noticed(name):
    assert max(training_error(groups, TRAINING_MUTATIONS[name]) for groups in (1, 4)) > 1e-12
