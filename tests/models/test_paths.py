"""Every way through the decoder's attention, each against transformers' own untouched model:
states, gradients, tokens.

The ways: csrc's kernels in float32 and bfloat16, the packed attention without them (float16,
CATMLLM_KERNELS=reference, a tree whose csrc was not built), padded rows, and transformers' `generate` with
its cache. What they hand to transformers changes with its releases: `make test-newest` and `make test-oldest`
run this page on both ends.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from catmllm_kernels import rows
from catmllm_kernels.varlen_attention import cpu
from tests.models.test_decoder import LENGTHS, packed, problem, towers

# Of the largest value. Two blocks round some thirty times to the dtype: its unit 2^-24, 2^-8,
# 2^-11 times 16 and less.
BOUND = {torch.float32: 2e-5, torch.bfloat16: 0.06, torch.float16: 0.008}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WAYS = ["as it comes", "CATMLLM_KERNELS=reference", "without csrc"]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Everything that a test runs takes this way."""
    if request.param == "CATMLLM_KERNELS=reference":
        monkeypatch.setenv("CATMLLM_KERNELS", "reference")
    elif request.param == "without csrc":
        for library in (rows, cpu):
            monkeypatch.setattr(library, "unfit", lambda x: "not built, in this test")
    return request.param


@pytest.fixture(autouse=True)
def quiet() -> Any:
    """That an op runs by its plain definition is said once per process; here it is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*plain definition.*")
        yield


def agree(ours: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> None:
    assert ours.dtype == dtype and exact.dtype == torch.float64
    assert (ours - exact).abs().max() <= BOUND[dtype] * exact.abs().max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_samples(way: str, dtype: torch.dtype) -> None:
    """Samples end to end, as training sees them: every sample alone in transformers' model, in float64."""
    ours, own = towers(dtype)
    exact = own.double().model.language_model
    ids, positions, grad = problem()
    states = packed(ours, ids, positions)
    states.backward(grad.to(dtype))
    expected = []
    for part, at in zip(ids.split(LENGTHS), positions[1:].split(LENGTHS, dim=1)):
        out = exact(inputs_embeds=exact.embed_tokens(part)[None], position_ids=at[:, None], use_cache=False)
        expected.append(out.last_hidden_state[0])
    torch.cat(expected).backward(grad.to(dtype).double())
    agree(states.detach(), torch.cat(expected).detach(), dtype)
    parameters = dict(ours.model.language_model.named_parameters())
    assert len(parameters) == 2 * 12 + 2
    for name, other in exact.named_parameters():
        found, wanted = parameters[name].grad, other.grad
        assert found is not None and wanted is not None
        # A key's bias moves every score of a row alike: its gradient is nothing but rounding.
        assert (found - wanted).abs().max() <= BOUND[dtype] * wanted.abs().max() + BOUND[dtype] / 10, name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_with_and_without_padding(way: str, dtype: torch.dtype) -> None:
    """The whole model called as transformers' users call it."""
    ours, own = towers(dtype)
    own = own.double()
    ids = torch.randint(1, 50, (3, 11), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    with torch.no_grad():
        agree(ours(input_ids=ids).logits, own(input_ids=ids).logits, dtype)
        found, wanted = (m(input_ids=ids, attention_mask=mask).logits for m in (ours, own))
    agree(found[mask.bool()], wanted[mask.bool()], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_generate(way: str, dtype: torch.dtype) -> None:
    """Decoding with a cache. Every step's logits are transformers' own
    in float64 for the tokens that were chosen.

    Tokens of two models may part where two logits are as close as the rounding;
    logits given the tokens may not.
    """
    ours, own = towers(dtype)
    own = own.double()
    ids = torch.randint(1, 50, (2, 7), generator=torch.Generator().manual_seed(3))
    options = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6, "return_dict_in_generate": True}
    with torch.no_grad():
        out = ours.generate(ids, attention_mask=torch.ones_like(ids), output_logits=True, **options)
        assert out.sequences.shape == (2, 13)
        exact = own(input_ids=out.sequences[:, :-1]).logits[:, 6:]
    found = torch.stack(out.logits, 1)  # transformers' generate returns float32
    assert found.shape == exact.shape
    assert (found - exact).abs().max() <= BOUND[dtype] * exact.abs().max()
