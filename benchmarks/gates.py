"""The correctness gate of every figure: outputs and gradients against the float64 oracle, before anything is timed.

The oracle is a loop over examples, so it runs a few of them. What is compared runs the whole batch, as it will be
timed, but the gradient of its output is zero for all other examples: then all gradients can be compared.
"""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}
"""RMS(error) / RMS(reference) of one layer, per tensor."""
FEW = 4


class GateFailure(RuntimeError):
    """A contender is wrong: it gets this message instead of a time."""


def exact_float32() -> None:
    """No TensorFloat-32: cuDNN uses it for float32 convolutions by default, and is then less exact than the gates."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def few_of(batch: int, few: int = FEW) -> list[int]:
    """At most so many examples, the first and the last among them."""
    count = min(few, batch)
    return sorted({round(i * (batch - 1) / max(1, count - 1)) for i in range(count)})


def sparse_cotangent(y: Tensor, examples: list[int], seed: int = 2) -> Tensor:
    """A gradient of the output `[N, ...]` in its layout, zero but for some examples; the same for every layout."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn((len(examples), *y.shape[1:]), generator=generator, dtype=torch.float32)
    cotangent = torch.zeros_like(y)
    cotangent[examples] = drawn.to(y.device, y.dtype)
    return cotangent


def relative_error(actual: Tensor, expected: Tensor, smallest_norm: float = 1e-300) -> float:
    """RMS(error) / RMS(reference); infinite for a wrong shape or a value that is not finite."""
    if actual.shape != expected.shape or not actual.isfinite().all():
        return float("inf")
    difference = actual.detach().double() - expected.detach().double()
    return float(difference.norm() / expected.detach().double().norm().clamp_min(smallest_norm))


def check(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> float:
    """The largest error of the tensors of the same names.

    Raises:
        GateFailure: a tensor is missing, or off by more than the tolerance.
    """
    missing = sorted(expected.keys() - actual.keys())
    if missing:
        raise GateFailure(f"gate failed: no {missing[0]}")
    # The gradient of a router that is certain of its answer may be nothing beside the others, and all rounding.
    smallest_norm = max(1e-300, 1e-8 * max(float(tensor.detach().norm()) for tensor in expected.values()))
    errors = {name: relative_error(actual[name], tensor, smallest_norm) for name, tensor in expected.items()}
    worst = max(errors, key=lambda name: errors[name])
    if not errors[worst] <= tolerance:
        raise GateFailure(f"gate failed: {worst} is off by {errors[worst]:.1e}, more than {tolerance:.0e}")
    return errors[worst]
