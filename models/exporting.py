"""Networks for other runtimes: ONNX and torch.export, run back at once and refused if they compute something else."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from condconv.export import export_form
from models.detector_export import OUTPUTS, DetectorFunction, ReferenceFunction, detection_difference
from models.ssd_network import SSD
from models.weights import CARD_KEY, Card

BATCHES = (1, 2, 5, 33)
TOLERANCE = 1e-4
"""Largest difference of an output; outputs beyond 1 may differ by so much of the largest."""
OPSET = 20
INPUT = "images"
Run = Callable[[Tensor], Sequence[Tensor]]
Difference = Callable[[Sequence[Tensor], Sequence[Tensor]], float]


@dataclass(frozen=True)
class Exported:
    """A file that was run back; `error` is its largest difference from PyTorch over all batches, see `TOLERANCE`."""

    path: Path
    form: str
    error: float
    opset: int | None = None

    def __str__(self) -> str:
        opset = f", opset {self.opset}" if self.opset else ""
        checked = f"equal to PyTorch up to {self.error:.1e} at batch {', '.join(map(str, BATCHES))}"
        return f"{self.path}: {self.path.stat().st_size / 2**20:.1f} MiB{opset}, form {self.form}, {checked}"


def export_onnx(
    network: nn.Module,
    path: Path,
    image_size: int,
    card: Card | None = None,
    *,
    form: str = "mixture",
    opset: int = OPSET,
    dynamic_size: bool = False,
    output_names: Sequence[str] = ("logits",),
) -> Exported:
    """Write an ONNX file whose batch (and size, if asked for) is dynamic, and run it back in ONNX Runtime.

    Args:
        network: normalised images float32 `[N, 3, H, W]` -> a tensor, or a tuple of tensors with the batch first; of a
            detector `models.detector_export.DetectorFunction` is exported.
        path: of the file, written only if it computes the same.
        image_size: side of the images in pixels.
        card: what the file says about itself, in its metadata.
        form: of the CondConv layers, see `condconv.export`.
        opset: of ONNX.
        dynamic_size: height and width are free too.
        output_names: of the outputs.

    Raises:
        RuntimeError: the file computes something else than the network, or the exporter cannot express the network.
    """
    network, reference, difference, output_names = _functions(network, output_names)
    if dynamic_size and reference is not network:
        raise ValueError("a detector's anchors are made for one size: leave dynamic_size=false")
    plain = export_form(network, form).float()
    for library in ("onnxscript", "onnx_ir", "torch.onnx"):  # which list every constant that they merge
        logging.getLogger(library).setLevel(logging.WARNING)
    unfinished = path.with_name(f".{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        program = torch.onnx.export(
            plain,
            (torch.randn(2, 3, image_size, image_size),),
            dynamo=True,
            dynamic_shapes=(_dynamic_shape(dynamic_size),),
            input_names=[INPUT],
            output_names=list(output_names),
            opset_version=opset,
            verbose=False,
        )
        assert program is not None
        if card is not None:
            program.model.metadata_props[CARD_KEY] = json.dumps(card.to_dict())
        program.save(str(unfinished), external_data=False)
        sizes = (image_size, image_size + 32) if dynamic_size else (image_size,)
        error = compare(onnx_runner(unfinished), reference, sizes, str(path), difference)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return Exported(path, form, error, opset)


def export_torch(
    network: nn.Module, path: Path, image_size: int, card: Card | None = None, *, form: str = "mixture"
) -> Exported:
    """Write a `torch.export` program (.pt2) with a dynamic batch, which loads with torch alone; arguments as above.

    Raises:
        RuntimeError: the file computes something else than the network.
    """
    network, reference, difference, _ = _functions(network, ())
    plain = export_form(network, form).float()
    example = torch.randn(2, 3, image_size, image_size)
    program = torch.export.export(plain, (example,), dynamic_shapes=(_dynamic_shape(False),))
    unfinished = path.with_name(f".{path.stem}.pt2")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        described = {f"{CARD_KEY}.json": json.dumps(card.to_dict())} if card is not None else {}
        torch.export.save(program, str(unfinished), extra_files=described)
        loaded = torch.export.load(str(unfinished)).module()
        error = compare(lambda images: _tensors(loaded(images)), reference, (image_size,), str(path), difference)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return Exported(path, form, error)


def _functions(network: nn.Module, names: Sequence[str]) -> tuple[nn.Module, nn.Module, Difference, Sequence[str]]:
    """What is exported, what it must equal, how that is measured, and the names of the outputs."""
    if not isinstance(network, SSD):
        return network, network, _largest_difference, names
    threshold = network.suppression.iou_threshold
    return DetectorFunction(network), ReferenceFunction(network), partial(_detections_differ, threshold), OUTPUTS


def _detections_differ(threshold: float, outputs: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    return detection_difference(outputs, reference, threshold)


def _dynamic_shape(dynamic_size: bool) -> dict[int, Any]:
    free: dict[int, Any] = {0: torch.export.Dim("batch", min=1)}
    if dynamic_size:
        free |= {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    return free


def onnx_runner(path: Path, threads: int = 0) -> Run:
    """A function that runs an ONNX file on the CPU: images `[N, 3, H, W]` -> its outputs."""
    import onnxruntime  # not at the top: training needs none

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Its waiting threads would otherwise spin on cores that are needed between two calls: by another contender of a
    # benchmark, by the loader of a server.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Sequence[Tensor]:
        return [torch.from_numpy(output) for output in session.run(None, {INPUT: images.numpy()})]

    return run


@torch.no_grad()
def compare(
    run: Run, network: nn.Module, sizes: Sequence[int], name: str, difference: Difference | None = None
) -> float:
    """Run `network` and its exported form on the same random images; returns the largest difference.

    Raises:
        RuntimeError: they differ by more than `TOLERANCE`.
    """
    training = network.training
    network.eval()
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    try:
        for size in sizes:
            for batch in BATCHES:
                images = torch.randn(batch, 3, size, size, generator=generator)
                expected = _tensors(network(images))
                worst = max(worst, (difference or _largest_difference)(run(images), expected))
                if not worst <= TOLERANCE:
                    raise RuntimeError(
                        f"{name} was not written: at batch {batch}, {size} pixels, it differs from the PyTorch network "
                        f"by {worst:.1e} (allowed are {TOLERANCE:.0e})"
                    )
    finally:
        network.train(training)
    return worst


def _largest_difference(outputs: Sequence[Tensor], references: Sequence[Tensor]) -> float:
    return max(_difference(output, reference) for output, reference in zip(outputs, references, strict=True))


def _difference(output: Tensor, reference: Tensor) -> float:
    if output.shape != reference.shape:
        return float("inf")
    if not reference.numel():
        return 0.0
    return float((output.to(reference.dtype) - reference).abs().max()) / max(1.0, float(reference.abs().max()))


def _tensors(outputs: Any) -> Sequence[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)
