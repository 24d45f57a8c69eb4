"""What a start of the branches does at the first step, layer by layer: `python benchmarks/starts.py`.

For every convolution that becomes a block: the variance of the block's output and its speed, both as ratios
to the plain convolution and norm on the same input. Speed is how fast the output moves under SGD: the squared
norm of the gradient of a random projection of the output, over all kernels. Prints median, smallest and
largest over the layers, and writes all layers to results/starts.csv. Images are standard normal noise,
weights fresh; no data is needed, and one core for a minute.
"""

import csv
import statistics
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dbb import INITS, replace_convs
from evaluation.networks import blocks_of
from models import build_model
from settings.schema import BlockConf

NETWORKS = ("resnet20", "vgg16_narrow", "mobilenet_v1")
BLOCKS = {  # as in configs/block/
    "dbb": BlockConf(branches=["kxk", "1x1", "1x1_avg", "1x1_kxk"], depthwise=["kxk", "avg", "1x1_kxk"]),
    "acb": BlockConf(branches=["kxk", "1xk", "kx1"]),
    "repvgg": BlockConf(branches=["kxk", "1x1", "identity"]),
    "mobileone": BlockConf(branches=["kxk", "1x1", "identity"], copies=4)}
COLUMNS = ["network", "block", "init", "layer", "branches", "variance", "speed"]


def inputs_of(net: nn.Module, names: list[str], images: Tensor) -> dict[str, Tensor]:
    """What some modules get as their input in a training forward."""
    seen = {}
    handles = []
    for name in names:
        def keep(module, args, name=name):
            seen[name] = args[0]
        handles.append(net.get_submodule(name).register_forward_pre_hook(keep))
    with torch.no_grad():
        net.train()(images)
    for handle in handles:
        handle.remove()
    return seen


def variance_and_speed(module: nn.Module, x: Tensor) -> tuple[float, float]:
    """Of a module's output, over images, positions and channels; speed with respect to its kernels."""
    y = module.train()(x)
    projection = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    gradients = torch.autograd.grad(y, [p for p in module.parameters() if p.ndim == 4], projection)
    return y.var().item(), sum(gradient.square().sum().item() for gradient in gradients)


def main() -> None:
    rows = []
    images = torch.randn(32, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    print("| network | block | init | variance | speed |\n|---|---|---|---|---|")
    for network in NETWORKS:
        torch.manual_seed(0)
        plain = build_model(network, 10, image_size=32)
        for block in BLOCKS:
            for init in (init for init in INITS if init != "single"):
                blocks = blocks_of(BLOCKS[block])
                net, report = replace_convs(plain, blocks, example_input=images[:1], init=init)
                swapped = [row for row in report if row.block]
                seen = inputs_of(plain, [row.module for row in swapped], images)
                found = []
                for row in swapped:
                    conv = plain.get_submodule(row.module)
                    pair = nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels))
                    before = variance_and_speed(pair, seen[row.module])
                    after = variance_and_speed(net.get_submodule(row.module), seen[row.module])
                    ratios = [new / old for new, old in zip(after, before, strict=True)]
                    found.append(ratios)
                    rows.append([network, block, init, row.module, row.block,
                                 *(f"{ratio:.4g}" for ratio in ratios)])
                cells = [f"{statistics.median(of):.2f} ({min(of):.2f} to {max(of):.2f})"
                         for of in zip(*found, strict=True)]
                print("|", " | ".join([network, block, init, *cells]), "|", flush=True)
    with (ROOT / "benchmarks" / "results" / "starts.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])


if __name__ == "__main__":
    main()
