"""Where the taps of a convolution fall: one description shared by a block and all of its branches."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input
from torch.nn.modules.utils import _pair

from dbb.transforms import average_kernel, offsets


@dataclass(frozen=True)
class Geometry:
    """The arguments of `nn.Conv2d`, checked, with pairs written out as (height, width).

    `internal_channels` is the width between the two layers of the `1x1_kxk` branch.

    Raises:
        ValueError: if `nn.Conv2d` would not take them, or the internal channels do not divide by the groups.
    """

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] | str = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    padding_mode: str = "zeros"
    internal_channels: int | None = None

    def __post_init__(self):
        for name in ("kernel_size", "stride", "padding", "dilation"):
            value = getattr(self, name)
            object.__setattr__(self, name, value if isinstance(value, str) else tuple(_pair(value)))
        if self.internal_channels is None:
            # Twice the channels for depthwise blocks: 72.88 against 72.71 top-1 on MobileNet (DBB's README).
            object.__setattr__(self, "internal_channels", self.in_channels * (2 if self.depthwise else 1))
        for name in ("in_channels", "out_channels", "internal_channels"):
            if getattr(self, name) % self.groups:
                raise ValueError(f"{name}={getattr(self, name)} must be divisible by groups={self.groups}")
        if min(self.kernel_size) < 1:
            raise ValueError(f"kernel_size={self.kernel_size} must be at least 1")
        nn.Conv2d(self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding, self.dilation, self.groups,
                  padding_mode=self.padding_mode, device="meta")  # torch's own rules: "same" with a stride, unknown modes ...

    @property
    def depthwise(self) -> bool:
        """Whether every channel is convolved on its own."""
        return self.groups == self.in_channels == self.out_channels

    @property
    def pads(self) -> list[tuple[int, int]]:
        """Padding (before, after) of the rows and of the columns."""
        if self.padding == "valid":
            return [(0, 0), (0, 0)]
        if self.padding == "same":  # as nn.Conv2d: an odd total puts the extra pixel behind
            totals = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
            return [(total // 2, total - total // 2) for total in totals]
        return [(p, p) for p in self.padding]

    def pad(self, x: Tensor) -> Tensor:
        """Apply `padding_mode` to `[N, C, H, W]`; zeros are left to the convolutions."""
        if self.padding_mode == "zeros":
            return x
        (top, bottom), (left, right) = self.pads
        return F.pad(x, (left, right, top, bottom), mode=self.padding_mode)

    def conv(self, x: Tensor, kernel: Tensor, bias: Tensor | None = None, groups: int | None = None) -> Tensor:
        """Convolve with a kernel of at most `kernel_size`, its centre tap on the block's centre tap.

        Args:
            x: what `pad` returned, `[N, C, H, W]`.
            kernel: `[O, C/groups, h, w]`.
            bias: `[O]` or None.
            groups: the block's own by default.

        Returns:
            `[N, O, H', W']`, of the same size for every kernel.
        """
        x, padding = self.aligned(x, kernel.shape[2:])
        return F.conv2d(x, kernel, bias, self.stride, padding, self.dilation, groups or self.groups)

    def aligned(self, x: Tensor, size: Sequence[int]) -> tuple[Tensor, list[int]]:
        """What a convolution with a kernel of `size` (h, w) on the centre tap takes: `[N, C, H, W]`, cut or padded, and its padding."""
        pads = []
        for dim, first_tap in enumerate(offsets(size, self.kernel_size)):
            before, after = self.pads[dim] if self.padding_mode == "zeros" else (0, 0)
            last_tap = self.kernel_size[dim] - size[dim] - first_tap
            pads.append((before - self.dilation[dim] * first_tap, after - self.dilation[dim] * last_tap))
        padding = [before for before, _ in pads]
        if min(padding) < 0 or any(before != after for before, after in pads):
            (top, bottom), (left, right) = pads
            return F.pad(x, (left, right, top, bottom)), [0, 0]  # a negative pad crops
        return x, padding

    @property
    def keeps_size(self) -> bool:
        """Whether the centre taps fall on every pixel of the input once."""
        before = [d * ((k - 1) // 2) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        total = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        return self.stride == (1, 1) and self.pads == [(b, t - b) for b, t in zip(before, total, strict=True)]

    def window(self, x: Tensor, name: str) -> Tensor:
        """What a 1x1 kernel sees at every position of the output, `[N, C, H', W']`: the "centre" pixel, or the "average"."""
        if name == "average":
            return average(self, x)
        x, padding = self.aligned(x, (1, 1))
        if any(padding):
            x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
        return x if self.stride == (1, 1) else x[:, :, ::self.stride[0], ::self.stride[1]].clone()

    def patches(self, x: Tensor, lattice: "Lattice") -> Tensor:
        """The windows of some positions of the output, at least in float32: `[G, n, C/G, KH, KW]`.

        Args:
            x: what `pad` returned, `[N, C, H, W]`.
            lattice: the positions.
        """
        x, lattice = self._placed(x, lattice)
        return _Patches.apply(x, self, lattice)

    def mean_patch(self, x: Tensor) -> Tensor:
        """The mean window over all positions of the output, at least in float32: `[G, 1, C/G, KH, KW]`; `x` as in `patches`."""
        height, width = self.positions(x)
        total = x.sum(0, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))  # first over images: the rest is small
        x = total / max(1, len(x))
        x, lattice = self._placed(x, Lattice(1, ((0, 1, height), (0, 1, width))))
        means = torch.stack([tap.mean((0, 2, 3)) for tap in _taps(x, self, lattice)], -1)
        return means.unflatten(-1, self.kernel_size).unflatten(0, (self.groups, 1, -1))

    def _placed(self, x: Tensor, lattice: "Lattice") -> tuple[Tensor, "Lattice"]:
        """A map with the zeros that windows reach into, and the first pixels of the windows in it."""
        pads, places = [], []
        for dim, (first, step, count) in enumerate(lattice.places):
            before, _ = self.pads[dim] if self.padding_mode == "zeros" else (0, 0)
            start, step = first * self.stride[dim] - before, step * self.stride[dim]
            end = start + (count - 1) * step + self.dilation[dim] * (self.kernel_size[dim] - 1) + 1
            pads.append((max(0, -start), max(0, end - x.shape[2 + dim])))
            places.append((start + pads[-1][0], step, count))
        (top, bottom), (left, right) = pads
        if any((top, bottom, left, right)):
            x = F.pad(x, (left, right, top, bottom))
        return x, Lattice(lattice.images, tuple(places))

    def positions(self, x: Tensor) -> tuple[int, int]:
        """Height and width of the output for what `pad` returned."""
        pads = self.pads if self.padding_mode == "zeros" else [(0, 0), (0, 0)]
        return tuple((x.shape[2 + dim] + sum(pads[dim]) - self.dilation[dim] * (self.kernel_size[dim] - 1) - 1) // self.stride[dim] + 1
                     for dim in (0, 1))


class Lattice(NamedTuple):
    """Some positions of a batch of maps, evenly spread: every `images`-th image, and (first, step, count) of rows and columns."""

    images: int
    places: tuple[tuple[int, int, int], tuple[int, int, int]]

    @classmethod
    def within(cls, images: int, height: int, width: int, budget: int) -> "Lattice":
        """About `budget` of the positions (at least that, where there are as many), 2 x 2 or more of each image."""
        images, height, width = [len(range(size)) for size in (images, height, width)]  # numbers to torch.compile too, not symbols
        every = max(1, images * min(4, height * width) // budget)
        each = budget / max(1, -(-images // every))  # a process may have none, beside others
        columns = min(width, math.ceil(math.sqrt(each * width / height)))
        rows = min(height, math.ceil(each / columns))
        columns = min(width, math.ceil(each / rows))
        return cls(every, tuple(((size - 1 - (count - 1) * (size // count)) // 2, size // count, count)
                                for size, count in ((height, rows), (width, columns))))

    def of(self, x: Tensor) -> Tensor:
        """The positions of a map, a view `[n, C, rows, columns]`."""
        rows, columns = (slice(first, first + (count - 1) * step + 1, step) for first, step, count in self.places)
        return x[::self.images, :, rows, columns]


class _Patches(torch.autograd.Function):
    """Backward adds tap by tap into one map; slices and unfold would make a whole map each."""

    @staticmethod
    def forward(ctx, x, geometry, lattice):
        ctx.geometry, ctx.lattice, ctx.shape, ctx.dtype = geometry, lattice, x.shape, x.dtype
        patches = torch.stack(_taps(x, geometry, lattice), -1).unflatten(-1, geometry.kernel_size).unflatten(1, (geometry.groups, -1))
        patches = patches.permute(1, 0, 3, 4, 2, 5, 6)  # [G, N, rows, columns, C/G, KH, KW]
        return patches.to(torch.promote_types(x.dtype, torch.float32)).flatten(1, 3)

    @staticmethod
    def backward(ctx, d_patches):
        g, (rows, columns) = ctx.geometry, (count for _, _, count in ctx.lattice.places)
        d_x = d_patches.new_zeros(ctx.shape)
        d_taps = d_patches.unflatten(1, (-1, rows, columns)).permute(1, 0, 4, 2, 3, 5, 6).flatten(1, 2)  # [N, C, rows, columns, KH, KW]
        for i in range(g.kernel_size[0]):
            for j in range(g.kernel_size[1]):
                _tap(d_x, g, ctx.lattice, i, j).add_(d_taps[..., i, j])
        return d_x.to(ctx.dtype), None, None


def _taps(x: Tensor, geometry: Geometry, lattice: Lattice) -> list[Tensor]:
    """`_tap` for all taps, row by row."""
    return [_tap(x, geometry, lattice, i, j) for i in range(geometry.kernel_size[0]) for j in range(geometry.kernel_size[1])]


def _tap(x: Tensor, geometry: Geometry, lattice: Lattice, i: int, j: int) -> Tensor:
    """The pixels under tap (i, j) of some windows, whose first pixels the lattice has: a view `[N, C, rows, columns]`."""
    (top, down, rows), (left, across, columns) = lattice.places
    top, left = top + i * geometry.dilation[0], left + j * geometry.dilation[1]
    return x[::lattice.images, :, top:top + (rows - 1) * down + 1:down, left:left + (columns - 1) * across + 1:across]


def average(geometry: Geometry, x: Tensor) -> Tensor:
    """Average pooling as a depthwise convolution: it can be dilated, and is ten times faster on a CPU."""
    box = average_kernel(x.shape[1], geometry.kernel_size, x.shape[1], x.dtype, x.device)
    x, padding = geometry.aligned(x, geometry.kernel_size)
    return _Fixed.apply(x, box, (geometry.stride, padding, geometry.dilation, len(box)))


class _Fixed(torch.autograd.Function):
    """A convolution whose kernel is a constant: unlike `F.conv2d` it keeps no input for backward."""

    @staticmethod
    def forward(ctx, x, kernel, conv):
        ctx.kernel, ctx.shape, ctx.conv = kernel, x.shape, conv
        return F.conv2d(x, kernel, None, *conv)

    @staticmethod
    def backward(ctx, d_y):
        stride, padding, dilation, groups = ctx.conv
        return conv2d_input(ctx.shape, ctx.kernel.to(d_y.dtype), d_y, stride, padding, dilation, groups), None, None
