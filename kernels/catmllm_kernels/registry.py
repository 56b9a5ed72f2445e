"""Every op with its cases, once: tests, benches, traffic counts and
the ahead-of-time compiler all read this list.

An op's folder has a `cases.py` with `CASES`, a list of `Case`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from catmllm_kernels.rounding import error_bounds

OPS = ("escn", "so3_pool_project", "linear_logprob", "varlen_attention", "decoder")


@dataclass(frozen=True)
class Case:
    """One op at one size.

    `arguments(dtype, device, seed)` makes the arguments; `function` and `reference` take them and return one
    tensor. Floating arguments that require a gradient are compared by it. `compile(dtype)` calls the Triton
    implementation on meta tensors, forward and backward, for launch.recorded(). A size is one of "test"
    (tiny, any device), "slow" (the same, a wider sweep) or "model" (as trained: compiled, timed and counted,
    never interpreted).
    """

    op: str
    name: str
    size: Literal["test", "slow", "model"]
    arguments: Callable[[torch.dtype, torch.device, int], tuple[Any, ...]]
    function: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    tolerance: Mapping[torch.dtype, float]  # max |a - b| / max |b| of each tensor, see `bounds`
    compile: Callable[[torch.dtype], None] | None = None

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        return tuple(dict.fromkeys((torch.float32, *self.tolerance)))

    def bounds(self, dtype: torch.dtype, args: Any) -> list[float]:
        """What max |a - b| / max |b| may be of the value and of each gradient, against float64.

        Calculated from the condition of these very sums in float32, unless `tolerance` has it; half precision
        rounds what it stores, a fixed number of times, much more coarsely than its float32 sums.
        """
        double = as_double(args)
        if dtype in self.tolerance:
            return [self.tolerance[dtype]] * (1 + sum(t.requires_grad for t in tensors_of(double)))
        return error_bounds(lambda: value_and_gradients(self.reference, double), 2.0**-24)


def tensors_of(part: Any) -> list[Tensor]:
    """The tensors in nested tuples and lists."""
    if isinstance(part, Tensor):
        return [part]
    return [t for item in part for t in tensors_of(item)] if isinstance(part, list | tuple) else []


def as_double(part: Any) -> Any:
    """The same arguments in float64, as new leaves."""
    if isinstance(part, Tensor):
        t = part.detach()
        return (t.double() if t.is_floating_point() else t).requires_grad_(part.requires_grad)
    if isinstance(part, tuple) and hasattr(part, "_fields"):
        return type(part)(*map(as_double, part))
    return type(part)(map(as_double, part)) if isinstance(part, list | tuple) else part


def value_and_gradients(function: Callable[..., Tensor], args: Any, seed: int = 1) -> list[Tensor]:
    """function(*args), and the gradients of a random weighting of it,
    the same in every dtype and on every device."""
    out = function(*args)
    leaves = [t for t in tensors_of(args) if t.requires_grad]
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent.to(out))]


def cases(op: str | None = None, size: str | None = None) -> list[Case]:
    """All cases, or those of one op or size."""
    found: list[Case] = []
    for name in OPS if op is None else (op,):
        found += importlib.import_module(f"catmllm_kernels.{name}.cases").CASES
    return [case for case in found if size is None or case.size == size]
