"""Put blocks into a network; dbb.deploy takes them out again."""

from collections import defaultdict
from collections.abc import Callable, Collection, Container, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import partial
from inspect import getmembers, isfunction, signature
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from dbb.block import BLOCKS, ReparamConv2d, copied
from dbb.flow import Flow, Inputs, after_norm, partner
from dbb.subclass import inner_convolution, without_weight
from dbb.transforms import fill

INITS = ("mean", "ones", "third", "single")  # see replace_convs
FUSE_STEPS = ("fuse", "reparam", "switch_to_deploy", "convert_to_deploy", "merge_kernel")  # names begin so; see merges_itself
Block = str | Sequence[str] | Callable[..., ReparamConv2d] | None


class Row(NamedTuple):
    """What became of one convolution: the branches of its `block`, which took in `norm`; or None and the `reason` why it stayed."""

    module: str
    kernel_size: tuple[int, ...]
    block: str | None
    reason: str = ""
    norm: str = ""


class Report(list[Row]):
    """A row per convolution of the network; `str()` is a table of them, grouped by what became of them."""

    def __str__(self) -> str:
        groups = defaultdict(list)
        for row in sorted(self, key=lambda row: row.block is None):
            outcome = f"became {row.block}" if row.block is not None else f"stayed: {row.reason}"
            groups["x".join(map(str, row.kernel_size)), outcome].append(row.module)
        lines = [f"{sum(row.block is not None for row in self)} of {len(self)} convolutions became blocks"]
        for (size, outcome), modules in groups.items():
            names = ", ".join(modules[:3]) + (", ..." if len(modules) > 3 else "")
            lines.append(f"{len(modules):5d}  {size:>5s}  {outcome} ({names})")
        return "\n".join(lines)


class NothingSwappedError(ValueError):
    """No convolution could become a block; `report` has the reasons."""

    def __init__(self, report: Report):
        self.report = report
        rows = [f"{row.module} ({'x'.join(map(str, row.kernel_size))}) stays, {row.reason}" for row in report[:5]]
        more = [f"and {len(report) - 5} more"] * (len(report) > 5)
        super().__init__("no convolution of the network can become a block: " + ("; ".join(rows + more) or "it has none"))


