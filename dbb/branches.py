"""The branches of a block: each computes one kernel from its parameters and has a BatchNorm of its own.

A new branch is a subclass with a name, its parameters and `kernel`; see `KxK`. Shapes as in `dbb.transforms`.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dbb.geometry import Geometry
from dbb.moments import Moments, full_precision
from dbb.transforms import average_kernel, embed_kernel, fuse_conv_norm, identity_kernel, merge_1x1_kxk

BRANCHES: dict[str, type["Branch"]] = {}


def uses_batch_statistics(norm: nn.BatchNorm2d) -> bool:
    """Whether a norm would normalise with the statistics of the batch, by BatchNorm's own rule."""
    return norm.training or norm.running_mean is None


class Branch(nn.Module):
    """`BN(conv(x, kernel))`.

    Args:
        geometry: the block's.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init_subclass__(cls, name: str, **kwargs):
        super().__init_subclass__(**kwargs)
        BRANCHES[name] = cls

    def __init__(self, geometry: Geometry, device=None, dtype=None):
        super().__init__()
        self.geometry = geometry
        self.bn = nn.BatchNorm2d(geometry.out_channels, device=device, dtype=dtype)

    @staticmethod
    def fits(geometry: Geometry) -> bool:
        """Whether the branch makes sense for a geometry; where not, a block leaves it out."""
        return True

    @staticmethod
    def taps(kh: int, kw: int) -> tuple[int, int]:
        """Height and width of the kernel in a block of KH x KW."""
        return kh, kw

    def kernel(self, moments: Moments | None = None) -> Tensor:
        """Compute the kernel `[O, I/G, h, w]`, differentiable; its centre tap lies on the block's.

        Args:
            moments: the batch's, for branches with an inner norm; None stands for running statistics.
        """
        raise NotImplementedError

    def response(self, x: Tensor, moments: Moments | None = None) -> Tensor:
        """The map that the norm sees, `[N, O, H', W']`, at the least cost. Overridden where that is not `kernel`."""
        return self.geometry.conv(x, self.kernel(moments))

    def drawn(self, x: Tensor) -> Tensor:
        """The same map in eval, layer by layer as the paper draws it: independent of how kernels are merged."""
        return self.response(x)

    def equivalent(self) -> tuple[Tensor, Tensor]:
        """Kernel `[O, I/G, KH, KW]` and bias `[O]` of the whole branch with its running statistics."""
        bn = self.bn
        kernel = embed_kernel(self.kernel(), self.geometry.kernel_size)
        return fuse_conv_norm(kernel, 0.0, bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.eps)


class KxK(Branch, name="kxk"):
    """A plain convolution."""

    def __init__(self, geometry: Geometry, device=None, dtype=None):
        super().__init__(geometry, device, dtype)
        size = self.taps(*geometry.kernel_size)
        self.weight = conv_weight(geometry.out_channels, geometry.in_channels // geometry.groups, size, device, dtype)

    def kernel(self, moments=None):
        return self.weight


class Pointwise(KxK, name="1x1"):
    """A 1x1 convolution on the centre tap."""

    @staticmethod
    def taps(kh, kw):
        return (1, 1)


class Horizontal(KxK, name="1xk"):
    """A convolution along the middle row (ACNet)."""

    @staticmethod
    def taps(kh, kw):
        return (1, kw)


class Vertical(KxK, name="kx1"):
    """A convolution along the middle column (ACNet)."""

    @staticmethod
    def taps(kh, kw):
        return (kh, 1)


class Identity(Branch, name="identity"):
    """The input itself (RepVGG, MobileOne)."""

    @staticmethod
    def fits(geometry):
        return geometry.in_channels == geometry.out_channels and geometry.stride == (1, 1)

    @staticmethod
    def taps(kh, kw):
        return 1, 1

    def kernel(self, moments=None):
        g, norm = self.geometry, self.bn.weight
        return identity_kernel(g.in_channels, g.groups, norm.dtype, norm.device)

    def response(self, x, moments=None):
        ones = torch.ones(self.geometry.in_channels, 1, 1, 1, dtype=x.dtype, device=x.device)
        return self.geometry.conv(x, ones, groups=len(ones))


class Average(Branch, name="avg"):
    """Average pooling, dilated where the block is."""

    @staticmethod
    def fits(geometry):
        return geometry.in_channels == geometry.out_channels

    def kernel(self, moments=None):
        g, norm = self.geometry, self.bn.weight
        return average_kernel(g.in_channels, g.kernel_size, g.groups, norm.dtype, norm.device)

    def response(self, x, moments=None):
        return average(self.geometry, x)


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

    def forward(self, first: Tensor, bn: nn.BatchNorm2d, moments: Moments | None) -> Tensor:
        """Compute the factors `[M]` for the map `first * x`, and update `running_var` as `bn` is going to.

        Args:
            first: 1x1 kernel `[M, I/G, 1, 1]`.
            bn: the branch's outer norm, not yet run on this batch.
            moments: the batch's, used if `bn` uses batch statistics.
        """
        if moments is None or not uses_batch_statistics(bn):
            return self.weight * (self.running_var + self.eps).rsqrt()
        covariance, count = moments
        rows = first.to(covariance.dtype).reshape(len(covariance), -1, covariance.shape[-1])  # [G, M/G, I/G]
        with full_precision(first.device):
            var = (rows @ covariance * rows).sum(-1).flatten().clamp_min(0)
        if bn.training and bn.track_running_stats:
            momentum = 1 / (bn.num_batches_tracked + 1).to(var) if bn.momentum is None else bn.momentum
            with torch.no_grad():
                unbiased = (var * (count / (count - 1))).to(self.running_var.dtype)
                self.running_var += momentum * (unbiased - self.running_var)
        return self.weight * (var + self.eps).rsqrt().to(self.weight.dtype)


class PointwiseKxK(Branch, name="1x1_kxk"):
    """1x1, inner norm, KxK. With as many internal as input channels the 1x1 kernel is `I + first`."""

    def __init__(self, geometry: Geometry, device=None, dtype=None):
        super().__init__(geometry, device, dtype)
        g, internal = geometry, geometry.internal_channels
        self.first = conv_weight(internal, g.in_channels // g.groups, (1, 1), device, dtype)
        if internal == g.in_channels:
            nn.init.zeros_(self.first)  # starts as the identity, and weight decay pulls towards it (DBB's code)
        self.scale = Scale(internal, self.bn.eps, device, dtype)
        self.second = conv_weight(g.out_channels, internal // g.groups, g.kernel_size, device, dtype)

    def pointwise(self) -> Tensor:
        """The 1x1 kernel, `[M, I/G, 1, 1]`."""
        if len(self.first) != self.geometry.in_channels:
            return self.first
        return self.first + identity_kernel(len(self.first), self.geometry.groups, self.first.dtype, self.first.device)

    def scaled(self, moments: Moments | None) -> Tensor:
        """The 1x1 kernel times the inner norm's factors, `[M, I/G, 1, 1]`."""
        first = self.pointwise()
        return first * self.scale(first, self.bn, moments)[:, None, None, None]

    def kernel(self, moments=None):
        with full_precision(self.second.device):
            return merge_1x1_kxk(self.scaled(moments), self.second, self.geometry.groups)[0]

    def response(self, x, moments=None):
        # Composing the kernel takes the 1x1 layer's products once a tap and output channel, running it once a position.
        g = self.geometry
        if g.out_channels // g.groups * g.kernel_size[0] * g.kernel_size[1] < len(x) * x.shape[2] * x.shape[3]:
            return super().response(x, moments)
        return g.conv(F.conv2d(x, self.scaled(moments), groups=g.groups), self.second)

    def drawn(self, x):
        first = self.pointwise()
        u = F.conv2d(x, first, groups=self.geometry.groups) * self.scale(first, self.bn, None)[:, None, None]
        return self.geometry.conv(u, self.second)


