"""Every layout of OC20 gives the same systems; what cannot be read is told and counted,
and no pickle is run."""

from __future__ import annotations

import gzip
import io
import lzma
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
from ase.data import covalent_radii
from ase.geometry import get_distances
from hypothesis import given, settings
from hypothesis import strategies as st

from catmllm.data.oc20 import metadata
from catmllm.data.oc20.pickles import BrokenPickle, RefusedPickle, fields, load_pickle
from catmllm.data.oc20.process import Count, Drop, Rules, entries, to_entry
from catmllm.data.oc20.readers import Problem, Record, Unit, find_files, read, units
from catmllm.structure.system import System
from tests.data import oc20_files as made

pytest.importorskip("torch_geometric", reason="extra dev")
pytest.importorskip("ase_db_backends", reason="extra dev")

CASES = made.cases()
LAYOUTS: dict[str, Callable[[Path], Path]] = {
    "is2re, PyG 2": lambda d: made.write_pyg_lmdb(d / "a.lmdb", CASES),
    "is2re, PyG 1": lambda d: made.write_pyg_lmdb(d / "a.lmdb", CASES, old=True),
    "s2ef, PyG 2": lambda d: made.write_pyg_lmdb(d / "a.lmdb", CASES, "s2ef"),
    "s2ef, PyG 1": lambda d: made.write_pyg_lmdb(d / "a.lmdb", CASES, "s2ef", old=True),
    "aselmdb": lambda d: made.write_database(d / "a.aselmdb", CASES),
    "sqlite": lambda d: made.write_database(d / "a.db", CASES),
    "json": lambda d: made.write_database(d / "a.json", CASES),
    "s2ef frames": lambda d: made.write_frames(d, CASES),
    "s2ef frames, unpacked": lambda d: made.write_frames(d, CASES, packed=False),
    "relaxations": lambda d: made.write_relaxations(d, CASES),
    "trajectories": lambda d: made.write_trajectories(d, CASES),
}


def _table(folder: Path, *contents: Any) -> metadata.Metadata:
    files = [made.dump(c, folder / f"mapping{i}.pkl") for i, c in enumerate(contents)]
    metadata.build(files, folder / "table")
    return metadata.Metadata(folder / "table")


def _read_all(path: Path) -> list[Record | Problem]:
    return [
        item
        for unit in units(find_files([path]))
        for item in (read(unit) if isinstance(unit, Unit) else [unit])
    ]


def _systems(path: Path, table: metadata.Metadata) -> list[System]:
    count = Count()
    found = entries(_read_all(path), table, Rules(), False, count)
    assert not [reason for reason in count.dropped if reason != "earlier frame"], count.examples
    return sorted((e.system for e in found), key=lambda s: s.sid)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_systems(layout: str, tmp_path: Path) -> None:
    table = _table(tmp_path, made.mapping(CASES))
    systems = _systems(LAYOUTS[layout](tmp_path), table)
    assert len(systems) == len(CASES)
    for system, case in zip(systems, CASES):
        order = np.argsort(case.atoms.get_tags() == 2, kind="stable")
        atoms = case.atoms[order]
        assert (system.sid, system.adsorbate, system.miller) == (
            f"random{case.sid}",
            case.adsorbate,
            case.miller,
        )
        assert system.energy == pytest.approx(case.energy, abs=1e-6)
        assert system.numbers.tolist() == atoms.numbers.tolist()
        assert system.tags.tolist() == atoms.get_tags().tolist()
        expected = get_distances(atoms.positions, cell=atoms.cell, pbc=True)[1]
        found = get_distances(system.positions, cell=system.lattice, pbc=True)[1]
        np.testing.assert_allclose(found, expected, atol=2e-5)  # LMDBs hold float32


