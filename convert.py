"""Fold every block of a trained network into one plain convolution, and prove that nothing changed.

    python convert.py ckpt=outputs/.../checkpoints/last.ckpt
    python convert.py ckpt=ResNet-18_DBB_7101.pth model=resnet18_dbb source=dbb data=none
"""

import json
import os
from dataclasses import asdict
from pathlib import Path

import hydra
import wandb
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from safetensors.torch import load_file, save_file
from torch import nn

from dbb import branchwise, compare_logits, reparameterize
from models import load_weights
from training.callbacks import wandb_logger
from training.cli import output_folder, plain_errors
from training.evaluate import cost, load_run, pick_device, predict, scores
from training.settings import Settings, resolve


def convert(settings: Settings, out: Path) -> dict:
    """Evaluate branch by branch, convert in float64, evaluate again, and write the weights if both agree.

    Without labels (`data=none`) both run on noise images, and no accuracy is measured.

    Args:
        settings: `ckpt`, and with `source` the model and blocks of that published file; else the checkpoint's own.
        out: gets report.json and model.safetensors.

    Returns:
        The report, as in report.json.

    Raises:
        ValueError: if the checkpoint or the data is wrong, or the conversion changed more than `tolerance` allows.
    """
    net, data, about = load_run(settings)
    output_folder(out)
    device = pick_device(settings.trainer.accelerator)

    with branchwise(net):
        logits_before, targets = predict(net, data, device, "before")
        before = (scores(logits_before, targets) if data.classes else {}) | cost(net, data.image_size)
    merged = reparameterize(net)
    logits_after, _ = predict(merged, data, device, "after")
    after = (scores(logits_after, targets) if data.classes else {}) | cost(merged, data.image_size)
    comparison = compare_logits([(logits_before, logits_after)])

    report = {"before": before, "after": after} | asdict(comparison) | {"tolerance": settings.tolerance}
    print_table(report)
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    if comparison.predictions_changed or not comparison.relative_error <= settings.tolerance:
        raise ValueError(f"the conversion changed the network: {comparison.predictions_changed} of {comparison.images} predictions, "
                         f"largest relative logit error {comparison.relative_error:.1e} (tolerance={settings.tolerance:g}); "
                         "no weights were written")
    save_weights(merged, about, out / "model.safetensors")
    load_weights(reparameterize(net), load_file(out / "model.safetensors"))
    return report


def save_weights(merged: nn.Module, about: dict, path: Path) -> None:
    """Write a converted network, whole or not at all; the header says what it is."""
    weights = {name: value.detach().cpu().contiguous() for name, value in merged.state_dict().items()}
    save_file(weights, path.with_suffix(".part"), {"dbb": json.dumps(about)})
    os.replace(path.with_suffix(".part"), path)


def rows(report: dict) -> list[list[str]]:
    """The table before / after, a row per measure."""
    formats = {"top1": "{:.4f}", "top5": "{:.4f}", "loss": "{:.6f}", "parameters": "{:,}", "macs": "{:,}", "latency_ms": "{:.2f}"}
    measured = {name: form for name, form in formats.items() if name in report["before"]}
    return [[name, *(form.format(report[when][name]) for when in ("before", "after"))] for name, form in measured.items()]


def print_table(report: dict) -> None:
    """Print what was measured."""
    print(f"\n{'':12s}{'before':>16s}{'after':>16s}")
    for name, before, after in rows(report):
        print(f"{name:12s}{before:>16s}{after:>16s}")
    print(f"\n{report['predictions_changed']} of {report['images']} predictions changed, {report['ties']} ties, "
          f"largest relative logit error {report['relative_error']:.1e}\n")
    if "top1" not in report["before"]:
        print("data=none: compared on seeded noise images; no accuracy was measured\n")


def log(report: dict, settings: Settings, run_dir: Path) -> None:
    """Add the table and its figures to the W&B run of the training."""
    run = wandb_logger(settings.logger, run_dir).experiment
    run.log({"convert": wandb.Table(["measure", "before", "after"], rows(report))})
    for when in ("before", "after"):
        run.summary.update({f"convert/{when}/{name}": value for name, value in report[when].items()})
    run.summary.update({f"convert/{name}": report[name] for name in ("predictions_changed", "ties", "relative_error")})
    wandb.finish()


@hydra.main(config_path="configs", config_name="convert", version_base="1.3")
def main(cfg: DictConfig) -> None:
    with plain_errors():
        settings = resolve(cfg, HydraConfig.get().overrides.task)
        ckpt = Path(settings.ckpt or "").absolute()
        run_dir = ckpt.parent.parent if settings.source is None else Path("outputs", ckpt.stem)  # a published file has no run
        out = Path(settings.out) if settings.out else run_dir / "convert"
        report = convert(settings, out)
        print(f"written to {out}: model.safetensors, report.json")
        if settings.logger.name == "wandb":
            log(report, settings, run_dir)


if __name__ == "__main__":
    main()
