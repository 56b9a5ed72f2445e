"""Training slabs with other elements: what an exchange keeps, and which come first."""

from __future__ import annotations

from collections import Counter
from itertools import product
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from catmllm.data.fcc_slabs import FCC_CONSTANT
from catmllm.design.analogues import analogues, exchanged, renamings
from catmllm.design.enumeration import ideal_system
from catmllm.structure.formula import parse_identity
from catmllm.structure.system import ADSORBATE, System


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


@given(
    st.dictionaries(st.sampled_from("ABC"), st.integers(1, 3), min_size=1, max_size=2), st.integers(0, 10**6)
)
def test_renamings_are_all_that_fit(old: dict[str, int], seed: int) -> None:
    rng = Random(seed)
    new = {name: rng.randint(1, 6) for name in rng.sample("WXYZ", rng.randint(1, 2))}
    found = list(renamings(old, new))

    def renamed(names: dict[str, str]) -> Counter[str]:
        total: Counter[str] = Counter()
        for metal, count in old.items():
            total[names[metal]] += count
        return total

    every = [dict(zip(old, names)) for names in product(new, repeat=len(old))]
    assert sorted(map(str, found)) == sorted(str(n) for n in every if renamed(n) == Counter(new))


@pytest.mark.parametrize("line", ["CO</s>Pt9Cu3 (1 1 1)", "NH</s>Au6Ni6 (1 0 0)"])
def test_the_nearest_slabs_come_first(line: str, train_systems: list[System]) -> None:
    """By hand: of the slabs that can become it, those of which fewest atoms change."""
    train, energy = train_systems, -0.4
    asked = parse_identity(line)
    first = analogues([[line]], [energy], train, 1)[0][0]
    least = 12
    for system in train:
        if (system.adsorbate, system.miller) == (asked.adsorbate, asked.miller):
            ways = list(renamings(system.slab_counts, dict(asked.slab)))
            changed = [sum(n for m, n in system.slab_counts.items() if w[m] != m) for w in ways]
            least = min([least, *changed])
    near = [
        s
        for s in train
        if (s.adsorbate, s.miller) == (asked.adsorbate, asked.miller)
        and any(
            sum(n for m, n in s.slab_counts.items() if w[m] != m) == least
            for w in renamings(s.slab_counts, dict(asked.slab))
        )
    ]
    nearest = min(near, key=lambda s: abs(s.known_energy - energy))
    np.testing.assert_allclose(first.frac[:12, :2], nearest.frac[:12, :2], atol=1e-9)
