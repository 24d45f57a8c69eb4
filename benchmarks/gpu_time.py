"""What a training step costs on the GPU at hand, for gpu_model.py's rows: `python benchmarks/gpu_time.py`.

Forward, cross entropy and backward, channels_last, medians over rounds, all variants interleaved within each
round. The ways: *eager*; *graph*, the same operators replayed as one CUDA graph: launches cost nothing;
*compiled* (torch.compile), *cudagraphs* (its backend that captures and fuses nothing), *reduce-overhead*.
"Kernels" are what the profiler sees the GPU run in one eager step. Prints ratios to plain, and writes all
numbers to results/.
"""

import argparse
import csv
import gc
import statistics
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.gpu_model import NETWORKS, VARIANTS
from benchmarks.step_time import network

PRECISIONS = {"TF32": torch.float32, "bf16": torch.bfloat16}
WAYS = {"eager": None, "graph": None, "compiled": {}, "cudagraphs": {"backend": "cudagraphs"},
        "reduce-overhead": {"mode": "reduce-overhead"}}
WARM_UP = 4  # steps: kernels are chosen, graphs captured


def training_step(net: nn.Module, batch: int, size: int, dtype: torch.dtype) -> Callable[[], None]:
    """One step on images `[batch, 3, size, size]`, as a function without arguments."""
    images = torch.randn(batch, 3, size, size, device="cuda").to(memory_format=torch.channels_last)
    target = torch.randint(10, (batch,), device="cuda")

    def step() -> None:
        torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            logits = net(images)
        F.cross_entropy(logits.float(), target).backward()

    return step


def prepare(step: Callable[[], None], net: nn.Module, way: str) -> Callable[[], None]:
    """The step, warmed up; for the way `graph` a replay of its operators."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            net.zero_grad(set_to_none=True)
            step()
    torch.cuda.synchronize()
    net.zero_grad(set_to_none=True)
    if way != "graph":
        return step
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def milliseconds(step: Callable[[], None], net: nn.Module, way: str) -> float:
    """Time of one step, by CUDA events."""
    if way != "graph":  # a graph writes into the gradients it was captured with
        net.zero_grad(set_to_none=True)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def peak_bytes(step: Callable[[], None], net: nn.Module) -> int:
    """Most memory that a step takes beside what lay there before it."""
    net.zero_grad(set_to_none=True)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before


def kernels(step: Callable[[], None], net: nn.Module, listing: Path | None) -> int:
    """Kernels and copies that the GPU runs in one step; their times into the file `listing`."""
    net.zero_grad(set_to_none=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    averages = profile.key_averages()
    if listing:
        listing.write_text(averages.table("self_cuda_time_total", row_limit=40, max_name_column_width=90))
    return sum(event.count for event in averages if event.self_device_time_total > 0)


def measure(nets: dict[str, nn.Module], row: dict, options: argparse.Namespace) -> list[dict]:
    """One table line: each variant's time and its ratio to plain."""
    name, batch, precision, way = row.values()
    steps, runs, extras = {}, {}, {}  # a graph reads the images of its step, which must stay where they are
    for key, net in nets.items():
        run = net if WAYS[way] is None else torch.compile(net, **WAYS[way])
        steps[key] = step = training_step(run, batch, options.size, PRECISIONS[precision])
        runs[key] = prepare(step, net, way)
        extras[key] = {"kernels": "", "peak_mb": ""}
        if way == "eager":
            listing = options.profiles and options.profiles / f"{name}-{batch}-{precision}-{key}.txt"
            extras[key]["kernels"] = kernels(step, net, listing)
            extras[key]["peak_mb"] = round(peak_bytes(step, net) / 1e6)
    times = {key: [] for key in nets}
    for _ in range(options.rounds):
        for key, net in nets.items():
            times[key].append(milliseconds(runs[key], net, way))
    ms = {key: statistics.median(values) for key, values in times.items()}
    ratios = {key: ms[key] / ms["plain"] for key in nets}
    rows = [{**row, "variant": key, "ms": f"{ms[key]:.3f}", "ratio": f"{ratios[key]:.2f}", **extras[key]}
            for key in nets]
    print(f"| {name}, {batch} images, {precision}, {way} | {ms['plain']:.2f} |",
          " | ".join(f"{row['ratio']} ({row['kernels']}, {row['peak_mb']})" for row in rows), "|", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="*", default=NETWORKS)
    parser.add_argument("--batches", nargs="*", type=int, default=(64,))
    parser.add_argument("--precisions", nargs="*", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=("eager", "graph"))
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=VARIANTS, help="plain among them")
    parser.add_argument("--size", type=int, default=224, help="side of the images in pixels")
    parser.add_argument("--matmul", choices=("highest", "high"), default="high")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--profiles", type=Path, help="folder for the profiler's lists of kernels")
    parser.add_argument("--to", type=Path, help="CSV file to add to; default: in results/, named by the GPU")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_float32_matmul_precision(options.matmul)
    torch.backends.cudnn.allow_tf32 = True
    gpu = torch.cuda.get_device_name()
    path = options.to or ROOT / "benchmarks" / "results" / f"gpu_time_{gpu.replace(' ', '_')}.csv"
    print(f"torch {torch.__version__}, {gpu}, {options.size} pixels, median of {options.rounds} rounds; "
          "ratio to plain (kernels, peak MB)\n")
    print("| | plain, ms |", " | ".join(options.variants), "|\n" + "|---" * (len(options.variants) + 2) + "|")
    for name in options.networks:
        nets = {key: net.cuda().train().to(memory_format=torch.channels_last)
                for key, net in network(name, options.size).items() if key in options.variants}
        for batch, precision, way in product(options.batches, options.precisions, options.ways):
            row = {"network": name, "batch": batch, "precision": precision, "way": way}
            add(path, measure(nets, row, options))
            torch._dynamo.reset()
            for net in nets.values():
                net.zero_grad(set_to_none=True)
            gc.collect()
            torch.cuda.empty_cache()


def add(path: Path, rows: list[dict]) -> None:
    """Append rows to a CSV file."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
