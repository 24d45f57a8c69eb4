"""Spatial Gradient Scaling (SGS, ICLR 2023): a plain convolution whose taps learn at different rates.

What parallel branches do to a kernel's gradient is to weigh its taps. SGS does that alone: it multiplies the
gradient with a mask `[KH, KW]` of mean 1, from how much a pixel of the layer's input tells of its neighbours.
"""

import math
from collections.abc import Container, Sequence
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dbb.geometry import Geometry
from dbb.private import AnyConv, pair
from dbb.subclass import Stays
from dbb.surgery import check_patterns, check_wanted

AT_ONCE = 2**24  # values in the histograms of some channels: a few hundred MiB


@torch.no_grad()
def spatial_gradient_scale(map: Tensor, kernel_size: int | Sequence[int], k: float = 5.0,
                           dilation: int | Sequence[int] = 1) -> Tensor:
    """The mask of a layer from its input, after the paper, section 3, and the authors' code.

    For every tap, pixels are compared with those at the tap's offset from the middle tap, `(K - 1) // 2`.
    Their mutual information over their joint entropy, d in 0..1, becomes `k * d / ((k - 1) * d + 1)`; then
    the mean over channels is taken (of those that vary), and all taps are divided by their mean. The middle
    tap has d = 1. A tap of which no channel says anything, in a constant map or beyond its border, gets 1.

    Args:
        map: `[N, C, H, W]`, padded as the layer pads.
        kernel_size: of the layer.
        k: larger ones make the mask flatter.
        dilation: of the layer.

    Returns:
        `[KH, KW]`, of mean 1, in float64.
    """
    steps, size = pair(dilation), pair(kernel_size)
    taps = [[step * (tap - (length - 1) // 2) for tap in range(length)]
            for step, length in zip(steps, size, strict=True)]
    found = {(0, 0): torch.ones((), dtype=torch.float64, device=map.device)}
    for down in taps[0]:
        for right in taps[1]:
            opposite = found.get((-down, -right))  # the same pairs of pixels
            if (down, right) not in found:
                found[down, right] = _dependence(map, down, right, k) if opposite is None else opposite
    mask = torch.stack([found[down, right] for down in taps[0] for right in taps[1]]).reshape(size)
    return (mask / mask.nanmean()).nan_to_num(nan=1.0)


def _dependence(map: Tensor, down: int, right: int, k: float) -> Tensor:
    """How much pixels tell of those so many rows below and columns to the right: 0 to 1, NaN if unknown."""
    height, width = map.shape[2] - abs(down), map.shape[3] - abs(right)
    if min(height, width) < 1 or not len(map):
        return torch.full((), math.nan, dtype=torch.float64, device=map.device)
    map = map.to(torch.promote_types(map.dtype, torch.float32))
    here = map[:, :, max(0, -down):, max(0, -right):][:, :, :height, :width]
    there = map[:, :, max(0, down):, max(0, right):][:, :, :height, :width]
    of_channels = max(1, AT_ONCE // (len(map) * height * width))
    shares = [_shared_information(*(part.transpose(0, 1).flatten(1) for part in parts))
              for parts in zip(here.split(of_channels, 1), there.split(of_channels, 1), strict=True)]
    share = torch.cat(shares)
    return (k * share / ((k - 1) * share + 1)).nanmean()


def _shared_information(x: Tensor, y: Tensor) -> Tensor:
    """By channel, `I(X;Y) / H(X,Y)` of two maps `[C, n]`; NaN where both are constant."""
    channels, n = x.shape
    bins = 1 + math.ceil(math.log2(n))  # Sturges' rule
    cells = _bin(x, bins).mul_(bins).add_(_bin(y, bins))
    cells += torch.arange(channels, device=x.device, dtype=cells.dtype)[:, None] * bins**2
    counts = torch.bincount(cells.flatten(), minlength=channels * bins**2)
    joint = counts.double().reshape(channels, bins, bins) / n
    of_both = _entropy(joint.flatten(1))
    return (_entropy(joint.sum(1)) + _entropy(joint.sum(2)) - of_both) / of_both


def _bin(x: Tensor, bins: int) -> Tensor:
    """In which of so many equal bins between its channel's extremes a value falls, `[C, n]`."""
    low, high = x.aminmax(dim=1, keepdim=True)
    return (x - low).mul_(bins / (high - low)).nan_to_num_().int().clamp_(0, bins - 1)


def _entropy(shares: Tensor) -> Tensor:
    return torch.special.entr(shares).sum(1)


def scalable(model: nn.Module, include: Sequence[str] | None = None, exclude: Sequence[str] | None = None,
             kernel_sizes: Container[int] = range(2, 7)) -> dict[str, nn.Conv2d]:
    """The trained convolutions that the arguments, as in `replace_convs`, choose, by module name.

    Raises:
        ValueError: if there are none, or a pattern matches no convolution.
    """
    convs = {name: module for name, module in model.named_modules() if isinstance(module, AnyConv)}
    check_patterns(convs, include=include, exclude=exclude)
    found = {}
    for name, conv in convs.items():
        with suppress(Stays):
            check_wanted(name, conv, include, exclude, kernel_sizes)
            if conv.weight.requires_grad:
                found[name] = conv
    if not found:
        sizes = ", ".join(map(str, kernel_sizes))
        raise ValueError(f"no gradient can be scaled: of {len(convs)} convolutions, none is a Conv2d with a "
                         f"kernel size of {sizes}, trained, and not excluded")
    return found


class SpatialGradientScaling:
    """Scales the gradients of a network's K x K convolutions as they arrive, until `remove` is called.

    So clipping, momentum and weight decay come after it. The network, its keys and its forward pass stay as
    they are. `masks` has a mask `[KH, KW]` by module name: of ones until the first `update`.

    Args:
        model: on the device where it is trained.
        include: this and the rest: which of its convolutions, as in `replace_convs`.
        exclude: likewise.
        kernel_sizes: likewise.

    Raises:
        ValueError: as `scalable` does.
    """

    def __init__(self, model: nn.Module, include: Sequence[str] | None = None,
                 exclude: Sequence[str] | None = None, kernel_sizes: Container[int] = range(2, 7)):
        self.model, self.convs = model, scalable(model, include, exclude, kernel_sizes)
        self.masks = {name: conv.weight.new_ones(conv.kernel_size) for name, conv in self.convs.items()}
        self.handles = [conv.weight.register_hook(partial(self._scaled, name))
                        for name, conv in self.convs.items()]

    def _scaled(self, name: str, gradient: Tensor) -> Tensor:
        self.masks[name] = self.masks[name].to(gradient)  # once, where the network was moved
        return gradient * self.masks[name]

    @torch.no_grad()
    def update(self, images: Tensor, k: float = 5.0) -> dict[str, str]:
        """Compute the masks anew, in one forward pass in eval; the network is as before.

        Args:
            images: what the network takes, a few batches of it.
            k: as in `spatial_gradient_scale`.

        Returns:
            By module name, why a layer has a mask of ones: no image reaches it, or its input is constant.
        """
        modes = {module: module.training for module in self.model.modules()}
        handles = [conv.register_forward_pre_hook(partial(self._see, name, k), with_kwargs=True)
                   for name, conv in self.convs.items()]
        self.masks = {name: torch.ones_like(mask) for name, mask in self.masks.items()}
        self.without = dict.fromkeys(self.convs, "no image reaches it")
        try:
            self.model.eval()(images)
        finally:
            for handle in handles:
                handle.remove()
            for module, mode in modes.items():
                module.training = mode
        return self.without

    def _see(self, name: str, k: float, conv: nn.Conv2d, args: tuple, kwargs: dict) -> None:
        x = args[0] if args else kwargs["input"]
        self.without.pop(name, None)
        g = Geometry(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding,
                     conv.dilation, conv.groups, conv.padding_mode)
        (top, bottom), (left, right) = g.pads
        padded = F.pad(x, (left, right, top, bottom),
                       mode="constant" if g.padding_mode == "zeros" else g.padding_mode)
        mask = spatial_gradient_scale(padded, g.kernel_size, k, g.dilation)
        if (mask == 1).all():
            self.without[name] = "its input is constant"
        self.masks[name] = mask.to(conv.weight)

    def remove(self) -> None:
        """Leave the gradients alone from now on."""
        for handle in self.handles:
            handle.remove()
