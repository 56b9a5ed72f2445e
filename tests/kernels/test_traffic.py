"""The bytes that the edge path moves, against what must be moved, and the counting itself."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton.runtime.interpreter")


def test_a_copy_moves_its_tensors_once() -> None:
    import triton
    import triton.language as tl

    from catmllm_kernels.interpret import counted
    from catmllm_kernels.launch import launch

    @triton.jit
    def copy_kernel(x, y, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        twice = tl.load(x + i, mask=i < n, other=0.0) + tl.load(x + i, mask=i < n, other=0.0)
        tl.store(y + i, twice, mask=i < n)

    x = torch.randn(37)
    y = torch.empty(37)
    with counted() as found:
        launch(copy_kernel, (3,), x, y, 37, BLOCK=16)
    assert torch.equal(y, 2 * x)
    (traffic,) = found
    assert traffic.moved == {"x": 2 * 37 * 4, "y": 37 * 4}
    assert traffic.touched == {"x": 37 * 4, "y": 37 * 4}


@pytest.mark.slow
def test_at_most_what_two_fused_kernels_need() -> None:
    from catmllm_kernels.escn.cases import MODELS
    from catmllm_kernels.traffic import GOAL, forward

    for name, goal in GOAL.items():
        assert forward(MODELS[name])["KiB an edge"] <= 1.3 * goal
