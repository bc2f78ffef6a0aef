"""The mixture form: run experts, mix outputs, `y_n = sum_e a_ne (W_e * x_n)`.

E times the multiply-adds of one convolution, but kernels of examples never exist: with few output positions and many
examples that is by far the cheaper form, and it is the exact mathematical dual of mixing first. Two ways:

- small dense kernels on small maps, pointwise above all: matrix products of all rows (examples x positions) with all
  experts.
- anything else: one library convolution per expert.

Nothing but the arguments is kept for the backward: `dz_e = W_e^T * dy` serves both `dx_n = sum_e a_ne dz_ne` and
`da_ne = <dz_ne, x_n>`; `dW_e` is the kernel gradient of `(a_ne dy_n, x_n)`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from condconv.ops.spec import ConvSpec, Problem, convolution_gradient, crop_to_live_taps, memory_format_of, mixing_dtype

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def supports(problem: Problem) -> str | None:
    """Every convolution."""
    return None


def forward(x_NCHW: Tensor, routing_NE: Tensor, weight_EKCRS: Tensor, spec: ConvSpec, workspace_bytes: int) -> Tensor:
    """Per-example convolution without bias; see `condconv.functional.condconv2d` for shapes. No workspace is needed."""
    weight_EKCRS, spec, _ = crop_to_live_taps(weight_EKCRS, (x_NCHW.shape[2], x_NCHW.shape[3]), spec)
    kernel_RS = (weight_EKCRS.shape[3], weight_EKCRS.shape[4])
    if _is_pointwise(weight_EKCRS, spec):
        height, width = spec.output_size((x_NCHW.shape[2], x_NCHW.shape[3]), kernel_RS)
        y_MK = _forward_rows(_rows(_subsample(x_NCHW, spec)), routing_NE, weight_EKCRS[:, :, :, 0, 0])
        y_NKPQ = y_MK.view(x_NCHW.shape[0], height, width, -1).permute(0, 3, 1, 2)
        return y_NKPQ.contiguous(memory_format=memory_format_of(x_NCHW))
    dtype = mixing_dtype(x_NCHW, routing_NE, weight_EKCRS)
    sum_NKPQ: Tensor | None = None
    for routing_N, weight_KCRS in zip(routing_NE.to(dtype).unbind(1), weight_EKCRS, strict=True):
        part = F.conv2d(x_NCHW, weight_KCRS.to(x_NCHW.dtype), None, *spec).to(dtype)
        scale = routing_N[:, None, None, None]
        sum_NKPQ = part.mul_(scale) if sum_NKPQ is None else sum_NKPQ.addcmul_(part, scale)
    assert sum_NKPQ is not None  # there is at least one expert
    return sum_NKPQ.to(x_NCHW.dtype).contiguous(memory_format=memory_format_of(x_NCHW))


def backward(
    grad_y_NKPQ: Tensor,
    x_NCHW: Tensor,
    routing_NE: Tensor,
    weight_EKCRS: Tensor,
    spec: ConvSpec,
    needs: tuple[bool, bool, bool],
    workspace_bytes: int,
) -> Gradients:
    """Gradients of x, routing weights and expert weights, each only where `needs` asks for it."""
    full_shape = weight_EKCRS.shape
    live_EKCRS, spec, where = crop_to_live_taps(weight_EKCRS, (x_NCHW.shape[2], x_NCHW.shape[3]), spec)
    if _is_pointwise(live_EKCRS, spec):
        grad_x, grad_routing, grad_live = _backward_pointwise(
            grad_y_NKPQ, x_NCHW, routing_NE, live_EKCRS[:, :, :, 0, 0], spec, needs
        )
        grad_live = None if grad_live is None else grad_live[:, :, :, None, None]
    else:
        grad_x, grad_routing, grad_live = _backward_convolutions(
            grad_y_NKPQ, x_NCHW, routing_NE, live_EKCRS, spec, needs
        )
    if grad_live is None or grad_live.shape == full_shape:
        return grad_x, grad_routing, grad_live
    grad_weight = grad_live.new_zeros(full_shape)
    grad_weight[:, :, :, where[0], where[1]] = grad_live
    return grad_x, grad_routing, grad_weight


def _is_pointwise(weight_EKCRS: Tensor, spec: ConvSpec) -> bool:
    return spec.groups == 1 and spec.is_pointwise((weight_EKCRS.shape[3], weight_EKCRS.shape[4]))


def _subsample(x_NCHW: Tensor, spec: ConvSpec) -> Tensor:
    return x_NCHW if spec.stride == (1, 1) else x_NCHW[:, :, :: spec.stride[0], :: spec.stride[1]]


def _rows(tensor_NCHW: Tensor) -> Tensor:
    """`[M, C]` with M = N * H * W, a view when the tensor is channels last."""
    return tensor_NCHW.permute(0, 2, 3, 1).reshape(-1, tensor_NCHW.shape[1])


def _routing_rows(routing_NE: Tensor, rows: int) -> Tensor:
    """Routing weights `[M, E]`: those of an example for each of its positions."""
    return routing_NE.repeat_interleave(rows // max(1, routing_NE.shape[0]), dim=0)


def _forward_rows(x_MC: Tensor, routing_NE: Tensor, weight_EKC: Tensor) -> Tensor:
    """`y_m = sum_e a_me W_e x_m`. Whichever of input and output has fewer channels is the one that is expanded by E."""
    experts, out_channels, in_channels = weight_EKC.shape
    dtype = mixing_dtype(x_MC, routing_NE, weight_EKC)
    routing_ME = _routing_rows(routing_NE.to(dtype), x_MC.shape[0])
    weight_EKC = weight_EKC.to(x_MC.dtype)
    if out_channels <= in_channels or x_MC.dtype != dtype:
        y_MEK = F.linear(x_MC, weight_EKC.reshape(experts * out_channels, in_channels)).unflatten(1, (experts, -1))
        return torch.bmm(routing_ME.unsqueeze(1), y_MEK.to(dtype)).squeeze(1).to(x_MC.dtype)
    y_MK = x_MC.new_zeros(x_MC.shape[0], out_channels)
    for routing_M, weight_KC in zip(routing_ME.unbind(1), weight_EKC, strict=True):
        y_MK.addmm_(x_MC * routing_M[:, None], weight_KC.T)
    return y_MK


def _backward_pointwise(
    grad_y_NKPQ: Tensor,
    x_NCHW: Tensor,
    routing_NE: Tensor,
    weight_EKC: Tensor,
    spec: ConvSpec,
    needs: tuple[bool, bool, bool],
) -> Gradients:
    x_MC, grad_MK = _rows(_subsample(x_NCHW, spec)), _rows(grad_y_NKPQ)
    dtype = mixing_dtype(x_NCHW, routing_NE, weight_EKC)
    routing_ME = _routing_rows(routing_NE.to(dtype), x_MC.shape[0])
    grad_x, grad_routing = _backward_inputs(grad_MK, x_MC, routing_ME, weight_EKC, needs)
    grad_weight = None
    if needs[2]:
        grad_weight = _backward_experts(grad_MK, x_MC, routing_ME, weight_EKC)
    if grad_x is not None:
        grad_x = grad_x.view(x_NCHW.shape[0], *grad_y_NKPQ.shape[2:], -1).permute(0, 3, 1, 2)
        if spec.stride != (1, 1):
            full = torch.zeros_like(x_NCHW)
            _subsample(full, spec).copy_(grad_x)
            grad_x = full
    if grad_routing is not None:
        grad_routing = grad_routing.view(*routing_NE.shape[:1], -1, routing_NE.shape[1]).sum(1).to(routing_NE.dtype)
    return grad_x, grad_routing, grad_weight


def _backward_inputs(
    grad_MK: Tensor, x_MC: Tensor, routing_ME: Tensor, weight_EKC: Tensor, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the rows of x and of the routing weights of each row, one expert at a time."""
    need_x, need_routing, _ = needs
    if not (need_x or need_routing):
        return None, None
    grad_x_MC = torch.zeros(x_MC.shape, dtype=routing_ME.dtype, device=x_MC.device) if need_x else None
    grad_routing_ME = torch.empty_like(routing_ME) if need_routing else None
    for expert, weight_KC in enumerate(weight_EKC.to(grad_MK.dtype)):
        dz_MC = torch.mm(grad_MK, weight_KC).to(routing_ME.dtype)
        if grad_routing_ME is not None:
            grad_routing_ME[:, expert] = (dz_MC * x_MC).sum(1)
        if grad_x_MC is not None:
            grad_x_MC.addcmul_(dz_MC, routing_ME[:, expert, None])
    return None if grad_x_MC is None else grad_x_MC.to(x_MC.dtype), grad_routing_ME


