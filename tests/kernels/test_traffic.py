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


def test_a_log_probability_never_moves_the_logits() -> None:
    """Of 130 tokens and 300 words: the head once a block of tokens, the tokens once a tile of words,
    four numbers a token and tile."""
    from catmllm_kernels.interpret import counted, strict
    from catmllm_kernels.linear_logprob import triton as kernels
    from catmllm_kernels.linear_logprob.arguments import Backward, Forward

    tokens, width, words = 130, 64, 300
    hidden, weight = torch.randn(tokens, width).half(), torch.randn(words, width).half()
    targets = torch.randint(0, words, (tokens,))
    block_t, block_v, *_ = kernels.BLOCKS["forward", 2]
    tiles, blocks = -(-words // block_v), -(-tokens // block_t)
    with strict(), counted() as found:
        given = Forward(hidden, weight, targets)
        kernels.forward(given)
        ones = torch.ones(tokens)
        kernels.backward(Backward(ones, None, *given[:3], ones, torch.ones(0), 1.0, True, True))
    forward, gradient = found
    assert forward.touched["weight"] == 2 * weight.numel() == forward.moved["weight"] / blocks
    assert forward.touched["hidden"] == 2 * hidden.numel() == forward.moved["hidden"] / tiles
    assert forward.touched["parts"] == forward.moved["parts"] == 4 * 4 * tokens * tiles
    # once, in the dtype of the inputs
    assert gradient.touched["out"] == gradient.moved["out"] == 2 * tokens * words
    assert gradient.moved["weight"] == blocks * 2 * weight.numel()
