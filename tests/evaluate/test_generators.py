"""Generators beside the closed loop: what their operators keep, and that a search finds what it rewards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from catmllm.cli.main import main
from catmllm.config import Config
from catmllm.data.batches import Collator
from catmllm.data.open import open_data
from catmllm.design.analogues import analogues
from catmllm.design.enumeration import ideal_system
from catmllm.design.exemplar_pool import Candidate
from catmllm.design.search import ClosedLoop, Task, make_task, structure_key
from catmllm.evaluate import BENCHMARK, generators
from catmllm.evaluate.benchmark import BenchmarkTask, allowed_slabs, read_candidates, read_tasks, score
from catmllm.evaluate.generators import answers, child, evolve, permuted, with_adsorbate
from catmllm.models.catalytic_mllm import CatalyticMLLM
from catmllm.structure.adsorbed import adsorbate_fault
from catmllm.structure.cif import read_cif
from catmllm.structure.elements import NUMBER
from catmllm.structure.formula import parse_identity
from catmllm.structure.system import ADSORBATE, System

LINES = ("CO</s>Pt9Cu3 (1 1 1)", "CH</s>Au6Ni6 (1 0 0)", "O</s>Ir12 (1 1 1)")
LINE = st.sampled_from(LINES)
SEED = st.integers(0, 10**6)


def parts(system: System) -> tuple[np.ndarray, np.ndarray]:
    """Positions (Å) of slab and adsorbate."""
    positions, of = system.frac @ system.lattice, system.tags == ADSORBATE
    return positions[~of], positions[of]


@settings(max_examples=30)
@given(LINE, SEED)
def test_two_atoms_change_places_and_nothing_else(line: str, seed: int) -> None:
    system = ideal_system(line, Random(seed))
    if len(system.slab_counts) == 1:
        return
    other = permuted(system, Random(seed))
    assert other.identity == system.identity and np.array_equal(other.frac, system.frac)
    changed = np.flatnonzero(other.numbers != system.numbers)
    assert len(changed) == 2 and (system.tags[changed] != ADSORBATE).all()


@settings(max_examples=30)
@given(LINE, SEED)
def test_an_adsorbate_keeps_form_place_and_height(line: str, seed: int) -> None:
    """By ASE's distances; on a slab of another metal its anchor is at the same place of the cell."""
    asked = parse_identity(line)
    giver = ideal_system(line, Random(seed))
    slab = ideal_system(line.replace("Pt9Cu3", "Ag12").replace("Au6Ni6", "Rh12"), Random(seed + 1))
    made = with_adsorbate(slab, giver)
    assert made.slab_counts == slab.slab_counts and made.adsorbate == asked.adsorbate and not made.relaxed
    (mine, on), (theirs, of) = parts(made), parts(giver)
    np.testing.assert_allclose(mine, parts(slab)[0], atol=1e-9)
    n = len(made) - len(on)
    for k in range(1, len(on)):
        expected = giver.as_ase().get_distance(n, n + k)
        assert made.as_ase().get_distance(n, n + k) == pytest.approx(expected, abs=1e-9)
    assert on[0, 2] - mine[:, 2].max() == pytest.approx(of[0, 2] - theirs[:, 2].max(), abs=1e-9)
    np.testing.assert_allclose(made.frac[n, :2], giver.frac[n, :2], atol=1e-9)
    same = with_adsorbate(giver, giver)
    assert structure_key(same) == structure_key(giver)


@pytest.fixture(scope="module")
def shipped() -> list[BenchmarkTask]:
    return read_tasks(BENCHMARK)


