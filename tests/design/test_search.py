"""The closed loop: judging real and broken CIFs, and the iterations
with an engine that says what it is told."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from catmllm.config import GAGRPOConfig, SamplingConfig
from catmllm.data.batches import Batch, Collator
from catmllm.data.prompts import DESIGN_ANSWER, GRAPH, Sample, design_prompt
from catmllm.design import search
from catmllm.design.analogues import analogues
from catmllm.design.exemplar_pool import ExemplarPool
from catmllm.design.predict import predict_energies, question
from catmllm.design.search import (
    ANALOGUE,
    GIVEN,
    ClosedLoop,
    Task,
    TaskState,
    make_task,
    site_of,
    structure_key,
    summary,
    told,
)
from catmllm.models.catalytic_mllm import CatalyticMLLM
from catmllm.sample.answers import Rollout
from catmllm.structure.cif import read_cif, write_cif
from catmllm.structure.system import System, make_system
from rewards_fast import parse_cif

Model = tuple[CatalyticMLLM, Collator]
CONFIG = GAGRPOConfig(initial=2, group_size=3, pool=2, sampling=SamplingConfig(max_new_tokens=4))


def task_of(system: System, energy: float | None = None) -> Task:
    return Task(system.identity, system.target, system.known_energy if energy is None else energy)


@pytest.fixture
def loop(small_model: Model) -> ClosedLoop:
    return ClosedLoop(*small_model, CONFIG)


class Parrot:
    """An engine whose answers are given beforehand, call by call; it remembers what it was asked."""

    def __init__(self, *calls: Sequence[str]) -> None:
        self.calls, self.asked = list(calls), []  # type: ignore[var-annotated]

    def generate(
        self, samples: Sequence[Sample], params: Any, seed: Sequence[int], group_size: int = 1, **_: Any
    ) -> list[Rollout]:
        self.asked.append({"samples": list(samples), "seed": list(seed), "group": group_size})
        texts = self.calls.pop(0)
        assert len(texts) == len(samples) * group_size
        nothing = torch.zeros(0)
        return [Rollout(i // group_size, nothing, nothing, None, True, t) for i, t in enumerate(texts)]


# ---------------------------------------------------------------------------- judging


def test_the_energy_of_a_cif_is_the_models_on_the_structure_read_from_it(
    small_model: Model, loop: ClosedLoop, train_systems: list[System]
) -> None:
    model, collate = small_model
    systems = train_systems[::400]
    texts = [DESIGN_ANSWER.format(cif=write_cif(s)) for s in systems]
    candidates, scores = loop.judge([task_of(s) for s in systems], texts, 4)
    read = [replace(read_cif(write_cif(s)), relaxed=False) for s in systems]  # a model writes no relaxed ones
    questions = [question(s) for s in read]
    expected = [predict_energies(model, collate, [q])[0] for q in questions]
    np.testing.assert_allclose([c.predicted for c in candidates], expected, rtol=1e-4, atol=1e-4)
    for size in (2, 64):
        found = predict_energies(model, collate, questions, batch_size=size)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    for c, s, energy, text in zip(candidates, systems, expected, texts):
        assert c.feasible and c.pvcp == pytest.approx(10.0) and c.iteration == 4 and c.text == text
        assert c.reward == pytest.approx(0.7 * math.exp(-abs(energy - s.known_energy)) + 0.6, rel=1e-4)
        assert c.fault is None
    assert scores.total.shape == (len(systems),)
    assert predict_energies(model, collate, []).shape == (0,)


def test_a_text_that_does_not_parse_has_reward_zero(loop: ClosedLoop, train_systems: list[System]) -> None:
    task = task_of(train_systems[0])
    whole = write_cif(train_systems[0])
    texts = ["", "garbage", "data_x\nloop_\n", whole[: len(whole) // 2], "\x00\ud7ff" * 9]
    candidates, scores = loop.judge([task] * len(texts), texts, 0)
    assert all(r is not None for r in scores.reason)
    for c in candidates:
        assert math.isnan(c.predicted) and not c.feasible and c.key == ""
        assert c.reward == pytest.approx(0.0) and c.pvcp == -15.0 and c.fault == "no_adsorbate"


def test_another_composition_is_not_feasible_but_judged(
    loop: ClosedLoop, train_systems: list[System]
) -> None:
    """A cell of other metals still parses and has an energy; it meets no hard constraint."""
    system = next(s for s in train_systems if s.adsorbate == "CO")
    other = next(s for s in train_systems if s.adsorbate == "CO" and s.bulk != system.bulk)
    (c,), _ = loop.judge([task_of(system)], [write_cif(other)], 0)
    assert math.isfinite(c.predicted) and not c.feasible and c.pvcp < 10
    assert 0 < c.reward < 1


def test_what_is_no_molecule_is_not_feasible(loop: ClosedLoop, train_systems: list[System]) -> None:
    """A perfect PVCP, the right atoms and an energy: with C and O 3 Å apart it is no CO."""
    system = next(s for s in train_systems if s.adsorbate == "CO")
    apart = system.frac.copy()
    apart[-1] = np.linalg.solve(system.lattice.T, system.positions[-1] + [0, 0, 2.0])
    text = write_cif(replace(system, frac=apart))
    for _ in range(2):  # the second time from the cache
        (c,), _ = loop.judge([task_of(system)], [text], 0)
        assert (c.pvcp, c.fault, c.feasible) == (10.0, "broken", False) and math.isfinite(c.predicted)
        energy = math.exp(-abs(c.predicted - system.known_energy))
        assert c.reward == pytest.approx(0.7 * energy + 0.3, rel=1e-6)


def test_a_cell_without_the_adsorbates_atoms_has_no_energy(
    loop: ClosedLoop, train_systems: list[System]
) -> None:
    system = next(s for s in train_systems if s.adsorbate == "CO")
    other = next(s for s in train_systems if s.adsorbate == "N")
    (c,), scores = loop.judge([task_of(system)], [write_cif(other)], 0)
    assert scores.reason == [None] and math.isnan(c.predicted) and not c.feasible
    assert c.reward == pytest.approx(0.3 * (c.pvcp + 15) / 25)


def crystal_text(a: float, numbers: Sequence[int], frac: Sequence[Sequence[float]]) -> str:
    system = make_system(
        np.eye(3) * a, None, numbers, [0] * (len(numbers) - 1) + [2], "H", (1, 1, 1), frac=frac
    )
    return write_cif(system)


STRANGE = {
    "heavier than the encoder knows": crystal_text(8.0, [92, 1], [[0, 0, 0], [0, 0, 0.2]]),
    "a cell of 0.02 A": crystal_text(0.02, [46, 1], [[0, 0, 0], [0.5, 0.5, 0.5]]),
    "a cell of 0.7 A": crystal_text(0.7, [46, 1], [[0, 0, 0], [0.5, 0.5, 0.5]]),
    "two atoms in one place": crystal_text(6.0, [46, 1], [[0, 0, 0], [0, 0, 0]]),
    "nothing within the cutoff": crystal_text(90.0, [46, 1], [[0, 0, 0], [0.5, 0.5, 0.5]]),
    "hydrogen alone": crystal_text(9.0, [1, 1], [[0, 0, 0], [0.5, 0.5, 0.5]]),
    "a flat cell": crystal_text(6.0, [46, 1], [[0, 0, 0], [0, 0, 0.3]]).replace(
        "alpha 90.000", "alpha 179.999"
    ),
    "partly occupied": crystal_text(6.0, [46, 1], [[0, 0, 0], [0, 0, 0.3]]).replace(" 1\nH H1", " 0.5\nH H1"),
}


@pytest.mark.parametrize("name", STRANGE)
def test_strange_crystals_raise_nothing(small_model: Model, train_systems: list[System], name: str) -> None:
    """What a model may write in a long run must not end it, nor touch what stands beside it in the batch."""
    system = next(s for s in train_systems if s.adsorbate == "H")
    task, good = task_of(system), write_cif(system)
    alone, _ = ClosedLoop(*small_model, CONFIG).judge([task], [good], 0)
    candidates, _ = ClosedLoop(*small_model, CONFIG).judge([task] * 2, [STRANGE[name], good], 0)
    strange = candidates[0]
    assert math.isfinite(strange.reward) and not strange.feasible
    assert math.isnan(strange.predicted) or math.isfinite(strange.predicted)
    assert candidates[1].predicted == pytest.approx(alone[0].predicted, rel=1e-4, abs=1e-4)
    if name.startswith(("heavier", "a cell of 0.02", "partly")):
        assert math.isnan(strange.predicted)


def test_a_cell_whose_bonds_cannot_be_searched_raises_nothing(
    small_model: Model, train_systems: list[System]
) -> None:
    """What is around an adsorbate, and bonds, reach farther than a short cutoff."""
    model, collate = small_model
    short = replace(collate, data=replace(collate.data, cutoff=1.0))
    text = STRANGE["a cell of 0.02 A"]
    with pytest.raises(ValueError, match="the cell is too small"):
        short.graphs([read_cif(text, "H", (1, 1, 1))])
    task = task_of(next(s for s in train_systems if s.adsorbate == "H"))
    (c,), _ = ClosedLoop(model, short, CONFIG).judge([task], [text], 0)
    assert math.isnan(c.predicted) and not c.feasible


def test_a_crystal_that_has_energy_nan_stays_out_of_the_pool(
    loop: ClosedLoop, train_systems: list[System]
) -> None:
    system = next(s for s in train_systems if s.adsorbate == "H")
    state = TaskState(task_of(system), ExemplarPool(3))
    loop.absorb(
        [state],
        Parrot([STRANGE["a cell of 0.02 A"], "garbage"]).generate([Sample("")], CONFIG.sampling, [], 2),
    )
    assert state.pool.members == []
    assert state.trace[0]["best_reward"] is None and state.trace[0]["mean_error"] is None


# settings: each example parses texts and runs the model
@settings(max_examples=25)
@given(data=st.data())
def test_a_damaged_cif_never_raises(
    small_model: Model, train_systems: list[System], data: st.DataObject
) -> None:
    """Characters of a real CIF replaced at random, as a model's slips are."""
    system = train_systems[data.draw(st.integers(0, 99))]
    text = list(write_cif(system))
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(text) - 1))
        text[at] = data.draw(st.sampled_from(list("0123456789.-_ \nPdCOHU'?#;")))
    (c,), scores = ClosedLoop(*small_model, CONFIG).judge([task_of(system)], ["".join(text)], 0)
    assert math.isfinite(c.reward) and (c.feasible <= math.isfinite(c.predicted))
    assert c.feasible <= (scores.reason[0] is None)


