"""Statistics of a batch, also over several processes, in float32 at least."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, distributed, nn
from torch.autograd import Function
from torch.nn import functional as F

from dbb.private import any_autocast_enabled

ONE_VALUE = "expected more than 1 value per channel when training; use a larger batch"


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type of statistics: float32, or float64 for that."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast_kind(device: torch.device) -> str:
    """The name that autocast has for a device; it does not know `meta`."""
    return "cpu" if device.type == "meta" else device.type


def without_autocast(device: torch.device) -> AbstractContextManager:
    """For statistics and kernels, which are small and must be right. TF32 is as the user set it."""
    # Entering autocast takes as long as launching three operators.
    return torch.autocast(autocast_kind(device), enabled=False) if any_autocast_enabled() else nullcontext()


def process_group(norm: nn.Module):
    """The processes that a norm takes its statistics over, besides this one; None for itself alone."""
    if isinstance(norm, nn.SyncBatchNorm) and norm.training and distributed.is_initialized():
        return norm.process_group or distributed.group.WORLD
    return None


def over_processes(group, *parts: Tensor) -> list[Tensor]:
    """The sums of tensors over all processes of a group."""
    if group is None:
        return list(parts)
    flat = torch.cat([part.flatten() for part in parts])
    distributed.all_reduce(flat, group=group)
    totals = flat.split([part.numel() for part in parts])
    return [total.view_as(part) for total, part in zip(totals, parts, strict=True)]


def mean_over_processes(group, mean: Tensor, count: int) -> tuple[Tensor, Tensor | int]:
    """The mean of all values, from each process's mean of `count` ones, and their number."""
    if group is None:
        return mean, count
    total, count = over_processes(group, mean * count, mean.new_tensor([count]))
    return total / count, count


def covariance(x: Tensor, groups: int, group=None) -> tuple[Tensor, Tensor, Tensor | int]:
    """Mean and covariance of the channels of a batch, over images and positions, in float32 at least.

    Args:
        x: `[N, C, H, W]`.
        groups: channels are only correlated within their group; C for variances alone.
        group: the processes to take them over, see `process_group`.

    Returns:
        Mean `[G, C/G, 1]`; biased covariance `[G, C/G, C/G]`; the number of values.

    Raises:
        ValueError: if there is no position or one only, whose variance is not defined.
    """
    count = x.numel() // x.shape[1]
    if count < 2 and group is None:
        raise ValueError(ONE_VALUE)
    return _Covariance.apply(x, groups, group)


class _Covariance(Function):
    """Keeps nothing for backward but the map itself, which the convolution behind it keeps anyway."""

    @staticmethod
    def forward(ctx, x, groups, group):
        values, count, everywhere = x.to(wide(x.dtype)), x.numel() // x.shape[1], (0, 2, 3)
        average = Tensor.mean if count else Tensor.sum  # a process without images, beside others, has zeros
        with without_autocast(x.device):
            mean, total = mean_over_processes(group, average(values, everywhere), count)
            # Centred before the product: E[xx'] - mm' loses all digits of channels with a large mean.
            centred, channels = values - mean.view(-1, 1, 1), x.shape[1] // groups
            if channels == 1:
                gram = average(centred.square_(), everywhere).view(-1, 1, 1)
            elif x.is_contiguous() and x.shape[2] * x.shape[3] >= channels:
                rows = centred.view(len(x) * groups, channels, x.shape[2] * x.shape[3])
                grams = torch.bmm(rows, rows.mT).view(len(x), groups, channels, channels)
                gram = grams.sum(0) / max(1, count)
            else:  # images of few positions: one product over all of them
                rows = centred.transpose(0, 1).flatten(1).unflatten(0, (groups, -1))  # [G, C/G, N*H*W]
                gram = rows @ rows.mT / max(1, count)
            if group is not None:
                gram, = over_processes(group, gram * (count / total))
                ctx.mark_non_differentiable(total)
        mean = mean.view(groups, -1, 1)
        ctx.save_for_backward(x, mean)
        ctx.count, ctx.group = total, group
        return mean, gram, total

    @staticmethod
    def backward(ctx, d_mean, d_covariance, _):
        (x, mean), count = ctx.saved_tensors, ctx.count
        if ctx.group is not None:
            d_mean, d_covariance = (d / count for d in over_processes(ctx.group, d_mean, d_covariance))
            count = 1
        with without_autocast(x.device):
            rows = (d_covariance + d_covariance.mT) / count
            bias = torch.baddbmm(d_mean, rows, mean, beta=1 / count, alpha=-1).flatten()
            d_x = F.conv2d(x.to(mean.dtype), rows.flatten(0, 1)[:, :, None, None], bias, groups=len(mean))
        return d_x.to(x.dtype), None, None
