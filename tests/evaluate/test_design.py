"""The design evaluation and its controls: the same predictor, the same number of predictions, what counts."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from catmllm.config import Config, GAGRPOConfig
from catmllm.data.batches import Collator
from catmllm.data.open import open_data
from catmllm.design.constraints import adsorbate_faults, hard_constraints
from catmllm.design.enumeration import enumerable
from catmllm.design.exemplar_pool import Candidate, ExemplarPool
from catmllm.design.predict import predict_energies, predictor_of, question
from catmllm.design.search import Task, TaskState
from catmllm.evaluate import design, judges, second_opinion
from catmllm.evaluate.baselines import FRAMES, KernelRidge
from catmllm.evaluate.controls import budgets, closest, ideal_candidates, sound_analogues
from catmllm.evaluate.metrics import bootstrap_interval, wilson_interval
from catmllm.models.catalytic_mllm import CatalyticMLLM
from catmllm.models.state import save_model
from catmllm.structure.cif import write_cif
from catmllm.structure.system import System
from catmllm.world import World
from rewards_fast import PVCP
from tests.data.toy_calculator import EggBox


class Alone(World):
    """A world of one without a process group."""

    def gather(self, value: Any) -> list[Any]:
        return [value]


ONE = Alone(0, 1, torch.device("cpu"))
FOREIGN = Task("CO</s>Fe12 (1 1 1)", {"Fe": 12, "C": 1, "O": 1}, -1.0)


def configured(config: Config, **evaluate: Any) -> Config:
    loop = replace(config.ga_grpo, initial=2, iterations=1, group_size=3, pool=2)
    loop.sampling = replace(loop.sampling, max_new_tokens=400, grammar=True)
    return replace(config, ga_grpo=loop, evaluate=replace(config.evaluate, design_tasks=2, **evaluate))


@pytest.fixture(scope="module")
def parts() -> dict[str, Sequence[System]]:
    return {name: systems[:160] for name, systems in open_data().items()}


def test_predictions_are_counted_up_to_those_of_the_search() -> None:
    assert budgets(Config()) == [1, 4, 16, 96]
    config = Config(ga_grpo=GAGRPOConfig(initial=3, iterations=2, group_size=3))
    assert budgets(config) == [1, 4, 9]


def test_ideal_candidates_meet_the_constraints(parts: dict[str, Sequence[System]]) -> None:
    system = parts["test"][0]
    task = Task(system.identity, system.target, system.known_energy)
    found = ideal_candidates(task, 20, 0, 3)
    scores = PVCP().score([write_cif(s) for s in found], task.target)
    assert len(found) == 20 and hard_constraints(scores, adsorbate_faults(found)).all()
    again = ideal_candidates(task, 5, 0, 3)
    assert all(np.array_equal(a.frac, b.frac) for a, b in zip(again, found))  # fewer are the first of more
    assert not np.array_equal(ideal_candidates(task, 1, 0, 4)[0].frac, found[0].frac)
    assert enumerable(FOREIGN.identity) and ideal_candidates(FOREIGN, 3, 0, 0) == []


def test_the_closest_of_the_first() -> None:
    assert closest([4.0, 2.0, 0.1, 0.0], [1, 2, 3, 4]) == [0, 1, 2, 3]
    assert closest([0.0, 6.0], [1, 2]) == [0, 0]


def test_the_best_after_n_is_the_pools_after_n() -> None:
    rng = np.random.default_rng(0)
    tried = [
        Candidate(str(k), float(rng.random()), np.nan if k % 5 == 0 else 0.0, 1.0, None, k > 12, str(k), 0)
        for k in range(30)
    ]
    state = TaskState(FOREIGN, ExemplarPool(3), tried=tried)
    pool = ExemplarPool(3)
    assert state.best_of(1) is None  # it has no energy
    for k, candidate in enumerate(tried):
        pool.add([candidate] if candidate.predicted == 0.0 else [])
        assert state.best_of(k + 1) == pool.best


def test_bootstrap_of_groups() -> None:
    """Rows that come ten at a time are as uncertain as a tenth of them."""
    rng = np.random.default_rng(0)
    few = rng.normal(size=40)
    many = np.repeat(few, 10)
    groups = np.repeat(np.arange(40), 10).tolist()
    low, high = bootstrap_interval(many, groups=groups)
    assert (low, high) == pytest.approx(bootstrap_interval(few), abs=0.03)
    narrow = bootstrap_interval(many)
    assert narrow[1] - narrow[0] < 0.5 * (high - low)


def item(energy: float, **answers: list[tuple[float | None, float | None, bool]]) -> dict[str, Any]:
    """A finished task on a (111) facet; an answer is (own energy, judged energy, feasible)."""
    return {
        "identity": f"CO</s>Pt12Cu{round(12 * energy)} (1 1 1)",
        "energy": energy,
        "answers": {
            method: [
                {
                    "predicted": own,
                    "feasible": fine,
                    "judged": None if judged is None else {"energy": judged, "ok": np.isfinite(judged)},
                }
                for own, judged, fine in answers.get(method, [])
            ]
            for method in design.METHODS
        },
    }


def test_curves_by_hand() -> None:
    items = [
        item(1.0, search=[(None, None, False), (1.2, 1.0, True)],
             enumeration=[(1.1, 3.0, True), (1.0, 1.1, True)]),
        item(2.0, search=[(2.0, np.nan, True), (2.1, 2.6, True)],
             enumeration=[(2.0, 2.0, True), (2.0, 2.0, True)]),
        item(3.0, search=[(3.0, 3.0, False), (3.0, 3.0, True)]),
    ]  # fmt: skip
    curves = design.design_curves(items, ("own", "judge"), 0.25)
    assert [curves[m]["n"] for m in design.METHODS] == [3, 2, 0, 0, 0]
    assert curves["search"]["own"]["success"] == pytest.approx([1 / 3, 1.0])
    assert curves["search"]["judge"]["success"] == pytest.approx([0.0, 2 / 3])
    assert curves["enumeration"]["judge"]["success"] == pytest.approx([0.5, 1.0])
    assert curves["enumeration"]["judge"]["search_more"] == pytest.approx([-0.5, -0.5])
    assert curves["enumeration"]["own"]["search_more"] == pytest.approx([-0.5, 0.0])
    assert curves["search"]["own"]["interval"][1] == pytest.approx(wilson_interval(1.0, 3))
    low, high = curves["enumeration"]["judge"]["search_more_interval"][1]
    assert (low, high) == (-1.0, 0.0)
    assert set(curves["kernel_ridge"]) == {"n"}


@pytest.fixture
def evaluated(
    small_model: tuple[CatalyticMLLM, Collator], small_config: Config, parts: dict[str, Sequence[System]]
) -> Callable[..., dict[str, Any]]:
    """The evaluation of the small model, with other options of `evaluate`."""
    return lambda **options: design.evaluate_design(
        *small_model, configured(small_config, **options), parts, ONE
    )


def sound(best: dict[str, Any], task: Task) -> bool:
    """Whether a design meets the hard constraints, by its text."""
    return bool(hard_constraints(PVCP().score([best["text"]], [task.target]), [best["fault"]])[0])


def test_evaluation_with_controls(
    evaluated: Callable[..., dict[str, Any]],
    small_model: tuple[CatalyticMLLM, Collator],
    small_config: Config,
    parts: dict[str, Sequence[System]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    judge = judges.Judge(EggBox())
    monkeypatch.setattr(judges, "Judge", lambda name: judge)
    found = evaluated()
    json.dumps(found)
    assert found["budgets"] == [1, 4, 5] and found["n"] == 2 and 0 <= found["AD"] <= 1
    tasks = design.design_tasks(parts["test"], 2, small_config.seed)
    ridge = KernelRidge.fit(parts["train"], parts["val"], FRAMES)
    for k, (task, of) in enumerate(zip(tasks, found["items"])):
        assert of["identity"] == task.identity
        slabs = ideal_candidates(task, 5, small_config.seed, k)
        own = predict_energies(*small_model, [question(s) for s in slabs])
        (exchanged,) = sound_analogues([[task.identity]], [task], parts["train"], 5)
        assert exchanged and {s.identity for s in exchanged} == {task.identity}
        near = predict_energies(*small_model, [question(s) for s in exchanged])
        for method, energies in (
            ("enumeration", own),
            ("kernel_ridge", ridge.predict(slabs)),
            ("analogues", near),
        ):
            answers = of["answers"][method]
            picks = [int(np.argmin(np.abs(energies[:b] - task.energy))) for b in (1, 4, 5)]
            expected = [(near if method == "analogues" else own)[p] for p in picks]
            np.testing.assert_allclose([a["predicted"] for a in answers], expected, rtol=1e-4, atol=1e-4)
            word = judge.judge((exchanged if method == "analogues" else slabs)[picks[-1]])
            assert answers[-1]["judged"]["ok"] == word.ok
            assert answers[-1]["judged"]["energy"] == pytest.approx(word.energy, abs=1e-6, nan_ok=True)
        last = of["answers"]["search"][-1]
        assert last["judged"] == of["judged"]
        assert last["predicted"] == (of["best"] or {"predicted": None})["predicted"]
        assert last["feasible"] == of["feasible"] == (of["best"] is not None and sound(of["best"], task))
    for name in ("own", "judge"):
        curve = found["curves"]["enumeration"][name]["success"]
        assert found[name]["random"] == curve[0] and found[name]["enumeration"] == curve[-1]
        assert found[name]["success"] == found["curves"]["search"][name]["success"][-1]
        assert found[name]["kernel_ridge"] == found["curves"]["kernel_ridge"][name]["success"][-1]
    alone = found["curves"]["enumeration"]["own"]["success"]
    assert alone == sorted(alone)  # more predictions never lose by the predictor that chooses


def test_energies_of_another_model_guide_the_search_and_the_controls(
    small_model: tuple[CatalyticMLLM, Collator],
    small_config: Config,
    parts: dict[str, Sequence[System]],
    tmp_path: Path,
) -> None:
    other = copy.deepcopy(small_model[0])
    other.energy_mean.fill_(40.0)
    save_model(tmp_path / "joint", other, other.state_dict(), small_config, small_model[1])
    config = configured(small_config, judge="none")
    config.ga_grpo.predictor = str(tmp_path)
    predictor = predictor_of(config, torch.device("cpu"))
    assert predictor is not None
    found = design.evaluate_design(*small_model, config, parts, ONE)
    for k, (task, of) in enumerate(zip(design.design_tasks(parts["test"], 2, config.seed), found["items"])):
        energies = predict_energies(*predictor, [question(s) for s in ideal_candidates(task, 5, 0, k)])
        best = energies[np.argmin(np.abs(energies - task.energy))]
        assert of["answers"]["enumeration"][-1]["predicted"] == pytest.approx(float(best), rel=1e-3)
        if of["best"] is not None:
            system = replace(design.candidate_system(Candidate(**of["best"]), task.identity), relaxed=False)
            theirs, own = (predict_energies(*model, [question(system)]) for model in (predictor, small_model))
            assert of["best"]["predicted"] == pytest.approx(float(theirs[0]), rel=1e-3)
            assert abs(theirs[0] - own[0]) > 10
    assert any(of["best"] is not None for of in found["items"])
    (tmp_path / "joint").rename(tmp_path / "encoder")
    with pytest.raises(ValueError, match="comes before those that train energies"):
        predictor_of(config, torch.device("cpu"))


def test_bias_is_that_of_the_accepted_designs() -> None:
    """The search finds where its predictor is too near the target, however good it is on the whole."""
    items = [item(1.0), item(2.0), item(3.0)]
    more, accepted = np.array([0.3, np.nan, 0.1]), np.array([True, False, True])
    found = design.predictor_bias(more, accepted, items)
    assert found is not None and (found["mean"], found["n"]) == (pytest.approx(0.2), 2)
    assert found["interval"] == pytest.approx((0.1, 0.3))
    assert design.predictor_bias(more, np.zeros(3, bool), items) is None


def test_intervals_draw_surfaces_whatever_the_size_of_their_cells() -> None:
    """Cu3Pt9 and Pt12Cu4 are one bulk; the name of several adsorbates is passed over."""
    names = ["CO</s>Cu3Pt9 (1 1 1)", "O + OH</s>Pt12Cu4 (1 1 1)", "CO</s>CuPt3 (1 0 0)"]
    both = {"search": [(1.0, None, True)], "enumeration": [(9.0, None, True)]}
    items = [item(1.0, **both) | {"identity": name} for name in names]
    items[1]["answers"]["enumeration"][0]["predicted"] = 1.0
    curve = design.design_curves(items, ("own",), 0.25)["enumeration"]["own"]
    more = np.array([1.0, 0.0, 1.0])
    expected = bootstrap_interval(more, groups=["111", "111", "100"])
    assert tuple(curve["search_more_interval"][0]) == expected == (0.5, 1.0)
    found = design.predictor_bias(more, np.ones(3, bool), items)
    assert found is not None and found["interval"] == expected


def test_what_cannot_be_enumerated_has_no_such_controls(
    evaluated: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(design, "ideal_candidates", lambda *_: [])
    found = evaluated(judge="none")
    assert [found["curves"][m]["n"] for m in design.METHODS] == [2, 0, 0, 0, 2]
    assert "random" not in found["own"] and "retrieval" in found["own"] and found["judge"] is None


def test_a_second_opinion_by_a_potential_that_is_the_labels_but_for_an_offset(
    parts: dict[str, Sequence[System]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A judge that is the labels and 2 eV accepts every true system and the designs at the right energy."""
    test = [s for s in parts["test"] if not adsorbate_faults([s])[0]][:6]
    off = {"CO": 2.0, "H": -1.0}

    class Knows(judges.Judge):
        def judge_many(self, systems, workers=1, progress=True):
            return [
                judges.JudgedEnergy(s.known_energy + off.get(s.adsorbate, 0.5), True, None) for s in systems
            ]

    def of(system: System, best: System | None, feasible: bool = True) -> dict[str, Any]:
        text = None if best is None else write_cif(best, 6)
        made = text and {"text": text, "reward": 1.0, "predicted": 0.0, "pvcp": 10.0, "fault": None,
                         "feasible": feasible, "key": "", "iteration": 0}  # fmt: skip
        return {
            "identity": system.identity,
            "energy": system.known_energy,
            "best": made or None,
            "feasible": feasible,
        }

    monkeypatch.setattr(second_opinion, "candidate_system", lambda best, _: by_text[best.text])
    by_text = {write_cif(s, 6): s for s in test}
    other = max(test[1:], key=lambda s: abs(s.known_energy - test[0].known_energy))
    items = [of(test[0], test[0]), of(test[1], test[1]), of(test[2], test[2], False), of(test[3], None)]
    judge = Knows(EggBox())
    found = second_opinion.second_opinion(judge, items, parts, 0.05)
    assert (found["n"], found["success"], found["ceiling"], found["share"]) == (4, 0.5, 1.0, 0.5)
    assert all(
        shift == pytest.approx(-off.get(name, 0.5), abs=1e-9) for name, shift in found["offsets"].items()
    )
    missed = second_opinion.second_opinion(judge, [of(test[0], other)], parts, 0.05)
    assert (missed["success"], missed["ceiling"]) == (0.0, 1.0)
    with pytest.raises(ValueError, match="other data"):
        second_opinion.second_opinion(judge, [of(parts["train"][0], None)], parts, 0.05)


def test_a_search_tells_how_near_its_best_are() -> None:
    def state(predicted: float | None) -> Any:
        best = None if predicted is None else SimpleNamespace(predicted=predicted)
        return SimpleNamespace(pool=SimpleNamespace(best=best), task=SimpleNamespace(energy=-1.2))

    assert design._so_far([state(-1.0), state(-1.6), state(None)]) == "best 0.300 eV from the wanted energy"
    assert design._so_far([state(None)]) == "nothing that parses yet"
