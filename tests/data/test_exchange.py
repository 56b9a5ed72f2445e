"""Slabs of other metals are those that ASE builds, and only of pairs that training has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import permutations
from random import Random
from typing import Literal

import numpy as np
import pytest

from catmllm.config import DataConfig
from catmllm.data.exchange import CONSTANT, exchanged, other_metals
from catmllm.data.fcc_slabs import FCC_CONSTANT
from catmllm.data.open import open_data
from catmllm.data.prompts import property_sample
from catmllm.data.slabs import load_slabs, pair, split
from catmllm.data.splits import held_out
from catmllm.data.subsets import pairs
from catmllm.data.surfaces import METALS
from catmllm.design.enumeration import ideal_system
from catmllm.stages.supervised import Mixture, task_sample
from catmllm.structure.cif import read_cif
from catmllm.structure.formula import Miller
from catmllm.structure.system import ADSORBATE, System
from rewards_fast import extract_cif


def parts(system: System) -> tuple[np.ndarray, np.ndarray]:
    """Positions (Å) of slab and adsorbate."""
    positions, of = system.frac @ system.lattice, system.tags == ADSORBATE
    return positions[~of], positions[of]


@pytest.mark.parametrize("facet", ["111", "100"])
def test_an_exchanged_slab_is_the_one_that_ase_builds(facet: str) -> None:
    from ase.build import fcc100, fcc111

    line = f"CO</s>Pt12 ({' '.join(facet)})"
    made = exchanged(ideal_system(line, Random(0)), {"Pt": "Cu"})
    build = fcc111 if facet == "111" else fcc100
    expected = build("Cu", (2, 2, 3), a=FCC_CONSTANT["Cu"], vacuum=5.0, periodic=True)
    assert made.identity == f"CO</s>Cu12 ({' '.join(facet)})"
    lengths = np.linalg.norm(made.lattice, axis=1)
    np.testing.assert_allclose(lengths, expected.cell.lengths(), atol=1e-6)
    ours = made.as_ase()[:12].get_all_distances(mic=True)
    np.testing.assert_allclose(np.sort(ours), np.sort(expected.get_all_distances(mic=True)), atol=1e-6)
    slab, adsorbate = parts(made)
    before_slab, before = parts(ideal_system(line, Random(0)))
    assert adsorbate[0, 2] - slab[:, 2].max() == pytest.approx(before[0, 2] - before_slab[:, 2].max())
    np.testing.assert_allclose(adsorbate[1] - adsorbate[0], before[1] - before[0], atol=1e-9)


def test_other_metals_are_all_but_those_that_are_held_out() -> None:
    parts_of = split(load_slabs())
    held_out, rng = pairs(parts_of["val"]) | pairs(parts_of["test"]), np.random.default_rng(0)
    system = next(s for s in parts_of["train"] if sorted(s.slab_counts.values()) == [3, 9])
    made = [exchanged(system, other_metals(system, held_out, rng)) for _ in range(8000)]
    every = {pair(exchanged(system, dict(zip(system.slab_counts, two)))) for two in permutations(CONSTANT, 2)}
    assert len(every) == 23 * 22 and held_out & every
    assert {pair(s) for s in made} == every - held_out
    assert all(s.energy is None and s.adsorbate == system.adsorbate for s in made)
    for s in made[:50]:
        bonds, of = parts(s)[1] - parts(s)[1][0], parts(system)[1]
        np.testing.assert_allclose(bonds, of - of[0], atol=1e-9)


@pytest.mark.parametrize("facet", [(1, 1, 1), (1, 0, 0)])
def test_it_does_not_matter_where_the_boundaries_of_the_cell_cut(facet: Miller) -> None:
    """A molecule across one was torn when the cell grew, a slab across the upper one was as thick as the
    cell."""
    some = (s for s in load_slabs() if (s.adsorbate, s.bulk, s.miller) == ("OH", "Rh", facet))
    system = next(some).frame(0.0)  # OH leans there
    expected = exchanged(system, {"Rh": "Al"}).as_ase()
    anchor = system.frac[system.tags == ADSORBATE][0]
    for shift in (-anchor * (1, 0, 0), -anchor * (1, 1, 0), -system.frac[5] * (0, 0, 1), -anchor):
        moved = replace(system, frac=(system.frac + shift) % 1.0)
        made = exchanged(moved, {"Rh": "Al"})
        np.testing.assert_allclose(made.lattice, expected.cell[:], atol=1e-9)
        ours, theirs = (a.get_all_distances(mic=True) for a in (made.as_ase(), expected))
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_metals_that_break_an_adsorbate_are_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    system = split(load_slabs())["train"][0]
    monkeypatch.setattr("catmllm.data.exchange.adsorbate_fault", lambda s: None if s is system else "overlap")
    assert other_metals(system, (), np.random.default_rng(0)) == {}


def metals(system: System) -> frozenset[str]:
    return frozenset(system.slab_counts)


@pytest.mark.parametrize(
    ("by", "left_out", "name_of"), [("metal", "Pt", metals), ("formula", "Cu3Pt", lambda s: s.bulk)]
)
def test_other_metals_are_of_no_group_that_the_split_keeps_apart(
    by: Literal["metal", "formula"], left_out: str, name_of: Callable[[System], object]
) -> None:
    """Other facets of a test formula, and Pt in other alloys, came back into training as exchanged slabs."""
    for hold_out, apart in ((None, ("val", "test")), ((left_out,), ("test",))):
        config = DataConfig(split_by=by, hold_out=hold_out)
        parts, rng = open_data(config), np.random.default_rng(0)
        system = next(s for s in parts["train"] if sorted(s.slab_counts.values()) == [3, 9])
        made = [exchanged(system, other_metals(system, held_out(parts, config), rng)) for _ in range(1000)]
        assert {name_of(s) for s in made}.isdisjoint(name_of(s) for part in apart for s in parts[part])
        assert by == "formula" or hold_out is None or not any("Pt" in s.slab_counts for s in made)


def test_a_slab_keeps_its_metals_where_no_other_is_allowed_or_one_is_unknown() -> None:
    system, rng = load_slabs()[0], np.random.default_rng(0)

    class All:
        def __contains__(self, name: object) -> bool:
            return True

    assert other_metals(system, All(), rng) == {}
    numbers = np.where(system.tags == ADSORBATE, system.numbers, 89)
    actinium = replace(system, numbers=numbers)
    assert other_metals(actinium, (), rng) == {}


def test_metals_of_other_crystals_have_the_atomic_volumes_of_ase() -> None:
    from ase.build import bulk

    for metal, (crystal, *_) in METALS.items():
        volume = bulk(metal, crystal).get_volume() / len(bulk(metal, crystal))
        assert CONSTANT[metal] ** 3 / 4 == pytest.approx(volume, rel=0.06), metal


@pytest.mark.parametrize("told", [False, True])
def test_cif_samples_have_other_metals_and_design_samples_where_energies_are_told(told: bool) -> None:
    """An exemplar is of the same metals as what is asked for."""
    system = split(load_slabs())["train"][0]
    rngs = [np.random.default_rng(k) for k in range(40)]
    energy_of = (lambda s: s.slab_counts.get("Pt", 0) - 20.0) if told else None
    written = [
        task_sample(system, [], r, 0.5, 0.05, DataConfig(), exchange=1.0, energy_of=energy_of) for r in rngs
    ]
    found: dict[str, set[str]] = {"design": set(), "cif": set()}
    shown = 0
    for sample in written:
        made = read_cif(extract_cif(sample.answer))
        design = "energy" in sample.prompt
        found["design" if design else "cif"].add(made.identity)
        assert made.identity in sample.prompt
        if design and energy_of:
            assert f"relaxed energy of {energy_of(made):.2f} eV" in sample.prompt
        if sample.graph is not None:
            assert sample.graph.identity == made.identity
            shown += 1
    assert len(found["cif"]) > 8 and shown > 3
    assert len(found["design"]) > 8 if told else found["design"] == {system.identity}


def test_a_mixture_exchanges_a_share_of_its_cif_samples() -> None:
    slabs = split(load_slabs())["train"][:300]

    def answers(share: float) -> list[str]:
        mixture = Mixture(
            slabs, slabs, DataConfig(), (1,), (2,), 0.0, lambda s, r: property_sample(s), 0.0, 0.0, 0.5, share
        )
        return [mixture(k).answer for k in range(200)]

    plain, some = answers(0.0), answers(0.6)
    changed = sum(
        a.split("data_")[1].split("\n")[0] != b.split("data_")[1].split("\n")[0] for a, b in zip(plain, some)
    )
    # 120 are expected to change, standard deviation 7; a few draw the metals that they have
    assert 85 <= changed <= 141
