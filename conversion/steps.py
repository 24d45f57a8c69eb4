"""The steps of convert.py: measure, fold, write each file, load it again, compare, report."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dbb import biases, branch_shares, branchwise, compare_logits, fold_norms, restore_norms
from evaluation.cost import cost, latency_ms
from evaluation.evaluate import exact_arithmetic, predict, scores
from export import graph, int8
from export.files import HUB, sha256
from export.formats import FORMATS, Converted, wanted
from export.place import FAILED, GRAPHS
from images.data import ImageData
from models import build_model, of_timm, recipe
from reports.conversion import draw_graphs, draw_report, markdown, print_tables
from runs.safety import write_text
from settings.command import Command


def names_of(command: Command) -> list[str]:
    """The files that a command asks for, besides the report."""
    drawn = [GRAPHS] if {"onnx", "training_onnx"} <= {*command.export} else []
    return [kind.file for kind in wanted(command.export)] + [name for name in HUB if command.hub] + drawn


def refuse_settings(command: Command, net: nn.Module, data: ImageData, about: dict) -> None:
    """Refuse what this network cannot be converted to.

    Raises:
        ValueError: if it was trained on images of another size, or timm does not build it for `hub`.
    """
    if data.image_size != about["image_size"]:
        raise ValueError(f"data.image_size={data.image_size}: this network was trained on images of "
                         f"{about['image_size']} pixels, and its files are for those; leave it out (eval.py "
                         "tests other sizes)")
    if command.hub and of_timm(about["model"], data.image_size) is None:
        raise ValueError(f"hub=true: timm does not build {about['model']} for {data.image_size} pixels as it "
                         "is here (it has another stem, or none), so that there is no folder for it to load; "
                         "report.md has the lines that rebuild the network")
    alone = [row.module for row in net.report if row.block is not None and not row.norm]
    if command.hub and alone:
        raise ValueError(f"hub=true: timm's {about['model']} may have no bias in {alone[0]}, where a block "
                         "of block.without_norm=true needs one: leave hub out; report.md has the lines that "
                         "rebuild the network")


def measured(logits: Tensor, targets: Tensor, data: ImageData) -> dict[str, float]:
    """Accuracies and loss, where there are labels."""
    return scores(logits, targets) if data.classes else {}


def evaluate(net: nn.Module, data: ImageData, device: torch.device,
             text: str) -> tuple[Tensor, dict[str, Any]]:
    """The logits of the test images, and what the network scores and costs; `text` as in `predict`."""
    logits, targets = predict(net, data, device, text)
    return logits, measured(logits, targets, data) | cost(net, data.image_size)


def fold(net: nn.Module, data: ImageData, about: dict, device: torch.device,
         command: Command) -> tuple[Converted, dict[str, Any], Tensor]:
    """Convert a network, and measure it before and after.

    Returns:
        The network in its three forms; the report so far; the logits before, branch by branch.
    """
    with branchwise(net):
        logits, before = evaluate(net, data, device, "before")
    folded = fold_norms(net, torch.zeros(2, 3, data.image_size, data.image_size, device=device))
    logits_after, after = evaluate(folded, data, device, "after")
    about |= {key: value for key, value in before.items() if key in ("top1", "top5")}
    about["norm_statistics"] = "training images" if data.classes else "noise images"
    report = {"about": about, "before": before, "after": after}
    report |= asdict(compare_logits([(logits, logits_after)]))
    report |= {"tolerance": command.tolerance, "shares": branch_shares(net), "files": {},
               "hub": [name for name in HUB if command.hub]}
    plain = build_model(about["model"], len(about["classes"]), image_size=data.image_size)
    with exact_arithmetic():
        images = (batch.to(device) for batch in data.calibration_images())
        stock = restore_norms(net, net.report, plain, images)
    report["biases"] = biases(net.report, plain)
    converted = Converted(net.cpu(), folded.cpu(), stock.cpu(), about, data.calibration_images)
    return converted, report, logits


def write_files(command: Command, converted: Converted, part: Path) -> dict[str, nn.Module]:
    """Write what is asked for into `part`; returned is, by file, what is loaded from it again."""
    read = {}
    for kind in wanted(command.export):
        kind.write(converted, part / kind.file)
        read[kind.file] = kind.read(part / kind.file)
    return read


def compare_files(read: dict[str, nn.Module], logits: Tensor, data: ImageData, device: torch.device,
                  part: Path, report: dict) -> None:
    """Add to the report, file by file, its hash, its size, its scores, and what differs from `logits`."""
    for name, network in read.items():
        file_logits, targets = predict(network, data, device, name)
        entry = {"sha256": sha256(part / name), "bytes": (part / name).stat().st_size}
        entry |= measured(file_logits, targets, data)
        report["files"][name] = entry | asdict(compare_logits([(logits, file_logits)]))


def compare_graphs(converted: Converted, read: dict[str, nn.Module], part: Path, report: dict) -> None:
    """Add to the report the layers of int8, and what is in the graphs before and after; draw both."""
    before, after, small = (FORMATS[kind].file for kind in ("training_onnx", "onnx", "int8"))
    if small in read:
        report["int8"] = int8.layers(part / after, part / small, converted.images(64))
    if before not in read or after not in read or not report["shares"]:
        return
    report["graphs"] = {}
    for title, name, when in (("training structure", before, "before"), ("converted", after, "after")):
        costs = {"macs": report[when]["macs"], "latency_ms": latency_ms(read[name], converted.example[:1])}
        report["graphs"][title] = graph.summary(part / name) | costs
    block = graph.first_block(converted.branched, converted.example)
    draw_graphs(block, report["graphs"], part / GRAPHS)


def refuse_changes(report: dict, out: Path) -> None:
    """Every float file must compute what the network did.

    Raises:
        ValueError: if one does not; report-failed.json then has the figures.
    """
    inexact = {kind.file for kind in FORMATS.values() if not kind.exact}
    for name, entry in {"the conversion": report, **report["files"]}.items():
        exact = entry["predictions_changed"] == 0 and entry["relative_error"] <= report["tolerance"]
        if not exact and name not in inexact:
            print_tables(report)
            write_text(out / FAILED, json.dumps(report, indent=2) + "\n")
            raise ValueError(f"{name} changed the network: {entry['predictions_changed']} of "
                             f"{entry['images']} predictions, largest relative logit error "
                             f"{entry['relative_error']:.1e} (tolerance={report['tolerance']:g}); no weights "
                             "were written")


def write_report(report: dict, part: Path) -> None:
    """Write report.md, report.json and report.png."""
    about = report["about"]
    draw_report(report, part / "report.png")
    lines = recipe(about["model"], len(about["classes"]), about["image_size"], report["biases"])
    (part / "report.md").write_text(markdown(report, lines))
    (part / "report.json").write_text(json.dumps(report, indent=2) + "\n")
