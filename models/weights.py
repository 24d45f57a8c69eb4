"""Load weights into a network, exactly: every key and shape must fit, or both difference lists are shown."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from models.say import say, shown

REAL = torch.float64, torch.float32, torch.float16, torch.bfloat16
WHOLE = torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool


def load_weights(net: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """`load_state_dict` that names what differs.

    Raises:
        ValueError: if a key is missing or too many, a shape or a kind of numbers differs, or the network
            cannot hold a number.
    """
    own = net.state_dict()
    refuse_others(weights, own)
    refuse_kinds(weights, own)
    _refuse_impossible(weights, own)
    net.load_state_dict(weights)


def refuse_others(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Raise a ValueError for weights of other names or shapes than a network's own, with what differs."""
    both = sorted(own.keys() & weights.keys())
    lists = {"missing": sorted(own.keys() - weights.keys()),
             "unexpected": sorted(weights.keys() - own.keys()),
             "of another shape": [f"{key}: {list(weights[key].shape)}, here {list(own[key].shape)}"
                                  for key in both if own[key].shape != weights[key].shape]}
    if any(lists.values()):
        text = "; ".join(f"{len(keys)} {what} ({', '.join(key[:200] for key in keys[:4])}"
                         f"{', ...' if len(keys) > 4 else ''})"
                         for what, keys in lists.items() if keys)
        raise ValueError(f"these weights are those of another network: {shown(text)}")


def refuse_kinds(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Raise a ValueError for whole or complex numbers where the network has real ones, and for codes."""
    for key in own.keys() & weights.keys():
        theirs, ours = weights[key].dtype, own[key].dtype
        if theirs not in REAL and (ours.is_floating_point or theirs not in WHOLE):
            raise ValueError(f"{key} is of {theirs} in the file, perhaps quantized, and of {ours} here: save "
                             "the weights before quantizing")


def _refuse_impossible(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Raise a ValueError for negative variances, and numbers that are not finite in the network's type."""
    for key in own.keys() & weights.keys():
        if not weights[key].to(own[key].dtype).isfinite().all():
            raise ValueError(f"these weights are not all finite numbers of {own[key].dtype}: {key}")
        if key.endswith("running_var") and (weights[key] < 0).any():
            raise ValueError(f"these weights have a negative variance: {key}")


def load_plain(net: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load a plain checkpoint of timm or torchvision.

    A classifier for other classes starts at random, and a line says so.

    Raises:
        ValueError: see `load_weights`; if there are two tensors for one of the network's.
    """
    own = net.state_dict()
    weights = _without_prefix(weights, next(iter(own)))
    if "features.0.0.weight" in weights and "conv_stem.weight" in own:
        renamed = {_from_torchvision(key, net): value for key, value in weights.items()}
        if len(renamed) < len(weights):
            raise ValueError("these weights have a tensor twice, by torchvision's name and by timm's: save "
                             "those of one network alone")
        weights = renamed
    for key in list(weights):
        counter = f"{key.removesuffix('running_var')}num_batches_tracked"
        if key.endswith("running_var") and counter in own:
            weights.setdefault(counter, own[key].new_zeros((), dtype=int))
    linear = nn.Linear | nn.Conv2d  # some end in a convolution
    modules = reversed(list(net.named_modules()))
    head = next(f"{name}." for name, module in modules if isinstance(module, linear))
    theirs, ours = weights.get(f"{head}weight"), own[f"{head}weight"]
    if theirs is not None and theirs.ndim == ours.ndim and len(theirs) != len(ours) \
            and theirs.shape[1:] == ours.shape[1:]:
        fresh = {key: value for key, value in own.items() if key.startswith(head)}
        say(f"the file has {len(theirs)} classes, the data {len(ours)}: not from the file, "
            f"so they start at random: {', '.join(fresh)}")
        weights |= fresh
    load_weights(net, weights)


def _without_prefix(weights: Mapping[str, Tensor], first: str) -> dict[str, Tensor]:
    """The weights of a network inside another one, as Lightning modules save them: `model.conv1.weight`.

    `first` is a key that the network has.
    """
    inside = [key.removesuffix(first) for key in weights if key.endswith(f".{first}")]
    if first in weights or not inside:
        return dict(weights)
    prefix = min(inside, key=len)
    left = [key for key in weights if not key.startswith(prefix)]
    more = f"; not taken: {', '.join(left)}" if left else ""
    say(f"model.weights: those under {prefix!r} are taken{more}")
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}


def _from_torchvision(key: str, net: nn.Module) -> str:
    """A key of torchvision's MobileNet v2 under timm's name."""
    blocks = [f"blocks.{i}.{j}" for i, stage in enumerate(net.blocks) for j in range(len(stage))]
    key = re.sub(r"^classifier\.1\.", "classifier.", key)
    key = re.sub(r"^features\.0\.([01])\.", lambda m: ("conv_stem.", "bn1.")[int(m[1])], key)
    key = re.sub(rf"^features\.{len(blocks) + 1}\.([01])\.", lambda m: ("conv_head.", "bn2.")[int(m[1])], key)
    block = re.match(r"features\.(\d{1,3})\.conv\.(.*)\.(\w+)$", key)
    if block is None or not 0 < int(block[1]) <= len(blocks):
        return key
    index, layer, leaf = int(block[1]), block[2], block[3]
    layers = {"0.0": "conv_pw", "0.1": "bn1", "1.0": "conv_dw", "1.1": "bn2", "2": "conv_pwl", "3": "bn3"}
    if index == 1:
        layers = {"0.0": "conv_dw", "0.1": "bn1", "1": "conv_pw", "2": "bn2"}
    return f"{blocks[index - 1]}.{layers.get(layer, layer)}.{leaf}"
