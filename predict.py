"""Classify images with a converted network.

    python predict.py outputs/.../convert/model.onnx cat.jpg dog.png
    python predict.py outputs/.../convert/model.safetensors images/*.png

The report.json beside the file must have its SHA-256. Images that cannot be read are named, and the others
classified.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from export.reading import load_verified
from images.reading import IMAGE_ENDINGS, is_image, read_pixels, refuse_long
from settings.cli import plain_errors, printable

BATCH_SIZE, BATCH_PIXELS = 64, 64 * 384**2


def prepare(path: str, about: dict) -> Tensor:
    """An image `[3, H, W]` as the network was tested on: shorter side resized, centre cropped, normalised.

    Raises:
        ValueError: if it cannot be read.
    """
    if not is_image(path):  # as in training
        raise ValueError(f"{path} does not end as an image does: {' '.join(sorted(IMAGE_ENDINGS))}")
    pixels, mode = read_pixels(path), InterpolationMode(about["interpolation"])
    refuse_long(pixels, about["resize"], path)
    pixels = TF.resize(pixels, [about["resize"]], mode, antialias=True)
    pixels = TF.center_crop(pixels, [about["image_size"]])
    return TF.normalize(pixels / 255, about["mean"], about["std"])


@torch.no_grad()
def predictions(net: nn.Module, about: dict,
                paths: list[str]) -> Iterator[tuple[str, list[tuple[float, str]] | str]]:
    """By image, its five most probable classes, or why it cannot be read."""
    at_once = max(1, min(BATCH_SIZE, BATCH_PIXELS // about["image_size"]**2))
    for start in range(0, len(paths), at_once):
        batch, results, images = paths[start:start + at_once], {}, {}
        for index, path in enumerate(batch):
            try:
                images[index] = prepare(path, about)
            except (ValueError, OSError) as error:
                results[index] = str(error)
        if images:
            logits = net(torch.stack(list(images.values())))
            if logits.shape != (len(images), len(about["classes"])) or not logits.is_floating_point():
                raise ValueError(f"the network returns {logits.dtype} of shape {list(logits.shape)}, not a "
                                 f"number for each of {len(about['classes'])} classes")
            if not logits.isfinite().all():
                raise ValueError("the network returns values that are infinite or no numbers: its weights, "
                                 "or its mean and std, are damaged")
            top = logits.softmax(1).topk(min(5, len(about["classes"])))
            rows = zip(images, top.values.tolist(), top.indices.tolist(), strict=True)
            for index, probabilities, labels in rows:
                names = [about["classes"][label] for label in labels]
                results[index] = list(zip(probabilities, names, strict=True))
        yield from ((path, results[index]) for index, path in enumerate(batch))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="model.onnx or model.safetensors of convert.py")
    parser.add_argument("images", nargs="+", help="image files")
    arguments = parser.parse_args()
    with plain_errors():
        failed = 0
        for path, result in predictions(*load_verified(arguments.model), arguments.images):
            if isinstance(result, str):
                failed += 1
                print(f"error: {printable(result)}", file=sys.stderr)
            else:
                lines = (f"  {probability:.4f}  {printable(name)}" for probability, name in result)
                print(printable(path), *lines, sep="\n")
        if failed:
            sys.exit(f"error: {failed} of {len(arguments.images)} images could not be read")


if __name__ == "__main__":
    main()
