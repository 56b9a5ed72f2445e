"""The decode loop against transformers: greedy tokens, log-probabilities, the top-p distribution,
and what seeds fix."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from catmllm.config import SamplingConfig
from catmllm.data.batches import Batch, Collator, Encoded
from catmllm.data.prompts import (
    GRAPH,
    Sample,
    cif_prompt,
    design_prompt,
    design_sample,
    property_prompt,
    property_sample,
)
from catmllm.models.catalytic_mllm import CatalyticMLLM
from catmllm.models.projector import Projector
from catmllm.sample.answers import Rollout, answer_limits
from catmllm.sample.engine import RolloutEngine
from catmllm.sample.packed import rollout_batch
from catmllm.seeds import hash_seed
from catmllm.structure.system import System

Model = tuple[CatalyticMLLM, Collator]
GREEDY = SamplingConfig(temperature=1.0, top_p=1e-6, max_new_tokens=24)


def some_prompts(systems: list[System]) -> list[Sample]:
    """Prompts of unequal lengths, two of them with a structure."""
    a, b = systems[0], systems[500]
    return [
        Sample(cif_prompt(a.identity)),
        Sample(design_prompt(b.identity, -1.0, exemplar=True), "", b),
        Sample(property_sample(a).prompt, "", a),
        Sample(property_prompt("CO</s>Pd (1 1 1)</s>[]", graph=False)),
        Sample(design_prompt(a.identity, 0.25)),
    ]


@pytest.fixture(scope="module")
def prompts(train_systems: list[System]) -> list[Sample]:
    return some_prompts(train_systems)


@pytest.fixture(scope="module")
def ending_model(small_model: Model, prompts: list[Sample]) -> Model:
    """The model with another end token: one that it writes first at many places, so that answers end at times
    that differ."""
    model, collate = small_model
    params = SamplingConfig(max_new_tokens=14)
    rollouts = RolloutEngine(model, collate).generate(prompts, params, [9], group_size=4)
    answers = [r.ids.tolist() for r in rollouts]
    ending = copy.copy(collate)
    ending.end_id = max(
        {t for ids in answers for t in ids}, key=lambda t: len({ids.index(t) for ids in answers if t in ids})
    )
    return model, ending


def left_padded(model: CatalyticMLLM, collate: Collator, samples: list[Sample]) -> dict[str, torch.Tensor]:
    """The prompts as transformers' `generate` takes them."""
    ids = [collate.prompt_ids(s) for s in samples]
    width = max(map(len, ids))
    padded = torch.full((len(ids), width), collate.pad_id)
    mask = torch.zeros_like(padded)
    for row, p in enumerate(ids):
        padded[row, width - len(p) :] = torch.tensor(p)
        mask[row, width - len(p) :] = 1
    rows = [Encoded(p, [], None, s.graph) for p, s in zip(ids, samples)]
    with torch.no_grad():
        embeds = model.text.embed_tokens(padded)
        embeds[mask.bool()] = model.embed(collate.join(rows))
    return {"inputs_embeds": embeds, "attention_mask": mask}


def generated(model: CatalyticMLLM, collate: Collator, prompts: list[Sample]) -> torch.Tensor:
    """Greedy tokens by transformers' own `generate`, a row per prompt."""
    llm = copy.deepcopy(model.llm)  # `generate` leaves the positions of its last batch behind in the model
    return llm.generate(
        **left_padded(model, collate, prompts),
        do_sample=False,
        max_new_tokens=GREEDY.max_new_tokens,
        eos_token_id=collate.end_id,
        pad_token_id=collate.pad_id,
        suppress_tokens=[collate.graph_id, collate.energy_id],
    )


def check_greedy(model: CatalyticMLLM, collate: Collator, prompts: list[Sample]) -> list[Rollout]:
    ours = RolloutEngine(model, collate).generate(prompts, GREEDY, [0])
    theirs = generated(model, collate, prompts)
    for row, r in enumerate(ours):
        expected = theirs[row].tolist()
        if collate.end_id in expected:
            expected = expected[: expected.index(collate.end_id) + 1]
        assert r.ids.tolist() == expected
        assert r.prompt == row
    return ours


def test_greedy_tokens_are_those_of_generate(small_model: Model, prompts: list[Sample]) -> None:
    rollouts = check_greedy(*small_model, prompts)
    assert len({tuple(r.ids.tolist()) for r in rollouts}) > 1  # the prompts matter


def test_greedy_tokens_are_those_of_generate_where_answers_end(
    ending_model: Model, prompts: list[Sample]
) -> None:
    check_greedy(*ending_model, prompts)