def test_the_same_structure_is_predicted_once(small_model: Model, train_systems: list[System]) -> None:
    loop = ClosedLoop(*small_model, CONFIG)
    system = train_systems[0]
    calls: list[int] = []

    class Counting:
        def __getattr__(self, name: str) -> Any:
            return getattr(small_model[0], name)

        def predict(self, batch: Batch) -> torch.Tensor:
            calls.append(len(batch))
            return small_model[0].predict(batch)

    loop.predictor = Counting(), small_model[1]  # type: ignore[assignment]
    text = write_cif(system)
    first, _ = loop.judge([task_of(system)] * 3, [text, text, "prose\n" + text], 0)
    nearer = first[0].predicted + 0.1
    second, _ = loop.judge([task_of(system, nearer)], [text], 1)
    assert calls == [1]
    assert len({c.key for c in first}) == 1 and {c.predicted for c in [*first, *second]} == {
        first[0].predicted
    }
    # another target, another reward: by the energies alone
    near, far = (
        np.exp(-CONFIG.energy_lambda * abs(e - first[0].predicted)) for e in (system.known_energy, nearer)
    )
    assert second[0].reward - first[0].reward == pytest.approx(CONFIG.energy_weight * (far - near), abs=1e-9)
    assert second[0].reward != first[0].reward


