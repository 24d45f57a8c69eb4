"""Convolutions with a backward of their own: they keep less, or launch less, than torch's with a norm."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from dbb.moments import autocast_kind, over_processes, wide, without_autocast
from dbb.rows import in_order, unstacked


def in_format_of(x: Tensor, kernel: Tensor) -> Tensor:
    """The kernel in a memory format that leaves the map in its own: a channels_last kernel turns a map."""
    if not x.is_contiguous() or not kernel.is_contiguous(memory_format=torch.channels_last):
        return kernel
    return kernel.contiguous().view(-1).view(kernel.shape)  # a single channel's strides mean either


def as_autocast(*parts: Tensor) -> list[Tensor]:
    """In the type that autocast gives to a convolution: a backward of one's own runs without autocast."""
    kind = autocast_kind(parts[0].device)
    if not torch.is_autocast_enabled(kind) or parts[0].dtype == torch.float64:  # which autocast leaves alone
        return list(parts)
    return [part.to(torch.get_autocast_dtype(kind)) for part in parts]


def _gradients(d_y: Tensor, x: Tensor, kernel: Tensor, conv: tuple, needed: Sequence[bool]) -> list[Tensor]:
    """Of a convolution's input and kernel, where needed; `conv` as in `CentredConv`."""
    stride, padding, dilation, groups = conv
    return torch.ops.aten.convolution_backward(
        d_y.to(x.dtype), x, kernel, None, stride, padding, dilation, False, [0, 0], groups,
        [*needed, False])[:2]


def bias_for_mean(wanted: Tensor, kernel: Tensor, mean: Tensor) -> Tensor:
    """The bias `[O]` by which a convolution's map has the mean `wanted` `[G, O/G, 1]`; others as below."""
    rows = kernel.to(mean.dtype).reshape(len(mean), -1, mean.shape[1])
    return torch.baddbmm(wanted, rows, mean, alpha=-1).flatten()


class CentredConv(Function):
    """A convolution with the bias that gives its map the mean `beta.sum(1)`, as the norms of its branches do.

    Arguments: `x` `[N, C, H, W]`; `kernel` `[O, C/G, KH, KW]`; `beta` `[G, B, O/G]`; constant `mean` of what
    the kernel sees, `[G, C/G * KH * KW, 1]`; `conv` (stride, padding, dilation, groups); process group.

    The map's mean does not depend on `x` and the kernel. So their gradients are those of a convolution
    without a bias, for a gradient of the map that is centred.
    """

    @staticmethod
    def forward(ctx, x, kernel, beta, mean, conv, group):
        ctx.save_for_backward(x, kernel)
        ctx.conv, ctx.group, ctx.beta = conv, group, beta.shape
        with without_autocast(x.device):
            bias = bias_for_mean(beta.sum(1, dtype=mean.dtype)[..., None], kernel, mean)
        return F.conv2d(x, kernel, bias.to(x.dtype), *conv)

    @staticmethod
    def backward(ctx, d_y):
        x, kernel = ctx.saved_tensors
        count = d_y.numel() // d_y.shape[1]
        d_beta = total = d_y.sum((0, 2, 3), dtype=wide(d_y.dtype))
        if ctx.group is not None:
            total, positions = over_processes(ctx.group, total, total.new_tensor([count]))
            total, count = total / positions, 1
        centred = torch.sub(d_y, total.to(d_y.dtype)[:, None, None], alpha=1 / count)
        d_x, d_kernel = _gradients(centred, x, kernel, ctx.conv, ctx.needs_input_grad[:2])
        groups, branches, _ = ctx.beta
        d_beta = d_beta.view(groups, 1, -1).repeat(1, branches, 1)  # each has a gradient of its own
        return d_x, d_kernel, d_beta, None, None, None


