"""Put blocks into a network; dbb.deploy takes them out again."""

from collections import defaultdict
from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import partial
from inspect import getmembers, isfunction, signature
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from dbb.block import ReparamConv2d, copied
from dbb.flow import Flow, Inputs, after_norm, partner, refuse_hooks, refuse_odd
from dbb.private import AnyConv
from dbb.published import BLOCKS
from dbb.subclass import Rest, Stays, inner_convolution, with_weight

INITS = ("mixed", "mean", "ones", "third", "single")  # see replace_convs
# How names of methods begin that merge branches, see merges_itself.
FUSE_STEPS = ("fuse", "reparam", "switch_to_deploy", "convert_to_deploy", "merge_kernel", "repvgg_convert",
              "local_inject", "locality_injection")
# What layers have of themselves; on meta, where nothing is drawn.
STOCK_CONV, STOCK_NORM = nn.Conv2d(1, 1, 1, device="meta"), nn.SyncBatchNorm(1, device="meta")
Maker = Callable[..., ReparamConv2d]
Block = str | Sequence[str] | Maker | None
Norm = nn.BatchNorm2d | nn.SyncBatchNorm


class Row(NamedTuple):
    """What became of a convolution: its `block`, which took in `norm` (if one follows), or a `reason`."""

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
            own = "" if row.norm else ", with norms of its own"
            outcome = f"stayed: {row.reason}" if row.block is None else f"became {row.block}{own}"
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
        parts = [f"{row.module} ({'x'.join(map(str, row.kernel_size))}) stays, {row.reason}"
                 for row in report[:5]] or ["it has none"]
        if len(report) > 5:
            parts.append(f"and {len(report) - 5} more")
        super().__init__(f"no convolution of the network can become a block: {'; '.join(parts)}")


