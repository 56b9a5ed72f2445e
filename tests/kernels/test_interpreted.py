"""Every registered case through its Triton kernels in the interpreter, against float64:
values and all gradients.

Memory starts as NaN, and the programs of a launch run in two shuffled orders that must give the same bits.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch

from catmllm_kernels.escn.layout import n_rows
from catmllm_kernels.registry import Case, as_double, cases, value_and_gradients
from catmllm_kernels.rounding import error_bounds
from tests.kernels.test_registry import CPU, compare, errors

interpreter = pytest.importorskip("triton.runtime.interpreter")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


KERNELS = [c for c in cases() if importlib.util.find_spec(f"catmllm_kernels.{c.op}.triton")]
SMALL = [c for c in KERNELS if c.size == "test"]


def label(case: Case) -> str:
    return f"{case.op} {case.name}"


def check(case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from catmllm_kernels.interpret import INTERPRETS_BFLOAT16, strict

    if dtype == torch.bfloat16 and not INTERPRETS_BFLOAT16:
        pytest.skip(
            "this Triton's interpreter takes bfloat16's bits for numbers; compiled tables cover the dtype"
        )
    monkeypatch.setenv("CATMLLM_KERNELS", "triton")
    args = case.arguments(dtype, CPU, 0)
    with strict(seed=1):
        found = value_and_gradients(case.function, args)
    with strict(seed=2):
        again = value_and_gradients(case.function, args)
    compare(case, dtype, args, found)
    for a, b in zip(found, again):
        assert torch.equal(a, b)


@pytest.mark.parametrize("case", SMALL, ids=label)
def test_float32(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    check(case, torch.float32, monkeypatch)


@pytest.mark.parametrize("case", [c for c in cases("escn", "test") if "no edges" not in c.name], ids=label)
def test_the_fused_product_in_float32(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is for half precision; only in float32 is an error of the kernel sure to show. Alone: the others,
    checked above, read what it stores and no more."""
    from catmllm_kernels.escn.reference import product_and_activation
    from catmllm_kernels.escn.triton import product
    from catmllm_kernels.interpret import strict

    monkeypatch.setattr(product, "FUSED", (torch.float32,))
    (a,) = case.arguments(torch.float32, CPU, 0)
    shape = len(a.radial), n_rows(a.lmax, a.mmax), 2 * a.x.shape[2]
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        with strict(seed=1):
            found = product.product_and_activation(a, rows)
        with strict(seed=2):
            again = product.product_and_activation(a, rows)
        exact = as_double((a, rows))
        expected = product_and_activation(*exact)
        bounds = error_bounds(lambda: product_and_activation(*exact), 2.0**-24)
    off = errors([x.view_as(y) for x, y in zip(found, expected)], expected)
    assert all(error <= bound for error, bound in zip(off, bounds, strict=True)), (off, bounds)
    assert all(map(torch.equal, found, again))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [c for c in SMALL if c.op == "escn"][1:5], ids=label)
def test_half_precision(case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    check(case, dtype, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [c for c in KERNELS if c.size != "model"], ids=label)
def test_every_case_and_dtype(case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    check(case, dtype, monkeypatch)