def replace_convs(model: nn.Module, block: Block | Mapping[str, Block] = "dbb", include: Sequence[str] | None = None,
                  exclude: Sequence[str] | None = None, example_input: Inputs | None = None,
                  kernel_sizes: Container[int] = range(2, 7), init: str = "mean") -> tuple[nn.Module, Report]:
    """Swap K x K convolutions, each with the BatchNorm fed by it, for blocks.

    Pairs are found by where tensors flow, in one forward pass in eval on `example_input`, not by names: what a network does
    with other inputs, or in training only, is not seen. The first `kxk` branch
    takes over the convolution's weight and the norm's parameters and statistics; every branch takes over the norm's
    gamma (times a factor, see `init`), epsilon and momentum. What a norm module does besides (timm's `BatchNormAct2d`
    activates) stays in its place, and so does what a subclass of Conv2d does to its input (dynamic "same" padding).

    Args:
        model: left as it is.
        block: a name from `BLOCKS`; or a list of branches; or a callable with the signature of `DiverseBranchBlock`; or
            several of them for different layers: a dict from glob patterns on module names, of which the last that
            matches counts, and None leaves a convolution.
        include: glob patterns; only convolutions whose module name matches one become blocks. Those inside a module that
            merges its own branches (RepVGG's unit in timm) do so if they are included here: that module's own fuse
            step fails then, and `reparameterize` is the one to call.
        exclude: glob patterns; convolutions whose module name matches one stay.
        example_input: `[N, C, H, W]`; or several inputs, in order or by name; by default one black image of 224x224.
        kernel_sizes: lengths of a kernel's longer side that become blocks.
        init: the branches' gamma: "mean", the norm's divided by the number of branches, so that their sum starts as the mean
            of them: it never varies more than the norm's output does, however alike the branches are; "ones", the norm's
            (DBB, all ones in a new network), with which n independent branches vary n times as much; "third", a third of it
            (ACNet on CIFAR); "single", the norm's in the first `kxk` branch and 0 in the others. With "single" the new network
            computes what `model` does, in eval and in training: the warm start from trained weights. A block in mode "linear"
            has one norm behind the sum, and starts as OREPA's with "mean".

    Returns:
        A new model, and a report with a row per convolution.

    Raises:
        ValueError: if a block, branch or `init` is unknown or cannot be, a pattern matches no convolution, the network
            cannot run on `example_input` or is lazy, or nothing can become a block (`NothingSwappedError`).
    """
    if init not in INITS:
        raise ValueError(f"init={init!r} is unknown; known are {', '.join(INITS)}")
    if any(is_lazy(tensor) for tensor in [*model.parameters(), *model.buffers()]):
        raise ValueError("the network has lazy modules, which have no shapes yet: run it once on an image first")
    makers = {pattern: _maker(choice) for pattern, choice in (block if isinstance(block, Mapping) else {"*": block}).items()}
    result, traced = copied(model), copied(model)  # what a forward pass may change stays in `traced`
    names = {module: name for name, module in traced.named_modules()}
    kept = {part for module in names if isinstance(module, ReparamConv2d) for part in (module.outer, module.reparam)}
    convs = {name: module for module, name in names.items() if isinstance(module, _ConvNd) and module not in kept}
    for knob, patterns in (("include", include), ("exclude", exclude), ("block", [p for p in makers if p != "*"])):
        for pattern in patterns or ():
            if not any(fnmatchcase(name, pattern) for name in convs):
                nearest = get_close_matches(pattern, convs, n=4, cutoff=0) or ["none"]
                raise ValueError(f"{knob}: the pattern {pattern!r} matches no convolution; there are {', '.join(nearest)} "
                                 f"({len(convs)} in all)")
    if example_input is None:
        first = next((module for module in names if isinstance(module, nn.Conv2d | ReparamConv2d)), nn.Conv2d(3, 1, 1))
        example_input = first.weight.new_zeros(1, first.in_channels, 224, 224)
    flow = Flow(traced).run(traced, example_input)

    def judge(name: str, conv: _ConvNd) -> str | tuple[Any, ...]:
        """Why a convolution stays; or what makes its block, its norm, what that does besides, and the inner convolution."""
        make = next((makers[pattern] for pattern in reversed(makers) if fnmatchcase(name, pattern)), None)
        if include is not None and not any(fnmatchcase(name, pattern) for pattern in include):
            return "not included"
        if any(fnmatchcase(name, pattern) for pattern in exclude or ()):
            return "excluded"
        if make is None:
            return "no block is meant for it"
        if not isinstance(conv, nn.Conv2d):
            return f"{type(conv).__name__} is no Conv2d"
        if max(conv.kernel_size) not in kernel_sizes:
            return f"only kernel sizes {', '.join(map(str, kernel_sizes))} become blocks"
        host = merges_itself(result, name, convs)
        if host is not None and include is None:
            return host
        norm = partner(conv, flow, names)
        if isinstance(norm, str):
            return norm
        if any(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
               for module in map(result.get_submodule, (name, names[norm]))):
            return "it or its norm has hooks or a forward of its own, which a block would not run"
        rest = after_norm(norm)
        if rest is None:
            return f"its norm is a {type(norm).__name__}, which does more than is known here"
        if host is not None:  # whose own step must fail, since it would leave out the merged bias
            rest = nn.Sequential(*rest.children())
        if type(conv) is nn.Conv2d:
            return make, norm, rest, vars(conv)
        inner = inner_convolution(conv, flow.inputs[conv])
        return f"{type(conv).__name__} {inner}" if isinstance(inner, str) else (make, norm, rest, inner)

    report, replacements = Report(), {}
    for name, conv in convs.items():
        verdict = judge(name, conv)
        if isinstance(verdict, str):
            report.append(Row(name, conv.kernel_size, None, verdict))
            continue
        make, norm, rest, inner = verdict
        conv_mode, norm_mode = (result.get_submodule(names[module]).training for module in (conv, norm))
        made = replacements[name] = _make(name, make, conv, inner, norm, init).train(conv_mode)
        for outer in made.norms():
            outer.train(norm_mode)
        replacements[names[norm]] = rest.train(norm_mode)
        report.append(Row(name, conv.kernel_size, " + ".join(made.branches), norm=names[norm]))
    if not replacements:
        raise NothingSwappedError(report)

    aliases = {alias: names[module] for alias, module in traced.named_modules(remove_duplicate=False)}
    for alias, name in aliases.items():
        if name in replacements:
            result.set_submodule(alias, replacements[name])
    return result, report


