"""A parsed cell: the elements, `Crystal`, and the error of a text that is none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_PERIODIC_TABLE = (
    "H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br Kr Rb "
    "Sr Y Zr Nb Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe Cs Ba La Ce Pr Nd Pm Sm Eu Gd Tb Dy Ho Er Tm Yb Lu Hf "
    "Ta W Re Os Ir Pt Au Hg Tl Pb Bi Po At Rn Fr Ra Ac Th Pa U Np Pu Am Cm Bk Cf Es Fm Md No Lr Rf Db Sg Bh "
    "Hs Mt Ds Rg Cn Nh Fl Mc Lv Ts Og"
)
ELEMENTS = _PERIODIC_TABLE.split()
ATOMIC_NUMBER = {symbol: z for z, symbol in enumerate(ELEMENTS, start=1)} | {"D": 1, "T": 1}


class CIFError(ValueError):
    """A text that is no crystal; `reason` is a short stable code, the message says more."""

    def __init__(self, reason: str, message: str = "") -> None:
        super().__init__(message or reason)
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.reason, str(self))


@dataclass(frozen=True, eq=False)
class Crystal:
    """A parsed cell, its sites in the order of the file (symmetry images follow their row).

    lattice: float64 [3, 3], rows a, b, c in Å (c along z, as pymatgen puts them). frac: float64 [N, 3] in [0,
    1). numbers: int64 [N], the atomic number of the (most abundant) species of a site, 0 for what is no
    element. counts: atoms by symbol in the whole cell where occupancies or dummies make them differ from
    `numbers`.
    """

    lattice: NDArray[np.float64]
    frac: NDArray[np.float64]
    numbers: NDArray[np.int64]
    counts: Mapping[str, float] | None = None

    @property
    def composition(self) -> dict[str, float]:
        """Atoms of the whole cell by symbol: oxidation states stripped, D and T as H, occupancies counted."""
        if self.counts is not None:
            return dict(self.counts)
        values, amounts = np.unique(self.numbers, return_counts=True)
        return {ELEMENTS[z - 1] if z else "X": float(n) for z, n in zip(values, amounts)}

    @property
    def volume(self) -> float:
        """Cell volume in Å³."""
        return float(abs(np.linalg.det(self.lattice)))

    @property
    def positions(self) -> NDArray[np.float64]:
        """Cartesian coordinates [N, 3] in Å."""
        return self.frac @ self.lattice
