"""The block: a sum of branches in training, one convolution in eval and after conversion."""

import copy
from collections import Counter
from collections.abc import Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import _pair
from torch.nn.utils.prune import BasePruningMethod

from dbb.branches import BRANCHES
from dbb.geometry import Geometry
from dbb.modes import MODES
from dbb.moments import process_group
from dbb.norms import running, uses_batch_statistics
from dbb.rows import beside, stacked, weighted
from dbb.subclass import Intercept, lend_weight, with_weight
from dbb.transforms import embed_kernel, fill, fuse_conv_norm

POSITIONS = 256  # see benchmarks/README.md


class ReparamConv2d(nn.Module):
    """`nn.Conv2d` and the norm behind it, as a sum of branches `BN_b(conv(x, K_b))`.

    Maps `[N, in_channels, H, W]` to `[N, out_channels, H', W']`. In training every branch is normalised with the
    statistics of its own map, see `mode`. With running statistics (eval, or all norms frozen) the sum is run as one merged
    convolution.

    Args:
        in_channels: C_in.
        out_channels: C_out.
        kernel_size: int or (height, width), as are `stride`, `padding` and `dilation`, all as in `nn.Conv2d`.
        stride: see `kernel_size`.
        padding: see `kernel_size`; also "same" and "valid".
        dilation: see `kernel_size`.
        groups: as in `nn.Conv2d`.
        branches: names from `BRANCHES`, repeated for several of a kind; one that does not fit the shape (an identity
            with stride 2) is left out.
        mode: how the sum is run in training (`dbb.modes`): "exact", the published function; "online", the same with
            variances over some positions, one convolution; "linear", a learned factor a branch instead of its norm, and one
            norm behind the sum (OREPA). The first two differ in nothing else, the third in its parameters.
        positions: how many positions of the output, over all images, `online` takes variances over.
        padding_mode: as in `nn.Conv2d`.
        internal_channels: width inside `1x1_kxk`; by default in_channels, twice that in a depthwise block.
        deploy: build the merged convolution only, for loading converted weights.
        nonlinear: a module applied to the sum.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: if a branch or mode is unknown, `nn.Conv2d` would not take the arguments, or no branch spans the kernel.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size, stride=1, padding=0, dilation=1, groups: int = 1,
                 branches: Sequence[str] = ("kxk",), mode: str = "exact", positions: int = POSITIONS, padding_mode: str = "zeros",
                 internal_channels: int | None = None, deploy: bool = False, nonlinear: nn.Module | None = None, device=None,
                 dtype=None):
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"mode={mode!r} is unknown; known are {', '.join(MODES)}")
        if positions < 4:
            raise ValueError(f"positions={positions}: online variances need 4 positions at least")
        self.geometry = Geometry(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode,
                                 internal_channels)
        self.pixelwise = Geometry(in_channels, in_channels, 1, groups=groups)  # sees every pixel of the input by itself
        for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"):
            setattr(self, name, getattr(self.geometry, name))  # for code that asks a convolution
        self.nonlinear = nn.Identity() if nonlinear is None else nonlinear
        self.outer = None  # the subclass of Conv2d in whose place the block is, if it was one; see dbb.subclass
        self.mode, self.positions = mode, positions
        self.branchwise = False  # see the context manager of that name
        self.bn = nn.BatchNorm2d(out_channels, device=device, dtype=dtype) if mode == "linear" and not deploy else None
        self.branches = nn.ModuleDict()
        self.reparam = None
        if deploy:
            self.reparam = self._plain_conv(device, dtype)
            self.reparam.reset_parameters()
            return
        copies = Counter()
        for name in branches:
            if name not in BRANCHES:
                raise ValueError(f"branches: there is no branch {name!r}; known are {', '.join(sorted(BRANCHES))}")
            if BRANCHES[name].fits(self.geometry):
                copies[name] += 1
                key = name if copies[name] == 1 else f"{name}_{copies[name]}"
                self.branches[key] = BRANCHES[name](self.geometry, device=device, dtype=dtype)
                if mode == "linear":
                    self.branches[key].linearize()
        spanned = [max((b.taps(*self.kernel_size)[dim] for b in self.branches.values()), default=0) for dim in (0, 1)]
        if spanned[0] < self.kernel_size[0] or spanned[1] < self.kernel_size[1]:
            raise ValueError(f"branches={list(branches)}: none that fits {in_channels} to {out_channels} channels, stride {self.stride}, "
                             f"spans the kernel of {self.kernel_size}; add kxk")

    @property
    def weight(self) -> Tensor:
        """The merged convolution's kernel, for code that asks a convolution."""
        return self.get_equivalent_kernel_bias()[0]

    @property
    def bias(self) -> Tensor:
        """The merged convolution's bias."""
        return self.get_equivalent_kernel_bias()[1]

    def __setattr__(self, name: str, value) -> None:
        if name in ("weight", "bias"):
            raise AttributeError(f"the {name} of a block is computed from its branches and cannot be set: set that of the "
                                 "convolution from block.fuse(), or convert the network with reparameterize first")
        super().__setattr__(name, value)

    def forward(self, x: Tensor) -> Tensor:
        if self.outer is None:
            return self.nonlinear(self._sum(x))
        lend_weight(self.outer, x.device, next(self.parameters()).dtype)
        with Intercept(self._inside):
            return self.nonlinear(self.outer(x))

    def _inside(self, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):  # F.conv2d's own names
        if (_pair(stride), _pair(dilation)) != (self.stride, self.dilation) or \
                (padding if isinstance(padding, str) else _pair(padding)) != self.padding:
            raise ValueError(f"{type(self.outer).__name__} has stride {stride}, padding {padding}, dilation {dilation} for this image, "
                             f"but had {self.stride}, {self.padding}, {self.dilation} for the example: exclude this layer")
        return self._sum(input)

    def _sum(self, x: Tensor) -> Tensor:
        g = self.geometry
        if self.reparam is not None:
            return g.conv(g.pad(x), self.reparam.weight, self.reparam.bias)
        by_batch = self._uses_batch_statistics()
        if not by_batch and not self.branchwise:
            return g.conv(g.pad(x), *self.get_equivalent_kernel_bias())
        self._run_hooks()
        if by_batch and (x.numel() or any(process_group(norm) is not None for norm in self.norms())):
            return MODES[self.mode](self, x)
        # An empty batch, too, goes through the norms themselves: it has no statistics, unless other processes have images.
        padded = g.pad(x)
        first, *others = (branch.normed(branch.drawn(padded)) for branch in self.branches.values())
        total = sum(others, first)
        return total if self.bn is None else self.bn(total)

    def _run_hooks(self) -> None:
        """What hooks do before a forward: pruning and the old weight norm set a weight there."""
        for branch in self.branches.values():
            branch()
        for norm in self.norms():  # which is not always called
            for hook in norm._forward_pre_hooks.values():
                if isinstance(hook, BasePruningMethod):
                    hook(norm, ())

    def norms(self) -> list[nn.BatchNorm2d]:
        """The outer norm of every branch, or the one norm of a linear block."""
        return [branch.bn for branch in self.branches.values()] if self.bn is None else [self.bn]

    def _uses_batch_statistics(self) -> bool:
        return any(uses_batch_statistics(norm) for norm in self.norms())

    def summed(self) -> tuple[Tensor, Tensor | float]:
        """Sum of the branches' kernels `[O, I/G, KH, KW]` and biases `[O]`, each with its norm or factor."""
        g, branches = self.geometry, self.branches.values()
        scales, biases = zip(*[branch.affine() for branch in branches], strict=True)
        rows, scale = stacked([embed_kernel(branch.kernel(), g.kernel_size) for branch in branches], g.groups), beside(scales, g.groups)
        kernel = weighted(rows.to(scale.dtype), scale).reshape(g.out_channels, -1, *g.kernel_size)
        return kernel, sum(biases[1:], biases[0])

    def get_equivalent_kernel_bias(self) -> tuple[Tensor, Tensor]:
        """Kernel `[C_out, C_in/groups, KH, KW]` and bias `[C_out]` of the merged convolution.

        Differentiable in every parameter; uses running statistics, whatever the mode.
        """
        if self.reparam is not None:
            return self.reparam.weight, self.reparam.bias
        self._run_hooks()
        kernel, bias = self.summed()
        if self.bn is not None:
            kernel, bias = fuse_conv_norm(kernel, bias, *running(self.bn))
        dtype = next(iter(self.branches.values())).kernel().dtype  # perhaps half precision, while norms are in float32
        return kernel.to(dtype), bias.to(dtype)

    def fuse(self) -> nn.Module:
        """Make the plain convolution that computes the same, in float64, cast back at the end.

        Returns:
            A trainable `nn.Conv2d` of the block's dtype, device and memory format (or the subclass of it that the block
            replaced); with `nonlinear`, a `nn.Sequential` of the two.

        Raises:
            ValueError: in training mode, where a block has no fixed function yet; or if the block's type cannot hold a value.
        """
        conv = self._merge() if self.reparam is None else self.reparam
        if self.outer is not None:
            conv = with_weight(self.outer, conv)
        return conv if isinstance(self.nonlinear, nn.Identity) else nn.Sequential(conv, self.nonlinear)

    @torch.no_grad()
    def _merge(self) -> nn.Conv2d:
        if self.training or self._uses_batch_statistics():
            raise ValueError("a block in training mode cannot be converted: call model.eval() first")
        like = self.get_equivalent_kernel_bias()[0]
        conv = self._plain_conv(like.device, like.dtype)
        kernel, bias = copied(self).to("cpu", torch.float64).get_equivalent_kernel_bias()
        fill(conv.weight, kernel, "the merged kernel")
        fill(conv.bias, bias, "the merged bias")
        if any(p.ndim == 4 and not p.is_contiguous() for p in self.parameters()):
            conv = conv.to(memory_format=torch.channels_last)
        return conv.train(self.training)

    def switch_to_deploy(self) -> None:
        """Convert in place: from now on the block holds one convolution. Harmless the second time.

        Raises:
            ValueError: in training mode.
        """
        if self.reparam is None:
            self.reparam = self._merge()
            self.branches.clear()
            self.bn = None

    def gammas(self) -> dict[str, Tensor]:
        """By branch, the outer norm's gamma `[O]`, or the factor in a linear block."""
        return {name: branch.bn.weight if branch.factor is None else branch.factor for name, branch in self.branches.items()}

    def init_gamma(self, value: float) -> None:
        """Set the outer norm's gamma of every branch (its factor in a linear block)."""
        for gamma in self.gammas().values():
            nn.init.constant_(gamma, value)

    def single_init(self) -> None:
        """Start as the plain convolution: gamma 1 in the first `kxk` branch, 0 in all others.

        Raises:
            ValueError: if there is no `kxk` branch.
        """
        if "kxk" not in self.branches:
            raise ValueError(f"single_init needs a kxk branch; the block has {', '.join(self.branches) or 'none: it is deployed'}")
        self.init_gamma(0.0)
        nn.init.ones_(self.gammas()["kxk"])

    def _plain_conv(self, device, dtype) -> nn.Conv2d:
        g = self.geometry
        return nn.utils.skip_init(nn.Conv2d, g.in_channels, g.out_channels, g.kernel_size, g.stride, g.padding, g.dilation,
                                  g.groups, padding_mode=g.padding_mode, device=device or torch.get_default_device(), dtype=dtype)

    def extra_repr(self) -> str:
        g = self.geometry
        return (f"{g.in_channels}, {g.out_channels}, kernel_size={g.kernel_size}, stride={g.stride}, padding={g.padding}, "
                f"dilation={g.dilation}, groups={g.groups}, mode={self.mode}")


