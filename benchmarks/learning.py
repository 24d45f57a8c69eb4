"""Do the modes learn the same? Trains ResNet-8 on CIFAR-10 (16x16 images) in every variant and seed.

    python benchmarks/learning.py --data data/cifar10 [--variants plain exact] [--seeds 0 1 2]

Each run is a call of train.py in outputs/learning/; finished ones are not repeated, so that an interrupted
study goes on. The table has every run that is finished, and benchmarks/results/learning.csv their raw
numbers, an epoch a line.
"""

import argparse
import csv
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from report import mean_and_half_width

RESULTS = ROOT / "benchmarks" / "results" / "learning.csv"
RECIPE = ["model=resnet8", "data=cifar10", "data.image_size=16", "data.crop_padding=2", "optim.lr=0.1",
          "optim.warmup_epochs=1", "block.init=ones", "logger=csv"]
EPOCHS = 8
MODES = {"plain": ["block=none"], "exact": ["block=dbb"], "online": ["block=dbb", "block.mode=online"],
         "linear": ["block=orepa"]}
# Equal time: the epochs that fit into the time of plain's twelve, by the seconds of a step on one thread
# (4.0, 1.8, 1.26 times plain's).
EQUAL_TIME = {"plain": 12, "exact": 3, "online": 7, "linear": 10}
VARIANTS = {name: (EPOCHS, overrides) for name, overrides in MODES.items()} | {
    f"{name}, equal time": (epochs, MODES[name]) for name, epochs in EQUAL_TIME.items()}
COLUMNS = ["variant", "seed", "epoch", "train_loss", "test_loss", "test_top1"]
NAMES = {"train/loss_epoch": "train_loss", "test/loss": "test_loss", "test/top1": "test_top1"}


def folder(variant: str, seed: int) -> Path:
    return ROOT / "outputs" / "learning" / f"{variant.replace(', ', '_').replace(' ', '_')}_{seed}"


def train(variant: str, seed: int, data: str) -> None:
    """Run train.py, unless the run is there already."""
    (epochs, overrides), out = VARIANTS[variant], folder(variant, seed)
    if len(read(out)) < epochs:
        ckpt = out / "checkpoints" / "last.ckpt"
        new = [*RECIPE, *overrides, f"trainer.max_epochs={epochs}", f"seed={seed}", f"out={out}"]
        command = [sys.executable, "train.py", f"data.root={Path(data).resolve()}"]
        subprocess.run([*command, *([f"ckpt={ckpt}"] if ckpt.exists() else new)], cwd=ROOT, check=True)


def read(out: Path) -> list[dict[str, str]]:
    """The epochs of a run, from its metrics.csv."""
    epochs = {}
    if (out / "metrics.csv").exists():
        for row in csv.DictReader((out / "metrics.csv").open()):
            epoch = int(row["epoch"])
            for theirs, ours in NAMES.items():
                if row.get(theirs):
                    epochs.setdefault(epoch, {"epoch": str(epoch + 1)})[ours] = f"{float(row[theirs]):.5g}"
    return [epochs[epoch] for epoch in sorted(epochs) if len(epochs[epoch]) == len(COLUMNS) - 2]


def table(seeds: list[int]) -> None:
    """Write the raw numbers; print mean, standard deviation, and the paired difference to plain.

    The difference comes with its 95% confidence interval.
    """
    runs = {variant: {seed: read(folder(variant, seed)) for seed in seeds} for variant in VARIANTS}
    runs = {variant: {seed: rows for seed, rows in of.items() if len(rows) == VARIANTS[variant][0]}
            for variant, of in runs.items()}
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows({"variant": variant, "seed": seed} | row
                         for variant, of in runs.items() for seed, rows in of.items() for row in rows)
    last = {variant: {seed: rows[-1] for seed, rows in of.items()} for variant, of in runs.items() if of}

    def values(variant, column, seeds):
        return [float(last[variant][seed][column]) for seed in seeds]

    print("| variant | epochs | n | final training loss | test top-1, % | difference to plain, points "
          "| 95% interval |")
    print("|---" * 7 + "|")
    for variant in last:
        seeds, base = sorted(last[variant]), last.get("plain, equal time" if "," in variant else "plain", {})
        loss = values(variant, "train_loss", seeds)
        top1 = [100 * value for value in values(variant, "test_top1", seeds)]
        row = [variant, str(VARIANTS[variant][0]), str(len(seeds))]
        for v, digits in ((loss, 4), (top1, 2)):
            std = statistics.stdev(v) if len(v) > 1 else 0
            row.append(f"{statistics.mean(v):.{digits}f} ± {std:.{digits}f}")
        d = [100 * (float(last[variant][s]["test_top1"]) - float(base[s]["test_top1"]))
             for s in seeds if s in base]
        if base is not last[variant] and len(d) > 1:
            mean, half = mean_and_half_width(d)
            row += [f"{mean:+.2f}", f"{mean - half:+.2f} to {mean + half:+.2f}"]
        print("|", " | ".join(row + [""] * (7 - len(row))), "|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    options = parser.parse_args()
    for seed in options.seeds:
        for variant in options.variants:
            train(variant, seed, options.data)
    table(options.seeds)


if __name__ == "__main__":
    main()
