"""Element data that texts, CIFs and bonds are written with, read from `elements.json`.

The table is made from pymatgen and ASE by `python -m catmllm.structure.make_elements`, so that neither is
needed to read or write a structure. Arrays are indexed by atomic number; entry 0 is no element.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_TABLE = json.loads(Path(__file__).with_name("elements.json").read_text(encoding="ascii"))["elements"]


def _column(index: int) -> NDArray[np.float64]:
    """One column as float64 [119] by atomic number; nan where the source has no value."""
    values = [math.nan] + [math.nan if row[index] is None else row[index] for row in _TABLE]
    column = np.array(values, dtype=np.float64)
    column.flags.writeable = False
    return column


SYMBOLS: tuple[str, ...] = ("X", *(row[0] for row in _TABLE))
NUMBER: dict[str, int] = {symbol: z for z, symbol in enumerate(SYMBOLS) if z}

ELECTRONEGATIVITY = _column(1)  # Pauling, pymatgen's Element.X; nan for the light noble gases and beyond No
ATOMIC_RADIUS = _column(2)  # Å, pymatgen's Element.atomic_radius; nan where unknown
AVERAGE_IONIC_RADIUS = _column(3)  # Å, pymatgen's Element.average_ionic_radius; pymatgen's 0 where unknown
COVALENT_RADIUS = _column(4)  # Å, ase.data.covalent_radii, what ASE's natural_cutoffs gives
COLOUR: tuple[str, ...] = ("#000000", *(row[5] for row in _TABLE))  # ase.data.colors.jmol_colors, #rrggbb


def atomic_number(symbol: str) -> int:
    """Atomic number of a symbol. Raises ValueError for what is no element."""
    try:
        return NUMBER[symbol]
    except KeyError:
        raise ValueError(f"{symbol!r} is no element") from None


def electronegativity(symbol: str) -> float:
    """Pauling electronegativity, nan where there is none."""
    return float(ELECTRONEGATIVITY[atomic_number(symbol)])


def atomic_radius(symbol: str) -> float:
    """Atomic radius in Å, nan where unknown."""
    return float(ATOMIC_RADIUS[atomic_number(symbol)])


def average_ionic_radius(symbol: str) -> float:
    """Average ionic radius in Å, 0 where unknown."""
    return float(AVERAGE_IONIC_RADIUS[atomic_number(symbol)])


def covalent_radius(symbol: str) -> float:
    """Covalent radius in Å."""
    return float(COVALENT_RADIUS[atomic_number(symbol)])


def order_elements(symbols: Iterable[str]) -> list[str]:
    """The different symbols by electronegativity, then atomic number;
    without electronegativity they stand last."""

    def key(symbol: str) -> tuple[float, int]:
        x = electronegativity(symbol)
        return (math.inf if math.isnan(x) else x, NUMBER[symbol])

    return sorted(set(symbols), key=key)
