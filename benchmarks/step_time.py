"""What a training step costs: plain convolution + norm, the blocks as published, and ours in every mode.

    python benchmarks/step_time.py [--device cuda] [--rounds 7] [--batch 64] [--rows depthwise]

Forward and backward, medians over rounds, all variants interleaved within each round in this one process; and
the bytes that a forward pass leaves allocated. Prints ratios to plain as a table, and writes all numbers to
benchmarks/results/.
"""

import argparse
import csv
import platform
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import timm
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dbb import DiverseBranchBlock, OnlineReparamBlock, ReparamConv2d
from evaluation.cost import activation_bytes
from models import build_model

# channels in, out, groups, side of the map, stride
LAYERS = [(64, 64, 1, 32, 1), (128, 128, 1, 16, 1), (128, 256, 1, 16, 2), (256, 256, 1, 8, 1),
          (512, 512, 1, 4, 1), (128, 128, 128, 16, 1), (512, 512, 512, 8, 1)]
OURS = {"exact": DiverseBranchBlock, "online": partial(DiverseBranchBlock, mode="online"),
        "linear": OnlineReparamBlock}


class DrawnBlock(nn.Module):
    """The Diverse Branch Block (3x3) as the paper draws it, every branch a chain of modules with its maps.

    The inner map is padded with its norm's value of zero, detached, as in the authors' code.
    """

    def __init__(self, c_in: int, c_out: int, stride: int, groups: int):
        super().__init__()
        depthwise = groups == c_in == c_out
        inside = 2 * c_in if depthwise else c_in

        def conv(i, o, k, stride=1, padding=0):
            return nn.Conv2d(i, o, k, stride, padding, groups=groups, bias=False)

        self.origin = nn.Sequential(conv(c_in, c_out, 3, stride, 1), nn.BatchNorm2d(c_out))
        self.first, self.first_bn = conv(c_in, inside, 1), nn.BatchNorm2d(inside)
        self.second = nn.Sequential(conv(inside, c_out, 3, stride), nn.BatchNorm2d(c_out))
        self.pool = nn.Sequential(nn.AvgPool2d(3, stride, 1 if depthwise else 0), nn.BatchNorm2d(c_out))
        self.point = self.average = None
        if not depthwise:
            self.point = nn.Sequential(conv(c_in, c_out, 1, stride), nn.BatchNorm2d(c_out))
            self.average, self.average_bn = conv(c_in, c_out, 1), nn.BatchNorm2d(c_out)

    @staticmethod
    def pad(u, bn):
        value = bn.bias - bn.running_mean * bn.weight / (bn.running_var + bn.eps).sqrt()
        value = value.detach()[None, :, None, None]
        y = nn.functional.pad(u, [1] * 4)
        y[:, :, :1], y[:, :, -1:], y[:, :, :, :1], y[:, :, :, -1:] = value, value, value, value
        return y

    def forward(self, x):
        y = self.origin(x) + self.second(self.pad(self.first_bn(self.first(x)), self.first_bn))
        if self.point is None:
            return y + self.pool(x)
        average = self.average_bn(self.average(x))
        return y + self.point(x) + self.pool(self.pad(average, self.average_bn))


