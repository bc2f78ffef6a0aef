"""How the layers of a block get the routing weights that their block's router computes.

A *unit* is a module with one routing decision: a block whose CondConv layers share a router, or a lone CondConv layer.
Two module-level hooks do the work. Before the unit runs, `_enter` computes routing weights from the unit's input and
leaves them in the attribute `routing` of the unit's layers; after it, also after an exception, `_leave` takes
them away. (Not after a KeyboardInterrupt: the next forward pass of that thread replaces them, copies are without.)

The hooks are plain functions and find everything through the module that they are called with, so a network survives
deepcopy, pickling, DDP and export; a hook that closed over layers would keep feeding the layers of the original. The
one reference between units (`RoutingUnit.chain`, for routing functions that span the network) is an attribute of a
plain object: no submodule, so it adds no keys, and deepcopy and pickle map it like everything else. It is one list of
all units, because a reference from each to the next would make deepcopy recurse through the network.

A network runs one forward pass at a time. Its state is in attributes, so a second thread would make the first one's
layers mix by the routing weights of another batch: it is refused instead, by marks of the thread that a unit runs in
and of the one that left routing weights for the next unit. Code that torch.compile traces carries no marks: inside a
graph routing weights are values.
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from condconv.functional import channels_second

ONE_THREAD = "A converted network runs one forward pass at a time: let threads take turns, or give each a copy.deepcopy"


_REPLACING = threading.Lock()
"""Held while the mark of a thread that has ended is replaced."""


def _thread() -> threading.Thread | None:
    """The calling thread; None in code that torch.compile traces, which could not know it."""
    return None if torch.compiler.is_compiling() else threading.current_thread()


class Incoming(NamedTuple):
    """Routing weights on their way to the next unit."""

    routing: Tensor
    without_grad: bool
    thread: threading.Thread | None


class RoutingUnit:
    """What the hooks of a unit need to know; it is the attribute `routing_unit` of the module.

    Args:
        name: the module's name in the network, for messages.
        layers: names of the unit's CondConv layers relative to the module; ("",) when the module is the layer.
        router: the router's name relative to the module, None for a unit that uses the previous unit's routing weights.
        takes_previous: the unit needs the routing weights of the unit before it, as an input of its router
            (hierarchical routing) or instead of a router.
        channels_last: the module is a linear layer, whose inputs are `[N, ..., C]`.
    """

    def __init__(
        self,
        name: str,
        layers: tuple[str, ...],
        router: str | None,
        takes_previous: bool = False,
        channels_last: bool = False,
    ) -> None:
        self.name = name
        self.layers = layers
        self.router = router
        self.takes_previous = takes_previous
        self.channels_last = channels_last
        self.chain: list[nn.Module] = []
        self.place = 0
        self.incoming: Incoming | None = None
        # Threads inside, by the id of the module: the replicas of nn.DataParallel share this object.
        self.threads: dict[int, threading.Thread] = {}
        # Of the two hooks. Hooks are numbered by process: a handle that is unpickled raises torch's counter past its
        # own number, without which the next hook of a loaded network would take the place of one of these.
        self.handles: tuple[RemovableHandle, ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        # Routing weights left by a forward pass that broke off are no state, and could not be copied with their graph.
        return {**self.__dict__, "incoming": None, "threads": {}}

    def join(self, chain: list[nn.Module], module: nn.Module) -> None:
        """Make this the unit of `module`, the next in the list that all units of the network share."""
        self.chain, self.place = chain, len(chain)
        chain.append(module)

    @property
    def successor(self) -> nn.Module | None:
        """The module whose unit takes this one's routing weights, if there is one."""
        if self.place + 1 >= len(self.chain):
            return None
        module = self.chain[self.place + 1]
        unit: RoutingUnit = module.routing_unit  # type: ignore[assignment]  # attributes of modules are untyped
        return module if unit.takes_previous else None

    def enter(self, module: nn.Module) -> None:
        """Mark that the calling thread runs `module`, and refuse another one until it is through."""
        thread = _thread()
        if thread is None:
            return
        inside = self.threads.setdefault(id(module), thread)  # one atomic step looks and marks
        if inside is not thread and not inside.is_alive():  # it broke off here, by a KeyboardInterrupt or the like
            with _REPLACING:
                if self.threads.get(id(module)) is inside:
                    self.threads[id(module)] = thread
            inside = self.threads.setdefault(id(module), thread)
        if inside is not thread:
            raise RuntimeError(
                f"{self.name}: another thread is inside this block, or was interrupted there. {ONE_THREAD}"
            )

    def leave(self, module: nn.Module) -> None:
        """Undo `enter`."""
        if not torch.compiler.is_compiling():
            self.threads.pop(id(module), None)

    def was_refused(self, module: nn.Module) -> bool:
        """Whether `enter` refused the calling thread, since another one is inside."""
        thread = _thread()
        return thread is not None and self.threads.get(id(module), thread) is not thread

    def take_previous(self) -> Incoming:
        """The routing weights that the unit before left here, once."""
        incoming, self.incoming = self.incoming, None
        if incoming is None:
            raise RuntimeError(
                f"{self.name}: the routing weights of the previous block did not arrive. Routing functions that span "
                "the network need its blocks to run once each, in order, within one forward pass (or one checkpointed "
                "segment), and in one thread; give convert() an example_input if the order of registration is not the "
                "order of execution"
            )
        thread = _thread()
        if None not in (thread, incoming.thread) and thread is not incoming.thread:
            raise RuntimeError(
                f"{self.name}: the routing weights of the previous block are those of another thread. {ONE_THREAD}"
            )
        if incoming.without_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"{self.name}: the previous block's routing weights were computed without gradients, so its router "
                "would silently not train. Reentrant gradient checkpointing cannot carry them from one segment to the "
                "next: use routing='fc', or checkpoint nothing between the blocks"
            )
        return incoming

    def hand_on(self, routing: Tensor, trainable: bool) -> None:
        """Leave routing weights for the successor, if there is one."""
        successor = self.successor
        if successor is not None:
            unit: RoutingUnit = successor.routing_unit  # type: ignore[assignment]
            unit.incoming = Incoming(routing, trainable and not routing.requires_grad, _thread())


