"""Slabs judged at their best sites: against relaxations by ASE one by one."""

from __future__ import annotations

import json
from dataclasses import replace
from random import Random
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.calculator import Calculator
from ase.constraints import FixAtoms
from ase.optimize import BFGS

from catmllm.config import Config
from catmllm.data.batches import Collator
from catmllm.data.open import open_data
from catmllm.data.oracle import SWING, references_of
from catmllm.design.enumeration import MOST_SITES, ideal_slab, on_sites
from catmllm.design.predict import predict_energies, question
from catmllm.evaluate import slab_tasks
from catmllm.evaluate.baselines import FRAMES, KernelRidge
from catmllm.evaluate.design import METHODS
from catmllm.evaluate.judges import Judge, JudgedEnergy
from catmllm.evaluate.slab_tasks import (
    LEAST,
    Lowest,
    SlabTask,
    bare,
    built,
    evaluate_slabs,
    furthest,
    in_order,
    judge_slabs,
    lowest_energies,
    lowest_labels,
    make_tasks,
    pick_slabs,
    screen_slabs,
    text_shifts,
)
from catmllm.models.catalytic_mllm import CatalyticMLLM
from catmllm.report.run import _slabs
from catmllm.report.summary import SLAB_NAMES, slab_table, tables
from catmllm.structure.formula import format_formula, parse_identity, reduce_counts
from catmllm.structure.system import System, text_system
from tests.data.toy_calculator import EggBox
from tests.evaluate.test_design import ONE, configured


@pytest.mark.slow
@pytest.mark.parametrize("identity", ["O</s>Pd6Ag6 (1 0 0)", "O</s>Pt9Cu3 (1 1 1)"])
def test_the_lowest_is_that_of_ase_one_by_one(identity: str) -> None:
    """ASE's own BFGS, with DIEP's own calculator, from the same starts on a slab that it relaxed itself. Both
    stop at 0.05 eV/Å, where each is above the bottom by F²/2k, some meV for soft modes of 0.5 eV/Å², and a
    minimum in a kink of DIEP may swing by `SWING`."""
    from diep.pretrained import make_calculator

    adsorbate = identity.partition("<")[0]
    slab = ideal_slab(identity, Random(3))
    (ours,) = lowest_energies(Judge("diep"), [(slab, adsorbate)])
    calculator = make_calculator(stress=False)
    surface = _relaxed(slab.as_ase(), slab.tags == 1, 100, calculator)
    energies = []
    for start in on_sites(slab, adsorbate):
        atoms = start.as_ase()
        atoms.positions[:12] = surface.positions
        _relaxed(atoms, start.tags == 2, 60, calculator)
        zero = sum(references_of("diep")[s] for s in atoms.get_chemical_symbols()[12:])
        height = atoms.positions[12:, 2].min() - atoms.positions[:12, 2].max()
        if -0.8 < height < 2.4:
            energies.append(atoms.get_potential_energy() - surface.get_potential_energy() - zero)
    assert 5 <= ours.sites <= MOST_SITES and ours.sites == len(on_sites(slab, adsorbate))
    assert np.ptp(energies) > 0.1  # the site matters
    assert ours.energy == pytest.approx(min(energies), abs=SWING["diep"])


def _relaxed(atoms: Atoms, free: np.ndarray, steps: int, calculator: Calculator) -> Atoms:
    atoms.set_constraint(FixAtoms(mask=~free))
    atoms.calc = calculator
    BFGS(atoms, logfile=None).run(fmax=0.05, steps=steps)
    return atoms


LINE = "CO</s>Pt9Cu3 (1 1 1)"


class Fake:
    """A judge of what it is told, by the adsorbate."""

    def __init__(self, said: dict[str, list[JudgedEnergy]]) -> None:
        self.said, self.asked = said, list[System]()

    def judge_many(self, systems: list[System], progress: bool = True) -> list[JudgedEnergy]:
        self.asked += systems
        turn = {name: iter(verdicts) for name, verdicts in self.said.items()}
        return [next(turn[s.adsorbate]) for s in systems]


