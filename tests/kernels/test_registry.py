"""Every registered case on the implementation of this device, and on each that can be forced,
against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from catmllm_kernels.registry import Case, as_double, cases, value_and_gradients

CPU = torch.device("cpu")


def errors(found: list[Tensor], expected: list[Tensor]) -> list[float]:
    """The largest relative error of each tensor; NaN where one is NaN."""
    return [
        float((a.double() - b).abs().max() / b.abs().max().clamp_min(1e-30)) if b.numel() else 0.0
        for a, b in zip(found, expected, strict=True)
    ]


def compare(case: Case, dtype: torch.dtype, args: Any, found: list[Tensor]) -> None:
    """Each tensor to its own bound."""
    exact = as_double(args)
    expected = value_and_gradients(case.reference, exact)
    for error, bound in zip(errors(found, expected), case.bounds(dtype, exact), strict=True):
        assert error <= bound


@pytest.mark.parametrize(
    ("case", "dtype"),
    [pytest.param(c, d, id=f"{c.op} {c.name} {d}") for c in cases(size="test") for d in c.dtypes],
)
def test_every_case_equals_its_definition(case: Case, dtype: torch.dtype) -> None:
    args = case.arguments(dtype, CPU, 0)
    compare(case, dtype, args, value_and_gradients(case.function, args))


@pytest.mark.parametrize("case", cases(size="test"), ids=lambda c: f"{c.op} {c.name}")
def test_float64_equals_its_definition(case: Case) -> None:
    args = case.arguments(torch.float64, CPU, 0)
    found, expected = (value_and_gradients(f, args) for f in (case.function, case.reference))
    assert max(errors(found, expected)) < 1e-12


@pytest.mark.parametrize("op", ["escn", "decoder"])
def test_float32_stays_within_the_condition_of_its_sums_for_any_draw(
    op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thirty seeds: a bound that was fitted to some draws would not hold for the next."""
    of_op = [c for c in cases(op, "test") if "no edges" not in c.name and "tiles" not in c.name]
    for seed in range(100, 130):
        case = of_op[seed % len(of_op)]
        args = case.arguments(torch.float32, CPU, seed)
        exact = as_double(args)
        expected, bounds = value_and_gradients(case.reference, exact), case.bounds(torch.float32, exact)
        for path in ("cpu", "reference"):
            monkeypatch.setenv("CATMLLM_KERNELS", path)
            found = errors(value_and_gradients(case.function, args), expected)
            assert all(e <= b for e, b in zip(found, bounds, strict=True)), (
                path,
                case.name,
                seed,
                found,
                bounds,
            )


@pytest.mark.parametrize("case", [c for c in cases("escn", "test") if "L" in c.name], ids=lambda c: c.name)
def test_a_gradient_that_is_off_by_a_hundred_thousandth_is_found(case: Case) -> None:
    """Of its largest element, where its sum does not cancel: the bounds are no wider than that."""
    bounds = case.bounds(torch.float32, case.arguments(torch.float64, CPU, 0))
    assert min(bounds) > 1e-7 and sorted(bounds)[len(bounds) // 2] < 1e-5
