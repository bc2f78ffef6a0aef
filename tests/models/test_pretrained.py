"""Weights into networks: published, static, ours; every backbone, upcycled, computes what its static twin did."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch import Tensor, nn

import models.weights
from condconv.files import save_sealed
from condconv.layers import CondConv2d, CondLinear
from models import create_model, list_backbones
from models.pretrained import PUBLISHED, open_network, save_for_timm
from models.weights import Card, Weights, read_weights, save_weights

X = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(5))
OTHERS = [  # timm's networks that are not on our list
    ("convnext_atto", "stages.3.*", True),
    ("mobilenetv3_small_050", "blocks.[345].*", True),
    ("regnety_002", "s4.*", True),
]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).detach().square().mean().sqrt() / expected.detach().square().mean().sqrt())


def saved(network: nn.Module, folder: Path) -> str:
    """A file of the network's weights, with BatchNorm statistics as after training."""
    with torch.no_grad():
        network.train()(X)
    torch.save(network.state_dict(), folder / "static.pth")
    return str(folder / "static.pth")


def assert_unchanged(network: nn.Module, static: nn.Module) -> None:
    assert any(isinstance(m, CondConv2d | CondLinear) for m in network.modules())
    with torch.no_grad():
        for training in (False, True):  # training last: it moves the statistics
            expected = static.train(training)(X)
            assert relative_error(network.train(training)(X), expected) <= 1e-5, f"training={training}"


@pytest.mark.parametrize("name", list_backbones())
def test_every_backbone_keeps_its_output_when_upcycled(name: str, tmp_path: Path) -> None:
    options = {} if name.startswith("res") else {"width": 0.5}
    static = create_model(name, 10, 0, **options)
    path = saved(static, tmp_path)
    assert_unchanged(create_model(name, 10, 4, init="upcycle", pretrained=path, **options), static)


@pytest.mark.parametrize(("arch", "pattern", "classifier"), OTHERS)
def test_networks_of_timm_keep_their_output_when_upcycled(
    arch: str, pattern: str, classifier: bool, tmp_path: Path
) -> None:
    static = timm.create_model(arch, num_classes=10)
    path = saved(static, tmp_path)
    options = {"arch": arch, "pattern": pattern, "classifier": classifier, "init_noise": 0.5}
    network = create_model("timm", 10, 3, init="upcycle", pretrained=path, **options)
    assert_unchanged(network, static)


@pytest.mark.parametrize(
    ("constructor", "name"),
    [
        (torchvision.models.resnet18, "resnet18"),
        (torchvision.models.mobilenet_v2, "mobilenet_v2"),
        (torchvision.models.efficientnet_b0, "efficientnet_b0"),
    ],
)
def test_static_networks_of_torchvision(constructor: type, name: str, tmp_path: Path) -> None:
    theirs = constructor(num_classes=10)
    for module in theirs.modules():  # torchvision's dropouts are not ours
        if isinstance(module, nn.Dropout | torchvision.ops.StochasticDepth):
            module.p = 0.0
    path = saved(theirs, tmp_path)
    assert_unchanged(create_model(name, 10, 2, init="upcycle", pretrained=path), theirs)


def test_a_file_of_timms_condconv_network_brings_its_padding_and_epsilon(tmp_path: Path) -> None:
    theirs = timm.create_model("tf_efficientnet_cc_b0_4e", num_classes=10)
    path = saved(theirs, tmp_path)
    network = create_model("efficientnet_b0", 10, 4, pretrained=path)
    assert network.normalization == "half"  # (x - 127.5) / 127.5, timm's mean and deviation 0.5
    assert network.blocks[5][0].conv_dw.padding == "same_tf" and network.bn1.eps == 1e-3
    with torch.no_grad():
        assert relative_error(network.eval()(X), theirs.eval()(X)) < 1e-5
    with pytest.raises(ValueError, match="has 4 experts per layer, the network 8"):
        create_model("efficientnet_b0", 10, 8, pretrained=path)
    with pytest.raises(ValueError, match="has experts already; init='upcycle' is for weights of static networks"):
        create_model("efficientnet_b0", 10, 4, pretrained=path, init="upcycle")
    with pytest.raises(ValueError, match=r"2 of another shape: classifier\.weight \[10, 1280\], in the network \[7"):
        create_model("efficientnet_b0", 7, 4, pretrained=path)
    other = create_model("efficientnet_b0", 7, 4, pretrained=path, new_classifier=True)
    assert torch.equal(other.conv_stem.weight, theirs.conv_stem.weight) and other.classifier.out_features == 7


