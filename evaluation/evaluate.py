"""The one evaluation that train.py, eval.py and convert.py share, on one device; `exact` for every result."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics.functional.classification import multiclass_accuracy
from tqdm import tqdm

from evaluation.networks import load_network, load_published
from export.files import sha256
from images.data import ImageData
from images.sources import resized_side
from models.checkpoint import load_checkpoint
from settings.cli import printable
from settings.command import Command
from settings.schema import FILE_SETS, DataConf
from settings.values import check_numbers


def load_run(settings: Command, train: bool = False) -> tuple[nn.Module, ImageData, dict[str, Any]]:
    """What eval.py and convert.py work on.

    Args:
        settings: of the command.
        train: load the training images too, where the data has any.

    Returns:
        The network of `settings.ckpt` in eval, its data, loaded, and what the network is, in plain values.

    Raises:
        ValueError: if the checkpoint or the data is wrong, or the two do not have the same number of classes.
    """
    checkpoint = load_checkpoint(settings.ckpt) if settings.source is None else None
    digest = None if checkpoint is None else sha256(settings.ckpt)
    if checkpoint is not None and load_checkpoint(settings.ckpt) is not checkpoint:
        raise ValueError(f"ckpt={settings.ckpt} was written anew by its run while it was read: try again")
    data_conf = settings.data
    if data_conf.name == "none" and data_conf.image_size is None:
        data_conf = replace(data_conf, image_size=checkpoint["dbb"]["image_size"] if checkpoint else 224)
    data = ImageData(data_conf, settings.seed)
    data.load(train and data_conf.name != "none")
    if checkpoint is not None:
        about = checkpoint["dbb"]
        net = load_network(checkpoint, settings)
        classes, image_size = about["classes"], about["image_size"]
    else:
        image_size = data.image_size
        net, count = load_published(settings, image_size)
        known = data.classes and len(data.classes) == count
        classes = data.classes if known else [str(label) for label in range(count)]
    data.check_classes(classes)
    # Noise images say nothing of the normalisation: it is that of the training.
    shown = data_of(checkpoint) if checkpoint and data.classes is None else data_conf
    resize = resized_side(image_size, shown.crop_pct) if shown.name in FILE_SETS else image_size
    about = {"model": settings.model.name, "block": settings.block.name, "classes": classes,
             "image_size": image_size, "resize": resize, "mean": list(map(float, shown.mean)),
             "std": list(map(float, shown.std)), "interpolation": shown.interpolation,
             "data": data_conf.name, "checkpoint_sha256": digest or sha256(settings.ckpt),
             "versions": {package: version(package) for package in ("torch", "torchvision", "timm")}}
    return net, data, about


def data_of(checkpoint: dict[str, Any]) -> DataConf:
    """The settings of the data in a checkpoint, of which an old one says less.

    Raises:
        ValueError: if they could not have been given to train.py.
    """
    about = checkpoint["dbb"]
    stored = OmegaConf.merge(OmegaConf.structured(DataConf), about["settings"]["data"])
    conf = replace(OmegaConf.to_object(stored), image_size=about["image_size"])
    check_numbers(conf, "data.")
    conf.check()
    return conf


def pick_device(accelerator: str) -> torch.device:
    """The machine's accelerator, unless `trainer.accelerator=cpu`, wherever the network was trained."""
    if accelerator != "cpu" and torch.accelerator.is_available():
        return torch.accelerator.current_accelerator()
    return torch.device("cpu")


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """TF32, autotuning and nondeterministic convolutions off, as a claim of equality needs."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


@torch.no_grad()
def predict(net: nn.Module, data: ImageData, device: torch.device, text: str,
            loader: DataLoader | None = None, exact: bool = True) -> tuple[Tensor, Tensor]:
    """Logits `[N, classes]` and targets `[N]` of the whole test set, on the CPU.

    Args:
        net: in eval; moved to `device`.
        data: loaded.
        device: where to run.
        text: shown before the progress bar.
        loader: of other images of `data`.
        exact: by `exact_arithmetic`, not as the training computes.
    """
    net, logits, targets = net.to(device), [], []
    with exact_arithmetic() if exact else nullcontext():
        batches = data.test_dataloader() if loader is None else loader
        for batch in tqdm(batches, text, disable=None, leave=False):
            images, target = data.on_after_batch_transfer([part.to(device) for part in batch])
            logits.append(net(images).cpu())
            targets.append(target.cpu())
    return torch.cat(logits), torch.cat(targets)


def scores(logits: Tensor, targets: Tensor) -> dict[str, float]:
    """Top-1 and top-5 accuracy as fractions, and the mean cross-entropy, in float64.

    Args:
        logits: `[N, classes]`.
        targets: `[N]`.
    """
    classes = logits.shape[1]
    count = classes if classes > 1 else None  # torchmetrics takes no 1
    accuracy = partial(multiclass_accuracy, logits, targets, count, average="micro")
    top = {k: accuracy(top_k=min(k, classes)).double().item() for k in (1, 5)}
    right = {k: round(fraction * len(targets)) for k, fraction in top.items()}
    return {"top1": right[1] / len(targets), "top5": right[5] / len(targets),
            "loss": F.cross_entropy(logits.double(), targets).item()}


def sentence(result: dict[str, float], ckpt: object) -> str:
    """One line of what `scores` returned for a checkpoint."""
    values = f"top1 {result['top1']:.4f}  top5 {result['top5']:.4f}  loss {result['loss']:.4f}"
    return f"test {values}  ({printable(str(ckpt))})"
