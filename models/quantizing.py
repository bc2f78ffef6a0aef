"""int8 files: post-training quantisation of an exported ONNX file by ONNX Runtime's own tools, and what it costs."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import torch
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor

from models.exporting import INPUT, Run

_PRODUCTS = ("Conv", "Gemm", "MatMul")


class _Images(CalibrationDataReader):  # type: ignore[misc]  # untyped
    """Feeds batches of images to the calibration."""

    def __init__(self, batches: Iterable[Tensor]) -> None:
        self._batches: Iterator[Tensor] = iter(batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        images = next(self._batches, None)
        return None if images is None else {INPUT: images.numpy()}


def quantize(path: Path, target: Path, batches: Iterable[Tensor]) -> Path:
    """Write the int8 version of an ONNX file with static weights (form "mixture").

    Weights are int8 per channel, activations uint8 by the extreme values on `batches`. Convolutions and products with
    constant matrices are quantised; routers and the mixing of outputs, a thousandth of the work, stay in float32, as a
    routing weight's rounding would touch a whole kernel.

    Args:
        path: of the float32 file.
        target: of the new file.
        batches: normalised images `[N, 3, H, W]` such as the network will see; a few hundred suffice.

    Raises:
        ValueError: the file has no static weights to quantise.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=target.parent) as folder:
        prepared, unfinished = Path(folder) / "prepared.onnx", Path(folder) / "int8.onnx"
        quant_pre_process(str(path), str(prepared), skip_symbolic_shape=True)
        quantized, left = _nodes(onnx.load(str(prepared)))
        if not quantized:
            raise ValueError(f"{path} has no layer with static weights to quantise: export it with form=mixture")
        quantize_static(
            str(prepared),
            str(unfinished),
            _Images(batches),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(_PRODUCTS),
            nodes_to_exclude=left,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
        )
        model = onnx.load(str(unfinished))
        del model.metadata_props[:]
        model.metadata_props.extend(onnx.load(str(path)).metadata_props)
        onnx.save(model, str(unfinished))
        os.replace(unfinished, target)
    return target


def _nodes(model: onnx.ModelProto) -> tuple[list[str], list[str]]:
    """Names of the products that are quantised, and of those that stay in float32."""
    constants = {tensor.name for tensor in model.graph.initializer}
    quantized: list[str] = []
    left: list[str] = []
    for node in model.graph.node:
        if node.op_type in _PRODUCTS:
            mixing = ".router." in node.input[1] or node.input[1].endswith(".bias")  # of routing weights
            static = node.input[1] in constants and not mixing
            (quantized if static else left).append(node.name)
    return quantized, left


@torch.no_grad()
def accuracies(runs: Mapping[str, Run], batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Top-1 of each run on the same images: the share whose largest output is their label."""
    correct, total = dict.fromkeys(runs, 0), 0
    for images, labels in batches:
        total += len(labels)
        for name, run in runs.items():
            correct[name] += int((run(images)[0].argmax(1) == labels).sum())
    return {name: count / total for name, count in correct.items()}
