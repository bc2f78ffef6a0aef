"""Exported files compute what the network computes, at any batch, or are not written; int8 files stay close."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import onnx
import pytest
import torch
from small_networks import InvertedResidual
from torch import Tensor, nn

from condconv import convert
from models import create_model, list_backbones
from models.exporting import BATCHES, compare, export_onnx, export_torch, onnx_runner
from models.quantizing import _nodes, accuracies, quantize
from models.weights import CARD_KEY, Card


class Tiny(nn.Module):
    """A stem, one CondConv block, a CondConv classifier: small, because exporting is slow."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, 2, 1)
        self.block = InvertedResidual(6, 7)
        self.classifier = nn.Linear(7, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.block(self.stem(images).relu()).mean((2, 3)))


def tiny() -> nn.Module:
    torch.manual_seed(1)
    net = Tiny()
    convert(net, 3, blocks="block", exclude="se", classifier="classifier", routing="hierarchical")
    return net.eval()


def trained(net: nn.Module) -> tuple[Tensor, Tensor]:
    """Images of four classes (bright corners), after a few steps of learning them."""
    labels = torch.arange(128) % 4
    images = 0.3 * torch.randn(128, 3, 16, 16)
    for image, label in zip(images, labels.tolist(), strict=True):
        image[:, 8 * (label // 2) :, 8 * (label % 2) :][:, :8, :8] += (
            2 * torch.tensor([1.0, -1, 0.5])[:, None, None] * (label - 1.5)
        )
    optimizer = torch.optim.Adam(net.parameters(), 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images), labels).backward()
        optimizer.step()
    return images, labels


def test_onnx_and_int8(tmp_path: Path) -> None:
    net = tiny()
    images, labels = trained(net)
    card = Card({"name": "tiny"}, class_names=("a", "b"))
    exported = export_onnx(net, tmp_path / "net.onnx", 16, card, dynamic_size=True)
    assert (
        exported.error < 1e-5 and "opset 20, form mixture, equal to PyTorch" in str(exported) and "MiB" in str(exported)
    )
    model = onnx.load(str(exported.path))
    assert model.opset_import[0].version == 20
    assert [d.dim_param != "" for d in model.graph.input[0].type.tensor_type.shape.dim] == [True, False, True, True]
    assert {p.key: json.loads(p.value)["class_names"] for p in model.metadata_props if p.key == CARD_KEY} == {
        CARD_KEY: ["a", "b"]
    }
    constants = {tensor.name for tensor in model.graph.initializer}
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    assert convolutions and all(node.input[1] in constants for node in convolutions), "a kernel depends on the input"
    run = onnx_runner(exported.path, threads=1)
    x = torch.randn(7, 3, 24, 20)  # a batch, height and width that it was not traced with
    assert torch.allclose(run(x)[0], net(x), atol=1e-5)
    quantized, _ = _nodes(model)
    weights = [node.input[1] for node in model.graph.node if node.name in quantized]
    assert weights and not [name for name in weights if name.endswith(".bias") or ".router." in name]
    small = quantize(exported.path, tmp_path / "int8.onnx", images[:64].split(16))
    assert small.stat().st_size > 0
    kinds = {node.op_type for node in onnx.load(str(small)).graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= kinds
    figures = accuracies(
        {"float": run, "int8": onnx_runner(small, 1)}, [(images[:50], labels[:50]), (images[50:], labels[50:])]
    )
    assert figures["float"] > 0.9 and figures["int8"] > figures["float"] - 0.1


def test_torch_export_loads_with_torch_alone(tmp_path: Path) -> None:
    net = tiny()
    exported = export_torch(net, tmp_path / "net.pt2", 16, Card({"name": "tiny"}), form="matmul")
    files = {f"{CARD_KEY}.json": ""}
    program = torch.export.load(str(exported.path), extra_files=files)
    assert json.loads(files[f"{CARD_KEY}.json"])["model"] == {"name": "tiny"}
    for batch in BATCHES:
        x = torch.randn(batch, 3, 16, 16)
        assert torch.allclose(program.module()(x), net(x), atol=1e-5)


def test_a_file_that_computes_something_else_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = tiny()
    wrong = copy.deepcopy(net)
    with torch.no_grad():
        wrong.classifier.bias += 2e-3
    with pytest.raises(RuntimeError, match=r"x\.onnx was not written: at batch 1, 16 pixels, it differs .* by \d"):
        compare(lambda images: [wrong(images)], net, (16,), "x.onnx")
    with pytest.raises(RuntimeError, match="by inf"):
        compare(lambda images: [net(images)[:1]], net, (16,), "x.onnx")
    monkeypatch.setattr("models.exporting.export_form", lambda network, form: wrong)
    monkeypatch.setattr("condconv.export.FORMS", ("mixture",))
    monkeypatch.setattr(torch.export, "export", lambda *args, **kwargs: None)
    monkeypatch.setattr(torch.export, "save", lambda program, path, extra_files: Path(path).touch())
    monkeypatch.setattr(torch.export, "load", lambda path: type("Loaded", (), {"module": lambda self: wrong})())
    with pytest.raises(RuntimeError, match="was not written"):
        export_torch(net, tmp_path / "net.pt2", 16)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", list_backbones())
def test_every_backbone_exports_in_both_forms(name: str, tmp_path: Path) -> None:
    net = create_model(name, 10, 2).train()
    with torch.no_grad():
        net(torch.randn(16, 3, 64, 64))
    for form in ("mixture", "matmul"):
        assert export_onnx(net.eval(), tmp_path / f"{form}.onnx", 64, form=form).error < 1e-4
        assert export_torch(net, tmp_path / f"{form}.pt2", 64, form=form).error < 1e-4
