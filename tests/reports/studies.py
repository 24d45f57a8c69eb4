"""Folders of runs as train.py leaves them, for the tests of reports."""

import csv
import json

from omegaconf import OmegaConf

from reports.compare import compare_variants, name_variants
from reports.runs import read_runs
from reports.study import markdown

PLAIN = {"name": "none", "branches": [], "mode": "exact", "init": None}
DBB = {"name": "dbb", "branches": ["kxk", "1x1"], "mode": "exact", "init": None}


def write_run(folder, block, seed, top1=None, epochs=2, done=None, seconds=0.1, lr=0.1, loss=1.0,
              accumulate=1, workers=0):
    """A run's folder as train.py leaves it; without `top1`, one that stopped after `done` epochs."""
    folder.mkdir(parents=True)
    settings = {"model": {"name": "resnet8"}, "block": block, "optim": {"lr": lr}, "seed": seed,
                "data": {"num_workers": workers},
                "trainer": {"max_epochs": epochs, "accumulate_grad_batches": accumulate},
                "ckpt": None, "out": None, "logger": {"id": f"{seed}", "name": "csv"}}
    OmegaConf.save(OmegaConf.create(settings), folder / "config.yaml")
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["epoch", "step", "train/loss_step", "train/loss_epoch", "test/top1",
                                       "test/loss", "train/seconds_per_step"])
        writer.writeheader()
        for epoch in range(epochs if done is None else done):
            step = 10 * epoch + 9
            writer.writerow({"epoch": epoch, "step": step - 5, "train/loss_step": 3.0})
            writer.writerow({"epoch": epoch, "step": step, "test/top1": 0.1 * epoch, "test/loss": 2.0})
            writer.writerow({"epoch": epoch, "step": step, "train/loss_epoch": loss + 5 - epoch,
                             "train/seconds_per_step": seconds})
    if top1 is not None:
        result = {"top1": top1, "top5": 1.0, "loss": 1.0, "converted_top1": top1 - 0.01,
                  "predictions_changed": 2, "activations_mib": 2.0 if block is PLAIN else 5.0}
        (folder / "result.json").write_text(json.dumps(result))


def study(folder, **kwargs):
    for seed, (plain, dbb) in enumerate([(0.70, 0.73), (0.72, 0.73), (0.71, 0.76)]):
        write_run(folder / f"plain{seed}", PLAIN, seed, plain)
        seconds, loss = [0.3, 0.2, 0.9][seed], [1.0, 1.3, 1.3][seed]
        write_run(folder / f"dbb{seed}", DBB, seed, dbb, seconds=seconds, loss=loss, **kwargs)


def compare(folder, baseline=None):
    runs, epochs = read_runs([folder])
    runs["variant"] = name_variants(runs)
    variants = compare_variants(runs, baseline)
    text = markdown(runs, variants, [folder], baseline)
    return runs, epochs, variants.set_index("variant"), text
