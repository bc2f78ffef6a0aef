"""Small per-example convolutions with odd sizes, and the float64 oracle's answers: outputs and the four gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from numerics import assert_close
from torch import Tensor

from condconv import condconv2d
from condconv.ops import reference
from condconv.ops.registry import BACKENDS
from condconv.ops.spec import ConvSpec, Problem

CPU_BACKENDS = [name for name in BACKENDS if not name.startswith("triton")]
"""All algorithms in plain torch; the Triton kernels have tests of their own."""

NAMES = ("x", "routing", "weight", "bias")


class Case(NamedTuple):
    """One problem; the fields are as in `nn.Conv2d`, sizes in the letters of `condconv.ops.spec`."""

    batch: int = 3
    channels: int = 5
    out_channels: int = 7
    size: tuple[int, int] = (7, 7)
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    experts: int = 3

    def __str__(self) -> str:
        """Only what differs from the defaults, as the name of a test."""
        different = {k: v for k, v in self._asdict().items() if v != self._field_defaults[k]}
        return " ".join(f"{k}={v}".replace(" ", "") for k, v in different.items()) or "default"

    @property
    def spec(self) -> ConvSpec:
        return ConvSpec(self.stride, self.padding, self.dilation, self.groups)

    def tensors(self, dtype: torch.dtype = torch.float64, channels_last: bool = False) -> list[Tensor]:
        """x, routing weights, expert weights and biases, drawn with a fixed seed; routing is never below float32."""
        generator = torch.Generator().manual_seed(1)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        fan_in = self.channels // self.groups * self.kernel[0] * self.kernel[1]
        x = draw(self.batch, self.channels, *self.size).to(dtype)
        routing = torch.sigmoid(draw(self.batch, self.experts))
        weight = draw(self.experts, self.out_channels, self.channels // self.groups, *self.kernel) / fan_in**0.5
        bias = draw(self.experts, self.out_channels)
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        return [x, routing.to(torch.promote_types(dtype, torch.float32)), weight.to(dtype), bias.to(dtype)]

    def problem(self, dtype: torch.dtype = torch.float64, channels_last: bool = False) -> Problem:
        x, _, weight, _ = self.tensors(dtype, channels_last)
        return Problem.of(x, weight, self.spec, training=True)

    def supported_by(self, backend: str, dtype: torch.dtype = torch.float64) -> bool:
        return BACKENDS[backend].supports(self.problem(dtype)) is None


def case_for(backend: str, **fields: Any) -> Case:
    """A layer of four channels that the backend takes: dense, with two groups, depthwise, or of one example."""
    cases = [Case(channels=4, out_channels=4, groups=groups, **fields) for groups in (1, 2, 4)]
    cases.append(cases[0]._replace(batch=min(1, cases[0].batch)))
    if backend not in BACKENDS:
        return cases[0]
    return next(case for case in cases if case.supported_by(backend))


def leaves(tensors: list[Tensor]) -> list[Tensor]:
    """Copies that ask for gradients and keep strides."""
    return [t.detach().clone().requires_grad_() for t in tensors]


def cotangent(y: Tensor) -> Tensor:
    """A gradient of the output with a fixed seed, in the output's dtype and layout."""
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return torch.empty_like(y).copy_(grad)


def run(tensors: list[Tensor], spec: ConvSpec, backend: str, workspace_bytes: int = 0) -> list[Tensor]:
    """Output and the four gradients by a backend, through the public function."""
    x, routing, weight, bias = arguments = leaves(tensors)
    y = condconv2d(
        x, routing, weight, bias, spec.stride, spec.padding, spec.dilation, spec.groups, backend, workspace_bytes
    )
    return [y.detach(), *torch.autograd.grad(y, arguments, cotangent(y))]


def oracle(tensors: list[Tensor], spec: ConvSpec, padding: tuple[int, int, int, int] | None = None) -> list[Tensor]:
    """Output and the four gradients in float64; `padding` is explicit zero padding in the order of `F.pad`."""
    x, routing, weight, bias = arguments = leaves([t.double() for t in tensors])
    padded = x if padding is None else F.pad(x, padding)
    y = reference.condconv2d(padded, routing, weight, bias, spec)
    # The oracle is given the rounded gradient that a run in the tensors' dtype is given.
    grad_y = cotangent(y).to(tensors[0].dtype).double()
    return [y.detach(), *torch.autograd.grad(y, arguments, grad_y)]


def assert_all_close(actual: list[Tensor], expected: list[Tensor], dtype: torch.dtype, message: str = "") -> None:
    """Compare outputs and gradients, each by its own norm."""
    for name, a, e in zip(("y", *(f"gradient of {n}" for n in NAMES)), actual, expected, strict=True):
        assert_close(a, e, f"{message} {name}".strip(), dtype)
