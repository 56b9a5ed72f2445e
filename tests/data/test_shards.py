"""Shards hold exactly the systems that were written, for any number of readers."""

from __future__ import annotations

import pickle
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from catmllm.data.shards import Shards, map_arrays, write_arrays, write_shards
from catmllm.data.slabs import load_slabs, split
from catmllm.structure.system import System
from catmllm.structure.text import three_part_text
from tests.ranks import forks
from tests.structure.systems import slabs

SHIPPED = load_slabs()[::3]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return write_shards(tmp_path_factory.mktemp("shards"), SHIPPED, shard_size=300)


def _same(a: System, b: System) -> bool:
    arrays = all(
        np.array_equal(x, y) and x.dtype == y.dtype
        for x, y in zip((a.lattice, a.frac, a.numbers, a.tags), (b.lattice, b.frac, b.numbers, b.tags))
    )
    if a.start is None or b.start is None:
        arrays &= a.start is b.start
    else:
        arrays &= np.array_equal(a.start, b.start)
    rest = (a.adsorbate, a.miller, a.energy, a.sid) == (b.adsorbate, b.miller, b.energy, b.sid)
    return arrays and rest and type(a.energy) is type(b.energy)


def test_every_system_comes_back_bit_for_bit(shards: Shards) -> None:
    assert len(shards) == len(SHIPPED)
    assert len(list(shards.folder.glob("shard-*"))) == 4
    for i, system in enumerate(SHIPPED):
        assert _same(shards[i], system)
        assert shards.text(i) == three_part_text(system)
    assert _same(shards[-1], SHIPPED[-1])
    assert shards.n_atoms.tolist() == [len(s) for s in SHIPPED]
    assert shards.energies.tolist() == [s.energy for s in SHIPPED]


@given(st.lists(slabs(), max_size=5), st.integers(1, 3))
@settings(max_examples=15)
def test_generated_systems(
    tmp_path_factory: pytest.TempPathFactory, systems: list[System], size: int
) -> None:
    from dataclasses import replace

    named = [replace(s, sid=f"größe-{i}" * i, energy=0.1 * i) for i, s in enumerate(systems)]
    found = write_shards(tmp_path_factory.mktemp("made"), named, shard_size=size)
    assert len(found) == len(named)
    assert all(_same(a, b) for a, b in zip(found, named))


def test_slices_and_index_arrays_are_shards_again(shards: Shards) -> None:
    some = shards[10:700:7]
    assert isinstance(some, Shards)
    assert [s.sid for s in some] == [s.sid for s in SHIPPED[10:700:7]]
    twice = some[np.array([3, 0, 3])]
    assert [s.sid for s in twice] == [SHIPPED[31].sid, SHIPPED[10].sid, SHIPPED[31].sid]
    assert twice.n_atoms.tolist() == [len(SHIPPED[31]), len(SHIPPED[10]), len(SHIPPED[31])]
    with pytest.raises(IndexError):
        some[len(some)]


def test_a_system_owns_its_arrays(shards: Shards) -> None:
    shards[0].frac[:] = 7  # would fault, or change the file, were it a view of the map
    assert _same(shards[0], SHIPPED[0])


def test_split_is_that_of_the_list(shards: Shards) -> None:
    for seed in range(3):
        expected = split(SHIPPED, seed)
        for part, members in shards.split(seed).items():
            assert sorted(s.sid for s in members) == [s.sid for s in expected[part]]
            assert sum(members.n_atoms) == sum(len(s) for s in expected[part])


def _read(shards: Shards) -> list[float | None]:
    return [s.energy for s in shards]


def test_workers_read_a_pickled_dataset(shards: Shards) -> None:
    some = shards[5::40]
    assert len(pickle.dumps(shards)) < 1000
    with ProcessPoolExecutor(2, mp_context=forks()) as pool:
        assert pool.submit(_read, some).result() == [s.energy for s in SHIPPED[5::40]]


def test_files_are_plain_safetensors(shards: Shards) -> None:
    path = shards.folder / "shard-00001.safetensors"
    theirs, ours = load_file(path), map_arrays(path)
    assert theirs.keys() == ours.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], strict=True)


def test_unfinished_and_damaged_folders_say_so(shards: Shards, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no dataset.*dataset\.json.*catmllm data oc20"):
        Shards(tmp_path)
    whole = (shards.folder / "shard-00000.safetensors").read_bytes()
    for length in (0, 5, 500, len(whole) - 100):
        (tmp_path / "cut").write_bytes(whole[:length])
        with pytest.raises(ValueError, match="cut short"):
            map_arrays(tmp_path / "cut")


def test_a_failed_write_leaves_nothing_under_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_arrays(tmp_path / "a", {"x": np.zeros(3)})
    assert not (tmp_path / "a").exists()


def test_systems_without_label_are_refused(tmp_path: Path) -> None:
    from dataclasses import replace

    with pytest.raises(ValueError, match="no energy"):
        write_shards(tmp_path, [replace(SHIPPED[0], energy=None)])


def test_an_unknown_miller_index_stays_unknown(tmp_path: Path) -> None:
    from dataclasses import replace

    nameless = replace(SHIPPED[0], miller=None)
    (read,) = written = write_shards(tmp_path, [nameless])
    assert read.miller is None and read.identity == nameless.identity
    assert written.pair_names == [f"{nameless.bulk} (?)"]
