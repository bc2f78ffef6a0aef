"""A network's routers by name, and the routing weights that each CondConv layer gets, whoever gives them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from condconv.functional import channels_second
from condconv.layers import CondConv2d, CondLinear
from condconv.routing import Router


def routers_of(model: nn.Module) -> dict[str, Router]:
    """The routers of a network by the name of their block or layer, in the order of registration.

    Raises:
        ValueError: there is none.
    """
    found = {n.removesuffix(".router"): m for n, m in model.named_modules() if isinstance(m, Router)}
    if not found:
        raise ValueError("the network has no CondConv layers (experts=0?), so there is no routing to look at")
    return found


@contextmanager
def hooks_run(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """While entered, compiled networks run uncompiled, since what is compiled knows no later hooks.

    Args:
        handles: of the hooks, which are removed at the end.
    """
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def record_layers(model: nn.Module, receive: Callable[[str, Tensor], None]) -> Iterator[None]:
    """While open, every forward pass calls `receive(layer name, routing weights [N, E])` for each CondConv layer.

    A layer's own router runs once more for it; that of a block does not.
    """
    names = {m: name for name, m in model.named_modules() if isinstance(m, CondConv2d | CondLinear)}

    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert isinstance(layer, CondConv2d | CondLinear)
        x = args[0] if args else kwargs["x"]
        given = args[1] if len(args) > 1 else kwargs.get("routing_weights")
        pooled = channels_second(x) if isinstance(layer, CondLinear) else x
        receive(names[layer], layer._routing_weights(pooled, given))

    with hooks_run([layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in names]):
        yield
