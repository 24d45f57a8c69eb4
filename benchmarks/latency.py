"""What inference costs before and after conversion: four forms of one network, three ways to run them.

    python benchmarks/latency.py ckpt=outputs/.../checkpoints/last.ckpt

Forms: branch by branch as trained; merged (plain convolutions, the other norms as they are); the plain
network with its norms; the plain network with its norms folded in. All cells of a batch size are timed in
turn, round by round, in this one process; medians, in milliseconds. On the CPU, where onnxruntime runs too.
Writes all numbers to benchmarks/results/.
"""

import csv
import statistics
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dbb import branchwise, fold_norms, reparameterize
from evaluation.networks import load_network
from export.graph import OnnxNetwork, export_onnx
from models import build_model
from models.checkpoint import load_checkpoint
from settings.cli import plain_errors
from settings.command import resolve
from settings.schema import Settings

BATCHES, ROUNDS = (1, 8, 64), 15


class Branchwise(nn.Module):
    """A network that runs every branch on its own, whoever calls it."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x):
        with branchwise(self.net):
            return self.net(x)


@torch.no_grad()
def measure(settings: Settings) -> list[dict]:
    """Milliseconds of every form, way and batch size, a row each."""
    checkpoint = load_checkpoint(settings.ckpt)
    net, size = load_network(checkpoint, settings), checkpoint["dbb"]["image_size"]
    classes, image = len(checkpoint["dbb"]["classes"]), torch.zeros(2, 3, size, size)
    stock = build_model(settings.model.name, classes, image_size=size).eval()
    forms = {"branch by branch": Branchwise(net), "merged": reparameterize(net), "plain, with norms": stock,
             "plain, norms folded": fold_norms(stock, image)}
    cells = {}
    with tempfile.TemporaryDirectory() as folder:
        for form, network in forms.items():
            path, branches = Path(folder) / f"{len(cells)}.onnx", form == "branch by branch"
            about = {"model": settings.model.name, "classes": ["a"], "image_size": size, "resize": size,
                     "mean": [0.0] * 3, "std": [1.0] * 3}
            training = form in ("branch by branch", "plain, with norms")  # every norm as a node of its own
            export_onnx(net if branches else network, image, about, path, training=training)
            cells |= {(form, "eager"): network, (form, "compiled"): torch.compile(network, dynamic=False),
                      (form, "onnxruntime"): OnnxNetwork(path, torch.get_num_threads())}
    rows = []
    for batch in BATCHES:
        x = torch.randn(batch, 3, size, size)
        times = {cell: [] for cell in cells}
        for round_, cell in product(range(2 + ROUNDS), cells):  # two rounds to compile and warm up
            start = time.perf_counter()
            cells[cell](x)
            if round_ >= 2:
                times[cell].append(1e3 * (time.perf_counter() - start))
        rows += [{"model": settings.model.name, "image_size": size, "batch": batch, "form": form,
                  "way": way, "ms": f"{statistics.median(found):.4f}"}
                 for (form, way), found in times.items()]
    return rows


def table(rows: list[dict]) -> str:
    """Markdown: a line per form, a column per way and batch size."""
    columns = list(dict.fromkeys((row["way"], row["batch"]) for row in rows))
    columns.sort(key=lambda column: ("eager", "compiled", "onnxruntime").index(column[0]))
    cells = {(row["form"], row["way"], row["batch"]): f"{float(row['ms']):.2f}" for row in rows}
    head = ["", *(f"{way}, {batch}" for way, batch in columns)]
    forms = dict.fromkeys(row["form"] for row in rows)
    body = [[form, *(cells[form, *column] for column in columns)] for form in forms]
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *body])


@hydra.main(config_path="../configs", config_name="convert", version_base="1.3")
def main(cfg: DictConfig) -> None:
    with plain_errors():
        settings = resolve(cfg, HydraConfig.get().overrides.task)
        rows = measure(settings)
    version, threads = torch.__version__.split("+")[0], torch.get_num_threads()
    name = f"latency_{settings.model.name}_torch{version}_cpu_{threads}threads.csv"
    path = Path(__file__).parent / "results" / name
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"{settings.model.name}, {rows[0]['image_size']} pixels, milliseconds a batch, {threads} threads, "
          f"torch {version}\n\n{table(rows)}\n\nwritten to {path}")


if __name__ == "__main__":
    main()