def test_the_lowest_of_what_counts() -> None:
    slab = ideal_slab(LINE, Random(0))
    n = len(on_sites(slab, "CO"))
    fine = [JudgedEnergy(1.0 + k, True, None) for k in range(n)]
    judge: Any = Fake(
        {
            "CO": [JudgedEnergy(-3.0, False, "desorbed"), *fine[1:]],
            "O": [JudgedEnergy(np.nan, False, "not_converged")] * n,
        }
    )
    found = lowest_energies(judge, [(slab, "CO"), (slab, "O"), (replace(slab, sid="again"), "CO")])
    assert found[0] == Lowest(2.0, n, {"desorbed": 1}) == found[2]
    assert np.isnan(found[1].energy) and found[1].left_out == {"not_converged": n}
    assert [s.adsorbate for s in judge.asked] == ["CO"] * n + ["O"] * n  # equal ones once


def test_the_furthest_counts() -> None:
    wanted = {"O": 1.0, "OH": -1.0}
    assert furthest([1.2, -1.5], wanted) == pytest.approx(-0.5)
    assert furthest([1.6, -1.5], wanted) == pytest.approx(0.6)
    assert np.isnan(furthest([1.0, np.nan], wanted))


def test_slabs_are_spread_over_pairs() -> None:
    test = open_data()["test"]
    pairs = {(s.bulk, s.miller) for s in test}
    picks = pick_slabs(test, len(pairs), 0)
    assert {(s.bulk, s.miller) for s in picks} == pairs
    assert [s.sid for s in pick_slabs(test, 3, 0)] == [s.sid for s in picks[:3]]
    assert [s.sid for s in pick_slabs(test, 3, 1)] != [s.sid for s in picks[:3]]


@pytest.fixture(scope="module")
def data() -> dict[str, list[System]]:
    return {name: list(some[:240]) for name, some in open_data().items()}


def test_a_text_is_shifted_to_the_lowest_label(
    small_model: tuple[CatalyticMLLM, Collator], data: dict[str, list[System]]
) -> None:
    lowest = lowest_labels(data["train"])
    for system in lowest:
        same = [
            s.energy
            for s in data["train"]
            if (s.adsorbate, s.bulk, s.miller) == (system.adsorbate, system.bulk, system.miller)
        ]
        assert len(same) >= LEAST and system.energy == min(same)
    shifts = text_shifts(small_model, lowest)
    of_it = [s for s in lowest if s.adsorbate == "O"]
    texts = [question(text_system(f"O</s>{s.bulk} ({' '.join(map(str, s.known_miller))})")) for s in of_it]
    said = predict_energies(*small_model, texts)
    assert shifts["O"] == pytest.approx(np.mean([s.known_energy for s in of_it] - said), abs=1e-3)
    # and slabs are tried by how far such energies are, of two adsorbates by the further one
    lines = ["Pt9Cu3 (1 1 1)", "Pd12 (1 1 1)", "Ni6Ag6 (1 1 1)"]
    task = SlabTask(ideal_slab(LINE, Random(0)), {"O": 0.3, "H": -0.2}, lines)
    far = []
    for line in lines:
        counts = parse_identity(f"O</s>{line}").slab
        bulk = format_formula(reduce_counts(counts)[0])
        o, h = predict_energies(
            *small_model, [question(text_system(f"{a}</s>{bulk} (1 1 1)")) for a in ("O", "H")]
        )
        far.append(max(abs(o + shifts["O"] - 0.3), abs(h + shifts["H"] + 0.2)))
    assert in_order(small_model, [task], shifts) == [[lines[k] for k in np.argsort(far)]]


