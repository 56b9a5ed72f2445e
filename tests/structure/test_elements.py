"""The element table against pymatgen and ASE, from which it was generated."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
from ase.data import chemical_symbols, covalent_radii
from pymatgen.core import Element

from catmllm.structure import elements, make_elements


def test_columns_equal_pymatgen_and_ase() -> None:
    assert len(elements.SYMBOLS) == 119
    assert list(elements.SYMBOLS) == chemical_symbols
    np.testing.assert_array_equal(elements.COVALENT_RADIUS[1:], covalent_radii[1:119])
    for symbol, z in elements.NUMBER.items():
        element = Element(symbol)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            x = element.X
        assert z == element.Z
        np.testing.assert_equal(elements.electronegativity(symbol), float(x))
        radius = element.atomic_radius
        np.testing.assert_equal(elements.atomic_radius(symbol), math.nan if radius is None else float(radius))
        assert elements.average_ionic_radius(symbol) == pytest.approx(
            float(element.average_ionic_radius), abs=1e-6
        )


def test_committed_table_is_what_the_script_makes() -> None:
    made = json.loads(make_elements.table_text(make_elements.element_rows()))
    committed = json.loads(Path(elements.__file__).with_name("elements.json").read_text())
    assert committed["columns"] == made["columns"]
    assert committed["elements"] == made["elements"]


def test_order_is_pymatgens_with_ties_by_atomic_number() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        by_pymatgen = sorted(
            (Element.from_Z(z) for z in range(1, 119)), key=lambda e: (e.X, e.Z) if e.X == e.X else (9, e.Z)
        )
    assert elements.order_elements(reversed(elements.SYMBOLS[1:])) == [
        element.symbol for element in by_pymatgen
    ]
    assert elements.order_elements(["Ir", "O", "C", "Pd", "Pd"]) == ["Pd", "Ir", "C", "O"]
    assert elements.order_elements(["Rh", "As"]) == ["As", "Rh"]


def test_no_element() -> None:
    with pytest.raises(ValueError, match="'Xx' is no element"):
        elements.electronegativity("Xx")
