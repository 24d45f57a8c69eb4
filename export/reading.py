"""A file of convert.py as a network, checked against the report beside it."""

import sys
from pathlib import Path

from torch import nn

from export.files import load_network, read_report, sha256
from export.graph import OnnxNetwork
from models.say import shown


def load_verified(path: Path) -> tuple[nn.Module, dict]:
    """The network of a model.onnx or model.safetensors, and what its header says.

    Raises:
        ValueError: if the file is missing, damaged, of another kind, or not the one in report.json.
    """
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file; convert.py writes model.onnx and model.safetensors")
    if path.suffix not in (".onnx", ".safetensors"):
        raise ValueError(f"{path}: only .onnx and .safetensors files of convert.py are read")
    report = path.parent / "report.json"
    if not report.is_file():
        print(shown(f"{report} is missing: {path.name} was not verified"), file=sys.stderr)
    else:
        try:
            known = read_report(report)["files"][path.name]["sha256"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{report} does not say what {path.name} is: convert the checkpoint "
                             "again") from error
        if sha256(path) != known:
            raise ValueError(f"{path} is not the file that {report} describes (another SHA-256): it was "
                             "changed or damaged; convert the checkpoint again")
    if path.suffix == ".safetensors":
        return load_network(path)
    net = OnnxNetwork(path)
    return net, net.about
