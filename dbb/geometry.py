"""Where the taps of a convolution fall: one description shared by a block and all of its branches."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dbb.convs import FixedConv, in_format_of
from dbb.moments import wide
from dbb.private import pair
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
            object.__setattr__(self, name, value if isinstance(value, str) else tuple(pair(value)))
        if self.internal_channels is None:
            # Twice the channels for depthwise blocks: 72.88 against 72.71 top-1 on MobileNet (DBB's README).
            object.__setattr__(self, "internal_channels", self.in_channels * (2 if self.depthwise else 1))
        for name in ("in_channels", "out_channels", "internal_channels"):
            if getattr(self, name) % self.groups:
                raise ValueError(f"{name}={getattr(self, name)} must be divisible by groups={self.groups}")
        if min(self.kernel_size) < 1:
            raise ValueError(f"kernel_size={self.kernel_size} must be at least 1")
        nn.Conv2d(  # torch's own rules: "same" with a stride, unknown modes ...
            self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding, self.dilation,
            self.groups, padding_mode=self.padding_mode, device="meta")

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

    def conv(self, x: Tensor, kernel: Tensor, bias: Tensor | None = None,
             groups: int | None = None) -> Tensor:
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
        kernel = in_format_of(x, kernel)
        return F.conv2d(x, kernel, bias, self.stride, padding, self.dilation, groups or self.groups)

    def aligned(self, x: Tensor, size: Sequence[int]) -> tuple[Tensor, list[int]]:
        """The map, cut or padded, and the padding, for a kernel of `size` on the centre tap."""
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

    def windows(self, x: Tensor, lattice: "Lattice") -> Tensor:
        """What the kernel sees at some positions of the output, `[n, C, rows, columns, KH, KW]`.

        It is a view, but for torch.compile. Inductor may lay a map out otherwise than by the strides that it
        was traced with; and of an `unfold` the step would be a constant, one graph for each size of images.

        Args:
            x: what `pad` returned, `[N, C, H, W]`.
            lattice: the positions.
        """
        x, places = self._with_margin(x, lattice)
        if torch.compiler.is_compiling():
            return x[::lattice.images][:, :, *self._pixels(places, x.device)]
        (row, down, rows), (column, across, columns) = places
        x = x[::lattice.images, :, row:, column:]
        per_image, per_channel, per_row, per_column = x.stride()
        steps = (per_row * down, per_column * across, per_row * self.dilation[0],
                 per_column * self.dilation[1])
        lengths = *x.shape[:2], rows, columns, *self.kernel_size
        return x.as_strided(lengths, (per_image, per_channel, *steps))

    def add_to_windows(self, x: Tensor, lattice: "Lattice", values: Tensor) -> Tensor:
        """For torch.compile: the map, with values added to what `windows` returns of it."""
        padded, places = self._with_margin(x, lattice)
        image = torch.arange(0, len(x), lattice.images, device=x.device).view(-1, 1, 1, 1, 1, 1)
        channel = torch.arange(x.shape[1], device=x.device).view(-1, 1, 1, 1, 1)
        index = image, channel, *self._pixels(places, x.device)
        padded = padded.index_put(index, values.to(x.dtype), accumulate=True)
        (top, _, _), (left, _, _) = self.placed(lattice)
        return padded[:, :, max(0, -top):, max(0, -left):][:, :, :x.shape[2], :x.shape[3]]

    def _with_margin(self, x: Tensor, lattice: "Lattice") -> tuple[Tensor, list[tuple[int, int, int]]]:
        """The map with zeros where windows reach beyond it, and where on that they are placed."""
        pads, places = [], []
        placed = self.placed(lattice)
        for (first, step, count), span, size in zip(placed, self.spans, x.shape[2:], strict=True):
            before = max(0, -first)
            pads.append((before, max(0, first + (count - 1) * step + span - size)))
            places.append((first + before, step, count))
        (top, bottom), (left, right) = pads
        return F.pad(x, (left, right, top, bottom)) if any((top, bottom, left, right)) else x, places

    def _pixels(self, places: list[tuple[int, int, int]], device: torch.device) -> tuple[Tensor, Tensor]:
        """Rows `[rows, 1, KH, 1]` and columns `[columns, 1, KW]` of the pixels that windows see."""
        seen = []
        for (first, step, count), size, dilation in zip(places, self.kernel_size, self.dilation, strict=True):
            windows, taps = torch.arange(count, device=device), torch.arange(size, device=device)
            seen.append((first + step * windows)[:, None] + dilation * taps)
        rows, columns = seen
        return rows[:, None, :, None], columns[:, None]

    def placed(self, lattice: "Lattice") -> list[tuple[int, int, int]]:
        """First pixel, step and number of a lattice's windows, by rows and columns; padding is below 0."""
        before = [pad[0] if self.padding_mode == "zeros" else 0 for pad in self.pads]
        return [(first * self.stride[dim] - before[dim], step * self.stride[dim], count)
                for dim, (first, step, count) in enumerate(lattice.places)]

    @property
    def spans(self) -> list[int]:
        """How many rows and columns of pixels the kernel reaches over."""
        return [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel_size, strict=True)]

    def sample(self, x: Tensor, positions: int) -> tuple[Tensor, Tensor, Tensor]:
        """What the kernel sees at about so many positions of the output, over all images.

        Args:
            x: what `pad` returned, `[N, C, H, W]`.
            positions: how many.

        Returns:
            `x`, to go on with, so that backward adds to its gradient in place; what the kernel sees,
            `[G, C/G * KH * KW, n]`, float32 at least; and what its centre tap sees, `[G, C/G, n]`.
        """
        return _Sample.apply(x, self, Lattice.within(len(x), *self.positions(x), positions))

    def mean_window(self, x: Tensor) -> Tensor:
        """Mean of what the kernel sees at all positions, `[G, C/G * KH * KW, 1]`; `x` as in `sample`."""
        height, width = self.positions(x)
        # First over images: the rest is small. A process may have none, beside others.
        image = x.mean(0, keepdim=True, dtype=wide(x.dtype)) if len(x) else x.new_zeros(1, *x.shape[1:])
        windows = self.windows(image, Lattice(1, ((0, 1, height), (0, 1, width))))
        return windows.mean((0, 2, 3)).view(self.groups, -1, 1)

    def positions(self, x: Tensor, padded: bool = True) -> tuple[int, int]:
        """Height and width of the output for what `pad` returned, or will be given."""
        pads = [(0, 0), (0, 0)] if padded and self.padding_mode != "zeros" else self.pads
        return tuple((x.shape[2 + dim] + sum(pads[dim]) - self.spans[dim]) // self.stride[dim] + 1
                     for dim in (0, 1))