def test_greedy_tokens_with_a_vector_an_atom(small_model: Model, train_systems: list[System]) -> None:
    """The `atoms` projector: as many vectors as atoms, over as many markers."""
    model, collate = copy.deepcopy(small_model[0]), replace(small_model[1], tokens_per_atom=True)
    c = model.encoder.config
    model.projector = Projector("atoms", c.lmax, c.sphere_channels, model.text.config.hidden_size)
    check_greedy(
        model, collate, [property_sample(s, "graph") for s in (train_systems[0], train_systems[900])]
    )


def test_another_structure_gives_another_answer(small_model: Model, train_systems: list[System]) -> None:
    model, collate = small_model
    prompt = property_prompt(None, graph=True)
    systems = [train_systems[0], train_systems[700]]
    a, b = RolloutEngine(model, collate).generate([Sample(prompt, "", s) for s in systems], GREEDY, [0])
    assert (a.logprob[0] - b.logprob[0]).abs() > 1e-3 or a.ids.tolist() != b.ids.tolist()


def test_a_marker_without_its_vector_is_an_error(small_model: Model, train_systems: list[System]) -> None:
    engine = RolloutEngine(*small_model)
    twice = Sample(f"{GRAPH}{GRAPH}", "", train_systems[0])
    none = Sample("no marker", "", train_systems[0])
    for wrong in (twice, none):
        with pytest.raises(ValueError, match="markers"):
            engine.generate([wrong], GREEDY, [0])