def merges_itself(model: nn.Module, name: str, convs: Collection[str]) -> str | None:
    """The reason why a convolution stays that lies inside a module with a fuse step of its own; None if it does not.

    Such a step (timm's `fuse` and `reparameterize`, `switch_to_deploy` of many) takes no argument, and reads the pairs of
    convolution and norm that it knows. A network as a whole may have one: what it calls is judged by itself, but for
    `fuse_model`, which hands all pairs to torch's `fuse_modules`; that takes a `BatchNorm2d`, and nothing in its place.

    Args:
        model: the network.
        name: of the convolution.
        convs: the names of all convolutions, which tell a network from its units.
    """
    parts = name.split(".")
    for depth in range(len(parts)):
        path = ".".join(parts[:depth])
        whole = depth == 0 or all(other.startswith(f"{path}.") for other in convs)
        kind = type(model.get_submodule(path))
        for method, function in getmembers(kind, isfunction):
            if method == "fuse_model" or method.startswith(FUSE_STEPS) and not whole:
                try:
                    signature(function).bind(None)  # self alone
                except TypeError:
                    continue
                return f"it is part of a {kind.__name__}, which merges its branches itself ({method}); include takes it"
    return None


def _maker(block: Block) -> Callable[..., ReparamConv2d] | None:
    """What makes a block."""
    if isinstance(block, str):
        if block not in BLOCKS:
            raise ValueError(f"block={block!r} is unknown; known are {', '.join(BLOCKS)}, or a list of branches")
        return BLOCKS[block]
    return block if block is None or callable(block) else partial(ReparamConv2d, branches=tuple(block))


def _make(name: str, make: Callable[..., ReparamConv2d], conv: nn.Conv2d, inner: Mapping[str, Any],
          norm: nn.BatchNorm2d | nn.SyncBatchNorm, init: str) -> ReparamConv2d:
    """A block in place of a convolution and its norm, with what both of them hold."""
    try:
        block = make(conv.in_channels, conv.out_channels, conv.kernel_size, inner["stride"], inner["padding"], inner["dilation"],
                     inner["groups"], padding_mode=inner["padding_mode"], device=conv.weight.device, dtype=conv.weight.dtype)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if init == "single" and "kxk" not in block.branches:
        raise ValueError(f"{name}: init=single, a warm start, needs a kxk branch; the block has {', '.join(block.branches)}")
    for outer in block.norms():
        outer.eps, outer.momentum, outer.track_running_stats = norm.eps, norm.momentum, norm.track_running_stats
        nn.init.zeros_(outer.bias)
        fill(outer.weight, norm.weight, f"{name}: the norm's weight")
    in_sum = 1 if block.bn is not None else len(block.branches)  # a norm behind the sum makes up for any size
    factor = {"mean": 1 / in_sum, "ones": 1.0, "third": 1 / 3, "single": 0.0}[init]
    with torch.no_grad():
        for gamma in block.gammas().values():
            gamma *= factor
        if init == "single":
            block.gammas()["kxk"].copy_(norm.weight if block.bn is None else torch.ones_like(norm.weight))
    for branch in block.branches.values():
        if getattr(branch, "scale", None) is not None:
            branch.scale.eps = norm.eps
    heir = block.bn
    if "kxk" in block.branches:
        heir = heir or block.branches["kxk"].bn
        with torch.no_grad():
            block.branches["kxk"].weight.copy_(conv.weight)
    if heir is not None:
        mean = norm.running_mean if conv.bias is None else norm.running_mean - conv.bias  # the norm subtracts it again
        for key, value in (("bias", norm.bias), ("running_mean", mean), ("running_var", norm.running_var)):
            fill(getattr(heir, key), value, f"{name}: the norm's {key}")
        heir.num_batches_tracked.copy_(norm.num_batches_tracked)
    if type(conv) is not nn.Conv2d:
        block.outer = without_weight(conv)
    if isinstance(norm, nn.SyncBatchNorm):
        block = nn.SyncBatchNorm.convert_sync_batchnorm(block, norm.process_group)
    if not conv.weight.is_contiguous():
        block = block.to(memory_format=torch.channels_last)
    block.requires_grad_(conv.weight.requires_grad)  # a frozen layer stays frozen
    for outer in block.norms():
        outer.weight.requires_grad_(norm.weight.requires_grad)
        outer.bias.requires_grad_(norm.bias.requires_grad)
    return block
