"""Routing functions: from a layer's input to one weight per example and expert (paper section 3).

A router pools its input over space and maps the pooled channels to `[N, E]`. Everything after the pooling runs in
float32, also under autocast and for half-precision networks: routing weights multiply whole kernels, and a rounded
sigmoid saturates early. On CUDA the linear maps are products like any other: where TF32 is allowed
(`torch.backends.cuda.matmul.fp32_precision = "tf32"`, before torch 2.9 `allow_tf32`; off by default), their factors are
rounded to that.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condconv.ops.spec import without_autocast

DEFAULT_GAIN = 0.01
"""Factor on the Glorot-uniform initial weights of a router's last map; the authors' code has 1."""

NETWORK_WIDE = ("single", "partially_shared")
"""Rules for sharing `fc` routers between blocks; `condconv.convert` implements them."""


def pool(x: Tensor) -> Tensor:
    """Mean over all positions in float32 (float64 for float64): `[N, C, ...]` to `[N, C]`."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if x.dim() == 2:
        return x.to(dtype)
    over = tuple(range(2, x.dim()))
    if not x.requires_grad:
        return x.mean(dim=over, dtype=dtype)
    # The gradient of a sum is a view of [N, C] numbers, that of a mean is written out for every position.
    # Not `Size.numel()`, which tracers of dynamic sizes take for a constant.
    return x.sum(dim=over, dtype=dtype) / math.prod(x.shape[2:])


class Router(nn.Module):
    """Base of all routing functions: pooling, precision and dropout; subclasses give the logits and the activation.

    Args:
        in_channels: Channels C of the input.
        num_experts: Experts E.
        dropout: Probability that a routing weight of an example is zeroed, the others scaled by `1 / (1 - p)`.
        expert_dropout: Probability that an expert is zeroed for the whole batch, the others scaled likewise. Zeroed,
            not skipped: every parameter still gets a gradient, so distributed training needs no search for unused
            ones.
    """

    def __init__(
        self, in_channels: int, num_experts: int, *, dropout: float = 0.0, expert_dropout: float = 0.0
    ) -> None:
        super().__init__()
        for name, value in (("in_channels", in_channels), ("num_experts", num_experts)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}.")
        for name, rate in (("dropout", dropout), ("expert_dropout", expert_dropout)):
            if not 0.0 <= rate < 1.0:
                raise ValueError(f"{name} must be in [0, 1), got {rate!r}.")
        self.in_channels = in_channels
        self.num_experts = num_experts
        self.dropout = float(dropout)
        self.expert_dropout = float(expert_dropout)

    def logits(self, pooled_NC: Tensor) -> Tensor:
        """Routing logits `[N, E]` of pooled inputs `[N, C]`, with what else the router is given beside them."""
        raise NotImplementedError

    def activation(self, logits_NE: Tensor) -> Tensor:
        """Routing weights of logits: a sigmoid unless a subclass says otherwise."""
        return torch.sigmoid(logits_NE)

    def forward(self, x: Tensor) -> Tensor:
        """Routing weights `[N, E]` in float32 of inputs `[N, C]` or `[N, C, ...]`."""
        self._check(x)
        with without_autocast(x.device):
            return self._drop(self.activation(self.logits(pool(x))))

    def _check(self, x: Tensor) -> None:
        if x.dim() < 2 or x.shape[1] != self.in_channels:
            raise ValueError(f"This router pools inputs [N, {self.in_channels}, ...] but was given {tuple(x.shape)}.")

    def _drop(self, routing_NE: Tensor) -> Tensor:
        if not self.training:
            return routing_NE
        if self.expert_dropout > 0.0:
            keep_1E = F.dropout(torch.ones_like(routing_NE[:1]), self.expert_dropout, training=True)
            routing_NE = routing_NE * keep_1E
        return F.dropout(routing_NE, self.dropout, training=True) if self.dropout > 0.0 else routing_NE

    def extra_repr(self) -> str:
        """Channels, experts and the dropouts that are on."""
        text = f"{self.in_channels}, {self.num_experts}"
        text += f", dropout={self.dropout}" if self.dropout else ""
        return text + (f", expert_dropout={self.expert_dropout}" if self.expert_dropout else "")


