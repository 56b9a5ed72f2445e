"""The independent judge of designs: SevenNet-0 relaxes the adsorbate
on the rigid slab and says the adsorption energy.

The model that searches also predicts energies, and a search finds the errors of what guides it. SevenNet-0 is
another potential, with other weights, and it made the labels of the shipped systems: same protocol, same zero
of energy. It is not DFT. Only the adsorbate moves, so the judged slab is the one that was designed, unrelaxed
as it may be.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from catmllm.data.fcc_slabs import ADSORBATES, BLOWN_UP, BROKEN_BOND, HEIGHT_RANGE, MAX_ENERGY
from catmllm.data.oracle import atomic_references, sevennet, sevennet_references
from catmllm.structure.elements import COVALENT_RADIUS, SYMBOLS
from catmllm.structure.system import ADSORBATE, System, make_system
from catmllm.structure.tags import heights
from rewards_fast import min_distance

if TYPE_CHECKING:
    from ase import Atoms
    from ase.calculators.calculator import Calculator

# Longest bond (Å) that holds: for the pairs of the shipped adsorbates as in the data, else by covalent radii.
_LONGEST_BOND = {frozenset(a.symbols): BROKEN_BOND * a.bond for a in ADSORBATES.values() if a.bond}
_STRETCH = 1.25
_TOO_CLOSE = 0.5  # Å; SevenNet has seen nothing like it
# First guess of the Hessian, eV/Å^2: stretching of a bond of the adsorbate, and everything else. ASE's 70 for
# everything is too stiff for an atom on a metal. Mean steps of 20 systems from the data's starts: 16.1 so,
# 10.9 with the numbers below, in the same minimum to 2 meV. (8 instead of 20 needs 8.1, but slides off
# labelled saddle points.)
_BOND_STIFFNESS = {frozenset("CO"): 70.0, frozenset("OH"): 45.0, frozenset("NH"): 38.0, frozenset("CH"): 32.0}
_OTHER_BOND_STIFFNESS = 40.0
_STIFFNESS = 20.0


@dataclass(frozen=True)
class JudgedEnergy:
    """What the judge says of one system.

    energy: adsorption energy (eV); where `ok` is false it is what was last computed, perhaps nan. reason:
    None, or why it does not count: `overlap` (atoms within 0.5 Å at the start), `no_adsorbate`,
    `no_reference` (an adsorbate atom other than C, H, O, N), `unknown_element`, `failed` (the relaxation blew
    up), `not_converged`, `dissociated`, `desorbed`, `sunken` (into the slab), `energy_out_of_range` (beyond 8
    eV). steps: of the relaxation. seconds: spent here. moved: the largest displacement of an adsorbate atom
    (Å).
    """

    energy: float
    ok: bool
    reason: str | None
    steps: int = 0
    seconds: float = 0.0
    moved: float = 0.0


class SevenNetJudge:
    """Adsorption energies by relaxing the adsorbate alone (BFGS to `fmax` eV/Å, at most `max_steps`).

    E = E(slab + relaxed adsorbate) - E(slab as given) - sum of the atomic references (`oracle.py`). It runs
    on one torch thread and leaves the caller's number as it was, so every rank of a run can judge its share.
    `calculator` (any of ASE's, for tests) replaces SevenNet-0; its references are then computed with it.
    Raises `OracleMissing` where sevenn is not installed.
    """

    def __init__(
        self,
        fmax: float = 0.05,
        max_steps: int = 60,
        device: str = "cpu",
        calculator: Calculator | None = None,
    ) -> None:
        self.fmax, self.max_steps, self.device = fmax, max_steps, device
        self._injected = calculator is not None
        with _one_thread():
            self._calculator = calculator or sevennet(device)
            self.references = (
                sevennet_references(device) if calculator is None else atomic_references(calculator)
            )
        self._slab_energy: dict[bytes, float] = {}

    def adsorption_energy(self, system: System) -> float:
        """The judged adsorption energy (eV), nan where it does not count; `judge` says why."""
        judged = self.judge(system)
        return judged.energy if judged.ok else float("nan")

    def judge(self, system: System) -> JudgedEnergy:
        """Relax the adsorbate of a system and judge the result. Never raises for a structure."""
        return self.relax(system)[0]

    def relax(self, system: System) -> tuple[JudgedEnergy, System]:
        """The same with the relaxed system (the given one where nothing could be relaxed)."""
        start = time.perf_counter()
        reason = self._unfit(system)
        if reason:
            return JudgedEnergy(float("nan"), False, reason, 0, time.perf_counter() - start), system
        steps, converged, energy, relaxed = 0, False, float("nan"), system
        atoms = system.as_ase()
        try:
            with _one_thread():
                energy = -self._energy_of_slab(atoms) - self._reference(system)
                steps, converged = self._relax_adsorbate(atoms, system)
                energy += float(atoms.get_potential_energy())
            relaxed = make_system(
                system.lattice,
                atoms.positions,
                system.numbers,
                system.tags,
                system.adsorbate,
                system.miller,
                energy if np.isfinite(energy) else None,
                system.sid,
            )
        except BLOWN_UP:
            reason = "failed"
        else:
            reason = self._why_not(relaxed, converged, energy)
        moved = float(np.linalg.norm(relaxed.positions - system.positions, axis=1).max())
        return JudgedEnergy(
            energy, reason is None, reason, steps, time.perf_counter() - start, moved
        ), relaxed

    def judge_many(
        self, systems: Sequence[System], workers: int = 1, progress: bool = True
    ) -> list[JudgedEnergy]:
        """Judge systems in order, with a progress bar; `workers` processes of one thread each (1: this one).

        About 0.8 s a 14-atom system on one core. One forward pass over several structures was no faster on a
        CPU (0.078 s a structure alone, 0.077 in fours, 0.12 in sixteens: the arrays leave the cache), so
        there is none.
        """
        from tqdm import tqdm

        def bar(results: Any) -> Any:
            return tqdm(
                results, total=len(systems), desc="SevenNet-0 judge", unit="system", disable=not progress
            )

        workers = min(workers, len(systems))
        if workers <= 1:
            return list(bar(map(self.judge, systems)))
        settings = (self.fmax, self.max_steps, self.device, self._calculator if self._injected else None)
        with ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, settings) as pool:
            return list(bar(pool.map(_judge_in_worker, systems, chunksize=2)))

    def _unfit(self, system: System) -> str | None:
        """Why a structure cannot be given to the calculator, or None."""
        from ase.geometry import minkowski_reduce

        adsorbed = system.tags == ADSORBATE
        if not adsorbed.any() or adsorbed.all():
            return "no_adsorbate"
        if any(SYMBOLS[z] not in self.references for z in system.numbers[adsorbed]):
            return "no_reference"
        known = getattr(self._calculator, "type_map", None)
        if known is not None and any(int(z) not in known for z in system.numbers):
            return "unknown_element"
        period = np.linalg.norm(minkowski_reduce(system.lattice)[0], axis=1).min()
        if not min(period, min_distance(system.lattice, system.frac)) >= _TOO_CLOSE:
            return "overlap"
        return None

    def _reference(self, system: System) -> float:
        return sum(self.references[SYMBOLS[z]] for z in system.numbers[system.tags == ADSORBATE])

    def _energy_of_slab(self, atoms: Atoms) -> float:
        """Energy (eV) of the slab alone, kept by what it is: the designs of one task often share it."""
        slab = atoms[atoms.get_tags() != ADSORBATE]
        content = (slab.cell[:], slab.positions, slab.numbers)
        key = hashlib.sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in content)).digest()
        if key not in self._slab_energy:
            slab.calc = self._calculator
            self._slab_energy[key] = float(slab.get_potential_energy())
        return self._slab_energy[key]

    def _relax_adsorbate(self, atoms: Atoms, system: System) -> tuple[int, bool]:
        from ase.constraints import FixAtoms
        from ase.optimize import BFGS

        atoms.set_constraint(FixAtoms(mask=system.tags != ADSORBATE))
        atoms.calc = self._calculator
        optimizer = BFGS(atoms, logfile=None, maxstep=0.2)
        optimizer.H0 = first_hessian(system)
        converged = bool(optimizer.run(fmax=self.fmax, steps=self.max_steps))
        return int(optimizer.nsteps), converged

    def _why_not(self, relaxed: System, converged: bool, energy: float) -> str | None:
        """Why a relaxed system does not count, or None: the rules by which the data call a system `ok`."""
        if not converged:
            return "not_converged"
        if not _in_one_piece(relaxed):
            return "dissociated"
        height = heights(relaxed.lattice, relaxed.frac)
        adsorbed = relaxed.tags == ADSORBATE
        above = float(height[adsorbed].min() - height[~adsorbed].max())
        if above >= HEIGHT_RANGE[1]:
            return "desorbed"
        if above <= HEIGHT_RANGE[0]:
            return "sunken"
        return None if abs(energy) < MAX_ENERGY else "energy_out_of_range"


_worker: dict[str, SevenNetJudge] = {}


def _start_worker(fmax: float, max_steps: int, device: str, calculator: Calculator | None) -> None:
    _worker["judge"] = SevenNetJudge(fmax, max_steps, device, calculator)


def _judge_in_worker(system: System) -> JudgedEnergy:
    return _worker["judge"].judge(system)


@contextmanager
def _one_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def first_hessian(system: System) -> NDArray[np.float64]:
    """A model Hessian [3N, 3N] (eV/Å^2) to start BFGS from: stiff along the adsorbate's bonds,
    soft elsewhere."""
    hessian = _STIFFNESS * np.eye(3 * len(system))
    for i, j, vector in _bonds(system):
        length = float(np.linalg.norm(vector))
        pair = frozenset((SYMBOLS[system.numbers[i]], SYMBOLS[system.numbers[j]]))
        block = _BOND_STIFFNESS.get(pair, _OTHER_BOND_STIFFNESS) * np.outer(vector, vector) / length**2
        a, b = slice(3 * i, 3 * i + 3), slice(3 * j, 3 * j + 3)
        hessian[a, a] += block
        hessian[b, b] += block
        hessian[a, b] -= block
        hessian[b, a] -= block
    return hessian


def _bonds(system: System) -> list[tuple[int, int, NDArray[np.float64]]]:
    """Bonds within the adsorbate: its atoms i < j and the shortest vector between them."""
    from ase.geometry import find_mic

    atoms = np.flatnonzero(system.tags == ADSORBATE)
    bonds = []
    for i, j in ((int(i), int(j)) for k, i in enumerate(atoms) for j in atoms[k + 1 :]):
        (vector,), (length,) = find_mic([system.positions[j] - system.positions[i]], system.lattice, pbc=True)
        z_i, z_j = int(system.numbers[i]), int(system.numbers[j])
        longest = _LONGEST_BOND.get(
            frozenset((SYMBOLS[z_i], SYMBOLS[z_j])),
            _STRETCH * float(COVALENT_RADIUS[z_i] + COVALENT_RADIUS[z_j]),
        )
        if length <= longest:
            bonds.append((i, j, vector))
    return bonds


def _in_one_piece(system: System) -> bool:
    """Whether the bonds join all atoms of the adsorbate."""
    atoms = np.flatnonzero(system.tags == ADSORBATE).tolist()
    bonds = _bonds(system)
    reached, frontier = {atoms[0]}, [atoms[0]]
    while frontier:
        atom = frontier.pop()
        for i, j, _ in bonds:
            if atom in (i, j) and (other := i + j - atom) not in reached:
                reached.add(other)
                frontier.append(other)
    return len(reached) == len(atoms)
