"""One pass over a data set that gathers everything about its routing: by layer, by class, and the images at the top.

Memory is bounded whatever the number of images: sums by layer, expert and class, the few images that activate each
expert most, and the routing weights of a sample. Letters: N examples, E experts, L classes, K images kept, D experts of
all routers together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from condconv.analysis import ClassStatistics, ClassSummary, RoutingStatistics, RoutingSummary
from condconv.recording import hooks_run, routers_of
from condconv.routing import Router, SoftmaxRouter

SAMPLE_BYTES = 64 * 2**20
"""The sample of routing weights is never larger."""


class TopExamples:
    """The K examples with the largest weight of each expert of one router, whatever the number of examples."""

    def __init__(self, num_experts: int, keep: int) -> None:
        self.weights = torch.full((num_experts, keep), -torch.inf)
        self.indices = torch.full((num_experts, keep), -1, dtype=torch.long)

    def update(self, routing_NE: Tensor, indices_N: Tensor) -> None:
        """Compare a batch, [N, E], whose examples have these numbers (int64 [N], none seen before)."""
        weights = torch.cat([self.weights, routing_NE.T.float().cpu()], 1)
        indices = torch.cat([self.indices, indices_N.cpu().expand(len(weights), -1)], 1)
        self.weights, order = weights.topk(self.weights.shape[1], 1)
        self.indices = indices.gather(1, order)

    def referenced(self) -> set[int]:
        """Numbers of the examples that are among the top of some expert."""
        return set(self.indices.flatten().tolist()) - {-1}


@dataclass(frozen=True)
class RouterSurvey:
    """What was seen of one router.

    Attributes:
        name: its block ("blocks.4.0") or layer ("classifier").
        summary: statistics over all examples.
        classes: statistics by class; None if no example had a label.
        top_weights, top_indices: [E, K] largest weights and the numbers of their examples, -inf and -1 where there were
            fewer examples.
    """

    name: str
    summary: RoutingSummary
    classes: ClassSummary | None
    top_weights: Tensor
    top_indices: Tensor

    @property
    def num_experts(self) -> int:
        return len(self.summary.mean)


@dataclass(frozen=True)
class RoutingSurvey:
    """Everything about the routing of a network on a data set.

    Attributes:
        routers: in the order of execution.
        num_examples: examples seen.
        num_correct: of them, those whose label got the largest output; None if the network does not classify.
        sample: [S, D] routing weights of the first S examples, all routers side by side, float32.
        sample_labels: [S], -1 for none.
        labels: of the examples kept for some expert, by their number.
        thumbnails: pictures of those kept by the routers that were to have some, as `to_thumbnails` made them.
    """

    routers: tuple[RouterSurvey, ...]
    num_examples: int
    num_correct: int | None
    sample: Tensor
    sample_labels: Tensor
    labels: dict[int, int] = field(default_factory=dict)
    thumbnails: dict[int, Tensor] = field(default_factory=dict)

    def sample_of(self, name: str) -> Tensor:
        """[S, E] sampled routing weights of a router."""
        first = 0
        for router in self.routers:
            if router.name == name:
                return self.sample[:, first : first + router.num_experts]
            first += router.num_experts
        raise KeyError(name)


@contextmanager
def catch_routing(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Yields a dictionary that holds, after a forward pass, each router's weights [N, E] in the order of execution.

    Raises:
        ValueError: the network has no router; in the forward pass, a router runs twice, so that images have two rows.
    """
    caught: dict[str, Tensor] = {}
    names = {router: name for name, router in routers_of(model).items()}

    def forget(model: nn.Module, args: tuple[Any, ...]) -> None:
        caught.clear()

    def hook(router: Router, args: tuple[Any, ...], output: Tensor) -> None:
        name = names[router]
        if name in caught:
            raise ValueError(
                f"the router of {name} ran more than once in a forward pass, so it has no one routing of an image. "
                "Layers that share a router module, and blocks that are used several times, cannot be looked at"
            )
        caught[name] = output.detach()

    handles = [router.register_forward_hook(hook) for router in names]
    with hooks_run([model.register_forward_pre_hook(forget), *handles]):
        yield caught


