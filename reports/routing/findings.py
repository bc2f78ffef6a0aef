"""What a routing analysis found, and which layers, classes and experts its pictures show.

Letters: E experts, L classes.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from condconv.ablation import AblationResult
from condconv.patterns import matches
from condconv.similarity import Similarity
from condconv.survey import RouterSurvey, RoutingSurvey

# The classes of the paper's figure, as ImageNet's folders or lists of names call them.
PAPER_CLASSES = {
    "cliff": ("cliff", "n09246464"),
    "pug": ("pug", "pug-dog", "n02110958"),
    "goldfish": ("goldfish", "n01443537"),
    "plane": ("plane", "airliner", "n02690373"),
}
AUTO = "auto"


@dataclass(frozen=True)
class Findings:
    """Everything that the pictures, tables and the page are made of.

    Attributes:
        title: the network and its data.
        survey: what was seen of each router.
        class_names: in the order of the labels.
        layers: names of the routers that the detailed pictures show.
        classes: labels that the pictures by class show.
        experts: of each of `layers`, the experts whose images are shown.
        kernels, routers: similarity of experts by CondConv layer, and of the rows of routers.
        depths: [routers, routers], `condconv.similarity.depth_similarity`.
        ablations: the undisturbed network first; empty if none were made.
        notes: sentences about how this was made, for the page.
    """

    title: str
    survey: RoutingSurvey
    class_names: tuple[str, ...]
    layers: tuple[str, ...]
    classes: tuple[int, ...]
    experts: dict[str, tuple[int, ...]]
    kernels: tuple[Similarity, ...]
    routers: tuple[Similarity, ...]
    depths: Tensor
    ablations: tuple[AblationResult, ...] = ()
    notes: tuple[str, ...] = field(default=())

    def router(self, name: str) -> RouterSurvey:
        return next(router for router in self.survey.routers if router.name == name)

    def class_name(self, label: int) -> str:
        return self.class_names[label] if 0 <= label < len(self.class_names) else "none"


def choose_layers(names: Sequence[str], wanted: str | Sequence[str]) -> tuple[str, ...]:
    """The routers that are looked at closely: "auto" for the first and the last two, or names and patterns of names.

    Raises:
        ValueError: a pattern fits no router.
    """
    if wanted == AUTO:
        return tuple(dict.fromkeys((names[0], names[max(len(names) - 2, 0)], names[-1])))
    patterns = [wanted] if isinstance(wanted, str) else list(wanted)
    for pattern in patterns:
        if not any(matches(name, str(pattern)) for name in names):
            raise ValueError(f"analysis.layers: no router fits {pattern!r}; there are {', '.join(names)}")
    return tuple(name for name in names if any(matches(name, str(pattern)) for pattern in patterns))


def choose_classes(
    router: RouterSurvey | None, names: Sequence[str], wanted: str | Sequence[str | int]
) -> tuple[int, ...]:
    """Labels to show: names as given; "auto" for the paper's four if the data has them, else the most different ones.

    The most different are found by this router's mean weights: the two classes farthest apart, then twice the class
    whose nearest chosen one is farthest.

    Raises:
        ValueError: there is no such class.
    """
    if wanted != AUTO:
        return tuple(_find_class(each, names) for each in ([wanted] if isinstance(wanted, str | int) else wanted))
    known = {name.lower(): label for label, name in enumerate(names)}
    paper = [next((known[alias] for alias in aliases if alias in known), None) for aliases in PAPER_CLASSES.values()]
    if router is None or router.classes is None:
        return ()
    seen = torch.nonzero(router.classes.counts > 0).flatten()
    if all(label is not None and label in seen for label in paper):
        return tuple(label for label in paper if label is not None)
    means = router.classes.mean[seen]
    distance = torch.cdist(means, means)
    chosen = [int(distance.amax(1).argmax())]
    while len(chosen) < min(4, len(seen)):
        nearest = distance[chosen].amin(0)
        nearest[chosen] = -1
        chosen.append(int(nearest.argmax()))
    return tuple(sorted(int(seen[position]) for position in chosen))


def _find_class(wanted: str | int, names: Sequence[str]) -> int:
    text = str(wanted).lower()
    known = {name.lower(): label for label, name in enumerate(names)}
    for alias in (text, *PAPER_CLASSES.get(text, ())):
        if alias in known:
            return known[alias]
    if text.isdigit() and int(text) < len(names):
        return int(text)
    near = difflib.get_close_matches(text, known, n=3)
    hint = f"near names: {', '.join(near)}" if near else f"there are {len(names)}, such as {', '.join(names[:5])}"
    raise ValueError(f"analysis.classes: the data has no class {wanted!r} ({hint})")


def choose_experts(router: RouterSurvey, wanted: str | Sequence[int], count: int = 4) -> tuple[int, ...]:
    """Experts whose images are shown: as given, or those that tell classes (or at least images) apart most.

    Raises:
        ValueError: there is no such expert.
    """
    experts = router.num_experts
    if wanted != AUTO:
        return check_experts(router.name, experts, wanted)
    if router.classes is None:
        return tuple(sorted(router.summary.std.topk(min(count, experts)).indices.tolist()))
    # By their variance between classes; an expert that does what a chosen one does adds little.
    profiles = (router.classes.mean - router.summary.mean).nan_to_num(0.0).T
    worth = (router.summary.std**2 * router.classes.between.nan_to_num(0.0)).clamp_min(1e-12)
    unit = F.normalize(profiles, dim=1)
    found = [int(worth.argmax())]
    while len(found) < min(count, experts):
        alike = (unit @ unit[found].T).amax(1)
        value = worth * (1 - alike).clamp_min(1e-3)
        value[found] = -1
        found.append(int(value.argmax()))
    return tuple(sorted(found))


def check_experts(layer: str, num_experts: int, wanted: str | int | Sequence[int]) -> tuple[int, ...]:
    """The experts asked for.

    Raises:
        ValueError: there is no such expert.
    """
    chosen = [wanted] if isinstance(wanted, str | int) else list(wanted)
    for expert in chosen:
        if isinstance(expert, bool) or not isinstance(expert, int) or not 0 <= expert < num_experts:
            raise ValueError(f"analysis.experts: {layer} has no expert {expert!r}, they are 0 to {num_experts - 1}")
    return tuple(int(expert) for expert in chosen)
