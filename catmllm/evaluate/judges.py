"""The judge of designs: a potential relaxes the slab's surface, then the adsorbate on it, and says the
adsorption energy.

The model that searches also predicts energies, and a search finds the errors of what guides it. DIEP has no
part in the search, and it made the labels of the shipped systems: same protocol, same zero of energy.
SevenNet-0 is independent of the labels too, with a zero of its own. Neither is DFT. The wanted energies are
of relaxed surfaces: on the ideal slabs of 48 tasks, held rigid, the same potential says 0.26 eV else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

import numpy as np

from catmllm.data.fcc_slabs import ADSORBATES, BROKEN_BOND, HEIGHT_RANGE, MAX_ENERGY
from catmllm.data.oracle import (
    POTENTIALS,
    SWING,
    atomic_references,
    elements_of,
    potential_of,
    references_of,
)
from catmllm.potentials.hessian import on_relaxed_slab
from catmllm.potentials.relax import Potential, Relaxed, Start, Structure, by_calculator, relax, relaxed
from catmllm.structure.elements import COVALENT_RADIUS, SYMBOLS
from catmllm.structure.formula import pieces
from catmllm.structure.system import ADSORBATE, SURFACE, System, make_system
from catmllm.structure.tags import heights
from rewards_fast import min_distance

if TYPE_CHECKING:
    from ase.calculators.calculator import Calculator

# Longest bond (Å) that holds: for the pairs of the shipped adsorbates as in the data, else by covalent radii.
_LONGEST_BOND = {frozenset(a.symbols): BROKEN_BOND * a.bond for a in ADSORBATES.values() if a.bond}
_STRETCH = 1.25
_SLAB_STEPS = 100
_TOO_CLOSE = 0.5  # Å; no potential has seen anything like it


@dataclass(frozen=True)
class JudgedEnergy:
    """What the judge says of one system.

    energy: adsorption energy (eV); where `ok` is false it is what was last computed, perhaps nan. reason:
    None, or why it does not count: `overlap` (atoms within 0.5 Å at the start), `no_adsorbate`,
    `no_reference` (an adsorbate atom other than C, H, O, N), `unknown_element`, `slab` (its relaxation did
    not converge), `failed` (that of the adsorbate blew up), `not_converged`, `dissociated` (in more
    or fewer pieces than its name says, `(O)4`: four), `desorbed`, `sunken` (into the slab),
    `energy_out_of_range` (beyond 8 eV). steps: of the adsorbate. moved: the largest displacement of an
    adsorbate atom (Å).
    """

    energy: float
    ok: bool
    reason: str | None
    steps: int = 0
    moved: float = 0.0


class Judge:
    """Adsorption energies as the labels have them: the surface atoms of the slab alone relax, then the
    adsorbate on the slab held so (BFGS to `fmax` eV/Å; the adsorbate in at most `max_steps`).

    E = E(slab + adsorbate) - E(slab) - sum of the atomic references (`oracle.py`), both relaxed. It runs
    on one torch thread and leaves the caller's number as it was, so every rank of a run can judge its share.
    potential: one of `oracle.POTENTIALS`, or any of ASE's calculators, whose references are then computed
    with it. Raises `PotentialMissing` where the potential is not installed.
    """

    def __init__(self, potential: str | Calculator = "diep", fmax: float = 0.05, max_steps: int = 60) -> None:
        self.potential, self.fmax, self.max_steps = potential, fmax, max_steps
        self._known: frozenset[int] | None = None
        if isinstance(potential, str):
            self.name, self._swing = POTENTIALS[potential], SWING[potential]
            self._known = elements_of(potential)
            self._potential = _on_one_thread(potential_of(potential))
            with _one_thread():
                self.references = references_of(potential)
        else:
            self.name, self._swing = type(potential).__name__, 0.0
            self._potential = _on_one_thread(by_calculator(potential))
            self.references = atomic_references(self._potential)
        self._slabs: dict[bytes, Relaxed] = {}  # by what they were

    def adsorption_energy(self, system: System) -> float:
        """The judged adsorption energy (eV), nan where it does not count; `judge` says why."""
        judged = self.judge(system)
        return judged.energy if judged.ok else float("nan")

    def judge(self, system: System) -> JudgedEnergy:
        """Relax the adsorbate of a system and judge the result. Never raises for a structure."""
        return self.relax(system)[0]

    def relax(self, system: System) -> tuple[JudgedEnergy, System]:
        """The same with the relaxed system (the given one where nothing could be relaxed)."""
        ((_, judged, relaxed),) = self._relaxed([system])
        return judged, relaxed

    def _relaxed(self, systems: Sequence[System]) -> Iterator[tuple[int, JudgedEnergy, System]]:
        """(Place, verdict, relaxed system) of each, in any order; what can be is relaxed side by side."""
        fit: list[int] = []
        for i, system in enumerate(systems):
            reason = self._unfit(system)
            if reason:
                yield i, JudgedEnergy(float("nan"), False, reason), system
            else:
                fit.append(i)
        slabs = self._relaxed_slabs([systems[i] for i in fit])
        for i, slab in zip(fit, slabs):
            if not slab.converged:
                yield i, JudgedEnergy(float("nan"), False, "slab"), systems[i]
        ready = [(i, slab) for i, slab in zip(fit, slabs) if slab.converged]
        starts = (_start(systems[i], slab) for i, slab in ready)
        for place, end in relax(starts, self._potential, self.fmax, self.max_steps, swing=self._swing):
            i, slab = ready[place]
            yield i, *self._judged(systems[i], slab, end)

    def _relaxed_slabs(self, systems: Sequence[System]) -> list[Relaxed]:
        """The slab of each, its surface relaxed. Kept by what it was: the designs of one task often share
        it."""
        alone = [_slab(system) for system in systems]
        keys = [
            hashlib.sha256(
                b"".join(np.ascontiguousarray(part).tobytes() for part in (s.lattice, s.positions, s.numbers))
            ).digest()
            for s in alone
        ]
        new = {key: slab for key, slab in zip(keys, alone) if key not in self._slabs}
        starts = [Start(slab) for slab in new.values()]
        ends = relaxed(starts, self._potential, fmax=self.fmax, max_steps=_SLAB_STEPS, swing=self._swing)
        self._slabs.update(zip(new, ends))
        return [self._slabs[key] for key in keys]

    def _judged(self, system: System, slab: Relaxed, end: Relaxed) -> tuple[JudgedEnergy, System]:
        if end.failed:
            return JudgedEnergy(float("nan"), False, "failed", end.steps), system
        energy = end.energy - slab.energy - self._reference(system)
        found = make_system(
            system.lattice, end.positions, system.numbers, system.tags, system.adsorbate, system.miller,
            energy if np.isfinite(energy) else None, system.sid,
        )  # fmt: skip
        reason = self._why_not(found, end.converged, energy)
        moved = np.linalg.norm((found.positions - system.positions)[system.tags == ADSORBATE], axis=1).max()
        return JudgedEnergy(energy, reason is None, reason, end.steps, float(moved)), found

    def judge_many(
        self, systems: Sequence[System], workers: int = 1, progress: bool = True
    ) -> list[JudgedEnergy]:
        """Judge systems in order, with a progress bar; `workers` processes of one thread each (1: this one).

        One forward pass of SevenNet-0 over several structures was no faster on a CPU (0.078 s per structure
        alone, 0.077 in fours, 0.12 in sixteens: the arrays leave the cache), so it sees them one by one.
        """
        from tqdm import tqdm

        def bar(results: Any) -> Any:
            return tqdm(
                results, total=len(systems), desc=f"{self.name} judge", unit="system", disable=not progress
            )

        workers = min(workers, len(systems))
        if workers <= 1:
            found = dict[int, JudgedEnergy]()
            found.update((i, judged) for i, judged, _ in bar(self._relaxed(systems)))
            return [found[i] for i in range(len(systems))]
        settings = (self.potential, self.fmax, self.max_steps)
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
        if self._known is not None and any(int(z) not in self._known for z in system.numbers):
            return "unknown_element"
        period = np.linalg.norm(minkowski_reduce(system.lattice)[0], axis=1).min()
        if not min(period, min_distance(system.lattice, system.frac)) >= _TOO_CLOSE:
            return "overlap"
        return None

    def _reference(self, system: System) -> float:
        return sum(self.references[SYMBOLS[z]] for z in system.numbers[system.tags == ADSORBATE])

    def _why_not(self, relaxed: System, converged: bool, energy: float) -> str | None:
        """Why a relaxed system does not count, or None: the rules by which the data call a system `ok`."""
        if not converged:
            return "not_converged"
        if _n_pieces(relaxed) != pieces(relaxed.adsorbate):
            return "dissociated"
        height = heights(relaxed.lattice, relaxed.frac)
        adsorbed = relaxed.tags == ADSORBATE
        above = float(height[adsorbed].min() - height[~adsorbed].max())
        if above >= HEIGHT_RANGE[1]:
            return "desorbed"
        if above <= HEIGHT_RANGE[0]:
            return "sunken"
        return None if abs(energy) < MAX_ENERGY else "energy_out_of_range"


_worker: dict[str, Judge] = {}


def _start_worker(potential: str | Calculator, fmax: float, max_steps: int) -> None:
    _worker["judge"] = Judge(potential, fmax, max_steps)


def _judge_in_worker(system: System) -> JudgedEnergy:
    return _worker["judge"].judge(system)


def _on_one_thread(potential: Potential) -> Potential:
    def asked(structures: Sequence[Structure]) -> Any:
        with _one_thread():
            return potential(structures)

    return asked


@contextmanager
def _one_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _slab(system: System) -> Structure:
    """The slab alone, its surface free."""
    of_it = system.tags != ADSORBATE
    free = system.tags[of_it] == SURFACE
    return Structure(system.numbers[of_it], system.lattice, system.positions[of_it], free)


def _start(system: System, slab: Relaxed) -> Start:
    free = system.tags == ADSORBATE
    structure = Structure(system.numbers, system.lattice, system.positions, free)
    return on_relaxed_slab(structure, slab.positions, system.tags == SURFACE)


def _bonds(system: System) -> list[tuple[int, int]]:
    """Bonds within the adsorbate: its atoms i < j."""
    from ase.geometry import find_mic

    atoms = np.flatnonzero(system.tags == ADSORBATE)
    bonds = []
    for i, j in ((int(i), int(j)) for k, i in enumerate(atoms) for j in atoms[k + 1 :]):
        _, (length,) = find_mic([system.positions[j] - system.positions[i]], system.lattice, pbc=True)
        z_i, z_j = int(system.numbers[i]), int(system.numbers[j])
        longest = _LONGEST_BOND.get(
            frozenset((SYMBOLS[z_i], SYMBOLS[z_j])),
            _STRETCH * float(COVALENT_RADIUS[z_i] + COVALENT_RADIUS[z_j]),
        )
        if length <= longest:
            bonds.append((i, j))
    return bonds


def _n_pieces(system: System) -> int:
    """In how many molecules the bonds leave the atoms of the adsorbate."""
    piece = {atom: atom for atom in np.flatnonzero(system.tags == ADSORBATE).tolist()}
    for i, j in _bonds(system):
        piece = {atom: piece[i] if of == piece[j] else of for atom, of in piece.items()}
    return len(set(piece.values()))