def test_unit_and_raw_scales(small_model: Model, train_systems: list[System]) -> None:
    system = train_systems[0]
    rewards = {}
    for scale in ("unit", "raw"):
        config = replace(CONFIG, pvcp_scale=scale)
        (c,), _ = ClosedLoop(*small_model, config).judge([task_of(system)], [write_cif(system)], 0)
        rewards[scale] = c.reward
    assert rewards["raw"] - rewards["unit"] == pytest.approx(0.3 * 10 - 0.3 * 1)


# ---------------------------------------------------------------------------- structure keys


def test_equal_structures_have_equal_keys(train_systems: list[System]) -> None:
    rng = np.random.default_rng(0)
    for system in train_systems[::500]:
        crystal = parse_cif(write_cif(system))
        order = rng.permutation(len(system))
        shuffled = replace(crystal, frac=crystal.frac[order], numbers=crystal.numbers[order])
        assert structure_key(shuffled) == structure_key(crystal)
        wrapped = replace(crystal, frac=crystal.frac + rng.integers(-2, 3, crystal.frac.shape))
        assert structure_key(wrapped) == structure_key(crystal)
        near = replace(crystal, frac=crystal.frac + 1e-6)
        assert structure_key(near) == structure_key(crystal)
    assert structure_key(replace(crystal, lattice=crystal.lattice * 1.001)) != structure_key(crystal)
    moved = crystal.frac.copy()
    moved[-1, 2] += 0.002
    assert structure_key(replace(crystal, frac=moved)) != structure_key(crystal)
    exchanged = crystal.numbers[::-1].copy()
    assert structure_key(replace(crystal, numbers=exchanged)) != structure_key(crystal)
    assert structure_key(replace(crystal, counts={"Pd": 0.5})) != structure_key(crystal)


