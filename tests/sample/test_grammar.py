"""The mask against a regular expression engine, and what it promises:
the right composition in a CIF that parses."""

from __future__ import annotations

import re
import sys
from collections import Counter
from typing import Literal

import numpy as np
import pytest
import regex
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from catmllm.config import DataConfig, SamplingConfig
from catmllm.data.batches import Collator
from catmllm.data.prompts import CIF_ANSWER, END, Sample, cif_prompt, cif_sample, design_prompt, design_sample
from catmllm.models.catalytic_mllm import CatalyticMLLM
from catmllm.sample.engine import RolloutEngine
from catmllm.sample.grammar import Grammar, Pattern, Walk, _reaches, answer_pattern
from catmllm.structure.cif import read_cif
from catmllm.structure.formula import parse_formula, parse_identity
from catmllm.structure.system import System, lattice_parameters
from catmllm.structure.templates import Templates
from rewards_fast import PVCP, extract_cif, parse_cif

Model = tuple[CatalyticMLLM, Collator]


@pytest.fixture(scope="module")
def grammar(small_model: Model) -> Grammar:
    collate = small_model[1]
    return Grammar(collate.tokenizer, collate.end_id)


def expression(pattern: Pattern) -> str:
    """The pattern as a regular expression, but for how often each element may come, and where."""
    number = rf"\.[0-9]{{{pattern.decimals}}}"
    symbols = "|".join(map(re.escape, pattern.symbols))
    out = []
    for kind, *rest in pattern.parts:
        if kind == "text":
            out.append(re.escape(rest[0]))
        elif kind == "site":
            out.append(rf"(?P<s{rest[0]}>{symbols}) (?P=s{rest[0]}){rest[0]} 1 ")
        elif kind == "fraction":
            out.append("0" + number)
        else:
            out.append(rf"(?:0|[1-9][0-9]{{0,{rest[0] - 1}}})" + number)
    return "".join(out)


@pytest.mark.parametrize("decimals", [2, 3])
def test_what_the_data_holds_fits_its_pattern(
    train_systems: list[System], small_model: Model, decimals: int
) -> None:
    """Each shipped CIF, token by token as the tokenizer writes it, and then the end token alone."""
    collate = small_model[1]
    grammar = Grammar(collate.tokenizer, collate.end_id)
    for system in train_systems[::97]:
        for design in (False, True):
            sample = design_sample(system, None, decimals) if design else cif_sample(system, decimals)
            pattern = answer_pattern(system.identity, system.target, design, DataConfig(decimals=decimals))
            place = pattern.start
            for token in collate.encode(sample.answer):
                assert token in grammar.allowed(pattern, place).tolist()
                if token != collate.end_id:
                    place = grammar.after(pattern, place, token)
            assert pattern.ended(place)
            assert grammar.allowed(pattern, place).tolist() == [collate.end_id]


def test_masks_equal_a_regular_expression_engines(grammar: Grammar, train_systems: list[System]) -> None:
    """Along a real answer, at places inside tokens too, over the whole vocabulary. Of the tokens inside text
    that must come only that with which the tokenizer writes it."""
    system = train_systems[300]
    pattern = answer_pattern(system.identity, system.target, False)
    engine = regex.compile(expression(pattern))
    answer = cif_sample(system).answer.removesuffix(END)

    def fits(text: str) -> bool:
        """Whether a text begins an answer; the expression does not count elements."""
        if engine.fullmatch(text, partial=True) is None:
            return False
        if "_occupancy\n" not in text:
            return True
        rows = re.findall(r"^([A-Z][a-z]?) \1\d+ 1 ", text.split("_occupancy\n")[-1], re.M)
        n_slab, adsorbate = sum(system.slab_counts.values()), parse_formula(system.adsorbate)
        parts = (rows[:n_slab], system.slab_counts), (rows[n_slab:], adsorbate)
        if any(of.count(s) > wanted.get(s, 0) for of, wanted in parts for s in of):
            return False
        begun = re.search(r"(?:^|\n)([A-Z][a-z]?)(?: [A-Z][a-z]?\d*(?: 1?)?)?$", text)
        of, wanted = parts[len(rows) >= n_slab]
        return not begun or any(s.startswith(begun[1]) and of.count(s) < n for s, n in wanted.items())

    rng = np.random.default_rng(4)
    several = spelled = 0
    for at in sorted({0, *rng.integers(0, len(answer), 18).tolist(), len(answer) - 1}):
        place = pattern.start
        for char in answer[:at]:
            place = dict(pattern.follow(place))[char]
        forced = ""
        while len(forced) < 40:
            ways = [c for c in map(chr, range(10, 127)) if fits(answer[:at] + forced + c)]
            if len(ways) != 1:
                break
            forced += ways[0]
        ours = set(grammar.allowed(pattern, place).tolist())
        theirs = {
            t
            for t, text in enumerate(grammar.text)
            if text and "\ufffd" not in text and fits(answer[:at] + text)
        }
        inside = {t for t in theirs if len(grammar.text[t]) <= len(forced)}
        written = grammar.tokenizer.encode(answer[at:], add_special_tokens=False)[0]
        assert written in ours and ours <= theirs and theirs - inside <= ours, at
        if forced:
            assert ours & inside <= {written}, (at, forced)
            spelled += len(inside) > 1
        several += len(ours) > 1
    assert several > 1 and spelled > 2


