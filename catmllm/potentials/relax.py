"""Relaxations of many structures at once: one call of the potential a step for all that are under way, each
with a BFGS state of its own, as ASE's BFGS would take it.

A structure that has converged makes room for the next one, so the calls stay full. Only the free atoms'
coordinates are in a state: fixed atoms feel no force, so ASE's larger Hessian decides nothing more.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from ase import Atoms
    from ase.calculators.calculator import Calculator

Floats = NDArray[np.float64]

BLOWN_UP = (ValueError, ArithmeticError, RuntimeError, np.linalg.LinAlgError)  # what ASE and torch raise then
STIFFNESS = 70.0  # eV/Å^2, ASE's own first guess of a Hessian
_STILL = 1e-7  # Å; after smaller moves ASE leaves the Hessian as it was
_LAST = 20  # steps whose energies say whether a walk only swings


class PotentialMissing(RuntimeError):
    """A potential cannot be loaded; the message has the line that installs it."""


@dataclass(frozen=True, eq=False)
class Structure:
    """Atoms in a cell that is periodic in three directions: numbers [N], lattice [3, 3] (rows, Å) and
    positions [N, 3] (Å). free: bool [N], the atoms whose forces are asked for (None: all); what a potential
    says of others need not be their force."""

    numbers: NDArray[np.int64]
    lattice: Floats
    positions: Floats
    free: NDArray[np.bool_] | None = None


# Energies [B] (eV) and forces [N, 3] each (eV/Å) of B structures. Raises one of `BLOWN_UP`, then for all.
Potential = Callable[[Sequence[Structure]], tuple[Floats, list[Floats]]]


@dataclass(frozen=True, eq=False)
class Start:
    """A structure of which the free atoms may move. hessian: the first guess (eV/Å²) for the coordinates of
    these, [3F, 3F]; None: `STIFFNESS` on the diagonal."""

    structure: Structure
    hessian: Floats | None = None


@dataclass(frozen=True, eq=False)
class Relaxed:
    """What became of a structure. energy (eV) and force (eV/Å, the largest on a free atom) are of `positions`
    [N, 3]; where the potential blew up (`failed`), these are the start's and the energy is nan. converged:
    the force is small enough, or the walk swung around a minimum (`relax`). frames: the positions and
    energies on the way, the start first, where they were asked for."""

    positions: Floats
    energy: float
    force: float
    converged: bool
    steps: int
    failed: bool = False
    frames: list[tuple[Floats, float]] = field(default_factory=list)


class _Walk:
    """One relaxation under way."""

    def __init__(self, number: int, start: Start, longest: float, swing: float, keep: bool) -> None:
        self.number, self.start, self.longest, self.swing, self.keep = number, start, longest, swing, keep
        self.structure = start.structure
        self.free = (
            np.ones(len(self.structure.numbers), bool) if self.structure.free is None else self.structure.free
        )
        self.hessian = (
            STIFFNESS * np.eye(3 * int(self.free.sum())) if start.hessian is None else start.hessian.copy()
        )
        self.steps = 0
        self.before: tuple[Floats, Floats] | None = None  # coordinates and forces a step ago
        self.frames: list[tuple[Floats, float]] = []
        self.last: deque[tuple[float, float, Floats]] = deque(maxlen=_LAST)  # energy, force, positions

    def failed(self) -> Relaxed:
        start = self.start.structure.positions
        return Relaxed(start, float("nan"), float("nan"), False, self.steps, True, self.frames)

    def heed(self, energy: float, forces: Floats, fmax: float, most: int) -> Relaxed | None:
        """Take in what the potential says of the structure: the end of the walk, or one step on."""
        if not (np.isfinite(energy) and np.isfinite(forces).all()):
            return self.failed()
        if self.keep:
            self.frames.append((self.structure.positions.copy(), energy))
        felt = forces[self.free]
        largest = float(np.sqrt((felt**2).sum(1).max(initial=0.0)))
        self.last.append((energy, largest, self.structure.positions))
        if largest < fmax or self.steps >= most:
            converged, at = largest < fmax, self.structure.positions
            energies = [e for e, _, _ in self.last]
            if not converged and len(energies) == _LAST and max(energies) - min(energies) <= self.swing:
                converged = True
                energy, largest, at = min(self.last, key=itemgetter(0))
            return Relaxed(at, energy, largest, converged, self.steps, False, self.frames)
        try:
            move = self._step(self.structure.positions[self.free].ravel(), felt.ravel()).reshape(-1, 3)
        except np.linalg.LinAlgError:
            return self.failed()
        furthest = float(np.sqrt((move**2).sum(1).max()))
        if furthest >= self.longest:
            move = move * (self.longest / furthest)
        positions = self.structure.positions.copy()
        positions[self.free] += move
        self.structure = replace(self.structure, positions=positions)
        self.steps += 1
        return None

    def _step(self, at: Floats, forces: Floats) -> Floats:
        if self.before is not None:
            moved, change = at - self.before[0], forces - self.before[1]
            if np.abs(moved).max() >= _STILL:
                bent = self.hessian @ moved
                self.hessian -= np.outer(change, change) / (moved @ change) + np.outer(bent, bent) / (
                    moved @ bent
                )
        self.before = at, forces
        values, vectors = np.linalg.eigh(self.hessian)
        return np.asarray(vectors @ ((forces @ vectors) / np.abs(values)), dtype=np.float64)


def relax(
    starts: Iterable[Start],
    potential: Potential,
    fmax: float = 0.05,
    max_steps: int = 80,
    longest: float = 0.2,
    swing: float = 0.0,
    batch: int = 16,
    frames: bool = False,
) -> Iterator[tuple[int, Relaxed]]:
    """Relax structures until no free atom feels more than fmax (eV/Å), for at most max_steps.

    Yields (place among the starts, result) as they get done, in any order; `starts` is read as there is room.
    longest: how far an atom may go in a step (Å). batch: structures in one call. A structure on which the
    potential blows up comes back as `failed` and costs the others nothing. swing (eV): a potential that is
    cut off has kinks, and a minimum in one is never without force; a walk whose last 20 energies differ by no
    more than this ends, converged, at the lowest of them.
    """
    waiting = enumerate(starts)
    walks: list[_Walk] = []
    while True:
        while len(walks) < batch:
            one = next(waiting, None)
            if one is None:
                break
            walks.append(_Walk(one[0], one[1], longest, swing, frames))
        if not walks:
            return
        going: list[_Walk] = []
        for walk, said in zip(walks, _asked(potential, [walk.structure for walk in walks])):
            done = walk.failed() if said is None else walk.heed(*said, fmax, max_steps)
            if done is None:
                going.append(walk)
            else:
                yield walk.number, done
        walks = going


def relaxed(starts: Sequence[Start], potential: Potential, **options: Any) -> list[Relaxed]:
    """`relax`, all of them in order."""
    found = dict(relax(starts, potential, **options))
    return [found[i] for i in range(len(starts))]


def _asked(potential: Potential, structures: list[Structure]) -> list[tuple[float, Floats] | None]:
    """Energy and forces of each structure; None where the potential blew up on it."""
    try:
        energies, forces = potential(structures)
        return list(zip(energies.tolist(), forces))
    except BLOWN_UP:
        if len(structures) == 1:
            return [None]
        return [said for one in structures for said in _asked(potential, [one])]


def by_calculator(calculator: Calculator) -> Potential:
    """Any of ASE's calculators as a potential; it is asked for one structure after the other."""
    from ase import Atoms

    def potential(structures: Sequence[Structure]) -> tuple[Floats, list[Floats]]:
        energies, forces = [], []
        for s in structures:
            atoms = Atoms(numbers=s.numbers, positions=s.positions, cell=s.lattice, pbc=True)
            atoms.calc = calculator
            forces.append(np.asarray(atoms.get_forces(), dtype=np.float64))
            energies.append(float(atoms.get_potential_energy()))
        return np.array(energies), forces

    return potential


def structure_of(atoms: Atoms) -> Structure:
    """The atoms of an ase.Atoms, periodic or not."""
    return Structure(atoms.numbers.astype(np.int64), np.array(atoms.cell[:]), atoms.positions.copy())