def test_lmdbs_are_read_where_torch_is_not_installed(tmp_path: Path) -> None:
    path = made.write_pyg_lmdb(tmp_path / "a.lmdb", CASES)
    program = (
        "import sys; sys.modules['torch'] = sys.modules['torch_geometric'] = None\n"
        "from catmllm.data.oc20.readers import Unit, read\n"
        f"print([r.energy for r in read(Unit(({str(path)!r},)))])"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert sorted(eval(found.stdout)) == sorted(c.energy for c in CASES)


def test_units_cover_every_record_once(tmp_path: Path) -> None:
    for path in (
        made.write_pyg_lmdb(tmp_path / "a.lmdb", CASES),
        made.write_database(tmp_path / "a.aselmdb", CASES),
        made.write_database(tmp_path / "a.db", CASES),
    ):
        pieces = list(units([path], records=5))
        assert len(pieces) == 3
        sids = [r.sid for u in pieces if isinstance(u, Unit) for r in read(u) if isinstance(r, Record)]
        assert sorted(sids) == sorted(f"random{c.sid}" for c in CASES)


# --------------------------------------------------------------------------- real data


def _real(shared: Path) -> list[Any]:
    text = gzip.decompress((shared / "data/oc20/oc20_30_init_relaxed.extxyz.gz").read_bytes()).decode()
    return ase.io.read(io.StringIO(text), ":", format="extxyz")


def test_thirty_real_relaxations_in_two_layouts(shared: Path, tmp_path: Path) -> None:
    relaxed = {a.info["sid"]: a for a in _real(shared)[1::2]}
    frames = [
        r for r in _read_all(shared / "data/oc20/oc20_30_init_relaxed.extxyz.gz") if isinstance(r, Record)
    ]
    rows = [r for r in _read_all(shared / "data/oc20/oc20_is2re_layout_30.lmdb") if isinstance(r, Record)]
    assert len(frames) == len(rows) == len(relaxed) == 30
    assert {r.sid for r in rows} == {r.sid for r in frames} == set(relaxed)
    # metadata as a mapping would give it; these energies are total ones
    known = {
        r.sid: {"ads_symbols": f"*{a[a.get_tags() == 2].get_chemical_formula()}", "miller_index": (1, 0, 0)}
        for r in frames
        for a in [relaxed[r.sid]]
    }
    table = _table(tmp_path, known, {r.sid: (r.energy or 0.0) + 1.5 for r in frames})
    free = Rules(fmax=np.inf, total_energies=True)
    of_rows = {e.system.sid: e for e in entries(rows, table, free, False, Count())}
    of_frames = {e.system.sid: e for e in entries(frames, table, free, False, Count())}
    assert len(of_rows) == len(of_frames) == 30
    for sid, one in of_rows.items():
        a, b = one.system, of_frames[sid].system
        assert one.text == of_frames[sid].text
        assert a.energy == pytest.approx(-1.5, abs=1e-6) and b.energy == pytest.approx(-1.5, abs=1e-6)
        assert a.numbers.tolist() == b.numbers.tolist() and a.tags.tolist() == b.tags.tolist()
        np.testing.assert_allclose(a.lattice, b.lattice, atol=1e-5)
        np.testing.assert_allclose(a.positions, b.positions, atol=5e-5)
        first = relaxed[sid]
        order = np.argsort(first.get_tags() == 2, kind="stable")
        expected = get_distances(first.positions[order], cell=first.cell, pbc=True)[1]
        np.testing.assert_allclose(
            get_distances(b.positions, cell=b.lattice, pbc=True)[1], expected, atol=1e-6
        )


def test_forces_of_real_frames_leave_fixed_atoms_out(shared: Path) -> None:
    frames = {
        r.sid: r
        for r in _read_all(shared / "data/oc20/oc20_30_init_relaxed.extxyz.gz")
        if isinstance(r, Record)
    }
    for atoms in _real(shared)[1::2]:
        forces = atoms.get_forces()  # ASE sets those of fixed atoms to zero
        assert frames[atoms.info["sid"]].fmax == pytest.approx(np.linalg.norm(forces, axis=1).max(), abs=1e-9)


def test_sixteen_real_oc22_records(shared: Path) -> None:
    records = [r for r in _read_all(shared / "data/oc20/oc22_s2ef_16.pkl") if isinstance(r, Record)]
    assert len(records) == 16
    for record in records:
        assert record.sid.startswith("oc22-") and not record.referenced and record.fmax is not None
        with pytest.raises(Drop, match="total energy"):
            to_entry(replace(record, miller=(1, 1, 1), fmax=0.0), None, Rules())
        known = replace(record, miller=(1, 1, 1), fmax=0.0, reference=record.energy)
        try:
            system = to_entry(known, None, Rules()).system
        except Drop as drop:
            assert drop.reason == "no adsorbate" and not (record.tags == 2).any()
            continue
        assert system.energy == 0.0
        assert (np.diff((system.tags == 2).astype(int)) >= 0).all()  # slab first, adsorbate last
        assert sum(system.tags == 2) == sum(record.tags == 2)


# --------------------------------------------------------------------------- what is derived


def test_tags_and_adsorbate_are_derived_from_each_other(tmp_path: Path) -> None:
    table = _table(tmp_path, made.mapping(CASES))
    whole = {
        r.sid: r for r in _read_all(made.write_pyg_lmdb(tmp_path / "a.lmdb", CASES)) if isinstance(r, Record)
    }
    for case in CASES:
        record = whole[f"random{case.sid}"]
        expected = to_entry(record, table, Rules())
        for tags in (None, np.zeros_like(record.tags)):
            untagged = to_entry(replace(record, tags=tags), table, Rules())
            assert (untagged.system.tags == 2).tolist() == (expected.system.tags == 2).tolist()
            assert untagged.text == expected.text
        nameless = to_entry(replace(record, miller=case.miller), None, Rules())
        assert nameless.text == expected.text and nameless.system.adsorbate == case.adsorbate


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"positions": np.full((14, 3), np.nan)}, "not finite"),
        ({"lattice": np.full((3, 3), np.inf)}, "not finite"),
        ({"energy": float("nan")}, "not finite"),
        ({"energy": None}, "incomplete"),
        ({"energy": -310.0}, "implausible energy"),
        ({"referenced": False}, "no reference energy"),
        ({"fmax": 0.2}, "unconverged"),
        ({"fmax": float("nan")}, "unconverged"),
        ({"positions": np.zeros((13, 3))}, "incomplete"),
        ({"positions": np.ones((14, 3))}, "overlapping atoms"),
        ({"tags": np.zeros(3, np.int8)}, "incomplete"),
        ({"tags": np.full(14, 2, np.int8)}, "mapping disagrees"),
        ({"numbers": np.full(14, 200)}, "mapping disagrees"),
        ({"lattice": np.diag([1.0, 1, -1])}, "left-handed cell"),
        ({"lattice": np.zeros((3, 3))}, "bad structure"),
        ({"sid": "random9"}, "not in the mapping"),
    ],
)
def test_a_record_that_is_dropped_says_why(change: dict[str, Any], reason: str, tmp_path: Path) -> None:
    table = _table(tmp_path, made.mapping(CASES))
    case = CASES[0]
    record = Record(
        f"random{case.sid}",
        case.atoms.cell[:],
        case.atoms.positions,
        case.atoms.numbers,
        case.atoms.get_tags().astype(np.int8),
        case.energy,
        referenced=True,
    )
    assert to_entry(record, table, Rules()).system.energy == case.energy
    with pytest.raises(Drop) as drop:
        to_entry(replace(record, **change), table, Rules())
    assert drop.value.reason == reason