def test_random_weights_write_what_was_asked_for(small_model: Model, train_systems: list[System]) -> None:
    """Noise alone fills the pattern: every answer parses and has the composition,
    whatever the prompt's kind."""
    model, collate = small_model
    systems = train_systems[::600]
    samples = [
        Sample(design_prompt(s.identity, -1.0) if k % 2 else cif_prompt(s.identity))
        for k, s in enumerate(systems)
    ]
    patterns = [answer_pattern(s.identity, s.target, k % 2 == 1) for k, s in enumerate(systems)]
    params = SamplingConfig(top_p=0.95, max_new_tokens=1500)
    rollouts = RolloutEngine(model, collate).generate(samples, params, [0], 8, patterns=patterns)
    scores = PVCP().score([r.text for r in rollouts], [systems[r.prompt].target for r in rollouts])
    for r, reason in zip(rollouts, scores.reason):
        system, pattern = systems[r.prompt], patterns[r.prompt]
        assert r.finished and regex.fullmatch(expression(pattern), r.text)
        # random numbers may give a cell that is none, or atoms on top of each other;
        # the form is never at fault
        if reason is None:
            crystal = parse_cif(r.text[r.text.index("data_") :])
            assert crystal.composition == pytest.approx(system.target)
    assert sum(reason is None for reason in scores.reason) > len(rollouts) / 3
    # log-probabilities are those among the tokens that the grammar allows, and a forced token's is 0
    grammar = Grammar(collate.tokenizer, collate.end_id)
    narrowed = 0
    for r in rollouts[:8]:
        ids = torch.tensor([collate.prompt_ids(samples[r.prompt]) + r.ids.tolist()])
        with torch.no_grad():
            logits = model.llm(input_ids=ids).logits[0, -len(r.ids) - 1 : -1]
        assert r.choices is not None
        place, sets = patterns[r.prompt].start, dict(zip(r.choices.at.tolist(), r.choices.sets))
        for k, token in enumerate(r.ids.tolist()):
            allowed = grammar.allowed(patterns[r.prompt], place)
            if k in sets:  # of coordinates those at which no atoms run into each other
                assert set(sets[k].tolist()) <= set(allowed.tolist())
                narrowed += len(sets[k]) < len(allowed)
            allowed = sets.get(k, torch.tensor([token]))
            theirs = logits[k][allowed].log_softmax(0)[allowed == token]
            torch.testing.assert_close(r.logprob[k : k + 1], theirs, rtol=0, atol=2e-3)
            if token != collate.end_id:
                place = grammar.after(patterns[r.prompt], place, token)
        assert 0 < len(sets) < len(r.ids)
    assert narrowed > 0


def test_a_cell_is_no_longer_than_its_slab_can_span(grammar: Grammar) -> None:
    """A chain of twelve atoms of rhodium has 40.9 Å: an edge of 5.3 or 38 Å may be, one of 51 or 42 Å not."""
    pattern = answer_pattern("O</s>Rh12 (1 0 0)", {"Rh": 12, "O": 1}, design=False)

    def ways(written: str) -> set[str]:
        walk = Walk(grammar, [pattern], sys.maxsize)
        assert "".join(grammar.text[t] for t in walk.begun[0]).endswith("_cell_length_a ")
        tokens = grammar.tokenizer.encode(written, add_special_tokens=False)
        while tokens:
            taken = walk.take(0, tokens[0])
            known = taken[: len(tokens)]
            assert known == tokens[: len(known)]
            if len(taken) > len(tokens):  # more is forced
                return {grammar.text[taken[len(tokens)]][0]}
            tokens = tokens[len(taken) :]
        return {grammar.text[t][0] for t in walk.allowed(0).tolist()}

    assert ways("") == set("0123456789")
    assert ways("5") == {"."}
    assert ways("3") == {".", *"0123456789"}
    assert ways("4") == {".", "0"}
    assert ways("5.346\n_cell_length_b 5") == {"."}
    assert ways("5.346\n_cell_length_b 5.346\n_cell_length_c 5") == {".", *"0123456789"}


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(["", "0", "5", "12", "30", "5.", "12.3", "0.0", "30.99"]),
    st.floats(0, 40),
    st.sampled_from([0.0, 0.004, 0.3, 11.0]),
)
def test_a_begun_number_goes_on_where_one_of_all_numbers_would_do(
    begun: str, low: float, width: float
) -> None:
    """Against all numbers of two digits before and two behind the point, as they round."""
    first, last = max(0, int(100 * low) - 2), min(10_000, int(100 * (low + width)) + 3)
    whole = [f"{i // 100}.{i % 100:02d}" for i in range(first, last)]
    fits = [text for text in whole if low - 0.005 <= float(text) <= low + width + 0.005]
    near = any(abs(abs(float(t) - edge) - 0.005) < 1e-9 for t in fits for edge in (low, low + width))
    assume(not near)  # half a step away both ways of rounding are right
    assert _reaches(begun, low, low + width, 2, 2) == any(text.startswith(begun) for text in fits)


