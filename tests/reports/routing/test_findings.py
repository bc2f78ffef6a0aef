"""Which layers, classes and experts are shown, asked for or chosen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from condconv.analysis import ClassStatistics, RoutingStatistics
from condconv.survey import RouterSurvey
from reports.routing.findings import choose_classes, choose_experts, choose_layers

LAYERS = ["blocks.3.0", "blocks.3.1", "blocks.4.0", "classifier"]


def router(routing_NE: Tensor, labels: Tensor, num_classes: int) -> RouterSurvey:
    statistics, classes = RoutingStatistics(), ClassStatistics(num_classes)
    statistics.update(routing_NE)
    classes.update(routing_NE, labels)
    return RouterSurvey("classifier", statistics.compute(), classes.compute(), torch.empty(0), torch.empty(0))


def test_layers() -> None:
    assert choose_layers(LAYERS, "auto") == ("blocks.3.0", "blocks.4.0", "classifier")
    assert choose_layers(["a"], "auto") == ("a",)
    assert choose_layers(LAYERS, ["classifier", "blocks.3.*"]) == ("blocks.3.0", "blocks.3.1", "classifier")
    with pytest.raises(ValueError, match=r"no router fits 'blocks.9.\*'; there are blocks.3.0"):
        choose_layers(LAYERS, "blocks.9.*")


def test_the_most_different_classes() -> None:
    means = torch.tensor([[0.5, 0.5], [0.0, 0.0], [0.52, 0.5], [1.0, 1.0], [1.0, 0.0], [0.0, 0.9], [0.5, 0.48]])
    labels = torch.arange(7).repeat_interleave(5)
    seen = router(means[labels] + 1e-3 * torch.randn(35, 2), labels, 9)
    assert choose_classes(seen, [f"c{i}" for i in range(9)], "auto") == (1, 3, 4, 5)


def test_the_papers_classes_are_taken_where_they_are() -> None:
    names = ["n00000001", "n02690373", "n02110958", "n09246464", "n01443537"]
    labels = torch.arange(5).repeat(3)
    seen = router(torch.rand(15, 2), labels, 5)
    assert choose_classes(seen, names, "auto") == (3, 2, 4, 1)
    assert choose_classes(seen, names, ["plane", "Goldfish", "0"]) == (1, 4, 0)
    with pytest.raises(ValueError, match=r"no class 'n0269037' \(near names: n02690373"):
        choose_classes(seen, names, "n0269037")
    unseen = router(torch.rand(6, 2), torch.tensor([0, 1, 2, 0, 1, 2]), 5)
    assert choose_classes(unseen, names, "auto") == (0, 1, 2)


def test_experts_that_tell_classes_apart_and_differ() -> None:
    labels = torch.arange(2).repeat(50)
    by_class = labels.float() * 0.5
    noise = torch.rand(100)
    # 1 and 2 do the same, 3 is the opposite but weaker, 0 varies most without a word about the class.
    seen = router(torch.stack([noise, by_class, 0.99 * by_class, 0.4 - 0.5 * by_class], 1), labels, 2)
    assert choose_experts(seen, "auto", 2) == (1, 3)
    assert choose_experts(seen, [2, 0]) == (2, 0)
    with pytest.raises(ValueError, match="classifier has no expert 4, they are 0 to 3"):
        choose_experts(seen, [4])
