"""References written plainly, layer by layer, sharing no code with `dbb`."""

import copy

import torch
from torch import nn
from torch.nn import functional as F


def training_reference(block, x):
    """What a block computes in training: 1x1, scale by the batch's variance, padded KxK or average, BN; summed.

    Written from the design alone. Runs on copies of the block's norms.

    Returns:
        The output, and a dict of the running statistics after the step.
    """
    g, total, stats = block.geometry, 0, {}
    conv = dict(stride=g.stride, padding=g.padding, dilation=g.dilation)
    (kh, kw), (sh, sw) = g.kernel_size, g.stride

    def inner(u, branch, name):
        var = u.var((0, 2, 3), unbiased=False)
        old, momentum = branch.scale.running_var, branch.bn.momentum
        stats[f"branches.{name}.scale.running_var"] = ((1 - momentum) * old + momentum * u.var((0, 2, 3), unbiased=True)).detach()
        return u * (branch.scale.weight / (var + branch.scale.eps).sqrt())[:, None, None]

    def pad(x):
        return F.pad(x, (g.padding[1], g.padding[1], g.padding[0], g.padding[0]))

    def small(x, weight):
        """A kernel of 1 row, 1 column or both, on the middle of the block's window."""
        h, w = weight.shape[2:]
        top, left = (0 if h == kh else (kh - 1) // 2), (0 if w == kw else (kw - 1) // 2)
        y = F.conv2d(pad(x), weight, groups=g.groups, dilation=g.dilation)[:, :, top * g.dilation[0]:, left * g.dilation[1]:]
        height = (x.shape[2] + 2 * g.padding[0] - g.dilation[0] * (kh - 1) - 1) // sh + 1
        width = (x.shape[3] + 2 * g.padding[1] - g.dilation[1] * (kw - 1) - 1) // sw + 1
        return y[:, :, ::sh, ::sw][:, :, :height, :width]

    def average(u):
        assert g.dilation == (1, 1), "the plain reference averages with avg_pool2d"
        return F.avg_pool2d(pad(u), (kh, kw), g.stride)

    for name, branch in block.branches.items():
        if name in ("kxk", "1x1", "1xk", "kx1"):
            y = small(x, branch.weight)
        elif name == "identity":
            y = small(x, torch.ones(g.in_channels, 1, 1, 1, dtype=x.dtype)) if g.groups == g.in_channels else \
                small(x, torch.stack([torch.eye(g.in_channels // g.groups, dtype=x.dtype)] * g.groups)
                      .flatten(0, 1)[:, :, None, None])
        elif name == "avg":
            y = average(x)
        else:
            first = branch.first
            if name == "1x1_kxk" and len(first) == g.in_channels:
                first = first.clone()
                for i in range(g.in_channels):
                    first[i, i % (g.in_channels // g.groups)] += 1
            u = inner(F.conv2d(x, first, groups=g.groups), branch, name)
            y = average(u) if name == "1x1_avg" else F.conv2d(u, branch.second, groups=g.groups, **conv)
        bn = copy.deepcopy(branch.bn)
        bn.weight, bn.bias = branch.bn.weight, branch.bn.bias  # the same parameters: gradients are compared
        total = total + bn(y)
        stats[f"branches.{name}.bn.running_mean"], stats[f"branches.{name}.bn.running_var"] = bn.running_mean, bn.running_var
    return total, stats


class PublishedBlock(nn.Module):
    """The Diverse Branch Block as the paper draws it: every branch a chain of modules, BN's value of zero as padding."""

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, groups=1):
        super().__init__()
        k, p, depthwise = kernel_size, kernel_size // 2, groups == in_channels == out_channels
        internal = 2 * in_channels if depthwise else in_channels
        self.p, self.groups, self.identity = p, groups, internal == in_channels

        def conv(i, o, k, stride=1, padding=0):
            return nn.Conv2d(i, o, k, stride, padding, groups=groups, bias=False)

        self.origin, self.origin_bn = conv(in_channels, out_channels, k, stride, p), nn.BatchNorm2d(out_channels)
        self.first, self.first_bn = conv(in_channels, internal, 1), nn.BatchNorm2d(internal)
        self.second, self.second_bn = conv(internal, out_channels, k, stride), nn.BatchNorm2d(out_channels)
        self.pool, self.pool_bn = nn.AvgPool2d(k, stride), nn.BatchNorm2d(out_channels)
        self.depthwise = depthwise
        if not depthwise:
            self.point, self.point_bn = conv(in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels)
            self.average, self.average_bn = conv(in_channels, out_channels, 1), nn.BatchNorm2d(out_channels)

    def norm_and_pad(self, u, bn, pad_value=None):
        value = bn.bias - bn.running_mean * bn.weight / torch.sqrt(bn.running_var + bn.eps) if pad_value is None else pad_value
        u, p = bn(u), self.p
        padded = value[None, :, None, None].expand(len(u), -1, u.shape[2] + 2 * p, u.shape[3] + 2 * p).clone()
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