def test_a_search_finds_an_order_that_no_random_slab_has(
    small_model: tuple[CatalyticMLLM, Collator], small_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random ideal slabs have a quarter of the rarer metal in each layer; the reward asks for none on top."""
    loop = ClosedLoop(*small_model, replace(small_config.ga_grpo, initial=8, iterations=8, group_size=8))

    def on_top(system: System) -> int:
        return int((system.numbers[system.tags == 1] == NUMBER["Cu"]).sum())

    def judge(tasks: Sequence[Task], texts: Sequence[str], iteration: int) -> tuple[list[Candidate], Any]:
        read = [read_cif(text, "CO", (1, 1, 1)) for text in texts]
        rewards = [-float(on_top(s)) for s in read]
        return [Candidate(t, r, 0.0, 0.0, None, True, "", iteration) for t, r in zip(texts, rewards)], None

    monkeypatch.setattr(loop, "judge", judge)
    task = BenchmarkTask("fixed-000", make_task(LINES[0], -1.0))
    (texts,) = evolve(loop, [task], 0, 6).values()
    assert len(texts) == 8 + 8 * 8
    counts = [on_top(read_cif(text, "CO", (1, 1, 1))) for text in texts]
    assert set(counts[:8]) == {1} and counts.index(0) >= 8 and np.mean(counts[-16:]) < 0.5
    assert all(read_cif(text, "CO", (1, 1, 1)).slab_counts == {"Pt": 9, "Cu": 3} for text in texts)


def test_children_of_a_free_composition_stay_among_what_is_allowed() -> None:
    rng = Random(0)
    open_to = ["CO</s>Cu3Pt9 (1 1 1)", "CO</s>Pt12 (1 1 1)", "CO</s>Ag6Au6 (1 1 1)"]
    members = [_member(ideal_system(line, rng)) for line in open_to]
    made = [child(members, open_to, rng) for _ in range(60)]
    assert {s.identity for s in made} == set(open_to)
    assert sum(adsorbate_fault(s) is None for s in made) > 50


def test_parents_that_cross_are_two() -> None:
    """Of the operators that a slab of one metal allows, a site and another's; one alone cannot cross."""
    rng, line = Random(0), "O</s>Ir12 (1 1 1)"
    members = [_member(ideal_system(line, rng)) for _ in range(2)]
    asked: list[tuple[System, System]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generators, "with_adsorbate", lambda *pair: asked.append(pair) or pair[0])
        for _ in range(40):
            child(members, [line], rng)
        crossed = [pair for pair in asked if any(pair[1] is m.system for m in members)]
        assert crossed and all(slab is not giver for slab, giver in crossed)
        asked.clear()
        for _ in range(40):
            child(members[:1], [line], rng)
        assert asked and not any(giver is members[0].system for _, giver in asked)


def test_no_prediction_is_spent_on_a_structure_twice(
    small_model: tuple[CatalyticMLLM, Collator], small_config: Config, shipped: list[BenchmarkTask]
) -> None:
    loop = ClosedLoop(*small_model, replace(small_config.ga_grpo, initial=8, iterations=6, group_size=8))
    tasks = [*shipped[:3], shipped[50]]
    for task, texts in zip(tasks, evolve(loop, tasks, 0, 6).values()):
        of = parse_identity(task.task.identity)
        keys = {structure_key(read_cif(text, of.adsorbate, of.miller)) for text in texts}
        assert len(texts) == 8 + 6 * 8 and len(keys) == len(texts)


def _member(system: System) -> Any:
    from catmllm.evaluate.generators import Member

    return Member(system, Candidate("", 0.0, 0.0, 0.0, None, True, "", 0))


def test_rows_answer_every_task_within_its_rules(
    small_model: tuple[CatalyticMLLM, Collator], small_config: Config, shipped: list[BenchmarkTask]
) -> None:
    loop = ClosedLoop(*small_model, replace(small_config.ga_grpo, initial=4, iterations=2, group_size=3))
    tasks = [*shipped[:2], *shipped[48:50]]
    train = open_data()["train"]
    texts = evolve(loop, tasks, 0, 4)
    assert texts == evolve(loop, tasks, 0, 4) != evolve(loop, tasks, 1, 4)
    assert {len(mine) for mine in texts.values()} == {4 + 2 * 3} and set(texts) == {t.name for t in tasks}
    found = score(loop, tasks, texts, {name: [False] * len(mine) for name, mine in texts.items()}, [1, 10])
    for kind in ("fixed", "free"):
        assert found[kind]["answered"] == 2
        assert found[kind]["failures"] == dict.fromkeys(("PF", "VF", "CM", "PV_0.7", "AD"), 0.0)
    for task in tasks:
        some = analogues([allowed_slabs(task)], [task.task.energy], train, 96)[0]
        assert len(some) >= 10
        asked = parse_identity(task.task.identity)
        assert {(s.adsorbate, s.miller) for s in some} == {(asked.adsorbate, asked.miller)}
        if task.metals:
            assert not {s.bulk for s in some} & task.known
        else:
            assert {s.identity for s in some} == {task.task.identity}


def test_answers_are_of_the_model_alone(
    small_model: tuple[CatalyticMLLM, Collator], small_config: Config, shipped: list[BenchmarkTask]
) -> None:
    model, collate = small_model
    tasks = [shipped[0], shipped[48]]
    sampling = replace(small_config.evaluate.sampling, max_new_tokens=12, grammar=True)
    texts = answers(model, collate, sampling, tasks, 5, 0)
    assert {name: len(mine) for name, mine in texts.items()} == {task.name: 5 for task in tasks}
    assert (
        texts
        == answers(model, collate, sampling, tasks, 5, 0)
        != answers(model, collate, sampling, tasks, 5, 1)
    )
    # no grammar: a model of random weights writes no CIF
    assert not any(text.startswith("data_") for mine in texts.values() for text in mine)

    asked: list[str] = []

    class Engine:
        def __init__(self, *given: object) -> None: ...

        def generate(self, samples: list[Any], sampling: Any, seed: Any, limits: list[int]) -> list[Any]:
            assert not sampling.grammar and len(limits) == len(samples)
            asked.extend(sample.prompt for sample in samples)
            return [SimpleNamespace(text=str(i)) for i in range(len(samples))]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("catmllm.evaluate.generators.RolloutEngine", Engine)
        told = answers(model, collate, sampling, tasks, 40, 0)
    assert told[tasks[1].name] == [str(i) for i in range(40, 80)]
    assert len(set(asked[:40])) == 1 and tasks[0].task.identity in asked[0]
    lines = {line for prompt in asked[40:] for line in allowed_slabs(tasks[1]) if line in prompt}
    assert len(lines) > 10


def test_the_commands_write_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tasks.csv").write_text("".join(BENCHMARK.read_text().splitlines(keepends=True)[:3]))
    given = ["--tasks", str(tmp_path / "tasks.csv")]
    for row, least in (("evolution", 96), ("transmute", 10)):
        out = tmp_path / row
        assert main(["evaluate", "candidates", row, *given, "--out", str(out)]) == 0
        assert "for 2 of 2 tasks" in capsys.readouterr().out
        texts, relaxed, more = read_candidates(out, read_tasks(tmp_path / "tasks.csv"), 96)
        assert {told for mine in relaxed.values() for told in mine} == {row == "transmute"}
        assert more == 0 and min(map(len, texts.values())) >= least
