"""`python eval.py ckpt=... analysis=routing`: looks at a network's routing on its evaluation images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from condconv.ablation import AblationResult, evaluate_ablations, list_ablations
from condconv.recording import routers_of
from condconv.similarity import depth_similarity, expert_similarity, router_similarity
from condconv.survey import RoutingSurvey, survey_routing
from reports.routing import ablations as ablation_figures
from reports.routing import figures, sheets
from reports.routing.findings import AUTO, Findings, check_experts, choose_classes, choose_experts, choose_layers
from reports.routing.images import Images, thumbnails
from reports.routing.page import Picture, picture, write_page
from reports.routing.tables import write_tables
from reports.style import save, styled


class RoutingAnalysis:
    """Statistics, pictures and ablations of the routing of one network.

    Args:
        folder: where everything goes; None for what the caller chooses.
        layers: routers that detailed pictures show: "auto" (the first and the last two), or names and patterns.
        classes: classes that pictures by class show: "auto" (the paper's four if the data has them, else the four
            most different ones) or names.
        experts: experts of those layers whose images are shown: "auto" (four that tell classes apart most) or numbers.
        images_per_expert: images on a line of a contact sheet.
        max_images: images looked at, drawn at random from the evaluation set; None for all.
        ablations: whether to measure what routing and experts are worth; each ablation runs the network once more.
        ablation_images: images for that; None for as many as are looked at.
        ablations_by_layer: also change one layer at a time, and remove each expert of `layers`.
        top_k: numbers of experts that "top k experts only" keeps.
        renormalize: what top k does with the kept weights: true (they keep the sum of all), false, or "both".
        sample_size: images in the embedding and in the comparison of layers.
        seed: of the order of the images.

    Raises:
        ValueError: an option cannot be meant.
    """

    def __init__(
        self,
        *,
        folder: str | Path | None = None,
        layers: str | Sequence[str] = AUTO,
        classes: str | Sequence[str | int] = AUTO,
        experts: str | Sequence[int] = AUTO,
        images_per_expert: int = 10,
        max_images: int | None = None,
        ablations: bool = True,
        ablation_images: int | None = 2000,
        ablations_by_layer: bool = True,
        top_k: Sequence[int] = (1, 2, 4),
        renormalize: bool | str = "both",
        sample_size: int = 2000,
        seed: int = 1,
    ) -> None:
        counts = {"images_per_expert": images_per_expert, "sample_size": sample_size}
        counts |= {"max_images": max_images or 2, "ablation_images": ablation_images or 2}
        counts |= {f"top_k[{place}]": k for place, k in enumerate(top_k)}
        for name, value in counts.items():
            smallest = 1 if name.startswith(("images_per", "top_k")) else 2
            if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
                raise ValueError(f"analysis.{name}={value}: expected a whole number of at least {smallest}")
        if renormalize not in (True, False, "both"):
            raise ValueError(f"analysis.renormalize={renormalize}: expected true, false or both")
        self.folder = None if folder is None else Path(folder).expanduser()
        self.layers, self.classes, self.experts = layers, classes, experts
        self.images_per_expert, self.max_images, self.sample_size = images_per_expert, max_images, sample_size
        self.ablations, self.ablation_images, self.ablations_by_layer = ablations, ablation_images, ablations_by_layer
        self.top_k = tuple(top_k)
        self.renormalize = (True, False) if renormalize == "both" else (bool(renormalize),)
        self.seed = seed

    def check(self, net: nn.Module) -> None:
        """Before any time is spent.

        Raises:
            ValueError: the network is static, or an option names what it does not have.
        """
        try:
            names = list(routers_of(net))
        except ValueError as error:
            raise ValueError(
                "analysis=routing needs a network with CondConv layers, this one is static (condconv.experts=0): "
                "there is no routing to look at. Evaluate it without analysis=routing"
            ) from error
        layers = choose_layers(names, self.layers)
        if self.experts != AUTO:
            for layer in layers:
                check_experts(layer, routers_of(net)[layer].num_experts, self.experts)

    def __call__(
        self, module: nn.Module, datamodule: Any, folder: str | Path, title: str, loggers: Sequence[Any] = ()
    ) -> Path:
        """Look at `module.net` on the evaluation images of `datamodule`; returns the page.

        Args:
            module: a LightningModule that maps normalised images to its network's outputs.
            datamodule: of the project's kind: an evaluation set, `normalize`, `class_names`.
            folder: where everything goes, unless the option `folder` says otherwise.
            title: the network and its data, for the page.
            loggers: what has `log_metrics` gets the scalars, what has `log_files` the pictures and tables.
        """
        net: nn.Module = module.net  # type: ignore[assignment]
        folder = self.folder or Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        device, channels_last = next(net.parameters()).device, getattr(module, "channels_last", False)
        images = Images(datamodule, self.max_images, self.seed, device, channels_last)
        training = module.training
        module.eval()
        try:
            found = self.measure(net, images, title)
        finally:
            module.train(training)
        pictures = draw(found, folder)
        tables = write_tables(found, folder)
        page = write_page(found, pictures, tables, folder)
        for logger in loggers:
            logger.log_metrics(scalars(found), step=0)
            if hasattr(logger, "log_files"):
                logger.log_files("analysis", {each.title: folder / f"{each.name}.png" for each in pictures}, folder)
        return page

    def measure(self, net: nn.Module, images: Images, title: str) -> Findings:
        """All the numbers."""
        class_names = images.class_names
        if self.classes != AUTO:
            choose_classes(None, class_names, self.classes)  # a wrong name is found before time is spent
        names = list(routers_of(net))
        with _progress() as bar:
            task = bar.add_task("looking at routing", total=len(images))
            survey = survey_routing(
                net,
                _advancing(images.batches(), bar, task),
                len(class_names),
                keep=self.images_per_expert,
                thumbnails_for=lambda name: name in choose_layers(names, self.layers),
                to_thumbnails=lambda x: thumbnails(x, images.normalize),
                sample_size=self.sample_size,
            )
            layers = choose_layers([router.name for router in survey.routers], self.layers)
            last = survey.routers[-1]
            notes = [f"{survey.num_examples} of {images.available} evaluation images, drawn with seed {self.seed}."]
            results: tuple[AblationResult, ...] = ()
            if self.ablations and survey.num_correct is None:
                notes.append("Ablations are measured for classifiers only: this network has other outputs.")
            elif self.ablations:
                results = self._ablate(net, images, survey, layers, bar)
        looked_at = [router for router in survey.routers if router.name in layers]
        return Findings(
            title,
            survey,
            class_names,
            layers,
            choose_classes(last, class_names, self.classes),
            {router.name: choose_experts(router, self.experts) for router in looked_at},
            expert_similarity(net),
            router_similarity(net),
            depth_similarity(survey),
            results,
            tuple(notes),
        )

    def _ablate(
        self,
        net: nn.Module,
        images: Images,
        survey: RoutingSurvey,
        layers: Sequence[str],
        bar: Progress,
    ) -> tuple[AblationResult, ...]:
        changes = list_ablations(
            {router.name: router.num_experts for router in survey.routers},
            top_k=self.top_k,
            renormalize=self.renormalize,
            by_layer=self.ablations_by_layer,
            expert_layers=layers,
        )
        few = images.first(self.ablation_images)
        task = bar.add_task(f"{len(changes)} ablations", total=few.num_batches * (len(changes) + 1))
        means = {router.name: router.summary.mean for router in survey.routers}
        return evaluate_ablations(net, few.batches(), changes, means, lambda count: bar.advance(task, count))


def draw(found: Findings, folder: Path) -> list[Picture]:
    """Draw and save every picture that the findings have numbers for, in the order of the page."""
    drawers: dict[str, Any] = {}
    if found.classes:
        drawers["class_weights"] = figures.class_weights
    drawers |= {"histograms": figures.histograms, "by_depth": figures.by_depth, "expert_use": figures.expert_use}
    layer_of = {f"top_images_{layer.replace('.', '_')}": layer for layer in found.layers}
    drawers |= dict.fromkeys(layer_of, sheets.top_images)
    drawers |= {"embedding": figures.embedding}
    drawers |= {"expert_similarity": figures.expert_similarity, "router_similarity": figures.router_similarity}
    if found.ablations:
        drawers["ablations"] = ablation_figures.everywhere
        if any(result.ablation is not None and result.ablation.layer is not None for result in found.ablations):
            drawers["ablations_by_layer"] = ablation_figures.layer_by_layer
            drawers["experts_removed"] = ablation_figures.removed_experts
    for name, drawer in drawers.items():
        with styled():
            figure = drawer(found, layer_of[name]) if name in layer_of else drawer(found)
            save(figure, folder, name)
    return [picture(name, layer_of.get(name, "")) for name in drawers]


def scalars(found: Findings) -> dict[str, float]:
    """The figures worth a column in a table of runs."""
    values: dict[str, float] = {}
    for router in found.survey.routers:
        own = {key: value for key, value in router.summary.scalars().items() if key in ("entropy", "std", "saturation")}
        if router.classes is not None:
            own["between_class_share"] = router.classes.between_all
        values |= {f"analysis/{router.name}/{key}": value for key, value in own.items()}
    for result in found.ablations:
        if result.ablation is None or result.ablation.layer is None:
            values[f"analysis/top1/{result.name}"] = result.accuracy
    return values


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    )


def _advancing(batches: Iterator[tuple[Tensor, Tensor]], bar: Progress, task: Any) -> Iterator[tuple[Tensor, Tensor]]:
    for batch in batches:
        yield batch
        bar.advance(task, len(batch[1]))
