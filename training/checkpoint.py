"""Read a checkpoint: an untrusted file of plain values and tensors."""

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from models import build_model


def load_checkpoint(path: str | Path | None) -> dict[str, Any]:
    """Load a checkpoint of train.py onto the CPU.

    Raises:
        ValueError: if it is missing, damaged, holds more than plain values and tensors, or is not one of ours.
    """
    if path is None:
        raise ValueError("ckpt=PATH is needed: the checkpoint of a run, outputs/.../checkpoints/last.ckpt")
    if not Path(path).is_file():
        raise ValueError(f"ckpt={path}: there is no such file; a run keeps its own under outputs/.../checkpoints/last.ckpt")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, UnpicklingError, OSError, ValueError, KeyError) as error:
        raise ValueError(f"ckpt={path} cannot be read: it is damaged, or no checkpoint of plain tensors") from error
    if not isinstance(checkpoint, dict) or "settings" not in checkpoint.get("dbb", ()):
        raise ValueError(f"ckpt={path} was not written by train.py: it holds no settings of ours")
    return checkpoint


def build_network(settings, num_classes: int, image_size: int) -> nn.Module:
    """The network of a run's `Settings`, freshly initialised."""
    block = None if settings.block.name == "none" else settings.block.name
    return build_model(settings.model.name, num_classes, block, image_size)


def load_network(checkpoint: dict[str, Any], settings, num_classes: int) -> nn.Module:
    """Rebuild the network of a checkpoint, in eval.

    Args:
        checkpoint: from `load_checkpoint`.
        settings: the run's `Settings`.
        num_classes: of the data at hand.

    Raises:
        ValueError: see `restore`.
    """
    # Built for the classes it was trained for, so that `restore` can say what is wrong with the data's.
    net = build_network(settings, len(checkpoint["dbb"]["classes"]), checkpoint["dbb"]["image_size"])
    restore(net, checkpoint, settings, num_classes)
    return net.eval()


def restore(net: nn.Module, checkpoint: dict[str, Any], settings, num_classes: int) -> None:
    """Load a checkpoint's weights into a network.

    Raises:
        ValueError: if the data has another number of classes, or the weights are those of another network.
    """
    trained = len(checkpoint["dbb"]["classes"])
    if trained != num_classes:
        raise ValueError(f"the checkpoint was trained for {trained} classes, but data={settings.data.name} has {num_classes}")
    load_weights(net, {key.removeprefix("net."): value for key, value in checkpoint["state_dict"].items() if key.startswith("net.")})


def load_weights(net: nn.Module, weights: dict[str, Tensor]) -> None:
    """`load_state_dict` that names both difference lists.

    Raises:
        ValueError: if a key is missing or too many, or a shape differs.
    """
    own = net.state_dict()
    lists = {"missing": sorted(own.keys() - weights.keys()), "unexpected": sorted(weights.keys() - own.keys()),
             "of another shape": sorted(k for k in own.keys() & weights.keys() if own[k].shape != weights[k].shape)}
    if any(lists.values()):
        text = "; ".join(f"{len(keys)} {what} ({', '.join(keys[:4])}{', ...' if len(keys) > 4 else ''})"
                         for what, keys in lists.items() if keys)
        raise ValueError(f"these weights are those of another network: {text}")
    net.load_state_dict(weights)
