"""The judges against the shipped labels and plain ASE, and what they refuse to count."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms
from ase.optimize import BFGS

from catmllm.config import GAGRPOConfig
from catmllm.data.oracle import OracleMissing, atomic_references, references_of, sevennet
from catmllm.data.slabs import SHIPPED_SEVENNET, load_slabs
from catmllm.design.search import ClosedLoop, make_task
from catmllm.evaluate.judges import Judge, JudgedEnergy
from catmllm.potentials.relax import by_calculator
from catmllm.report.design import judge_designs, save_designs
from catmllm.sample.answers import Rollout
from catmllm.structure.cif import read_cif, write_cif
from catmllm.structure.elements import SYMBOLS
from catmllm.structure.system import System, make_system

SYSTEMS = load_slabs(SHIPPED_SEVENNET)
ONE_OF_EACH = [next(s for s in SYSTEMS[100:] if s.adsorbate == name) for name in ("H", "N", "CO", "OH", "CH")]


def changed(system: System, positions: np.ndarray) -> System:
    return make_system(
        system.lattice, positions, system.numbers, system.tags, system.adsorbate, system.miller
    )


def nudged(system: System, size: float, seed: int = 0) -> System:
    """The adsorbate moved at random, the slab as it was."""
    noise = np.random.default_rng(seed).normal(0, size, (len(system), 3)) * (system.tags == 2)[:, None]
    return changed(system, system.positions + noise)


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge("sevennet")


# --------------------------------------------------------------------------- SevenNet-0 for real


@pytest.mark.parametrize("system", ONE_OF_EACH, ids=lambda s: s.adsorbate)
def test_labels_come_out_again(judge: Judge, system: System) -> None:
    judged = judge.judge(system)
    assert judged.ok and judged.reason is None
    assert judged.energy == pytest.approx(system.energy, abs=0.01)


def test_diep_says_its_own_labels_again() -> None:
    judge = Judge("diep")
    systems = load_slabs()[50:]
    for name in ("H", "N", "CO", "OH", "CH"):
        system = next(s for s in systems if s.adsorbate == name)
        judged = judge.judge(system)
        assert judged.ok and judged.energy == pytest.approx(system.energy, abs=0.01)
        # and of a surface that has not relaxed, as an ideal slab's has not
        raised = system.positions + (system.tags != 0)[:, None] * [0.0, 0.0, 0.15]
        judged = judge.judge(changed(system, raised))
        assert judged.ok and judged.energy == pytest.approx(system.energy, abs=0.03)


def test_a_disturbed_adsorbate_goes_back(judge: Judge) -> None:
    for system in ONE_OF_EACH[1:3]:
        judged, relaxed = judge.relax(nudged(system, 0.1))
        assert judged.ok and judged.steps > 0 and judged.moved > 0.05
        assert judged.energy == pytest.approx(system.energy, abs=0.02)
        slab = system.tags != 2
        np.testing.assert_allclose(relaxed.positions[slab], system.positions[slab], atol=0.01)
        np.testing.assert_allclose(relaxed.positions[~slab], system.positions[~slab], atol=0.15)
        assert relaxed.energy == judged.energy


def test_a_cif_of_three_decimals_is_judged_like_its_source(judge: Judge) -> None:
    for system in ONE_OF_EACH[:2]:
        again = read_cif(write_cif(system), system.adsorbate, system.miller)
        assert judge.adsorption_energy(again) == pytest.approx(system.energy, abs=0.02)


def test_the_energy_is_that_of_plain_ase(judge: Judge) -> None:
    system = nudged(ONE_OF_EACH[0], 0.05)
    atoms = system.as_ase()
    atoms.set_constraint(FixAtoms(indices=range(12)))
    atoms.calc = sevennet()
    BFGS(atoms, logfile=None).run(fmax=0.05, steps=60)
    slab = system.as_ase()[:12]
    slab.calc = sevennet()
    h2 = Atoms("H2", positions=[[0, 0, 0], [0, 0, 0.75]], cell=[11, 11, 11.75], pbc=True)
    h2.center()
    h2.calc = sevennet()
    BFGS(h2, logfile=None).run(fmax=0.03, steps=60)
    expected = atoms.get_potential_energy() - slab.get_potential_energy() - h2.get_potential_energy() / 2
    assert judge.judge(system).energy == pytest.approx(expected, abs=0.005)


def test_references_are_the_documented_gases() -> None:
    """On the checked-in values: a change of weights or protocol would shift the zero of all energies."""
    expected = {"H": -3.32261, "O": -7.44865, "N": -8.24159, "C": -7.04387}
    assert references_of("sevennet") == pytest.approx(expected, abs=2e-3)


def test_threads_are_left_as_they_were(judge: Judge) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        judge.judge(ONE_OF_EACH[0])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
def test_sixteen_labels_and_their_disturbed_starts() -> None:
    judge = Judge("sevennet")
    picks = [SYSTEMS[i] for i in np.random.default_rng(5).choice(len(SYSTEMS), 16, replace=False)]
    same = judge.judge_many(picks, progress=False)
    assert max(abs(j.energy - float(s.energy or 0)) for j, s in zip(same, picks)) < 0.01
    disturbed = judge.judge_many([nudged(s, 0.1, i) for i, s in enumerate(picks)], workers=2, progress=False)
    errors = np.array([abs(j.energy - float(s.energy or 0)) for j, s in zip(disturbed, picks)])
    assert np.median(errors) < 0.01 and np.mean(errors < 0.05) > 0.8
    assert np.mean([j.steps for j in disturbed]) < 12


# --------------------------------------------------------------------------- what does not count


class Spring(Calculator):
    """A toy: every C, H, O and N atom hangs on a spring at (x, y, `height`)
    and does not see anything else."""

    implemented_properties = ["energy", "forces"]  # noqa: RUF012

    def __init__(self, height: float, fail: bool = False) -> None:
        super().__init__()
        self.height, self.fail = height, fail

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        if self.fail and len(atoms) > 12:
            raise np.linalg.LinAlgError("blown up")
        light = np.isin(atoms.numbers, (1, 6, 7, 8))
        stretch = np.where(light, atoms.positions[:, 2] - self.height, 0.0)
        self.results = {
            "energy": 0.5 * 5.0 * float((stretch**2).sum()),
            "forces": -5.0 * stretch[:, None] * [0.0, 0.0, 1.0],
        }


ATOM, MOLECULE = ONE_OF_EACH[1], ONE_OF_EACH[2]
TOP = float(ATOM.positions[ATOM.tags != 2, 2].max())


def spring_judge(height: float, fail: bool = False) -> Judge:
    judge = Judge(Spring(TOP + height, fail=fail))
    judge.references = {"H": 0.0, "C": 0.0, "N": -0.5, "O": 0.0}
    return judge


def test_energy_is_counted_from_slab_and_references() -> None:
    judged = spring_judge(1.2).judge(ATOM)
    assert judged.ok and judged.energy == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize(("height", "reason"), [(3.0, "desorbed"), (-1.2, "sunken"), (1.0, None)])
def test_where_the_adsorbate_must_be(height: float, reason: str | None) -> None:
    judge = spring_judge(height)
    judged = judge.judge(ATOM)
    assert (judged.reason, judged.ok) == (reason, reason is None)
    assert np.isnan(judge.adsorption_energy(ATOM)) == (reason is not None)
    assert np.isfinite(judged.energy)


def test_broken_molecules_do_not_count() -> None:
    judge = spring_judge(1.0)  # pulls both atoms into one plane
    flat = MOLECULE.positions.copy()
    flat[-1] = flat[-2] + [1.15, 0.0, 0.1]
    assert judge.judge(changed(MOLECULE, flat)).ok
    flat[-1] = flat[-2] + [1.8, 0.0, 0.1]
    assert judge.judge(changed(MOLECULE, flat)).reason == "dissociated"
    across = flat.copy()  # bonded through the boundary of the cell
    across[-1] = flat[-2] + [1.15, 0.0, 0.1] - MOLECULE.lattice[0]
    assert judge.judge(changed(MOLECULE, across)).ok


def test_an_adsorbate_has_as_many_pieces_as_its_name_says() -> None:
    judge, adsorbed = spring_judge(1.0), np.flatnonzero(ATOM.tags == 2)
    symbol = SYMBOLS[ATOM.numbers[adsorbed[0]]]

    def two(apart: float, name: str) -> System:
        """A second atom beside the adsorbed one, so far (Å) from it."""
        other = ATOM.positions[adsorbed] + [apart, 0.0, 0.0]
        atoms = [np.append(x, x[adsorbed]) for x in (ATOM.numbers, ATOM.tags)]
        return make_system(ATOM.lattice, np.vstack([ATOM.positions, other]), *atoms, name, ATOM.miller)

    half = 0.5 * float(np.linalg.norm(ATOM.lattice[0]))
    assert judge.judge(two(half, f"({symbol})2")).reason is None
    assert judge.judge(two(half, f"{symbol}2")).reason == "dissociated"
    assert judge.judge(two(1.15, f"{symbol}2")).reason is None
    assert judge.judge(two(1.15, f"({symbol})2")).reason == "dissociated"  # they have become one molecule


def test_other_reasons() -> None:
    good = spring_judge(1.0)
    assert spring_judge(1.0, fail=True).judge(ATOM).reason == "failed"
    short = Judge(Spring(TOP + 9.0), max_steps=0)
    assert short.judge(ATOM).reason == "not_converged"
    far = spring_judge(1.0)
    far.references = {"N": 9.0}
    assert far.judge(ATOM).reason == "energy_out_of_range"
    close = ATOM.positions.copy()
    close[-1] = close[-2] + [0.0, 0.0, 0.3]
    assert good.judge(changed(ATOM, close)).reason == "overlap"
    thin = make_system(
        ATOM.lattice * [[0.05], [1], [1]], None, ATOM.numbers, ATOM.tags, "N", None, frac=ATOM.frac
    )
    assert good.judge(thin).reason == "overlap"
    bare = replace(ATOM, tags=np.zeros_like(ATOM.tags))
    assert good.judge(bare).reason == "no_adsorbate"
    sulphur = replace(ATOM, numbers=np.where(ATOM.tags == 2, 16, ATOM.numbers))
    assert good.judge(sulphur).reason == "no_reference"


def test_elements_that_sevennet_does_not_know(judge: Judge) -> None:
    polonium = replace(ATOM, numbers=np.where(ATOM.tags == 0, 84, ATOM.numbers))
    judged = judge.judge(polonium)
    assert judged.reason == "unknown_element" and np.isnan(judged.energy) and not judged.ok


def test_larger_adsorbates_take_their_atoms_references() -> None:
    judge = spring_judge(1.0)
    judge.references = {"C": -1.0, "H": -0.25, "O": -4.0, "N": 0.0}
    carbon = np.array([1.0, 1.0, TOP + 1.0])
    formyl = carbon + [[0, 0, 0], [1.1, 0, 0], [-0.6, 1.05, 0]]  # C, H, O in the plane of the springs
    slab = ATOM.tags != 2
    system = make_system(
        ATOM.lattice,
        np.concatenate([ATOM.positions[slab], formyl]),
        [*ATOM.numbers[slab], 6, 1, 8],
        [*ATOM.tags[slab], 2, 2, 2],
        "CHO",
        ATOM.miller,
    )
    judged = judge.judge(system)
    assert judged.ok and judged.energy == pytest.approx(5.25, abs=1e-3)


# --------------------------------------------------------------------------- many at once, and the parts


def test_slabs_are_computed_once() -> None:
    judge = spring_judge(1.0)
    slabmates = [s for s in SYSTEMS if s.sid.startswith("7net-101-0-")]
    assert len(slabmates) > 4
    for system in slabmates:
        judge.judge(replace(system, frac=system.frac.copy()))
    assert len(judge._slabs) == 1
    judge.judge(SYSTEMS[-1])
    assert len(judge._slabs) == 2


def test_workers_judge_as_one_and_in_order() -> None:
    systems = [nudged(s, 0.1, i) for i, s in enumerate(SYSTEMS[:6])]
    judge = Judge(Spring(TOP + 1.0))
    alone = judge.judge_many(systems, progress=False)
    spread = judge.judge_many(systems, workers=2, progress=False)

    def told(judged: list[JudgedEnergy]) -> list[tuple]:
        return [(j.energy, j.ok, j.reason, j.steps) for j in judged]

    assert told(alone) == told(spread)
    assert judge.judge_many([], workers=2, progress=False) == []


def test_references_of_another_calculator() -> None:
    references = atomic_references(by_calculator(EMT()))
    assert set(references) == {"H", "O", "N", "C"}
    h2 = Atoms("H2", positions=[[0, 0, 0], [0, 0, 0.8]])
    h2.calc = EMT()
    BFGS(h2, logfile=None).run(fmax=0.01)
    assert references["H"] == pytest.approx(h2.get_potential_energy() / 2, abs=0.01)


def test_the_designs_of_a_closed_loop_by_a_calculator_of_ones_own(
    small_model: tuple[Any, Any], train_systems: list[System], tmp_path: Path
) -> None:
    """Whatever ASE has: here EMT, which knows these metals. The loop's pool, its CIFs, and their energies as
    plain ASE has them, by steps of the same length as the judge's."""
    metals = {29, 46, 78, 79, 1}
    system = next(s for s in train_systems if s.adsorbate == "H" and {*s.numbers.tolist()} <= metals)
    text = write_cif(system)

    class Says:
        def generate(self, samples: Any, params: Any, seed: Any, group_size: int = 1, **_: Any) -> Any:
            none = torch.zeros(0)
            return [Rollout(i, none, none, None, True, text) for i in range(len(samples) * group_size)]

    loop = ClosedLoop(*small_model, GAGRPOConfig(initial=1, group_size=1, pool=1))
    states = loop.start([make_task(system.identity, -0.5)], Says(), [0])  # type: ignore[arg-type]
    loop.refine(states, Says(), 1, [0], keep=False)  # type: ignore[arg-type]
    records = save_designs(states, [{}], tmp_path)
    judge_designs(records, EMT(), progress=False)
    (found,) = records[0]["pool"]
    assert records[0]["judge"] == "EMT"

    read = read_cif(Path(found["file"]).read_text(), system.adsorbate, system.miller)
    on = read.tags == 2
    slab = Atoms(numbers=read.numbers[~on], positions=read.positions[~on], cell=read.lattice, pbc=True)
    both = Atoms(numbers=read.numbers, positions=read.positions, cell=read.lattice, pbc=True)
    slab.set_constraint(FixAtoms(mask=read.tags[~on] != 1))
    slab.calc = EMT()
    BFGS(slab, logfile=None).run(fmax=0.05, steps=100)
    both.positions[~on] = slab.positions
    both.set_constraint(FixAtoms(mask=~on))
    both.calc = EMT()
    BFGS(both, logfile=None).run(fmax=0.05, steps=60)
    h2 = Atoms("H2", positions=[[0, 0, 0], [0, 0, 0.8]])
    h2.calc = EMT()
    BFGS(h2, logfile=None).run(fmax=0.03)
    energies = [a.get_potential_energy() for a in (both, slab, h2)]
    # two searches that both end below 0.05 eV/Å differ by less than that times 0.2 Å
    assert found["judged"] == pytest.approx(energies[0] - energies[1] - energies[2] / 2, abs=0.01)


def test_without_sevenn_the_judge_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sevenn.calculator", None)
    sevennet.cache_clear()
    try:
        with pytest.raises(OracleMissing, match=r"pip install sevenn"):
            Judge("sevennet")
    finally:
        sevennet.cache_clear()
