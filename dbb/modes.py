"""How the sum of a block's branches is run in training, with the statistics of the batch.

`exact` and `online` have the same parameters and running statistics; `linear` has one norm, behind the sum.
Statistics are taken, and running ones moved, here; branches only say what their kernels are.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dbb.branch import Branch
from dbb.convs import CentredConv, NormedConv, StackedConv, as_autocast, bias_for_mean, in_format_of
from dbb.geometry import Geometry
from dbb.moments import ONE_VALUE, covariance, mean_over_processes, process_group, without_autocast
from dbb.norms import count_batch, follow, uses_batch_statistics
from dbb.rows import CovarianceScale, SampledSum, ScaledSum, apart, beside, in_order, joined
from dbb.transforms import add_branches, embed_kernel


def exact(block, x: Tensor) -> Tensor:
    """Every branch with the statistics of its whole map: the published training function.

    What a norm behind a 1x1 kernel needs follows from the covariance of the block's input. So no map is made
    for an inner norm, and branches that are a 1x1 kernel on every pixel are one convolution. Those with a
    kernel as large as the block's are one too, and their norms are one.

    Args:
        block: a `ReparamConv2d`.
        x: its input, `[N, C, H, W]`.

    Returns:
        `[N, O, H', W']`.
    """
    g, (live, inner) = block.geometry, _taking_part(block)
    points = [b for b in live if b.window == "centre" and g.keeps_size and not g.depthwise]
    firsts, terms, variances, means = {}, [], [], []
    if inner or points:
        firsts, terms, variances, means = _by_covariance(g, x, inner, points)
    padded = g.pad(x)
    others = [branch for branch in block.branches.values() if branch not in points]
    alike = [branch for branch in others if _stacks(branch, padded, others[0].bn)]
    if len(alike) > 1:
        maps, of_means, of_variances = _normed_together(alike, padded, firsts)
        terms, means, variances = [*terms, *maps], [*means, *of_means], [*variances, *of_variances]
        others = [branch for branch in others if branch not in alike]
    else:
        alike = []
    _follow(inner, [*points, *alike], variances, means)  # before norms below count the batch
    terms += [_normed(branch, padded, firsts.get(branch)) for branch in others]
    return _summed(terms)


def _by_covariance(g: Geometry, x: Tensor, inner: list[Branch], points: list[Branch]) -> tuple:
    """What follows from the covariance of the input, with no map for a norm.

    Returns:
        By branch, its kernel in front of the inner norm, scaled by that; the map of all 1x1 branches in a
        list, which is empty where there are none; the variances of both kinds of norms; the means of the 1x1
        branches.
    """
    with without_autocast(x.device):
        mean, spread, count = covariance(x, g.groups, process_group([*inner, *points][0].bn))
        kernels = [branch.inner() for branch in inner] + [branch.point() for branch in points]
        rows = joined(kernels, g.groups).to(mean.dtype)
        norms = [branch.scale for branch in inner] + [branch.bn for branch in points]
        affine = _affine(norms, g.groups, mean.dtype)
        scaled, variance = CovarianceScale.apply(rows, *affine, spread)
        with torch.no_grad():
            variances = apart(variance * (count / (count - 1)), kernels)
            means = apart(torch.bmm(rows, mean)[..., 0], kernels)[len(inner):] if points else []
        scaled = _as_kernels(scaled, kernels)
    firsts = dict(zip(inner, scaled[:len(inner)], strict=True))
    if not points:
        return firsts, [], variances, means
    kernel, beta = (sum(parts[1:], parts[0]) for parts in
                    (scaled[len(inner):], [branch.bn.bias.to(mean.dtype) for branch in points]))
    with without_autocast(x.device):
        bias = bias_for_mean(beta.view(g.groups, -1, 1), kernel, mean)
    y = F.conv2d(x, kernel.to(x.dtype), bias.to(x.dtype), groups=g.groups)
    return firsts, [y], variances, means


def online(block, x: Tensor) -> Tensor:
    """One convolution, with the branches' variances over a lattice of about `block.positions` positions.

    Their means are those of the whole maps, which one pass over the input gives: sampled ones would double
    what sampling costs in training loss (benchmarks/README.md).

    Arguments and result as `exact`, which is run where there are no more positions than that, or all count.
    """
    if block.positions is None:
        return exact(block, x)
    height, width = block.geometry.positions(x, padded=False)
    alone = all(process_group(norm) is None for norm in block.norms())
    if alone and len(x) * height * width <= block.positions:  # several processes must decide alike
        return exact(block, x)
    return merged_online(block, x)


def merged_online(block, x: Tensor) -> Tensor:
    """As `online`, whatever the number of positions."""
    g, (live, inner) = block.geometry, _taking_part(block)
    group, firsts, variances = process_group(live[0].bn), {}, []
    with without_autocast(x.device):
        if inner and not g.keeps_size:
            x, pixels, _ = block.pixelwise.sample(x, block.positions)
        padded, sample, centre = g.sample(g.pad(x), block.positions)
        if sample.shape[2] < 2 and group is None:
            raise ValueError(ONE_VALUE)
        if inner:
            kernels = [branch.inner() for branch in inner]
            joint = joined(kernels, g.groups).flatten(0, 1)[..., None, None]
            gamma, eps = _affine([branch.scale for branch in inner], g.groups, sample.dtype)
            seen = centre if g.keeps_size else pixels
            scaled, variance, _ = SampledSum.apply(gamma[:, None], eps, seen, group, (1, 1), joint)
            firsts = dict(zip(inner, _as_kernels(scaled, kernels), strict=True))
            variances += apart(variance[:, 0], kernels)
        kernels = [branch.kernel(firsts.get(branch)) for branch in live]
        norms = [branch.bn for branch in live]
        weights = torch.stack([norm.weight for norm in norms] + [norm.bias for norm in norms])
        weights = weights.unflatten(1, (g.groups, -1)).split(len(norms))
        gamma, beta = (part.transpose(0, 1) for part in weights)
        affine = gamma.to(sample.dtype), _epsilon(beside, norms, g.groups, sample.dtype)
        kernel, variance, rows = SampledSum.apply(*affine, sample, group, g.kernel_size, *kernels)
        with torch.no_grad():
            count = len(x) * math.prod(g.positions(padded))
            mean, _ = mean_over_processes(group, g.mean_window(padded), count)
            means = torch.bmm(rows.flatten(1, 2), mean).view(variance.shape)
            statistics = torch.stack([variance.transpose(0, 1), means.transpose(0, 1)]).flatten(2)
            _follow(inner, live, [*variances, *statistics[0]], list(statistics[1]))
    y = _centred(g, padded, kernel.reshape(g.out_channels, -1, *g.kernel_size), beta, mean, group)
    frozen = [branch.equivalent() for branch in block.branches.values() if branch not in live]
    return y + g.conv(padded, *add_branches(*zip(*frozen, strict=True), g.kernel_size)) if frozen else y


def linear(block, x: Tensor) -> Tensor:
    """One convolution with the sum of the kernels, each times its factors, and the block's norm (OREPA)."""
    g = block.geometry
    with without_autocast(x.device):
        branches = block.branches.values()
        scale = beside([branch.affine()[0] for branch in branches], g.groups)
        kernel = ScaledSum.apply(scale, g.kernel_size, *[branch.kernel() for branch in branches])
        kernel = kernel.reshape(g.out_channels, -1, *g.kernel_size)
    return block.bn(g.conv(g.pad(x), kernel.to(x.dtype)))


