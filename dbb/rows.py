"""The kernels of all branches at once, as rows: normalised by how much their outputs vary, and added up.

A row is the kernel of one output channel of one branch. So rows are `[G, B, O/G, J]`: groups, branches,
output channels of the group, and weights, J = C/G * KH * KW. For any number of branches the arithmetic takes
as many operators.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import Function

from dbb.moments import over_processes, without_autocast
from dbb.transforms import embed_kernel, offsets


class SampledSum(Function):
    """The sum over branches of `kernel * gamma / sqrt(var + eps)`, var being that of responses to a sample.

    Arguments: gamma `[G, B, O/G]`; eps, a number or as gamma; sample `[G, J, n]`; process group; the kernels
    of the branches and their common size, see `stacked`.
    Returns the sum `[G, O/G, J]`; the unbiased variances `[G, B, O/G]` and the rows, not differentiable.

    With `s = gamma / sqrt(var + eps)`, z a normalised response and D the gradient of the sum:

        d_gamma = (D . row) / sqrt(var + eps)
        d_row = s D - (s d_gamma / n) z @ sample'
        d_sample = - rows' @ (s d_gamma / n) z

    Kernels are kept for backward, not their rows: most kernels are parameters, which are there anyway.
    """

    @staticmethod
    def forward(ctx, gamma, eps, sample, group, size, *kernels):
        with without_autocast(sample.device):
            rows = stacked(kernels, len(sample), size).to(sample.dtype)
            z, inverse, variance = _normalised(rows, sample, eps, group)
            scale = inverse * gamma
            ctx.save_for_backward(gamma, sample, z, inverse, scale, *kernels)
            ctx.eps, ctx.group, ctx.size = eps, group, size
            ctx.set_materialize_grads(False)
            ctx.mark_non_differentiable(variance, rows)
            return weighted(rows, scale), variance, rows

    @staticmethod
    def backward(ctx, d_sum, _, __):
        gamma, sample, z, inverse, scale, *kernels = ctx.saved_tensors
        if d_sum is None:
            return None, None, None, None, None, *[None] * len(kernels)
        with without_autocast(sample.device):
            rows = stacked(kernels, len(sample), ctx.size).to(sample.dtype)
            if torch.is_grad_enabled():  # to be differentiated again: these three depend on the rest
                z, inverse, _ = _normalised(rows, sample, ctx.eps, ctx.group)
                scale = inverse * gamma
            d_gamma, count = inverse * dots(rows, d_sum), sample.shape[2]
            factor = scale * d_gamma
            if ctx.group is not None:
                factor, total = over_processes(ctx.group, factor, factor.new_tensor([count]))
                factor, count = factor / total, 1
            d_z = z * factor.flatten(1)[..., None]
            through_scale = (scale[..., None] * d_sum[:, None]).flatten(1, 2)
            d_rows = torch.baddbmm(through_scale, d_z, sample.mT, alpha=-1 / count).view_as(rows)
            d_sample = None
            if ctx.needs_input_grad[2]:  # with beta=0 the first argument is not read
                d_sample = torch.baddbmm(sample, rows.flatten(1, 2).mT, d_z, beta=0, alpha=-1 / count)
            return d_gamma, None, d_sample, None, None, *unstacked(d_rows, kernels, ctx.size)


class ScaledSum(Function):
    """The sum over branches of `scale * kernel`, `[G, O/G, J]`. Arguments as of `SampledSum`, which see."""

    @staticmethod
    def forward(ctx, scale, size, *kernels):
        ctx.save_for_backward(scale, *kernels)
        ctx.size = size
        return weighted(stacked(kernels, len(scale), size).to(scale.dtype), scale)

    @staticmethod
    def backward(ctx, d_sum):
        scale, *kernels = ctx.saved_tensors
        with without_autocast(scale.device):
            rows = stacked(kernels, len(scale), ctx.size).to(scale.dtype)
            d_rows = scale[..., None] * d_sum[:, None]
            d_scale = dots(rows, d_sum).transpose(0, 1).contiguous()  # a branch's in one piece of memory
            return d_scale.transpose(0, 1), None, *unstacked(d_rows, kernels, ctx.size)


def _normalised(rows: Tensor, sample: Tensor, eps: float, group) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised responses `[G, B * O/G, n]`; 1 / sqrt(var + eps) and unbiased variance `[G, B, O/G]`."""
    z, shape, count = torch.bmm(rows.flatten(1, 2), sample), rows.shape[:3], sample.shape[2]
    if group is None and isinstance(eps, float) and not torch.is_grad_enabled():
        mean, variance = z.new_zeros(2, z.numel() // count)  # with momentum 1 they become the batch's
        running = mean, variance, True, 1.0
        out, _, inverse = torch.native_batch_norm(z.view(1, -1, count), None, None, *running, eps)
        return out.view_as(z), inverse.view(shape), variance.view(shape)
    total, count = over_processes(group, z.sum(2), z.new_tensor([count]))
    z = z - (total / count)[..., None]
    squares, = over_processes(group, z.square().sum(2))
    inverse = (squares.view(shape) / count + eps).rsqrt()
    return z * inverse.flatten(1)[..., None], inverse, squares.view(shape) / (count - 1)


class CovarianceScale(Function):
    """As `SampledSum` for 1x1 kernels of one branch, by the covariance of what they see.

    Arguments: rows `[G, M/G, C/G]`, see `joined`; gamma `[G, M/G]`; eps, a number or as gamma; covariance
    `[G, C/G, C/G]`.
    Returns rows, and the biased variances `[G, M/G]`, which are not differentiable.
    """

    @staticmethod
    def forward(ctx, rows, gamma, eps, covariance):
        with without_autocast(rows.device):
            products, inverse, variance = _varied(rows, covariance, eps)
            scale = inverse * gamma
            ctx.save_for_backward(rows, gamma, covariance, products, inverse, scale)
            ctx.eps = eps
            ctx.set_materialize_grads(False)
            ctx.mark_non_differentiable(variance)
            return scale[..., None] * rows, variance

    @staticmethod
    def backward(ctx, d_scaled, _):
        if d_scaled is None:
            return None, None, None, None
        rows, gamma, covariance, products, inverse, scale = ctx.saved_tensors
        with without_autocast(rows.device):
            if torch.is_grad_enabled():
                products, inverse, _ = _varied(rows, covariance, ctx.eps)
                scale = inverse * gamma
            products_of_rows = torch.bmm(rows.flatten(0, 1)[:, None], d_scaled.flatten(0, 1)[..., None])
            d_gamma = inverse * products_of_rows.view_as(inverse)
            factor = (scale * inverse * d_gamma)[..., None]  # -2 d_var
            d_rows = torch.addcmul(scale[..., None] * d_scaled, factor, products, value=-1)
            d_covariance = torch.baddbmm(covariance, rows.mT, factor * rows, beta=0, alpha=-0.5)
            return d_rows, d_gamma, None, d_covariance


def _varied(rows: Tensor, covariance: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Products `rows @ covariance`, 1 / sqrt(var + eps) and var, `[G, M/G]`."""
    products = torch.bmm(rows, covariance)
    variance = (products * rows).sum(2).clamp_min(0)
    return products, (variance + eps).rsqrt(), variance


def weighted(rows: Tensor, scale: Tensor) -> Tensor:
    """The sum over branches of `scale * row`."""
    if rows.shape[1] == 1:
        return (scale[..., None] * rows).squeeze(1)
    scale = scale.transpose(1, 2).reshape(-1, 1, rows.shape[1])
    return torch.bmm(scale, rows.transpose(1, 2).flatten(0, 1)).view(len(rows), *rows.shape[2:])


def dots(rows: Tensor, d_sum: Tensor) -> Tensor:
    """Products of every row with the gradient of their sum `[G, O/G, J]`."""
    products = torch.bmm(rows.transpose(1, 2).flatten(0, 1), d_sum.reshape(-1, d_sum.shape[2], 1))
    return products.view(len(rows), -1, rows.shape[1]).transpose(1, 2)


def stacked(kernels: Sequence[Tensor], groups: int, size: tuple[int, int]) -> Tensor:
    """Kernels `[O, C/G, h, w]` of several branches, embedded in `size`, as rows `[G, B, O/G, J]`."""
    parts = [embed_kernel(kernel, size).unflatten(0, (groups, -1)) for kernel in kernels]
    return (parts[0][:, None] if len(parts) == 1 else torch.stack(parts, 1)).flatten(3)


def unstacked(rows: Tensor, kernels: Sequence[Tensor], size: tuple[int, int]) -> list[Tensor]:
    """The gradients of kernels, from those of what `stacked` made of them."""
    parts = []
    for part, kernel in zip(rows.transpose(0, 1).contiguous(), kernels, strict=True):
        part = part.reshape(len(kernel), -1, *size)
        if kernel.shape[2:] != size:
            (top, left), (height, width) = offsets(kernel.shape[2:], size), kernel.shape[2:]
            part = part[:, :, top:top + height, left:left + width].contiguous()
        parts.append(part.to(kernel.dtype))
    return parts


def beside(vectors: Sequence[Tensor], groups: int) -> Tensor:
    """Vectors `[O]` of several branches in the order of their rows, `[G, B, O/G]`."""
    return torch.stack(vectors).unflatten(1, (groups, -1)).transpose(0, 1)


def in_order(parts: Sequence[Tensor], groups: int) -> Tensor:
    """Kernels `[O, C/G, KH, KW]` or vectors `[O]` of several branches in one, in the order of their rows."""
    if groups == 1:
        return torch.cat(parts)
    return torch.stack([part.unflatten(0, (groups, -1)) for part in parts], 1).flatten(0, 2)


def joined(parts: Sequence[Tensor], groups: int) -> Tensor:
    """Of kernels `[M, C/G, 1, 1]` or vectors `[M]`, for any M: one tensor, `[G, M/G, C/G]` or `[G, M/G]`."""
    parts = [part.reshape(groups, -1, *part.shape[1:2]) for part in parts]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def apart(joint: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The parts of what `joined` made of kernels like these, or their vectors: `[M, ...]`."""
    if len(joint) == 1 < len(like):
        return list(joint.flatten(0, 1).split([len(part) for part in like]))
    parts = [joint] if len(like) == 1 else joint.split([len(part) // len(joint) for part in like], 1)
    return [part.flatten(0, 1) for part in parts]
