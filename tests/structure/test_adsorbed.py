"""What counts as an adsorbate: all shipped systems, gas molecules of ASE's g2 set,
and each fault made on purpose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ase.build import fcc111, molecule

from catmllm.data.slabs import load_slabs
from catmllm.structure.adsorbed import FAULTS, adsorbate_fault
from catmllm.structure.system import ADSORBATE, System, make_system

SYSTEMS = load_slabs()


def test_no_shipped_system_is_faulty_neither_relaxed_nor_as_it_started() -> None:
    for system in SYSTEMS:
        assert adsorbate_fault(system) is None, system.sid
        assert adsorbate_fault(system.frame(0.0)) is None, system.sid


def on_platinum(name: str, height: float = 1.9) -> System:
    slab = fcc111("Pt", (4, 4, 3), vacuum=12.0, periodic=True)
    gas = molecule(name)
    gas.positions += slab.positions[-1] + [0, 0, height] - gas.positions[gas.positions[:, 2].argmin()]
    slab.extend(gas)
    tags = [0] * 32 + [1] * 16 + [2] * len(gas)
    return make_system(slab.cell[:], slab.positions, slab.numbers, tags, name, (1, 1, 1))


# of the molecules that OC20 puts on its slabs
@pytest.mark.parametrize(
    "name",
    ["CO", "N2", "H2O", "NH3", "CH4", "C2H2", "C2H4", "C2H6", "CH3OH", "H2CO", "HCN", "N2H4", "HCOOH",
     "CH3CHO", "NO2"],
)  # fmt: skip
def test_gas_molecules_are_whole(name: str) -> None:
    assert adsorbate_fault(on_platinum(name)) is None


def diatomic() -> System:
    return next(s for s in SYSTEMS if s.adsorbate == "CO")


def moved(system: System, change: Callable[[np.ndarray, np.ndarray], None]) -> System:
    positions = system.positions.copy()
    change(positions, np.flatnonzero(system.tags == ADSORBATE))
    return replace(system, frac=np.linalg.solve(system.lattice.T, positions.T).T)


def stretch(factor: float) -> Callable[[np.ndarray, np.ndarray], None]:
    def change(positions: np.ndarray, at: np.ndarray) -> None:
        positions[at[1]] = positions[at[0]] + factor * (positions[at[1]] - positions[at[0]])

    return change


def lift(height: float) -> Callable[[np.ndarray, np.ndarray], None]:
    def change(positions: np.ndarray, at: np.ndarray) -> None:
        positions[at, 2] += height

    return change


def sink(positions: np.ndarray, at: np.ndarray) -> None:
    """Under the slab, as far below it as it stood above."""
    slab = np.delete(positions[:, 2], at)
    positions[at, 2] = slab.min() - (positions[at, 2] - slab.max())


def onto_a_metal(positions: np.ndarray, at: np.ndarray) -> None:
    nearest = np.delete(np.arange(len(positions)), at)[-1]
    positions[at] += positions[nearest] + [0, 0, 0.9] - positions[at[0]]


@pytest.mark.parametrize(
    ("fault", "change"),
    [
        ("squeezed", stretch(0.7)),
        ("broken", stretch(1.9)),
        ("detached", lift(2.5)),
        ("buried", sink),
        ("overlap", onto_a_metal),
    ],
)
def test_each_fault_is_found(fault: str, change: Callable[[np.ndarray, np.ndarray], None]) -> None:
    assert adsorbate_fault(moved(diatomic(), change)) == fault


def test_atoms_in_one_place_and_tiny_cells_overlap() -> None:
    system = diatomic()
    frac = system.frac.copy()
    frac[1] = frac[0]
    assert adsorbate_fault(replace(system, frac=frac)) == "overlap"
    for size in (0.3, 0.05, 0.001):  # of the last there are more images than may be looked at
        assert adsorbate_fault(replace(system, lattice=size * system.lattice)) == "overlap"


def test_no_adsorbate() -> None:
    system = SYSTEMS[0]
    for tags in (np.zeros_like(system.tags), np.full_like(system.tags, ADSORBATE)):
        assert adsorbate_fault(replace(system, tags=tags)) == "no_adsorbate"


def test_the_bond_may_cross_the_boundary() -> None:
    """Shifts of the whole crystal along a and b change nothing."""
    for system in SYSTEMS[::301]:
        for shift in (0.25, 0.5, 0.9):
            frac = system.frac + [shift, -shift, 0]
            assert adsorbate_fault(replace(system, frac=frac - np.floor(frac))) is None


def test_names_are_all_used() -> None:
    assert set(FAULTS) == {"no_adsorbate", "squeezed", "broken", "overlap", "buried", "detached"}


def test_oc20_frames(shared: Path) -> None:
    """Of 30 real starts of a relaxation all are sound but for one that starts out of reach and two whose slab
    holds elements of adsorbates, which the file's inferred tags take for some."""
    from ase.io import read

    frames = read(shared / "data" / "oc20" / "oc20_30_init_relaxed.extxyz.gz", ":")
    starts = [a for a in frames if a.info["frame"] == "init"]
    found = [
        adsorbate_fault(make_system(a.cell[:], a.positions, a.numbers, a.get_tags(), "", None))
        for a in starts
    ]
    assert len(found) == 30
    assert sum(f is not None for f in found) <= 3, found
