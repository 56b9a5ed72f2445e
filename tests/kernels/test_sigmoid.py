"""The sigmoid of the special-function units: its error bound, and that it is what is compiled."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("triton.runtime.interpreter")

import triton
import triton.language as tl

from catmllm_kernels.escn.triton.activation import sigmoid

X = np.concatenate(
    [np.linspace(-86, 86, 40_001), np.geomspace(1e-30, 1, 300), -np.geomspace(1e-30, 1, 300), [0.0]]
).astype(np.float32)


def units(x: np.ndarray, of_exponential: float, of_reciprocal: float) -> np.ndarray:
    """The four instructions, the two approximate ones off by a relative error, each result in float32."""
    t = (x * np.float32(-1.4426950408889634)).astype(np.float32)
    e = (np.exp2(t.astype(np.float64)) * (1 + of_exponential)).astype(np.float32)
    total = (e + np.float32(1)).astype(np.float32)
    return ((1 / total.astype(np.float64)) * (1 + of_reciprocal)).astype(np.float32)


def test_the_bound_holds_at_the_worst_that_the_manual_allows() -> None:
    exact = 1 / (1 + np.exp(-X.astype(np.float64)))
    relative = (1 - exact) * (1.25 * np.abs(X) * 2.0**-24 + 2.0**-22) + 2.0**-24 + 2.0**-23
    worst = 0.0
    for a, b in itertools.product((-(2.0**-22), 2.0**-22), (-(2.0**-23), 2.0**-23)):
        error = np.abs(units(X, a, b) - exact)
        # half a unit more: a draw is rounded to float32 once more than the unit's own result
        assert (error <= (relative + 2.0**-24) * exact * (1 + 1e-3)).all()
        worst = max(worst, float(error.max()))
    assert 2.0**-24 < worst < 2.0**-22
    with np.errstate(over="ignore"):
        assert units(np.array([-200, 200], np.float32), 0, 0).tolist() == [0, 1]


def test_interpreted_it_is_the_definition() -> None:
    @triton.jit
    def kernel(x, y, N: tl.constexpr):  # type: ignore[no-untyped-def]
        i = tl.arange(0, N)
        tl.store(y + i, sigmoid(tl.load(x + i)))

    x = torch.linspace(-86, 86, 256)
    y = torch.empty_like(x)
    kernel[(1,)](x, y, N=256)
    torch.testing.assert_close(y, torch.sigmoid(x.double()).float(), rtol=2e-6, atol=0)


COMPILED = """
from catmllm_kernels.aot import compiled, launches
from catmllm_kernels.registry import cases
import torch
(case,) = (c for c in cases("escn", "test") if c.name == "L1M0 s2, odd sizes")
start = next(s for s in launches(case, torch.float16, 80) if s.kernel.__name__ == "activation_grad_kernel")
print(compiled(start, 80).asm["ptx"])
"""


def test_compiled_it_is_two_instructions_of_the_units_and_no_division() -> None:
    done = subprocess.run(
        [sys.executable, "-c", COMPILED],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"TRITON_INTERPRET": "0"},
    )
    assert "ex2.approx.ftz.f32" in done.stdout and "rcp.approx.ftz.f32" in done.stdout
    assert "div" not in done.stdout.split(".visible .entry")[1].split("ret;")[0].replace("divergent", "")
