"""What turns a total energy into an adsorption energy: E = E(slab + adsorbate) - E(slab) - E(gas).

E(gas) is the combination of the given molecules that has the adsorbate's atoms. It must be the only one, so
molecules that can be made of each other (H2, O2 and H2O) are refused: with them the zero would be a matter of
choice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from catmllm.data.own.adsorbates import NONMETALS, Bare
from catmllm.structure.elements import NUMBER
from catmllm.structure.formula import format_formula, parse_formula


class NoReference(ValueError):
    """A reference that is needed is not given; the message says which."""


@dataclass
class References:
    """Energies (eV) of gas molecules by formula, and of clean slabs by name or structure."""

    gases: dict[str, float] = field(default_factory=dict)
    by_name: dict[str, float] = field(default_factory=dict)
    slabs: list[tuple[Bare, float, str]] = field(default_factory=list)

    def check(self) -> None:
        """Raises ValueError where the molecules can be made of each other."""
        if dependent := dependent_gases(self.gases):
            raise ValueError(
                f"the gas references {', '.join(self.gases)} can be made of each other ({dependent}), so the "
                "zero of energy is not certain; leave one out"
            )

    def gas(self, counts: Mapping[str, int]) -> tuple[float, dict[str, float]]:
        """Energy (eV) of the molecules that have these atoms, and their numbers. Raises NoReference."""
        weights = combine(self.gases, counts)
        if weights is None:
            formula = format_formula(counts)
            raise NoReference(
                f"the gas references {', '.join(self.gases) or '(none)'} do not make {formula}; add the "
                f"molecules of its elements, or {formula} itself, to --reference"
            )
        return sum(n * self.gases[g] for g, n in weights.items()), weights

    def slab(self, clean: Bare, names: Iterable[str]) -> float:
        """Energy (eV) of the clean slab of these atoms: by one of the names, else the structure of the same
        atoms in the same cell. Raises NoReference, also where two slabs fit and differ."""
        for name in names:
            if name in self.by_name:
                return self.by_name[name]
        everything = np.ones(len(clean.numbers), dtype=np.bool_)
        counts = clean.formula(everything)
        formula = format_formula(counts)
        if formula in self.by_name:
            return self.by_name[formula]
        fitting = [
            (energy, where)
            for slab, energy, where in self.slabs
            if slab.formula(np.ones(len(slab.numbers), dtype=np.bool_)) == counts
            and np.abs(slab.lattice[:2] - clean.lattice[:2]).max() <= 0.01 * np.abs(clean.lattice[:2]).max()
        ]
        energies = [energy for energy, _ in fitting]
        if not fitting:
            raise NoReference(f"no clean slab {formula} in this cell among the references")
        if max(energies) - min(energies) > 0.01:
            some = ", ".join(f"{where} {energy:.3f} eV" for energy, where in fitting[:3])
            raise NoReference(f"{len(fitting)} clean slabs {formula} fit and differ ({some})")
        return min(energies)

    @property
    def state(self) -> str:
        """The gas molecules and their energies, which are the zero of a data set."""
        return "gas " + ", ".join(f"{g} {e:.3f} eV" for g, e in sorted(self.gases.items()))


def is_molecule(formula: str) -> bool:
    """Whether a formula is of a gas molecule's elements alone."""
    try:
        return all(NUMBER[s] in NONMETALS for s in parse_formula(formula)) and bool(formula)
    except ValueError:
        return False


def combine(gases: Iterable[str], counts: Mapping[str, int]) -> dict[str, float] | None:
    """The numbers of molecules that have exactly these atoms, or None where no combination has."""
    names = list(gases)
    formulas = [parse_formula(name) for name in names]
    elements = sorted({*counts, *(s for f in formulas for s in f)})
    matrix = np.array([[f.get(s, 0) for f in formulas] for s in elements], dtype=np.float64)
    wanted = np.array([counts.get(s, 0) for s in elements], dtype=np.float64)
    if not names:
        return None
    weights, *_ = np.linalg.lstsq(matrix, wanted, rcond=None)
    if np.abs(matrix @ weights - wanted).max() > 1e-8:
        return None
    return {name: float(w) for name, w in zip(names, weights) if abs(w) > 1e-8}


def dependent_gases(gases: Iterable[str]) -> str | None:
    """A molecule that the others make, as text, or None."""
    names: Sequence[str] = list(gases)
    for i, name in enumerate(names):
        others = [n for j, n in enumerate(names) if j != i]
        weights = combine(others, parse_formula(name))
        if weights:
            return f"{name} = " + " + ".join(f"{n:g} {g}" for g, n in weights.items())
    return None
