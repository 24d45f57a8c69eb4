"""What a training step costs on a GPU, by a model that needs none: `python benchmarks/gpu_model.py`.

A step is a sequence of operators, traced on fake tensors, so that nothing is computed. Each costs the largest
of three times: its arithmetic, its traffic with memory, and its launch. No overlap, no cache, no fusion:
times are rough, ratios are what counts. "Measured" in the last table is Table 6 of OREPA (Hu et al., CVPR
2022): four V100s, 64 images each. Prints ratios to the plain network, and writes all cells to
results/gpu_model.csv. One core, ten minutes.
"""

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.step_time import network

NETWORKS = ("resnet18", "resnet50", "mobilenet_v1")
VARIANTS = ("plain", "drawn", "exact", "online", "linear")
BATCHES = (32, 64, 256)
LAUNCHES = (0.0, 5e-6)  # seconds
REACHED = 0.6, 0.75  # of the data sheets' arithmetic and bandwidth, by convolutions and by passes over memory
MEASURED = {"resnet18": (0.086, 2.80), "resnet50": (0.204, 1.86)}  # seconds of plain, and drawn / plain


class GPU(NamedTuple):
    """Of a data sheet, without sparsity: FLOP/s in the type of a step and in float32 or TF32, and bytes/s."""

    name: str
    dtype: torch.dtype
    peak: float
    peak_float32: float
    bandwidth: float


GPUS = (GPU("V100 float32", torch.float32, 15.7e12, 15.7e12, 900e9),
        GPU("A100 TF32", torch.float32, 156e12, 156e12, 2.0e12),
        GPU("A100 bf16", torch.bfloat16, 312e12, 156e12, 2.0e12),
        GPU("H100 TF32", torch.float32, 494e12, 494e12, 3.35e12),
        GPU("H100 bf16", torch.bfloat16, 989e12, 494e12, 3.35e12),
        GPU("L4 TF32", torch.float32, 60e12, 60e12, 300e9),
        GPU("L4 bf16", torch.bfloat16, 121e12, 60e12, 300e9))


class Operator(NamedTuple):
    """What one launch does; `wide` with operands in float32, as statistics are under autocast too."""

    name: str
    flops: int
    bytes: int
    wide: bool


class Trace(TorchDispatchMode):
    """Lists the operators that run something: not views, and no memory without values."""

    free = {"detach", "view", "_unsafe_view", "expand", "alias", "t", "transpose", "permute", "slice",
            "select", "unsqueeze", "squeeze", "as_strided", "split", "split_with_sizes", "unbind", "unfold",
            "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}

    def __init__(self):
        super().__init__()
        self.operators = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if view or name in self.free or func.namespace == "prim":
            return out
        reads = not (name.startswith("new_") or name.endswith("_like"))  # else arguments give a shape only
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out) if reads else out)
                   if isinstance(leaf, torch.Tensor)]
        count = flop_registry.get(func.overloadpacket)
        flops = count(*args, **(kwargs or {}), out_val=out) if count else 0
        moved = sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in tensors)  # less, if expanded
        self.operators.append(Operator(name, flops, moved, tensors[0].dtype == torch.float32))
        return out


def trace(net: nn.Module, batch: int, size: int, dtype: torch.dtype) -> list[Operator]:
    """The operators of one training step on `[batch, 3, size, size]`, in float32 or under autocast."""
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        nn.Module._apply(net.train(), fake.from_tensor)
        with Trace() as traced, torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits = net(torch.empty(batch, 3, size, size))
            F.cross_entropy(logits.float(), torch.zeros(batch, dtype=torch.long)).backward()
    return traced.operators


def seconds(operators: Sequence[Operator], gpu: GPU, launch: float) -> float:
    """Modelled time of a step."""
    total = 0.0
    for operator in operators:
        peak = gpu.peak_float32 if operator.wide else gpu.peak
        arithmetic = operator.flops / (peak * REACHED[0])
        traffic = operator.bytes / (gpu.bandwidth * REACHED[1])
        total += max(arithmetic, traffic, launch)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="*", default=NETWORKS)
    parser.add_argument("--batches", nargs="*", type=int, default=BATCHES)
    options = parser.parse_args()
    rows, check = [], []
    for name in options.networks:
        for batch in options.batches:
            traces = {}
            for dtype in (torch.float32, torch.bfloat16):
                nets = network(name, 224)
                traces[dtype] = {variant: trace(nets[variant], batch, 224, dtype) for variant in VARIANTS}
            print_table(f"{name}, {batch} images", traces, rows)
            if batch == 64 and name in MEASURED:
                check.append((name, traces[torch.float32]))
    print("\n| the model's check, V100, 64 images | plain, ms | measured | drawn / plain | measured |\n"
          "|---|---|---|---|---|")
    for name, of in check:
        plain, drawn = (seconds(of[variant], GPUS[0], LAUNCHES[1]) for variant in ("plain", "drawn"))
        print(f"| {name} | {1e3 * plain:.0f} | {1e3 * MEASURED[name][0]:.0f} | {drawn / plain:.2f} | "
              f"{MEASURED[name][1]:.2f} |")
    with (ROOT / "benchmarks" / "results" / "gpu_model.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def print_table(title: str, traces: dict[torch.dtype, dict[str, list[Operator]]], rows: list[dict]) -> None:
    """One line a variant: what it launches and moves, and the modelled ratio to plain on every GPU."""
    heads = [f"{gpu.name}, {1e6 * launch:.0f} us" for gpu in GPUS for launch in LAUNCHES]
    columns = [title, "operators", "GB", "TFLOP", *heads]
    print("\n| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for variant in VARIANTS:
        ratios = []
        for gpu in GPUS:
            for launch in LAUNCHES:
                of = traces[gpu.dtype]
                time, plain = (seconds(of[key], gpu, launch) for key in (variant, "plain"))
                ratios.append(f"{time / plain:.2f}")
                rows.append({"network and batch": title, "variant": variant, "gpu": gpu.name,
                             "launch_us": round(1e6 * launch), "operators": len(of[variant]),
                             "gb": f"{sum(op.bytes for op in of[variant]) / 1e9:.3f}",
                             "tflop": f"{sum(op.flops for op in of[variant]) / 1e12:.4f}",
                             "modelled_ms": f"{1e3 * time:.3f}", "modelled_ratio": ratios[-1]})
        listed = traces[torch.float32][variant]
        amounts = [str(len(listed)), f"{sum(op.bytes for op in listed) / 1e9:.1f}",
                   f"{sum(op.flops for op in listed) / 1e12:.2f}"]
        print("|", " | ".join([variant, *amounts, *ratios]), "|", flush=True)


if __name__ == "__main__":
    main()