def test_markers_are_never_sampled(small_model: Model, prompts: list[Sample]) -> None:
    """However likely they are: a sampled `<graph>` would ask for a structure that is not there."""
    model, collate = copy.deepcopy(small_model[0]), small_model[1]
    markers = [collate.graph_id, collate.energy_id]
    with torch.no_grad():
        model.llm.lm_head.weight[markers] = model.llm.lm_head.weight[markers] * 20
    params = SamplingConfig(temperature=1.0, top_p=1.0, max_new_tokens=10)
    rollouts = RolloutEngine(model, collate).generate(prompts, params, [0], group_size=8)
    assert not torch.isin(torch.cat([r.ids for r in rollouts]), torch.tensor(markers)).any()
    batch = rollout_batch(collate, prompts, rollouts)
    with torch.no_grad():  # scored by the whole distribution, in training and in sampling alike
        forced = model(CatalyticMLLM.answer, batch).logprob
    assert float(forced.min()) < -5
    torch.testing.assert_close(torch.cat([r.logprob for r in rollouts]), forced, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_log_probabilities_are_the_models_of_the_very_tokens(
    ending_model: Model, prompts: list[Sample], temperature: float, top_p: float
) -> None:
    """The tokens that are scored are the tokens that were sampled, and without the top-p cut."""
    model, collate = ending_model
    params = SamplingConfig(temperature=temperature, top_p=top_p, max_new_tokens=20)
    rollouts = RolloutEngine(model, collate).generate(prompts, params, [1, 2], group_size=3, keep_hidden=True)
    assert [r.prompt for r in rollouts] == [k for k in range(len(prompts)) for _ in range(3)]
    batch = rollout_batch(collate, prompts, rollouts, shared=False)
    with torch.no_grad():
        forced = model(CatalyticMLLM.answer, batch, temperature=temperature).logprob
        hidden = model.hidden(batch)
        head = model(
            CatalyticMLLM.head,
            torch.cat([r.hidden for r in rollouts]),  # type: ignore[misc]
            torch.cat([r.ids for r in rollouts]),
            temperature,
            model.llm.lm_head.weight,
        ).logprob
    sampled = torch.cat([r.logprob for r in rollouts])
    torch.testing.assert_close(sampled, forced, rtol=0, atol=1e-4)
    torch.testing.assert_close(sampled, head, rtol=0, atol=1e-4)
    for row, r in enumerate(rollouts):
        answer = batch.answer_at[batch.answer_sample == row]
        n = len(answer)
        assert n == len(r.ids) == len(r.logprob) == len(r.hidden)  # type: ignore[arg-type]
        assert torch.equal(batch.targets[batch.answer_sample == row], r.ids)
        torch.testing.assert_close(r.hidden, hidden[answer], rtol=1e-3, atol=1e-3)
        # an independent reading: HF's forward of prompt and answer, log_softmax, gather
        if batch.graph is None or prompts[r.prompt].graph is None:
            begin, end = batch.cu_seqlens[row : row + 2].tolist()
            ids, at = batch.input_ids[None, begin:end], int(answer[0]) + 1 - begin
            with torch.no_grad():
                logits = model.llm(input_ids=ids).logits[0, at - 1 : at + n - 1] / temperature
            theirs = logits.log_softmax(-1)[torch.arange(n), r.ids]
            torch.testing.assert_close(r.logprob, theirs, rtol=0, atol=1e-4)


def test_answers_end_at_the_end_token_or_at_the_limit(ending_model: Model, prompts: list[Sample]) -> None:
    model, collate = ending_model
    params = SamplingConfig(max_new_tokens=12)
    rollouts = RolloutEngine(model, collate).generate(prompts, params, [5], group_size=6)
    lengths = [len(r.ids) for r in rollouts]
    assert 1 <= min(lengths) < 12 and not all(r.finished for r in rollouts)  # both ways of ending occur
    for r in rollouts:
        ends = (r.ids == collate.end_id).nonzero()[:, 0].tolist()
        if r.finished:
            assert ends == [len(r.ids) - 1]
        else:
            assert ends == [] and len(r.ids) == 12
        assert r.text == collate.tokenizer.decode(
            r.ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert r.hidden is None


def test_the_same_seed_gives_the_same_answers(small_model: Model, prompts: list[Sample]) -> None:
    engine = RolloutEngine(*small_model)
    params = SamplingConfig(max_new_tokens=10)
    once, again, other = (
        [r.ids.tolist() for r in engine.generate(prompts, params, seed, group_size=2)]
        for seed in ([3, 1], [3, 1], [3, 2])
    )
    assert once == again
    assert once != other
    assert once[0] != once[1]  # the samples of one prompt are different


def test_an_answer_does_not_depend_on_when_others_end(ending_model: Model, prompts: list[Sample]) -> None:
    """Rows leave the batch as they end; where none ends the same noise must give the same tokens."""
    model, collate = ending_model
    params = SamplingConfig(max_new_tokens=14)
    stopping = RolloutEngine(model, collate).generate(prompts, params, [9], group_size=4)
    endless = copy.copy(collate)
    endless.end_id = -7
    going_on = RolloutEngine(model, endless).generate(prompts, params, [9], group_size=4)
    assert len({len(r.ids) for r in stopping}) > 2
    for a, b in zip(stopping, going_on):
        assert len(b.ids) == 14
        assert a.ids.tolist() == b.ids[: len(a.ids)].tolist()
        torch.testing.assert_close(a.logprob, b.logprob[: len(a.ids)], rtol=0, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 4, 7])
def test_answers_do_not_depend_on_the_size_of_the_batch(
    ending_model: Model, prompts: list[Sample], rows: int
) -> None:
    """Waiting prompts enter as rows leave; noise belongs to the answer and the token, not to the batch."""
    model, collate = ending_model
    params = SamplingConfig(top_p=0.95, max_new_tokens=12)
    whole = RolloutEngine(model, collate).generate(prompts, params, [6], group_size=2, keep_hidden=True)
    few = RolloutEngine(model, collate, rows=rows).generate(
        prompts, params, [6], group_size=2, keep_hidden=True
    )
    assert [r.prompt for r in few] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert len({len(r.ids) for r in whole}) > 2
    for a, b in zip(whole, few):
        assert a.ids.tolist() == b.ids.tolist() and a.text == b.text
        torch.testing.assert_close(a.logprob, b.logprob, rtol=0, atol=1e-4)
        torch.testing.assert_close(a.hidden, b.hidden, rtol=0, atol=1e-3)


def test_no_prompts_no_answers(small_model: Model) -> None:
    assert RolloutEngine(*small_model).generate([], GREEDY, [0]) == []


def test_answers_are_handed_over_as_they_end(ending_model: Model, prompts: list[Sample]) -> None:
    model, collate = ending_model
    seen: list[tuple[int, Rollout]] = []
    params = SamplingConfig(max_new_tokens=14)
    rollouts = RolloutEngine(model, collate).generate(
        prompts, params, [9], group_size=4, on_answer=lambda i, r: seen.append((i, r))
    )
    assert sorted(i for i, _ in seen) == list(range(20))
    assert all(rollouts[i] is r for i, r in seen)
    lengths = [len(r.ids) for _, r in seen]
    assert lengths == sorted(lengths) and len(set(lengths)) > 2  # all began together: the shortest came first


def test_stop_strings_end_an_answer(small_model: Model, prompts: list[Sample]) -> None:
    """What follows the string is cut from the text; the tokens are those that were sampled."""
    model, collate = small_model
    params = SamplingConfig(max_new_tokens=24)
    free = RolloutEngine(model, collate).generate(prompts, params, [2], group_size=4)
    common = max("abcdefghijklmnopqrstuvwxyz123456789", key=lambda c: sum(c in r.text for r in free))
    stopped = RolloutEngine(model, collate).generate(
        prompts, replace(params, stop=(common,)), [2], group_size=4
    )
    assert any(common in r.text for r in free)
    for a, b in zip(free, stopped):
        n = len(b.ids)
        assert b.ids.tolist() == a.ids[:n].tolist()
        assert common not in b.text
        if common in a.text:
            assert b.finished and b.text == a.text[: a.text.index(common)]
            assert common in collate.tokenizer.decode(b.ids) and common not in collate.tokenizer.decode(
                b.ids[:-1]
            )
        else:
            assert n == len(a.ids)


def test_the_engine_is_a_snapshot(small_model: Model, prompts: list[Sample]) -> None:
    model, collate = copy.deepcopy(small_model[0]), small_model[1]
    engine = RolloutEngine(model, collate)
    before = [r.ids.tolist() for r in engine.generate(prompts, GREEDY, [0])]
    with torch.no_grad():
        for p in model.llm.parameters():
            p.add_(0.3)
    assert [r.ids.tolist() for r in engine.generate(prompts, GREEDY, [0])] == before
    assert [r.ids.tolist() for r in RolloutEngine(model, collate).generate(prompts, GREEDY, [0])] != before


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_half_precision_follows_the_teacher_forced_forward(
    small_model: Model, prompts: list[Sample], dtype: torch.dtype
) -> None:
    model, collate = small_model
    params = SamplingConfig(max_new_tokens=8)
    rollouts = RolloutEngine(model, collate, dtype).generate(prompts, params, [0], keep_hidden=True)
    batch: Batch = rollout_batch(collate, prompts, rollouts)
    with torch.no_grad():
        forced = model(CatalyticMLLM.answer, batch).logprob
    sampled = torch.cat([r.logprob for r in rollouts])
    assert sampled.dtype == torch.float32
    assert rollouts[0].hidden is not None and rollouts[0].hidden.dtype == dtype
    assert (sampled - forced).abs().mean() < 0.15


def test_temperature_flattens_what_is_drawn(small_model: Model, prompts: list[Sample]) -> None:
    """First tokens of many samples against softmax(logits / T), by chi-square."""
    model, collate = small_model
    n = 2000
    sample = prompts[:1]
    with torch.no_grad():
        ids = torch.tensor([collate.prompt_ids(sample[0])])
        logits = model.llm(input_ids=ids).logits[0, -1]
    logits[[collate.graph_id, collate.energy_id]] = -torch.inf
    for temperature in (0.5, 2.0):
        params = SamplingConfig(temperature=temperature, top_p=1.0, max_new_tokens=1)
        rollouts = RolloutEngine(model, collate).generate(sample, params, [4], group_size=n)
        expected = (logits / temperature).softmax(0).double().numpy() * n
        counts = np.bincount([int(r.ids[0]) for r in rollouts], minlength=len(expected))
        common = expected >= 5
        cells = [(counts[i], expected[i]) for i in np.flatnonzero(common)]
        cells.append((counts[~common].sum(), expected[~common].sum()))
        chi_square = sum((c - e) ** 2 / e for c, e in cells if e > 0)
        freedom = len(cells) - 1
        assert chi_square < freedom + 5 * (2 * freedom) ** 0.5  # five standard deviations


def test_hash_seed_tells_parts_apart() -> None:
    seeds = [hash_seed(p) for p in ([0], [0, 0], [1], [0, 1], [1, 0], [-1, 0], [2**31])]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= s < 2**63 for s in seeds)


