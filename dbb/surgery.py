"""Put blocks into a network, and take them out again."""

import copy
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from fnmatch import fnmatch
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dbb.block import BLOCKS, ReparamConv2d


class Row(NamedTuple):
    """What became of one convolution: `block` is the block's name, or None with the `reason` why it stayed."""

    module: str
    kernel_size: tuple[int, int]
    block: str | None
    reason: str = ""


class Report(list[Row]):
    """A row per convolution of the network; `str()` is a table of those that were not swapped, grouped by reason."""

    def __str__(self) -> str:
        stayed = defaultdict(list)
        for row in self:
            if row.block is None:
                stayed[row.reason].append(row.module)
        swapped = len(self) - sum(map(len, stayed.values()))
        lines = [f"{swapped} of {len(self)} convolutions became blocks"]
        for reason, modules in stayed.items():
            names = ", ".join(modules[:3]) + (", ..." if len(modules) > 3 else "")
            lines.append(f"  {len(modules):3d} stayed: {reason} ({names})")
        return "\n".join(lines)


class _Flow(TorchDispatchMode):
    """Follow the outputs of convolutions through one forward pass.

    Works on tensors, below autograd, so that `torch.cat`, `+` and `F.relu` are seen as well as modules.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.norms = defaultdict(list)  # convolution -> the norm fed by each of its calls
        self.feeders = defaultdict(list)  # norm -> what feeds each of its calls: a convolution or None
        self.others = defaultdict(set)  # convolution -> the operators, besides its norm, that take its output
        self.made = {}  # id of an output -> (its convolution, the output, kept alive so that the id stays its own)
        self.inside = None  # the tensor that a norm is working on
        self.handles = []
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                self.handles.append(module.register_forward_hook(self._leave_conv))
            elif isinstance(module, nn.BatchNorm2d):
                self.handles.append(module.register_forward_pre_hook(self._enter_norm))
                self.handles.append(module.register_forward_hook(self._leave_norm))

    def _leave_conv(self, conv, args, output):
        self.made[id(output)] = conv, output
        self.norms[conv]  # a convolution that was called

    def _enter_norm(self, norm, args):
        conv, _ = self.made.get(id(args[0]), (None, None))
        self.feeders[norm].append(conv)
        if conv is not None:
            self.norms[conv].append(norm)
            self.inside = args[0]

    def _leave_norm(self, norm, args, output):
        self.inside = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.note((args, kwargs), func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))

    def note(self, tensors, consumer: str):
        """Remember that `consumer` takes those of `tensors` which a convolution made."""
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor) and tensor is not self.inside and id(tensor) in self.made:
                self.others[self.made[id(tensor)][0]].add(consumer)

    def run(self, model: nn.Module, example_input: Tensor):
        """One forward pass in eval, without gradients; the model is as before but for its mode."""
        with ExitStack() as stack:
            for handle in self.handles:
                stack.callback(handle.remove)
            stack.enter_context(torch.no_grad())
            stack.enter_context(self)
            output = model.eval()(example_input)
        self.note(output, "the network's output")
        return self


def replace_convs(model: nn.Module, block: str | Callable[..., ReparamConv2d] = "dbb",
                  include: Sequence[str] | None = None, exclude: Sequence[str] | None = None,
                  example_input: Tensor | None = None) -> tuple[nn.Module, Report]:
    """Swap every K x K convolution (1 < K < 7) and the BatchNorm fed by it for one block.

    Pairs are found by where tensors flow, in one forward pass on `example_input`, not by names. The `kxk` branch takes
    over the convolution's weight and the norm's parameters and statistics; every branch takes over the norm's gamma,
    epsilon and momentum. What a norm module does besides (timm's `BatchNormAct2d` activates) stays in its place.

    Args:
        model: left as it is.
        block: a name from `BLOCKS`, or a callable with the signature of `DiverseBranchBlock`.
        include: glob patterns; only convolutions whose module name matches one are swapped.
        exclude: glob patterns; convolutions whose module name matches one stay.
        example_input: `[N, C, H, W]`; by default one black image of 3x224x224.

    Returns:
        A new model, and a report with a row per convolution.

    Raises:
        ValueError: if the block is unknown or an `include` pattern matches no convolution.
    """
    if isinstance(block, str) and block not in BLOCKS:
        raise ValueError(f"block={block!r} is unknown; known are {', '.join(BLOCKS)}")
    make_block = BLOCKS[block] if isinstance(block, str) else block
    if example_input is None:
        first = next(model.parameters(), torch.empty(0))
        example_input = torch.zeros(1, 3, 224, 224, device=first.device, dtype=first.dtype)
    result, traced = copy.deepcopy(model), copy.deepcopy(model)  # what a forward pass may change stays in `traced`
    flow = _Flow(traced).run(traced, example_input)
    names = {module: name for name, module in traced.named_modules()}
    convs = {name: module for name, module in traced.named_modules() if isinstance(module, nn.Conv2d)}
    for pattern in include or ():
        if not any(fnmatch(name, pattern) for name in convs):
            raise ValueError(f"include={pattern!r} matches no convolution; there are {', '.join(convs)}")

    report, replacements = Report(), {}
    for name, conv in convs.items():
        norm, rest, reason = None, None, None
        if include is not None and not any(fnmatch(name, pattern) for pattern in include):
            reason = "not included"
        elif any(fnmatch(name, pattern) for pattern in exclude or ()):
            reason = "excluded"
        elif not 1 < max(conv.kernel_size) < 7:
            reason = "kernel {}x{}, only 1 < K < 7 is swapped".format(*conv.kernel_size)
        elif type(conv) is not nn.Conv2d:
            reason = f"{type(conv).__name__} is more than a Conv2d"
        else:
            norm, reason = _partner(conv, flow, names)
        if norm is not None and any(_hooks(result.get_submodule(names[module])) for module in (conv, norm)):
            norm, reason = None, "it or its norm has hooks, which a block would not run"
        if norm is not None:
            rest = _after_norm(norm)
            if rest is None:
                reason = f"its norm is a {type(norm).__name__}, which does more than is known here"
        if reason is None:
            conv_mode, norm_mode = (result.get_submodule(names[module]).training for module in (conv, norm))
            replacements[name] = _make(make_block, conv, norm).train(conv_mode)
            for branch in replacements[name].branches.values():
                branch.bn.train(norm_mode)
            replacements[names[norm]] = rest.train(norm_mode)
        made = replacements.get(name)
        report.append(Row(name, conv.kernel_size, type(made).__name__ if made is not None else None, reason or ""))

    aliases = {alias: names[module] for alias, module in traced.named_modules(remove_duplicate=False)}
    for alias, name in aliases.items():
        if name in replacements:
            result.set_submodule(alias, replacements[name])
    return result, report


def _partner(conv: nn.Conv2d, flow: _Flow, names: dict[nn.Module, str]) -> tuple[nn.BatchNorm2d | None, str | None]:
    """The norm that alone takes a convolution's output, or the reason why there is none."""
    if conv not in flow.norms:
        return None, "not reached by the example input"
    norms, others = set(flow.norms[conv]), ", ".join(sorted(flow.others[conv]))
    if not norms:
        return None, f"no BatchNorm2d follows, but {others or 'nothing'}"
    if others:
        return None, f"its output also goes to {others}"
    norm = norms.pop()
    if norms or set(flow.feeders[norm]) != {conv}:
        return None, f"{names[norm]} normalises other maps too, or not all of this one's"
    if norm.weight is None or norm.running_mean is None:
        return None, f"{names[norm]} has no gamma or no running statistics"
    return norm, None


def _hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _after_norm(norm: nn.BatchNorm2d) -> nn.Module | None:
    """What a norm module does after normalising; None if that cannot be told.

    A subclass is taken for "normalise, then my children in order" (timm's `BatchNormAct2d`: drop, act), and then asked.
    """
    if type(norm) is nn.BatchNorm2d:
        return nn.Identity()
    rest = nn.Sequential(*norm.children()).eval()
    probe = torch.linspace(-3, 3, 6 * norm.num_features).to(norm.weight).reshape(1, -1, 2, 3)
    with torch.no_grad():
        plain = F.batch_norm(probe, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
        return rest if torch.equal(rest(plain), norm(probe)) else None


def _make(make_block: Callable[..., ReparamConv2d], conv: nn.Conv2d, norm: nn.BatchNorm2d) -> ReparamConv2d:
    """A block in place of a convolution and its norm, with what both of them hold."""
    block = make_block(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation,
                       conv.groups, padding_mode=conv.padding_mode, device=conv.weight.device, dtype=conv.weight.dtype)
    for branch in block.branches.values():
        branch.bn.eps, branch.bn.momentum = norm.eps, norm.momentum
        nn.init.zeros_(branch.bn.bias)
        with torch.no_grad():
            branch.bn.weight.copy_(norm.weight)
        if hasattr(branch, "scale"):
            branch.scale.eps = norm.eps
    if "kxk" in block.branches:
        kxk = block.branches["kxk"]
        with torch.no_grad():
            kxk.weight.copy_(conv.weight)
            kxk.bn.load_state_dict(norm.state_dict())
            if conv.bias is not None:
                kxk.bn.running_mean -= conv.bias  # the norm subtracts it again
    if not conv.weight.is_contiguous():
        block = block.to(memory_format=torch.channels_last)
    return block.requires_grad_(conv.weight.requires_grad)  # a frozen layer stays frozen


def reparameterize(model: nn.Module) -> nn.Module:
    """A new model with a plain, trainable `nn.Conv2d` (with bias) in place of every block.

    Module names, dtype, device and memory format are kept; `model` is left as it was. Harmless the second time.

    Raises:
        ValueError: if a block is in training mode.
    """
    model, fused = copy.deepcopy(model), {}
    for name, module in reversed(list(model.named_modules(remove_duplicate=False))):  # the inner before the outer
        if isinstance(module, ReparamConv2d):
            if module not in fused:
                fused[module] = module.fuse()
            if not name:
                return fused[module]
            model.set_submodule(name, fused[module])
    return model
