"""Splits by what a user names: nothing of a left-out name is in training, and a wrong name is an error."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from catmllm.config import DataConfig
from catmllm.data.open import open_data
from catmllm.data.shards import write_shards
from catmllm.data.slabs import load_slabs
from catmllm.data.splits import By, describe, parts_of
from catmllm.structure.system import System

SOME = load_slabs()[::12]
GROUPS = [s.sid[-1] for s in SOME]
NAMES = {
    "pair": lambda s: {f"{s.bulk} {s.miller}"},
    "metal": lambda s: set(s.slab_counts),
    "adsorbate": lambda s: {s.adsorbate},
    "formula": lambda s: {s.bulk},
}


def split(by: By, hold_out: Sequence[str] | None = None, seed: int = 0) -> list[str]:
    texts = [f"{s.adsorbate}</s>{s.bulk}" for s in SOME]
    return list(parts_of(texts, [f"{s.bulk} {s.miller}" for s in SOME], GROUPS, by, hold_out, seed))


@given(st.sampled_from(list(NAMES)), st.integers(0, 9), st.integers(0, len(SOME) - 1))
def test_what_is_held_out_tests_and_nothing_else(by: By, seed: int, at: int) -> None:
    name = sorted(NAMES[by](SOME[at]))[0]
    parts = split(by, [name], seed)
    assert [p == "test" for p in parts] == [name in NAMES[by](s) for s in SOME]


@given(st.sampled_from(list(NAMES)), st.integers(0, 9))
def test_groups_stay_whole(by: By, seed: int) -> None:
    parts: dict[frozenset[str], set[str]] = {}
    for system, part in zip(SOME, split(by, None, seed)):
        parts.setdefault(frozenset(NAMES[by](system)), set()).add(part)
    assert all(len(some) == 1 for some in parts.values())


def test_a_name_that_no_system_has() -> None:
    with pytest.raises(ValueError, match=r"hold_out: Pd9`: no system has it; there are"):
        split("formula", ["Pd9"])
    with pytest.raises(ValueError, match=r"have no value; `catmllm data import --group"):
        parts_of(["CO</s>Pt"], ["Pt (1, 1, 1)"], [""], "column", None, 0)


def test_a_column_of_parts_with_another_value() -> None:
    """Taken as groups, all of `train` could become the test set."""
    texts, pairs = ["CO</s>Pt"] * 3, ["Pt (1, 1, 1)"] * 3
    assert parts_of(texts, pairs, ["train ", "Val", "test"], "column", None, 0) == ["train", "val", "test"]
    with pytest.raises(ValueError, match="and also validate; give every system"):
        parts_of(texts, pairs, ["train", "validate", "test"], "column", None, 0)


def test_a_folder_by_metal_and_by_column(tmp_path: Path) -> None:
    groups = ["Test" if s.adsorbate == "H" else "valid" if s.adsorbate == "C" else "train" for s in SOME]
    write_shards(tmp_path / "mine", SOME, groups=groups)

    def names(**keys: object) -> dict[str, list[System]]:
        parts = open_data(DataConfig(path=str(tmp_path / "mine"), **keys))  # type: ignore[arg-type]
        assert sum(map(len, parts.values())) == len(SOME)
        return {part: list(some) for part, some in parts.items()}

    metal = names(split_by="metal", hold_out=("Pt",))
    assert all("Pt" in s.slab_counts for s in metal["test"]) and metal["val"]
    assert not any("Pt" in s.slab_counts for s in metal["train"] + metal["val"])
    column = names(split_by="column")
    assert {s.adsorbate for s in column["test"]} == {"H"} and {s.adsorbate for s in column["val"]} == {"C"}


def test_the_shipped_ones_by_adsorbate() -> None:
    parts = open_data(DataConfig(split_by="adsorbate", hold_out=("OH", "CH")))
    assert {s.adsorbate for s in parts["test"]} == {"OH", "CH"} and len(parts["train"]) > 1000
    assert "OH, CH" in describe("adsorbate", ("OH", "CH"), 0)
