"""Write a network's graph, as ONNX or as a PyTorch program; run the former, and count what is in it."""

import io
import json
import logging
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dbb import ReparamConv2d, branchwise
from export.files import parse_about


def export_onnx(net: nn.Module, image: Tensor, about: dict, path: Path, training: bool = False) -> None:
    """Write `images` `[batch, C, H, W]` to `logits` `[batch, classes]`, for any batch.

    Args:
        net: in eval.
        image: `[2, C, H, W]`.
        about: goes into the file's metadata, as JSON.
        path: of the file.
        training: every branch and norm as a node of its own; only constants are computed ahead.
    """
    import onnx_ir.passes.common as passes
    import onnxscript.optimizer

    shapes = ({0: torch.export.Dim("batch")},)
    with branchwise(net) if training else torch.no_grad(), quiet():
        program = torch.onnx.export(net, (image,), dynamo=True, optimize=not training, input_names=["images"],
                                    output_names=["logits"], dynamic_shapes=shapes, verbose=False)
        if training:
            onnxscript.optimizer.fold_constants(program.model, onnx_shape_inference=True)
            onnxscript.optimizer.remove_unused_nodes(program.model)
    passes.ClearMetadataAndDocStringPass()(program.model)  # stack traces, with the paths of this machine
    program.model.metadata_props["dbb"] = json.dumps(about)
    program.save(path, external_data=False)


def export_pt2(net: nn.Module, image: Tensor, path: Path) -> None:
    """Write a `torch.export` program, for any batch; arguments as `export_onnx`."""
    program = torch.export.export(net, (image,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # with the paths of this machine
    content = io.BytesIO()  # torch's own writer aborts the process where a disk is full
    torch.export.save(program, content)
    path.write_bytes(content.getvalue())


class quiet(warnings.catch_warnings):  # noqa: N801
    """The notes of exporters and quantisers to their own developers are left out."""

    def __enter__(self):
        super().__enter__()
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)

    def __exit__(self, *exc):
        logging.disable(logging.NOTSET)
        super().__exit__(*exc)


class OnnxNetwork(nn.Module):
    """An ONNX file in onnxruntime, on the CPU, called as any network; `about` is what the file says of it.

    Raises:
        ValueError: if onnxruntime cannot read the file, or it was not written by convert.py.
    """

    def __init__(self, path: Path, threads: int = 0):
        super().__init__()
        import onnx
        import onnxruntime

        self.path = path
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 4  # it would show a name as it is
        try:
            providers = ["CPUExecutionProvider"]
            self.session = onnxruntime.InferenceSession(str(path), options, providers=providers)
            described = self.session.get_modelmeta().custom_metadata_map.get("dbb")
        except Exception as error:  # onnxruntime's own kinds, which share no base class
            raise ValueError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
        self.about = parse_about(described, path)
        read, written = self.session.get_inputs(), self.session.get_outputs()
        model = onnx.load(path, load_external_data=False)
        parts = [*_parts(model)]
        outside = any(isinstance(part, onnx.TensorProto) and part.external_data for part in parts)
        graphs = sum(isinstance(part, onnx.GraphProto) for part in parts)  # a loop has one of its own
        shape = [written[0].shape[-1:], len(written[0].shape)] if len(written) == 1 else None
        if shape != [[len(self.about["classes"])], 2] or [one.name for one in read] != ["images"] \
                or graphs > 1 or model.functions or outside:
            raise ValueError(f"{path} is no file of convert.py: its graph has other inputs or outputs, "
                             "loops, functions, or values in other files")

    def forward(self, images: Tensor) -> Tensor:
        try:
            return torch.from_numpy(self.session.run(None, {"images": images.cpu().numpy()})[0])
        except Exception as error:  # as above; for want of memory, say
            raise ValueError(f"{self.path} cannot be run: {str(error).splitlines()[0]}") from error


def _parts(message) -> Iterator:
    """Everything in a message of protobuf, itself first."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in [value] if hasattr(value, "ListFields") else value:
                yield from _parts(part)


class Node(NamedTuple):
    """An operator of an ONNX file: its kind, the tensors it reads (no constants) and writes, its kernel."""

    kind: str
    inputs: list[str]
    outputs: list[str]
    kernel: str


def nodes(path: Path) -> list[Node]:
    """The operators of an ONNX file, in the order in which they run."""
    import onnx

    graph = onnx.load(path).graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    weights = {name: tensor.dims for name, tensor in tensors.items()}
    found = []
    for node in graph.node:
        if node.op_type == "Constant":
            continue
        sizes = [weights[name] for name in node.input if len(weights.get(name, ())) == 4]
        options = {attribute.name: attribute for attribute in node.attribute}
        kernel = ""
        if node.op_type == "Conv" and sizes:
            out_channels, in_channels, height, width = sizes[0]
            groups = options["group"].i if "group" in options else 1
            kernel = f"{height}x{width}, {in_channels * groups} to {out_channels}"
            if is_average(tensors[node.input[1]]):
                kernel = f"{height}x{width} average pooling\n{groups} channels"
            elif groups > 1:
                kernel += f"\n{groups} groups"
        elif "kernel_shape" in options:
            kernel = "x".join(map(str, options["kernel_shape"].ints))
        inputs = [name for name in node.input if name and name not in weights]
        found.append(Node(node.op_type, inputs, list(node.output), kernel))
    return found


def is_average(tensor) -> bool:
    """Whether a kernel, an ONNX tensor, averages each channel over its window, as average pooling does."""
    import onnx

    kernel = onnx.numpy_helper.to_array(tensor)
    return kernel.shape[1] == 1 and kernel[0].size > 1 and np.allclose(kernel, 1 / kernel[0].size)


def first_block(net: nn.Module, image: Tensor) -> tuple[str, list[Node], list[Node]]:
    """The first block of a network as ONNX operators: its name, all branches, and the one convolution.

    Args:
        net: in eval, with blocks.
        image: `[2, C, H, W]`.
    """
    blocks = ((name, module) for name, module in net.named_modules() if isinstance(module, ReparamConv2d))
    name, block = next(blocks)
    seen = []
    with block.register_forward_pre_hook(lambda module, args: seen.append(args[0])), torch.no_grad():
        net(image)
    with tempfile.TemporaryDirectory() as folder:
        before, after = Path(folder) / "before.onnx", Path(folder) / "after.onnx"
        export_onnx(block, seen[0], {}, before, training=True)
        export_onnx(block.fuse(), seen[0], {}, after)
        return name, nodes(before), nodes(after)


def summary(path: Path) -> dict:
    """Number of nodes by type, and of parameters (all constants that are not whole numbers)."""
    import onnx

    constants = onnx.load(path).graph.initializer
    floats = [tensor for tensor in constants if tensor.data_type == onnx.TensorProto.FLOAT]
    return {"nodes": dict(Counter(node.kind for node in nodes(path)).most_common()),
            "parameters": sum(torch.Size(tensor.dims).numel() for tensor in floats)}
