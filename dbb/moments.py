"""Second moments of a batch: all that the inner norms of a block need of their feature maps.

The batch variance of `u = W x` is `diag(W Cov(x) W^T)`, so one Gram matrix of the block's input serves every
inner norm, and no intermediate map is computed or kept.
"""

from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, distributed
from torch.distributed.nn.functional import all_reduce


class Moments(NamedTuple):
    """Biased covariance within each group, `[G, C/G, C/G]`, and the number of positions it was taken over."""

    covariance: Tensor
    count: Tensor | int


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


def batch_moments(x: Tensor, groups: int, sync: bool = False, process_group=None) -> Moments:
    """Covariance of a batch over images and positions, differentiable, at least in float32.

    Args:
        x: `[N, C, H, W]`.
        groups: channels are only correlated within their group.
        sync: whether to take it over all processes of `process_group`, as SyncBatchNorm does.
        process_group: None stands for all.

    Raises:
        ValueError: if there is one position only, whose variance is not defined (BatchNorm's rule).
    """
    with full_precision(x.device):
        x = x.to(torch.promote_types(x.dtype, torch.float32)).transpose(0, 1).flatten(1)  # [C, N*H*W]
        total, count = x.sum(1, keepdim=True), x.shape[1]
        if sync and distributed.is_initialized():
            total, count = all_reduce(total, group=process_group), x.new_tensor(float(count))
            distributed.all_reduce(count, group=process_group)
        elif count == 1:
            raise ValueError("expected more than 1 value per channel when training; use a larger batch")
        # Centred before the product: E[xx'] - mm' cancels catastrophically for channels with a large mean.
        x = (x - total / count).reshape(groups, -1, x.shape[1])
        gram = x.square().sum(2, keepdim=True) if x.shape[1] == 1 else x @ x.mT
        if sync and distributed.is_initialized():
            gram = all_reduce(gram, group=process_group)
        return Moments(gram / count, count)
