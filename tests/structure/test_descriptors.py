"""What is around an adsorbate: of one length, blind to what is the same crystal, zero where there is none."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np

from catmllm.structure.descriptors import (
    PROPERTIES,
    SURROUNDINGS,
    TOLD,
    local_descriptor,
    surroundings,
    told,
)
from catmllm.structure.elements import NUMBER
from catmllm.structure.system import System
from catmllm.structure.text import configuration


def test_surroundings_hold_the_descriptor_and_the_adsorbates_elements(train_systems: list[System]) -> None:
    for name, lowest, others in (("CO", "C", "O"), ("NH", "N", "H"), ("H", "H", None)):
        system = next(
            s for s in train_systems if s.adsorbate == name and s.frac[-1, 2] >= s.frac[11:, 2].max()
        )
        found, width = surroundings(system), PROPERTIES.shape[1]
        assert found.shape == (SURROUNDINGS,)
        np.testing.assert_array_equal(found[: -2 * width], local_descriptor(system))
        np.testing.assert_array_equal(found[-2 * width : -width], PROPERTIES[NUMBER[lowest]])
        of_others = np.zeros(width) if others is None else PROPERTIES[NUMBER[others]]
        np.testing.assert_array_equal(found[-width:], of_others)


def test_surroundings_do_not_depend_on_order_or_origin(train_systems: list[System]) -> None:
    rng = np.random.default_rng(0)
    for system in train_systems[::400]:
        order = rng.permutation(len(system))
        frac = (system.frac + [*rng.random(2), 0.0])[order]
        moved = replace(system, frac=frac, numbers=system.numbers[order], tags=system.tags[order])
        np.testing.assert_allclose(surroundings(moved), surroundings(system), atol=1e-9)


def test_sites_are_those_of_the_three_part_text(train_systems: list[System]) -> None:
    """To how many slab atoms of what elements it binds, and these to how many of what: read from words."""
    some = [s for s in train_systems if len(s.adsorbate) == 1][::97]  # of more, the order differs
    for system in some:
        first, rest, number, plane = np.split(local_descriptor(system)[-64:], [30, 60, 61])
        assert not rest.any() and plane[0] == 1
        np.testing.assert_allclose(plane * max(system.miller or ()), sorted(system.miller or ())[::-1])
        text = configuration(system)
        if text == "[]":
            assert not first.any() and not number.any()
            continue
        assert number == 1
        bound = re.sub(r"\[[^\[\]]*\]", "", text[1:-1]).split()[1:-1]
        inner = [words.split()[1:] for words in re.findall(r"\[([^\[\]]*)\]", text[1:-1])]
        around = [word for words in inner for word in words if word != text[1:].split()[0]]
        of, n = PROPERTIES[[NUMBER[w] for w in bound]], len(bound)
        counts = [n == 1, n == 2, n == 3, n > 3, n, len(around) / n / 9]
        second = PROPERTIES[[NUMBER[w] for w in around]].sum(0) / max(len(around), 1)
        expected = [counts, of.mean(0), of.min(0), of.max(0), second]
        np.testing.assert_allclose(first, np.concatenate(expected), atol=1e-12)
    assert any(configuration(s) == "[]" for s in some) and any("hollow" in configuration(s) for s in some)


def test_without_an_adsorbate_there_is_nothing_around_it(train_systems: list[System]) -> None:
    bare = replace(train_systems[0], tags=np.zeros(len(train_systems[0]), dtype=np.int8))
    assert not surroundings(bare).any()


def test_a_text_tells_metals_sites_and_surroundings() -> None:
    bridge = told("CO</s>PdIr (1 -1 1)</s>[C Pd Ir bridge [Pd Ir Ir Pd C] [Ir Pd Pd C]]")
    width = 2 * PROPERTIES.shape[1]
    pd, ir = PROPERTIES[NUMBER["Pd"]], PROPERTIES[NUMBER["Ir"]]
    of_pair = np.concatenate([(pd + ir) / 2, abs(pd - ir) / 2])
    np.testing.assert_allclose(bridge[:width], of_pair, atol=1e-12)
    # the brackets name the bound metals again: Pd Ir Ir Pd, Ir Pd Pd
    np.testing.assert_allclose(bridge[width : 3 * width // 2], (4 * pd + 3 * ir) / 7, atol=1e-12)
    np.testing.assert_allclose(bridge[2 * width : 3 * width], of_pair, atol=1e-12)
    assert bridge[3 * width :].tolist() == [0, 1, 0, 2, 3.5, 1, 1, 1, 1]
    assert len(bridge) == TOLD
    assert told("H</s>Pt</s>[]")[3 * width :].tolist() == [0, 0, 0, 0, 0, 1, 0, 0, 0]
    two, unbound = told("H</s>Pt (1 1 1)"), told("H</s>Pt (1 1 1)</s>[]")
    assert (unbound - two).tolist() == [float(k == TOLD - 4) for k in range(TOLD)]  # `[]` is one bundle
    assert told("CO on Pt").tolist() == [0.0] * TOLD
