"""The one custom operator behind all backends: forward, backward, shapes for tracing, autograd.

The algorithm is chosen inside the operator, at run time and from true sizes. To `torch.compile` and `torch.export` a
layer is therefore one opaque node whatever the batch size: no recompilation when the choice changes, no `groups`
baked in.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from condconv.ops.choice import choose
from condconv.ops.registry import AUTO, get_backend
from condconv.ops.spec import ConvSpec, Problem, memory_format_of, without_autocast

_ORDINARY = (Tensor, nn.Parameter)


def _dense(x_NCHW: Tensor) -> Tensor:
    """The tensor itself when it is contiguous in the format of its strides, else a copy in that format."""
    return x_NCHW.contiguous(memory_format=memory_format_of(x_NCHW))


def _spec(stride: list[int], padding: list[int], dilation: list[int], groups: int) -> ConvSpec:
    return ConvSpec((stride[0], stride[1]), (padding[0], padding[1]), (dilation[0], dilation[1]), groups)


def _backend(name: str, x_NCHW: Tensor, weight_EKCRS: Tensor, spec: ConvSpec, training: bool) -> Any:
    problem = Problem.of(x_NCHW, weight_EKCRS, spec, training)
    return get_backend(choose(problem).backend if name == AUTO else name, problem)


def _empty_output(x_NCHW: Tensor, weight_EKCRS: Tensor, spec: ConvSpec) -> Tensor:
    size_HW = (x_NCHW.shape[2], x_NCHW.shape[3])
    output_PQ = spec.output_size(size_HW, (weight_EKCRS.shape[3], weight_EKCRS.shape[4]))
    shape = (x_NCHW.shape[0], weight_EKCRS.shape[1], *output_PQ)
    return torch.empty(shape, dtype=x_NCHW.dtype, device=x_NCHW.device, memory_format=memory_format_of(x_NCHW))


def convolve(
    x_NCHW: Tensor,
    routing_NE: Tensor,
    weight_EKCRS: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    backend: str,
    training: bool,
    workspace_bytes: int,
) -> Tensor:
    """Per-example convolution without bias. Arguments are taken as validated by `condconv.functional`.

    The operator's implementation. It may be called by itself where `is_unobserved`: of the time of a small layer at
    batch 1, dispatching the operator is a third.
    """
    spec = _spec(stride, padding, dilation, groups)
    if x_NCHW.shape[0] == 0:
        return _empty_output(x_NCHW, weight_EKCRS, spec)
    x_NCHW, weight_EKCRS = _dense(x_NCHW), weight_EKCRS.contiguous()
    chosen = _backend(backend, x_NCHW, weight_EKCRS, spec, training)
    with without_autocast(x_NCHW.device):
        y_NKPQ: Tensor = chosen.forward(x_NCHW, routing_NE, weight_EKCRS, spec, workspace_bytes)
    return y_NKPQ


conv2d = torch.library.custom_op("condconv::conv2d", convolve, mutates_args=())


def is_unobserved(*tensors: Tensor) -> bool:
    """Whether these are ordinary tensors on a CPU and nobody compiles, traces, transforms or intercepts operators."""
    try:
        return (
            all(type(t) in _ORDINARY and t.device.type == "cpu" for t in tensors)
            and not torch.compiler.is_compiling()
            and not torch._C._is_tracing()
            and torch._C._len_torch_dispatch_stack() == 0
            and not torch._C._is_torch_function_mode_enabled()
            and torch._C._functorch.peek_interpreter_stack() is None
            and forward_ad._current_level < 0
        )
    except AttributeError:  # private names, which a later torch may give up; then the operator is always called
        return False


def _differentiates() -> bool:
    """Whether grad or jvp of torch.func is at work. A compiler runs it when it traces, inside the transform."""
    try:
        stack = torch._C._functorch.get_interpreter_stack()
        types = torch._C._functorch.TransformType
        return bool(stack) and any(interpreter.key() in (types.Grad, types.Jvp) for interpreter in stack)
    except AttributeError:  # private names, which a later torch may give up
        return False


# What torch.compiler.assume_constant_result does, which would load the compiler, seconds, with this library.
_differentiates._dynamo_marked_constant = True  # type: ignore[attr-defined]


def needs_plain_torch(*tensors: Tensor) -> bool:
    """Whether a derivative is taken here that the operator does not have: forward mode, or grad and jvp of torch.func.

    The operator would give such a derivative without a word as zero.
    """
    if _differentiates():
        return True
    if torch.compiler.is_compiling():
        return False
    return any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)


@conv2d.register_fake
def _(
    x_NCHW: Tensor,
    routing_NE: Tensor,
    weight_EKCRS: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    backend: str,
    training: bool,
    workspace_bytes: int,
) -> Tensor:
    return _empty_output(x_NCHW, weight_EKCRS, _spec(stride, padding, dilation, groups))


@torch.library.custom_op("condconv::conv2d_backward", mutates_args=())
def conv2d_backward(
    grad_y_NKPQ: Tensor,
    x_NCHW: Tensor,
    routing_NE: Tensor,
    weight_EKCRS: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    backend: str,
    needs: list[bool],
    workspace_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, routing weights and expert weights; an empty tensor where `needs` does not ask for one."""
    spec = _spec(stride, padding, dilation, groups)
    inputs = (x_NCHW, routing_NE, weight_EKCRS)
    if x_NCHW.shape[0] == 0:
        x, routing, weight = (
            torch.zeros_like(_dense(t) if t.dim() == 4 else t) if need else t.new_empty(0)
            for t, need in zip(inputs, needs, strict=True)
        )
        return x, routing, weight
    x_NCHW, weight_EKCRS = _dense(x_NCHW), weight_EKCRS.contiguous()
    grad_y_NKPQ = grad_y_NKPQ.contiguous(memory_format=memory_format_of(x_NCHW))
    chosen = _backend(backend, x_NCHW, weight_EKCRS, spec, training=True)
    with without_autocast(x_NCHW.device):
        grads = chosen.backward(
            grad_y_NKPQ, x_NCHW, routing_NE, weight_EKCRS, spec, (needs[0], needs[1], needs[2]), workspace_bytes
        )
    if grads[0] is not None:
        grads = (grads[0].contiguous(memory_format=memory_format_of(x_NCHW)), *grads[1:])
    grad_x, grad_routing, grad_weight = (
        t.new_empty(0) if grad is None else grad.contiguous() if grad.dim() != 4 else grad
        for t, grad in zip(inputs, grads, strict=True)
    )
    return grad_x, grad_routing, grad_weight


