"""What a training step costs with every choice of `block=`: `python benchmarks/blocks.py`.

ResNet-18 on this CPU (32x32, 64 images, eager, medians over rounds, all choices interleaved in one process),
and by the model of gpu_model.py on an H100 (224x224, 64 images, TF32, 5 us a launch); both as ratios to the
plain network. Of `sgs`, also the seconds in which its masks are computed anew, from two batches. Writes
results/blocks.csv. Ten minutes on a machine that does nothing else.
"""

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import gpu_model
from benchmarks.step_time import step
from dbb import SpatialGradientScaling
from dbb.sgs import scalable
from evaluation.networks import build_network
from settings.command import resolve

BLOCKS = ("none", "sgs", "acb", "repvgg", "mobileone", "dbb_lite", "dbb", "dbb_online", "orepa", "expand")
H100 = next(gpu for gpu in gpu_model.GPUS if gpu.name == "H100 TF32")


def networks(model: str, size: int) -> Iterator[tuple[str, nn.Module]]:
    """The network with every block, in training, as the configs build it."""
    for block in BLOCKS:
        words = [f"model={model}", f"block={block}"]
        with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
            command = resolve(compose("train", words), words)
        yield block, build_network(command, 10, size).train()


def measured(model: str, rounds: int) -> tuple[dict[str, float], float]:
    """Milliseconds of a step by block; and the seconds of new masks."""
    nets, x = dict(networks(model, 32)), torch.randn(64, 3, 32, 32)
    scaling = SpatialGradientScaling(nets["sgs"])
    start = time.perf_counter()
    scaling.update(torch.randn(128, 3, 32, 32))
    update = time.perf_counter() - start
    with torch.no_grad():
        cotangent = torch.randn_like(nets["none"](x))
    times = {block: [] for block in nets}
    for _ in range(rounds + 1):
        for block, net in nets.items():
            times[block].append(step(net, x, cotangent))
    return {block: statistics.median(of[1:]) for block, of in times.items()}, update


def modelled(model: str) -> dict[str, float]:
    """Milliseconds of a step by block, on an H100; a scaled gradient is one operator more."""
    ms = {}
    for block, net in networks(model, 224):
        scaled = scalable(net).values() if block == "sgs" else ()
        more = [gpu_model.Operator("mul", 0, 2 * conv.weight.nbytes, True) for conv in scaled]
        operators = gpu_model.trace(net, 64, 224, torch.float32) + more
        ms[block] = 1e3 * gpu_model.seconds(operators, H100, gpu_model.LAUNCHES[1])
    return ms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    on_cpu, update = measured(options.model, options.rounds)
    on_gpu = modelled(options.model)
    rows = [{"model": options.model, "block": block, "cpu_ms": f"{on_cpu[block]:.1f}",
             "cpu_ratio": f"{on_cpu[block] / on_cpu['none']:.3f}",
             "h100_modelled_ratio": f"{on_gpu[block] / on_gpu['none']:.3f}"} for block in BLOCKS]
    print("| block | CPU, measured | H100, modelled |\n|---|---|---|")
    for row in rows:
        print(f"| {row['block']} | {row['cpu_ratio']} | {row['h100_modelled_ratio']} |")
    print(f"new masks of sgs from 128 images: {update:.2f} s, of {on_cpu['none']:.0f} ms a plain step")
    with (ROOT / "benchmarks" / "results" / "blocks.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
