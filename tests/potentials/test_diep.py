"""DIEP as its own package computes it, its derivatives, and relaxations by it."""

from __future__ import annotations

import importlib.util
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from catmllm.data.slabs import load_slabs
from catmllm.potentials.diep import Diep, diep
from catmllm.potentials.relax import PotentialMissing, Start, Structure, by_calculator, relaxed

ROOT = Path(__file__).parents[2]
SYSTEMS = load_slabs()


def disturbed(place: int, size: float = 0.05) -> Structure:
    system = SYSTEMS[place]
    noise = np.random.default_rng(place).normal(0, size, (len(system), 3))
    return Structure(system.numbers, system.lattice, system.positions + noise, system.tags == 2)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_it_is_what_its_authors_compute() -> None:
    """float32 both: 1e-6 of some 100 eV a sum. Disturbed, since on ideal slabs edges of equal length are told
    apart by rounding, theirs in float32."""
    from diep.pretrained import make_calculator

    structures = [disturbed(place) for place in (0, 700, 1500, 2900)]
    energies, forces = diep()(structures)
    for structure, energy, force in zip(structures, energies, forces):
        whole = Structure(structure.numbers, structure.lattice, structure.positions)
        theirs, their_forces = by_calculator(make_calculator(stress=False))([whole])
        assert energy == pytest.approx(theirs[0], abs=2e-4)
        ours = diep()([whole])[1][0]
        np.testing.assert_allclose(ours, their_forces[0], atol=1e-3)
        # on a rigid slab only the forces of free atoms are right, and those are the same
        np.testing.assert_allclose(force[structure.free], ours[structure.free], atol=1e-5)


def test_in_company_as_alone() -> None:
    structures = [disturbed(place) for place in (3, 1000, 2000)]
    energies, forces = diep()(structures)
    for structure, energy, force in zip(structures, energies, forces):
        alone, own = diep()([structure])
        assert energy == pytest.approx(alone[0], abs=1e-4)
        np.testing.assert_allclose(force[structure.free], own[0][structure.free], atol=1e-4)


def test_what_it_cannot_do_is_said() -> None:
    structure = disturbed(0)
    with pytest.raises(ValueError, match="does not know the element of number 84"):
        diep()([Structure(np.where(structure.numbers > 20, 84, structure.numbers), *rest(structure))])
    with pytest.raises(ValueError, match=r"too small|too close"):
        diep()([Structure(structure.numbers, structure.lattice * 0.1, structure.positions * 0.1)])


def rest(structure: Structure) -> tuple:
    return structure.lattice, structure.positions


def test_without_its_package_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (pinned,) = project["dependency-groups"]["weights"]
    with pytest.raises(PotentialMissing, match=f"pip install --no-deps {pinned}$"):
        Diep()
    assert f"`pip install --no-deps {pinned}`" in (ROOT / "docs" / "data.md").read_text()


@pytest.mark.slow
def test_forces_are_the_slope_of_the_energy() -> None:
    exact = Diep(torch.float64)
    system = disturbed(0)
    whole = Structure(system.numbers, system.lattice, system.positions)
    forces, h = exact([whole])[1][0], 1e-4
    for atom, axis in [(0, 0), (5, 1), (9, 2), (12, 0), (12, 1), (12, 2)]:
        ends = []
        for step in (h, -h):
            positions = whole.positions.copy()
            positions[atom, axis] += step
            ends.append(Structure(whole.numbers, whole.lattice, positions))
        up, down = exact(ends)[0]
        assert forces[atom, axis] == pytest.approx((down - up) / (2 * h), abs=1e-6)


@pytest.mark.slow
def test_relaxations_side_by_side_are_those_of_ase_one_by_one() -> None:
    """In float64: in float32 a sum of atoms has 1e-5 eV of noise, and steps follow it."""
    from ase import Atoms
    from ase.calculators.calculator import Calculator, all_changes
    from ase.constraints import FixAtoms
    from ase.optimize import BFGS

    exact = Diep(torch.float64)

    class AsCalculator(Calculator):
        implemented_properties = ["energy", "forces"]  # noqa: RUF012

        def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
            super().calculate(atoms, properties, system_changes)
            energies, forces = exact([Structure(atoms.numbers, np.array(atoms.cell[:]), atoms.positions)])
            self.results = {"energy": float(energies[0]), "forces": forces[0]}

    starts = [Start(disturbed(place, 0.02)) for place in (10, 800, 1600, 2400)]
    for end, start in zip(relaxed(starts, exact), starts):
        s = start.structure
        atoms = Atoms(numbers=s.numbers, positions=s.positions, cell=s.lattice, pbc=True)
        atoms.set_constraint(FixAtoms(mask=~s.free))
        atoms.calc = AsCalculator()
        optimizer = BFGS(atoms, logfile=None)
        assert end.converged == bool(optimizer.run(fmax=0.05, steps=80))
        assert end.steps == optimizer.nsteps
        assert end.energy == pytest.approx(atoms.get_potential_energy(), abs=1e-6)
        np.testing.assert_allclose(end.positions, atoms.positions, atol=1e-5)