@pytest.mark.parametrize(("anomaly", "reason"), metadata.ANOMALIES.items())
def test_anomalies(anomaly: int, reason: str, tmp_path: Path) -> None:
    table = _table(tmp_path, made.mapping(CASES, anomaly=anomaly))
    record = next(
        r for r in _read_all(made.write_pyg_lmdb(tmp_path / "a.lmdb", CASES)) if isinstance(r, Record)
    )
    with pytest.raises(Drop) as drop:
        to_entry(record, table, Rules())
    assert drop.value.reason == reason
    if anomaly == 3:
        assert to_entry(record, table, Rules(keep_reconstructed=True)).system.sid == record.sid


def test_derived_names_agree_with_ase_connectivity() -> None:
    from ase.build import molecule

    from catmllm.data.oc20.process import adsorbate_name

    for species, name in (
        ("CH3CH2OH", "CH3CH2OH"),
        ("H2", "H2"),
        ("CH3OH", "CH3OH"),
        ("N2", "NN"),
        ("H2O", "OH2"),
    ):
        body = molecule(species, vacuum=6.0)
        order = np.argsort(body.numbers == 1, kind="stable")
        if species == "CH3CH2OH":
            heavy = [i for i in order if body.numbers[i] != 1]
            ends = sorted(heavy, key=lambda i: (body.numbers[i] == 8, _hydrogens(body, i) != 3))
            order = [*ends, *(i for i in order if body.numbers[i] == 1)]
        body = body[list(order)]
        record = Record("x", body.cell[:], body.positions, body.numbers, np.full(len(body), 2, np.int8))
        assert record.tags is not None and adsorbate_name(record, record.tags) == name


