"""What a training step costs: plain convolution + norm, the block as the paper draws it, and ours.

    python benchmarks/step_time.py [--device cuda] [--rounds 7] [--batch 64]

Forward and backward, median over rounds, the three interleaved within each round in this one process; and the bytes that
autograd keeps for backward. Ratios to plain are what counts.
"""

import argparse
import platform
import statistics
import sys
import time
from pathlib import Path

import timm
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dbb import DiverseBranchBlock
from models import build_model
from models.build import SMALL_IMAGE

# channels in, out, groups, side of the map, stride
LAYERS = [(64, 64, 1, 32, 1), (128, 128, 1, 16, 1), (128, 256, 1, 16, 2), (256, 256, 1, 8, 1), (512, 512, 1, 4, 1),
          (128, 128, 128, 16, 1), (512, 512, 512, 8, 1)]


class DrawnBlock(nn.Module):
    """The Diverse Branch Block (3x3) as the paper draws it, every branch a chain of modules with all of its maps.

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
        value = (bn.bias - bn.running_mean * bn.weight / (bn.running_var + bn.eps).sqrt()).detach()[None, :, None, None]
        y = nn.functional.pad(u, [1] * 4)
        y[:, :, :1], y[:, :, -1:], y[:, :, :, :1], y[:, :, :, -1:] = value, value, value, value
        return y

    def forward(self, x):
        y = self.origin(x) + self.second(self.pad(self.first_bn(self.first(x)), self.first_bn))
        if self.point is None:
            return y + self.pool(x)
        return y + self.point(x) + self.pool(self.pad(self.average_bn(self.average(x)), self.average_bn))


def with_drawn_blocks(net: nn.Module) -> nn.Module:
    """Put drawn blocks where `build_model` put ours."""
    for name, module in list(net.named_modules()):
        if isinstance(module, DiverseBranchBlock):
            g = module.geometry
            net.set_submodule(name, DrawnBlock(g.in_channels, g.out_channels, g.stride[0], g.groups))
    return net


def step(net: nn.Module, x: torch.Tensor, cotangent: torch.Tensor) -> float:
    """Seconds of one forward and backward pass."""
    synchronize = torch.cuda.synchronize if x.is_cuda else (lambda: None)
    net.zero_grad(set_to_none=True)
    synchronize()
    start = time.perf_counter()
    net(x).backward(cotangent)
    synchronize()
    return time.perf_counter() - start


def saved_bytes(net: nn.Module, x: torch.Tensor) -> int:
    """Bytes of all tensors that autograd keeps, each storage counted once, parameters not at all."""
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = net(x)
    del output
    return sum(storages.values())


def measure(name: str, nets: dict[str, nn.Module], x: torch.Tensor, rounds: int) -> None:
    """Print a row of the table: seconds and megabytes of plain, ratios of the others to it."""
    nets = {key: net.to(x.device).train() for key, net in nets.items()}
    with torch.no_grad():
        cotangent = torch.randn_like(nets["plain"](x))
    for net in nets.values():
        step(net, x, cotangent)  # warm up
    times = {key: [] for key in nets}
    for _ in range(rounds):
        for key, net in nets.items():
            times[key].append(step(net, x, cotangent))
    seconds = {key: statistics.median(values) for key, values in times.items()}
    kept = {key: saved_bytes(net, x) for key, net in nets.items()}
    row = [f"{seconds['plain'] * 1e3:.1f}", *ratios(seconds), f"{kept['plain'] / 1e6:.1f}", *ratios(kept)]
    print("|", " | ".join([name, *row]), "|", flush=True)


def ratios(values: dict[str, float]) -> list[str]:
    """As columns: drawn / plain, ours / plain, ours / drawn."""
    return [f"{values[a] / values[b]:.2f}" for a, b in (("drawn", "plain"), ("exact", "plain"), ("exact", "drawn"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=64)
    options = parser.parse_args()
    device, n = torch.device(options.device), options.batch
    torch.manual_seed(0)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, timm {timm.__version__}, {machine}, float32, batch {n}, median of {options.rounds} rounds\n")
    print("| forward + backward | plain, ms | drawn / plain | ours / plain | ours / drawn | plain, MB kept | drawn / plain | ours / plain "
          "| ours / drawn |\n|---|---|---|---|---|---|---|---|---|")
    for c_in, c_out, groups, side, stride in LAYERS:
        plain = nn.Sequential(nn.Conv2d(c_in, c_out, 3, stride, 1, groups=groups, bias=False), nn.BatchNorm2d(c_out))
        nets = {"plain": plain, "drawn": DrawnBlock(c_in, c_out, stride, groups),
                "exact": DiverseBranchBlock(c_in, c_out, 3, stride, 1, groups=groups)}
        kind = "depthwise" if groups > 1 else "dense"
        x = torch.randn(n, c_in, side, side, device=device, requires_grad=True)
        measure(f"{kind} {c_in} to {c_out}, {side}x{side}, stride {stride}", nets, x, options.rounds)
    for name in ("resnet18", "mobilenet_v1"):
        size = SMALL_IMAGE // 2
        nets = {"plain": build_model(name, 10, None, size), "drawn": with_drawn_blocks(build_model(name, 10, "dbb", size)),
                "exact": build_model(name, 10, "dbb", size)}
        measure(f"{name}, {size}x{size} images", nets, torch.randn(n, 3, size, size, device=device), max(3, options.rounds // 2))


if __name__ == "__main__":
    main()
