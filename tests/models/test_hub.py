"""save_pretrained and from_pretrained on folders, without a network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from models.hub import HubNetwork
from models.weights import read_weights

SETTINGS = {"name": "mobilenet_v1", "num_classes": 3, "experts": 2, "width": 0.25, "placement": "all"}


def test_a_folder_gives_the_network_back(tmp_path: Path) -> None:
    network = HubNetwork(SETTINGS, "half", 32, class_names=["cat", "dog", "owl"]).eval()
    network.save_pretrained(tmp_path / "net")
    assert {"config.json", "model.safetensors", "README.md"} <= {path.name for path in (tmp_path / "net").iterdir()}
    again = HubNetwork.from_pretrained(tmp_path / "net")
    assert again.card == network.card and again.card.class_names == ("cat", "dog", "owl") and not again.training
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(x), network(x))
    weights = read_weights(tmp_path / "net")
    assert weights.card == network.card
    assert torch.equal(HubNetwork.of(weights)(x), again(x))


def test_what_does_not_belong_together_is_refused(tmp_path: Path) -> None:
    HubNetwork(SETTINGS).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model"]["experts"] = 4
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="describe different networks"):
        HubNetwork.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no model\.safetensors"):
        HubNetwork.from_pretrained(tmp_path)
