"""What routing and experts are worth: the network's accuracy when its routing weights are changed on their way.

Letters: N examples, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from condconv.recording import hooks_run, routers_of
from condconv.survey import catch_routing

Change = Callable[[str, Tensor], Tensor]
"""(name of the router's block or layer, its weights [N, E]) -> the weights that the layers get instead."""

SHUFFLED, MEAN, TOP, REMOVED = "shuffled", "mean", "top", "removed"


@contextmanager
def changed_routing(model: nn.Module, change: Change) -> Iterator[None]:
    """While open, every router's weights pass through `change` before the layers of its block get them.

    Routing functions that span the network see the changed weights too: those of a hierarchical router depend on the
    block before.

    Raises:
        ValueError: the network has no router.
    """
    names = {router: name for name, router in routers_of(model).items()}

    def hook(router: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return change(names[router], output).to(output.dtype)  # type: ignore[index]

    with hooks_run([router.register_forward_hook(hook) for router in names]):
        yield


@dataclass(frozen=True)
class Ablation:
    """One change of the routing.

    Attributes:
        kind: "shuffled": every image gets the weights of another image of its batch, in all layers of the same one;
            "mean": the mean weights of the data set; "top": the `k` largest weights of each image, the others zero;
            "removed": the weight of `expert` is zero.
        layer: the router's name; None for all at once.
        k: for "top".
        expert: for "removed".
        renormalized: for "top": what is left is scaled so that the weights of an image keep their sum.
    """

    kind: str
    layer: str | None = None
    k: int = 0
    expert: int = -1
    renormalized: bool = False

    def __str__(self) -> str:
        if self.kind == TOP:
            what = f"top {self.k}" + (", sum kept" if self.renormalized else ", others zero")
        else:
            what = f"without expert {self.expert}" if self.kind == REMOVED else f"{self.kind} routing"
        return what if self.layer is None else f"{what} in {self.layer}"

    def change(self, own: Mapping[str, Tensor], means: Mapping[str, Tensor]) -> Change:
        """The function for `changed_routing`, given the batch's own undisturbed routing and the mean weights."""

        def apply(name: str, routing_NE: Tensor) -> Tensor:
            if self.layer is not None and name != self.layer:
                return routing_NE
            if self.kind == SHUFFLED:
                return own[name].roll(1, 0)
            if self.kind == MEAN:
                return means[name].to(routing_NE).expand_as(routing_NE)
            if self.kind == REMOVED:
                changed = routing_NE.clone()
                changed[:, self.expert : self.expert + 1] = 0  # a slice: nothing where a layer has fewer experts
                return changed
            return self._top(routing_NE)

        return apply

    def _top(self, routing_NE: Tensor) -> Tensor:
        values, experts = routing_NE.topk(min(self.k, routing_NE.shape[1]), 1)
        if self.renormalized:
            values = values * (routing_NE.sum(1, keepdim=True) / values.sum(1, keepdim=True).clamp_min(1e-12))
        return torch.zeros_like(routing_NE).scatter(1, experts, values)


def list_ablations(
    experts: Mapping[str, int],
    *,
    top_k: Sequence[int] = (1, 2, 4),
    renormalize: Sequence[bool] = (True, False),
    by_layer: bool = True,
    expert_layers: Sequence[str] = (),
) -> tuple[Ablation, ...]:
    """All changes worth a look; each costs one forward pass per image.

    Args:
        experts: experts of each router, by its name.
        top_k: of "top"; those that leave every expert in are left out.
        renormalize: of "top".
        by_layer: also "shuffled" and "mean" in each layer alone, and each expert of `expert_layers` removed there.
        expert_layers: names of routers.
    """
    most = max(experts.values())
    found = [Ablation(SHUFFLED), Ablation(MEAN)]
    found += [Ablation(TOP, k=k, renormalized=how) for k in top_k if k < most for how in renormalize]
    found += [Ablation(REMOVED, expert=expert) for expert in range(most)]
    if by_layer:
        found += [Ablation(kind, layer) for kind in (SHUFFLED, MEAN) for layer in experts]
        found += [Ablation(REMOVED, layer, expert=e) for layer in expert_layers for e in range(experts[layer])]
    return tuple(found)


@dataclass(frozen=True)
class AblationResult:
    """What a change did, on the same images as the undisturbed network.

    Attributes:
        ablation: the change; None for the undisturbed network.
        num_examples: images.
        accuracy: share of images whose label got the largest output.
        difference: `accuracy` minus that of the undisturbed network.
        interval: half the width of the difference's 95 % interval, from the images' paired differences.
        loss: mean cross entropy.
        agreement: share of images with the same prediction as without the change.
    """

    ablation: Ablation | None
    num_examples: int
    accuracy: float
    difference: float
    interval: float
    loss: float
    agreement: float

    @property
    def name(self) -> str:
        return "undisturbed" if self.ablation is None else str(self.ablation)


class _Sums:
    """Running sums of one change."""

    def __init__(self) -> None:
        self.correct = self.squares = self.changed = self.agreed = 0
        self.loss = 0.0

    def update(self, logits: Tensor, labels: Tensor, base: Tensor) -> None:
        predicted = logits.argmax(1)
        right, before = predicted == labels, base == labels
        self.correct += int(right.sum())
        self.squares += int((right != before).sum())
        self.changed += int(right.sum()) - int(before.sum())
        self.agreed += int((predicted == base).sum())
        self.loss += float(F.cross_entropy(logits.float(), labels, reduction="sum"))

    def result(self, ablation: Ablation | None, count: int) -> AblationResult:
        difference = self.changed / count
        variance = max(self.squares / count - difference**2, 0.0)
        interval = 1.96 * math.sqrt(variance / count)
        return AblationResult(
            ablation, count, self.correct / count, difference, interval, self.loss / count, self.agreed / count
        )


@torch.no_grad()
def evaluate_ablations(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    ablations: Sequence[Ablation],
    means: Mapping[str, Tensor],
    progress: Callable[[int], None] = lambda forwards: None,
) -> tuple[AblationResult, ...]:
    """The undisturbed network's result and then that of each change; images are loaded once for all.

    Args:
        model: images -> logits; it runs in the mode that it is in: call `eval()` first.
        batches: (images, labels int64 [N]) on the model's device, in random order: "shuffled" exchanges routing within
            a batch, so a batch of one class would hide what it does. A batch of one image is left out.
        ablations: see `list_ablations`.
        means: mean weights [E] of each router, for "mean".
        progress: called with the number of forward passes since the last call.

    Raises:
        ValueError: the network has no router, one that runs several times in a forward pass, or there are not even two
            images in a batch.
    """
    sums = {ablation: _Sums() for ablation in (None, *ablations)}
    count = 0
    for images, labels in batches:
        if len(labels) < 2:
            continue
        count += len(labels)
        with catch_routing(model) as caught:
            logits = model(images)
        own, base = dict(caught), logits.argmax(1)
        sums[None].update(logits, labels, base)
        progress(1)
        for ablation in ablations:
            with changed_routing(model, ablation.change(own, means)):
                sums[ablation].update(model(images), labels, base)
            progress(1)
    if not count:
        raise ValueError("there are no images to compare on: a batch needs at least two")
    return tuple(total.result(ablation, count) for ablation, total in sums.items())