def test_files_for_timm_load_there_or_are_not_written(tmp_path: Path) -> None:
    settings = {"name": "efficientnet_b0", "num_classes": 10, "experts": 4}
    network = create_model(**settings)
    name = save_for_timm(network, settings, tmp_path / "new" / "timm.pth")
    assert name == "efficientnet_cc_b0_4e"
    state = torch.load(tmp_path / "new" / "timm.pth", weights_only=True)
    with torch.device("meta"):
        theirs = timm.create_model(name, num_classes=10)
    theirs.load_state_dict(state, assign=True)
    assert torch.equal(theirs.blocks[4][0].routing_fn.weight, network.blocks[4][0].router.fc.weight)
    elsewhere = create_model(**settings, last_blocks=1)
    with pytest.raises(ValueError, match=r"efficientnet_cc_b0_4e has experts in other layers.*missing: blocks\.4"):
        save_for_timm(elsewhere, settings, tmp_path / "other" / "timm.pth")
    assert not (tmp_path / "other").exists()


def test_published_weights_come_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = timm.create_model("tf_efficientnet_cc_b1_8e")
    safetensors.torch.save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    asked = []

    def fetch(repository: str) -> Path:
        asked.append(repository)
        return tmp_path / "model.safetensors"

    monkeypatch.setattr(models.weights, "download", fetch)
    network = create_model("efficientnet_b0_depth", 1000, 8, pretrained="published")
    assert asked == ["timm/tf_efficientnet_cc_b1_8e.in1k"] == [PUBLISHED["efficientnet_b0_depth", 8]]
    assert torch.equal(network.classifier.weight, theirs.classifier.weight)
    with pytest.raises(ValueError, match="no weights of resnet18 with 8 experts were published; there are effic"):
        create_model("resnet18", 1000, 8, pretrained="published")


def test_an_unreachable_hub_is_explained() -> None:
    with pytest.raises(FileNotFoundError, match=r"cannot fetch model\.safetensors of nobody/nothing .* give its path"):
        read_weights("hf-hub:nobody/nothing")  # tests run with HF_HUB_OFFLINE=1


def test_static_weights_need_a_way_to_become_experts(tmp_path: Path) -> None:
    path = saved(create_model("mobilenet_v1", 10, 0, width=0.25), tmp_path)
    with pytest.raises(ValueError, match=r"holds a static network: .*condconv\.init=upcycle"):
        create_model("mobilenet_v1", 10, 4, width=0.25, pretrained=path)
    with pytest.raises(ValueError, match="so nothing was loaded"):
        create_model("mobilenet_v1", 10, 0, width=0.5, pretrained=path)
    static = create_model("mobilenet_v1", 10, 0, width=0.25, pretrained=path)
    assert torch.equal(static.conv_stem.weight, torch.load(path, weights_only=True)["conv_stem.weight"])
    with pytest.raises(FileNotFoundError, match="there are no weights at elsewhere"):
        create_model("mobilenet_v1", 10, 0, pretrained="elsewhere")


def test_our_files_say_which_network_they_are_of(tmp_path: Path) -> None:
    settings = {"name": "mobilenet_v1", "num_classes": 10, "experts": 2, "width": 0.25, "routing": "softmax"}
    network = create_model(**settings)
    path = save_weights(
        tmp_path / "net.safetensors", network.state_dict(), Card(settings, "half", 32, class_names=tuple("abc"))
    )
    weights = read_weights(path)
    assert weights.card == Card(settings, "half", 32, class_names=("a", "b", "c")) and weights.normalization == "half"
    again = create_model(**settings, pretrained=path)
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in again.state_dict().items())
    with pytest.raises(ValueError, match=r"is of another network.*width=0\.25 in the file, 1\.0 asked for"):
        create_model("mobilenet_v1", 10, 2, routing="softmax", pretrained=path)
    with pytest.raises(ValueError, match="routing='softmax' in the file, 'fc' asked for"):
        create_model("mobilenet_v1", 10, 2, width=0.25, pretrained=path)
    metadata = {"condconv": json.dumps({**weights.card.to_dict(), "format": 99, "version": "7.0"})}
    safetensors.torch.save_file(weights.state, tmp_path / "newer.safetensors", metadata)
    with pytest.raises(ValueError, match=r"was written by condconv 7\.0 in file format 99; .* Update condconv"):
        read_weights(tmp_path / "newer.safetensors")