class _Accumulator:
    """The statistics of one router, and where its weights lie in the sample."""

    def __init__(self, router: Router, num_classes: int, keep: int, num_bins: int) -> None:
        self.statistics = RoutingStatistics(isinstance(router, SoftmaxRouter), num_bins)
        self.classes = ClassStatistics(num_classes)
        self.labelled = False
        self.top = TopExamples(router.num_experts, keep)

    def update(self, routing_NE: Tensor, labels_N: Tensor, indices_N: Tensor) -> None:
        self.statistics.update(routing_NE)
        if bool((labels_N >= 0).any()):
            self.classes.update(routing_NE, labels_N)
            self.labelled = True
        self.top.update(routing_NE, indices_N)

    def result(self, name: str) -> RouterSurvey:
        classes = self.classes.compute() if self.labelled else None
        return RouterSurvey(name, self.statistics.compute(), classes, self.top.weights, self.top.indices)


@torch.no_grad()
def survey_routing(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    num_classes: int,
    *,
    keep: int = 10,
    thumbnails_for: Callable[[str], bool] | None = None,
    to_thumbnails: Callable[[Tensor], Tensor] | None = None,
    sample_size: int = 2000,
    num_bins: int = 50,
) -> RoutingSurvey:
    """Run a network over a data set and gather its routing.

    Args:
        model: images -> logits `[N, num_classes]`, or anything else (then nothing is said about accuracy); it runs in
            the mode that it is in: call `eval()` first.
        batches: (images, labels int64 [N], negative for none), on the model's device and in random order, so that the
            first ones are a fair sample.
        num_classes: number of labels.
        keep: images kept of each expert.
        thumbnails_for: of which routers' top images to keep the pictures; None for all.
        to_thumbnails: images `[N, ...]` -> pictures `[N, ...]` on the CPU; None keeps none.
        sample_size: largest number of examples in the sample of routing weights (and at most `SAMPLE_BYTES`).
        num_bins: of the histograms.

    Raises:
        ValueError: the network has no router, one that runs several times in a forward pass, or no batch came.
    """
    parts: dict[str, _Accumulator] = {}
    routers = routers_of(model)
    sample_size = max(2, min(sample_size, SAMPLE_BYTES // (4 * sum(r.num_experts for r in routers.values()))))
    sample: list[tuple[Tensor, Tensor]] = []
    labels_kept: dict[int, int] = {}
    thumbnails: dict[int, Tensor] = {}
    seen, correct, classifies = 0, 0, True
    with catch_routing(model) as routing:
        for images, labels in batches:
            outputs = model(images)
            indices = torch.arange(seen, seen + len(labels))
            for name, weights in routing.items():
                if name not in parts:
                    parts[name] = _Accumulator(routers[name], num_classes, keep, num_bins)
                parts[name].update(weights, labels, indices)
            # Of all routers: labels take no room, and tables name every kept example.
            rows = _renew(labels_kept, [part.top for part in parts.values()], seen)
            labels_kept.update(zip((seen + row for row in rows), labels[rows].tolist(), strict=True))
            if to_thumbnails is not None:
                shown = [part.top for name, part in parts.items() if thumbnails_for is None or thumbnails_for(name)]
                _keep_pictures(thumbnails, shown, images, seen, to_thumbnails)
            if seen < sample_size:
                side_by_side = torch.cat(list(routing.values()), 1)[: sample_size - seen].float().cpu()
                sample.append((side_by_side, labels[: len(side_by_side)].cpu()))
            classifies &= isinstance(outputs, Tensor) and outputs.shape == (len(labels), num_classes)
            correct += int((outputs.argmax(1) == labels).sum()) if classifies else 0
            seen += len(labels)
    if not seen:
        raise ValueError("there are no images to look at")
    surveys = tuple(part.result(name) for name, part in parts.items())
    sampled, sampled_labels = (torch.cat(values) for values in zip(*sample, strict=True))
    return RoutingSurvey(
        surveys, seen, correct if classifies else None, sampled, sampled_labels, labels_kept, thumbnails
    )


def _renew(kept: dict[int, Any], tops: list[TopExamples], first: int) -> list[int]:
    """Drop what is kept of examples that left the top of every expert; the rows of the batch that are to be added.

    Args:
        kept: by the example's number; changed in place.
        tops: of the routers that count.
        first: number of the batch's first example.
    """
    wanted: set[int] = set().union(*(top.referenced() for top in tops))
    for index in kept.keys() - wanted:
        del kept[index]
    return sorted(index - first for index in wanted if index >= first)


def _keep_pictures(
    thumbnails: dict[int, Tensor],
    tops: list[TopExamples],
    images: Tensor,
    first: int,
    to_thumbnails: Callable[[Tensor], Tensor],
) -> None:
    rows = _renew(thumbnails, tops, first)
    if rows:
        # Clones: rows of one tensor would keep all of it alive.
        thumbnails.update((first + row, p.clone()) for row, p in zip(rows, to_thumbnails(images[rows]), strict=True))
