"""Fold every block of a trained network into one plain convolution, and prove that nothing changed.

Writes files that other libraries load. `python convert.py --help` says what to type (its text is in
configs/convert.yaml).
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

if __name__ == "__main__":
    print("loading PyTorch, onnx and W&B ...", file=sys.stderr, flush=True)  # which takes seconds

import hydra
import torch
import wandb
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from torch import nn

from dbb import branch_shares, branchwise, compare_logits, fold_norms, restore_norms
from export import graph, int8
from export.files import (
    KINDS,
    WRITTEN,
    load_network,
    require,
    require_places,
    save_hub,
    save_network,
    sha256,
    staged,
)
from export.report import draw_graphs, draw_report, file_rows, markdown, rows
from models import build_model, of_timm, recipe
from training.callbacks import wandb_logger
from training.cli import output_folder, plain_errors
from training.data import ImageData
from training.evaluate import cost, exact_arithmetic, latency_ms, load_run, pick_device, predict, scores
from training.settings import Settings, resolve


def convert(settings: Settings, out: Path) -> dict:
    """Evaluate branch by branch, convert in float64, write each file, load it again, and evaluate it so.

    Without labels (`data=none`) all of it runs on noise images, and no accuracy is measured.

    Args:
        settings: `ckpt`, and with `source` the model and blocks of that published file; else the
            checkpoint's own.
        out: gets report.md, report.json, report.png, model.safetensors, and what `export` and `hub` ask for.

    Returns:
        The report, as in report.json.

    Raises:
        ValueError: if the checkpoint or the data is wrong, a package is missing, or a file does not compute
            what the network did within `tolerance`; report-failed.json then has the figures, and the files of
            an earlier conversion stay.
    """
    require(settings.export)
    require_places(out)
    net, data, about = load_run(settings, train=True)
    refuse_settings(settings, data, about)
    output_folder(out)
    device = pick_device(settings.trainer.accelerator)
    image = torch.zeros(2, 3, data.image_size, data.image_size)

    with branchwise(net):
        logits, targets = predict(net, data, device, "before")
        before = measured(logits, targets, data) | cost(net, data.image_size)
    folded = fold_norms(net, image.to(device))
    logits_after, _ = predict(folded, data, device, "after")
    after = measured(logits_after, targets, data) | cost(folded, data.image_size)
    about |= {key: value for key, value in before.items() if key in ("top1", "top5")}
    about["norm_statistics"] = "training images" if data.classes else "noise images"
    report = {"about": about, "before": before, "after": after}
    report |= asdict(compare_logits([(logits, logits_after)]))
    report |= {"tolerance": settings.tolerance, "shares": branch_shares(net), "files": {}}

    plain = build_model(about["model"], len(about["classes"]), image_size=data.image_size)
    with exact_arithmetic():
        images = (batch.to(device) for batch in data.calibration_images())
        stock = restore_norms(net, net.report, plain, images)
    net, folded = net.cpu(), folded.cpu()
    with staged(out) as part:
        save_network(stock, about, part / "model.safetensors")
        made = {"model.safetensors": load_network(part / "model.safetensors")[0]}
        made |= export_graphs(settings.export, net, folded, data, about, part)
        if "int8" in settings.export:
            files = part / "model.onnx", part / "model-int8.onnx"
            report["int8"] = int8.layers(*files, data.calibration_images(64))
        for name, network in made.items():
            file_logits, _ = predict(network, data, device, name)
            entry = {"sha256": sha256(part / name), "bytes": (part / name).stat().st_size}
            entry |= measured(file_logits, targets, data)
            report["files"][name] = entry | asdict(compare_logits([(logits, file_logits)]))
        if "training_onnx" in settings.export and "model.onnx" in made and report["shares"]:
            compare_graphs(net, made, report, part)
        refuse_changes(report, out)
        if settings.hub:
            save_hub(stock, about, part / "hub")
        draw_report(report, part / "report.png")
        lines = recipe(about["model"], len(about["classes"]), data.image_size)
        (part / "report.md").write_text(markdown(report, lines))
        (part / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    (out / "report-failed.json").unlink(missing_ok=True)  # of an earlier conversion
    return report


def refuse_settings(settings: Settings, data: ImageData, about: dict) -> None:
    """Refuse what this network cannot be converted to.

    Raises:
        ValueError: if it was trained on images of another size, or timm does not build it for `hub`.
    """
    if data.image_size != about["image_size"]:
        raise ValueError(f"data.image_size={data.image_size}: this network was trained on images of "
                         f"{about['image_size']} pixels, and its files are for those; leave it out (eval.py "
                         "tests other sizes)")
    if settings.hub and of_timm(about["model"], data.image_size) is None:
        raise ValueError(f"hub=true: timm does not build {about['model']} for {data.image_size} pixels as it "
                         "is here (it has another stem, or none), so that there is no folder for it to load; "
                         "report.md has the lines that rebuild the network")


def export_graphs(kinds: list[str], net: nn.Module, folded: nn.Module, data: ImageData, about: dict,
                  part: Path) -> dict[str, nn.Module]:
    """Write the files that `kinds` names into `part`; returned is, by file, what is loaded from it again."""
    image, made = torch.zeros(2, 3, data.image_size, data.image_size), {}
    if {"onnx", "int8"} & set(kinds):
        graph.export_onnx(folded, image, about, part / "model.onnx")
        made["model.onnx"] = graph.OnnxNetwork(part / "model.onnx")
    if "training_onnx" in kinds:
        graph.export_onnx(net, image, about, part / "model-training.onnx", training=True)
        made["model-training.onnx"] = graph.OnnxNetwork(part / "model-training.onnx")
    if "pt2" in kinds:
        graph.export_pt2(folded, image, part / "model.pt2")
        made["model.pt2"] = torch.export.load(part / "model.pt2").module()
    if "int8" in kinds:
        int8.quantize(part / "model.onnx", part / "model-int8.onnx", data.calibration_images())
        made["model-int8.onnx"] = graph.OnnxNetwork(part / "model-int8.onnx")
    return made


def compare_graphs(net: nn.Module, made: dict[str, nn.Module], report: dict, part: Path) -> None:
    """Add to the report what is in the graphs of training and conversion, and draw both."""
    size = report["about"]["image_size"]
    image = torch.zeros(2, 3, size, size)
    report["graphs"] = {}
    for title, name, when in (("training structure", "model-training.onnx", "before"),
                              ("converted", "model.onnx", "after")):
        costs = {"macs": report[when]["macs"], "latency_ms": latency_ms(made[name], image[:1])}
        report["graphs"][title] = graph.summary(part / name) | costs
    draw_graphs(graph.first_block(net, image), report["graphs"], part / "graphs.png")


def measured(logits, targets, data) -> dict[str, float]:
    """Accuracies and loss, where there are labels."""
    return scores(logits, targets) if data.classes else {}


def refuse_changes(report: dict, out: Path) -> None:
    """Every float file must compute what the network did.

    Raises:
        ValueError: if one does not.
    """
    for name, entry in {"the conversion": report, **report["files"]}.items():
        exact = entry["predictions_changed"] == 0 and entry["relative_error"] <= report["tolerance"]
        if not exact and name != KINDS["int8"][0]:
            print_tables(report)
            (out / "report-failed.json").write_text(json.dumps(report, indent=2) + "\n")
            raise ValueError(f"{name} changed the network: {entry['predictions_changed']} of "
                             f"{entry['images']} predictions, largest relative logit error "
                             f"{entry['relative_error']:.1e} (tolerance={report['tolerance']:g}); no weights "
                             "were written")


def print_tables(report: dict) -> None:
    """Print what was measured: a line a file, then the table before / after."""
    for name, size, top1, changed, ties, error in file_rows(report):
        score = f"top1 {top1}  " if top1 else ""
        print(f"{name:20s}{size:>12s} bytes  {score}{changed} changed, {ties} ties, relative error {error}")
    print(f"\n{'':12s}{'before':>16s}{'after':>16s}")
    for name, before, after in rows(report):
        print(f"{name:12s}{before:>16s}{after:>16s}")
    print(f"{report['predictions_changed']} of {report['images']} predictions changed, "
          f"{report['ties']} ties, largest relative logit error {report['relative_error']:.1e}")
    if "top1" not in report["before"]:
        print("data=none: compared on seeded noise images; no accuracy was measured")


def log(report: dict, settings: Settings, out: Path, run_dir: Path) -> None:
    """Add the table, its figures, the picture and all files to the W&B run of the training."""
    logger = wandb_logger(settings, run_dir)
    if logger is None:
        return
    run = logger.experiment
    run.log({"convert": wandb.Table(["measure", "before", "after"], rows(report)),
             "convert/report": wandb.Image(str(out / "report.png"))})
    for when in ("before", "after"):
        run.summary.update({f"convert/{when}/{name}": value for name, value in report[when].items()})
    compared = ("predictions_changed", "ties", "relative_error")
    run.summary.update({f"convert/{name}": report[name] for name in compared})
    artifact = wandb.Artifact(f"converted-{run.id}", "model", metadata=report["about"])
    for name in WRITTEN:
        if (out / name).exists():
            artifact.add_file(str(out / name), name)
    run.log_artifact(artifact)
    wandb.finish()


@hydra.main(config_path="configs", config_name="convert", version_base="1.3")
def main(cfg: DictConfig) -> None:
    with plain_errors():
        settings = resolve(cfg, HydraConfig.get().overrides.task)
        ckpt = Path(settings.ckpt or "").absolute()
        published = settings.source is not None  # such a file has no run
        run_dir = Path("outputs", ckpt.stem) if published else ckpt.parent.parent
        out = Path(settings.out) if settings.out else run_dir / "convert"
        report = convert(settings, out)
        if settings.logger.name == "wandb":
            log(report, settings, out, run_dir)
        print_tables(report)
        files = ", ".join(report["files"])
        print(f"\nwritten to {out}: look at report.md and report.png; the network is in {files}")


if __name__ == "__main__":
    main()