def test_every_answer_has_its_limit(small_model: Model, prompts: list[Sample]) -> None:
    model, collate = small_model
    whole = RolloutEngine(model, collate).generate(prompts, GREEDY, [0], group_size=2)
    limits = [3, 24, 1, 7, 12]
    cut = RolloutEngine(model, collate).generate(
        prompts, replace(GREEDY, max_new_tokens=None), [0], group_size=2, limits=limits
    )
    for i, (a, b) in enumerate(zip(whole, cut)):
        n = limits[i // 2]
        assert b.ids.tolist() == a.ids[:n].tolist() and b.limit == n
        assert b.finished == (a.finished and len(a.ids) <= n)
    with pytest.raises(ValueError, match="max_new_tokens: null"):
        RolloutEngine(model, collate).generate(prompts, replace(GREEDY, max_new_tokens=None), [0])


def test_limits_follow_the_cell_that_is_asked_for(small_model: Model, train_systems: list[System]) -> None:
    """Every CIF of the training systems fits, with no more than a third to spare."""
    _, collate = small_model
    some = train_systems[::97]
    asked = [(s.identity, s.target) for s in some]
    limits = answer_limits(collate, SamplingConfig(max_new_tokens=None), asked)
    needed = [len(collate.encode(design_sample(s, None).answer)) for s in some]
    assert all(n * 1.15 < limit < n * 1.33 for n, limit in zip(needed, limits))
    assert answer_limits(collate, SamplingConfig(max_new_tokens=77), asked) == [77] * len(some)
