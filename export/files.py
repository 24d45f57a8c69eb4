"""model.safetensors and its header; the folder that timm loads."""

import hashlib
import json
import math
from pathlib import Path

import timm
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from models import build_model, limits, load_weights
from models.build import refuse_larger
from models.plain import sparse
from models.reading import parse_header

HUB = ("hub/model.safetensors", "hub/config.json")  # what timm loads from a folder


def sha256(path: str | Path) -> str:
    """The file's hash, in hexadecimal.

    Raises:
        ValueError: if most of the file is a hole, through which that would take as long as its maker likes.
    """
    refuse_sparse(path)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_sparse(path: str | Path) -> None:
    """Raise a ValueError if most of a file is a hole."""
    wrong = sparse(Path(path))
    if wrong is not None:
        raise ValueError(f"{path} cannot be read: {wrong}")


def read_report(path: Path) -> dict:
    """The JSON of a conversion's report.

    Raises:
        ValueError: if it is larger than any conversion writes, or no JSON.
    """
    if path.stat().st_size > limits.REPORT:
        raise ValueError("no conversion writes as much")
    return json.loads(path.read_text())


def save_network(net: nn.Module, about: dict, path: Path) -> None:
    """Write the weights under the network's own keys; `about` goes into the header, as JSON."""
    weights = {name: value.detach().cpu().contiguous() for name, value in net.state_dict().items()}
    save_file(weights, path, {"dbb": json.dumps(about)})


def load_network(path: Path) -> tuple[nn.Module, dict]:
    """Rebuild the plain network of a model.safetensors, in eval, and say what it is.

    Raises:
        ValueError: if the file is damaged or not of convert.py.
    """
    refuse_sparse(path)
    try:
        with safe_open(path, "pt") as file:
            header = (file.metadata() or {}).get("dbb")
        weights = load_file(path)
    except Exception as error:  # of many kinds, depending on its header
        raise ValueError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    about = parse_about(header, path)
    refuse_larger(about["model"], len(about["classes"]), weights)
    net = build_model(about["model"], len(about["classes"]), image_size=about["image_size"])
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d) and module.bias is None and f"{name}.bias" in weights:
            module.bias = nn.Parameter(module.weight.new_zeros(module.out_channels))  # see dbb.restore_norms
    load_weights(net, weights)
    return net.eval(), about


def save_hub(net: nn.Module, about: dict, folder: Path) -> None:
    """Write the folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` loads.

    `net` is as timm builds it.
    """
    size = about["image_size"]
    data = {"input_size": (3, size, size), "mean": about["mean"], "std": about["std"],
            "interpolation": about["interpolation"],
            "crop_pct": size / (about["resize"] + 0.5)}  # timm rounds size / crop_pct down
    timm.models.save_for_hf(net.cpu(), folder, model_config={"label_names": about["classes"]},
                            safe_serialization=True, data_config=data)


def parse_about(text: str | None, path: Path) -> dict:
    """What a file's header says of its network: plain values only.

    Raises:
        ValueError: if it does not say what is needed, or of another type.
    """
    try:
        about = {"interpolation": "bilinear"} | parse_header(text or "null")  # older files do not say
        good = (isinstance(about["model"], str) and isinstance(about["classes"], list)
                and all(isinstance(name, str) for name in about["classes"])
                and 0 < len(about["classes"]) <= limits.CLASSES
                and about["interpolation"] in ("bilinear", "bicubic")
                and all(isinstance(about[key], int) and 0 < about[key] <= 2 * limits.IMAGE_SIZE
                        for key in ("image_size", "resize"))
                and about["image_size"] <= limits.IMAGE_SIZE
                and all(len(about[key]) == 3 and all(isinstance(value, float) and math.isfinite(value)
                                                 for value in about[key]) for key in ("mean", "std"))
                and min(about["std"]) > 0)
    except (TypeError, KeyError, ValueError, RecursionError):
        good = False
    if not good:
        raise ValueError(f"{path} has no header of convert.py that says which network, classes and "
                         "normalisation it has (of a folder hub/, take the file beside it)")
    return about
