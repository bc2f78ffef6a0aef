"""The detector: shapes, costs, CondConv by placement, weights from files, detections."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from condconv import CondConv2d
from condconv.complexity import complexity
from condconv.routing import SoftmaxRouter
from models import create_detector, create_model, list_backbones
from models.boxes import Suppression, suppress, top_candidates
from models.detection_losses import box_coder
from models.ssd import list_detectors
from models.weights import Card, save_weights


def tiny(experts: int = 2, **options: Any) -> Any:
    settings = {"num_classes": 3, "image_size": 64, "width": 0.25, "router_gain": 1.0, **options}
    return create_detector("ssd_mobilenet_v1", experts=experts, **settings)


@pytest.mark.parametrize(("width", "millions"), [(0.5, 352), (0.75, 730), (1.0, 1230)])
def test_madds_of_the_static_network_at_300_pixels(width: float, millions: int) -> None:
    """The recalled figures of the paper, to 5 %, with COCO's 80 classes; to 1 % with the API's 91 outputs."""
    found = complexity(create_detector(experts=0, num_classes=80, width=width), 300).madds / 1e6
    assert found == pytest.approx(millions, rel=0.05)
    assert complexity(create_detector(experts=0, num_classes=91, width=width), 300).madds / 1e6 == pytest.approx(
        millions, rel=0.01
    )


def test_maps_and_anchors_of_the_300_pixel_network() -> None:
    net = create_detector(experts=0, num_classes=90, width=0.25)
    shapes = [tuple(x.shape[2:]) for x in net.eval().maps(torch.zeros(1, 3, 300, 300))]
    assert shapes == [(19, 19), (10, 10), (5, 5), (3, 3), (2, 2), (1, 1)]
    logits, codes = net(torch.zeros(1, 3, 300, 300))
    assert logits.shape == (1, 1917, 90) and codes.shape == (1, 1917, 4) and net.anchors.shape == (1917, 4)


@pytest.mark.parametrize("name", list_detectors())
def test_every_backbone(name: str, size: int = 64) -> None:
    width = 1.0 if "res" in name else 0.25
    net = create_detector(name, num_classes=2, experts=2, image_size=size, width=width)
    logits, codes = net(torch.randn(2, 3, size, size))
    assert logits.shape == (2, len(net.anchors), 2) and codes.shape == (2, len(net.anchors), 4)
    (logits.sum() + codes.sum()).backward()
    without = [n for n, p in net.named_parameters() if p.grad is None]
    assert not without, "DDP waits for gradients of every parameter"
    assert any(isinstance(module, CondConv2d) for module in net.backbone.modules())


@pytest.mark.parametrize("size", [320, 512])
def test_larger_images(size: int) -> None:
    net = tiny(0, image_size=size)
    assert net.eval()(torch.zeros(1, 3, size, size))[0].shape[1] == len(net.anchors) > 1917
    assert net.anchors[-1].max() > 0.9 * size


def test_a_network_of_timm() -> None:
    net = create_detector("ssd_timm", 2, 2, arch="resnet10t", pattern="layer4.*", image_size=64)
    assert net.eval()(torch.zeros(1, 3, 64, 64))[0].shape == (1, len(net.anchors), 2)


def test_placement_extras_and_predictors() -> None:
    plain = tiny(4)
    names = {name for name, module in plain.named_modules() if isinstance(module, CondConv2d)}
    assert names and all(name.startswith("backbone.blocks.") for name in names)
    both = tiny(4, condconv_extras=True, condconv_predictors=True)
    head = {n for n, m in both.head.named_modules() if isinstance(m, CondConv2d)}
    assert "extras.3.down" in head and "predictors.0.boxes" in head and len(head) == 4 * 2 + 6 * 2
    counted = complexity(both, 64)
    assert counted.static_madds == complexity(tiny(0), 64).madds < counted.madds
    both(torch.randn(2, 3, 64, 64))[0].sum().backward()
    routers = [p for n, p in both.named_parameters() if ".router." in n]
    assert len(routers) >= 2 * (8 + 4 + 6) and all(p.grad is not None for p in routers)


def test_classifier_means_the_predictors() -> None:
    net = tiny(2, placement="classifier")
    found = {n for n, m in net.named_modules() if isinstance(m, CondConv2d)}
    assert found and all(name.startswith("head.predictors.") for name in found)
    assert {n for n, m in tiny(2, classifier=True).named_modules() if isinstance(m, CondConv2d)} > found


@pytest.mark.parametrize("options", [{}, {"condconv_extras": True, "condconv_predictors": True}])
def test_one_expert_of_the_twin_is_the_static_network(options: dict[str, Any]) -> None:
    torch.manual_seed(1)
    static = tiny(0)
    torch.manual_seed(1)
    experts = tiny(3, **options)
    theirs = experts.state_dict()
    for name, value in static.state_dict().items():
        found = theirs[name]
        if "predictors" in name and name.endswith("classes.bias") and options:
            found = found * 1.5  # shared out among the experts, whose routing weights begin near 1/2
        assert torch.allclose(found[0] if found.dim() > value.dim() else found, value, atol=1e-5), name


@pytest.mark.parametrize("options", [{}, {"condconv_predictors": True}])
def test_scores_begin_at_the_prior(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    net = tiny(8, **{"router_gain": 0.01, **options}).eval()
    scores = net(torch.randn(2, 3, 64, 64))[0].sigmoid()
    assert 0.005 < float(scores.mean()) < 0.02


def test_softmax_has_a_background_class() -> None:
    net = tiny(0, loss="hard_negative").eval()
    outputs = net(torch.randn(1, 3, 64, 64))
    assert outputs[0].shape[-1] == 4
    scores = torch.cat([found["labels"] for found in net.detect(outputs)])
    assert scores.max() <= 2


def test_detections_of_perfect_predictions() -> None:
    net = tiny(0, image_size=64).eval()
    boxes = torch.tensor([[5.0, 8, 30, 40], [20, 20, 60, 50]])
    logits = torch.full((1, len(net.anchors), 3), -12.0)
    codes = torch.zeros(1, len(net.anchors), 4)
    for anchor, box, label, logit in ((10, boxes[0], 2, 6.0), (11, boxes[1], 0, 4.0), (12, boxes[0], 2, 5.0)):
        logits[0, anchor, label] = logit
        codes[0, anchor] = box_coder.encode_single(box[None], net.anchors[anchor][None])[0]
    (found,) = net.detect((logits, codes))
    torch.testing.assert_close(found["boxes"], boxes, atol=1e-3, rtol=0)
    assert found["labels"].tolist() == [2, 0]
    assert found["scores"].tolist() == pytest.approx([0.99753, 0.98201], abs=1e-4)


def suppress_slowly(boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float) -> list[int]:
    from torchvision.ops import box_iou

    kept: list[int] = []
    for i in scores.argsort(descending=True).tolist():
        if all(labels[i] != labels[j] or box_iou(boxes[i][None], boxes[j][None]) <= threshold for j in kept):
            kept.append(i)
    return kept


def test_suppression_is_greedy_and_by_class() -> None:
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(2, 60, 2, generator=generator) * 40
    boxes = torch.cat([corners, corners + 10 + torch.rand(2, 60, 2, generator=generator) * 20], dim=-1)
    scores = torch.rand(2, 60, generator=generator).sort(dim=1, descending=True).values
    labels = torch.randint(0, 2, (2, 60), generator=generator)
    for row, found in enumerate(suppress(boxes, scores, labels, Suppression(0.2, 0.4, 60, 15))):
        kept = [i for i in suppress_slowly(boxes[row], scores[row], labels[row], 0.4) if scores[row, i] > 0.2][:15]
        assert torch.equal(found["boxes"], boxes[row, kept]) and torch.equal(found["labels"], labels[row, kept])


def test_candidates_are_clipped_to_the_image() -> None:
    anchors = torch.tensor([[-20.0, -20, 30, 30], [50, 50, 90, 100]])
    scores = torch.tensor([[[0.1, 0.9], [0.8, 0.2]]])
    boxes, found, labels = top_candidates(scores, torch.zeros(1, 2, 4), anchors, 64, 3)
    assert boxes.tolist() == [[[0, 0, 30, 30], [50, 50, 64, 64], [50, 50, 64, 64]]]
    assert labels.tolist() == [[1, 0, 1]] and found[0].tolist() == pytest.approx([0.9, 0.8, 0.2])


@pytest.mark.parametrize("experts", [0, 2])
def test_a_classifiers_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str], experts: int) -> None:
    classifier = create_model("mobilenet_v1", 7, experts, width=0.25)
    path = tmp_path / "classifier.pth"
    torch.save(classifier.state_dict(), path)
    net = tiny(experts, pretrained=path)
    theirs = classifier.state_dict()
    own = net.backbone.state_dict()
    assert own and all(torch.equal(value, theirs[name]) for name, value in own.items())
    assert f"{len(own)} tensors loaded into the backbone, 0 missing" in capsys.readouterr().out


def test_a_static_classifiers_weights_become_experts(tmp_path: Path) -> None:
    classifier = create_model("mobilenet_v1", 7, 0, width=0.25).eval()
    path = tmp_path / "static.pth"
    torch.save(classifier.state_dict(), path)
    net = tiny(4, pretrained=path, init="upcycle").eval()
    x = torch.randn(2, 3, 64, 64)
    expected = classifier.forward_intermediates(x, indices=[3, 4], intermediates_only=True)
    for found, map_ in zip(net.maps(x), expected, strict=False):
        torch.testing.assert_close(found, map_, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="upcycle"):
        tiny(4, pretrained=path)


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    torch.save({"something.weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="nothing was loaded"):
        tiny(0, pretrained=path)
    torch.save(create_model("mobilenet_v1", 7, 0, width=0.5).state_dict(), path)
    with pytest.raises(ValueError, match="nothing was loaded"):
        tiny(0, pretrained=path)


def test_a_detectors_weights_with_and_without_its_classes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = tiny(2)
    path = tmp_path / "detector.safetensors"
    model = {"name": "ssd_mobilenet_v1", "width": 0.25, "routing": "fc", "experts": 2, "num_classes": 3}
    save_weights(path, source.state_dict(), Card(model))
    same = tiny(2, pretrained=path)
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in same.state_dict().items())
    with pytest.raises(ValueError, match=r"classes\.weight"):
        tiny(2, num_classes=5, pretrained=path)
    other = tiny(2, num_classes=5, pretrained=path, new_classifier=True)
    assert torch.equal(other.head.predictors[0].boxes.weight, source.head.predictors[0].boxes.weight)
    with pytest.raises(ValueError, match="width"):
        tiny(2, width=0.5, pretrained=path)
    # Boxes of other anchors have other codes; epsilon and padding come with the weights.
    save_weights(path, source.state_dict(), Card({**model, "min_scale": 0.1}))
    with pytest.raises(ValueError, match=r"min_scale=0\.1 in the file, 0\.2 asked for"):
        tiny(2, pretrained=path)
    save_weights(path, source.state_dict(), Card({**model, "timm_options": {"bn_eps": 0.01}}))
    assert {m.eps for m in tiny(2, pretrained=path).modules() if isinstance(m, torch.nn.BatchNorm2d)} == {0.01}
    static = tiny(0)
    save_weights(path, static.state_dict(), Card({**model, "experts": 0}))
    with pytest.raises(ValueError, match="a static detector, which cannot get experts"):
        tiny(2, pretrained=path)


def test_another_temperature_is_kept_though_the_detectors_file_has_one(tmp_path: Path) -> None:
    """In the backbone and the head; one that a schedule has changed stays unless another was asked for."""
    options = {"routing": "softmax", "condconv_extras": True}
    source = tiny(2, **options)
    routers = [module for module in source.modules() if isinstance(module, SoftmaxRouter)]
    for router in routers:
        router.set_temperature(0.5)
    model = {"name": "ssd_mobilenet_v1", "width": 0.25, "experts": 2, "num_classes": 3, "temperature": 1.0}
    path = save_weights(tmp_path / "detector.safetensors", source.state_dict(), Card(model))

    def temperatures(asked: float) -> list[float]:
        state = tiny(2, **options, temperature=asked, pretrained=path).state_dict()
        return [pytest.approx(float(value)) for key, value in state.items() if key.endswith("temperature")]

    assert temperatures(0.1) == [0.1] * len(routers)
    assert temperatures(1.0) == [0.5] * len(routers)


def test_freezing_the_backbone_leaves_experts_and_the_head() -> None:
    net = tiny(2, freeze="backbone")
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    assert {name for name, _ in net.head.named_parameters()} <= {n.removeprefix("head.") for n in trained}
    assert "backbone.conv_stem.weight" not in trained and any(".router." in name for name in trained)
    before = net.backbone.bn1.running_mean.clone(), net.head.extras[0].down_norm.running_mean.clone()
    net.train()(torch.randn(2, 3, 64, 64))
    assert torch.equal(net.backbone.bn1.running_mean, before[0])
    assert not torch.equal(net.head.extras[0].down_norm.running_mean, before[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "ssd_mobilnet_v1"}, "unknown detector"),
        ({"name": "mobilenet_v1"}, "unknown detector"),
        ({"loss": "mse"}, "unknown detection loss"),
        ({"num_classes": 0}, "num_classes"),
        ({"strides": [16, 64]}, r"maps of strides \[2, 4, 8, 16, 32\]"),
        ({"strides": [32, 16]}, "not possible"),
        ({"num_maps": 7}, "num_maps must be 2 to 6"),
        ({"detections": 0}, "detections"),
        ({"iou_threshold": 0.0}, "iou_threshold"),
    ],
)
def test_mistakes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_detector(**{"experts": 0, "width": 0.25, "image_size": 64, **options})


def test_images_of_another_size() -> None:
    with pytest.raises(ValueError, match="images of 96x96 pixels, but the anchors were made for 64"):
        tiny(0).eval()(torch.zeros(1, 3, 96, 96))


def test_every_backbone_has_a_detector() -> None:
    assert len(list_detectors()) == len(list_backbones())
