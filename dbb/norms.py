"""BatchNorm's rules, for where the block takes statistics itself instead of running the norm on a map."""

import copy
from collections import defaultdict

import torch
from torch import Tensor, nn

from dbb.private import AnyBatchNorm, AnyNorm


def uses_batch_statistics(norm: nn.Module) -> bool:
    """Whether a norm would normalise with the statistics of the batch, by BatchNorm's own rule.

    What libraries freeze norms into (`FrozenBatchNorm2d` of several) is no BatchNorm, and never would. One
    that normalises in a way of its own (by image, or by parts of the batch) or has no gamma is a ValueError.
    """
    known = isinstance(norm, nn.SyncBatchNorm) or type(norm).forward is nn.BatchNorm2d.forward
    if isinstance(norm, AnyNorm) and not (known and norm.weight is not None):
        raise ValueError(f"a block's norm was replaced by {norm}: a block takes BatchNorm2d or SyncBatchNorm "
                         "with affine=True, or frozen norms; replace norms before the blocks are put in, and "
                         "quantize after reparameterize")
    return isinstance(norm, AnyBatchNorm) and (norm.training or norm.running_mean is None)


def running(norm: nn.Module) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """Mean, variance, weight, bias and epsilon of a norm that uses running statistics.

    Some (DETR's) have epsilon in their code. They are asked: of 1 they make `1 / sqrt(var + eps)`. What holds
    no such tensors is a ValueError.
    """
    try:
        if not hasattr(norm, "eps"):
            asked, var = copy.deepcopy(norm).to("cpu", torch.float64), 2.0 ** -40
            for key, tensor in asked.state_dict().items():
                tensor.fill_({"weight": 1, "running_var": var}.get(key, 0))
            ones = torch.ones(1, len(norm.weight), 1, 1, dtype=torch.float64, device="cpu")
            norm.eps = float(asked(ones).mean()) ** -2 - var
        # A copy: a training forward moves the mean in place, perhaps before this one's backward.
        return norm.running_mean.clone(), norm.running_var, norm.weight, norm.bias, norm.eps
    except AttributeError as error:
        raise ValueError(f"a block's norm was replaced by a {type(norm).__name__}, which is no BatchNorm "
                         f"({error}): replace norms before the blocks are put in") from error


@torch.no_grad()
def follow(norms: list[nn.BatchNorm2d], running: list[Tensor], values: list[Tensor]) -> None:
    """Move running statistics `[C]` towards those of a batch that the norms have yet to count."""
    moving = defaultdict(lambda: ([], []))
    for norm, tensor, value in zip(norms, running, values, strict=True):
        if not (norm.training and norm.track_running_stats):
            continue
        if norm.momentum is None:  # the mean of all batches
            momentum = 1 / (norm.num_batches_tracked + 1).double()
            tensor.lerp_(value.to(tensor.dtype), momentum.to(tensor.dtype))
        else:
            moving[norm.momentum][0].append(tensor)
            moving[norm.momentum][1].append(value.to(tensor.dtype))
    for momentum, (tensors, values) in moving.items():
        torch._foreach_lerp_(tensors, values, momentum)


def count_batch(norms: list[nn.BatchNorm2d]) -> None:
    """Count a batch, where a norm's running statistics have followed it."""
    moving = [norm for norm in norms if norm.training and norm.track_running_stats]
    counts = [norm.num_batches_tracked for norm in moving if norm.num_batches_tracked is not None]
    if counts:
        torch._foreach_add_(counts, 1)


class PassedNorm(nn.Sequential):
    """What stays where a block took in a norm: its children, that is what it did besides, mostly nothing.

    To code that folds norms (Ultralytics' `fuse`) it looks like a norm that changes nothing.
    """

    eps = 0.0

    def __bool__(self) -> bool:
        return True  # as a norm, though an empty Sequential is not

    def __init__(self, norm: nn.Module):
        super().__init__(*norm.children())
        self.num_features = norm.num_features
        self.register_buffer("where", norm.weight.new_empty(0), persistent=False)  # keeps device and type

    # No file holds it, so that it may be the only tensor that is left on meta.
    def _apply(self, fn, recurse=True):
        self._leave_meta()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        if local_metadata.get("assign_to_params_buffers"):  # the file's tensors take the place of all others
            self._leave_meta()

    def _leave_meta(self) -> None:
        if self.where.is_meta:
            self.where = torch.empty(0, dtype=self.where.dtype, device="cpu")

    @property
    def weight(self) -> Tensor:
        """One, `[C]`, as is `running_var`."""
        return self.where.new_ones(self.num_features)

    @property
    def bias(self) -> Tensor:
        """Zero, `[C]`, as is `running_mean`."""
        return self.where.new_zeros(self.num_features)

    running_var, running_mean = weight, bias


class Scale(nn.Module):
    """What is left of an inner BatchNorm: a factor per channel, `weight / sqrt(var + eps)`.

    A shift would move the padded map by a constant, which the outer norm subtracts again. Momentum, mode and
    process group are those of the branch's outer norm: freezing, `update_bn` or SyncBatchNorm reach both.
    """

    def __init__(self, channels: int, eps: float, device=None, dtype=None):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels, device=device, dtype=dtype))
        self.register_buffer("running_var", torch.ones(channels, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Weight and variance 1, for code that asks every module for that."""
        nn.init.ones_(self.weight)
        nn.init.ones_(self.running_var)

    def factors(self) -> Tensor:
        """With running statistics, `[M]`."""
        return self.weight * (self.running_var + self.eps).rsqrt()