class DiverseBranchBlock(ReparamConv2d):
    """The Diverse Branch Block with its published signature (CVPR 2021, figure 2; the authors' code).

    Branches: kxk, 1x1, 1x1_avg and 1x1_kxk; in depthwise convolutions kxk, avg and 1x1_kxk.

    Args:
        in_channels: as in `ReparamConv2d`, as is all that is not explained here.
        out_channels: see there.
        kernel_size: see there.
        stride: see there.
        padding: see there.
        dilation: see there.
        groups: see there.
        internal_channels_1x1_3x3: see `internal_channels` there.
        deploy: see there.
        nonlinear: see there.
        single_init: start as the plain convolution, see the method.
        **kwargs: `mode`, `positions`, `padding_mode`, `device`, `dtype`.
    """

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1,
                 internal_channels_1x1_3x3=None, deploy=False, nonlinear=None, single_init=False, **kwargs):
        depthwise = groups == in_channels == out_channels
        branches = ("kxk", "avg", "1x1_kxk") if depthwise else ("kxk", "1x1", "1x1_avg", "1x1_kxk")
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, branches,
                         internal_channels=internal_channels_1x1_3x3, deploy=deploy, nonlinear=nonlinear, **kwargs)
        if single_init and not deploy:
            self.single_init()


class AsymmetricConvBlock(ReparamConv2d):
    """ACNet's block (ICCV 2019): kxk, 1xk and kx1. Arguments as `ReparamConv2d`, without `branches`."""

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1, **kwargs):
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, ("kxk", "1xk", "kx1"),
                         **kwargs)


