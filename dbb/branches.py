"""The branches of a block: each says what its kernel is. Shapes as in `dbb.transforms`."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dbb.branch import Branch
from dbb.geometry import Geometry, average
from dbb.moments import without_autocast
from dbb.norms import Scale
from dbb.transforms import average_kernel, identity_kernel, merge_1x1_kxk


class KxK(Branch, name="kxk"):
    """A plain convolution."""

    initial_factor = 0.25

    def __init__(self, geometry: Geometry, device=None, dtype=None):
        super().__init__(geometry, device, dtype)
        self.weight = self.new_kernel(self.taps(*geometry.kernel_size))

    def kernel(self, first=None):
        return self.weight


class Horizontal(KxK, name="1xk"):
    """A convolution along the middle row (ACNet)."""

    window = "row"


class Vertical(KxK, name="kx1"):
    """A convolution along the middle column (ACNet)."""

    window = "column"


class PointBranch(Branch):
    """A 1x1 kernel on the "centre" or the "average" of the window: moments of these give its statistics."""

    window = "centre"

    def point(self, first: Tensor | None = None) -> Tensor:
        """The 1x1 kernel `[O, I/G, 1, 1]`; `first` as in `kernel`."""
        raise NotImplementedError

    def kernel(self, first=None):
        point, (kh, kw) = self.point(first), self.geometry.kernel_size
        return point if self.window == "centre" else (point / (kh * kw)).expand(-1, -1, kh, kw)

    def response(self, x, first=None):
        g = self.geometry
        if self.window == "average" and g.stride != (1, 1):  # fewer pixels; else x is kept, as it is anyway
            return F.conv2d(average(g, x), self.point(first), groups=g.groups)
        return self.drawn(x, first)

    def drawn(self, x, first=None):
        g, point = self.geometry, self.point(first)
        if self.window == "centre":
            return g.conv(x, point)
        return average(g, F.conv2d(x, point, groups=g.groups))


class Pointwise(PointBranch, name="1x1"):
    """A 1x1 convolution on the centre tap."""

    def __init__(self, geometry: Geometry, device=None, dtype=None):
        super().__init__(geometry, device, dtype)
        self.weight = self.new_kernel((1, 1))

    def point(self, first=None):
        return self.weight


class Identity(PointBranch, name="identity"):
    """The input itself (RepVGG, MobileOne)."""

    def __init__(self, geometry: Geometry, device=None, dtype=None):
        super().__init__(geometry, device, dtype)
        self.dtype = self.bn.weight.dtype  # of the kernel; the norm may be moved to float32 alone

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device="cpu")).dtype
        return self

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        if local_metadata.get("assign_to_params_buffers"):  # the file's tensors take the place of the norm's
            norm = "factor" if self.bn is None else "bn.weight"
            self.dtype = state_dict.get(prefix + norm, self.gamma).dtype

    @classmethod
    def fits(cls, geometry):
        any_stride = cls.window == "average"
        return (any_stride or geometry.stride == (1, 1)) and geometry.in_channels == geometry.out_channels

    def point(self, first=None):
        g = self.geometry
        return identity_kernel(g.in_channels, g.groups, self.dtype, self.gamma.device)


class Average(Identity, name="avg"):
    """Average pooling, dilated where the block is."""

    window = "average"
    initial_factor = 0.25

    def kernel(self, first=None):
        g = self.geometry
        return average_kernel(g.in_channels, g.kernel_size, g.groups, self.dtype, self.gamma.device)


class PointwiseAverage(PointBranch, name="1x1_avg"):
    """1x1, inner norm, average pooling."""

    window = "average"
    initial_factor = 0.25

    def __init__(self, geometry: Geometry, device=None, dtype=None):
        super().__init__(geometry, device, dtype)
        self.first = self.new_kernel((1, 1))
        self.scale = Scale(geometry.out_channels, self.bn.eps, device, dtype)

    def point(self, first=None):
        return self.scaled(first)


class PointwiseKxK(Branch, name="1x1_kxk"):
    """1x1, inner norm, KxK. With as many internal as input channels the 1x1 kernel is `I + first`."""

    initial_factor = 0.5

    def __init__(self, geometry: Geometry, device=None, dtype=None):
        super().__init__(geometry, device, dtype)
        self.first = self.new_kernel((1, 1), outputs=geometry.internal_channels)
        self.scale = Scale(geometry.internal_channels, self.bn.eps, device, dtype)
        self.second = self.new_kernel(geometry.kernel_size, inputs=geometry.internal_channels)
        self._start_at_identity()

    def _start_at_identity(self) -> None:
        if len(self.first) == self.geometry.in_channels:
            nn.init.zeros_(self.first)  # towards which weight decay pulls (DBB's code)

    def reset_parameters(self):
        super().reset_parameters()
        self._start_at_identity()

    def inner(self):
        first, groups = self.first, self.geometry.groups
        if first.shape[0] != self.geometry.in_channels:
            return first
        identity = identity_kernel(first.shape[1], 1, first.dtype, first.device)
        if groups == 1:
            return first + identity
        return (first.unflatten(0, (groups, -1)) + identity).flatten(0, 1)

    def kernel(self, first=None):
        return merge_1x1_kxk(self.scaled(first), self.second, self.geometry.groups)[0]

    def is_composed(self, x):
        # Composing takes the 1x1 layer's products once a tap and output channel, running it once a pixel.
        g, pixels = self.geometry, len(x) * x.shape[2] * x.shape[3]
        return g.depthwise or g.out_channels // g.groups * math.prod(g.kernel_size) < pixels

    def response(self, x, first=None):
        if self.is_composed(x):
            return super().response(x, first)
        g = self.geometry
        return g.conv(F.conv2d(x, self.scaled(first), groups=g.groups), self.second)

    def drawn(self, x):
        u = F.conv2d(x, self.inner(), groups=self.geometry.groups)
        if self.scale is not None:
            u = (u * self.scale.factors()[:, None, None]).to(u.dtype)
        return self.geometry.conv(u, self.second)


class PointwisePrior(Branch, name="1x1_prior"):
    """1x1, then one fixed frequency an output channel: vertical or horizontal, as in a DCT (OREPA)."""

    initial_factor = 0.0

    def __init__(self, geometry: Geometry, device=None, dtype=None):
        super().__init__(geometry, device, dtype)
        self.first = self.new_kernel((1, 1))
        self.register_buffer("prior", self._frequencies(), persistent=False)

    def _frequencies(self) -> Tensor:
        """The fixed kernels `[O, 1, KH, KW]`, on the parameters' device."""
        out, (kh, kw) = len(self.first), self.geometry.kernel_size
        channel, row, column = (torch.arange(size, dtype=torch.float64, device=self.first.device)
                                for size in (out, kh, kw))
        channel = channel[:, None, None]
        vertical = (math.pi * (row[:, None] + 0.5) * (channel + 1) / kh).cos()
        horizontal = (math.pi * (column + 0.5) * (channel + 1 - out / 2) / kw).cos()
        prior = torch.where(channel < out / 2, vertical, horizontal)[:, None]
        return prior.masked_fill(prior.abs() < 1e-12, 0).to(self.first.dtype)  # cos(pi / 2) is not quite

    # No file holds the prior. So it is made anew where parameters get another device or type, as from meta to
    # memory that holds anything (`to_empty`), and where a file's tensors take their place (`assign=True`).
    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.prior = self._frequencies()
        return self

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        self.prior = self._frequencies()

    def kernel(self, first=None):
        return self.first * self.prior

    def drawn(self, x):
        u = F.conv2d(x, self.first, groups=self.geometry.groups)
        return self.geometry.conv(u, self.prior, groups=len(self.prior))


