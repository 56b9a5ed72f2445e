"""Relaxations of many adsorbates by DIEP, side by side in one process, compared with ASE's BFGS one by one.

    python bench/judge.py            # three turns, a minute and a half of one core

The adsorbates of shipped systems relax from where their labels' relaxations began, each on its rigid slab, to
the same force. ASE asks DIEP's own calculator, as its package comes; and, so that the gain of the potential
and that of company are told apart, DIEP as it is computed here. Seconds are processor time of one thread.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes
from ase.constraints import FixAtoms
from ase.optimize import BFGS

from bench import record  # first: it decides whose packages are measured
from catmllm.data.slabs import load_slabs
from catmllm.evaluate.baselines import evenly_spaced
from catmllm.potentials.diep import diep
from catmllm.potentials.hessian import adsorbate_start
from catmllm.potentials.relax import Potential, Structure, relaxed
from catmllm.structure.system import ADSORBATE, System

SYSTEMS, TURNS, FMAX, MOST = 16, 3, 0.05, 80


def main() -> None:
    args = record.arguments(__doc__).parse_args()
    torch.set_num_threads(1)
    systems = [s for s in load_slabs() if s.start is not None]
    systems = [s.frame(0.0) for s in evenly_spaced(systems, 4 if args.quick else SYSTEMS)]
    from diep.pretrained import make_calculator

    ways: dict[str, Callable[[Sequence[Structure]], list[float]]] = {
        "side by side": side_by_side,
        "ASE, DIEP's own calculator": lambda s: one_by_one(s, make_calculator(stress=False)),
        "ASE, DIEP as here": lambda s: one_by_one(s, AsCalculator(diep())),
    }
    structures = [structure(s) for s in systems]
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    energies: dict[str, list[float]] = {}
    for relax in ways.values():
        relax(structures[:1])  # what is loaded and compiled once
    for _ in range(1 if args.quick else TURNS):
        for name, relax in ways.items():
            began = time.process_time()
            energies[name] = relax(structures)
            seconds[name].append((time.process_time() - began) / len(structures))
    ours, theirs = (np.array(energies[n]) for n in ("side by side", "ASE, DIEP's own calculator"))
    about: dict[str, Any] = {
        "systems": len(systems),
        "atoms": f"{min(map(len, systems))} to {max(map(len, systems))}",
        "turns": len(seconds["side by side"]),
        "threads": 1,
        "force, eV/Å": FMAX,
        "difference of energies, median, eV": float(np.median(np.abs(ours - theirs))),
    }
    says = "relaxing an adsorbate on its slab by DIEP, 16 at once, compared with ASE one by one"
    record.finish(args, [record.claim("judge", says, "s of a processor", {"an adsorbate": seconds}, about)])


def structure(s: System) -> Structure:
    return Structure(s.numbers, s.lattice, s.positions, s.tags == ADSORBATE)


def side_by_side(structures: Sequence[Structure]) -> list[float]:
    starts = [adsorbate_start(s) for s in structures]
    return [end.energy for end in relaxed(starts, diep(), fmax=FMAX, max_steps=MOST)]


def one_by_one(structures: Sequence[Structure], calculator: Calculator) -> list[float]:
    found = []
    for s in structures:
        assert s.free is not None
        atoms = Atoms(numbers=s.numbers, positions=s.positions, cell=s.lattice, pbc=True)
        atoms.set_constraint(FixAtoms(mask=~s.free))
        atoms.calc = calculator
        BFGS(atoms, logfile=None).run(fmax=FMAX, steps=MOST)
        found.append(float(atoms.get_potential_energy()))
    return found


class AsCalculator(Calculator):
    """A potential of ours for ASE: it is told all atoms, of which ASE's constraint holds some."""

    implemented_properties = ["energy", "forces"]  # noqa: RUF012

    def __init__(self, potential: Potential) -> None:
        super().__init__()
        self.potential = potential

    def calculate(
        self, atoms: Any = None, properties: Any = ("energy",), system_changes: Any = all_changes
    ) -> None:
        super().calculate(atoms, properties, system_changes)
        whole = Structure(atoms.numbers, np.array(atoms.cell[:]), atoms.positions)
        energies, forces = self.potential([whole])
        self.results = {"energy": float(energies[0]), "forces": forces[0]}


if __name__ == "__main__":
    main()
