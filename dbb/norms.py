"""BatchNorm's rules, for where the block takes statistics itself instead of running the norm on a map."""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from dbb.moments import ONE_VALUE, Statistics


def uses_batch_statistics(norm: nn.Module) -> bool:
    """Whether a norm would normalise with the statistics of the batch, by BatchNorm's own rule.

    What libraries freeze norms into (timm's and torchvision's `FrozenBatchNorm2d`) is no BatchNorm, and never would.
    """
    return isinstance(norm, _BatchNorm) and (norm.training or norm.running_mean is None)


def running(norm: nn.Module) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """Mean, variance, weight, bias and epsilon of a norm that uses running statistics.

    Some frozen ones (DETR's) have their epsilon in their code. They are asked: of 1 they make `1 / sqrt(var + eps)`.

    Raises:
        ValueError: if it holds no such tensors.
    """
    try:
        if not hasattr(norm, "eps"):
            asked, var = copy.deepcopy(norm).to("cpu", torch.float64), 2.0 ** -40
            for key, tensor in asked.state_dict().items():
                tensor.fill_({"weight": 1, "running_var": var}.get(key, 0))
            norm.eps = float(asked(torch.ones(1, len(norm.weight), 1, 1, dtype=torch.float64)).mean()) ** -2 - var
        return norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps
    except AttributeError as error:
        raise ValueError(f"a block's norm was replaced by a {type(norm).__name__}, which is no BatchNorm ({error}): "
                         "replace norms before the blocks are put in") from error


def track(norm: nn.BatchNorm2d, statistics: Statistics) -> None:
    """Update running statistics as a norm that sees a map of these statistics does.

    Raises:
        ValueError: if they are those of one value, which has no variance (BatchNorm's rule).
    """
    if isinstance(statistics.count, int) and statistics.count < 2:
        raise ValueError(ONE_VALUE)
    if norm.training and norm.track_running_stats:
        with torch.no_grad():
            norm.num_batches_tracked += 1
            momentum = _momentum(norm, norm.num_batches_tracked)
            _average(norm.running_mean, statistics.mean, momentum)
            _average(norm.running_var, _unbiased(statistics), momentum)


def _momentum(norm: nn.BatchNorm2d, batches: Tensor) -> Tensor | float:
    return 1 / batches.double() if norm.momentum is None else norm.momentum


def _unbiased(statistics: Statistics) -> Tensor:
    return statistics.var * (statistics.count / (statistics.count - 1))


def _average(running: Tensor, value: Tensor, momentum: Tensor | float) -> None:
    running.copy_((1 - momentum) * running + momentum * value)


class PassedNorm(nn.Sequential):
    """What stays where a block took in a norm: what that did besides, which is mostly nothing.

    To code that folds a norm into the convolution before it (Ultralytics' `fuse`) it looks like a norm that changes nothing.

    Args:
        norm: the old one; its children are kept.
    """

    eps = 0.0

    def __init__(self, norm: nn.Module):
        super().__init__(*norm.children())
        self.num_features = norm.num_features
        self.register_buffer("where", norm.weight.new_empty(0), persistent=False)  # keeps device and type

    def _apply(self, fn, recurse=True):
        if self.where.is_meta:  # no file holds it, so that it may be the only tensor that is left there
            self.where = torch.empty(0, dtype=self.where.dtype, device="cpu")
        return super()._apply(fn, recurse)

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

    Its shift moves the padded map by a constant, which the outer norm subtracts again, so it has none. It has no mode
    of its own either: momentum, mode and process group are those of the branch's outer norm, so that freezing norms,
    `update_bn` or SyncBatchNorm reach both.
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

    def forward(self, first: Tensor, norm: nn.BatchNorm2d, moments) -> Tensor:
        """Compute the factors `[M]` for the map `first * x`, and update `running_var` as `norm` is going to.

        Args:
            first: 1x1 kernel `[M, I/G, 1, 1]`.
            norm: the branch's outer one, which has not seen this batch yet.
            moments: the batch's `Moments` or `Sample`, used if `norm` uses batch statistics.
        """
        if moments is None or not uses_batch_statistics(norm):
            return self.weight * (self.running_var + self.eps).rsqrt()
        statistics = moments.through(first)
        if norm.training and norm.track_running_stats:
            with torch.no_grad():
                _average(self.running_var, _unbiased(statistics), _momentum(norm, norm.num_batches_tracked + 1))
        return self.weight * (statistics.var + self.eps).rsqrt().to(self.weight.dtype)


class NormedConv(torch.autograd.Function):
    """A convolution and the norm on it, with the statistics of the batch: keeps its input, and makes the map again in backward.

    Worth it where a convolution costs less than keeping its result: in depthwise blocks, which have three of them.

    Arguments: `x` `[N, C, H, W]`, `kernel` `[O, C/G, KH, KW]`, the norm's `weight` and `bias` `[O]`, `eps`, and the `conv`
    arguments (stride, padding, dilation, groups). Returns the normalised map, and its mean and 1 / sqrt(var + eps) `[O]`.
    """

    @staticmethod
    def forward(ctx, x, kernel, weight, bias, eps, conv):
        out, mean, inverse = torch.native_batch_norm(F.conv2d(x, kernel, None, *conv), weight, bias, None, None, True, 0.0, eps)
        ctx.save_for_backward(x, kernel, weight, mean, inverse)
        ctx.eps, ctx.conv = eps, conv
        ctx.mark_non_differentiable(mean, inverse)
        return out, mean, inverse

    @staticmethod
    def backward(ctx, d_out, _, __):
        x, kernel, weight, mean, inverse = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.conv
        z = F.conv2d(x, kernel, None, *ctx.conv)
        d_z, d_weight, d_bias = torch.ops.aten.native_batch_norm_backward(
            d_out, z, weight, None, None, mean, inverse, True, ctx.eps, [True, True, True])
        d_x, d_kernel, _ = torch.ops.aten.convolution_backward(
            d_z.to(x.dtype), x, kernel, None, stride, padding, dilation, False, [0, 0], groups, [*ctx.needs_input_grad[:2], False])
        return d_x, d_kernel, d_weight, d_bias, None, None
