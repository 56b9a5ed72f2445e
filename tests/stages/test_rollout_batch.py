"""Answers that share their prompt's tokens: the same log-probabilities,
loss and gradients as with a prompt for each."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

from catmllm.data.batches import Batch, Collator, Encoded
from catmllm.data.prompts import Sample, cif_prompt, design_prompt
from catmllm.models.catalytic_mllm import CatalyticMLLM
from catmllm.sample.answers import Rollout
from catmllm.sample.packed import rollout_batch
from catmllm.structure.system import System

Model = tuple[CatalyticMLLM, Collator]


@pytest.fixture(scope="module")
def answered(train_systems: list[System]) -> tuple[list[Sample], list[Rollout]]:
    """Prompts of unequal lengths, two with a structure, and 1 to 4 answers of unequal lengths to each."""
    a, b = train_systems[0], train_systems[500]
    prompts = [
        Sample(cif_prompt(a.identity)),
        Sample(design_prompt(b.identity, -1.0, exemplar=True), "", b),
        Sample(design_prompt(a.identity, 0.25)),
        Sample(design_prompt(a.identity, 2.0, exemplar=True), "", a),
    ]
    generator = torch.Generator().manual_seed(0)
    lengths = {0: [9, 1, 14], 1: [5, 70, 2, 33], 2: [11], 3: [8, 8]}
    rollouts = [
        Rollout(p, torch.randint(3, 60, (n,), generator=generator), torch.zeros(n), None, True, "")
        for p, part in lengths.items()
        for n in part
    ]
    return prompts, rollouts


def gradients(model: CatalyticMLLM, batches: list[Batch], weights: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of a weighted sum over the tokens of all batches."""
    model.zero_grad()
    for batch, weight in zip(batches, weights.split([len(b.targets) for b in batches])):
        (model(CatalyticMLLM.answer, batch, temperature=0.8).logprob * weight).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("path", ["", "reference"], ids=["default", "reference"])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-7), (torch.float32, 1e-4)], ids=["float64", "float32"]
)
@pytest.mark.parametrize("cuts", [[], [4], [1, 2, 5, 9]], ids=["whole", "two passes", "five passes"])
def test_loss_and_every_gradient_are_those_of_a_prompt_for_each_answer(
    small_model: Model,
    answered: tuple[list[Sample], list[Rollout]],
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    dtype: torch.dtype,
    bound: float,
    cuts: list[int],
) -> None:
    """Also where passes split a group, and into encoder and projector
    through the graph tokens of shared prompts.

    In float64 to 1e-6: transformers computes norms in float32 there too.
    """
    monkeypatch.setenv("CATMLLM_KERNELS", path)
    model, collate = copy.deepcopy(small_model[0]).to(dtype), small_model[1]
    prompts, rollouts = answered
    apart = rollout_batch(collate, prompts, rollouts, shared=False)
    bounds = [0, *cuts, len(rollouts)]
    parts = [rollout_batch(collate, prompts, rollouts[a:b]) for a, b in itertools.pairwise(bounds)]
    for batch in (apart, *parts):
        if batch.graph is not None:
            object.__setattr__(batch.graph, "edge_vec", batch.graph.edge_vec.to(dtype))
    with torch.no_grad():
        one = model(CatalyticMLLM.answer, apart, temperature=0.8).logprob
        other = torch.cat([model(CatalyticMLLM.answer, b, temperature=0.8).logprob for b in parts])
    torch.testing.assert_close(one, other, rtol=bound, atol=bound * 10)
    weights = torch.randn(len(one), generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(one)
    expected, found = gradients(model, [apart], weights), gradients(model, parts, weights)
    assert expected.keys() == found.keys() and any(n.startswith("encoder.") for n in found)
    for name, value in expected.items():
        assert float((found[name] - value).norm()) <= 10 * bound * float(value.norm() + 1e-6), name


def test_what_a_shared_batch_holds(small_model: Model, answered: tuple[list[Sample], list[Rollout]]) -> None:
    collate = small_model[1]
    prompts, rollouts = answered
    shared, apart = (rollout_batch(collate, prompts, rollouts, s) for s in (True, False))
    ids = [collate.prompt_ids(p) for p in prompts]
    assert shared.tokens == sum(map(len, ids)) + sum(len(r.ids) for r in rollouts)
    assert torch.equal(shared.targets, apart.targets)
    assert torch.equal(shared.answer_sample, apart.answer_sample)
    assert torch.equal(shared.position_ids[shared.answer_at], apart.position_ids[apart.answer_at])
    assert torch.equal(shared.input_ids[shared.answer_at], apart.input_ids[apart.answer_at])
    assert shared.graph is not None and shared.graph.n_systems == 2  # once a prompt
    assert apart.graph is not None and apart.graph.n_systems == 6


def test_an_answer_sees_its_own_prompt_alone(
    small_model: Model, answered: tuple[list[Sample], list[Rollout]]
) -> None:
    model, collate = small_model
    prompts, rollouts = answered
    changed = [
        Rollout(r.prompt, r.ids if i != 1 else r.ids.flip(0) + 1, r.logprob, None, True, "")
        for i, r in enumerate(rollouts)
    ]
    other = [
        design_prompt("CO</s>Pt9Cu3 (1 1 1)", 3.5) if i == 2 else p.prompt for i, p in enumerate(prompts)
    ]
    again = [Sample(text, "", p.graph) for text, p in zip(other, prompts)]
    with torch.no_grad():
        before = model(CatalyticMLLM.answer, b := rollout_batch(collate, prompts, rollouts)).logprob
        after = model(CatalyticMLLM.answer, rollout_batch(collate, again, changed)).logprob
    same = torch.isin(b.answer_sample, torch.tensor([1, 7]), invert=True)
    assert torch.equal(before[same], after[same])
    assert not torch.equal(before[b.answer_sample == 7], after[b.answer_sample == 7])


def test_other_attentions_say_so(small_model: Model, answered: tuple[list[Sample], list[Rollout]]) -> None:
    model, collate = copy.deepcopy(small_model[0]), small_model[1]
    model.text.config._attn_implementation = "sdpa"
    with pytest.raises(ValueError, match="attention: varlen"):
        model(CatalyticMLLM.answer, rollout_batch(collate, *answered))


def test_a_prompt_of_no_tokens_is_an_error(small_model: Model) -> None:
    with pytest.raises(ValueError, match="no tokens"):
        small_model[1].join_answers([Encoded([], [])], [[[1, 2]]])
