"""CondConv2d and CondLinear: layers that own expert weights, drop-in for `nn.Conv2d` and `nn.Linear`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condconv.functional import IntPair, Padding, _pair, channels_second, check_positions, cond_linear, condconv2d
from condconv.ops.registry import check_name
from condconv.routing import Router, build_router

_PADDING_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}


class _CondLayer(nn.Module):
    """What both layers share: experts, their initialisation one by one, and where routing weights come from."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        kernel_shape: tuple[int, ...],
        bias: bool,
        num_experts: int,
        router: str | Router | None,
        backend: str,
        workspace_bytes: int,
        factory: dict[str, Any],
    ) -> None:
        super().__init__()
        if not isinstance(num_experts, int) or isinstance(num_experts, bool) or num_experts < 1:
            raise ValueError(f"num_experts must be an integer >= 1, got {num_experts!r}.")
        check_name(backend)
        self.num_experts = num_experts
        self.backend = backend
        self.workspace_bytes = workspace_bytes
        self.weight = nn.Parameter(torch.empty(num_experts, *kernel_shape, **factory))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(num_experts, kernel_shape[0], **factory)) if bias else None
        )
        if isinstance(router, str):
            router = build_router(router, in_channels, num_experts, **factory)
        if router is not None and router.num_experts != num_experts:
            raise ValueError(f"The router has {router.num_experts} experts, the layer {num_experts}.")
        self.router = router
        # The enclosing block's hook puts shared routing weights here for the time of one forward; see
        # `condconv.convert`.
        self.routing: Tensor | None = None
        # That block's name. A router in here is then the block's, which never pools this layer's input.
        self.block: str | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise each expert on its own, as `nn.Conv2d` and `nn.Linear` do: by the fan-in of one kernel."""
        for expert in range(self.num_experts):
            kernel = self.weight[expert]  # iterating gives views that must not be written to under torch.device("meta")
            nn.init.kaiming_uniform_(kernel, a=math.sqrt(5))
            if self.bias is not None:
                fan_in = kernel[0].numel()
                bound = 1 / math.sqrt(fan_in) if fan_in > 0 else 0.0
                nn.init.uniform_(self.bias[expert], -bound, bound)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        # `network.to(memory_format=torch.channels_last)` takes a 5-D weight for that of a 3-D convolution and fails:
        # let the conversion see flat experts. Device and dtype conversions do not mind.
        def convert(tensor: Tensor) -> Tensor:
            if tensor.dim() != 5:
                return fn(tensor)  # type: ignore[no-any-return]
            return fn(tensor.flatten(1)).view(tensor.shape)  # type: ignore[no-any-return]

        return super()._apply(convert, recurse)  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        # Torch calls no hook after a KeyboardInterrupt or SystemExit. What the block's hook left here then is no state,
        # and with its graph could not be copied.
        return {**self.__dict__, "routing": None}

    def _routing_weights(self, x: Tensor, routing_weights: Tensor | None) -> Tensor:
        if routing_weights is not None:
            return routing_weights
        if self.routing is not None:
            return self.routing
        if self.block is not None:
            raise RuntimeError(
                f"A {type(self).__name__} of the block {self.block!r}, which routes for all its layers, was called "
                "while that block was not running. Gradient checkpointing inside a block does so, when it computes a "
                "part of it again: checkpoint whole blocks, or convert the parts as blocks of their own. By hand, call "
                "the whole block, or layer(x, routing_weights)."
            )
        if self.router is not None:
            routing: Tensor = self.router(x)
            return routing
        raise RuntimeError(
            f"{type(self).__name__} has no router of its own (router=None) and was called without routing weights. "
            "Call layer(x, routing_weights)."
        )


class CondConv2d(_CondLayer):
    """2-D convolution whose kernel is, for each example, a mixture of experts (paper section 3).

    The arguments are those of `torch.nn.Conv2d` and then:

    Args:
        in_channels: Channels C of the input.
        out_channels: Channels K of the output.
        kernel_size: R and S.
        stride: As in `nn.Conv2d`.
        padding: As in `nn.Conv2d`, and "same_tf" for TensorFlow's "same" with strides.
        dilation: As in `nn.Conv2d`.
        groups: As in `nn.Conv2d`.
        bias: Whether to have a bias per expert, mixed like the kernels.
        padding_mode: As in `nn.Conv2d`.
        num_experts: Experts E.
        router: The layer's own routing function, by name or as a module, pooled from the layer's input. None when
            routing weights are always given: `layer(x, routing_weights)`.
        backend: One of `condconv.list_backends()`.
        workspace_bytes: Memory for mixed kernels; 0 for an automatic value.
        device: Of the parameters.
        dtype: Of the parameters.

    Shapes: `weight [E, K, C / groups, R, S]`, `bias [E, K]`, input `[N, C, H, W]`, output `[N, K, P, Q]`.

    Raises:
        ValueError: For arguments that do not fit together.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntPair,
        stride: IntPair = 1,
        padding: Padding = 0,
        dilation: IntPair = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        num_experts: int = 8,
        router: str | Router | None = "fc",
        backend: str = "auto",
        workspace_bytes: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(f"groups={groups} must divide in_channels={in_channels} and out_channels={out_channels}.")
        if padding_mode not in _PADDING_MODES:
            raise ValueError(f"padding_mode must be one of {', '.join(_PADDING_MODES)}, got {padding_mode!r}.")
        self.kernel_size = _pair(kernel_size, "kernel_size", 1)
        super().__init__(
            in_channels,
            (out_channels, in_channels // groups, *self.kernel_size),
            bias,
            num_experts,
            router,
            backend,
            workspace_bytes,
            {"device": device, "dtype": dtype},
        )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.stride = _pair(stride, "stride", 1)
        self.dilation = _pair(dilation, "dilation", 1)
        self.groups = groups
        self.padding: Padding = padding if isinstance(padding, str) else _pair(padding, "padding", 0)
        if isinstance(padding, str) and padding not in ("same", "valid", "same_tf"):
            raise ValueError(f'padding must be an integer, a pair, "same", "valid" or "same_tf", got {padding!r}.')
        if padding == "same" and self.stride != (1, 1):
            raise ValueError('padding="same" needs stride 1, as in torch; for strides use padding="same_tf".')
        self.padding_mode = padding_mode
        if padding_mode != "zeros" and padding == "same_tf":
            raise ValueError('padding="same_tf" pads with zeros only.')

    def forward(self, x: Tensor, routing_weights: Tensor | None = None) -> Tensor:
        """Convolve `x [N, C, H, W]`, by the routing weights `[N, E]` given, else the block's, else its own router's."""
        routing = self._routing_weights(x, routing_weights)
        x, padding = self._pad(x)
        return condconv2d(
            x,
            routing,
            self.weight,
            self.bias,
            self.stride,
            padding,
            self.dilation,
            self.groups,
            self.backend,
            self.workspace_bytes,
        )

    def _pad(self, x: Tensor) -> tuple[Tensor, Padding]:
        """The input, padded unless with zeros, and the padding that is left to the convolution."""
        if self.padding_mode == "zeros" or self.padding == "valid":
            return x, self.padding
        return F.pad(x, self._explicit_padding(), mode=_PADDING_MODES[self.padding_mode]), 0

    def _explicit_padding(self) -> list[int]:
        """Padding in the order of `F.pad`: left, right, top, bottom."""
        amounts: list[int] = []
        for i in (1, 0):
            if isinstance(self.padding, str):  # "same", at stride 1
                total = self.dilation[i] * (self.kernel_size[i] - 1)
                amounts += [total // 2, total - total // 2]
            else:
                pair = _pair(self.padding, "padding", 0)
                amounts += [pair[i], pair[i]]
        return amounts

    def extra_repr(self) -> str:
        """As `nn.Conv2d`, with experts and backend."""
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        text += f", padding={self.padding!r}" if self.padding != (0, 0) else ""
        text += f", dilation={self.dilation}" if self.dilation != (1, 1) else ""
        text += f", groups={self.groups}" if self.groups != 1 else ""
        text += ", bias=False" if self.bias is None else ""
        text += f", padding_mode={self.padding_mode!r}" if self.padding_mode != "zeros" else ""
        return f"{text}, num_experts={self.num_experts}, backend={self.backend!r}"


class CondLinear(_CondLayer):
    """Linear layer whose matrix is, for each example, a mixture of experts.

    Args:
        in_features: C.
        out_features: K.
        bias: Whether to have a bias per expert, mixed like the matrices.
        num_experts: Experts E.
        router: As in `CondConv2d`, pooled over the inner positions of the input if there are any.
        backend: One of `condconv.list_backends()`.
        workspace_bytes: Memory for mixed matrices; 0 for an automatic value.
        device: Of the parameters.
        dtype: Of the parameters.

    Shapes: `weight [E, K, C]`, `bias [E, K]`, input `[N, ..., C]`, output `[N, ..., K]`.

    Raises:
        ValueError: For arguments that do not fit together.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        num_experts: int = 8,
        router: str | Router | None = "fc",
        backend: str = "auto",
        workspace_bytes: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_features,
            (out_features, in_features),
            bias,
            num_experts,
            router,
            backend,
            workspace_bytes,
            {"device": device, "dtype": dtype},
        )
        self.in_features = in_features
        self.out_features = out_features

    def forward(self, x: Tensor, routing_weights: Tensor | None = None) -> Tensor:
        """Map `x [N, ..., C]`, by the routing weights `[N, E]` given, else the block's, else its own router's."""
        check_positions(x)
        routing = self._routing_weights(channels_second(x), routing_weights)
        return cond_linear(x, routing, self.weight, self.bias, self.backend, self.workspace_bytes)

    def extra_repr(self) -> str:
        """As `nn.Linear`, with experts and backend."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"num_experts={self.num_experts}, backend={self.backend!r}"
        )