@pytest.mark.parametrize("rows", ["source", "layers"])
@pytest.mark.parametrize("identity", ["CO</s>Pt9Au3 (1 0 0)", "OH</s>Ni6Ir6 (1 1 1)"])
def test_slab_and_molecule_are_built_as_those_of_the_data(
    small_model: Model, train_systems: list[System], identity: str, rows: Literal["source", "layers"]
) -> None:
    """Noise alone writes unstrained cells, every site once, whole layers with their share of each element,
    upright molecules whose first atom comes first, and the volume of the cell."""
    model, collate = small_model
    starts = [s.frame(0.0) for s in train_systems]
    templates = Templates.fit(starts)
    asked = parse_identity(identity)
    target = dict(Counter(asked.slab) + Counter(parse_formula(asked.adsorbate)))
    data = DataConfig(rows=rows)
    pattern = answer_pattern(identity, target, False, data, templates)
    params = SamplingConfig(top_p=1.0, max_new_tokens=1500)
    rollouts = RolloutEngine(model, collate).generate(
        [Sample(cif_prompt(identity))], params, [0], 12, patterns=[pattern]
    )
    template, (shape,) = pattern.template, pattern.shape.values()
    assert template is not None
    whole = 0
    for r in rollouts:
        text = extract_cif(r.text)
        system = read_cif(text, asked.adsorbate, asked.miller)
        cell = np.array(lattice_parameters(system.lattice))
        assert ((cell > template.cell[:, 0] - 6e-4) & (cell < template.cell[:, 1] + 6e-4)).all()
        written = re.search(r"_cell_volume (\S+)", text)
        assert written and float(written[1]) == pytest.approx(system.volume, abs=6e-4)
        off = system.frac[:12, None] - template.sites
        off = np.abs(off - np.round(off)) - template.off
        sites = off.max(2).argmin(1)
        assert (off[np.arange(12), sites] <= 1e-9).all() and sorted(sites) == list(range(12))
        if rows == "source":
            assert sites.tolist() == list(range(12))
        else:
            assert system.symbols[:12] == [s for s, n in asked.slab.items() for _ in range(n // 3)] * 3
        for k, layer in enumerate(template.layers):
            assert Counter(system.symbols[i] for i in np.flatnonzero(sites // 4 == k)) == layer
        assert "".join(system.symbols[12:]) == asked.adsorbate
        apart = system.frac[13] - system.frac[12]
        length = float(np.linalg.norm((apart - np.round(apart)) @ system.lattice))
        rise = float((system.frac[13, 2] - system.frac[12, 2]) % 1.0 * cell[2])
        whole += shape[0] - 1e-6 < length < shape[1] + 1e-6 and shape[2] - 1e-6 < rise < shape[3] + 1e-6
    assert whole >= 10  # unless the first atom was written where there is no room for the second
    # without a choice there is nothing to draw: half of a coordinate's tokens and more are forced
    bare = answer_pattern(identity, target, False, data)
    free = RolloutEngine(model, collate).generate(
        [Sample(cif_prompt(identity))], params, [0], 4, patterns=[bare]
    )
    drawn, before = (np.mean([len(r.choices.at) for r in some if r.choices]) for some in (rollouts, free))
    assert drawn < 0.7 * before


def test_any_tokenizer_will_do(plain_tokenizer: PreTrainedTokenizerBase, train_systems: list[System]) -> None:
    """A byte-level tokenizer that has never seen a CIF: the mask works on characters."""
    system = train_systems[10]
    pattern = answer_pattern(system.identity, system.target, False)
    grammar = Grammar(plain_tokenizer, 0)
    place = pattern.start
    for token in plain_tokenizer.encode(
        cif_sample(system).answer.removesuffix(END), add_special_tokens=False
    ):
        assert token in grammar.allowed(pattern, place).tolist()
        place = grammar.after(pattern, place, token)
    assert pattern.ended(place)
    assert CIF_ANSWER.startswith("Ok")
    assert [grammar.text[t] for t in grammar.allowed(pattern, pattern.start).tolist()] == ["O"]


@pytest.fixture(scope="module")
def plain_tokenizer() -> PreTrainedTokenizerBase:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(["<end>", *alphabet])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


def test_a_token_that_breaks_the_pattern_is_an_error(grammar: Grammar, train_systems: list[System]) -> None:
    system = train_systems[0]
    pattern = answer_pattern(system.identity, system.target, False)
    wrong = next(i for i, t in enumerate(grammar.text) if t == "Pd")
    with pytest.raises(ValueError, match="breaks the pattern"):
        grammar.after(pattern, pattern.start, wrong)
    with pytest.raises(ValueError, match="cannot read the identity"):
        answer_pattern("no identity", {"Pd": 1}, False)
    with pytest.raises(ValueError, match="more of its adsorbate"):
        answer_pattern("CO</s>Pd4 (1 1 1)", {"Pd": 4, "C": 1}, False)