def replace_convs(model: nn.Module, block: Block | Mapping[str, Block] = "dbb",
                  include: Sequence[str] | None = None, exclude: Sequence[str] | None = None,
                  example_input: Inputs | None = None, kernel_sizes: Container[int] = range(2, 7),
                  init: str = "mixed", without_norm: bool = False) -> tuple[nn.Module, Report]:
    """Swap K x K convolutions, each with the BatchNorm fed by it, for blocks.

    Pairs are found by where tensors flow, in one forward pass in eval on `example_input`: what a network does
    with other inputs, or in training only, is not seen. The first `kxk` branch takes over the convolution's
    weight and the norm's parameters and statistics; every branch takes over the norm's gamma (times a factor,
    see `init`), epsilon and momentum. What a norm module does besides (timm's `BatchNormAct2d` activates)
    stays in its place, and so does what a subclass of Conv2d does to its input.

    Args:
        model: left as it is.
        block: a name from `BLOCKS`; or a list of branches; or a callable with the signature of
            `DiverseBranchBlock`; or a dict of these, by glob patterns on module names, of which the last that
            matches counts, and None leaves a convolution.
        include: glob patterns; only convolutions whose module name matches one become blocks. Those inside a
            module that merges its own branches (RepVGG's unit in timm) do so if they are included here: that
            module's own fuse step fails then, and `reparameterize` is the one to call.
        exclude: glob patterns; convolutions whose module name matches one stay.
        example_input: `[N, C, H, W]`; or several inputs, in order or by name; by default a black 224x224.
        kernel_sizes: lengths of a kernel's longer side that become blocks.
        init: the branches' gamma: "mean", the norm's over the number of branches: the sum never varies more
            than the norm's output; "ones", the norm's (DBB), with which n independent branches vary n times
            as much; "third", a third of it (ACNet on CIFAR); "single", the norm's in the first `kxk` branch
            and 0 elsewhere: the new network computes what `model` does, in eval and in training, the warm
            start from trained weights; "mixed", "single" in depthwise blocks that have a `kxk` branch and
            "mean" in all others, which measured best (benchmarks/README.md, "The first steps"). A block in
            mode "linear" has one norm behind the sum, and starts as OREPA's with "mean" and "mixed".
        without_norm: convolutions that no norm follows, or not one of their own, become blocks too. These
            bring norms of their own, which start as new ones; the converted convolution has a bias.

    Returns:
        A new model, and a report with a row per convolution.

    Raises:
        ValueError: if a block, branch or `init` is unknown or cannot be, a pattern matches no convolution,
            the network is lazy or cannot run on `example_input`, or nothing can become a block
            (`NothingSwappedError`).
    """
    _check_arguments(model, kernel_sizes, init)
    choices = block if isinstance(block, Mapping) else {"*": block}
    makers = {pattern: _maker(choice) for pattern, choice in choices.items()}
    result, traced = copied(model), copied(model)  # what a forward pass may change stays in `traced`
    flow = Flow(traced)
    names = {module: name for name, module in traced.named_modules()}
    held = {part for m in names if isinstance(m, ReparamConv2d) for part in (m.outer, m.reparam)}
    convs = {name: m for m, name in names.items() if isinstance(m, AnyConv) and m not in held}
    check_patterns(convs, include=include, exclude=exclude, block=[p for p in makers if p != "*"])
    flow.run(traced, _black_image(names) if example_input is None else example_input)

    report, replacements = Report(), {}
    for name, conv in convs.items():
        ours = result.get_submodule(name)
        try:
            make = _wanted(name, conv, makers, include, exclude, kernel_sizes)
            host = merges_itself(result, name, convs)
            if host is not None and include is None:
                raise Stays(host)
            refuse_odd(conv, flow)
            norm, rest = _norm_behind(conv, flow, names, result, without_norm)
            arguments = inner_convolution(conv, flow.inputs[conv])
        except Stays as reason:
            report.append(Row(name, conv.kernel_size, None, str(reason)))
            continue
        our_norm = _new_norm(ours) if norm is None else result.get_submodule(names[norm])
        if norm is None and init == "single":
            raise ValueError(f"{name}: init=single, a warm start, needs the norm that follows, and there is "
                             "none: leave out without_norm, or exclude this convolution")
        replacements[conv] = _make(name, make, ours, arguments, our_norm, init)
        replacements[conv].keep_attributes(_added_attributes(ours, STOCK_CONV))
        if norm is not None:
            # A host's own step must fail, since it would leave out the merged bias.
            rest = rest if host is None else nn.Sequential(*rest)
            replacements[norm] = rest.train(our_norm.training)
            vars(rest).update(_added_attributes(our_norm, STOCK_NORM))
        branches = " + ".join(replacements[conv].branches)
        report.append(Row(name, conv.kernel_size, branches, norm=names.get(norm, "")))
    if not replacements:
        raise NothingSwappedError(report)

    for alias, module in traced.named_modules(remove_duplicate=False):
        if module in replacements:
            result.set_submodule(alias, replacements[module])
    return result, report


def _norm_behind(conv: nn.Conv2d, flow: Flow, names: Mapping[nn.Module, str], result: nn.Module,
                 without_norm: bool) -> tuple[nn.Module | None, nn.Module | None]:
    """The norm that a block takes in, and what stays in its place; None if it may do without; or `Stays`."""
    norm = rest = None
    try:
        norm = partner(conv, flow, names)
        rest = after_norm(result.get_submodule(names[norm]))
    except Stays:
        if not without_norm:
            raise
        norm = None
    refuse_hooks(*filter(None, (conv, norm)))
    return norm, rest


def _new_norm(conv: nn.Conv2d) -> nn.BatchNorm2d:
    """A norm as if it had followed a convolution, whose bias, if it has one, is the norm's."""
    norm = nn.BatchNorm2d(conv.out_channels, device=conv.weight.device, dtype=conv.weight.dtype)
    norm.requires_grad_(conv.weight.requires_grad)
    if conv.bias is not None:
        norm.bias.data.copy_(conv.bias)
        norm.running_mean.copy_(conv.bias)
    return norm.train(conv.training)


