"""Conditionally parameterized convolutions (CondConv, NeurIPS 2019) for PyTorch.

`CondConv2d` and `CondLinear` drop into any network, `convert` turns the layers of an existing one, `complexity`
counts parameters and multiply-adds by the paper's rules, `condconv2d` and `cond_linear` are the functions beneath,
`list_backends` their algorithms.
"""

from condconv.complexity import complexity
from condconv.compress import compress_experts
from condconv.convert import convert
from condconv.functional import cond_linear, condconv2d, set_debug
from condconv.layers import CondConv2d, CondLinear
from condconv.ops.registry import list_backends
from condconv.routing import ROUTINGS, Router, build_router
from condconv.tuning import autotune, explain

__version__ = "0.1.0"

__all__ = [
    "ROUTINGS",
    "CondConv2d",
    "CondLinear",
    "Router",
    "autotune",
    "build_router",
    "complexity",
    "compress_experts",
    "cond_linear",
    "condconv2d",
    "convert",
    "explain",
    "list_backends",
    "set_debug",
]