@pytest.fixture(scope="module")
def found(
    small_model: tuple[CatalyticMLLM, Collator], small_config: Config, data: dict[str, list[System]]
) -> dict[str, Any]:
    """The evaluation of two test slabs, judged by a toy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slab_tasks, "Judge", lambda name: Judge(EggBox()))
        return evaluate_slabs(*small_model, configured(small_config, slab_tasks=2), data, ONE)


def test_each_arm_by_hand(
    small_model: tuple[CatalyticMLLM, Collator],
    small_config: Config,
    data: dict[str, list[System]],
    found: dict[str, Any],
) -> None:
    config = configured(small_config, slab_tasks=2)
    known = {(s.bulk, s.miller) for part in ("train", "val") for s in data[part]}
    picks = pick_slabs(data["test"], 2, config.seed)
    assert set(found) == {"one", "several"}
    ridge = KernelRidge.fit(data["train"], data["val"], FRAMES)
    for kind, part in found.items():
        assert part["n"] == 2 and part["budgets"] == [1, 4, 5]
        arms = ["search", "enumeration", "kernel_ridge", *(["analogues"] if kind == "one" else [])]
        assert [m for m in METHODS if part["curves"][m]["n"]] == sorted(arms, key=METHODS.index)
        made = make_tasks(Judge(EggBox()), picks, [tuple(item["wanted"]) for item in part["items"]], data)
        for task, item in zip(made, part["items"]):
            assert task is not None and item["wanted"] == pytest.approx(task.wanted)
            for line in task.lines:
                asked = parse_identity(f"O</s>{line}")
                assert (format_formula(reduce_counts(asked.slab)[0]), asked.miller) not in known
            for answers in item["answers"].values():
                for answer in answers:
                    wanted, judged = item["wanted"].values(), answer["judged"]
                    off = [e - w for e, w in zip(judged["energies"], wanted)]
                    assert judged["energy"] == pytest.approx(max(off, key=abs), nan_ok=True)
                    assert judged["ok"] == bool(np.isfinite(off).all())
        task = made[0]
        assert task is not None
        slabs = built(task.lines, 5, Random(1))
        assert [s.slab_formula for s in slabs] == [
            parse_line(task.lines[k % len(task.lines)]) for k in range(5)
        ]
        energies, far = screen_slabs(small_model, config, ridge, slabs, task)
        for k, slab in enumerate(slabs):
            low = [
                predict_energies(*small_model, [question(s) for s in on_sites(slab, a)]).min()
                for a in task.wanted
            ]
            assert energies[k] == pytest.approx(low, abs=1e-3)
            low = [ridge.predict(on_sites(slab, a)).min() for a in task.wanted]
            off = np.abs(np.array(low) - list(task.wanted.values())).max()
            assert far["ridge"][k] == pytest.approx(off, abs=1e-6)


def parse_line(line: str) -> str:
    return format_formula(parse_identity(f"O</s>{line}").slab)


def test_the_known_slab_is_always_an_answer(data: dict[str, list[System]]) -> None:
    judge = Judge(EggBox())
    picks = pick_slabs(data["test"], 3, 0)
    tasks = make_tasks(judge, picks, [("H", "O")] * 3, data)
    items: list[dict[str, Any]] = []
    for task, system in zip(tasks, picks):
        assert task is not None and task.surface.slab_formula == system.slab_formula
        assert task.surface.numbers.tolist() == system.numbers[:12].tolist()
        aside = (task.surface.frac - bare(system).frac + 0.5) % 1 - 0.5
        assert np.median(np.abs(aside @ system.lattice)) < 0.1
        items.append({"wanted": task.wanted, "answers": {"search": [{}]}})
    judge_slabs(judge, items, [t.surface for t in tasks if t is not None])
    assert all(i["answers"]["search"][0]["judged"]["energy"] == 0.0 for i in items)


def test_the_report_has_both_tables(found: dict[str, Any]) -> None:
    metrics = {"slab_design": found}
    one, several = slab_table(metrics), slab_table(metrics, "several")
    assert one is not None and several is not None and slab_table({}) is None
    assert one in tables(metrics) and several in tables(metrics)
    assert one.header == several.header == ["", "1", "4", "5"]
    assert [row[0].partition(" (n")[0] for row in one.rows] == list(SLAB_NAMES.values())
    assert len(several.rows) == 3 and "O and OH" in several.title and "slabs tried" in several.title
    page = "".join(_slabs(json.loads(json.dumps(metrics))))
    assert page.count("<table") == 2 and page.count("<figure") == 2