MODES = {"exact": exact, "online": online, "linear": linear}


def _taking_part(block) -> tuple[list[Branch], list[Branch]]:
    """The branches whose norm uses the batch's statistics, and those of them that have an inner norm too."""
    live = [branch for branch in block.branches.values() if uses_batch_statistics(branch.bn)]
    return live, [branch for branch in live if branch.scale is not None]


def _affine(norms: list[nn.Module], groups: int, dtype) -> tuple[Tensor, Tensor | float]:
    """The gammas of norms in the order of `joined` rows, and their epsilon."""
    return joined([norm.weight for norm in norms], groups).to(dtype), _epsilon(joined, norms, groups, dtype)


def _epsilon(arrange: Callable, norms: list[nn.Module], groups: int, dtype) -> Tensor | float:
    """The epsilon of norms: one number, or one a row."""
    if len({norm.eps for norm in norms}) == 1:
        return norms[0].eps
    return arrange([torch.full_like(norm.weight, norm.eps) for norm in norms], groups).to(dtype)


def _as_kernels(joint: Tensor, kernels: list[Tensor]) -> list[Tensor]:
    """What has become of 1x1 kernels in rows, in their own shape and type."""
    parts = zip(apart(joint[..., None, None], kernels), kernels, strict=True)
    return [part.to(kernel.dtype) for part, kernel in parts]


