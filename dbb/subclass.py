"""Subclasses of Conv2d: what one does to its input is kept; a block sits in for the convolution inside it."""

import copy
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from dbb.geometry import Geometry


class Stays(Exception):  # noqa: N818
    """A convolution stays as it is, for the reason that is the message."""


class Intercept(TorchFunctionMode):
    """Within this context, `F.conv2d(*args, **kwargs)` returns `respond(*args, **kwargs)`."""

    def __init__(self, respond: Callable[..., Tensor]):
        super().__init__()
        self.respond = respond

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return (self.respond if func is F.conv2d else func)(*args, **(kwargs or {}))


def with_values(module: nn.Module) -> nn.Module:
    """A copy of a module, to ask it what it does; ones stand for the values that one on `meta` lacks."""
    module = copy.deepcopy(module)
    if any(tensor.is_meta for tensor in module.parameters()):
        module.to_empty(device="cpu")
        for tensor in [*module.parameters(), *module.buffers()]:
            tensor.fill_(1)
    return module


@torch.no_grad()
def inner_convolution(conv: nn.Conv2d, x: Tensor) -> dict[str, Any]:
    """The arguments of a convolution, or of the one inside a subclass of Conv2d, for a block; or `Stays`.

    Dynamic "same" padding, or circular padding of one axis, prepares the input, then returns `F.conv2d` of
    it. The subclass is asked in eval and in training, and with two weights: what it does to its input must
    depend on neither.
    """
    if type(conv) is nn.Conv2d:
        g = Geometry(**{field.name: getattr(conv, field.name) for field in fields(Geometry)[:-1]})
        padded = [size for pair in reversed(g.pads) for size in pair]
        if conv.weight.shape != (g.out_channels, g.in_channels // g.groups, *g.kernel_size) \
                or conv.padding_mode != "zeros" and [*conv._reversed_padding_repeated_twice] != padded:
            raise Stays("its weight or its padding is not what its settings say")
        return vars(conv)
    conv = with_values(conv)
    # An example of zeros would hide factors.
    x = torch.linspace(-1, 1, x.numel(), device="cpu").to(conv.weight.device, x.dtype).reshape(x.shape)
    found = []
    for training, factor in ((False, 1), (True, 1), (False, 2)):
        asked = copy.deepcopy(conv)
        asked.train(training)
        if asked.bias is None:  # which a converted one has: is it read?
            asked.bias = nn.Parameter(asked.weight.new_zeros(asked.out_channels))
        for parameter in asked.parameters(recurse=False):
            parameter.mul_(factor).add_(factor - 1)
        found.append(_ask(asked, x))
    (prepared, arguments), *others = found
    if any(theirs != arguments or not torch.equal(image, prepared) for image, theirs in others):
        raise Stays(f"{type(conv).__name__} prepares its input by its weight or its mode")
    return arguments | {"padding_mode": "zeros"}


def _ask(conv: nn.Conv2d, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """What goes into the convolution inside a subclass, and its arguments; `Stays` if there is more to it."""
    kind, calls, before = type(conv).__name__, [], conv.weight.clone()

    def record(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):  # as F.conv2d
        y = F.conv2d(input, weight, bias, stride, padding, dilation, groups)
        arguments = dict(stride=stride, padding=padding, dilation=dilation, groups=groups)
        calls.append((input, weight, bias, y, arguments))
        return y

    try:
        with Intercept(record):
            output = conv(x)
    except Exception as error:  # whatever somebody else's subclass raises
        raise Stays(f"{kind} cannot be asked what it does ({error})") from error
    if len(calls) != 1:
        raise Stays(f"{kind} calls F.conv2d {len(calls)} times, not once")
    [(prepared, weight, bias, y, arguments)] = calls
    if weight is not conv.weight or bias is not conv.bias or not torch.equal(weight, before):
        raise Stays(f"{kind} computes its kernel from its weight")
    if output is not y or y._version:
        raise Stays(f"{kind} changes what its convolution returns")
    return prepared, arguments


def with_weight(conv: nn.Conv2d, weight: Tensor | None, bias: Tensor | None) -> nn.Conv2d:
    """A copy of a subclass of Conv2d with these in place of its own; what it holds besides is shared."""
    result = copy.copy(conv)
    for kind in ("_parameters", "_buffers", "_modules"):
        setattr(result, kind, getattr(conv, kind).copy())
    for name, value in ("weight", weight), ("bias", bias):
        result._parameters.pop(name, None)  # so that what is no parameter may take the place
        setattr(result, name, value)
    return result


class Rest(nn.Module):
    """What a subclass of Conv2d holds besides its weight and bias: the same parts, in the same places."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            setattr(self, name, getattr(conv, name))


def lend_weight(conv: nn.Conv2d, device: torch.device, dtype: torch.dtype) -> None:
    """Give a subclass without a weight something of its weight's shape, for its forward to ask and hand on.

    It is one number, seen as many, and so neither a parameter nor a buffer: DDP and averaging write into
    those. So nothing moves it along with the module, and a block makes it anew for each image. The bias is
    lent as well.
    """
    zero = torch.zeros((), device=device, dtype=dtype)
    conv.weight = zero.expand(conv.out_channels, conv.in_channels // conv.groups, *conv.kernel_size)
    conv.bias = zero.expand(conv.out_channels)