class PublishedOREPA(nn.Module):
    """OREPA's 3x3 unit as its authors run it: six kernels, each times a factor per output, and one norm.

    All of it by einsum.
    """

    def __init__(self, c_in: int, c_out: int, stride: int, groups: int):
        super().__init__()
        per_group, inside = c_in // groups, c_in if groups <= 4 else 2 * c_in
        self.stride, self.groups = stride, groups

        def kernel(*shape):
            return nn.Parameter(nn.init.kaiming_uniform_(torch.empty(shape)))

        self.origin, self.average = kernel(c_out, per_group, 3, 3), kernel(c_out, per_group)
        self.frequency, self.point = kernel(c_out, per_group), kernel(c_out, per_group)
        self.first, self.second = kernel(inside, per_group), kernel(c_out, inside // groups, 3, 3)
        self.dw, self.pw = kernel(8 * c_in, 1, 3, 3), kernel(c_out, 8 * per_group)
        self.vector = nn.Parameter(torch.full((6, c_out), 0.5))
        self.register_buffer("box", torch.full((3, 3), 1 / 9))
        self.register_buffer("prior", torch.rand(c_out, 3, 3))
        self.bn = nn.BatchNorm2d(c_out)

    def forward(self, x):
        g = self.groups
        first, second = self.first.unflatten(0, (g, -1)), self.second.unflatten(0, (g, -1))
        dw, pw = self.dw.reshape(g, -1, 8, 1, 3, 3), self.pw.reshape(len(self.pw) // g, g, -1, 8)
        kernels = [self.origin, torch.einsum("oi,hw->oihw", self.average, self.box),
                   torch.einsum("oi,ohw->oihw", self.frequency, self.prior),
                   torch.einsum("gti,gothw->goihw", first, second).flatten(0, 1),
                   nn.functional.pad(self.point[:, :, None, None], [1] * 4),
                   torch.einsum("cgtihw,ocgt->cogihw", dw, pw).reshape(self.origin.shape)]
        weight = sum(torch.einsum("oihw,o->oihw", kernel, factor)
                     for kernel, factor in zip(kernels, self.vector, strict=True))
        return self.bn(nn.functional.conv2d(x, weight, None, self.stride, 1, 1, g))


def published(block: type[nn.Module], net: nn.Module) -> nn.Module:
    """Put published blocks where `build_model` put ours."""
    for name, module in list(net.named_modules()):
        if isinstance(module, ReparamConv2d):
            g = module.geometry
            net.set_submodule(name, block(g.in_channels, g.out_channels, g.stride[0], g.groups))
    return net


def layer(c_in: int, c_out: int, groups: int, stride: int) -> dict[str, nn.Module]:
    """A 3x3 layer in every variant."""
    conv = nn.Conv2d(c_in, c_out, 3, stride, 1, groups=groups, bias=False)
    plain = nn.Sequential(conv, nn.BatchNorm2d(c_out))
    arguments = c_in, c_out, stride, groups
    return {"plain": plain, "drawn": DrawnBlock(*arguments), "published OREPA": PublishedOREPA(*arguments),
            **{mode: block(c_in, c_out, 3, stride, 1, groups=groups) for mode, block in OURS.items()}}


def network(name: str, size: int) -> dict[str, nn.Module]:
    """A network in every variant."""
    return {"plain": build_model(name, 10, None, size),
            "drawn": published(DrawnBlock, build_model(name, 10, "dbb", size)),
            "published OREPA": published(PublishedOREPA, build_model(name, 10, "dbb", size)),
            **{mode: build_model(name, 10, block, size) for mode, block in OURS.items()}}


def step(net: nn.Module, x: torch.Tensor, cotangent: torch.Tensor) -> float:
    """Milliseconds of one forward and backward pass."""
    net.zero_grad(set_to_none=True)
    x.grad = None
    if x.is_cuda:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        net(x).backward(cotangent)
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    start = time.perf_counter()
    net(x).backward(cotangent)
    return 1e3 * (time.perf_counter() - start)


def memory(net: nn.Module, x: torch.Tensor, cotangent: torch.Tensor) -> tuple[int, int]:
    """Bytes that a forward pass leaves allocated, and at the peak of a step (CUDA only).

    The input is counted, the output not.
    """
    net.zero_grad(set_to_none=True)
    x.grad = None
    if x.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        y = net(x)
        left = torch.cuda.memory_allocated() - before
        y.backward(cotangent)
        return left + x.nbytes - y.nbytes, torch.cuda.max_memory_allocated() - before
    return activation_bytes(net, x), 0


class Bench:
    """Measures rows of the table, prints them, and writes them into a CSV file, beside those it has."""

    def __init__(self, device: torch.device, rounds: int, rows: str, path: Path):
        self.device, self.rounds, self.rows, self.path = device, rounds, rows, path

    def heading(self, title: str, variants: list[str]) -> None:
        others = [name for name in variants if name != "plain"]
        columns = [title, "plain, ms", *others, "plain, MB kept", *others]
        print("\n| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|", flush=True)

    def row(self, name: str, nets: dict[str, nn.Module], x: torch.Tensor, rounds: int | None = None) -> None:
        """Time and memory of each variant, if the row is asked for."""
        if self.rows not in name:
            return
        nets = {key: net.to(self.device).train() for key, net in nets.items()}
        x = x.to(self.device).requires_grad_()
        with torch.no_grad():
            cotangent = torch.randn_like(nets["plain"](x))
        for net in nets.values():
            step(net, x, cotangent)  # warm up
        times = {key: [] for key in nets}
        for _ in range(rounds or self.rounds):
            for key, net in nets.items():
                times[key].append(step(net, x, cotangent))
        ms = {key: statistics.median(values) for key, values in times.items()}
        kept, numbers = {}, []
        for key, net in nets.items():
            left, peak = memory(net, x, cotangent)
            kept[key] = left
            numbers.append({"row": name, "variant": key, "ms": f"{ms[key]:.3f}",
                            "kept_mb": f"{left / 1e6:.3f}", "peak_mb": f"{peak / 1e6:.3f}" if peak else ""})
        others = [key for key in nets if key != "plain"]
        cells = [f"{ms['plain']:.1f}", *(f"{ms[key] / ms['plain']:.2f}" for key in others),
                 f"{kept['plain'] / 1e6:.1f}", *(f"{kept[key] / kept['plain']:.2f}" for key in others)]
        print("|", " | ".join([name, *cells]), "|", flush=True)
        before = csv.DictReader(self.path.open()) if self.path.exists() else []
        numbers = [number for number in before if number["row"] != name] + numbers
        with self.path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(numbers[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(numbers)


def measure_networks(bench: Bench, batch: int) -> None:
    """Rows of whole networks: small images, ImageNet's, and the studies' network, compiled too."""
    bench.heading("networks, 32x32 images", list(layer(8, 8, 1, 1)))
    images, rounds = torch.randn(batch, 3, 32, 32), max(3, bench.rounds // 2)
    for name in ("resnet18", "mobilenet_v1", "resnet20", "resnet56"):
        bench.row(f"{name}, eager", network(name, 32), images, rounds)
    bench.heading("networks, 224x224 images", list(layer(8, 8, 1, 1)))
    for name, count in (("resnet18", 64), ("mobilenet_v1", 16)):
        bench.row(f"{name}, 224x224, batch {count}", network(name, 224), torch.randn(count, 3, 224, 224), 3)
    bench.heading("resnet8, 16x16 images, batch 128", ["plain", *OURS])
    for compiled in (False, True):
        nets = {key: build_model("resnet8", 10, block, 16) for key, block in {"plain": None, **OURS}.items()}
        for net in nets.values():
            if compiled:
                net.compile()
        bench.row(f"resnet8, {'compiled' if compiled else 'eager'}", nets, torch.randn(128, 3, 16, 16))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rows", default="",
                        help="only the rows whose name has this in it; the file keeps the others")
    options = parser.parse_args()
    device, n = torch.device(options.device), options.batch
    torch.manual_seed(0)
    machine, units = f"{platform.machine()} CPU", f"{torch.get_num_threads()}threads"
    if device.type == "cuda":
        machine, units = torch.cuda.get_device_name(), "gpu"
    print(f"torch {torch.__version__}, timm {timm.__version__}, {machine}, {units}, float32, batch {n}, "
          f"median of {options.rounds} rounds")
    version = torch.__version__.split("+")[0]
    name = f"step_time_torch{version}_{device.type}_{units}.csv"
    bench = Bench(device, options.rounds, options.rows, Path(__file__).parent / "results" / name)

    bench.heading("layers", list(layer(8, 8, 1, 1)))
    for c_in, c_out, groups, side, stride in LAYERS:
        kind = "depthwise" if groups > 1 else "dense"
        bench.row(f"{kind} {c_in} to {c_out}, {side}x{side}, stride {stride}",
                  layer(c_in, c_out, groups, stride), torch.randn(n, c_in, side, side))
    measure_networks(bench, n)
    bench.heading("as work grows: a dense layer, 128 channels, 16x16", list(layer(8, 8, 1, 1)))
    for batch in (8, 32, 128):
        bench.row(f"batch {batch}", layer(128, 128, 1, 1), torch.randn(batch, 128, 16, 16))
    for channels in (16, 32, 256):
        bench.row(f"{channels} channels", layer(channels, channels, 1, 1), torch.randn(n, channels, 16, 16))
    for side in (4, 8, 32):
        bench.row(f"map {side}x{side}", layer(128, 128, 1, 1), torch.randn(n, 128, side, side))
    bench.heading("as branches are added, 128 channels, 16x16", ["plain", "exact", "online", "linear"])
    branches = ("kxk", "1x1", "1x1_avg", "1x1_kxk", "kxk", "1xk")
    for count in range(1, len(branches) + 1):
        taken = branches[:count]
        nets = {"plain": layer(128, 128, 1, 1)["plain"],
                **{mode: ReparamConv2d(128, 128, 3, padding=1, branches=taken, mode=mode) for mode in OURS}}
        bench.row(f"{count}: {', '.join(taken)}", nets, torch.randn(n, 128, 16, 16))


if __name__ == "__main__":
    main()
