"""Training slabs with other elements: what an exchange keeps, and which come first."""

from __future__ import annotations

from collections import Counter
from itertools import product
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from catmllm.design.analogues import analogues, renamings
from catmllm.structure.formula import parse_identity
from catmllm.structure.system import System


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
