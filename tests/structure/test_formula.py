"""Formulas and identity lines against pymatgen's Composition and the published examples."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pymatgen.core import Composition

from catmllm.structure.elements import SYMBOLS
from catmllm.structure.formula import (
    count_elements,
    format_formula,
    format_miller,
    parse_formula,
    parse_identity,
    reduce_counts,
)

COUNTS = st.dictionaries(st.sampled_from(SYMBOLS[1:104]), st.integers(1, 60), min_size=1, max_size=5)

# adsorbates of OC20, with and without the mark of the binding atom
ADSORBATES = [
    "CHCH2OH",
    "OHNH2",
    "CCH",
    "*CH2*O",
    "*ON(CH3)2",
    "*NHN(CH3)2",
    "*OHNNCH3",
    "*COHCH2OH",
    "NH",
    "*NO2",
    "H",
]


@given(COUNTS)
def test_round_trip_and_pymatgen(counts: dict[str, int]) -> None:
    text = format_formula(counts)
    assert parse_formula(text) == counts
    assert Composition(text).get_el_amt_dict() == counts
    reduced, units = reduce_counts(counts)
    _, pymatgen_units = Composition(counts).get_reduced_composition_and_factor()
    # pymatgen reduces O, NaO and the like to halves of O2 and Na2O2, and leaves what is reduced
    _, of_reduced = Composition(reduced).get_reduced_composition_and_factor()
    assert units * of_reduced == pymatgen_units and of_reduced in (1, 0.5)
    assert {symbol: count * units for symbol, count in reduced.items()} == counts


@pytest.mark.parametrize("formula", ADSORBATES)
def test_adsorbates_against_pymatgen(formula: str) -> None:
    assert parse_formula(formula) == Composition(formula.replace("*", "")).get_el_amt_dict()


def test_small_formulas() -> None:
    assert parse_formula("Pd9Pt3") == {"Pd": 9, "Pt": 3}
    assert parse_formula("CO") == {"C": 1, "O": 1}
    assert parse_formula("Co") == {"Co": 1}
    assert parse_formula("C0O2") == {"O": 2}
    assert parse_formula("") == {}
    assert count_elements(["Ir", "O", "Ir"]) == {"Ir": 2, "O": 1}
    assert reduce_counts({}) == ({}, 1)


@pytest.mark.parametrize(
    "formula", ["Qq2", "2Pd", "Pd-2", "Pd0.5", "(CO", "CO)2", "pd", "Pd9Pt3!", "X", "D2O"]
)
def test_what_is_no_formula(formula: str) -> None:
    with pytest.raises(ValueError, match="formula"):
        parse_formula(formula)


def test_published_identities() -> None:
    assert parse_identity("CO</s>Pt9Cu3 (1 1 1)") == ("CO", {"Pt": 9, "Cu": 3}, (1, 1, 1))
    assert parse_identity("CHCH2OH</s>Ca8Ga16 (1 0 0)").slab == {"Ca": 8, "Ga": 16}
    assert parse_identity("CCH</s>Sb48 (2 -1 2)</s>[C Sb atop [Sb C]]").miller == (2, -1, 2)
    assert parse_identity("CH</s>Ti (1, 0, 0)").slab == {"Ti": 1}
    assert format_miller((2, -1, 2)) == "(2 -1 2)"
    assert parse_identity("CO</s>Pt9Cu3") == ("CO", {"Pt": 9, "Cu": 3}, None)
    assert parse_identity("CO</s>Pt9Cu3</s>[C Pt atop [Pt C]]").miller is None


@pytest.mark.parametrize(
    "text", ["", "CO</s>", "CO Pt9Cu3 (1 1 1)", "CO</s>Pt9Cu3 (1 1)", "Xy</s>Pt (1 1 1)"]
)
def test_what_is_no_identity(text: str) -> None:
    with pytest.raises(ValueError):
        parse_identity(text)
