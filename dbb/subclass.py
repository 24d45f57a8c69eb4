"""Subclasses of Conv2d: what one does to its input is kept, and a block sits in for the convolution inside it."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


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
def inner_convolution(conv: nn.Conv2d, x: Tensor) -> dict[str, Any] | str:
    """What a subclass of Conv2d does with its weight.

    Dynamic "same" padding, or circular padding of one axis, prepares the input, then returns `F.conv2d` of it. The subclass
    is asked in eval and in training, and with two weights: what it does to its input must depend on neither.

    Returns:
        The arguments of that one convolution, as a block takes them; or the reason why the subclass is not of this kind.
    """
    conv = with_values(conv)
    # An example of zeros would hide factors.
    found, x = [], torch.linspace(-1, 1, x.numel()).to(conv.weight.device, x.dtype).reshape(x.shape)
    for training, factor in ((False, 1), (True, 1), (False, 2)):
        asked, calls = copy.deepcopy(conv).train(training), []
        for parameter in asked.parameters(recurse=False):
            parameter.mul_(factor).add_(factor - 1)
        before = asked.weight.clone()

        def record(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, calls=calls):  # F.conv2d's own names
            y = F.conv2d(input, weight, bias, stride, padding, dilation, groups)
            calls.append((input, weight, bias, y, dict(stride=stride, padding=padding, dilation=dilation, groups=groups)))
            return y

        try:
            with Intercept(record):
                output = asked(x)
        except Exception as error:  # whatever somebody else's subclass raises
            return f"cannot be asked what it does ({error})"
        if len(calls) != 1:
            return f"calls F.conv2d {len(calls)} times, not once"
        [(prepared, weight, bias, y, arguments)] = calls
        if weight is not asked.weight or bias is not asked.bias or not torch.equal(weight, before):
            return "computes its kernel from its weight"
        if output is not y:
            return "changes what its convolution returns"
        found.append((prepared, arguments))
    if any(arguments != found[0][1] or not torch.equal(prepared, found[0][0]) for prepared, arguments in found):
        return "prepares its input by its weight or its mode"
    return found[0][1] | {"padding_mode": "zeros"}


def without_weight(conv: nn.Conv2d) -> nn.Conv2d:
    """A copy that holds no parameters; see `lend_weight`."""
    conv = copy.deepcopy(conv)
    like = conv.weight
    del conv.weight
    conv.bias = None
    lend_weight(conv, like.device, like.dtype)
    return conv


def lend_weight(conv: nn.Conv2d, device: torch.device, dtype: torch.dtype) -> None:
    """Give a subclass from `without_weight` something that has its weight's shape, for code that asks for that.

    It is one number, seen as many, and so neither a parameter nor a buffer: DDP and averaging write into those. So
    nothing moves it along with the module, and a block makes it anew for each image.
    """
    conv.weight = torch.zeros((), device=device, dtype=dtype).expand(conv.out_channels, conv.in_channels // conv.groups, *conv.kernel_size)


def with_weight(conv: nn.Conv2d, plain: nn.Conv2d) -> nn.Conv2d:
    """A copy of a subclass from `without_weight`, with the weight and the bias of a plain convolution."""
    conv = copy.deepcopy(conv)
    conv.weight, conv.bias = plain.weight, plain.bias
    return conv.train(plain.training)