def test_a_zero_has_no_sign(train_systems: list[System]) -> None:
    crystal = parse_cif(write_cif(train_systems[0]))
    lattice = np.diag([4.0, 5.0, 20.0])
    tilted = lattice.copy()
    tilted[1, 0] = -1e-12
    a, b = (structure_key(replace(crystal, lattice=l)) for l in (lattice, tilted))
    assert a == b


def test_different_systems_have_different_keys(train_systems: list[System]) -> None:
    found: dict[str, System] = {}
    for system in train_systems[::10]:
        same = found.setdefault(structure_key(system), system)
        if same is not system:  # two starts that relaxed into one structure
            assert same.identity == system.identity
            assert abs(same.known_energy - system.known_energy) < 1e-3
    assert len(found) > 0.98 * len(train_systems[::10])


def test_a_system_has_the_key_of_its_cif(train_systems: list[System]) -> None:
    for system in train_systems[::300]:
        text = write_cif(system)
        assert structure_key(read_cif(text)) == structure_key(parse_cif(text))


# ---------------------------------------------------------------------------- the iterations


@pytest.fixture
def two_tasks(train_systems: list[System]) -> tuple[list[System], list[Task]]:
    groups: dict[str, list[System]] = {}
    for s in train_systems:
        groups.setdefault(s.identity, []).append(s)
    family = next(g for g in groups.values() if len(g) >= 5 and g[0].adsorbate == "OH")
    other = next(g for g in groups.values() if len(g) >= 5 and g[0].adsorbate == "N")
    return [*family[:4], *other[:4]], [task_of(family[4]), task_of(other[4])]


def test_start_samples_from_the_text_alone(
    loop: ClosedLoop, two_tasks: tuple[list[System], list[Task]]
) -> None:
    systems, tasks = two_tasks
    engine = Parrot([write_cif(systems[0]), "garbage", "nothing", "at all"])
    states = loop.start(tasks, engine, [7])  # type: ignore[arg-type]
    (asked,) = engine.asked
    assert asked["group"] == 2 and asked["seed"] == [7, 0]
    assert [s.prompt for s in asked["samples"]] == [design_prompt(t.identity, t.energy) for t in tasks]
    assert all(s.graph is None for s in asked["samples"])
    assert [len(s.pool.members) for s in states] == [1, 0]
    assert states[0].pool.feasible and states[0].trace[0]["iteration"] == 0
    assert states[1].trace[0] == {
        "iteration": 0, "best_reward": None, "best_predicted": None, "feasible": False,
        "mean_error": None, "mean_reward": 0.0, "energies": [None, None],
    }  # fmt: skip


