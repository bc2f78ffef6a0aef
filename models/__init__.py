"""The research side: networks, training modules, callbacks. Uses `condconv`; knows nothing of `data`."""

from models import _timm as _timm
from models.backbones import create_model, list_backbones, list_placements

__all__ = ["create_model", "list_backbones", "list_placements"]
