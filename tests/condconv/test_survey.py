"""The survey of a network's routing against everything recorded and computed at once; its memory is bounded."""

from __future__ import annotations

import resource
from collections.abc import Iterator

import pytest
import torch
from small_networks import SmallNet
from torch import Tensor, nn

from condconv.ablation import Ablation, evaluate_ablations
from condconv.convert import convert
from condconv.layers import CondConv2d
from condconv.routing import FCRouter
from condconv.survey import catch_routing, survey_routing


@pytest.fixture
def network() -> nn.Module:
    net = SmallNet(num_classes=5)
    convert(net, 3, blocks=("blocks.1.*",), classifier="classifier", router_gain=2.0)
    return net.eval()


def batches_of(images: Tensor, labels: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(images.split(size), labels.split(size), strict=True))


@torch.no_grad()
def test_a_survey_equals_everything_at_once(network: nn.Module) -> None:
    images, labels = torch.randn(23, 3, 16, 16), torch.randint(0, 5, (23,))
    batches = batches_of(images, labels, 6)
    survey = survey_routing(network, batches, 5, keep=4, to_thumbnails=lambda x: x[:, :, 0, 0], sample_size=10)
    with catch_routing(network) as caught:
        logits = network(images)
    assert [router.name for router in survey.routers] == list(caught) == ["blocks.1.0", "blocks.1.1", "classifier"]
    assert survey.num_examples == 23 and survey.num_correct == int((logits.argmax(1) == labels).sum())
    for router in survey.routers:
        weights = caught[router.name]
        torch.testing.assert_close(router.summary.mean.float(), weights.mean(0), atol=1e-5, rtol=1e-4)
        top = weights.topk(4, 0)
        assert router.top_indices.tolist() == top.indices.T.tolist()
        torch.testing.assert_close(survey.sample_of(router.name), weights[:10], atol=1e-5, rtol=1e-4)
        assert router.classes.counts.tolist() == torch.bincount(labels, minlength=5).tolist()
    assert torch.equal(survey.sample_labels, labels[:10])
    kept = {index for router in survey.routers for index in router.top_indices.flatten().tolist()}
    assert set(survey.thumbnails) == set(survey.labels) == kept and len(kept) < 23
    for index, picture in survey.thumbnails.items():
        assert torch.equal(picture, images[index, :, 0, 0]) and survey.labels[index] == int(labels[index])


def test_labels_of_all_kept_examples_and_pictures_of_chosen_layers(network: nn.Module) -> None:
    """Tables name every kept example, also of the layers of which nothing is drawn."""
    labels = torch.randint(0, 5, (23,))
    batches = batches_of(torch.randn(23, 3, 16, 16), labels, 6)
    options = {"keep": 2, "thumbnails_for": lambda name: name == "classifier", "to_thumbnails": lambda x: x}
    survey = survey_routing(network, batches, 5, **options)
    kept = {router.name: set(router.top_indices.flatten().tolist()) for router in survey.routers}
    assert survey.labels == {index: int(labels[index]) for index in set().union(*kept.values())}
    assert set(survey.thumbnails) == kept["classifier"] != set(survey.labels)


def test_pictures_of_chosen_layers_and_fewer_images_than_asked_for(network: nn.Module) -> None:
    batches = batches_of(torch.randn(3, 3, 16, 16), torch.tensor([0, -1, 2]), 2)
    survey = survey_routing(network, batches, 5, thumbnails_for=lambda name: False, to_thumbnails=lambda x: x)
    assert survey.thumbnails == {} and survey.routers[0].top_indices[:, 3:].eq(-1).all()
    assert survey.routers[0].classes.counts.tolist() == [1, 0, 1, 0, 0]


def test_networks_that_do_not_classify_and_data_without_labels(network: nn.Module) -> None:
    batches = batches_of(torch.randn(4, 3, 16, 16), torch.full((4,), -1), 2)
    survey = survey_routing(network, batches, 7)
    assert survey.num_correct is None and survey.routers[0].classes is None


@pytest.mark.parametrize("shared", ["router", "block"])
def test_routers_that_run_more_than_once_in_a_pass_are_refused(shared: str) -> None:
    """One of the calls would stand for all of them."""
    first = CondConv2d(3, 3, 1, num_experts=2)
    second = first if shared == "block" else CondConv2d(3, 3, 1, num_experts=2, router=first.router)
    net = nn.Sequential(first, second, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    batches = [(torch.randn(4, 3, 5, 5), torch.tensor([0, 1, 2, 0]))] * 2
    with pytest.raises(ValueError, match="the router of 0 ran more than once"):
        survey_routing(net, batches, 3)
    with pytest.raises(ValueError, match="the router of 0 ran more than once"):
        evaluate_ablations(net, batches, (Ablation("shuffled"),), {})


def test_mistakes_are_named(network: nn.Module) -> None:
    with pytest.raises(ValueError, match="no CondConv layers"):
        survey_routing(SmallNet(), [], 5)
    with pytest.raises(ValueError, match="no images"):
        survey_routing(network, [], 5)


class SyntheticRouting(nn.Module):
    """Thirty routers of 32 experts on random features: the size of a large network over ImageNet's validation set."""

    def __init__(self) -> None:
        super().__init__()
        self.routers = nn.ModuleList(FCRouter(4, 32, gain=1.0) for _ in range(30))

    def forward(self, x: Tensor) -> Tensor:
        for router in self.routers:
            router(x)
        return x


def resident_mb() -> float:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


def test_memory_is_bounded_on_50_000_images_of_30_layers_and_32_experts() -> None:
    """All weights would take 192 MB in float32; the survey takes a small part of it, and none more with each image."""
    sizes: list[float] = []

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(50):
            sizes.append(resident_mb())
            yield torch.randn(1000, 4), torch.randint(0, 1000, (1000,))

    survey = survey_routing(SyntheticRouting().eval(), batches(), 1000, keep=10, sample_size=2000)
    assert survey.num_examples == 50_000 and len(survey.routers) == 30
    assert survey.sample.shape == (2000, 960)
    assert max(sizes) - sizes[0] < 96  # sums by class 16 MB, the sample 8 MB, temporary tensors of a batch
    assert sizes[-1] - sizes[10] < 16  # flat once the sums are there
