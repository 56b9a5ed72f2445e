"""The mask against a regular expression engine, and what it promises:
the right composition in a CIF that parses."""

from __future__ import annotations

import re
import sys

import numpy as np
import pytest
import regex
import torch
from transformers import PreTrainedTokenizerBase

from catmllm.config import SamplingConfig
from catmllm.data.batches import Collator
from catmllm.data.prompts import CIF_ANSWER, END, Sample, cif_prompt, cif_sample, design_prompt, design_sample
from catmllm.models.catalytic_mllm import CatalyticMLLM
from catmllm.sample.engine import RolloutEngine
from catmllm.sample.grammar import Grammar, Pattern, Walk, answer_pattern
from catmllm.structure.formula import parse_formula
from catmllm.structure.system import System
from rewards_fast import PVCP, parse_cif

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
            pattern = answer_pattern(system.identity, system.target, design, decimals)
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
    rollouts = RolloutEngine(model, collate).generate(samples, params, [0], 2, patterns=patterns)
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
            assert taken == tokens[: len(taken)]
            tokens = tokens[len(taken) :]
        return {grammar.text[t][0] for t in walk.allowed(0).tolist()}

    assert ways("") == set("0123456789")
    assert ways("5") == {"."}
    assert ways("3") == {".", *"0123456789"}
    assert ways("4") == {".", "0"}
    assert ways("5.346\n_cell_length_b 5") == {"."}
    assert ways("5.346\n_cell_length_b 5.346\n_cell_length_c 5") == {".", *"0123456789"}


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
