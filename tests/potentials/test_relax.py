"""Relaxations side by side, against ASE's one by one."""

from __future__ import annotations

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms
from ase.optimize import BFGS

from catmllm.data.slabs import load_slabs
from catmllm.potentials.hessian import first_hessian
from catmllm.potentials.relax import Relaxed, Start, Structure, by_calculator, relax, relaxed
from catmllm.structure.system import System
from tests.data.toy_calculator import EggBox

SYSTEMS = load_slabs()
# EMT knows these; what it says is of no matter here.
KNOWN = {1, 6, 7, 8, 13, 28, 29, 46, 47, 78, 79}
PICKS = [s for s in SYSTEMS[::7] if set(s.numbers.tolist()) <= KNOWN][:12]


def disturbed(system: System, seed: int) -> Structure:
    free = system.tags == 2
    noise = np.random.default_rng(seed).normal(0, 0.15, (len(system), 3)) * free[:, None]
    return Structure(system.numbers, system.lattice, system.positions + noise, free)


def by_ase(start: Start, calculator: object, fmax: float, steps: int, longest: float) -> Relaxed:
    s = start.structure
    atoms = Atoms(numbers=s.numbers, positions=s.positions, cell=s.lattice, pbc=True)
    atoms.set_constraint(FixAtoms(mask=~s.free))
    atoms.calc = calculator
    optimizer = BFGS(atoms, logfile=None, maxstep=longest)
    if start.hessian is not None:
        whole = 20.0 * np.eye(3 * len(atoms))
        free = np.flatnonzero(np.repeat(s.free, 3))
        whole[np.ix_(free, free)] = start.hessian
        optimizer.H0 = whole
    converged = bool(optimizer.run(fmax=fmax, steps=steps))
    return Relaxed(
        atoms.positions, float(atoms.get_potential_energy()), 0.0, converged, int(optimizer.nsteps)
    )


@pytest.mark.parametrize("batch", [1, 5, 40])
def test_many_go_as_one_goes_by_ase(batch: int) -> None:
    starts = []
    for k, system in enumerate(PICKS):
        structure, free = disturbed(system, k), system.tags == 2
        own = first_hessian(system.numbers[free], system.lattice, structure.positions[free])
        starts.append(Start(structure, own if k % 2 else None))
    ends = relaxed(starts, by_calculator(EMT()), fmax=0.03, max_steps=25, longest=0.15, batch=batch)
    expected = [by_ase(start, EMT(), 0.03, 25, 0.15) for start in starts]
    assert len({e.steps for e in expected}) > 3 and 0 < sum(e.converged for e in expected) < len(expected)
    for ours, theirs, s in zip(ends, expected, (start.structure for start in starts)):
        assert (ours.steps, ours.converged, ours.failed) == (theirs.steps, theirs.converged, False)
        np.testing.assert_allclose(ours.positions, theirs.positions, atol=1e-6)
        assert ours.energy == pytest.approx(theirs.energy, abs=1e-6)
        assert (ours.positions[~s.free] == s.positions[~s.free]).all()


def test_frames_are_the_way() -> None:
    start = Start(disturbed(PICKS[0], 3))
    ((_, end),) = relax([start], by_calculator(EggBox()), fmax=1e-3, frames=True)
    assert len(end.frames) == end.steps + 1
    np.testing.assert_array_equal(end.frames[0][0], start.structure.positions)
    np.testing.assert_array_equal(end.frames[-1][0], end.positions)
    energies, _ = by_calculator(EggBox())(
        [Structure(start.structure.numbers, start.structure.lattice, p) for p, _ in end.frames]
    )
    assert [e for _, e in end.frames] == pytest.approx(energies.tolist(), abs=1e-12)


