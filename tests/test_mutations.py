"""Break the code on purpose, one named bug at a time: the equivalence checks must notice each of them.

The key mapping of published files is broken in tests/test_published.py.
"""

from contextlib import contextmanager
from itertools import product

import pytest
import torch

from dbb import MODES, ReparamConv2d, branches, branchwise, geometry, modes, moments, norms, transforms
from tests.conftest import randomize, relative_error
from tests.reference import reference
from tests.test_block import ALL
from tests.test_properties import sample_of

fuse_conv_norm, merge, place = transforms.fuse_conv_norm, transforms.merge_1x1_kxk, transforms._place


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


def swaps_height_and_width(small, large):
    """Counts from the last dimension, as F.pad does; kept inside the large kernel, since else nothing would run at all."""
    first = transforms.offsets(small, large)[::-1]
    return [slice(min(f, k_large - k), min(f, k_large - k) + k) for f, k, k_large in zip(first, small, large, strict=True)]


def wrong_tap(small, large):
    rows, columns = place(small, large)
    return [rows, columns if columns.stop == large[1] else slice(columns.start + 1, columns.stop + 1)]


def wrong_group_order(first, second, groups=1, *biases):
    if groups == 1:
        return merge(first, second, groups, *biases)
    return merge(first.reshape(groups, -1, *first.shape[1:]).flip(0).flatten(0, 1), second, groups, *biases)


def composes_transposed(first, second, groups=1, *biases):
    return merge(first.transpose(0, 1), second, groups, *biases) if first.shape[0] == first.shape[1] else merge(first, second, groups)


def float32_box(self, moments=None):
    kh, kw = self.geometry.kernel_size
    box = torch.full((kh, kw), 1 / (kh * kw), dtype=torch.float32)
    return self.point(moments) * box.to(self.first.dtype)


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
    "swaps H and W": (transforms, "_place", swaps_height_and_width),
    "wrong tap": (transforms, "_place", wrong_tap),
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
        block = ReparamConv2d(channels, channels, kernel_size, padding=padding, groups=groups, branches=ALL, dtype=torch.float64)
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


def forgets_running_variance(self, first, bn, moments):
    before = self.running_var.clone()
    factors = SCALE(self, first, bn, moments)
    self.running_var.copy_(before)
    return factors


def updates_with_the_wrong_momentum(self, first, bn, moments):
    before = self.running_var.clone()
    factors = SCALE(self, first, bn, moments)
    self.running_var.copy_(0.1 * before + 0.9 * (before + (self.running_var - before) / bn.momentum))
    return factors


def uncentred(x, groups, norm):
    rows = x.transpose(0, 1).flatten(1).reshape(groups, x.shape[1] // groups, -1)
    return moments.Moments(x.mean((0, 2, 3)), rows @ rows.mT / rows.shape[2], rows.shape[2])


def over_all_channels_alike(x, groups, norm):
    found = MOMENTS(x, groups, norm)
    return found._replace(covariance=found.covariance.flip(0))


def counts_all_positions(self, kernel):
    """A sample that takes itself for the whole map."""
    return THROUGH(self, kernel)._replace(count=4 * 9 * 8)


def next_position(cls, *args):
    lattice = WITHIN(*args)
    return lattice._replace(places=tuple((first and first - 1, step, count) for first, step, count in lattice.places))


def forgets_factors(self, kernel, statistics=None):
    return FOLDED(self, kernel, statistics) if self.factor is None else (kernel, torch.zeros_like(self.factor))


SCALE, MOMENTS, THROUGH = norms.Scale.forward, modes.batch_moments, moments.Sample.through
WITHIN, FOLDED = geometry.Lattice.within, branches.Branch.folded
TRAINING_MUTATIONS = {
    "running variance is the biased one": (norms, "_unbiased", lambda statistics: statistics.var),
    "running variance is not updated": (norms.Scale, "forward", forgets_running_variance),
    "running variance takes the wrong momentum": (norms.Scale, "forward", updates_with_the_wrong_momentum),
    "covariance is not centred": (modes, "batch_moments", uncentred),
    "covariance of another group": (modes, "batch_moments", over_all_channels_alike),
    "centre tap at k // 2": (geometry, "offsets", lambda small, large: [b // 2 - a // 2 for a, b in zip(small, large, strict=True)]),
    "group composition": (branches, "merge_1x1_kxk", wrong_group_order),
    "sample counts as the whole map": (moments.Sample, "through", counts_all_positions),
    "sample of other positions": (geometry.Lattice, "within", classmethod(next_position)),
    "factors are forgotten": (branches.Branch, "folded", forgets_factors),
}


def training_error(groups, mutation=None):
    """Largest relative error of outputs and running statistics in training mode against the reference."""
    errors = []
    for kernel_size, mode in product((3, 4), MODES):
        torch.manual_seed(0)
        made = randomize(ReparamConv2d(8, 8, kernel_size, padding=1, groups=groups, branches=ALL, mode=mode, positions=64,
                                       dtype=torch.float64)).train()
        x = torch.randn(4, 8, 9, 8, dtype=torch.float64) + 1
        expected, stats = reference(made, x, sample_of(made, x) if mode == "online" else None)
        with applied(mutation):
            actual = made(x)
        errors += [relative_error(actual, expected), *(relative_error(made.state_dict()[key], value) for key, value in stats.items())]
    return max(errors)


@pytest.mark.parametrize("groups", [1, 4])
def test_unmutated_training(groups):
    assert training_error(groups) < 1e-12


@pytest.mark.parametrize("name", TRAINING_MUTATIONS)
def test_mutation_in_training_is_noticed(name):
    assert max(training_error(groups, TRAINING_MUTATIONS[name]) for groups in (1, 4)) > 1e-12