def test_refine_shows_an_exemplar_of_the_pool_and_keeps_the_best(
    loop: ClosedLoop, two_tasks: tuple[list[System], list[Task]]
) -> None:
    systems, tasks = two_tasks
    cif = [write_cif(s) for s in systems]
    engine = Parrot([cif[0], "x", "x", "x"], [cif[1], cif[2], "x", cif[4], "x", "x"], ["x"] * 6)
    states = loop.start(tasks, engine, [7])  # type: ignore[arg-type]
    rollouts, rewards, metrics = loop.refine(states, engine, 1, [7], keep=False)  # type: ignore[arg-type]
    asked = engine.asked[1]
    assert asked["group"] == 3 and asked["seed"] == [7, 1]
    with_pool, without = asked["samples"]
    assert with_pool.prompt == design_prompt(tasks[0].identity, tasks[0].energy, exemplar=True)
    assert GRAPH in with_pool.prompt and with_pool.graph is not None
    np.testing.assert_allclose(with_pool.graph.frac, read_cif(cif[0]).frac)
    assert without.graph is None and GRAPH not in without.prompt  # an empty pool: the text alone again
    # what comes back is task-major, and agrees with a judgement of its own
    assert rewards.shape == (2, 3) and [r.text for r in rollouts] == [cif[1], cif[2], "x", cif[4], "x", "x"]
    judged, _ = loop.judge([t for t in tasks for _ in range(3)], [r.text for r in rollouts], 1)
    np.testing.assert_allclose(rewards.reshape(-1), [c.reward for c in judged])
    assert metrics["reward"] == pytest.approx(rewards.mean())
    assert metrics["feasible"] == pytest.approx(3 / 6)
    # top-K of pool and new ones
    seen = [*loop.judge([tasks[0]] * 3, cif[:3], 0)[0]]
    best = sorted((c.reward for c in seen), reverse=True)[:2]
    assert [c.reward for c in states[0].pool.members] == pytest.approx(best)
    assert len(states[1].pool.members) == 1
    # an iteration that finds nothing loses nothing
    before = [c.key for c in states[0].pool.members]
    loop.refine(states, engine, 2, [7], keep=False)  # type: ignore[arg-type]
    assert [c.key for c in states[0].pool.members] == before
    trace = states[0].trace
    assert [t["iteration"] for t in trace] == [0, 1, 2]
    rising = [t["best_reward"] for t in trace]
    assert rising == sorted(rising) and trace[2]["mean_reward"] == 0.0
    errors = [abs(c.predicted - tasks[0].energy) for c in judged[:2]]
    assert trace[1]["mean_error"] == pytest.approx(np.mean(errors))
    out = summary(states[0])
    assert out["best"]["key"] == before[0] and out["trace"] is trace and out["feasible"]
    assert out["identity"] == tasks[0].identity and out["energy"] == tasks[0].energy


def test_the_exemplar_is_drawn_anew_by_seed_iteration_and_task(
    loop: ClosedLoop, two_tasks: tuple[list[System], list[Task]]
) -> None:
    systems, tasks = two_tasks
    cif = [write_cif(s) for s in systems]
    shown = set()
    for seed in range(12):
        engine = Parrot([cif[0], cif[1]], ["x"] * 3)
        states = loop.start(tasks[:1], engine, [seed])  # type: ignore[arg-type]
        loop.refine(states, engine, 1, [seed], keep=False)  # type: ignore[arg-type]
        graph = engine.asked[1]["samples"][0].graph
        shown.add(structure_key(graph))
    assert shown == {structure_key(parse_cif(c)) for c in cif[:2]}


def test_before_anything_is_feasible_the_best_parseable_ones_are_shown(
    loop: ClosedLoop, train_systems: list[System], two_tasks: tuple[list[System], list[Task]]
) -> None:
    _, tasks = two_tasks
    wrong = next(s for s in train_systems if s.adsorbate == "OH" and s.identity != tasks[0].identity)
    engine = Parrot([write_cif(wrong), "x"], ["x"] * 3)
    states = loop.start(tasks[:1], engine, [0])  # type: ignore[arg-type]
    assert len(states[0].pool.members) == 1 and not states[0].pool.feasible
    loop.refine(states, engine, 1, [0], keep=False)  # type: ignore[arg-type]
    assert engine.asked[1]["samples"][0].graph is not None
    assert summary(states[0])["feasible"] is False


def test_a_task_knows_its_adsorbate(train_systems: list[System]) -> None:
    for system in train_systems[::700]:
        assert task_of(system).adsorbate == system.adsorbate


def test_a_given_structure_is_the_first_exemplar(
    loop: ClosedLoop, two_tasks: tuple[list[System], list[Task]]
) -> None:
    """It is shown with the question, judged like any answer, marked, and none of the candidates tried."""
    systems, tasks = two_tasks
    engine = Parrot(["garbage", "nothing", "at all", "no more"])
    states = loop.start(tasks, engine, [7], [systems[0], None])  # type: ignore[arg-type]
    samples = engine.asked[0]["samples"]
    assert [s.graph for s in samples] == [systems[0], None]
    assert [s.prompt for s in samples] == [
        design_prompt(t.identity, t.energy, shown) for t, shown in zip(tasks, (True, False))
    ]
    assert [c.iteration for c in states[0].pool.members] == [GIVEN] and not states[1].pool.members
    assert len(states[0].tried) == CONFIG.initial


