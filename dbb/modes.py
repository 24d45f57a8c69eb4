"""How the sum of a block's branches is run in training, with the statistics of the batch.

`exact` and `online` have the same parameters and the same running statistics; `linear` has one norm, behind the sum.
"""

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dbb.geometry import Lattice
from dbb.moments import Moments, batch_moments, full_precision
from dbb.norms import NormedConv, track, uses_batch_statistics
from dbb.transforms import add_branches, embed_kernel, offsets


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
            folded.append(branch.folded(point, *_statistics(branch, moments, point)))
        kernel, bias = add_branches(*zip(*folded, strict=True))
        terms.append(F.conv2d(seen, kernel, bias, groups=g.groups))
    return sum(terms)


def online(block, x: Tensor, padded: Tensor) -> Tensor:
    """One convolution, with the branches' statistics over a lattice of about `block.positions` positions.

    Arguments and result as `exact`, which is run where there are no more positions than that.
    """
    g = block.geometry
    height, width = g.positions(padded)
    if len(x) * height * width <= block.positions:
        return exact(block, x, padded)
    return merged_online(block, x, padded)


def merged_online(block, x: Tensor, padded: Tensor) -> Tensor:
    """As `online`, whatever the number of positions."""
    g = block.geometry
    lattice = Lattice.within(len(x), *g.positions(padded), block.positions)
    inner = _inner_moments(block, Lattice.within(len(x), *x.shape[2:], block.positions).of(x))
    patches = g.patches(padded, lattice)  # [n, C, KH, KW]
    with full_precision(x.device):
        patches = patches.to(torch.promote_types(patches.dtype, torch.float32))
        rows = patches.unflatten(1, (g.groups, -1)).transpose(0, 1).contiguous()  # [G, n, C/G, KH, KW]
    centre = [(k - 1) // 2 for k in g.kernel_size]

    @cache
    def window_moments(window: str) -> Moments:
        seen = patches.mean((2, 3)) if window == "average" else patches[:, :, centre[0], centre[1]]
        return _moments_for([b for b in block.branches.values() if b.window == window], seen[:, :, None, None], g.groups)

    def parts():
        for branch in block.branches.values():
            if branch.window is not None:
                point = branch.point(inner)
                kernel, bias = branch.folded(point, *_statistics(branch, window_moments(branch.window), point))
                yield embed_kernel(branch.spread(kernel), g.kernel_size), bias
                continue
            kernel = branch.kernel(inner)
            (top, left), (h, w) = offsets(kernel.shape[2:], g.kernel_size), kernel.shape[2:]
            with full_precision(x.device):
                columns = kernel.to(rows.dtype).unflatten(0, (g.groups, -1)).flatten(2)  # [G, O/G, C/G*h*w]
                z = (rows[..., top:top + h, left:left + w].flatten(2) @ columns.mT).transpose(0, 1).flatten(1)  # [n, O]
            moments = _moments_for([branch], z[:, :, None, None], g.out_channels)
            kernel, bias = branch.folded(kernel, *_statistics(branch, moments))
            yield embed_kernel(kernel, g.kernel_size), bias

    return g.conv(padded, *add_branches(*zip(*parts(), strict=True)))


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


def _statistics(branch, moments: Moments | None, point: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
    """Mean and variance `[O]` of a branch's map, which its norm's running statistics follow; None for running ones.

    Args:
        branch: whose norm.
        moments: of the map itself, or of what the 1x1 kernel `point` sees.
        point: `[O, C/G, 1, 1]`.
    """
    if not uses_batch_statistics(branch.bn):
        return None, None
    mean, var = (moments.mean, moments.covariance.flatten()) if point is None else moments.through(point)
    track(branch.bn, mean, var, moments.count)
    return mean, var


def _made_again(branch, padded: Tensor, inner: Moments | None) -> Tensor:
    """A branch and its norm in training, its map not kept for backward."""
    g, bn, kernel = branch.geometry, branch.bn, branch.kernel(inner)
    x, padding = g.aligned(padded, kernel.shape[2:])
    if torch.is_autocast_enabled(x.device.type):  # backward runs without
        x, kernel = (part.to(torch.get_autocast_dtype(x.device.type)) for part in (x, kernel))
    out, mean, inverse = NormedConv.apply(x, kernel, bn.weight, bn.bias, bn.eps, (g.stride, padding, g.dilation, g.groups))
    track(bn, mean, inverse.pow(-2) - bn.eps, out.numel() // out.shape[1])
    return out
