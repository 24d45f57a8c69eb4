"""References written plainly, layer by layer, sharing no code with `dbb`."""

import math
import re

import torch
from torch import nn
from torch.nn import functional as F

from tests.helpers import relative_error


class Windows:
    """What each tap of a block's kernel sees of a map, and convolutions tap by tap."""

    def __init__(self, geometry, x):
        self.g = g = geometry
        (kh, kw), (sh, sw), (dh, dw) = g.kernel_size, g.stride, g.dilation
        rows, columns = (0, 0), (0, 0)
        if g.padding == "same":
            rows, columns = ((d * (k - 1) // 2, d * (k - 1) - d * (k - 1) // 2)
                             for d, k in ((dh, kh), (dw, kw)))
        elif g.padding != "valid":
            rows, columns = ((p, p) for p in g.padding)
        self.pads = (*columns, *rows)
        self.height = (x.shape[2] + sum(rows) - dh * (kh - 1) - 1) // sh + 1
        self.width = (x.shape[3] + sum(columns) - dw * (kw - 1) - 1) // sw + 1

    def pad(self, x):
        return F.pad(x, self.pads, mode="constant" if self.g.padding_mode == "zeros" else self.g.padding_mode)

    def of(self, padded, i, j):
        """The pixel that tap (i, j) sees, at every position of the output."""
        (sh, sw), (dh, dw) = self.g.stride, self.g.dilation
        rows = slice(i * dh, i * dh + (self.height - 1) * sh + 1, sh)
        columns = slice(j * dw, j * dw + (self.width - 1) * sw + 1, sw)
        return padded[:, :, rows, columns]

    def middle(self, x):
        kh, kw = self.g.kernel_size
        return self.of(self.pad(x), (kh - 1) // 2, (kw - 1) // 2)

    def convolve(self, x, weight):
        """Tap by tap; a kernel of 1 row, 1 column or both lies on the middle of the block's window."""
        (kh, kw), (h, w) = self.g.kernel_size, weight.shape[2:]
        top, left = (0 if h == kh else (kh - 1) // 2), (0 if w == kw else (kw - 1) // 2)
        padded = self.pad(x)

        def tap(i, j):
            seen = self.of(padded, top + i, left + j)
            return F.conv2d(seen, weight[:, :, i:i + 1, j:j + 1], groups=self.g.groups)

        return sum(tap(i, j) for i in range(h) for j in range(w))

    def depthwise(self, x, kernels):
        """A kernel `[KH, KW]` for every channel."""
        padded, (kh, kw) = self.pad(x), self.g.kernel_size
        return sum(self.of(padded, i, j) * kernels[:, i, j, None, None] for i in range(kh) for j in range(kw))

    def average(self, x):
        padded, (kh, kw) = self.pad(x), self.g.kernel_size
        return sum(self.of(padded, i, j) for i in range(kh) for j in range(kw)) / (kh * kw)


class Norms:
    """Norms with the statistics of the batch, or running ones; `running` collects those after the step."""

    def __init__(self, sample):
        self.sample, self.running = sample, {}

    def statistics(self, u, bn, name, running):
        """Mean and variance to normalise with; the running ones of `name` are noted."""
        if not (bn.training or bn.running_mean is None):
            return running
        seen = self.sample(u)
        found = {"mean": u.mean((0, 2, 3)), "var": seen.var((0, 2, 3), unbiased=True)}
        momentum = 1 / (int(bn.num_batches_tracked) + 1) if bn.momentum is None else bn.momentum
        for key, before in running.items():
            self.running[f"{name}.running_{key}"] = ((1 - momentum) * before + momentum * found[key]).detach()
        return found | {"var": seen.var((0, 2, 3), unbiased=False)}

    def inner(self, u, branch, name):
        if branch.factor is not None:
            return u
        scale = branch.scale
        var = self.statistics(u, branch.bn, f"branches.{name}.scale", {"var": scale.running_var})["var"]
        return u * (scale.weight / (var + scale.eps).sqrt())[:, None, None]

    def outer(self, y, bn, name):
        running = {"mean": bn.running_mean, "var": bn.running_var}
        self.running |= {f"{name}.running_{key}": value for key, value in running.items()}
        found = self.statistics(y, bn, name, running)
        mean, var, gamma, beta = (v[:, None, None] for v in (found["mean"], found["var"], bn.weight, bn.bias))
        return (y - mean) / (var + bn.eps).sqrt() * gamma + beta


def frequencies(g, dtype):
    """OREPA's `fre_init`: vertical frequencies in half of the channels, then horizontal ones."""
    (kh, kw), half = g.kernel_size, g.out_channels / 2

    def cosine(i, frequency, size):
        return math.cos(math.pi * (i + 0.5) * frequency / size)
    prior = torch.tensor([[[cosine(i, o + 1, kh) if o < half else cosine(j, o + 1 - half, kw)
                            for j in range(kw)] for i in range(kh)]
                          for o in range(g.out_channels)], dtype=dtype)
    prior[prior.abs() < 1e-12] = 0
    return prior


def branch_map(name, branch, x, windows, norms):
    """The map of a branch in front of its outer norm, each step a map."""
    g, kind = windows.g, re.sub(r"_\d+$", "", name)  # kxk_2 is a second kxk
    if kind in ("kxk", "1x1", "1xk", "kx1"):
        return windows.convolve(x, branch.weight)
    if kind == "identity":
        return windows.middle(x)
    if kind == "avg":
        return windows.average(x)
    if kind == "1x1_kxk_1x1":
        wide = windows.convolve(F.conv2d(x, branch.first, groups=windows.g.groups), branch.second)
        return F.conv2d(wide, branch.third, groups=windows.g.groups)
    if kind == "dw_1x1":  # eight kernels an input channel
        y = windows.depthwise(x.repeat_interleave(8, 1), branch.first[:, 0])
        return F.conv2d(y, branch.second, groups=g.groups)
    if kind == "1x1_prior":
        return windows.depthwise(F.conv2d(x, branch.first, groups=g.groups), frequencies(g, x.dtype))
    first = branch.first
    if kind == "1x1_kxk" and len(first) == g.in_channels:
        first = first.clone()
        for i in range(g.in_channels):
            first[i, i % (g.in_channels // g.groups)] += 1
    u = norms.inner(F.conv2d(x, first, groups=g.groups), branch, name)
    return windows.average(u) if kind == "1x1_avg" else windows.convolve(u, branch.second)


def reference(block, x, sample=None):
    """What a block computes: 1x1, factor per channel, padded KxK or average, BN; summed.

    Statistics are the batch's in training mode. A linear block has no factor from an inner norm, learned
    factors in place of the outer ones, and one BN behind the sum. Written from the design alone, each step a
    feature map; runs on copies of the block's norms.

    Args:
        block: a `ReparamConv2d`.
        x: `[N, C, H, W]`.
        sample: a function from a map to those of its positions that online variances are taken of. Means are
            of whole maps.

    Returns:
        The output, and a dict of the running statistics after the step.
    """
    windows, norms, total = Windows(block.geometry, x), Norms(sample or (lambda z: z)), 0
    for name, branch in block.branches.items():
        y = branch_map(name, branch, x, windows, norms)
        if branch.factor is None:
            y = norms.outer(y, branch.bn, f"branches.{name}.bn")
        else:
            y = y * branch.factor[:, None, None]
        total = total + y
    return (total if block.bn is None else norms.outer(total, block.bn, "bn")), norms.running


def check_training(block, x, sample=None):
    """Assert that a block in training mode equals the reference: outputs, running statistics, gradients."""
    x.requires_grad_()
    expected, stats = reference(block.train(), x, sample)
    cotangent, parameters = torch.randn_like(expected), [x, *block.parameters()]
    expected_grads = torch.autograd.grad(expected, parameters, cotangent)
    actual = block(x)
    grads = torch.autograd.grad(actual, parameters, cotangent)
    assert relative_error(actual, expected) < 1e-12
    state = block.state_dict()
    assert {name for name in state if "running" in name} == set(stats)
    for name, value in stats.items():
        # Halves that cancel leave zero but for rounding; a mean is measured against what varies about it.
        zero = max(float(value.abs().max()), float(state[name].abs().max())) < 1e-14
        size = value.norm()
        if name.endswith("running_mean"):
            size = torch.maximum(size, stats[name.replace("_mean", "_var")].sqrt().norm())
        assert (state[name] - value).norm() < 1e-12 * size or zero, name
    # Against the norm of all gradients together: norms make single ones exactly zero.
    flat, expected_flat = (torch.cat([g.flatten() for g in gs]) for gs in (grads, expected_grads))
    assert relative_error(flat, expected_flat) < 1e-10


class PublishedBlock(nn.Module):
    """The Diverse Branch Block as the paper draws it: every branch a chain of modules.

    Padding is BN's value of zero.
    """

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, groups=1):
        super().__init__()
        k, p, depthwise = kernel_size, kernel_size // 2, groups == in_channels == out_channels
        internal = 2 * in_channels if depthwise else in_channels
        self.p, self.groups, self.identity = p, groups, internal == in_channels

        def conv(i, o, k, stride=1, padding=0):
            return nn.Conv2d(i, o, k, stride, padding, groups=groups, bias=False)

        self.origin = conv(in_channels, out_channels, k, stride, p)
        self.origin_bn = nn.BatchNorm2d(out_channels)
        self.first, self.first_bn = conv(in_channels, internal, 1), nn.BatchNorm2d(internal)
        self.second, self.second_bn = conv(internal, out_channels, k, stride), nn.BatchNorm2d(out_channels)
        self.pool, self.pool_bn = nn.AvgPool2d(k, stride), nn.BatchNorm2d(out_channels)
        self.depthwise = depthwise
        if not depthwise:
            self.point = conv(in_channels, out_channels, 1, stride)
            self.point_bn = nn.BatchNorm2d(out_channels)
            self.average, self.average_bn = conv(in_channels, out_channels, 1), nn.BatchNorm2d(out_channels)

    def norm_and_pad(self, u, bn, pad_value=None):
        if pad_value is None:
            pad_value = bn.bias - bn.running_mean * bn.weight / torch.sqrt(bn.running_var + bn.eps)
        u, p = bn(u), self.p
        height, width = u.shape[2] + 2 * p, u.shape[3] + 2 * p
        padded = pad_value[None, :, None, None].expand(len(u), -1, height, width).clone()
        padded[:, :, p:-p, p:-p] = u
        return padded

    def first_kernel(self):
        kernel = self.first.weight
        if self.identity:
            eye = torch.eye(kernel.shape[1], dtype=kernel.dtype).repeat(self.groups, 1)
            kernel = kernel + eye[:, :, None, None]
        return kernel

    def forward(self, x, pad_value=None):
        y = self.origin_bn(self.origin(x))
        u = F.conv2d(x, self.first_kernel(), groups=self.groups)
        y = y + self.second_bn(self.second(self.norm_and_pad(u, self.first_bn, pad_value)))
        if self.depthwise:
            return y + self.pool_bn(self.pool(F.pad(x, [self.p] * 4)))
        y = y + self.point_bn(self.point(x))
        return y + self.pool_bn(self.pool(self.norm_and_pad(self.average(x), self.average_bn, pad_value)))


@torch.no_grad()
def import_published(published, block):
    """Give our block the published one's weights: the outer mean loses the response to the pad constant."""
    def norm(source, target, shift=0.0):
        target.load_state_dict(source.state_dict())
        target.running_mean -= shift

    def shift_of(bn):
        return bn.bias - bn.running_mean * bn.weight / torch.sqrt(bn.running_var + bn.eps)

    def inner(source, scale):
        scale.weight.copy_(source.weight)
        scale.running_var.copy_(source.running_var)
        return shift_of(source)

    b = block.branches
    b["kxk"].weight.copy_(published.origin.weight)
    norm(published.origin_bn, b["kxk"].bn)
    b["1x1_kxk"].first.copy_(published.first.weight)
    b["1x1_kxk"].second.copy_(published.second.weight)
    t = inner(published.first_bn, b["1x1_kxk"].scale).reshape(published.groups, -1)
    taps = published.second.weight.sum((2, 3)).reshape(published.groups, -1, t.shape[1])
    norm(published.second_bn, b["1x1_kxk"].bn, torch.cat([taps[g] @ t[g] for g in range(published.groups)]))
    if published.depthwise:
        norm(published.pool_bn, b["avg"].bn)
        return
    b["1x1"].weight.copy_(published.point.weight)
    norm(published.point_bn, b["1x1"].bn)
    b["1x1_avg"].first.copy_(published.average.weight)
    norm(published.pool_bn, b["1x1_avg"].bn, inner(published.average_bn, b["1x1_avg"].scale))
