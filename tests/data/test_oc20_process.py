"""From OC20 files to a dataset: one command, any kill survived, every record accounted for."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from catmllm.cli.main import main
from catmllm.data.oc20.process import DataError, Rules, process, summary
from catmllm.data.shards import Shards
from catmllm.structure.text import three_part_text
from tests.data import oc20_files as made

pytest.importorskip("torch_geometric", reason="extra dev")
CASES = made.cases()


def _many(folder: Path, files: int, copies: int) -> Path:
    """LMDBs of shifted copies of the cases, each record with a sid of its own; the mapping beside them."""
    folder.mkdir()
    everything = []
    for f in range(files):
        some = []
        for k in range(copies):
            for case in CASES:
                number = (f * copies + k) * len(CASES) + case.sid
                some.append(replace(case, sid=number, energy=case.energy + 0.001 * f))
        made.write_pyg_lmdb(folder / f"data.{f:04d}.lmdb", some)
        everything += some
    made.dump(made.mapping(everything), folder.parent / "oc20_data_mapping.pkl")
    return folder


def _all(shards: Shards) -> list[tuple[Any, ...]]:
    return [
        (
            s.sid,
            s.energy,
            s.miller,
            s.adsorbate,
            s.frac.tobytes(),
            s.lattice.tobytes(),
            s.tags.tobytes(),
            shards.text(i),
        )
        for i, s in enumerate(shards)
    ]


def _command(source: Path, mapping: Path, out: Path) -> list[str]:
    return ["data", "oc20", str(source), "--mapping", str(mapping), "--out", str(out)]


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = _many(tmp_path / "lmdb", files=3, copies=2)
    out = tmp_path / "out"
    command = _command(source, tmp_path / "oc20_data_mapping.pkl", out)
    assert main([*command, "--workers", "2"]) == 0
    printed = capsys.readouterr()
    assert "72 systems kept" in printed.out and "data.path=" in printed.out
    assert "processing" in printed.err
    shards = Shards(out)
    assert len(shards) == 72 and shards.facts["samples"] == {
        "OC20": {"cif": 72, "property": 72, "design_by_energy": 72}
    }
    for i in range(0, 72, 5):
        assert shards.text(i) == three_part_text(shards[i])
    # one process gives the same, bit for bit
    alone = process([source], tmp_path / "alone", [tmp_path / "oc20_data_mapping.pkl"], progress=False)
    assert _all(alone) == _all(shards)
    # once more: nothing is made again
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    assert main(command) == 0
    assert {p.name: p.stat().st_mtime_ns for p in out.iterdir()} == before


def test_other_input_or_rules_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = _many(tmp_path / "lmdb", files=1, copies=1)
    mapping = tmp_path / "oc20_data_mapping.pkl"
    command = [*_command(source, mapping, tmp_path / "out"), "--workers", "1"]
    assert main(command) == 0
    capsys.readouterr()
    assert main([*command, "--fmax", "0.1"]) == 1
    assert "other rules" in capsys.readouterr().err
    mapping.touch()
    assert main(command) == 1
    assert "other files" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(DataError, match="not empty"):
        process([source], tmp_path / "full")
    for wrong in (
        ["--out", "x"],
        [str(tmp_path / "nowhere"), "--out", "x"],
        [str(source), "--mapping", "no.pkl", "--out", "x"],
    ):
        assert main(["data", "oc20", *wrong]) == 1
        assert "Traceback" not in (error := capsys.readouterr().err) and len(error.splitlines()) == 1


def test_killed_run_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    source = _many(tmp_path / "lmdb", files=24, copies=8)
    mapping = tmp_path / "oc20_data_mapping.pkl"
    out = tmp_path / "killed"
    command = [
        sys.executable,
        "-m",
        "catmllm.cli",
        "data",
        "oc20",
        str(source),
        "--mapping",
        str(mapping),
    ]
    command += ["--out", str(out), "--workers", "2"]
    kills = 0
    for wanted in (3, 12):
        running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while running.poll() is None and len(list(out.glob("shard-*"))) < wanted:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        if running.poll() is None:
            os.kill(running.pid, signal.SIGKILL)
            kills += 1
        running.wait()
        assert not (out / "dataset.json").exists(), "killed too late to show anything"
        with pytest.raises(ValueError, match="no dataset"):
            Shards(out)
        time.sleep(0.5)  # its workers end with it; a shard that they were writing is whole or not there
        times = {p: p.stat().st_mtime_ns for p in out.glob("shard-*")}
    assert kills == 2 and 12 <= len(times) < 24
    subprocess.run(command, check=True, capture_output=True)
    assert not list(out.glob(".shard-*")), "a half written shard was left"
    kept = {p: p.stat().st_mtime_ns for p in times}
    assert kept == times, "a finished shard was made again"
    unbroken = process([source], tmp_path / "unbroken", [mapping], progress=False)
    assert _all(Shards(out)) == _all(unbroken)
    assert Shards(out).facts["dropped"] == unbroken.facts["dropped"]


def test_every_record_is_kept_or_counted(tmp_path: Path) -> None:
    rows = [made.pyg_fields(c, "s2ef") for c in CASES]
    nan = dict(rows[0], sid=1, y=float("nan"))
    far = dict(rows[1], sid=1001, force=rows[1]["force"] + 1)
    values = [made.pyg_pickle(r, old=i % 2 == 0) for i, r in enumerate([*rows, nan, far])]
    values += [values[0][:-9], values[3]]  # a damaged one, and one that stands there twice
    source = tmp_path / "data"
    source.mkdir()
    made.write_lmdb(source / "a.lmdb", values)
    (source / "b.lmdb").write_bytes((source / "a.lmdb").read_bytes()[:5000])
    again = made.pyg_fields(CASES[5], "s2ef") | {"fid": 99, "y": -0.5}
    earlier = made.pyg_fields(CASES[6], "s2ef") | {"fid": 2}
    made.write_lmdb(source / "c.lmdb", [made.pyg_pickle(r, False) for r in (again, earlier)])
    known = made.mapping(CASES)
    known["random1"] = known["random1000"]
    known["random1002"] |= {"bulk_symbols": "Zn2"}
    known["random1003"] |= {"ads_symbols": "*CH4"}
    known["random1004"] |= {"anomaly": 2}
    del known["random1007"]
    mapping = made.dump(known, tmp_path / "mapping.pkl")
    facts = process([source], tmp_path / "out", [mapping], progress=False).facts
    assert facts["dropped"] == {
        "unreadable file": 1,
        "unreadable record": 1,
        "not finite": 1,
        "unconverged": 1,
        "mapping disagrees": 2 + 1,  # random1003 stands there twice
        "desorbed": 1,
        "not in the mapping": 1,
        "earlier frame": 2,
    }
    assert facts["read"] == facts["kept"] + sum(facts["dropped"].values())
    assert json.loads((tmp_path / "out" / "dataset.json").read_text()) == facts
    systems = {s.sid: s for s in Shards(tmp_path / "out")}
    assert systems["random1005"].energy == -0.5  # the later frame, whatever file it is in
    assert systems["random1006"].energy == CASES[6].energy
    text = summary(facts)
    for reason, n in facts["dropped"].items():
        assert f"{n}  {reason}" in text


def test_dense_gives_way_where_it_overlaps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OC20-Dense by LMDB and by trajectory, its energies from the published targets,
    against OC20 on the same surface."""
    # mappings read in a process of their own
    monkeypatch.setattr("catmllm.data.oc20.process.LARGE_MAPPINGS", 0)
    names = {c.sid: (f"system{i // 2}", f"heur{i}") for i, c in enumerate(CASES)}
    entry = {"shift": 0.125, "top": True, "adsorption_site": ()}
    dense_mapping = {
        c.sid: entry
        | {"system_id": names[c.sid][0], "config_id": names[c.sid][1], "mpid": f"mp-{c.bulk}"}
        | {"miller_idx": c.miller, "adsorbate": f"*{c.adsorbate}"}
        for c in CASES
    }
    targets: dict[str, list[tuple[str, float]]] = {}
    for case in CASES[:-1]:  # the last one has none
        system, configuration = names[case.sid]
        targets.setdefault(system, []).append((configuration, case.energy - 1))
    files = [
        made.dump(made.mapping(CASES[:3]), tmp_path / "oc20_data_mapping.pkl"),
        made.dump(dense_mapping, tmp_path / "oc20dense_mapping.pkl"),
        made.dump(targets, tmp_path / "oc20dense_targets.pkl"),
    ]
    oc20 = made.write_pyg_lmdb(tmp_path / "oc20.lmdb", CASES[:3])
    by_number = made.write_pyg_lmdb(tmp_path / "dense.lmdb", CASES)
    trajectories = tmp_path / "trajectories"
    for case in CASES:
        system, configuration = names[case.sid]
        (trajectories / system).mkdir(parents=True, exist_ok=True)
        import ase.io

        ase.io.write(
            trajectories / system / f"{configuration}.traj", [case.calculated(0.3), case.calculated()]
        )
    for dense in (by_number, trajectories):
        out = process([oc20], tmp_path / f"out-{dense.name}", files, [dense], progress=False)
        assert out.facts["systems"] == {"OC20": 3, "OC20-Dense": 12 - 1 - 3}
        assert out.facts["dropped"] == {"overlaps OC20": 3, "no target energy": 1}
        assert out.sources.tolist() == [0] * 3 + [1] * 8
        found = {s.sid: s.energy for s in out[np.flatnonzero(out.sources == 1)]}
        assert found == {"/".join(names[c.sid]): pytest.approx(c.energy - 1) for c in CASES[3:-1]}
        assert "OC20-Dense" in summary(out.facts) and "total" in summary(out.facts)