def attach(module: nn.Module, unit: RoutingUnit) -> None:
    """Make `module`, which has its layers and its router already, a routing unit."""
    module.routing_unit = unit  # type: ignore[assignment]  # a plain object, not a submodule
    for name in filter(None, unit.layers):
        module.get_submodule(name).block = unit.name  # type: ignore[assignment]
    unit.handles = (
        module.register_forward_pre_hook(_enter, with_kwargs=True),
        module.register_forward_hook(_leave, always_call=True),
    )


def detach(module: nn.Module) -> None:
    """Undo `attach`; the router and the layers stay where they are."""
    unit: RoutingUnit = module.routing_unit  # type: ignore[assignment]
    for name in filter(None, unit.layers):
        module.get_submodule(name).block = None  # type: ignore[assignment]
    del module.routing_unit
    for handle in unit.handles:
        handle.remove()


def is_unit(module: nn.Module) -> bool:
    """Whether `attach` was called on the module (or on what it was copied from)."""
    return isinstance(getattr(module, "routing_unit", None), RoutingUnit)


def _enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    unit: RoutingUnit = module.routing_unit  # type: ignore[assignment]
    unit.enter(module)
    if unit.router is None:
        routing, trainable, _ = unit.take_previous()
    else:
        router: Any = module.get_submodule(unit.router)
        x = pooled_input(unit.name, args, kwargs, router.in_channels, unit.channels_last)
        if x.shape[1] != router.in_channels:
            raise ValueError(
                f"{unit.name}: its router was built for {router.in_channels} channels, but the block's input has "
                f"{x.shape[1]}; give convert() an example_input, from which it learns the true number"
            )
        routing = router(x, unit.take_previous().routing) if unit.takes_previous else router(x)
        trainable = any(parameter.requires_grad for parameter in router.parameters())
    unit.hand_on(routing, trainable)
    for name in unit.layers:
        layer = module.get_submodule(name) if name else module
        layer.routing = routing


def _leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    unit: RoutingUnit = module.routing_unit  # type: ignore[assignment]
    if unit.was_refused(module):  # the routing weights here are those of the thread that is inside
        return
    for name in unit.layers:
        layer = module.get_submodule(name) if name else module
        layer.routing = None  # type: ignore[assignment]
    unit.leave(module)


def pooled_input(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any], channels: int, channels_last: bool
) -> Tensor:
    """A unit's first positional argument, else its first keyword argument, as its router takes it: `[N, C, ...]`.

    Args:
        name: of the unit, for messages.
        args, kwargs: of its forward.
        channels: what the unit's layers or its router expect. A block with that many last, not second, is given
            `[N, H, W, C]`, and routing would pool over channels and tell rows apart.
        channels_last: see `RoutingUnit`.

    Raises:
        ValueError: a router cannot pool it.
    """
    x = args[0] if args else next(iter(kwargs.values()), None)
    if not isinstance(x, Tensor) or (x.ndim < 2 if channels_last else x.ndim not in (2, 4)):
        found = f"a tensor of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        wanted = "[N, ..., C]" if channels_last else "[N, C, H, W] or [N, C]"
        raise ValueError(
            f"{name}: routing pools the block's first input, which must be {wanted}; got {found}. "
            "Choose blocks whose input is a feature map, or convert the layers one by one"
        )
    if channels_last:
        return channels_second(x)
    if x.ndim == 4 and x.shape[1] != channels == x.shape[3]:
        raise ValueError(
            f"{name}: routing pools the block's first input over [N, C, H, W], but {tuple(x.shape)} has the "
            f"{channels} channels of its first layer last, [N, H, W, C]. Convert the block's linear layers one by one "
            "(blocks='...mlp.fc1'): theirs are known to be last. If these are [N, C, H, W], give images of another "
            "width as example_input"
        )
    return x
