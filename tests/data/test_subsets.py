"""Parts of the training systems: nested, whole, the same from a list and from shards."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from catmllm.config import ConfigError, DataConfig
from catmllm.data.open import open_data
from catmllm.data.shards import write_shards
from catmllm.data.subsets import Permuted, of_generation, of_property, part
from catmllm.structure.system import System


def sids(systems) -> list[str]:
    return [s.sid for s in systems]


@pytest.mark.parametrize("unit", ["system", "pair"])
def test_shares_are_nested_and_adjoining_parts_are_all(train_systems: list[System], unit) -> None:
    shares = [{*sids(part(train_systems, (0.0, x), 0, unit))} for x in (0.125, 0.25, 0.5, 1.0)]
    for x, smaller, larger in zip((0.125, 0.25, 0.5), shares, shares[1:]):
        assert smaller < larger
        # a pair is in by its middle, so that half of the largest may be too many or too few
        slack = 1 if unit == "system" else 60
        assert abs(len(smaller) - x * len(train_systems)) <= slack
    ends = (0.0, 0.2, 0.7, 1.0)
    parts = [sids(part(train_systems, pair, 0, unit)) for pair in pairwise(ends)]
    assert sorted(sid for some in parts for sid in some) == sorted(sids(train_systems))
    assert sids(part(train_systems, (0.2, 0.7), 1, unit)) != parts[1]
    order = {sid: i for i, sid in enumerate(sids(train_systems))}
    assert all([order[s] for s in some] == sorted(order[s] for s in some) for some in parts)
    if unit == "pair":
        names = [{f"{s.bulk} {s.miller}" for s in train_systems if s.sid in {*some}} for some in parts]
        assert not names[0] & names[1] and not names[1] & names[2]


def test_shards_and_a_list_have_the_same_parts(train_systems: list[System], tmp_path: Path) -> None:
    some = train_systems[::12]
    shards = write_shards(tmp_path, some, shard_size=50)
    for unit in ("system", "pair"):
        for ends in ((0.0, 0.3), (0.3, 1.0)):
            assert sids(part(shards, ends, 4, unit)) == sids(part(some, ends, 4, unit))  # type: ignore[arg-type]


def test_the_configuration_says_who_learns_what() -> None:
    config = DataConfig(share=0.5, property=(0.0, 0.5), generation=(0.5, 1.0))
    whole, data = open_data()["train"], open_data(config)
    train = data["train"]
    assert {*sids(train)} < {*sids(whole)} and len(train) == round(len(whole) / 2)
    assert sids(data["test"]) == sids(open_data()["test"])
    known, shown = of_property(train, config), of_generation(train, config)
    assert not {*sids(known)} & {*sids(shown)} and len(known) + len(shown) == len(train)
    plain = DataConfig()
    assert of_property(train, plain) is train and of_generation(train, plain) is train


def test_permuted_energies_are_those_of_others(train_systems: list[System]) -> None:
    some = of_generation(train_systems[:400], DataConfig(permute=True))
    assert isinstance(some, Permuted) and len(some) == 400
    moved = 0
    for name in {s.adsorbate for s in train_systems[:400]}:
        rows = [i for i in range(400) if some[i].adsorbate == name]
        now, before = ([of[i].known_energy for i in rows] for of in (some, train_systems))
        assert sorted(now) == sorted(before)
        moved += sum(a != b for a, b in zip(now, before))
    assert moved > 300
    assert all(np.array_equal(a.frac, b.frac) and a.sid == b.sid for a, b in zip(some[:20], train_systems))
    again = of_generation(train_systems[:400], DataConfig(permute=True))
    assert [s.energy for s in again] == [s.energy for s in some]


def test_a_part_that_is_none_is_told(train_systems: list[System]) -> None:
    with pytest.raises(ValueError, match=r"`data.share`: none of 10 training systems"):
        part(train_systems[:10], (0.0, 0.01), 0, "system", "data.share")
    for values in ({"property": (0.5, 0.5)}, {"generation": (0.5, 1.5)}):
        with pytest.raises(ConfigError, match=r"two shares"):
            DataConfig(**values)  # type: ignore[arg-type]
