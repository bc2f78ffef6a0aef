"""The research side: networks, training modules, callbacks. Uses `condconv`; knows nothing of `data`."""

from models import _timm as _timm
from models.backbones import create_model, list_backbones, list_placements
from models.ssd import create_detector, list_detectors

__all__ = ["create_detector", "create_model", "list_backbones", "list_detectors", "list_placements"]
