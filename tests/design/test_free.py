"""Designs with free metals: which slabs come first, and how the loop goes over them."""

from __future__ import annotations

import re
from random import Random
from typing import Any

import pytest
import torch

from catmllm.config import Config, GAGRPOConfig, SamplingConfig
from catmllm.data.batches import Collator
from catmllm.data.prompts import DESIGN_ANSWER, Sample, design_prompt, property_prompt
from catmllm.design import free
from catmllm.design.enumeration import ideal_system
from catmllm.design.free import nearest_slabs, search_free
from catmllm.design.predict import predict_energies
from catmllm.design.search import make_task
from catmllm.evaluate import BENCHMARK
from catmllm.evaluate.benchmark import allowed_slabs, read_tasks
from catmllm.models.catalytic_mllm import CatalyticMLLM
from catmllm.sample.answers import Rollout
from catmllm.sample.grammar import Pattern, answer_pattern
from catmllm.structure.cif import read_cif, write_cif
from catmllm.structure.formula import parse_identity
from rewards_fast import extract_cif

Model = tuple[CatalyticMLLM, Collator]


def test_slabs_come_by_the_energies_of_their_two_parts(small_model: Model) -> None:
    """In the words of the paper's property prompt, the formula reduced."""
    tasks = [make_task("CO</s>Pt12 (1 1 1)", -1.0), make_task("O</s>Pt12 (1 0 0)", -3.0)]
    slabs = [
        [f"CO</s>{slab} (1 1 1)" for slab in ("Pt12", "Cu9Pt3", "Cu6Pt6", "Ag12")],
        [f"O</s>{slab} (1 0 0)" for slab in ("Au12", "Pd9Ir3")],
    ]
    order = nearest_slabs(small_model, tasks, slabs)
    texts = {
        "Pt12": "Pt", "Cu9Pt3": "Cu3Pt", "Cu6Pt6": "CuPt", "Ag12": "Ag", "Au12": "Au", "Pd9Ir3": "Pd3Ir"
    }  # fmt: skip

    def energy(line: str) -> float:
        adsorbate, _, slab = line.partition("</s>")
        formula, _, plane = slab.partition(" ")
        text = f"{adsorbate}</s>{texts[formula]} {plane}"
        return float(predict_energies(*small_model, [Sample(property_prompt(text, False))])[0])

    for task, some, found in zip(tasks, slabs, order):
        assert found == sorted(some, key=lambda line: abs(energy(line) - task.energy))
    assert nearest_slabs(small_model, tasks, [slabs[0], []]) == [order[0], []]


class Builder:
    """An engine that writes an ideal slab of what it is asked for, each another one."""

    def __init__(self) -> None:
        self.asked: list[list[Sample]] = []

    def generate(self, samples: Any, *_: Any, **kw: Any) -> list[Rollout]:
        self.asked.append(list(samples))
        rng, none = Random(len(self.asked)), torch.zeros(0)
        lines = [re.search(r"\S+</s>\S+ \(. . .\)", s.prompt)[0] for s in samples]  # type: ignore[index]
        assert [p.symbols for p in kw["patterns"]] == [p.symbols for p in map(self.pattern, lines)]
        texts = [DESIGN_ANSWER.format(cif=write_cif(ideal_system(line, rng))) for line in lines]
        return [Rollout(k, none, none, None, True, text) for k, text in enumerate(texts)]

    @staticmethod
    def pattern(line: str) -> Pattern:
        return answer_pattern(line, make_task(line, 0.0).target, True)


def test_the_loop_goes_over_the_slabs_and_back_to_the_best(
    small_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = GAGRPOConfig(initial=3, iterations=2, group_size=4, pool=2, sampling=SamplingConfig(grammar=True))
    tasks = [t for t in read_tasks(BENCHMARK) if t.kind == "free"][:2]
    order = nearest_slabs(small_model, [t.task for t in tasks], [allowed_slabs(t)[:5] for t in tasks])
    engine = Builder()
    monkeypatch.setattr(free, "RolloutEngine", lambda *_: engine)
    given = [lines[::-1] for lines in order]
    states = search_free(*small_model, Config(ga_grpo=loop), [t.task for t in tasks], given, [1])
    shown = [s.graph is not None for s in engine.asked[1]]
    assert shown == [False, False, True, True] * 2 and not any(s.graph for s in engine.asked[0])
    assert engine.asked[0][0].prompt == design_prompt(order[0][0], tasks[0].task.energy)
    for t, lines, state in zip(tasks, order, states):
        assert [len(step["energies"]) for step in state.trace] == [3, 4, 4]
        of = parse_identity(t.task.identity)
        slabs = [read_cif(extract_cif(c.text), of.adsorbate, of.miller).identity for c in state.tried]
        # three, then two further ones and two of the pool's, and again, from the first on
        assert slabs[:5] == lines and slabs[7:9] == lines[:2]
        assert {*slabs[5:7]} <= {*slabs[:3]} and {*slabs[9:]} <= {*slabs[:7]}
        assert all(t.asked(c.text).identity == slab for c, slab in zip(state.tried, slabs))
        assert all(c.feasible and c.pvcp == 10 for c in state.tried)


def test_a_pool_without_structures_leaves_the_slabs_their_turns(
    small_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = GAGRPOConfig(initial=1, iterations=1, group_size=2, pool=2)
    task, asked = make_task("CO</s>Pt12 (1 1 1)", -1.0), []

    class Mute:
        def generate(self, samples: Any, *_: Any, **kw: Any) -> list[Rollout]:
            asked.append(samples)
            none = torch.zeros(0)
            return [Rollout(k, none, none, None, True, "no CIF") for k in range(len(samples))]

    lines = ["CO</s>Cu9Pt3 (1 1 1)", "CO</s>Ag12 (1 1 1)"]
    monkeypatch.setattr(free, "RolloutEngine", lambda *_: Mute())
    (state,) = search_free(*small_model, Config(ga_grpo=loop), [task], [lines], [0])
    assert [len(some) for some in asked] == [1, 2] and state.pool.best is None and len(state.tried) == 3


def test_a_task_without_slabs_has_no_candidates(small_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others are searched as without it."""
    loop = Config(ga_grpo=GAGRPOConfig(initial=2, iterations=1, group_size=2, pool=2))
    tasks = [make_task(f"CO</s>{metal}12 (1 1 1)", -1.0) for metal in ("Pt", "Cu")]
    lines = [t.identity for t in tasks]
    monkeypatch.setattr(free, "RolloutEngine", lambda *_: Builder())
    none, some = search_free(*small_model, loop, tasks, [[], lines], [0])
    (alone,) = search_free(*small_model, loop, tasks[1:], [lines], [0])
    assert [c.text for c in some.tried] == [c.text for c in alone.tried] and len(some.tried) == 4
    assert (none.task, none.tried, none.trace, none.best_of(4)) == (tasks[0], [], [], None)
    assert search_free(*small_model, loop, tasks, [[], []], [0])[1].pool.best is None