def _hydrogens(body: Any, i: int) -> int:
    reach = covalent_radii[body.numbers] + covalent_radii[body.numbers[i]] + 0.1
    return int(((body.get_distances(i, range(len(body))) < reach) & (body.numbers == 1)).sum())


# --------------------------------------------------------------------------- mappings


def test_mappings_of_oc20_dense_join(tmp_path: Path) -> None:
    entry = {
        "mpid": "mp-1",
        "miller_idx": (2, 1, -1),
        "shift": 0.0,
        "top": False,
        "adsorbate": "*CO",
        "adsorption_site": ((1.0, 2.0, 3.0),),
    }
    table = _table(
        tmp_path,
        {
            7: entry | {"system_id": "72_2_3", "config_id": "heur4"},
            8: entry | {"system_id": "72_2_3", "config_id": "r1"},
        },
        {"72_2_3": [("heur4", -1.25)]},
        {"72_2_3": -300.5},
        {"72_2_3": [0, 1, 2, 2]},
    )
    by_number, by_name = table.find("dense:random7"), table.find("dense:72_2_3/heur4")
    assert by_number is not None and by_name is not None and by_number.sid == by_name.sid == "72_2_3/heur4"
    downloaded = table.find("dense:72_2_3/72_2_3_heur4")
    assert downloaded is not None and downloaded.sid == by_name.sid
    assert (by_number.adsorbate, by_number.miller, by_number.target) == ("CO", (2, 1, -1), -1.25)
    assert (
        by_number.reference == -300.5
        and by_number.tags is not None
        and by_number.tags.tolist() == [0, 1, 2, 2]
    )
    other = table.find("dense:random8")
    assert other is not None and other.target is None
    assert table.find("random7") is None and table.find("dense:random77777777777777777777777777") is None


@pytest.mark.parametrize(
    "content", [[1, 2], {}, {"a": "b"}, {"a": {"b": 1}}, {"a": [[]]}, {"random1": {"ads_symbols": "*O"}}]
)
def test_a_wrong_mapping_is_an_error_that_names_it(content: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"mapping0\.pkl: no mapping of OC20"):
        _table(tmp_path, content)


# --------------------------------------------------------------------------- damage and malice


class _Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch hostile-was-run",)


def test_hostile_pickles_are_named_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    good = [made.pyg_pickle(made.pyg_fields(c, "is2re"), False) for c in CASES[:2]]
    inside = pickle.dumps({"pos": _Hostile()})
    made.write_lmdb(tmp_path / "a.lmdb", [good[0], pickle.dumps(_Hostile()), inside, good[1]])
    found = _read_all(tmp_path / "a.lmdb")
    refused = [item for item in found if isinstance(item, Problem)]
    assert [p.reason for p in refused] == ["refused pickle"] * 2
    assert all("posix.system" in p.message and "a.lmdb, key" in p.message for p in refused)
    assert sum(isinstance(item, Record) for item in found) == 2
    made.dump({"random1": _Hostile()}, tmp_path / "mapping.pkl")
    with pytest.raises(ValueError, match=r"mapping\.pkl.*posix\.system"):
        metadata.build([tmp_path / "mapping.pkl"], tmp_path / "table")
    made.dump(_Hostile(), tmp_path / "b.pkl")
    assert [item.reason for item in _read_all(tmp_path / "b.pkl") if isinstance(item, Problem)] == [
        "refused pickle"
    ]
    assert not (tmp_path / "hostile-was-run").exists()


