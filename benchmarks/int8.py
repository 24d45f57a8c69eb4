"""What int8 costs networks with and without blocks, on real images, and what helps.

    python convert.py ckpt=... 'export=[onnx,int8]' out=FOLDER     # for each network
    python benchmarks/int8.py --data data/cifar10 FOLDER ...

Quantises each FOLDER/model.onnx anew: as convert.py does; the classifier too; and with signed
weights. Top-1 on the whole test set.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from evaluation.evaluate import predict, scores
from export.graph import OnnxNetwork
from export.int8 import quantize
from images.data import ImageData
from settings.schema import DataConf

VARIANTS = {"int8": {}, "int8, classifier too": {"classifier": True},
            "int8, signed weights": {"signed": True}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="data.root of the data set that the reports name")
    parser.add_argument("folders", nargs="+", type=Path)
    options = parser.parse_args()
    head = ["network", "block", "float", *VARIANTS, "int8 - float, points", "predictions changed",
            "widest / median channel", "worst layers, dB"]
    print("| " + " | ".join(head) + " |", "|" + "---|" * len(head), sep="\n")
    for folder in options.folders:
        report = json.loads((folder / "report.json").read_text())
        about = report["about"]
        conf = DataConf(about["data"], options.data, image_size=about["image_size"], mean=about["mean"],
                        std=about["std"], interpolation=about.get("interpolation", "bilinear"),
                        crop_pct=about["image_size"] / about["resize"])
        data = ImageData(conf, 0)
        data.load(train=True)
        cpu, source = torch.device("cpu"), folder / "model.onnx"
        logits, targets = predict(OnnxNetwork(source), data, cpu, "float")
        top1, found = scores(logits, targets)["top1"], {}
        with tempfile.TemporaryDirectory() as scratch:
            for name, variant in VARIANTS.items():
                target = Path(scratch) / "int8.onnx"
                quantize(source, target, data.calibration_images(), **variant)
                found[name], _ = predict(OnnxNetwork(target), data, cpu, name)
        accuracies = {name: scores(values, targets)["top1"] for name, values in found.items()}
        worst = ", ".join(f"{row['layer']} {row['output_db']:.1f}" for row in report["int8"][:3])
        changed = int((logits.argmax(1) != found["int8"].argmax(1)).sum())
        spread = max(row["spread"] for row in report["int8"])
        cells = [about["model"], about["block"], f"{top1:.4f}",
                 *(f"{value:.4f}" for value in accuracies.values()),
                 f"{100 * (accuracies['int8'] - top1):+.2f}", f"{changed:,}", f"{spread:.1f}", worst]
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
