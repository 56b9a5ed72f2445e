"""Every op with its cases, once: tests, benches, traffic counts and the ahead-of-time compiler all read this list.

An op's folder has a `cases.py` with `CASES`, a list of `Case`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

OPS = ("escn", "so3_pool_project", "linear_logprob", "varlen_attention", "decoder")


@dataclass(frozen=True)
class Case:
    """One op at one size.

    `arguments(dtype, device, seed)` makes the arguments; `function` and `reference` take them and return one tensor.
    Floating arguments that require a gradient are compared by it. `compile(dtype)` calls the Triton implementation on meta
    tensors, forward and backward, for launch.recorded(). A size is one of "test" (tiny, any device), "slow" (the same, a
    wider sweep) or "model" (as trained: compiled, timed and counted, never interpreted).
    """

    op: str
    name: str
    size: Literal["test", "slow", "model"]
    arguments: Callable[[torch.dtype, torch.device, int], tuple[Any, ...]]
    function: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    tolerance: Mapping[
        torch.dtype, float
    ]  # max |a - b| / max |b| of outputs and of each gradient, against float64
    compile: Callable[[torch.dtype], None] | None = None

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        return tuple(self.tolerance)


def cases(op: str | None = None, size: str | None = None) -> list[Case]:
    """All cases, or those of one op or size."""
    found: list[Case] = []
    for name in OPS if op is None else (op,):
        found += importlib.import_module(f"catmllm_kernels.{name}.cases").CASES
    return [case for case in found if size is None or case.size == size]
