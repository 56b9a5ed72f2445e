"""Every registered case on the implementation of this device, and on each that can be forced,
against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from catmllm_kernels.registry import Case, cases

CPU = torch.device("cpu")


def tensors_of(part: Any) -> list[Tensor]:
    """The tensors in nested tuples and lists."""
    if isinstance(part, Tensor):
        return [part]
    return [t for item in part for t in tensors_of(item)] if isinstance(part, list | tuple) else []


def as_double(part: Any) -> Any:
    if isinstance(part, Tensor):
        t = part.detach()
        return (t.double() if t.is_floating_point() else t).requires_grad_(part.requires_grad)
    if isinstance(part, tuple) and hasattr(part, "_fields"):
        return type(part)(*map(as_double, part))
    return type(part)(map(as_double, part)) if isinstance(part, list | tuple) else part


def value_and_gradients(function: Any, args: Any, seed: int) -> list[Tensor]:
    out = function(*args)
    leaves = [t for t in tensors_of(args) if t.requires_grad]
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent.to(out.dtype))]


def worst(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative error of a tensor; NaN where one is NaN."""
    assert len(found) == len(expected)
    errors = [
        float((a.double() - b).abs().max() / b.abs().max().clamp_min(1e-30)) if b.numel() else 0.0
        for a, b in zip(found, expected)
    ]
    return max(errors) if all(e == e for e in errors) else float("nan")


@pytest.mark.parametrize(
    ("case", "dtype"),
    [pytest.param(c, d, id=f"{c.op} {c.name} {d}") for c in cases(size="test") for d in c.dtypes],
)
def test_every_case_equals_its_definition(case: Case, dtype: torch.dtype) -> None:
    args = case.arguments(dtype, CPU, 0)
    found = value_and_gradients(case.function, args, 1)
    expected = value_and_gradients(case.reference, as_double(args), 1)
    assert worst(found, expected) < case.tolerance[dtype]


@pytest.mark.parametrize("case", cases(size="test"), ids=lambda c: f"{c.op} {c.name}")
def test_float64_equals_its_definition(case: Case) -> None:
    args = case.arguments(torch.float64, CPU, 0)
    found, expected = (value_and_gradients(f, args, 1) for f in (case.function, case.reference))
    assert worst(found, expected) < 1e-12