class OnlineReparamBlock(ReparamConv2d):
    """OREPA's block (CVPR 2022): six branches without norms, summed as kernels. Arguments as `ReparamConv2d`, without `branches`."""

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1, **kwargs):
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups,
                         ("kxk", "1x1_avg", "1x1_prior", "1x1_kxk", "1x1", "dw_1x1"), **{"mode": "linear"} | kwargs)


BLOCKS = {"dbb": DiverseBranchBlock, "acb": AsymmetricConvBlock, "orepa": OnlineReparamBlock}


def copied(model: nn.Module) -> nn.Module:
    """A copy of a network.

    Raises:
        ValueError: if it cannot be copied.
    """
    try:
        return copy.deepcopy(model)
    except RuntimeError as error:  # torch.nn.utils.prune and the old weight_norm keep a computed weight
        raise ValueError(f"the network cannot be copied ({error}): make pruning or weight norms permanent first") from error


@contextmanager
def branchwise(model: nn.Module):
    """Within this context, every block of `model` in eval runs branch by branch: the "before" of a proof."""
    blocks = [m for m in model.modules() if isinstance(m, ReparamConv2d)]
    before = [block.branchwise for block in blocks]
    for block in blocks:
        block.branchwise = True
    try:
        yield model
    finally:
        for block, value in zip(blocks, before, strict=True):
            block.branchwise = value
