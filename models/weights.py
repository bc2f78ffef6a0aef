"""Files of weights: ours (safetensors, with a card that says which network it is), and what others write.

Nothing is ever unpickled as code: safetensors holds tensors alone, and torch's files are read with `weights_only=True`.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

import condconv
from condconv.checkpoints import count_experts, has_experts, is_timm_condconv
from condconv.files import LAST, newest_good, seal_holds, versions
from models.ema import CHECKPOINT_KEY, averaged_weights

FORMAT = 1
"""Of the card; a file with a higher number was written by a version that this one does not know."""
CARD_KEY = "condconv"
WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
HUB = "hf-hub:"
# Settings of a run that are not the network: how it began, how it was trained.
_NOT_THE_NETWORK = ("autotune", "backend", "_target_", "pretrained", "new_classifier", "init", "init_noise", "freeze")
# timm's CondConv networks were converted from TensorFlow; its padding and epsilon, and images on -1..1.
_TIMM_OPTIONS = {"pad_type": "same", "bn_eps": 1e-3}
_TIMM_NORMALIZATION = "half"


@dataclass(frozen=True)
class Card:
    """What a file says about its weights; plain values only.

    Attributes:
        model: arguments of `models.create_model` that build the network.
        normalization: of its images, a name of `data.transforms.NORMALIZATIONS`.
        image_size: side of its images in pixels.
        crop_fraction, interpolation: of the evaluation crop, see `data.transforms.eval_transform`.
        class_names: in the order of the outputs; may be empty.
        averaged: whether these are the weights' moving average.
        version: of this library.
        format: of the card.
    """

    model: dict[str, Any]
    normalization: str = "imagenet"
    image_size: int = 224
    crop_fraction: float = 0.875
    interpolation: str = "bicubic"
    class_names: tuple[str, ...] = ()
    averaged: bool = False
    version: str = condconv.__version__
    format: int = field(default=FORMAT)

    @classmethod
    def of_run(cls, checkpoint: Mapping[str, Any], averaged: bool = False) -> Card:
        """The card of a checkpoint of train.py, from the config inside it."""
        config = checkpoint["config"]
        settings = {**config["model"], **config["condconv"]}
        model = {key: value for key, value in settings.items() if key not in _NOT_THE_NETWORK}
        data = config["data"]
        # Small images are resized as a whole, those of folders cropped.
        crop, mode = data.get("crop_fraction", 1.0), data.get("interpolation", "bicubic")
        names = tuple(checkpoint.get("class_names") or ())
        return cls(model, data["normalize"], data["image_size"], crop, mode, names, averaged)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str) -> Card:
        """The card of a file.

        Raises:
            ValueError: it is of a newer format, or no card.
        """
        found = values.get("format")
        if not isinstance(found, int) or not isinstance(values.get("model"), dict):
            raise ValueError(f"{source}: its description of the network is damaged")
        if found > FORMAT:
            raise ValueError(
                f"{source} was written by condconv {values.get('version')} in file format {found}; this is condconv "
                f"{condconv.__version__}, which reads up to format {FORMAT}. Update condconv."
            )
        known = {key: values[key] for key in cls.__dataclass_fields__ if key in values}
        return cls(**{**known, "class_names": tuple(known.get("class_names", ()))})

    @property
    def preparation(self) -> dict[str, Any]:
        """How images become what the network sees, by the names of the `data` group."""
        return {
            "image_size": self.image_size,
            "normalize": self.normalization,
            "crop_fraction": self.crop_fraction,
            "interpolation": self.interpolation,
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "class_names": list(self.class_names)}


@dataclass(frozen=True)
class Weights:
    """The tensors of a network by name, and what their file says about them (None: a foreign file)."""

    source: str
    state: dict[str, Tensor]
    card: Card | None = None

    @property
    def is_static(self) -> bool:
        return not has_experts(self.state)

    @property
    def is_detector(self) -> bool:
        """Whether they are of a `models.ssd.SSD`, backbone and head."""
        return any(name.startswith("head.predictors.") for name in self.state)

    @property
    def is_timm_condconv(self) -> bool:
        return is_timm_condconv(self.state)

    @property
    def num_experts(self) -> int:
        return count_experts(self.state)

    @property
    def normalization(self) -> str | None:
        """What the weights were trained with, if that is known."""
        if self.card is not None:
            return self.card.normalization
        return _TIMM_NORMALIZATION if self.is_timm_condconv else None

    @property
    def preparation(self) -> dict[str, Any]:
        """What is known of how images become what the network sees, by the names of the `data` group."""
        if self.card is not None:
            return self.card.preparation
        return {"normalize": self.normalization} if self.normalization is not None else {}

    @property
    def class_names(self) -> tuple[str, ...]:
        """In the order of the outputs; empty where the file does not name them."""
        return self.card.class_names if self.card is not None else ()

    @property
    def timm_options(self) -> dict[str, Any]:
        """What timm's constructor needs to be told for these weights."""
        if self.card is not None:
            return dict(self.card.model.get("timm_options") or {})
        return dict(_TIMM_OPTIONS) if self.is_timm_condconv else {}