def test_a_search_may_begin_with_training_slabs(
    loop: ClosedLoop, train_systems: list[System], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before what is sampled stand slabs of another composition as the asked one. The predictor is told that
    they are relaxed; the budget stays; a task that no slab can become has samples in their place."""
    n = 4
    monkeypatch.setattr(loop, "config", replace(CONFIG, initial=n, analogues=n - 1))
    task = make_task("CO</s>Pt9Cu3 (1 1 1)", -0.5)
    foreign = make_task("CO</s>Pt8Cu4 (1 1 1)", -0.5)
    told = []
    real = search.question
    monkeypatch.setattr(search, "question", lambda s: told.append(s.relaxed) or real(s))
    engine = Parrot(["garbage"] * (2 * n))
    states = loop.start([task, foreign], engine, [7], known=train_systems)  # type: ignore[arg-type]
    assert [c.iteration for c in states[0].tried] == [ANALOGUE] * (n - 1) + [0]
    assert [c.iteration for c in states[1].tried] == [0] * n
    assert told == [True] * (n - 1)
    assert [len(s.trace[0]["energies"]) for s in states] == [n, n]
    made = analogues([[task.identity]], [task.energy], train_systems, n - 1)[0]
    assert [c.text for c in states[0].tried[:-1]] == [write_cif(s, loop.collate.data.decimals) for s in made]
    assert states[0].pool.best is not None and states[0].pool.feasible
    asked = [question(read_cif(c.text, "CO", (1, 1, 1))) for c in states[0].tried[:-1]]
    energies = predict_energies(*loop.predictor, asked)
    np.testing.assert_allclose([c.predicted for c in states[0].tried[:-1]], energies, rtol=1e-4, atol=1e-4)
    without = loop.start([task], Parrot(["x"] * n), [7])  # type: ignore[arg-type]
    assert [c.iteration for c in without[0].tried] == [0] * n


def test_all_first_candidates_cannot_be_training_slabs() -> None:
    with pytest.raises(ValueError, match="leaves none of `initial: 4` to sample"):
        GAGRPOConfig(initial=4, analogues=4)


def test_only_the_asked_sites_are_feasible(loop: ClosedLoop, train_systems: list[System]) -> None:
    for system in train_systems[:12]:
        text = write_cif(system)
        site = site_of(read_cif(text))
        for sites in (("atop",), ("bridge", "hollow")):
            task = replace(task_of(system), sites=sites)
            (any_site,), _ = loop.judge([task_of(system)], [text], 0)
            (c,), _ = loop.judge([task], [text], 0)
            assert c.feasible == (any_site.feasible and site in sites)


def test_prompts_may_say_another_energy(train_systems: list[System]) -> None:
    """A control: the energy that is farthest from the wanted one, whatever other tasks there are."""
    other = GAGRPOConfig(prompts="other")
    tasks = [task_of(s) for s in train_systems[:20]]
    for task, one in zip(tasks, told(tasks, other, train_systems)):
        same = [s.known_energy for s in train_systems if s.adsorbate == task.adsorbate]
        assert abs(one.prompted - task.energy) == max(abs(e - task.energy) for e in same)
        assert one.prompted in same and one.energy == task.energy == task.prompted
        assert told([task], other, train_systems) == [one]
    assert told(tasks, GAGRPOConfig(), []) == tasks
    (foreign,) = told([make_task("CHO</s>Pt12 (1 1 1)", 1.0)], other, train_systems)
    assert foreign.said == max((s.known_energy for s in train_systems), key=lambda e: abs(e - 1.0))
    with pytest.raises(ValueError, match="none are given"):
        told(tasks, other, [])


def test_the_predictor_is_told_which_structures_are_relaxed(
    small_model: Model, train_systems: list[System]
) -> None:
    tasks, texts = [task_of(s) for s in train_systems[:2]], [write_cif(s) for s in train_systems[:2]]

    def said(relaxed: bool | list[bool]) -> list[float]:
        return [c.predicted for c in ClosedLoop(*small_model, CONFIG).judge(tasks, texts, 0, relaxed)[0]]

    relaxed, unrelaxed = said(True), said(False)
    np.testing.assert_allclose(said([True, False]), [relaxed[0], unrelaxed[1]], rtol=1e-4, atol=1e-4)
    assert abs(relaxed[0] - unrelaxed[0]) > 1e-3
