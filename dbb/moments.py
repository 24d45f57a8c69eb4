"""First and second moments of a batch: all that a norm needs of a map that is linear in another one.

The batch variance of `u = W x` is `diag(W Cov(x) W^T)`, so one Gram matrix of a block's input serves every inner norm and
every 1x1 branch, and their maps are neither computed nor kept.
"""

from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

ONE_VALUE = "expected more than 1 value per channel when training; use a larger batch"


class Statistics(NamedTuple):
    """Mean and biased variance of each channel, `[C]`, and the number of values they were taken over."""

    mean: Tensor
    var: Tensor
    count: Tensor | int


class Moments(NamedTuple):
    """What a map `[N, C, H, W]` tells of every map that a 1x1 kernel makes of it.

    Mean `[C]`, biased covariance within each group `[G, C/G, C/G]`, number of positions.
    """

    mean: Tensor
    covariance: Tensor
    count: Tensor | int

    def through(self, kernel: Tensor) -> Statistics:
        """Statistics of the map that a 1x1 kernel `[O, C/G, 1, 1]` makes."""
        groups, channels = self.covariance.shape[:2]
        with full_precision(kernel.device):
            rows = kernel.to(self.mean.dtype).reshape(groups, -1, channels)
            mean = (rows @ self.mean.reshape(groups, channels, 1)).flatten()
            return Statistics(mean, _Variance.apply(rows, self.covariance).flatten().clamp_min(0), self.count)


class _Variance(torch.autograd.Function):
    """`diag(W C W^T)` of rows `[G, O/G, C/G]` and covariances `[G, C/G, C/G]`; keeps no product of the two."""

    @staticmethod
    def forward(ctx, rows, covariance):
        ctx.save_for_backward(rows, covariance)
        return (rows @ covariance * rows).sum(-1)

    @staticmethod
    def backward(ctx, d_var):
        rows, covariance = ctx.saved_tensors
        weighted = rows * d_var[..., None]
        return 2 * weighted @ covariance, rows.mT @ weighted


class Sample(NamedTuple):
    """Likewise, of some positions: what a kernel sees there, `[G, n, K]`, K weights an output channel; `norm` as in `batch_moments`.

    `centre` is the mean of what it sees at all positions, `[G, 1, K]`.
    """

    rows: Tensor
    norm: nn.Module
    centre: Tensor

    def through(self, kernel: Tensor) -> Statistics:
        """Variance of what a kernel `[O, C/G, h, w]` makes of the positions, and its mean over all."""
        with full_precision(kernel.device):
            columns = kernel.to(self.rows.dtype).unflatten(0, (len(self.rows), -1)).flatten(2)  # [G, O/G, K]
            z = (self.rows @ columns.mT).transpose(0, 1).flatten(1)  # [n, O]
            mean = (self.centre @ columns.mT).flatten()
        if is_synchronized(self.norm):
            _, var, count = batch_moments(z[:, :, None, None], z.shape[1], self.norm)
            mean = mean[None, :, None, None][:len(z)]  # as many images in every process, or none
            mean = batch_moments(mean, z.shape[1], self.norm).mean
            return Statistics(mean, var.flatten(), count)
        return Statistics(mean, z.var(0, correction=0), len(z))


@contextmanager
def full_precision(device: torch.device):
    """Autocast and TF32 off: for statistics and kernels, which are small and must be right."""
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32


def batch_moments(x: Tensor, groups: int, norm: nn.Module) -> Moments:
    """Moments of a batch over images and positions, differentiable, at least in float32.

    Args:
        x: `[N, C, H, W]`.
        groups: channels are only correlated within their group; C for variances alone.
        norm: what they are for; a `nn.SyncBatchNorm` in training takes them over all processes of its group.

    Raises:
        ValueError: if there is no position or one only, whose variance is not defined.
    """
    synchronized, count = is_synchronized(norm), x.numel() // x.shape[1]
    if count < 2 and not synchronized:
        raise ValueError(ONE_VALUE)
    group = (norm.process_group or distributed.group.WORLD) if synchronized else None
    mean, covariance, total = _Moments.apply(x, groups, group)
    return Moments(mean, covariance, total if synchronized else count)


def is_synchronized(norm: nn.Module) -> bool:
    """Whether a norm takes its statistics over several processes."""
    return isinstance(norm, nn.SyncBatchNorm) and norm.training and distributed.is_initialized()


class _Moments(torch.autograd.Function):
    """Keeps nothing for backward but the map itself, which the convolution behind it keeps anyway."""

    @staticmethod
    def forward(ctx, x: Tensor, groups: int, group):
        with full_precision(x.device):
            ctx.group, wide = group, x.to(torch.promote_types(x.dtype, torch.float32))
            mean, count = wide.sum((0, 2, 3)), wide.new_tensor(x.numel() // x.shape[1])
            for part in (mean, count) if group is not None else ():
                distributed.all_reduce(part, group=group)
            mean = mean / count
            # Centred before the product: E[xx'] - mm' cancels catastrophically for channels with a large mean.
            centred = wide - mean[:, None, None]
            if groups == x.shape[1]:
                gram = centred.square().sum((0, 2, 3))[:, None, None]
            elif x.is_contiguous() and x.shape[2] * x.shape[3] * groups >= x.shape[1]:
                rows = centred.unflatten(1, (groups, -1)).flatten(3)  # [N, G, C/G, H*W]
                gram = (rows @ rows.mT).sum(0)
            else:  # images of few positions: one product over all of them
                rows = centred.transpose(0, 1).flatten(1).unflatten(0, (groups, -1))  # [G, C/G, N*H*W]
                gram = rows @ rows.mT
            if group is not None:
                distributed.all_reduce(gram, group=group)
        ctx.save_for_backward(x, mean, count)
        ctx.mark_non_differentiable(count)
        return mean, gram / count, count

    @staticmethod
    def backward(ctx, d_mean: Tensor, d_covariance: Tensor, _):
        x, mean, count = ctx.saved_tensors
        for part in (d_mean, d_covariance) if ctx.group is not None else ():
            distributed.all_reduce(part, group=ctx.group)
        centred = x.to(mean.dtype) - mean[:, None, None]
        kernel = (d_covariance + d_covariance.mT).flatten(0, 1)[:, :, None, None] / count
        return F.conv2d(centred, kernel, d_mean / count, groups=len(d_covariance)).to(x.dtype), None, None
