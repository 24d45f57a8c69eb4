"""How the sum of a block's branches is run in training, with the statistics of the batch.

`exact` and `online` have the same parameters and the same running statistics; `linear` has one norm, behind the sum.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dbb.geometry import Lattice
from dbb.moments import Moments, Sample, Statistics, batch_moments, is_synchronized
from dbb.norms import NormedConv, track, uses_batch_statistics
from dbb.transforms import add_branches, offsets


def exact(block, x: Tensor, padded: Tensor) -> Tensor:
    """Every branch with the statistics of its whole map: the published training function.

    Branches with 1x1 kernels on the centre pixel share its moments with the inner norms, and run as one convolution: no map
    of theirs is kept. In a depthwise block every branch is one depthwise convolution, made again in backward instead of kept.

    Args:
        block: a `ReparamConv2d`.
        x: its input, `[N, C, H, W]`.
        padded: the same after `Geometry.pad`.

    Returns:
        `[N, O, H', W']`.
    """
    g, inner = block.geometry, _inner_moments(block, x)
    terms, centred = [], []
    for branch in block.branches.values():
        if g.depthwise and type(branch.bn) is nn.BatchNorm2d and uses_batch_statistics(branch.bn):
            terms.append(_made_again(branch, padded, inner))
        elif branch.window == "centre":
            centred.append(branch)
        else:
            terms.append(branch.bn(branch.response(padded, inner)))
    if centred:
        seen, folded = g.window(padded, "centre"), []
        moments = inner if inner is not None and seen is x else _moments_for(centred, seen, g.groups)
        for branch in centred:
            point = branch.point(inner)
            folded.append(branch.folded(point, _tracked(branch.bn, moments, point)))
        kernel, bias = add_branches(*zip(*folded, strict=True), (1, 1))
        terms.append(F.conv2d(seen, kernel, bias, groups=g.groups))
    return sum(terms[1:], terms[0])


def online(block, x: Tensor, padded: Tensor) -> Tensor:
    """One convolution, with the branches' variances over a lattice of about `block.positions` positions.

    Their means are those of the whole maps, which one pass over the input gives: half of what sampling costs in training loss
    (benchmarks/README.md).

    Arguments and result as `exact`, which is run where there are no more positions than that.
    """
    g = block.geometry
    height, width = g.positions(padded)
    synchronized = any(is_synchronized(norm) for norm in block.norms())  # processes must agree, whatever their share
    if len(x) * height * width <= block.positions and not synchronized:
        return exact(block, x, padded)
    return merged_online(block, x, padded)


def merged_online(block, x: Tensor, padded: Tensor) -> Tensor:
    """As `online`, whatever the number of positions."""
    g = block.geometry
    norm = next(norm for norm in block.norms() if uses_batch_statistics(norm))
    patches = g.patches(padded, Lattice.within(len(x), *g.positions(padded), block.positions))  # [G, n, C/G, KH, KW]
    mean = g.mean_patch(padded)
    if g.keeps_size:
        pixels = patches[..., (g.kernel_size[0] - 1) // 2, (g.kernel_size[1] - 1) // 2]
    else:
        pixels = Lattice.within(len(x), *x.shape[2:], block.positions).of(x).permute(0, 2, 3, 1).flatten(0, 2)  # [n, C]
        pixels = pixels.to(patches.dtype).unflatten(1, (g.groups, -1)).transpose(0, 1)
    inner = Sample(pixels, norm, pixels.mean(1, keepdim=True))  # of the input, for the norms behind a first 1x1 kernel
    parts = []
    for branch in block.branches.values():
        kernel = branch.kernel(inner) if branch.window is None else branch.point(inner)
        if branch.window == "average":
            seen = [part.mean((3, 4)) for part in (patches, mean)]
        else:
            (top, left), (h, w) = offsets(kernel.shape[2:], g.kernel_size), kernel.shape[2:]
            seen = [part[..., top:top + h, left:left + w].flatten(2) for part in (patches, mean)]
        kernel, bias = branch.folded(kernel, _tracked(branch.bn, Sample(seen[0], norm, seen[1]), kernel))
        parts.append((kernel if branch.window is None else branch.spread(kernel), bias))
    return g.conv(padded, *add_branches(*zip(*parts, strict=True), g.kernel_size))


def linear(block, x: Tensor, padded: Tensor) -> Tensor:
    """One convolution with the sum of the branches' kernels, each times its factors, and the block's norm (OREPA)."""
    kernel, _ = block.summed()
    return block.bn(block.geometry.conv(padded, kernel))


MODES = {"exact": exact, "online": online, "linear": linear}


def _inner_moments(block, x: Tensor) -> Moments | None:
    return _moments_for([branch for branch in block.branches.values() if hasattr(branch, "scale")], x, block.geometry.groups)


def _moments_for(branches, seen: Tensor, groups: int) -> Moments | None:
    """The moments of a map, if one of the branches is about to use them."""
    norms = [branch.bn for branch in branches if uses_batch_statistics(branch.bn)]
    return batch_moments(seen, groups, norms[0]) if norms else None


def _tracked(norm: nn.BatchNorm2d, source: Moments | Sample, kernel: Tensor) -> Statistics | None:
    """Statistics of what a kernel makes of the source, which the norm's running ones follow; None if it uses those."""
    if not uses_batch_statistics(norm):
        return None
    statistics = source.through(kernel)
    track(norm, statistics)
    return statistics


def _made_again(branch, padded: Tensor, inner: Moments | None) -> Tensor:
    """A branch and its norm in training, its map not kept for backward."""
    g, bn, kernel = branch.geometry, branch.bn, branch.kernel(inner)
    x, padding = g.aligned(padded, kernel.shape[2:])
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:  # which autocast leaves alone
        x, kernel = (part.to(torch.get_autocast_dtype(x.device.type)) for part in (x, kernel))  # since backward runs without
    out, mean, inverse = NormedConv.apply(x, kernel, bn.weight, bn.bias, bn.eps, (g.stride, padding, g.dilation, g.groups))
    track(bn, Statistics(mean, (inverse.pow(-2) - bn.eps).clamp_min(0), out.numel() // out.shape[1]))
    return out
