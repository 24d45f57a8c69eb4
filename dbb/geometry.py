"""Where the taps of a convolution fall: one description shared by a block and all of its branches."""

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.utils import _pair

from dbb.transforms import offsets


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
        pads = []
        for dim, first_tap in enumerate(offsets(kernel.shape[2:], self.kernel_size)):
            before, after = self.pads[dim] if self.padding_mode == "zeros" else (0, 0)
            last_tap = self.kernel_size[dim] - kernel.shape[2 + dim] - first_tap
            pads.append((before - self.dilation[dim] * first_tap, after - self.dilation[dim] * last_tap))
        padding = [before for before, _ in pads]
        if min(padding) < 0 or any(before != after for before, after in pads):
            (top, bottom), (left, right) = pads
            x, padding = F.pad(x, (left, right, top, bottom)), 0  # a negative pad crops
        return F.conv2d(x, kernel, bias, self.stride, padding, self.dilation, groups or self.groups)