@conv2d_backward.register_fake
def _(
    grad_y_NKPQ: Tensor,
    x_NCHW: Tensor,
    routing_NE: Tensor,
    weight_EKCRS: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    backend: str,
    needs: list[bool],
    workspace_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = torch.empty_like(x_NCHW, memory_format=memory_format_of(x_NCHW))
    grad_routing = torch.empty_like(routing_NE, memory_format=torch.contiguous_format)
    grad_weight = torch.empty_like(weight_EKCRS, memory_format=torch.contiguous_format)
    return (
        grad_x if needs[0] else x_NCHW.new_empty(0),
        grad_routing if needs[1] else routing_NE.new_empty(0),
        grad_weight if needs[2] else weight_EKCRS.new_empty(0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, stride, padding, dilation, groups, backend, _, workspace_bytes = inputs
    need_x, need_routing, need_weight = ctx.needs_input_grad[:3]
    read = (need_routing or need_weight, need_x or need_weight, need_x or need_routing)
    # A layer whose experts and router are frozen keeps no activation alive: of x, only the shape is needed.
    ctx.save_for_backward(*(tensor if used else None for tensor, used in zip(tensors, read, strict=True)))
    ctx.likes = [
        None if used else (tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        for tensor, used in zip(tensors, read, strict=True)
    ]
    ctx.options = (stride, padding, dilation, groups, backend, workspace_bytes)


def _autograd(ctx: Any, grad_y_NKPQ: Tensor) -> tuple[Any, ...]:
    *geometry, backend, workspace_bytes = ctx.options
    needs = list(ctx.needs_input_grad[:3])
    tensors = [
        torch.empty_strided(like[0], like[1], dtype=like[2], device=like[3]) if tensor is None else tensor
        for tensor, like in zip(ctx.saved_tensors, ctx.likes, strict=True)
    ]
    grads = conv2d_backward(grad_y_NKPQ, *tensors, *geometry, backend, needs, workspace_bytes)
    return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), *([None] * 7)


def _no_second_order(ctx: Any, *grads: Tensor) -> Any:
    raise RuntimeError(
        "CondConv's algorithms have first-order gradients only. For second-order gradients use backend='reference', "
        "which is plain differentiable torch."
    )


conv2d.register_autograd(_autograd, setup_context=_setup_context)
conv2d_backward.register_autograd(_no_second_order)