@pytest.mark.parametrize(
    "name", ["builtins.eval", "builtins.getattr", "torch.load", "numpy.load", "torch.storage.os"]
)
def test_only_listed_names_pass(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    with pytest.raises(RefusedPickle, match=rf"names {name}"):
        load_pickle(f"c{module}\n{attribute}\n.".encode())


class _ObjectsWithoutFlags:
    """numpy.dtype(object), told by its state to hold no references."""

    def __reduce__(self) -> tuple[Any, ...]:
        return np.dtype, ("O8", False, True), (3, "|", None, None, None, -1, -1, 0)


class _Made:
    """What a pickle makes by calling `what`, and of its state."""

    def __init__(self, what: Any, arguments: tuple[Any, ...], *state: Any) -> None:
        self.reduced = what, arguments, *state

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


def test_bytes_of_a_file_never_count_as_addresses_of_objects() -> None:
    """NumPy took them for such, and died of it or made an object of the file's choice."""
    multiarray = np._core.multiarray  # type: ignore[attr-defined]
    dtype, address = _ObjectsWithoutFlags(), b"\x10" * 8
    for hostile in (
        _Made(multiarray._reconstruct, (np.ndarray, (0,), b"b"), (1, (1,), dtype, False, address)),
        _Made(multiarray.scalar, (dtype, address)),
        np.array([None]),
        np.zeros(1, "i4,f8"),
    ):
        for protocol in (2, 5):
            with pytest.raises(RefusedPickle, match=r"holds an array of .*, not of plain values"):
                load_pickle(pickle.dumps(hostile, protocol))


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize("dtype", ["<f4", ">f8", "<i8", "u1", "?", "<U3", "S2"])
def test_plain_arrays_come_as_they_were_pickled(dtype: str, protocol: int) -> None:
    for array in (np.arange(6).reshape(2, 3).astype(dtype), np.arange(6).reshape(3, 2).T.astype(dtype)):
        for value in (array, array[0, 1]):
            found = load_pickle(pickle.dumps(value, protocol))
            assert found.dtype == value.dtype.newbyteorder("=") or found.dtype == value.dtype
            np.testing.assert_array_equal(found, value)


@given(st.integers(0, 10**6), st.binary(min_size=1, max_size=4), st.booleans())
@settings(max_examples=300)
def test_a_damaged_pickle_is_an_error_and_nothing_else(at: int, junk: bytes, cut: bool) -> None:
    at %= len(_PICKLE)
    damaged = _PICKLE[:at] if cut else _PICKLE[:at] + junk + _PICKLE[at + len(junk) :]
    try:
        values = fields(load_pickle(damaged))
    except ValueError:
        return
    for value in values.values():
        if isinstance(value, np.ndarray):
            value.sum()  # reads every byte: a tensor that lies about its shape must not get here


_PICKLE = made.pyg_pickle(made.pyg_fields(CASES[0], "s2ef"), False)


def test_a_tensor_that_reaches_beyond_its_storage_is_refused() -> None:
    import torch

    data = pickle.dumps({"pos": torch.arange(6.0).reshape(2, 3)})
    for good, bad in ((b"K\x02K\x03\x86", b"K\x02K\xff\x86"), (b"K\x03K\x01\x86", b"K\xffK\x01\x86")):
        assert good in data
        with pytest.raises(BrokenPickle, match="does not fit"):
            load_pickle(data.replace(good, bad))


def test_truncated_and_foreign_files_are_told(tmp_path: Path) -> None:
    whole = made.write_pyg_lmdb(tmp_path / "whole.lmdb", CASES).read_bytes()
    frames = made.write_frames(tmp_path, CASES)
    text = lzma.decompress(frames.read_bytes())
    broken = {
        "half.lmdb": whole[: len(whole) // 2],
        "page.lmdb": whole[:-4096],
        "empty.lmdb": b"",
        "text.lmdb": b"no lmdb at all" * 1000,
        "half.aselmdb": whole[: len(whole) // 3],
        "text.db": b"no database" * 500,
        "text.json": b"{]",
        "text.traj": b"no trajectory" * 10,
        "text.pkl": b"no pickle",
        "random5.extxyz.xz": frames.read_bytes()[:-200],
        "random6.extxyz": text[: len(text) - 300],
        "random7.extxyz": b"Dear reader\n",
    }
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
        found = _read_all(tmp_path / name)
        assert len(found) == 1 and isinstance(found[0], Problem), (name, found)
        assert found[0].reason in ("unreadable file", "unreadable record") and name in found[0].message


def test_damaged_rows_cost_only_themselves(tmp_path: Path) -> None:
    good = [made.pyg_pickle(made.pyg_fields(c, "is2re"), False) for c in CASES[:3]]
    lacking = made.pyg_pickle(
        {k: v for k, v in made.pyg_fields(CASES[3], "is2re").items() if k != "cell"}, False
    )
    rows = [good[0], good[1][:-50], b"", b"\x78\x9cgarbage", lacking, pickle.dumps([1, 2]), good[2]]
    found = _read_all(made.write_lmdb(tmp_path / "a.lmdb", rows))
    assert [item.reason if isinstance(item, Problem) else "" for item in found] == [
        "",
        "unreadable record",
        "unreadable record",
        "unreadable record",
        "incomplete",
        "unreadable record",
        "",
    ]


def test_a_text_index_that_does_not_fit_is_told(tmp_path: Path) -> None:
    path = made.write_frames(tmp_path, CASES, packed=False)
    index = (tmp_path / "0.txt").read_text()
    for wrong, problem in (
        (index.replace(",", ";"), "no index"),
        (index[: len(index) // 2].rpartition("\n")[0], "ends at"),
    ):
        (tmp_path / "0.txt").write_text(wrong)
        assert any(isinstance(item, Problem) and problem in item.message for item in _read_all(path))


def test_frames_are_counted_and_a_quoted_sid_is_whole(tmp_path: Path) -> None:
    """`my slab a` and `my slab b` were both `my`, and what was not the last frame of `my` was gone."""
    frames = [c.calculated(step) for step in (0.5, 0.0) for c in CASES[:3]]
    for atoms, sid in zip(frames, ["my slab a", "my slab b", "7"] * 2):
        atoms.info["sid"] = sid
    ase.io.write(tmp_path / "some.extxyz", frames)
    found = _read_all(tmp_path / "some.extxyz")
    assert [r.sid for r in found if isinstance(r, Record)] == ["my slab a", "my slab b", "random7"]
    problems = [p for p in found if isinstance(p, Problem)]
    assert [p.reason for p in problems] == ["earlier frame"] * 3
    assert "some.extxyz, my slab a frame 0" in problems[0].message


def test_an_lmdb_may_be_a_folder(tmp_path: Path) -> None:
    import lmdb

    rows = [made.pyg_pickle(made.pyg_fields(c, "is2re"), False) for c in CASES]
    with (
        lmdb.open(str(tmp_path / "a.lmdb"), map_size=1 << 24) as environment,
        environment.begin(write=True) as t,
    ):
        for i, row in enumerate(rows):
            t.put(b"%d" % i, row)
    for source in (tmp_path / "a.lmdb", tmp_path):
        assert sum(isinstance(item, Record) for item in _read_all(source)) == len(CASES)


def test_sources_that_cannot_be() -> None:
    for source, problem in (
        ("nowhere", "does not exist"),
        (__file__, "no known kind"),
        (Path(__file__).parent, "no file"),
    ):
        with pytest.raises(ValueError, match=problem):
            find_files([source])
