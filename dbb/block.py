"""The block: a sum of branches in training, one convolution in eval and after conversion."""

import copy
from collections import Counter
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from dbb.branch import BRANCHES
from dbb.geometry import Geometry
from dbb.modes import MODES
from dbb.moments import process_group
from dbb.norms import running, uses_batch_statistics
from dbb.private import DisableTorchFunctionSubclass, pair
from dbb.rows import beside, stacked, weighted
from dbb.subclass import Intercept, lend_weight, with_weight
from dbb.transforms import fill, fuse_conv_norm

POSITIONS = 256  # see benchmarks/README.md
FIXED = {field.name for field in fields(Geometry)}


class ReparamConv2d(nn.Module):
    """`nn.Conv2d` and the norm behind it, as a sum of branches `BN_b(conv(x, K_b))`.

    Maps `[N, in_channels, H, W]` to `[N, out_channels, H', W']`. In training every branch is normalised with
    the statistics of its own map, see `mode`. With running statistics (eval, or all norms frozen) one merged
    convolution runs. Arguments that are not below are as in `nn.Conv2d`.

    Args:
        branches: names from `BRANCHES`, repeated for several of a kind; one that does not fit the shape (an
            identity with stride 2) is left out.
        mode: how the sum is run in training (`dbb.modes`): "exact", the published function; "online", the
            same with variances over some positions, one convolution; "linear", a learned factor a branch
            instead of its norm, and one norm behind the sum (OREPA). The first two have the same parameters.
        positions: how many positions of the output, over all images, `online` takes variances over. By
            default 256, and all in depthwise blocks, which run as `exact` then: their responses are of one
            channel, which may be zero almost everywhere, not sums over channels (benchmarks/README.md).
        internal_channels: width inside `1x1_kxk`; by default in_channels, twice that in a depthwise block.
        deploy: build the merged convolution only, for loading converted weights.
        nonlinear: a module applied to the sum.

    Raises:
        ValueError: if a branch or mode is unknown, `nn.Conv2d` would not take the arguments, or no branch
            spans the kernel.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size, stride=1, padding=0, dilation=1,
                 groups: int = 1, branches: Sequence[str] = ("kxk",), mode: str = "exact",
                 positions: int | None = None, padding_mode: str = "zeros",
                 internal_channels: int | None = None, deploy: bool = False,
                 nonlinear: nn.Module | None = None, device=None, dtype=None):
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"mode={mode!r} is unknown; known are {', '.join(MODES)}")
        if positions is not None and positions < 4:
            raise ValueError(f"positions={positions}: online variances need 4 positions at least")
        self.geometry = Geometry(in_channels, out_channels, kernel_size, stride, padding, dilation, groups,
                                 padding_mode, internal_channels)
        self.pixelwise = Geometry(in_channels, in_channels, 1, groups=groups)  # sees pixels one by one
        vars(self).update(vars(self.geometry))  # for code that asks a convolution
        self.nonlinear = nn.Identity() if nonlinear is None else nonlinear
        self.outer = None  # the subclass of Conv2d that the block replaced, if it was one; see dbb.subclass
        self.mode = mode
        self.positions = positions or (None if self.geometry.depthwise else POSITIONS)  # None: all
        self.branchwise = False  # see the context manager of that name
        self.added = {}  # attributes that a network has set on the convolution, see keep_attributes
        self.bn = self.reparam = None
        if mode == "linear" and not deploy:
            self.bn = nn.BatchNorm2d(out_channels, device=device, dtype=dtype)
        self.branches = nn.ModuleDict()
        if deploy:
            self.reparam = self._plain_conv(device, dtype)
            self.reparam.reset_parameters()
        else:
            self._add_branches(branches, device, dtype)

    def _add_branches(self, names: Sequence[str], device, dtype) -> None:
        """Those that fit, under their names; further ones of a kind are `name_2`, `name_3` and so on."""
        copies = Counter()
        for name in names:
            if name not in BRANCHES:
                known = ", ".join(sorted(BRANCHES))
                raise ValueError(f"branches: there is no branch {name!r}; known are {known}")
            if not BRANCHES[name].fits(self.geometry):
                continue
            branch = BRANCHES[name](self.geometry, device=device, dtype=dtype)
            if self.mode == "linear":
                branch.linearize()
            copies[name] += 1
            self.branches[name if copies[name] == 1 else f"{name}_{copies[name]}"] = branch
        taps = [branch.taps(*self.kernel_size) for branch in self.branches.values()]
        if any(max(found, default=0) < size for size, *found in zip(self.kernel_size, *taps, strict=True)):
            raise ValueError(
                f"branches={list(names)}: none that fits {self.in_channels} to {self.out_channels} channels, "
                f"stride {self.stride}, spans the kernel of {self.kernel_size}; add kxk")

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
            raise AttributeError(
                f"the {name} of a block is computed from its branches and cannot be set: set that of the "
                "convolution from block.fuse(), or convert the network with reparameterize first")
        if name in FIXED:
            raise AttributeError(f"the {name} of a block is fixed: set that of the convolution before the "
                                 "blocks are put in")
        super().__setattr__(name, value)

    def forward(self, input: Tensor) -> Tensor:
        x = input  # called as torch's own layers call it
        if isinstance(x, fx.Proxy):
            return self._as_node(x)
        if self.outer is None:
            return self.nonlinear(self._sum(x))
        self.outer.training = self.training
        like = next((p for p in self.parameters() if p.ndim == 4), x)  # a replica has no parameters
        lend_weight(self.outer, x.device, like.dtype)
        with Intercept(self._inside):
            y = self.outer(x)
        if type(self.outer.weight) is not Tensor:  # a stand-in of torch.export, which nothing may keep
            self.outer.weight = self.outer.bias = None
        return self.nonlinear(y)

    def _inside(self, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):  # as F.conv2d
        given = [size if isinstance(size, str) else pair(size) for size in (stride, padding, dilation)]
        if given != [self.stride, self.padding, self.dilation]:
            raise ValueError(
                f"{type(self.outer).__name__} has stride {stride}, padding {padding}, dilation {dilation} "
                f"for this image, but had {self.stride}, {self.padding}, {self.dilation} for the example: "
                "exclude this layer")
        own = self.outer.weight.dtype
        if weight.dtype != own:  # which the subclass has cast to the input's type
            return self._sum(input.to(own)).to(weight.dtype)
        return self._sum(input)

    def _sum(self, x: Tensor) -> Tensor:
        if x.ndim != 4:
            raise ValueError(f"expected 4D input [N, C, H, W] (got {x.ndim}D input)")  # as BatchNorm2d does
        g, by_batch = self.geometry, any(map(uses_batch_statistics, self.norms()))
        if self.reparam is not None or not (by_batch or self.branchwise):
            return self._merged(x, *self.get_equivalent_kernel_bias())
        kind = type(x)
        if kind not in (Tensor, nn.Parameter) and kind.__torch_dispatch__ is Tensor.__torch_dispatch__:
            with DisableTorchFunctionSubclass():  # inside functions of ours, its operators would return views
                return self._sum(x.as_subclass(Tensor)).as_subclass(kind)
        self._run_hooks()
        if by_batch and (x.numel() or any(process_group(norm) is not None for norm in self.norms())):
            return MODES[self.mode](self, x)
        # An empty batch goes through the norms too: it has no statistics, unless other processes have images.
        padded = g.pad(x)
        first, *others = (branch.normed(branch.drawn(padded)) for branch in self.branches.values())
        total = sum(others, first)
        return total if self.bn is None else self.bn(total)

    def _run_hooks(self) -> None:
        """What torch's hooks do before a forward of what is not always called here: they set a weight."""
        scales = [branch.scale for branch in self.branches.values() if branch.scale is not None]
        for module in (*self.branches.values(), *scales, *self.norms()):
            for hook in module._forward_pre_hooks.values():
                if isinstance(hook, BasePruningMethod | SpectralNorm | WeightNorm):
                    hook(module, ())

    def norms(self) -> list[nn.BatchNorm2d]:
        """The outer norm of every branch, or the one norm of a linear block."""
        return [branch.bn for branch in self.branches.values()] if self.bn is None else [self.bn]

    def summed(self) -> tuple[Tensor, Tensor | float]:
        """Sum of the branches' kernels `[O, I/G, KH, KW]` and biases `[O]`, each with its norm or factor."""
        g, branches = self.geometry, self.branches.values()
        scales, biases = zip(*[branch.affine() for branch in branches], strict=True)
        rows = stacked([branch.kernel() for branch in branches], g.groups, g.kernel_size)
        scale = beside(scales, g.groups)
        kernel = weighted(rows.to(scale.dtype), scale).reshape(g.out_channels, -1, *g.kernel_size)
        return kernel, sum(biases[1:], biases[0])

    def get_equivalent_kernel_bias(self) -> tuple[Tensor, Tensor]:
        """Kernel `[O, I/G, KH, KW]` and bias `[O]` of the merged convolution; differentiable."""
        if self.reparam is not None:
            return self.reparam.weight, self.reparam.bias
        self._run_hooks()
        kernel, bias = self.summed()
        if self.bn is not None:
            kernel, bias = fuse_conv_norm(kernel, bias, *running(self.bn))
        dtype = next(iter(self.branches.values())).kernel().dtype  # perhaps half, while norms are in float32
        return kernel.to(dtype), bias.to(dtype)

    def _as_node(self, x: fx.Proxy) -> fx.Proxy:
        """What torch.fx sees: one node, as of torch's own layers; of a block by itself, its convolution."""
        if x.tracer.root is not self:
            return x.tracer.create_proxy("call_module", x.tracer.path_of_module(self), (x,), {})
        if self.training:
            raise ValueError("torch.fx cannot trace a block by itself in training mode: trace a network "
                             "around it, nn.Sequential(block), or call block.eval() first")
        values = copied(self)  # the tracer takes this block's own parameters for symbols
        kernel, bias = (tensor.detach() for tensor in values.get_equivalent_kernel_bias())
        return self.nonlinear(self._merged(x, kernel, bias))

    def _merged(self, x: Tensor | fx.Proxy, kernel: Tensor, bias: Tensor) -> Tensor | fx.Proxy:
        """Run the merged convolution. Not `g.conv`, which asks for memory formats: vmap and fx have none."""
        g = self.geometry
        x, padding = g.aligned(g.pad(x), g.kernel_size)
        return F.conv2d(x, kernel, bias, g.stride, padding, g.dilation, g.groups)

    def keep_attributes(self, added: dict[str, Any]) -> None:
        """Have attributes of the convolution's that the block lacks, and give them to the converted one."""
        self.added = {key: value for key, value in added.items() if not hasattr(self, key)}
        vars(self).update(self.added)

    def fuse(self) -> nn.Module:
        """Make the plain convolution that computes the same, in float64, cast back at the end.

        Returns:
            A trainable `nn.Conv2d` of the block's dtype, device and memory format (or the subclass of it that
            the block replaced); before `nonlinear`, if there is one, in a `nn.Sequential`.

        Raises:
            ValueError: in training mode, or if the block's dtype cannot hold a value.
        """
        conv = self.reparam or self._merge()
        if self.outer is not None:
            plain, conv = conv, with_weight(self.outer, conv.weight, conv.bias)
            conv.train(plain.training)
        vars(conv).update({key: vars(self)[key] for key in self.added})
        return conv if isinstance(self.nonlinear, nn.Identity) else nn.Sequential(conv, self.nonlinear)

    @torch.no_grad()
    def _merge(self) -> nn.Conv2d:
        if self.training or any(map(uses_batch_statistics, self.norms())):
            raise ValueError("a block in training mode cannot be converted: call model.eval() first")
        like = self.weight
        conv = self._plain_conv(like.device, like.dtype)
        merging = copied(self).to("meta" if like.is_meta else "cpu", torch.float64)
        kernel, bias = merging.get_equivalent_kernel_bias()
        fill(conv.weight, kernel, "the merged kernel")
        fill(conv.bias, bias, "the merged bias")
        if any(p.ndim == 4 and not p.is_contiguous() for p in self.parameters()):
            conv = conv.to(memory_format=torch.channels_last)
        return conv.eval()

    def switch_to_deploy(self) -> None:
        """Convert in place, to one convolution; raises as `fuse`. Harmless the second time."""
        if self.reparam is None:
            self.reparam = self._merge()
            self.branches.clear()
            self.bn = None

    def gammas(self) -> dict[str, Tensor]:
        """By branch, the outer norm's gamma `[O]`, or the factor in a linear block."""
        return {name: branch.gamma for name, branch in self.branches.items()}

    def init_gamma(self, value: float) -> None:
        """Set the outer norm's gamma of every branch (its factor in a linear block)."""
        for gamma in self.gammas().values():
            nn.init.constant_(gamma, value)

    def single_init(self) -> None:
        """Start as the plain convolution: gamma 1 in the first `kxk` branch (it must exist), 0 in others."""
        if "kxk" not in self.branches:
            found = ", ".join(self.branches) or "none: it is deployed"
            raise ValueError(f"single_init needs a kxk branch; the block has {found}")
        self.init_gamma(0.0)
        nn.init.ones_(self.gammas()["kxk"])

    def _plain_conv(self, device, dtype) -> nn.Conv2d:
        g = self.geometry
        return nn.utils.skip_init(
            nn.Conv2d, g.in_channels, g.out_channels, g.kernel_size, g.stride, g.padding, g.dilation,
            g.groups, padding_mode=g.padding_mode, device=device or torch.get_default_device(), dtype=dtype)

    def extra_repr(self) -> str:
        g = self.geometry
        return (f"{g.in_channels}, {g.out_channels}, kernel_size={g.kernel_size}, stride={g.stride}, "
                f"padding={g.padding}, dilation={g.dilation}, groups={g.groups}, mode={self.mode}")


def copied(model: nn.Module) -> nn.Module:
    """A copy of a network; a ValueError if it cannot be copied."""
    try:
        return copy.deepcopy(model)
    except RuntimeError as error:  # torch.nn.utils.prune and the old weight_norm keep a computed weight
        raise ValueError(f"the network cannot be copied ({error}): "
                         "make pruning or weight norms permanent first") from error


@contextmanager
def branchwise(model: nn.Module):
    """Within this context, every block of `model` in eval runs branch by branch: the "before" of a proof."""
    before = {block: block.branchwise for block in model.modules() if isinstance(block, ReparamConv2d)}
    for block in before:
        block.branchwise = True
    try:
        yield model
    finally:
        for block, value in before.items():
            block.branchwise = value