def _added_attributes(layer: nn.Module, stock: nn.Module) -> dict[str, Any]:
    """What a network has set on a layer of its own, to read it later: `layer.from_ = -1`."""
    return {key: value for key, value in vars(layer).items() if key not in vars(stock)}


def _check_arguments(model: nn.Module, kernel_sizes: Container[int], init: str) -> None:
    if not isinstance(kernel_sizes, Container):
        raise ValueError(f"kernel_sizes={kernel_sizes} is one size: give all of them, [{kernel_sizes}]")
    if init not in INITS:
        raise ValueError(f"init={init!r} is unknown; known are {', '.join(INITS)}")
    if any(is_lazy(tensor) for tensor in [*model.parameters(), *model.buffers()]):
        raise ValueError("the network has lazy modules, which have no shapes yet: "
                         "run it once on an image first")


def _black_image(modules: Iterable[nn.Module]) -> Tensor:
    """`[1, C, 224, 224]`, with the channels, type and device of the first convolution."""
    first = next((m for m in modules if isinstance(m, nn.Conv2d | ReparamConv2d)), nn.Conv2d(3, 1, 1))
    return first.weight.new_zeros(1, first.in_channels, 224, 224)


def check_patterns(names: Collection[str], **knobs: Sequence[str] | None) -> None:
    """A ValueError if a glob pattern matches no convolution's name."""
    for knob, patterns in knobs.items():
        if isinstance(patterns, str):
            raise ValueError(f"{knob}={patterns!r} is one pattern: give a list of them, [{patterns!r}]")
        for pattern in patterns or ():
            if not any(fnmatchcase(name, pattern) for name in names):
                nearest = get_close_matches(pattern, names, n=4, cutoff=0) or ["none"]
                raise ValueError(f"{knob}: the pattern {pattern!r} matches no convolution; there are "
                                 f"{', '.join(nearest)} ({len(names)} in all)")


def check_wanted(name: str, conv: AnyConv, include: Sequence[str] | None, exclude: Sequence[str] | None,
                 kernel_sizes: Container[int]) -> None:
    """`Stays` if the arguments of `replace_convs` leave a convolution as it is."""
    matches = partial(fnmatchcase, name)
    if include is not None and not any(map(matches, include)):
        raise Stays("not included")
    if any(map(matches, exclude or ())):
        raise Stays("excluded")
    if not isinstance(conv, nn.Conv2d):
        raise Stays(f"{type(conv).__name__} is no Conv2d")
    if max(conv.kernel_size) not in kernel_sizes:
        raise Stays(f"only kernel sizes {', '.join(map(str, kernel_sizes))} become blocks")


def _wanted(name: str, conv: AnyConv, makers: Mapping[str, Maker | None], *chosen) -> Maker:
    """What makes the block that the arguments of `replace_convs` want for a convolution; `Stays` if none."""
    check_wanted(name, conv, *chosen)
    make = next((makers[pattern] for pattern in reversed(makers) if fnmatchcase(name, pattern)), None)
    if make is None:
        raise Stays("no block is meant for it")
    return make