class DepthwiseSeparable(Branch, name="dw_1x1"):
    """Eight depthwise kernels an input channel, then 1x1 (OREPA)."""

    initial_factor = 0.5
    multiplier = 8

    def __init__(self, geometry: Geometry, device=None, dtype=None):
        super().__init__(geometry, device, dtype)
        channels = geometry.in_channels * self.multiplier
        self.first = self.new_kernel(geometry.kernel_size, outputs=channels, groups=geometry.in_channels)
        self.second = self.new_kernel((1, 1), inputs=channels)

    def kernel(self, first=None):
        groups = self.geometry.groups
        first = self.first.reshape(groups, -1, self.multiplier, *self.geometry.kernel_size)
        second = self.second.reshape(groups, -1, *first.shape[1:3])  # [G, O/G, I/G, 8]
        with without_autocast(first.device):
            return torch.einsum("githw,goit->goihw", first, second).flatten(0, 1)

    def drawn(self, x):
        u = self.geometry.conv(x, self.first, groups=self.geometry.in_channels)
        return F.conv2d(u, self.second, groups=self.geometry.groups)


class Expanded(Branch, name="1x1_kxk_1x1"):
    """1x1, KxK, 1x1, with four times the channels in between and no norms (ExpandNets, NeurIPS 2020)."""

    expansion = 4

    def __init__(self, geometry: Geometry, device=None, dtype=None):
        super().__init__(geometry, device, dtype)
        inputs, outputs = (self.expansion * n for n in (geometry.in_channels, geometry.out_channels))
        self.first = self.new_kernel((1, 1), outputs=inputs)
        self.second = self.new_kernel(geometry.kernel_size, inputs=inputs, outputs=outputs)
        self.third = self.new_kernel((1, 1), inputs=outputs)

    def kernel(self, first=None):
        groups = self.geometry.groups
        wide = merge_1x1_kxk(self.first, self.second, groups)[0].unflatten(0, (groups, -1))
        third = self.third.reshape(groups, -1, wide.shape[1])  # [G, O/G, 4 * O/G]
        with without_autocast(third.device):
            return (third @ wide.flatten(2)).reshape(-1, *wide.shape[2:])

    def drawn(self, x):
        groups = self.geometry.groups
        u = self.geometry.conv(F.conv2d(x, self.first, groups=groups), self.second)
        return F.conv2d(u, self.third, groups=groups)
