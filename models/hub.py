"""Networks in the Hugging Face hub's conventions: `save_pretrained`, `from_pretrained`, `push_to_hub`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from condconv.checkpoints import load_complete
from models.backbones import create_model
from models.weights import CONFIG_FILE, HUB, WEIGHTS_FILE, Card, Weights, read_weights, save_weights

_ARGUMENTS = ("model", "normalization", "image_size", "crop_fraction", "interpolation", "class_names", "averaged")


class HubNetwork(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="condconv",
    tags=["condconv"],
    license="apache-2.0",
    pipeline_tag="image-classification",
):
    """A network with its card. The folder of `save_pretrained` holds `model.safetensors`, `config.json`, `README.md`.

    Folders work offline. What is loaded fits completely, or nothing is.

    Args:
        model: arguments of `models.create_model`.
        normalization: of the images, a name of `data.transforms.NORMALIZATIONS`.
        image_size: in pixels.
        crop_fraction, interpolation: of the evaluation crop.
        class_names: in the order of the outputs, or none.
        averaged: whether the weights are a moving average.
    """

    def __init__(
        self,
        model: dict[str, Any],
        normalization: str = "imagenet",
        image_size: int = 224,
        crop_fraction: float = 0.875,
        interpolation: str = "bicubic",
        class_names: list[str] | None = None,
        averaged: bool = False,
    ) -> None:
        super().__init__()
        names = tuple(class_names or ())
        self.card = Card(dict(model), normalization, image_size, crop_fraction, interpolation, names, averaged)
        self.net = create_model(**{**model, "backend": "auto"})  # not that of another machine

    @classmethod
    def of(cls, weights: Weights) -> HubNetwork:
        """The network of a file of ours.

        Raises:
            ValueError: the file has no card, or its tensors do not fit.
        """
        card = weights.card
        if card is None:
            raise ValueError(f"{weights.source} does not say which network it is of")
        network = cls(**{key: value for key, value in card.to_dict().items() if key in _ARGUMENTS})
        load_complete(network.net, weights.state, weights.source)
        return network.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Logits `[N, num_classes]` of normalised images `[N, 3, H, W]`."""
        logits: Tensor = self.net(images)
        return logits

    def _save_pretrained(self, save_directory: Path) -> None:
        save_weights(save_directory / WEIGHTS_FILE, self.net.state_dict(), self.card)

    @classmethod
    def _from_pretrained(
        cls, *, model_id: str, local_files_only: bool = False, map_location: str = "cpu", **options: Any
    ) -> HubNetwork:
        """Called by the mixin with the values of config.json; the mixin's own loading is not strict."""
        hub = {key: options.pop(key, None) for key in ("revision", "cache_dir", "force_download", "token", "strict")}
        if Path(model_id).is_dir():
            if not (Path(model_id) / WEIGHTS_FILE).is_file():
                raise FileNotFoundError(f"{model_id} holds no {WEIGHTS_FILE}: is it a folder of save_pretrained?")
            weights = read_weights(model_id)
        else:
            from huggingface_hub import hf_hub_download

            del hub["strict"]
            weights = read_weights(hf_hub_download(model_id, WEIGHTS_FILE, local_files_only=local_files_only, **hub))
        if weights.card is None:
            raise ValueError(
                f"{model_id} holds a {WEIGHTS_FILE} that is not ours; for timm's use pretrained='{HUB}...'"
            )
        given = {**weights.card.to_dict(), **options}
        if given["model"] != weights.card.model:
            raise ValueError(f"{CONFIG_FILE} and {WEIGHTS_FILE} of {model_id} describe different networks")
        network = cls(**{key: given[key] for key in _ARGUMENTS})
        load_complete(network.net, weights.state, model_id)
        return network.eval().to(map_location)