def _follow(inner: list[Branch], outer: list[Branch], variances: list[Tensor], means: list[Tensor]) -> None:
    """Move running statistics: variances of the inner norms, then of the outer ones, and the outer means."""
    running = [branch.scale.running_var for branch in inner] + [branch.bn.running_var for branch in outer]
    running += [branch.bn.running_mean for branch in outer]
    follow([branch.bn for branch in [*inner, *outer, *outer]], running, variances + means)
    count_batch([branch.bn for branch in outer])


def _centred(g: Geometry, x: Tensor, kernel: Tensor, beta: Tensor, mean: Tensor, group) -> Tensor:
    """A convolution whose map has the mean that norms give it; the last three as in `CentredConv`."""
    x, padding = g.aligned(x, kernel.shape[2:])
    conv = g.stride, padding, g.dilation, g.groups
    x, kernel = as_autocast(x, kernel.to(x.dtype))
    return CentredConv.apply(x, kernel, beta, mean, conv, group)


def _normed(branch: Branch, padded: Tensor, first: Tensor | None) -> Tensor:
    """A branch and its norm. Its map is made again in backward where that costs less than keeping it."""
    g, bn = branch.geometry, branch.bn
    cheap = g.depthwise or branch.window == "centre"
    if not cheap or type(bn) is not nn.BatchNorm2d or not uses_batch_statistics(bn) or bn.momentum is None:
        return bn(branch.response(padded, first))
    if len(padded) * math.prod(g.positions(padded)) < 2:
        raise ValueError(ONE_VALUE)
    running = None, None
    if bn.track_running_stats:
        running = bn.running_mean, bn.running_var
        count_batch([bn])
    kernel = branch.kernel(first)
    x, padding = g.aligned(padded, kernel.shape[2:])
    conv = g.stride, padding, g.dilation, g.groups
    x, kernel = as_autocast(x, in_format_of(x, kernel))
    return NormedConv.apply(x, kernel, bn.weight, bn.bias, *running, bn.momentum, bn.eps, conv)


def _stacks(branch: Branch, padded: Tensor, like: nn.Module) -> bool:
    """Whether a branch has a kernel as large as the block's, and a norm that can be one with others'."""
    g, bn = branch.geometry, branch.bn
    return padded.numel() > 0 and branch.window is None and not g.depthwise and branch.is_composed(padded) \
        and type(bn) is nn.BatchNorm2d and uses_batch_statistics(bn) and bn.eps == like.eps


def _normed_together(branches: list[Branch], padded: Tensor,
                     firsts: dict[Branch, Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Of several branches, by one convolution and one norm: maps to add, and means and variances, `[O]`."""
    g, norms = branches[0].geometry, [branch.bn for branch in branches]
    x, padding = g.aligned(padded, g.kernel_size)
    # A user's branch may have a smaller kernel than it says by `window`.
    kernels = [embed_kernel(branch.kernel(firsts.get(branch)), g.kernel_size) for branch in branches]
    x, *kernels = as_autocast(x, *kernels)
    maps = StackedConv.apply(x, (g.stride, padding, g.dilation, g.groups), *kernels)
    weight, bias = (in_order([getattr(norm, key) for norm in norms], g.groups) for key in ("weight", "bias"))
    running = weight.new_zeros(2, len(weight))  # with momentum 1 they become the batch's
    maps = F.batch_norm(maps, *running, weight, bias, True, 1.0, norms[0].eps)
    means, variances = running.view(2, g.groups, len(norms), -1).transpose(1, 2).flatten(2).unbind()
    return _by_branch(maps, g.groups, len(norms)), list(means), list(variances)


def _by_branch(maps: Tensor, groups: int, branches: int) -> list[Tensor]:
    """`StackedConv`'s maps, one a branch; with groups, which come first, their sum alone."""
    if groups == 1:
        return list(maps.chunk(branches, 1))
    at = 1 if maps.is_contiguous() else 3  # so that gradients are stacked in the maps' memory format
    parts = maps.movedim(1, at).unflatten(at, (groups, branches, -1)).unbind(at + 1)
    return [_summed(parts).flatten(at, at + 1).movedim(at, 1)]


def _summed(maps: Sequence[Tensor]) -> Tensor:
    """The sum of maps: in pairs, as torch's `sum` is slow on a CPU, and in place of the first two's."""
    total = sum(maps[1:2], maps[0])
    for part in maps[2:]:
        total = total.add_(part) if total.dtype == part.dtype else total + part
    return total
