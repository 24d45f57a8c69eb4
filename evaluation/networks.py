"""Networks by a run's settings: fresh, warm from a file of weights, or those of a checkpoint."""

import json
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dbb import ReparamConv2d
from models import build_model, limits, load_weights
from models.build import refuse_larger
from models.published import translate
from models.reading import PREPARED, read_weights
from models.say import say
from models.weights import refuse_others


def build_network(settings, num_classes: int, image_size: int, pretrained: bool = False,
                  weights: dict[str, Tensor] | None = None, weights_of: str | None = None) -> nn.Module:
    """The network of a run's `Settings`; see `models.build_model`, also for what it raises."""
    block = settings.block
    return build_model(settings.model.name, num_classes, blocks_of(block), image_size, pretrained, weights,
                       block.init, weights_of=weights_of, include=block.include, exclude=block.exclude,
                       kernel_sizes=block.kernel_sizes, without_norm=block.without_norm)


def start_network(settings, classes: Sequence[str], image_size: int) -> nn.Module:
    """The network that a new run starts from: fresh, or warm from the weights that its `Settings` name.

    If these are a file of ours that was trained on other images, a line says in what they differ.

    Raises:
        ValueError: if these cannot be read, or are those of another network.
    """
    if settings.model.weights is None:
        return build_network(settings, len(classes), image_size, settings.model.pretrained)
    with torch.serialization.safe_globals([Namespace]):  # in files of timm's and torchvision's scripts
        weights, about = read_weights(settings.model.weights)
    _tell_differences(about, settings.data, classes, image_size)
    return build_network(settings, len(classes), image_size, weights=weights, weights_of=about.get("model"))


def _tell_differences(about: dict[str, Any], data, classes: Sequence[str], image_size: int) -> None:
    """Print in what the images of a warm start differ from those that a file of ours was trained on."""
    for key in PREPARED:
        ours = image_size if key == "image_size" else getattr(data, key)
        theirs = about.get(key, ours)
        if theirs != ours:
            say(f"model.weights: trained with data.{key}={json.dumps(theirs)}, here it is {json.dumps(ours)}")
    known = about.get("classes", [])
    if len(known) == len(classes) and known != classes:
        theirs, ours = next(pair for pair in zip(known, classes, strict=True) if pair[0] != pair[1])
        say(f"model.weights: trained for other classes: {json.dumps(theirs)} where the data has "
            f"{json.dumps(ours)}; the classifier is kept")


def blocks_of(conf) -> dict[str, Any] | None:
    """The blocks that a `BlockConf` asks for, as `dbb.replace_convs` takes them; None for plain ones."""
    def listed(names):
        return [name for name in names for _ in range(conf.copies if name == "kxk" else 1)]

    def make(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, **kwargs):
        depthwise = conf.depthwise is not None and groups == in_channels == out_channels
        branches = listed(conf.depthwise if depthwise else conf.branches)
        return ReparamConv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups,
                             branches, conf.mode, conf.positions, **kwargs)

    def of_layers(branches):
        if not branches:
            return None
        return partial(ReparamConv2d, branches=listed(branches), mode=conf.mode, positions=conf.positions)

    blocks = {"*": make} if conf.branches else {}
    return blocks | {layers.modules: of_layers(layers.branches) for layers in conf.layers} or None


def load_network(checkpoint: dict[str, Any], settings) -> nn.Module:
    """Rebuild the network of a checkpoint, in eval.

    Args:
        checkpoint: from `load_checkpoint`.
        settings: the run's `Settings`.

    Raises:
        ValueError: if the weights are those of another network.
    """
    num_classes, image_size = len(checkpoint["dbb"]["classes"]), checkpoint["dbb"]["image_size"]
    refuse_another(checkpoint, settings, num_classes, image_size)
    net = build_network(settings, num_classes, image_size)
    restore(net, checkpoint)
    return net.eval()


def refuse_another(checkpoint: dict[str, Any], settings, num_classes: int, image_size: int) -> None:
    """Check, before it takes memory, that a checkpoint's weights are those of the network of `Settings`.

    Raises:
        ValueError: if they are those of another network.
    """
    with torch.device("meta"):
        own = build_network(settings, num_classes, image_size).state_dict()
    refuse_others(_weights_of(checkpoint), own)


def restore(net: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Load a checkpoint's weights into a network.

    Raises:
        ValueError: see `load_weights`.
    """
    load_weights(net, _weights_of(checkpoint))


def _weights_of(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    return {key.removeprefix("net."): value for key, value in checkpoint["state_dict"].items()
            if key.startswith("net.")}


def load_published(settings, image_size: int) -> tuple[nn.Module, int]:
    """Rebuild the network of a file that the authors of `settings.source` published, and count its classes.

    It is in eval. Training-time files come with their branches. Deployed ones are plain convolutions, as are
    OREPA's once squeezed: they start blocks as trained weights do, without changing the function.

    Raises:
        ValueError: if the file cannot be read, or its weights are not those of `settings.model` and
            `settings.block`.
    """
    if settings.ckpt is None:
        raise ValueError(f"ckpt=PATH is needed: the published file that source={settings.source} is to read")
    weights, _ = read_weights(settings.ckpt)
    heads = [key for key in ("linear2.weight", "linear.weight") if key in weights and weights[key].ndim == 2]
    if not heads:
        raise ValueError(f"ckpt={settings.ckpt} holds no linear.weight, as every file of "
                         f"source={settings.source} does")
    num_classes = len(weights[heads[0]])
    if not 0 < num_classes <= limits.CLASSES:
        raise ValueError(f"ckpt={settings.ckpt}: {heads[0]} has {num_classes:,} classes")
    with torch.device("meta"):
        plain = build_model(settings.model.name, num_classes, image_size=image_size)
    weights, with_blocks = translate(weights, settings.source, settings.model.name, plain)
    refuse_larger(settings.model.name, num_classes, weights)
    if not with_blocks:
        net = build_network(settings, num_classes, image_size, False, weights, settings.model.name)
        return net.eval(), num_classes
    net = build_network(settings, num_classes, image_size)
    load_weights(net, weights)
    return net.eval(), num_classes