def test_another_temperature_is_kept_though_the_file_has_one(tmp_path: Path) -> None:
    settings = {"name": "mobilenet_v1", "num_classes": 10, "experts": 2, "width": 0.25, "routing": "softmax"}
    state = create_model(**settings, temperature=2.0).state_dict()
    path = save_weights(tmp_path / "net.safetensors", state, Card({**settings, "temperature": 2.0}))

    def temperatures(**options: float) -> set[float]:
        network = create_model(**settings, pretrained=path, **options)
        return {float(value) for key, value in network.state_dict().items() if key.endswith("temperature")}

    assert temperatures(temperature=0.5) == {0.5} and temperatures(temperature=2.0) == {2.0}


def test_new_classifiers_are_drawn_and_trained_ones_stay(tmp_path: Path) -> None:
    """Upcycled, a new one has the static network's output; otherwise its first expert is the static network's."""

    def build(experts: int, **options: object) -> nn.Module:
        torch.manual_seed(0)
        return create_model("mobilenet_v1", experts=experts, width=0.25, classifier_std=0.05, **options)

    path = saved(create_model("mobilenet_v1", 10, 0, width=0.25), tmp_path)
    static = build(0, num_classes=7, pretrained=path, new_classifier=True)
    assert 0.04 < float(static.classifier.weight.detach().std()) < 0.06 and not static.classifier.bias.any()
    upcycled = build(4, num_classes=7, pretrained=path, new_classifier=True, init="upcycle")
    assert_unchanged(upcycled, static)
    whole = build(0, num_classes=10, pretrained=path)
    assert_unchanged(build(4, num_classes=10, pretrained=path, init="upcycle"), whole)

    trained = create_model("mobilenet_v1", 10, 4, width=0.25)
    path = saved(trained, tmp_path)
    other = build(4, num_classes=7, pretrained=path, new_classifier=True).classifier.weight.detach()
    assert torch.equal(other[0], static.classifier.weight)
    assert all(0.04 < float(expert.std()) < 0.06 for expert in other)
    again = build(4, num_classes=10, pretrained=path)
    assert torch.equal(again.classifier.weight, trained.classifier.weight)


def test_damaged_checkpoints_are_refused_and_older_ones_taken(tmp_path: Path) -> None:
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    network = create_model("mobilenet_v1", 10, 0, width=0.25)
    for _ in range(2):
        save_sealed(network.state_dict(), last, keep=2)
    data = bytearray(last.read_bytes())
    data[len(data) // 2] ^= 1
    last.write_bytes(data)
    with pytest.raises(ValueError, match=r"last\.ckpt is damaged: its checksum"):
        read_weights(last)
    assert read_weights(tmp_path / "run").source == str(last.with_name("last-1.ckpt"))
    last.with_name("last-1.ckpt").unlink()
    with pytest.raises(FileNotFoundError, match=r"there are no weights at .*run: last\.ckpt are damaged"):
        read_weights(tmp_path / "run")


def test_networks_are_opened_on_any_machine() -> None:
    settings = {"name": "mobilenet_v1", "num_classes": 10, "experts": 2, "width": 0.25}
    weights = Weights("file", create_model(**settings).state_dict(), Card({**settings, "backend": "triton_pointwise"}))
    with torch.no_grad():
        assert open_network(weights)(torch.randn(1, 3, 32, 32)).shape == (1, 10)


def test_files_that_hold_code_or_nothing_are_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "module.pth")  # a pickled module would run code
    with pytest.raises(ValueError, match="without running code in it"):
        read_weights(tmp_path / "module.pth")
    torch.save({"epoch": 3}, tmp_path / "none.pth")
    with pytest.raises(ValueError, match="holds no state dict"):
        read_weights(tmp_path / "none.pth")
    (tmp_path / "cut.safetensors").write_bytes(b"12345")
    with pytest.raises(ValueError, match="is not a safetensors file, or it is truncated"):
        read_weights(tmp_path / "cut.safetensors")


@pytest.mark.parametrize("wrap", [lambda s: {"state_dict": s}, lambda s: {"model": s, "epoch": 1}, lambda s: s])
def test_wrapped_and_prefixed_state_dicts(wrap: object, tmp_path: Path) -> None:
    state = {"conv.weight": torch.ones(2), "fc.bias": torch.zeros(3)}
    torch.save(wrap({f"module.{name}": value for name, value in state.items()}), tmp_path / "x.pth")
    assert read_weights(tmp_path / "x.pth").state.keys() == state.keys()
