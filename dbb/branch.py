"""What every branch of a block has: a kernel, and a BatchNorm or a factor of its own.

A new branch is a subclass with a name, its parameters and `kernel`; see `dbb.branches.KxK`. Shapes as in
`dbb.transforms`.
"""

import math

import torch
from torch import Tensor, nn

from dbb.geometry import Geometry
from dbb.norms import running
from dbb.transforms import norm_affine

BRANCHES: dict[str, type["Branch"]] = {}


class Branch(nn.Module):
    """`BN(conv(x, kernel))`, or `factor * conv(x, kernel)` in a linear block, for the block's `geometry`.

    A subclass may set `initial_factor`, and `window`: which part of the block's window its kernel covers, the
    "centre" tap, the middle "row" or "column"; or the "average" of the whole (see `PointBranch`).
    """

    window: str | None = None
    initial_factor = 1.0

    def __init_subclass__(cls, name: str | None = None, **kwargs):
        super().__init_subclass__(**kwargs)
        if name is not None:
            BRANCHES[name] = cls

    def __init__(self, geometry: Geometry, device=None, dtype=None):
        super().__init__()
        self.geometry = geometry
        self.bn = nn.BatchNorm2d(geometry.out_channels, device=device, dtype=dtype)
        self.scale = self.factor = None

    def new_kernel(self, size: tuple[int, int], inputs: int | None = None, outputs: int | None = None,
                   groups: int | None = None) -> nn.Parameter:
        """The initial kernel of an `nn.Conv2d`, by default with the channels and groups of the block."""
        g = self.geometry
        shape = outputs or g.out_channels, (inputs or g.in_channels) // (groups or g.groups), *size
        return nn.Parameter(nn.init.kaiming_uniform_(self.bn.weight.new_empty(shape), a=math.sqrt(5)))

    def linearize(self) -> None:
        """Trade the norms for a learned factor per output channel, with OREPA's initial values (its code)."""
        self.factor = nn.Parameter(torch.full_like(self.bn.weight, self.initial_factor))
        self.bn = self.scale = None
        with torch.no_grad():
            for kernel in self.parameters():
                if kernel.ndim == 4:
                    kernel *= math.sqrt(6)  # kaiming_uniform_ with a=0, where new_kernel has a=sqrt(5)

    def reset_parameters(self) -> None:
        """Draw the kernels anew, as `nn.Conv2d` does, for code that asks every module; norms do so too."""
        linear = self.factor is not None
        for kernel in self.parameters(recurse=False):
            if kernel.ndim == 4:
                nn.init.kaiming_uniform_(kernel, a=0 if linear else math.sqrt(5))
        if linear:
            nn.init.constant_(self.factor, self.initial_factor)

    @staticmethod
    def fits(geometry: Geometry) -> bool:
        """Whether the branch makes sense for a geometry; where not, a block leaves it out."""
        return True

    @classmethod
    def taps(cls, kh: int, kw: int) -> tuple[int, int]:
        """Height and width of the kernel in a block of KH x KW."""
        return {"centre": (1, 1), "row": (1, kw), "column": (kh, 1)}.get(cls.window, (kh, kw))

    @property
    def gamma(self) -> Tensor:
        """The outer norm's gamma `[O]`, or the factor in a linear block."""
        return self.bn.weight if self.factor is None else self.factor

    def inner(self) -> Tensor:
        """The 1x1 kernel `[M, I/G, 1, 1]` in front of the inner norm, the branch's `scale`, if it has one."""
        return self.first

    def scaled(self, first: Tensor | None = None) -> Tensor:
        """`inner` times the factors of the inner norm; `first` as in `kernel`."""
        if first is not None:
            return first
        first = self.inner()
        if self.scale is None:
            return first
        return (first * self.scale.factors()[:, None, None, None]).to(first.dtype)  # norms may be wider

    def kernel(self, first: Tensor | None = None) -> Tensor:
        """Compute the kernel `[O, I/G, h, w]`, differentiable, with its centre tap on the block's.

        Args:
            first: `inner` times the inner norm's factors with the batch's statistics; None: `scaled`.
        """
        raise NotImplementedError

    def response(self, x: Tensor, first: Tensor | None = None) -> Tensor:
        """The map that the norm sees, `[N, O, H', W']`, at the least cost: overridden if not `kernel`."""
        return self.geometry.conv(x, self.kernel(first))

    def is_composed(self, x: Tensor) -> bool:
        """Whether `response` to a map is that of `kernel`."""
        return type(self).response is Branch.response

    def drawn(self, x: Tensor) -> Tensor:
        """The same map in eval, layer by layer as the paper draws it, whatever way kernels are merged."""
        return self.response(x)

    def normed(self, response: Tensor) -> Tensor:
        """Run the norm on the branch's map, or multiply it with the factor."""
        if self.factor is None:
            return self.bn(response)
        return response * self.factor[:, None, None].to(response.dtype)

    def affine(self) -> tuple[Tensor, Tensor | float]:
        """A factor and a shift `[O]`: of the norm with running statistics, or the learned factor and 0."""
        return norm_affine(*running(self.bn)) if self.factor is None else (self.factor, 0.0)

    def equivalent(self) -> tuple[Tensor, Tensor]:
        """Kernel `[O, I/G, h, w]` and bias `[O]` of the whole branch with its running statistics."""
        scale, bias = self.affine()
        return self.kernel() * scale[:, None, None, None], bias