def _backward_experts(grad_MK: Tensor, x_MC: Tensor, routing_ME: Tensor, weight_EKC: Tensor) -> Tensor:
    """`dW_e = sum_m a_me dy_m x_m^T`, written once per expert; the smaller factor carries the routing weight."""
    grad_EKC = torch.empty_like(weight_EKC)
    scale_x = x_MC.shape[1] < grad_MK.shape[1]
    for expert, grad_KC in enumerate(grad_EKC):
        routing_M1 = routing_ME[:, expert, None]
        left = grad_MK if scale_x else (grad_MK * routing_M1).to(grad_MK.dtype)
        right = (x_MC * routing_M1).to(x_MC.dtype) if scale_x else x_MC
        if grad_KC.dtype == left.dtype:
            torch.mm(left.T, right, out=grad_KC)
        else:
            grad_KC.copy_(torch.mm(left.T, right))
    return grad_EKC


def _backward_convolutions(
    grad_y_NKPQ: Tensor,
    x_NCHW: Tensor,
    routing_NE: Tensor,
    weight_EKCRS: Tensor,
    spec: ConvSpec,
    needs: tuple[bool, bool, bool],
) -> Gradients:
    need_x, need_routing, need_weight = needs
    dtype = mixing_dtype(x_NCHW, routing_NE, weight_EKCRS)
    grad_x = torch.zeros_like(x_NCHW, dtype=dtype) if need_x else None
    grad_routing = torch.empty_like(routing_NE) if need_routing else None
    grad_weight = torch.empty_like(weight_EKCRS) if need_weight else None
    for expert, weight_KCRS in enumerate(weight_EKCRS):
        scale = routing_NE[:, expert, None, None, None].to(dtype)
        kernel = weight_KCRS.to(x_NCHW.dtype)
        if need_x or need_routing:
            dz = convolution_gradient(grad_y_NKPQ, x_NCHW, kernel, spec, [True, False, False])[0].to(dtype)
            if grad_routing is not None:
                grad_routing[:, expert] = (dz * x_NCHW).sum((1, 2, 3))
            if grad_x is not None:
                grad_x.addcmul_(dz, scale)
        if grad_weight is not None:
            scaled = (grad_y_NKPQ * scale).to(x_NCHW.dtype)
            grad_weight[expert] = convolution_gradient(scaled, x_NCHW, kernel, spec, [False, True, False])[1]
    return None if grad_x is None else grad_x.to(x_NCHW.dtype), grad_routing, grad_weight