class Lattice(NamedTuple):
    """Positions spread over a batch: every `images`-th image; (first, step, count) of rows and columns."""

    images: int
    places: tuple[tuple[int, int, int], tuple[int, int, int]]

    @classmethod
    def within(cls, images: int, height: int, width: int, budget: int) -> "Lattice":
        """About `budget` of the positions (no fewer, if there are as many), 2 x 2 or more of each image."""
        every = max(1, images * min(4, height * width) // budget)
        each = budget / max(1, -(-images // every))  # a process may have none, beside others
        columns = min(width, math.ceil(math.sqrt(each * width / height)))
        rows = min(height, math.ceil(each / columns))
        columns = min(width, math.ceil(each / rows))
        # For torch.compile: these are numbers, the same for many sizes of images; the rest may be symbols.
        every, rows, columns = [len(range(number)) for number in (every, rows, columns)]
        return cls(every, tuple(((size - 1 - (count - 1) * (size // count)) // 2, size // count, count)
                                for size, count in ((height, rows), (width, columns))))

    def of(self, x: Tensor) -> Tensor:
        """The positions of a map, a view `[n, C, rows, columns]`."""
        rows, columns = (slice(first, first + (count - 1) * step + 1, step)
                         for first, step, count in self.places)
        return x[::self.images, :, rows, columns]


class _Sample(torch.autograd.Function):
    """Keeps nothing. Backward folds the sample's gradient back, and adds it to the map's own."""

    @staticmethod
    def forward(ctx, x, geometry, lattice):
        ctx.geometry, ctx.lattice, ctx.shape = geometry, lattice, x.shape
        seen = geometry.windows(x, lattice).unflatten(1, (geometry.groups, -1)).permute(1, 2, 5, 6, 0, 3, 4)
        sample = seen.new_empty(seen.shape, dtype=wide(x.dtype)).copy_(seen).flatten(4)
        return x.view_as(x), sample.flatten(1, 3), _centre(sample, geometry)

    @staticmethod
    def backward(ctx, d_x, d_sample, d_centre):
        g, lattice, (images, _, *sizes) = ctx.geometry, ctx.lattice, ctx.shape
        d_sample = d_sample.unflatten(1, (-1, *g.kernel_size))
        # Gradients that are differentiated may not be added to in place; nor may those that dynamo traces.
        functional = torch.is_grad_enabled() or torch.compiler.is_compiling()
        if functional:
            d_x, d_sample = d_x.clone(), d_sample.clone()
        _centre(d_sample, g).add_(d_centre)
        (first_row, down, rows), (first_column, across, columns) = places = g.placed(lattice)
        lengths = [(count - 1) * step + span for (_, step, count), span in zip(places, g.spans, strict=True)]
        d_sample = d_sample.unflatten(4, (-(-images // lattice.images), rows, columns))
        d_windows = d_sample.permute(4, 0, 1, 5, 6, 2, 3).flatten(1, 2)
        if torch.compiler.is_compiling():
            return g.add_to_windows(d_x, lattice, d_windows), None, None
        if _disjoint(places, g.spans, sizes):
            windows = g.windows(d_x, lattice)
            if not functional:
                windows.add_(d_windows)
                return d_x, None, None
            start = first_row * d_x.stride(2) + first_column * d_x.stride(3)
            total = (windows + d_windows).to(d_x.dtype)
            return d_x.as_strided_scatter(total, windows.shape, windows.stride(), start), None, None
        unfolded = d_sample.flatten(5).flatten(0, 3).transpose(0, 1)
        folded = F.fold(unfolded, lengths, g.kernel_size, g.dilation, 0, (down, across))
        target, source = [slice(None, None, lattice.images), slice(None)], [slice(None), slice(None)]
        for first, length, size in zip((first_row, first_column), lengths, sizes, strict=True):  # on the map
            target.append(slice(max(first, 0), min(first + length, size)))
            source.append(slice(max(-first, 0), min(size - first, length)))
        d_x[tuple(target)].add_(folded[tuple(source)])
        return d_x, None, None


def _disjoint(places: Sequence[tuple[int, int, int]], spans: Sequence[int], sizes: Sequence[int]) -> bool:
    """Whether windows (see `Geometry.placed`) lie on a map, and no two share a pixel."""
    return all(first >= 0 and first + (count - 1) * step + span <= size and (step >= span or count == 1)
               for (first, step, count), span, size in zip(places, spans, sizes, strict=True))


def _centre(sample: Tensor, geometry: Geometry) -> Tensor:
    """What the centre taps see of `[G, C/G, KH, KW, n]`."""
    kh, kw = geometry.kernel_size
    return sample[:, :, (kh - 1) // 2, (kw - 1) // 2]


def average(geometry: Geometry, x: Tensor) -> Tensor:
    """Average pooling as a depthwise convolution: it can be dilated, and is ten times faster on a CPU."""
    box = average_kernel(x.shape[1], geometry.kernel_size, x.shape[1], x.dtype, x.device)
    x, padding = geometry.aligned(x, geometry.kernel_size)
    return FixedConv.apply(x, box, (geometry.stride, padding, geometry.dilation, len(box)))
