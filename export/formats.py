"""The file formats of convert.py, an entry each: its file, how it is written and read, what it needs."""

from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from export import graph, int8
from export.files import load_network, save_network

ONNX = ("onnx", "onnxscript", "onnxruntime")


class Converted(NamedTuple):
    """What a writer may write: a network in its three forms, on the CPU, in eval, and its calibration images.

    Attributes:
        branched: with blocks, branch by branch inside `dbb.branchwise`.
        folded: one convolution for each block, and no norm that could be folded.
        stock: as its library builds it; its norms hold the statistics of their convolutions.
        about: what the network is, in plain values, for a file's header.
        images: by a number of images, batches of normalised training images `[N, C, H, W]`.
    """

    branched: nn.Module
    folded: nn.Module
    stock: nn.Module
    about: dict[str, Any]
    images: Callable[..., Iterable[Tensor]]

    @property
    def example(self) -> Tensor:
        """Two black images `[2, 3, H, W]`."""
        size = self.about["image_size"]
        return torch.zeros(2, 3, size, size)


class Format(NamedTuple):
    """A file format: `write(converted, path)`, `read(path)`, the packages and the other format they need."""

    file: str
    write: Callable[[Converted, Path], None]
    read: Callable[[Path], nn.Module]
    packages: tuple[str, ...] = ()
    beside: str | None = None
    exact: bool = True  # whether it must compute what the network does


def _write_onnx(made: Converted, path: Path) -> None:
    graph.export_onnx(made.folded, made.example, made.about, path)


def _write_training_onnx(made: Converted, path: Path) -> None:
    graph.export_onnx(made.branched, made.example, made.about, path, training=True)


def _write_int8(made: Converted, path: Path) -> None:
    int8.quantize(path.with_name(FORMATS["onnx"].file), path, made.images())


FORMATS = {  # of export=[...]; safetensors is always written
    "safetensors": Format("model.safetensors",
                          lambda made, path: save_network(made.stock, made.about, path),
                          lambda path: load_network(path)[0]),
    "onnx": Format("model.onnx", _write_onnx, graph.OnnxNetwork, ONNX),
    "training_onnx": Format("model-training.onnx", _write_training_onnx, graph.OnnxNetwork, ONNX,
                            beside="onnx"),
    "pt2": Format("model.pt2",
                  lambda made, path: graph.export_pt2(made.folded, made.example, path),
                  lambda path: torch.export.load(path).module()),
    "int8": Format("model-int8.onnx", _write_int8, graph.OnnxNetwork, ONNX, beside="onnx", exact=False),
}


def wanted(kinds: Sequence[str]) -> list[Format]:
    """safetensors, the formats that `export=[...]` names, and what these need, in the table's order."""
    names = {"safetensors", *kinds, *(FORMATS[kind].beside for kind in kinds)}
    return [kind for name, kind in FORMATS.items() if name in names]


def require(kinds: Sequence[str]) -> None:
    """Check, before any work, that the packages are there.

    Raises:
        ValueError: if one is not.
    """
    asked = {f"export=[{kind}]": FORMATS[kind].packages for kind in kinds} | {"report.png": ("matplotlib",)}
    for knob, packages in asked.items():
        for package in packages:
            if find_spec(package) is None:
                raise ValueError(f"{knob} needs {package}, which is not installed: "
                                 "pip install -e '.[train,export]'")