def save_weights(path: str | Path, state: Mapping[str, Tensor], card: Card) -> Path:
    """Write weights as safetensors with their card; a reader never sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.tmp")
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    # Not save_file, whose files nobody but their owner may read.
    unfinished.write_bytes(safetensors.torch.save(tensors, {"format": "pt", CARD_KEY: json.dumps(card.to_dict())}))
    os.replace(unfinished, path)
    return path


def read_weights(source: str | Path, averaged: bool = True) -> Weights:
    """Read a file of weights, whoever wrote it.

    Args:
        source: a file of safetensors or of torch (a state dict, or a checkpoint that holds one), a folder with a
            `model.safetensors`, the folder of a run (its last checkpoint), or "hf-hub:owner/name" for a repository of
            the Hugging Face hub.
        averaged: of a checkpoint of train.py, take the moving average of the weights if there is one.

    Raises:
        FileNotFoundError: there is no such file, or the hub cannot be reached.
        ValueError: it holds no weights, or is of a newer format.
    """
    if isinstance(source, str) and source.startswith(HUB):
        return replace(_read_safetensors(download(source.removeprefix(HUB))), source=source)
    path = Path(source).expanduser()
    if path.is_dir() and (path / WEIGHTS_FILE).is_file():
        path = path / WEIGHTS_FILE
    elif path.is_dir() and (good := newest_good(path / LAST)):
        path = good
    if not path.is_file():
        damaged = ", ".join(each.name for each in versions(path / LAST))
        raise FileNotFoundError(f"there are no weights at {source}" + (f": {damaged} are damaged" if damaged else ""))
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path, averaged)


def download(repository: str) -> Path:
    """The weights of a repository of the Hugging Face hub, from its cache if they are there.

    Raises:
        FileNotFoundError: no such repository or file, or no network.
    """
    from huggingface_hub import hf_hub_download  # imported here: it takes a while and is rarely needed

    try:
        return Path(hf_hub_download(repository, WEIGHTS_FILE))
    except Exception as error:  # the client raises what its HTTP library raises
        raise FileNotFoundError(
            f"cannot fetch {WEIGHTS_FILE} of {repository} from the Hugging Face hub ({type(error).__name__}): download "
            "the file where there is a network, and give its path"
        ) from error


def _read_safetensors(path: Path) -> Weights:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file, or it is truncated: {error}") from error
    if CARD_KEY not in metadata:
        return Weights(str(path), state)
    try:
        values = json.loads(metadata[CARD_KEY])
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: its description of the network is damaged") from error
    return Weights(str(path), state, Card.from_dict(values, str(path)))


def _read_torch(path: Path, averaged: bool) -> Weights:
    if seal_holds(path) is False:
        raise ValueError(f"{path} is damaged: its checksum does not match its contents")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} holds no weights that could be read without running code in it (torch.load with weights_only=True "
            "fails), or it is truncated"
        ) from error
    if isinstance(content, dict) and "state_dict" in content and "config" in content:
        return weights_of_run(content, str(path), averaged)
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f"{path} holds no state dict: expected tensors by name")
    return Weights(str(path), _without_prefix(dict(content)))


def weights_of_run(checkpoint: Mapping[str, Any], source: str, averaged: bool = True) -> Weights:
    """The network's weights in a checkpoint of train.py; the moving average if there is one and it is wanted."""
    averaged = averaged and CHECKPOINT_KEY in checkpoint
    if averaged:
        state = averaged_weights(checkpoint)
    else:
        state = {k.removeprefix("net."): v for k, v in checkpoint["state_dict"].items() if k.startswith("net.")}
    return Weights(source, state, Card.of_run(checkpoint, averaged))


def _without_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names without what wrappers put in front of all of them (DataParallel, torch.compile, a Lightning module)."""
    for prefix in ("module.", "_orig_mod.", "model.", "net."):
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state