class PointwiseAverage(Branch, name="1x1_avg"):
    """1x1, inner norm, average pooling."""

    def __init__(self, geometry: Geometry, device=None, dtype=None):
        super().__init__(geometry, device, dtype)
        self.first = conv_weight(geometry.out_channels, geometry.in_channels // geometry.groups, (1, 1), device, dtype)
        self.scale = Scale(geometry.out_channels, self.bn.eps, device, dtype)

    def scaled(self, moments: Moments | None) -> Tensor:
        """The 1x1 kernel times the inner norm's factors, `[O, I/G, 1, 1]`."""
        return self.first * self.scale(self.first, self.bn, moments)[:, None, None, None]

    def kernel(self, moments=None):
        kh, kw = self.geometry.kernel_size
        return self.scaled(moments).expand(-1, -1, kh, kw) / (kh * kw)

    def response(self, x, moments=None):
        return average(self.geometry, F.conv2d(x, self.scaled(moments), groups=self.geometry.groups))


def average(geometry: Geometry, x: Tensor) -> Tensor:
    """Average pooling as a depthwise convolution: it can be dilated, and is ten times faster on a CPU."""
    box = average_kernel(x.shape[1], geometry.kernel_size, x.shape[1], x.dtype, x.device)
    return geometry.conv(x, box, groups=len(box))


def conv_weight(out_channels: int, in_channels: int, kernel_size: tuple[int, int], device=None, dtype=None):
    """A kernel parameter with the initial values of `nn.Conv2d`."""
    weight = torch.empty(out_channels, in_channels, *kernel_size, device=device, dtype=dtype)
    return nn.Parameter(nn.init.kaiming_uniform_(weight, a=math.sqrt(5)))
