"""Published networks written plainly, under their published names, sharing no code with ours."""

import functools
import itertools
from collections import OrderedDict

import torch
from torch import nn
from torch.nn import functional as F

from tests.helpers import randomize

CLASSES = 7


def chain(**modules):
    return nn.Sequential(OrderedDict(modules))


def conv(i, o, k, stride=1, groups=1, padding=None, bias=False):
    return nn.Conv2d(i, o, k, stride, k // 2 if padding is None else padding, groups=groups, bias=bias)


def plain(i, o, k, stride=1, groups=1, **_):
    return chain(conv=conv(i, o, k, stride, groups), bn=nn.BatchNorm2d(o))


class NormAndPad(nn.Module):
    def __init__(self, channels, pad):
        super().__init__()
        self.bn, self.pad = nn.BatchNorm2d(channels), pad

    def forward(self, x):
        y, p, bn = self.bn(x), self.pad, self.bn
        value = bn.bias - bn.running_mean * bn.weight / torch.sqrt(bn.running_var + bn.eps)
        padded = value[None, :, None, None].expand(len(y), -1, y.shape[2] + 2 * p, y.shape[3] + 2 * p).clone()
        padded[:, :, p:-p, p:-p] = y
        return padded


class IdentityConv(nn.Conv2d):
    def forward(self, x):
        return x + super().forward(x)


class Dbb(nn.Module):
    def __init__(self, i, o, k, stride, groups):
        super().__init__()
        p, self.dense = k // 2, groups < o
        internal = i if self.dense else 2 * i
        self.dbb_origin = plain(i, o, k, stride, groups)
        avg, norm = nn.AvgPool2d(k, stride, 0 if self.dense else p), nn.BatchNorm2d(o)
        if self.dense:
            self.dbb_avg = chain(conv=conv(i, o, 1), bn=NormAndPad(o, p), avg=avg, avgbn=norm)
            self.dbb_1x1 = plain(i, o, 1, stride)
            first = {"idconv1": IdentityConv(i, i, 1, bias=False)}
        else:
            self.dbb_avg = chain(avg=avg, avgbn=norm)
            first = {"conv1": conv(i, internal, 1, groups=groups)}
        second = conv(internal, o, k, stride, groups, padding=0)
        self.dbb_1x1_kxk = chain(**first, bn1=NormAndPad(internal, p), conv2=second, bn2=nn.BatchNorm2d(o))

    def forward(self, x):
        y = self.dbb_origin(x) + self.dbb_avg(x) + self.dbb_1x1_kxk(x)
        return y + self.dbb_1x1(x) if self.dense else y


class Acb(nn.Module):
    def __init__(self, i, o, k, stride):
        super().__init__()
        p = k // 2
        self.square_conv, self.square_bn = conv(i, o, k, stride), nn.BatchNorm2d(o)
        self.ver_conv, self.ver_bn = nn.Conv2d(i, o, (k, 1), stride, (p, 0), bias=False), nn.BatchNorm2d(o)
        self.hor_conv, self.hor_bn = nn.Conv2d(i, o, (1, k), stride, (0, p), bias=False), nn.BatchNorm2d(o)

    def forward(self, x):
        square, ver, hor = self.square_conv(x), self.ver_conv(x), self.hor_conv(x)
        return self.square_bn(square) + self.ver_bn(ver) + self.hor_bn(hor)


class Orepa(nn.Module):
    """Run as the six branches that its kernel is made of, each a chain of convolutions."""

    def __init__(self, i, o, stride=1, norm=True):
        super().__init__()
        self.i, self.o, self.stride = i, o, stride
        shapes = {"origin": (o, i, 3, 3), "avg_conv": (o, i, 1, 1), "pfir_conv": (o, i, 1, 1),
                  "1x1": (o, i, 1, 1), "1x1_kxk_idconv1": (i, i, 1, 1), "1x1_kxk_conv2": (o, i, 3, 3),
                  "gconv_dw": (8 * i, 1, 3, 3), "gconv_pw": (o, 8 * i, 1, 1)}
        for name, shape in shapes.items():
            weight = torch.randn(shape) / (shape[1] * shape[2] ** 2) ** 0.5
            self.register_parameter(f"weight_orepa_{name}", nn.Parameter(weight))
        self.vector = nn.Parameter(torch.rand(6, o))
        self.register_buffer("weight_orepa_avg_avg", torch.full((3, 3), 1 / 9))
        self.register_buffer("weight_orepa_prior", torch.rand(o, 3, 3) - 0.5)
        self.register_buffer("id_tensor", torch.eye(i)[:, :, None, None])
        if norm:
            self.bn = nn.BatchNorm2d(o)

    def response(self, x):
        def run(x, weight, stride=1, groups=1):
            return F.conv2d(x, weight, None, stride, weight.shape[2] // 2, groups=groups)

        w = {name.removeprefix("weight_orepa_"): value for name, value in self.state_dict().items()}
        s, (i, o) = self.stride, (self.i, self.o)
        maps = [run(x, w["origin"], s),
                run(run(x, w["avg_conv"]), w["avg_avg"].expand(o, 1, 3, 3), s, o),
                run(run(x, w["pfir_conv"]), w["prior"][:, None], s, o),
                run(x + run(x, w["1x1_kxk_idconv1"]), w["1x1_kxk_conv2"], s),
                run(x, w["1x1"], s),
                run(run(x, w["gconv_dw"], s, i), w["gconv_pw"])]
        return sum(factor[:, None, None] * y for factor, y in zip(self.vector, maps, strict=True))

    def kernel(self):
        """Read off the response to one pixel: `[O, I, 3, 3]`."""
        dots = torch.zeros(self.i, self.i, 5, 5, dtype=self.vector.dtype)
        for channel in range(self.i):
            dots[channel, channel, 2, 2] = 1
        return self.response(dots)[:, :, 1:4, 1:4].flip(2, 3).transpose(0, 1)

    def forward(self, x):
        return self.bn(self.response(x))


class Orepa1x1(nn.Module):
    def __init__(self, i, o, stride):
        super().__init__()
        t, self.stride = min(i, o), stride
        self.weight_or1x1_origin = nn.Parameter(torch.randn(o, i, 1, 1) / i ** 0.5)
        self.weight_or1x1_l2i_conv1 = nn.Parameter(torch.randn(t, i, 1, 1) / i ** 0.5)
        self.weight_or1x1_l2i_conv2 = nn.Parameter(torch.randn(o, t, 1, 1) / t ** 0.5)
        self.vector, self.bn = nn.Parameter(torch.rand(2, o)), nn.BatchNorm2d(o)

    def forward(self, x):
        one = F.conv2d(x, self.weight_or1x1_origin, stride=self.stride)
        two = F.conv2d(x, self.weight_or1x1_l2i_conv1, stride=self.stride)
        two = F.conv2d(two, self.weight_or1x1_l2i_conv2)
        return self.bn(self.vector[0][:, None, None] * one + self.vector[1][:, None, None] * two)


class OrepaStem(nn.Module):
    """7x7: the authors slide each 3x3 kernel over the one before, tap by tap here."""

    def __init__(self, i, o, stride):
        super().__init__()
        self.stride = stride
        self.weight0 = Orepa(i, o, norm=False)
        self.weight1, self.weight2 = Orepa(o, o, norm=False), Orepa(o, o, norm=False)
        self.bn = nn.BatchNorm2d(o)

    def forward(self, x):
        total = self.weight0.kernel()
        for following in (self.weight1.kernel(), self.weight2.kernel()):
            size, before = total.shape[2], total
            total = before.new_zeros(*before.shape[:2], size + 2, size + 2)
            for h in range(3):
                for w in range(3):
                    moved = torch.einsum("om,mihw->oihw", following[:, :, h, w], before)
                    total[:, :, 2 - h:2 - h + size, 2 - w:2 - w + size] += moved
        return self.bn(F.conv2d(x, total, stride=self.stride, padding=3))


def dbb(i, o, k, stride=1, groups=1, **_):
    return Dbb(i, o, k, stride, groups) if k == 3 else plain(i, o, k, stride)


def acb(i, o, k, stride=1, relu=False, **_):
    if k != 3:
        return plain(i, o, k, stride)
    return chain(acb=Acb(i, o, k, stride), relu=nn.ReLU()) if relu else Acb(i, o, k, stride)


def orepa(i, o, k, stride=1, basic_shortcut=False, **_):
    if k == 1:
        return plain(i, o, k, stride) if basic_shortcut else Orepa1x1(i, o, stride)
    return Orepa(i, o, stride) if k == 3 else OrepaStem(i, o, stride)


def deployed(names, i, o, k, stride=1, groups=1, relu=False, basic_shortcut=False):
    name = "conv" if basic_shortcut else names.get(k, "conv")
    unit = chain(**{name: conv(i, o, k, stride, groups, bias=True)})
    return chain(acb=unit, relu=nn.ReLU()) if relu and name == "fused_conv" else unit


UNITS = {"dbb": dbb, "acnet": acb, "orepa": orepa}
DEPLOYED = {"dbb": {3: "dbb_reparam"}, "acnet": {3: "fused_conv"},
            "orepa": {1: "or1x1_reparam", 3: "orepa_reparam", 7: "or_large_reparam"}}


class Residual(nn.Module):
    def __init__(self, unit, i, width, stride, bottleneck):
        super().__init__()
        o = width * (4 if bottleneck else 1)
        if stride != 1 or i != o:
            self.shortcut = unit(i, o, 1, stride, basic_shortcut=not bottleneck)
        if bottleneck:
            self.conv1, self.conv2 = unit(i, width, 1, relu=True), unit(width, width, 3, stride, relu=True)
            self.conv3 = unit(width, o, 1)
        else:
            self.conv1, self.conv2 = unit(i, o, 3, stride, relu=True), unit(o, o, 3)

    def forward(self, x):
        y = F.relu(self.conv1(x))
        y = self.conv3(F.relu(self.conv2(y))) if hasattr(self, "conv3") else self.conv2(y)
        return F.relu(y + (self.shortcut(x) if hasattr(self, "shortcut") else x))


class ResNet(nn.Module):
    def __init__(self, unit, source, depth):
        super().__init__()
        stem, channels, bottleneck = unit(3, 64, 7, 2, relu=True), 64, depth == 50
        if source == "acnet":
            self.conv1 = stem
        else:
            self.stage0 = chain(conv1=stem)
        for s, blocks in enumerate((3, 4, 6, 3) if bottleneck else (2, 2, 2, 2)):
            stage = nn.Sequential()
            for b in range(blocks):
                stage.append(Residual(unit, channels, 64 << s, 2 if s > 0 and b == 0 else 1, bottleneck))
                channels = (64 << s) * (4 if bottleneck else 1)
            self.add_module(f"stage{s + 1}", stage)
        self.linear = nn.Linear(channels, CLASSES)

    def forward(self, x):
        y = F.relu(self.conv1(x) if hasattr(self, "conv1") else self.stage0(x))
        y = F.max_pool2d(y, 3, 2, 1)
        return self.linear(self.stage4(self.stage3(self.stage2(self.stage1(y)))).mean((2, 3)))


class MobileNet(nn.Module):
    def __init__(self, unit, *_):
        super().__init__()
        widths = [32, 64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024]
        self.conv1 = unit(3, 32, 3, 2)
        self.stem = nn.Sequential()
        for k, (i, o) in enumerate(itertools.pairwise(widths)):
            depthwise, pointwise = unit(i, i, 3, 2 if k in (1, 3, 5, 11) else 1, groups=i), unit(i, o, 1)
            self.stem.append(chain(depthwise=depthwise, relu=nn.ReLU(), pointwise=pointwise, relu2=nn.ReLU()))
        self.linear = nn.Linear(1024, CLASSES)

    def forward(self, x):
        return self.linear(self.stem(F.relu(self.conv1(x))).mean((2, 3)))


class Vgg(nn.Module):
    def __init__(self, unit, *_):
        super().__init__()
        self.stem, channels, number = nn.Sequential(), 3, 1
        for stage, (width, layers) in enumerate(((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))):
            for _ in range(layers):
                parts = dict(unit(channels, width, 3, relu=True).named_children())
                self.stem.add_module(f"conv{number}", chain(**parts))
                channels, number = width, number + 1
            self.stem.add_module(f"maxpool{stage + 1}", nn.MaxPool2d(2))
        self.linear1, self.linear2 = nn.Linear(512, 512), nn.Linear(512, CLASSES)

    def forward(self, x):
        return self.linear2(F.relu(self.linear1(self.stem(x).flatten(1))))


MODELS = {"resnet18": functools.partial(ResNet, depth=18), "resnet50": functools.partial(ResNet, depth=50),
          "mobilenet_v1": MobileNet, "vgg16": Vgg}
IMAGE = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@functools.lru_cache(maxsize=2)  # some of them take half a gigabyte
def published_model(source, name, deploy=False):
    """The weights of a published network with random statistics, and its logits on `image(name)`."""
    torch.manual_seed(0)
    model = MODELS[name](functools.partial(deployed, DEPLOYED[source]) if deploy else UNITS[source], source)
    model = randomize(model.double().eval())
    with torch.no_grad():
        return model.state_dict(), model(image(name))


def image(name):
    return IMAGE[:, :, :32, :32] if name == "vgg16" else IMAGE