def test_two_runs_do_not_work_in_one_folder(tmp_path: Path) -> None:
    source = _many(tmp_path / "lmdb", files=1, copies=1)
    process([source], tmp_path / "out", [tmp_path / "oc20_data_mapping.pkl"], progress=False)
    (tmp_path / "out" / "dataset.json").unlink()
    with open(tmp_path / "out" / ".lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another run"):
            process([source], tmp_path / "out", [tmp_path / "oc20_data_mapping.pkl"], progress=False)
    assert (
        len(process([source], tmp_path / "out", [tmp_path / "oc20_data_mapping.pkl"], progress=False)) == 12
    )


def test_nothing_kept_is_still_a_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = made.write_pyg_lmdb(tmp_path / "a.lmdb", CASES)
    out = process([source], tmp_path / "out", rules=Rules(max_energy=1e-9), progress=False)
    assert len(out) == 0 and out.split()["train"] is not None
    assert out.facts["dropped"] == {"no Miller index": 12}
    assert main(["data", "oc20", str(source), "--out", str(tmp_path / "again"), "--workers", "1"]) == 1
    printed = capsys.readouterr()
    assert "12  no Miller index" in printed.out and "nothing was kept" in printed.err


def test_total_energies_and_a_file_of_references(tmp_path: Path) -> None:
    source = made.write_database(tmp_path / "a.db", [replace(c, reference=0.0) for c in CASES])
    refs = made.dump({f"random{c.sid}": -3.0 for c in CASES}, tmp_path / "oc20_ref.pkl")
    mapping = made.dump(made.mapping(CASES), tmp_path / "mapping.pkl")
    lmdb = made.write_pyg_lmdb(tmp_path / "a.lmdb", CASES)
    plain = process([lmdb], tmp_path / "plain", [mapping, refs], progress=False)
    minus = process(
        [lmdb], tmp_path / "minus", [mapping, refs], rules=Rules(total_energies=True), progress=False
    )
    np.testing.assert_allclose(minus.energies, plain.energies + 3.0, atol=1e-12)
    # a reference that the row brings wins over the file of references
    rows = process([source], tmp_path / "rows", [mapping, refs], progress=False)
    np.testing.assert_allclose(np.sort(rows.energies), np.sort(plain.energies), atol=1e-6)