def _linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """`layer(x)` in the dtype of x, whatever the layer's parameters were cast to."""
    return F.linear(x, layer.weight.to(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))


class FCRouter(Router):
    """The paper's default: `sigmoid(pool(x) R + b)`.

    The bias starts at zero and the weights are Glorot-uniform times `gain`. The authors' layer has gain 1. On small
    maps, where pooling averages little, that starts every example with kernels of its own and learns slowly; with a
    small gain the network starts near its static twin and routing grows as it pays (docs/experiments.md).

    Args:
        in_channels: Channels C of the input.
        num_experts: Experts E.
        dropout: See `Router`.
        expert_dropout: See `Router`.
        gain: Factor on the initial weights of the map that gives the logits; at least 0.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(
        self,
        in_channels: int,
        num_experts: int,
        *,
        dropout: float = 0.0,
        expert_dropout: float = 0.0,
        gain: float = DEFAULT_GAIN,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_channels, num_experts, dropout=dropout, expert_dropout=expert_dropout)
        if not 0.0 <= gain < math.inf:
            raise ValueError(f"gain must be at least 0, got {gain!r}.")
        self.gain = gain
        self.fc = nn.Linear(in_channels, num_experts, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all weights anew."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, gain=self.gain if module is self.fc else 1.0)
                nn.init.zeros_(module.bias)

    def logits(self, pooled_NC: Tensor) -> Tensor:
        """One linear map."""
        return _linear(pooled_NC, self.fc)


class SoftmaxRouter(FCRouter):
    """`softmax((pool(x) R + b) / temperature)`; the temperature is a buffer, so that schedules survive checkpoints."""

    temperature: Tensor

    def __init__(self, in_channels: int, num_experts: int, *, temperature: float = 1.0, **options: Any) -> None:
        super().__init__(in_channels, num_experts, **options)
        self.register_buffer("temperature", torch.tensor(1.0, device=options.get("device")))
        self.set_temperature(temperature)
        self.initial_temperature = temperature

    def reset_parameters(self) -> None:
        """Draw all weights anew; the temperature is again that of the constructor."""
        super().reset_parameters()
        if hasattr(self, "initial_temperature"):  # not yet while the base class is constructed
            self.set_temperature(self.initial_temperature)

    def set_temperature(self, temperature: float) -> None:
        """Set the temperature, a positive number; large ones make routing uniform."""
        if not temperature > 0.0:
            raise ValueError(f"temperature must be positive, got {temperature!r}.")
        self.temperature.fill_(temperature)

    def activation(self, logits_NE: Tensor) -> Tensor:
        """Weights that are positive and sum to one."""
        return torch.softmax(logits_NE / self.temperature.to(logits_NE.dtype), dim=1)


class HiddenRouter(FCRouter):
    """One hidden layer with ReLU before the linear map; small, medium and large have C/8, C and 8C units."""

    def __init__(self, in_channels: int, num_experts: int, *, width: float = 1.0, **options: Any) -> None:
        super().__init__(in_channels, num_experts, **options)
        factory: dict[str, Any] = {"device": options.get("device"), "dtype": options.get("dtype")}
        units = max(1, round(in_channels * width))
        self.hidden = nn.Linear(in_channels, units, **factory)
        self.fc = nn.Linear(units, num_experts, **factory)
        self.reset_parameters()

    def logits(self, pooled_NC: Tensor) -> Tensor:
        """Linear, ReLU, linear."""
        return _linear(torch.relu(_linear(pooled_NC, self.hidden)), self.fc)


class HierarchicalRouter(FCRouter):
    """The previous block's routing weights are concatenated to the pooled input.

    Args:
        in_channels: Channels C of the input.
        num_experts: Experts E.
        prev_experts: Experts of the previous block; 0 for the first one, which is then an `FCRouter`.
        options: As for `FCRouter`.
    """

    def __init__(self, in_channels: int, num_experts: int, *, prev_experts: int = 0, **options: Any) -> None:
        super().__init__(in_channels, num_experts, **options)
        if not isinstance(prev_experts, int) or prev_experts < 0:
            raise ValueError(f"prev_experts must be an integer >= 0, got {prev_experts!r}.")
        self.prev_experts = prev_experts
        if prev_experts:
            factory: dict[str, Any] = {"device": options.get("device"), "dtype": options.get("dtype")}
            self.fc = nn.Linear(in_channels + prev_experts, num_experts, **factory)
            self.reset_parameters()

    def forward(self, x: Tensor, previous_routing_NE: Tensor | None = None) -> Tensor:
        """Routing weights `[N, E]` in float32, given those of the previous block `[N, prev_experts]`."""
        self._check(x)
        given = 0 if previous_routing_NE is None else previous_routing_NE.shape[1]
        if given != self.prev_experts:
            raise ValueError(f"This router expects {self.prev_experts} previous routing weights, got {given}.")
        with without_autocast(x.device):
            pooled = pool(x)
            if previous_routing_NE is not None:
                pooled = torch.cat([pooled, previous_routing_NE.to(pooled.dtype)], dim=1)
            return self._drop(self.activation(self.logits(pooled)))


def _hidden(width: float) -> Callable[..., Router]:
    def build(in_channels: int, num_experts: int, **options: Any) -> Router:
        return HiddenRouter(in_channels, num_experts, width=width, **options)

    return build


_ROUTERS: dict[str, Callable[..., Router]] = {
    "fc": FCRouter,
    "softmax": SoftmaxRouter,
    "hidden_small": _hidden(1 / 8),
    "hidden_medium": _hidden(1.0),
    "hidden_large": _hidden(8.0),
    "hierarchical": HierarchicalRouter,
    "single": FCRouter,
    "partially_shared": FCRouter,
}
ROUTINGS: tuple[str, ...] = tuple(_ROUTERS)
"""Names of all routing functions."""


def check_routing(name: str) -> None:
    """Raise `ValueError` with the nearest name unless `name` is a routing function."""
    if name in ROUTINGS:
        return
    near = difflib.get_close_matches(str(name), ROUTINGS, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"Unknown routing function {name!r}.{hint} Available: {', '.join(ROUTINGS)}.")


def build_router(
    name: str,
    in_channels: int,
    num_experts: int,
    *,
    dropout: float = 0.0,
    expert_dropout: float = 0.0,
    temperature: float = 1.0,
    prev_experts: int = 0,
    gain: float = DEFAULT_GAIN,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Router:
    """Build a router by name.

    Args:
        name: One of `ROUTINGS`. "single" and "partially_shared" give the `fc` router that `convert` shares between
            blocks.
        in_channels: Channels C of the input.
        num_experts: Experts E.
        dropout: Dropout on single routing weights, see `Router`.
        expert_dropout: Dropout of whole experts, see `Router`.
        temperature: Of the softmax; any other router refuses a value but 1.
        prev_experts: Experts of the previous block, for "hierarchical"; any other router refuses a value but 0.
        gain: Factor on the initial weights, see `FCRouter`.
        device: Of the parameters.
        dtype: Of the parameters; routing is computed in float32 all the same.

    Raises:
        ValueError: For an unknown name or an option out of range.
    """
    check_routing(name)
    options: dict[str, Any] = {
        "dropout": dropout,
        "expert_dropout": expert_dropout,
        "gain": gain,
        "device": device,
        "dtype": dtype,
    }
    if name == "softmax":
        options["temperature"] = temperature
    elif temperature != 1.0:
        raise ValueError(f"temperature={temperature} is an option of routing 'softmax', not of {name!r}.")
    if name == "hierarchical":
        options["prev_experts"] = prev_experts
    elif prev_experts:
        raise ValueError(f"prev_experts={prev_experts} is an option of routing 'hierarchical', not of {name!r}.")
    return _ROUTERS[name](in_channels, num_experts, **options)
