"""Changed routing on a network made by hand, where the answer is known."""

from __future__ import annotations

import math

import pytest
import torch
from small_networks import SmallNet
from torch import Tensor, nn

from condconv.ablation import (
    MEAN,
    REMOVED,
    SHUFFLED,
    TOP,
    Ablation,
    AblationResult,
    changed_routing,
    evaluate_ablations,
    list_ablations,
)
from condconv.layers import CondLinear

LABELS = torch.tensor([0, 1, 2, 3, 1, 1, 2, 1])
MEANS = {"0": torch.bincount(LABELS, minlength=4) / len(LABELS)}


@pytest.fixture
def network() -> nn.Module:
    """Each class has an expert of its own, which says that class; the router sees the class in the input."""
    layer = CondLinear(4, 4, num_experts=4)
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.copy_(torch.eye(4))
        layer.router.fc.weight.copy_(60 * torch.eye(4))
        layer.router.fc.bias.fill_(-30)
    return nn.Sequential(layer).eval()


def evaluate(network: nn.Module, *ablations: Ablation, labels: Tensor = LABELS) -> list[AblationResult]:
    batches = [(torch.eye(4)[part], part) for part in labels.split(8)]
    return list(evaluate_ablations(network, batches, ablations, MEANS))


def test_the_undisturbed_network_comes_first(network: nn.Module) -> None:
    (base,) = evaluate(network)
    assert base.name == "undisturbed" and base.accuracy == base.agreement == 1 and base.difference == 0
    assert base.loss == pytest.approx(float(nn.functional.cross_entropy(torch.eye(4)[LABELS], LABELS)))


def test_shuffled_routing_says_the_class_of_another_image(network: nn.Module) -> None:
    _, shuffled = evaluate(network, Ablation(SHUFFLED))
    right = (LABELS.roll(1) == LABELS).float()
    assert shuffled.accuracy == shuffled.agreement == float(right.mean()) == 1 / 8
    assert shuffled.difference == -7 / 8
    # Seven differences of -1 and one of 0.
    assert shuffled.interval == pytest.approx(1.96 * float((right - 1).std(correction=0)) / math.sqrt(8))


def test_mean_routing_says_the_commonest_class(network: nn.Module) -> None:
    assert evaluate(network, Ablation(MEAN))[1].accuracy == 4 / 8


def test_removing_an_expert_costs_its_class(network: nn.Module) -> None:
    removed = evaluate(network, *(Ablation(REMOVED, expert=expert) for expert in range(4)))[1:]
    assert [result.difference for result in removed] == [-1 / 8, -4 / 8, -2 / 8, -1 / 8]


def test_the_top_experts_suffice_and_sums_are_kept_if_wanted(network: nn.Module) -> None:
    top = evaluate(network, Ablation(TOP, k=1), Ablation(TOP, k=1, renormalized=True))[1:]
    assert [result.accuracy for result in top] == [1, 1]
    routing = torch.tensor([[0.2, 0.8, 0.6]])
    cut = Ablation(TOP, k=2).change({}, {})("0", routing)
    kept = Ablation(TOP, k=2, renormalized=True).change({}, {})("0", routing)
    torch.testing.assert_close(cut, torch.tensor([[0.0, 0.8, 0.6]]))
    torch.testing.assert_close(kept, cut * 1.6 / 1.4)


# As in LABELS, but two images are called what they are not: accuracy and agreement are different things.
WRONG_LABELS = torch.tensor([1, 1, 2, 0, 1, 1, 2, 1])


def evaluate_in(network: nn.Module, sizes: tuple[int, ...], *ablations: Ablation) -> list[AblationResult]:
    """On the first images, in batches of these sizes."""
    count = sum(sizes)
    batches = zip(torch.eye(4)[LABELS[:count]].split(sizes), WRONG_LABELS[:count].split(sizes), strict=True)
    return list(evaluate_ablations(network, list(batches), ablations, MEANS))