def test_one_that_blows_up_costs_the_others_nothing() -> None:
    starts = [Start(disturbed(s, k)) for k, s in enumerate(PICKS[:6])]
    bad = starts[3].structure
    plain = by_calculator(EggBox())

    def potential(structures):
        if any(s.numbers is bad.numbers and s.positions is not bad.positions for s in structures):
            raise np.linalg.LinAlgError("blown up")
        energies, forces = plain(structures)
        if any(s.numbers is starts[5].structure.numbers for s in structures):
            energies[-1] = np.nan
        return energies, forces

    alone = relaxed([starts[i] for i in (0, 1, 2, 4)], plain, fmax=1e-4)
    ends = relaxed(starts, potential, fmax=1e-4, batch=6)
    assert [e.failed for e in ends] == [False, False, False, True, False, True]
    assert np.isnan(ends[3].energy) and (ends[3].positions == bad.positions).all() and ends[3].steps == 1
    for one, other in zip(alone, [ends[i] for i in (0, 1, 2, 4)]):
        np.testing.assert_array_equal(one.positions, other.positions)


def test_a_walk_that_swings_around_a_kink_ends_at_its_lowest() -> None:
    """|x| + x²/2 has its minimum where the force is never small."""

    def kink(structures):
        x = np.array([s.positions[0, 0] for s in structures])
        forces = [np.zeros((1, 3)) for _ in structures]
        for force, at in zip(forces, x):
            force[0, 0] = -np.sign(at) - at
        return np.abs(x) + x**2 / 2, forces

    start = Start(Structure(np.array([1]), 9 * np.eye(3), np.array([[0.1003, 0.0, 0.0]])))
    ((_, walk),) = relax([start], kink, frames=True)
    swing = max(e for _, e in walk.frames[-20:]) - min(e for _, e in walk.frames[-20:])
    assert not walk.converged and swing > 0
    ((_, end),) = relax([start], kink, swing=1.01 * swing, frames=True)
    lowest = min(walk.frames[-20:], key=lambda frame: frame[1])
    assert end.converged and end.steps == 80 and end.energy == lowest[1] and end.force >= 1
    np.testing.assert_array_equal(end.positions, lowest[0])
    ((_, wide),) = relax([start], kink, swing=0.99 * swing)
    assert not wide.converged
    ((_, short),) = relax([start], kink, swing=9.0, max_steps=5)
    assert not short.converged  # too few energies to tell


def test_starts_are_read_as_there_is_room() -> None:
    read = []

    def starts():
        for k, system in enumerate(PICKS):
            read.append(k)
            yield Start(disturbed(system, k))

    first, *_ = next(relax(starts(), by_calculator(EggBox()), batch=3)), None
    assert first[0] < 6 and len(read) < len(PICKS)


def test_the_model_hessian_is_that_of_a_bond() -> None:
    molecule = next(s for s in SYSTEMS if s.adsorbate == "CO")
    own = molecule.tags == 2
    positions = molecule.positions[own]
    hessian = first_hessian(molecule.numbers[own], molecule.lattice, positions)
    np.testing.assert_allclose(hessian, hessian.T)
    along = positions[1] - positions[0]
    along /= np.linalg.norm(along)
    stretch = np.concatenate([-along, along])
    shift = np.tile([0.3, -0.2, 0.5], 2)
    soft = 20.0
    assert stretch @ hessian @ stretch == pytest.approx(2 * soft + 4 * 70.0)
    assert shift @ hessian @ shift == pytest.approx(soft * (shift**2).sum())  # a rigid shift is soft
    assert np.linalg.eigvalsh(hessian).min() > 0
    across = positions - [[0, 0, 0], molecule.lattice[0]]  # the bond goes through the boundary
    np.testing.assert_allclose(
        first_hessian(molecule.numbers[own], molecule.lattice, across), hessian, atol=1e-9
    )
    apart = positions + [[0, 0, 0], [0, 0, 3.0]]
    far = first_hessian(molecule.numbers[own], molecule.lattice, apart)
    np.testing.assert_array_equal(far, soft * np.eye(6))
