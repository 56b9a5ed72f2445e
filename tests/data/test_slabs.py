"""The shipped systems and their split."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.geometry import get_distances

from catmllm.data.slabs import (
    SHIPPED,
    SHIPPED_SEVENNET,
    WIDE,
    WIDE_SEED,
    load_slabs,
    on_fcc_slab,
    slab_id,
    split,
)
from catmllm.data.surfaces import ADSORBATES, METALS
from catmllm.structure.system import System

SYSTEMS = load_slabs()
OTHERS = load_slabs(WIDE)


def _pairs(systems: list[System]) -> set[tuple[str, tuple[int, int, int] | None]]:
    return {(system.bulk, system.miller) for system in systems}


def _records(path: Path = SHIPPED) -> list[dict]:
    with gzip.open(path, "rt") as lines:
        return [json.loads(line) for line in lines]


def test_every_usable_record_is_there_unchanged() -> None:
    records = [record for record in _records() if record["ok"]]
    assert len(SYSTEMS) == len(records) == 2992
    assert len(load_slabs(SHIPPED_SEVENNET)) == 2973
    assert len({slab_id(system) for system in SYSTEMS}) == 376
    for system, record in list(zip(SYSTEMS, records))[::7]:
        assert system.sid == record["sid"]
        assert slab_id(system) == f"7net-{record['slab']}"
        assert system.symbols == record["symbols"]
        assert system.tags.tolist() == record["tags"]
        assert (system.adsorbate, system.energy) == (record["adsorbate"], record["energy"])
        assert list(system.miller or ()) == record["miller"]
        # the same crystal: ASE's distances, with periodic images, of the record as it stands
        cell, positions = record["cell"], np.array(record["pos"])
        expected = get_distances(positions, cell=cell, pbc=True)[1]
        np.testing.assert_allclose(system.as_ase().get_all_distances(mic=True), expected, atol=1e-8)


def test_names_of_alloys_are_one_whatever_the_record_says() -> None:
    names = {record["sid"]: record["bulk"] for record in _records()}
    for system in SYSTEMS[::11]:
        assert (
            Atoms(names[system.sid]).symbols.formula.reduce()[0].count()
            == Atoms(system.bulk).symbols.formula.count()
        )
    both = {(s.bulk, names[s.sid]) for s in SYSTEMS if s.slab_formula.count("6") == 2}
    assert len(both) > len({bulk for bulk, _ in both})  # some alloy stands under two names in the file


def test_split_keeps_pairs_whole_and_sizes_right() -> None:
    for seed in range(20):
        parts = split(SYSTEMS, seed)
        assert sorted(s.sid for part in parts.values() for s in part) == sorted(s.sid for s in SYSTEMS)
        train, val, test = (_pairs(parts[name]) for name in ("train", "val", "test"))
        assert not (train & val or train & test or val & test)
        shares = [len(parts[name]) / len(SYSTEMS) for name in ("train", "val", "test")]
        assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.02)


def test_no_slab_of_the_test_set_has_a_twin_in_training() -> None:
    def metal(system: System) -> str:
        rounded = np.round(system.positions[system.tags != 2], 2) + 0.0
        return f"{system.symbols[:12]} {np.round(system.lattice, 2).tolist()} {rounded.tolist()}"

    parts = split(SYSTEMS)
    assert not {metal(s) for s in parts["test"]} & {metal(s) for s in parts["train"]}


def test_split_does_not_depend_on_file_order_but_on_the_seed() -> None:
    shuffled = SYSTEMS.copy()
    random.Random(0).shuffle(shuffled)
    first, second = split(SYSTEMS, 5), split(shuffled, 5)
    for one, other in zip(first.values(), second.values()):
        assert [s.sid for s in one] == [s.sid for s in other]
    assert _pairs(split(SYSTEMS, 6)["test"]) != _pairs(first["test"])


def test_split_is_the_same_everywhere() -> None:
    """Figures of two machines compare only if this never changes."""

    def digest(systems: list[System]) -> str:
        test = " ".join(system.sid for system in split(systems)["test"])
        return hashlib.sha256(test.encode()).hexdigest()[:16]

    assert digest(SYSTEMS) == "1fc10c903eee0a54"
    assert digest(load_slabs(SHIPPED_SEVENNET)) == "1f8093f20f447c04"
    assert _pairs(split(SYSTEMS)["test"]) == _pairs(split(load_slabs(SHIPPED_SEVENNET))["test"])


def test_the_wide_file_has_what_the_page_says() -> None:
    """Every record counts or says why not; slabs are those of the seed, from the first on, whole."""
    records = _records(WIDE)
    reasons = Counter(record["reason"] for record in records)
    assert all(record["ok"] == (record["reason"] is None) for record in records)
    assert reasons[None] == len(OTHERS) > 0.8 * len(records)
    assert set(reasons) <= {
        None, "slab", "not_converged", "energy_out_of_range", "failed", "broken", "detached", "buried",
        "overlap", "squeezed",
    }  # fmt: skip
    slabs = dict.fromkeys(record["slab"] for record in records)
    assert list(slabs) == [f"p{WIDE_SEED}-{k}" for k in range(len(slabs))]
    assert [r["sid"] for r in records] == [f"diep-{slab}-{k}" for slab in slabs for k in range(8)]
    assert {s.adsorbate for s in OTHERS} == set(ADSORBATES)
    assert {e for s in OTHERS for e in s.slab_counts} == set(METALS)
    assert all(record["frames"] for record in records if record["ok"])
    for system in OTHERS[::50]:
        assert system.start is not None and np.isfinite(system.known_energy)


@pytest.mark.parametrize("seed", range(5))
def test_the_full_set_keeps_every_pair_where_the_first_has_it(seed: int) -> None:
    """So what is trained on all is tested on the named systems without having seen their pairs."""
    alone, parts = split(SYSTEMS, seed), split(SYSTEMS + OTHERS, seed, len(SYSTEMS))
    train, val, test = (_pairs(parts[name]) for name in ("train", "val", "test"))
    assert not (train & val or train & test or val & test)
    for name, systems in alone.items():
        assert [s.sid for s in parts[name] if on_fcc_slab(s)] == [s.sid for s in systems]
    assert sorted(s.sid for p in parts.values() for s in p) == sorted(s.sid for s in SYSTEMS + OTHERS)
    shares = [len(parts[name]) / len(SYSTEMS + OTHERS) for name in ("train", "val", "test")]
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.02)
    assert {s.adsorbate for s in parts["train"]} == set(ADSORBATES)


def test_the_order_of_a_split_by_steps_does_not_count() -> None:
    shuffled = OTHERS.copy()
    random.Random(0).shuffle(shuffled)
    first, second = (split(SYSTEMS + some, 1, len(SYSTEMS)) for some in (OTHERS, shuffled))
    assert {k: [s.sid for s in v] for k, v in first.items()} == {
        k: [s.sid for s in v] for k, v in second.items()
    }


def test_few_systems() -> None:
    assert split([]) == {"train": [], "val": [], "test": []}
    assert {name: len(part) for name, part in split(SYSTEMS[:8]).items()} == {"train": 8, "val": 0, "test": 0}


def test_bad_records_are_named(tmp_path: Path) -> None:
    record = _records()[0]
    path = tmp_path / "systems.jsonl"
    path.write_text(json.dumps(record) + "\n\n" + json.dumps(record | {"ok": False}) + "\n")
    assert [system.sid for system in load_slabs(path)] == [record["sid"]]
    without_cell = {key: value for key, value in record.items() if key != "cell"}
    for bad, message in (
        (without_cell, "lacks 'cell'"),
        (record | {"symbols": ["Xx"] * 14}, "'Xx' is no element"),
        (record | {"cell": [[0, 1, 0], [1, 0, 0], [0, 0, 9]]}, "left-handed"),
        (record | {"tags": [0]}, "one of each an atom"),
    ):
        path.write_text(json.dumps(record) + "\n" + json.dumps(bad) + "\n")
        with pytest.raises(ValueError, match=rf"systems\.jsonl, line 2: .*{message}"):
            load_slabs(path)
    path.write_text("{broken\n")
    with pytest.raises(ValueError, match="line 1"):
        load_slabs(path)