def assert_same_results(found: list[AblationResult], expected: list[AblationResult]) -> None:
    assert [result.name for result in found] == [result.name for result in expected]
    for result, other in zip(found, expected, strict=True):
        assert result.num_examples == other.num_examples
        for figure in ("accuracy", "difference", "interval", "loss", "agreement"):
            assert getattr(result, figure) == pytest.approx(getattr(other, figure)), (figure, result.name)


@pytest.mark.parametrize("sizes", [(3, 3, 2), (4, 4)], ids=str)
def test_batches_add_up(network: nn.Module, sizes: tuple[int, ...]) -> None:
    changes = (Ablation(MEAN), Ablation(TOP, k=1), Ablation(REMOVED, expert=1))
    whole = evaluate_in(network, (8,), *changes)
    assert [(result.accuracy, result.agreement) for result in whole[:2]] == [(6 / 8, 1), (5 / 8, 4 / 8)]
    assert whole[1].interval > 0 and whole[1].num_examples == 8
    assert_same_results(evaluate_in(network, sizes, *changes), whole)


def test_a_batch_of_one_image_is_left_out(network: nn.Module) -> None:
    changes = (Ablation(SHUFFLED), Ablation(MEAN))
    whole = evaluate_in(network, (7,), *changes)
    assert whole[0].num_examples == 7
    assert_same_results(evaluate_in(network, (7, 1), *changes), whole)


def test_routing_is_shuffled_within_a_batch(network: nn.Module) -> None:
    _, shuffled = evaluate_in(network, (4, 4), Ablation(SHUFFLED))
    said = torch.cat([part.roll(1) for part in LABELS.split(4)])
    assert shuffled.agreement == float((said == LABELS).float().mean()) == 2 / 8
    assert shuffled.accuracy == float((said == WRONG_LABELS).float().mean())


def test_networks_that_are_compiled_already_are_changed_too(network: nn.Module) -> None:
    """Dynamo does not look for hooks again: without them every change would look harmless."""
    expected = evaluate(network, Ablation(SHUFFLED), Ablation(MEAN))
    network.compile(backend="eager")
    with torch.no_grad():
        network(torch.eye(4)[LABELS])
    assert evaluate(network, Ablation(SHUFFLED), Ablation(MEAN)) == expected


def test_changes_of_one_layer_leave_the_others_alone(network: nn.Module) -> None:
    assert evaluate(network, Ablation(SHUFFLED, layer="elsewhere"))[1].accuracy == 1
    assert evaluate(network, Ablation(SHUFFLED, layer="0"))[1].accuracy == 1 / 8


def test_the_network_is_left_as_it_was(network: nn.Module) -> None:
    images = torch.eye(4)
    before = network(images)
    with pytest.raises(KeyError), changed_routing(network, lambda name, routing: {}[name]):
        network(images)
    assert torch.equal(network(images), before) and not network[0].router._forward_hooks
    with changed_routing(network, lambda name, routing: routing * 0):
        assert network(images).abs().max() == 0


def test_the_list_has_what_was_asked_for() -> None:
    experts = {"a": 2, "b": 4}
    found = list_ablations(experts, top_k=(1, 4), renormalize=(False,), expert_layers=["b"])
    names = [str(ablation) for ablation in found]
    assert names[:7] == [
        "shuffled routing",
        "mean routing",
        "top 1, others zero",
        *(f"without expert {expert}" for expert in range(4)),
    ]
    assert names[7:11] == ["shuffled routing in a", "shuffled routing in b", "mean routing in a", "mean routing in b"]
    assert names[11:] == [f"without expert {expert} in b" for expert in range(4)]
    assert len(list_ablations(experts, top_k=(), by_layer=False)) == 6


def test_mistakes_are_named(network: nn.Module) -> None:
    with pytest.raises(ValueError, match="no CondConv layers"):
        evaluate_ablations(SmallNet(), [(torch.zeros(2, 3, 8, 8), LABELS[:2])], (), {})
    with pytest.raises(ValueError, match="at least two"):
        evaluate(network, labels=LABELS[:1])