class NormedConv(Function):
    """A convolution and the norm on it, with batch statistics: keeps its input, and makes the map again.

    Worth it where a convolution costs less than keeping its result: in depthwise blocks, and for 1x1 kernels.

    Arguments: `x` `[N, C, H, W]`; `kernel` `[O, C/G, KH, KW]`; the norm's weight and bias, running mean and
    variance (moved as the norm does), `[O]`, momentum and eps; `conv` (stride, padding, dilation, groups).
    """

    @staticmethod
    def forward(ctx, x, kernel, weight, bias, running_mean, running_var, momentum, eps, conv):
        seen, seen_conv = _seen(x, kernel, conv)
        z = F.conv2d(seen, kernel, None, *seen_conv)
        running = running_mean, running_var
        out, mean, inverse = torch.native_batch_norm(z, weight, bias, *running, True, momentum, eps)
        ctx.save_for_backward(x, kernel, weight, mean, inverse)
        ctx.eps, ctx.conv = eps, conv
        return out

    @staticmethod
    def backward(ctx, d_out):
        x, kernel, weight, mean, inverse = ctx.saved_tensors
        seen, conv = _seen(x, kernel, ctx.conv)
        z = F.conv2d(seen, kernel, None, *conv)
        d_z, d_weight, d_bias = torch.ops.aten.native_batch_norm_backward(
            d_out, z, weight, None, None, mean, inverse, True, ctx.eps, [True, True, True])
        d_x, d_kernel = _gradients(d_z, seen, kernel, conv, ctx.needs_input_grad[:2])
        if seen.shape != x.shape and d_x is not None:
            (rows, columns), *_ = ctx.conv
            d_seen, d_x = d_x, torch.zeros_like(x)
            d_x[:, :, ::rows, ::columns] = d_seen
        return d_x, d_kernel, d_weight, d_bias, *[None] * 5


def _seen(x: Tensor, kernel: Tensor, conv: tuple) -> tuple[Tensor, tuple]:
    """Of a 1x1 kernel with a stride, a map of the pixels that it sees, and `conv` on that; else as they are.

    Torch's gradients with a stride take twice as long on a CPU.
    """
    (rows, columns), padding, dilation, groups = conv
    if kernel.shape[2:] != (1, 1) or rows * columns == 1 or groups > 1 or any(padding):
        return x, conv
    return x[:, :, ::rows, ::columns].clone(), ((1, 1), padding, dilation, groups)


class StackedConv(Function):
    """One convolution with the kernels of several branches, to `[N, G * B * O/G, H', W']`.

    Arguments: `x` `[N, C, H, W]`; `conv` (stride, padding, dilation, groups); kernels `[O, C/G, KH, KW]`. It
    keeps `x` and the kernels, not their stack: a kernel is a parameter mostly, which is there anyway.
    """

    @staticmethod
    def forward(ctx, x, conv, *kernels):
        ctx.save_for_backward(x, *kernels)
        ctx.conv = conv
        return F.conv2d(x, in_format_of(x, in_order(kernels, conv[3])), None, *conv)

    @staticmethod
    def backward(ctx, d_y):
        x, *kernels = ctx.saved_tensors
        groups = ctx.conv[3]
        stack = in_format_of(x, in_order(kernels, groups))
        d_x, d_stack = _gradients(d_y, x, stack, ctx.conv, [ctx.needs_input_grad[0], True])
        if groups == 1:
            parts = d_stack.chunk(len(kernels))
            return d_x, None, *[part.to(kernel.dtype) for part, kernel in zip(parts, kernels, strict=True)]
        rows = d_stack.reshape(groups, len(kernels), -1, d_stack[0].numel())
        return d_x, None, *unstacked(rows, kernels, kernels[0].shape[2:])


class FixedConv(Function):
    """A convolution with a constant kernel, the same from both ends: unlike `F.conv2d` it keeps no input."""

    @staticmethod
    def forward(ctx, x, kernel, conv):
        ctx.kernel, ctx.size, ctx.conv = kernel, x.shape[2:], conv
        return F.conv2d(x, kernel, None, *conv)

    @staticmethod
    def backward(ctx, d_y):
        stride, padding, dilation, groups = ctx.conv
        kernel = ctx.kernel.to(d_y.dtype)
        reach = [d * (k - 1) for d, k in zip(dilation, kernel.shape[2:], strict=True)]
        around = [r - p for p, r in zip(padding, reach, strict=True)]
        if stride == (1, 1) and min(around) >= 0:  # the same as below, and faster on a CPU
            return F.conv2d(d_y, kernel, None, stride, around, dilation, groups), None, None
        rest = [(size + 2 * p - r - 1) % s
                for size, p, r, s in zip(ctx.size, padding, reach, stride, strict=True)]
        return F.conv_transpose2d(d_y, kernel, None, stride, padding, rest, groups, dilation), None, None
