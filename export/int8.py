"""Static int8 quantisation of an ONNX file by onnxruntime, and what it does to each layer."""

import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from torch import Tensor

from export.graph import quiet


def quantize(source: Path, target: Path, batches: Iterable[Tensor], classifier: bool = False,
             signed: bool = False) -> None:
    """Write the int8 model: weights a scale per output channel, activations a scale per map.

    The latter scales come from calibration images.

    Args:
        source: the fused float model.
        target: the int8 model, in QDQ format.
        batches: normalised training images `[N, C, H, W]`.
        classifier: quantise it too. One scale for all logits is ruined by a class with a wide range
            (docs/int8.md), and a classifier costs next to nothing in float.
        signed: weights in -127 .. 127; on CPUs without VNNI onnxruntime then adds pairs of products in 16
            bits, and overflows.
    """
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as folder, quiet():
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        heads = [node.name for node in onnx.load(prepared).graph.node if node.op_type == "Gemm"]
        quantize_static(prepared, target, _Reader(batches), quant_format=QuantFormat.QDQ, per_channel=True,
                        nodes_to_exclude=[] if classifier else heads, activation_type=QuantType.QUInt8,
                        weight_type=QuantType.QInt8 if signed else QuantType.QUInt8)


def layers(source: Path, target: Path, batches: Iterable[Tensor]) -> list[dict]:
    """By convolution: how its weights are spread, and the signal to noise of its output, worst first.

    Returns:
        `layer`; `range`, the largest weight; `spread`, the widest channel's range over the median channel's;
        `weight_db` and `output_db`, signal to quantisation noise in decibels of the weight, and of the output
        with all that came before it.
    """
    import onnx
    from onnx import numpy_helper
    from onnxruntime.quantization import qdq_loss_debug as debug

    seen, batches = [], list(batches)
    with tempfile.TemporaryDirectory() as folder, quiet():
        for path in (source, target):
            debug.modify_model_output_intermediate_tensors(path, Path(folder) / path.name)
            seen.append(debug.collect_activations(str(Path(folder) / path.name), _Reader(batches)))
        errors = debug.compute_activation_error(debug.create_activation_matching(seen[1], seen[0]))

    graph, rows = onnx.load(source).graph, []
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    consumers = {name: node.output[0] for node in graph.node for name in node.input}
    for node in graph.node:
        if node.op_type == "Conv":
            weight = constants[node.input[1]]
            ranges = np.abs(weight).reshape(len(weight), -1).max(1)
            scale = np.maximum(ranges, np.finfo(np.float32).tiny).reshape(-1, *[1] * (weight.ndim - 1)) / 127
            noise = weight - np.round(weight / scale) * scale
            # The output of a convolution that feeds an activation or a sum is quantised behind it.
            places = (node.output[0], consumers.get(node.output[0]))
            output = next((errors[name]["xmodel_err"] for name in places if name in errors), None)
            signal, noise = np.linalg.norm(weight), max(np.linalg.norm(noise), 1e-12)
            rows.append({"layer": node.input[1].removesuffix(".weight"), "range": float(ranges.max()),
                         "spread": float(ranges.max() / max(np.median(ranges), 1e-12)),
                         "weight_db": float(20 * np.log10(signal / noise)),
                         "output_db": None if output is None else float(output)})
    return sorted(rows, key=lambda row: float("inf") if row["output_db"] is None else row["output_db"])


class _Reader:
    """Batches as onnxruntime's CalibrationDataReader gives them."""

    def __init__(self, batches: Iterable[Tensor]):
        self.batches = iter(batches)

    def get_next(self) -> dict | None:
        batch = next(self.batches, None)
        return None if batch is None else {"images": batch.numpy()}

    def __iter__(self):
        return iter(self.get_next, None)