def merges_itself(model: nn.Module, name: str, convs: Collection[str]) -> str | None:
    """Why a convolution stays that lies inside a module with a fuse step of its own; None if it does not.

    Such a step (timm's `fuse` and `reparameterize`, `switch_to_deploy` of many) takes no argument, and reads
    the pairs of convolution and norm that it knows. A network as a whole, told from its units by the names of
    all `convs`, may have one: what it calls is judged by itself, but for `fuse_model`, which hands all pairs
    to torch's `fuse_modules`; that takes a `BatchNorm2d`, and nothing in its place.
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
                return (f"it is part of a {kind.__name__}, which merges its branches itself ({method}); "
                        "include takes it")
    return None


def _maker(block: Block) -> Maker | None:
    """What makes a block."""
    if isinstance(block, str):
        if block not in BLOCKS:
            known = ", ".join(BLOCKS)
            raise ValueError(f"block={block!r} is unknown; known are {known}, or a list of branches")
        return BLOCKS[block]
    return block if block is None or callable(block) else partial(ReparamConv2d, branches=tuple(block))


def _make(name: str, make: Maker, conv: nn.Conv2d, arguments: Mapping[str, Any], norm: Norm,
          init: str) -> ReparamConv2d:
    """A block in place of a convolution and its norm, with what both of them hold."""
    like = conv.weight
    try:
        block = make(conv.in_channels, conv.out_channels, conv.kernel_size,
                     *[arguments[key] for key in ("stride", "padding", "dilation", "groups")],
                     padding_mode=arguments["padding_mode"], device=like.device, dtype=like.dtype)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if init == "single" and "kxk" not in block.branches:
        raise ValueError(f"{name}: init=single, a warm start, needs a kxk branch; the block has "
                         f"{', '.join(block.branches)}")
    block.train(conv.training).requires_grad_(like.requires_grad)  # a frozen layer stays frozen
    if type(conv) is not nn.Conv2d:
        outer = with_weight(conv, None, None)
        # It is kept out of the module tree, where code would take it for a convolution of its own: to
        # initialise it, prune it, or give its weight to an optimiser. What it holds besides is in the tree.
        vars(block)["outer"] = outer
        if outer._modules or outer._parameters or outer._buffers:
            block._modules["outer"] = Rest(outer)
    _start_norms(block, norm, init)
    _hand_over_values(block, conv, norm)
    if isinstance(norm, nn.SyncBatchNorm):
        nn.SyncBatchNorm.convert_sync_batchnorm(block, norm.process_group)
    if not like.is_contiguous():
        block.to(memory_format=torch.channels_last)
    return block


@torch.no_grad()
def _start_norms(block: ReparamConv2d, norm: Norm, init: str) -> None:
    """Give every norm of a block the old one's settings, and every branch its gamma; see `replace_convs`."""
    for outer in block.norms():
        outer.to(norm.weight.dtype)  # perhaps float32, while the convolution is in half
        for key in ("eps", "momentum", "track_running_stats", "training"):
            setattr(outer, key, getattr(norm, key))
        outer.weight.requires_grad_(norm.weight.requires_grad)
        outer.bias.requires_grad_(norm.bias.requires_grad)
        nn.init.zeros_(outer.bias)
        outer.weight.copy_(norm.weight)
    for branch in block.branches.values():
        if branch.scale is not None:
            branch.scale.to(norm.weight.dtype)
            branch.scale.eps = norm.eps
    if init == "mixed":
        as_before = block.geometry.depthwise and block.bn is None and "kxk" in block.branches
        init = "single" if as_before else "mean"
    in_sum = 1 if block.bn is not None else len(block.branches)  # a norm behind the sum makes up for any size
    factor = {"mean": 1 / in_sum, "ones": 1.0, "third": 1 / 3, "single": 0.0}[init]
    for gamma in block.gammas().values():
        gamma *= factor
    if init == "single":
        start = norm.weight if block.bn is None else torch.ones_like(norm.weight)
        block.gammas()["kxk"].copy_(start)


@torch.no_grad()
def _hand_over_values(block: ReparamConv2d, conv: nn.Conv2d, norm: Norm) -> None:
    """The convolution's weight for the `kxk` branch, and the norm's values for its norm, or the block's."""
    heir = block.bn
    if "kxk" in block.branches:
        heir = heir or block.branches["kxk"].bn
        block.branches["kxk"].weight.copy_(conv.weight)
    if heir is None:
        return
    bias = 0 if conv.bias is None else conv.bias  # which the norm subtracts again
    values = {"bias": norm.bias, "running_mean": norm.running_mean - bias, "running_var": norm.running_var}
    for key, value in values.items():
        getattr(heir, key).copy_(value)
    if norm.num_batches_tracked is not None:
        heir.num_batches_tracked.copy_(norm.num_batches_tracked)
