"""Making more data: the protocol against ASE and the shipped file, and runs that are cut,
spread and hindered."""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
import pytest
from ase.build import add_adsorbate, fcc100, fcc111
from ase.calculators.calculator import all_changes
from ase.data import atomic_numbers
from ase.formula import Formula
from ase.geometry import get_distances

from catmllm.data import make as making
from catmllm.data import surfaces
from catmllm.data.fcc_slabs import (
    ADSORBATES,
    FCC_CONSTANT,
    N_SLAB,
    Slab,
    draw_adsorption,
    draw_site,
    draw_slab,
    slab_records,
)
from catmllm.data.make import MakeError, difference, make, part_path, read_finished, reproduce_shipped
from catmllm.data.slabs import SHIPPED_SEVENNET, WIDE, WIDE_SEED, load_slabs
from catmllm.potentials.diep import diep
from catmllm.potentials.relax import Potential
from catmllm.structure.system import BULK
from tests.data.toy_calculator import EggBox, egg_box

SEED, PER_SLAB = 3, 2

# The same run in a process of its own. Arguments: file, slabs, workers, largest file it may write (bytes).
RUN = """
import resource, sys
from pathlib import Path
from catmllm.data.make import MakeError, make
from tests.data.toy_calculator import egg_box
if __name__ == "__main__":
    out, slabs, workers, limit = Path(sys.argv[1]), *map(int, sys.argv[2:])
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        make(out, slabs, 3, 2, workers, egg_box, progress=False)
    except MakeError as error:
        sys.exit(str(error))
"""


def run(out: Path, slabs: int, workers: int = 1, limit: int = 0) -> subprocess.Popen[str]:
    script = out.parent / "run.py"
    script.write_text(RUN)
    root = str(Path(__file__).resolve().parents[2])
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(out), str(slabs), str(workers), str(limit)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Four slabs, made without a break in one process."""
    out = tmp_path_factory.mktemp("unbroken") / "four.jsonl"
    make(out, 4, SEED, PER_SLAB, factory=egg_box, progress=False)
    return out.read_bytes()


def lines_of(data: bytes, slabs: int) -> bytes:
    return b"".join(data.splitlines(keepends=True)[: slabs * PER_SLAB])


# --------------------------------------------------------------------------- the protocol


def environment(slab: Slab, point: np.ndarray) -> np.ndarray:
    """Sorted distances in the plane from a point to the top layer and its images."""
    flat = slab.atoms.positions[8:12] * [1, 1, 0]
    images = [
        flat + i * slab.atoms.cell[0] + j * slab.atoms.cell[1]
        for i in (-2, -1, 0, 1, 2)
        for j in (-2, -1, 0, 1, 2)
    ]
    return np.sort(np.linalg.norm(np.concatenate(images) - point * [1, 1, 0], axis=1))[:8]


@pytest.mark.parametrize("facet", ["111", "100"])
def test_sites_are_those_of_ase(facet: str) -> None:
    build, names = (
        (fcc111, ("ontop", "bridge", "fcc")) if facet == "111" else (fcc100, ("ontop", "bridge", "hollow"))
    )
    slab = Slab(build("Pt", (2, 2, 3), a=3.97, vacuum=5.0, periodic=True), facet, "Pt", 3.97)
    expected = {}
    for kind, name in zip(("top", "bridge", "hollow"), names):
        atoms = build("Pt", (2, 2, 3), a=3.97, vacuum=5.0, periodic=True)
        add_adsorbate(atoms, "H", 1.0, name)
        expected[kind] = environment(slab, atoms.positions[-1])
    rng, seen = Random(0), set()
    for _ in range(60):
        kind, height, centre = draw_site(slab, rng)
        np.testing.assert_allclose(environment(slab, centre), expected[kind], atol=1e-9)
        seen.add((kind, height))
    assert seen == {("top", 0), ("bridge", 1), ("hollow", 2 if facet == "111" else 3)}


def test_slabs_have_their_composition_in_every_layer() -> None:
    rng = Random(1)
    kinds = set()
    for _ in range(40):
        slab = draw_slab(rng)
        counts = Formula(slab.bulk).count()
        symbols = np.array(slab.atoms.get_chemical_symbols()).reshape(3, 4)
        for layer in symbols:
            assert {s: list(layer).count(s) for s in counts} == {
                s: n * 4 // sum(counts.values()) for s, n in counts.items()
            }
        mixed = sum(FCC_CONSTANT[s] * n for s, n in counts.items()) / sum(counts.values())
        assert slab.constant == pytest.approx(mixed)
        distances = slab.atoms.get_all_distances(mic=True)[np.triu_indices(N_SLAB, 1)]
        assert distances.min() == pytest.approx(slab.constant / np.sqrt(2))
        kinds.add((slab.facet, tuple(sorted(counts.values()))))
    assert len(kinds) == 6


def test_adsorbates_start_whole_and_over_the_slab() -> None:
    rng = Random(2)
    names = set()
    for _ in range(60):
        slab = draw_slab(rng)
        name, _, system = draw_adsorption(slab, rng)
        names.add(name)
        assert tuple(system.get_chemical_symbols()[N_SLAB:]) == ADSORBATES[name].symbols
        np.testing.assert_array_equal(system.positions[:N_SLAB], slab.atoms.positions)
        height = system.positions[N_SLAB:, 2].min() - slab.atoms.positions[:, 2].max()
        assert 0.4 < height < 2.0
        if len(ADSORBATES[name].symbols) == 2:
            assert system.get_distance(N_SLAB, N_SLAB + 1) == pytest.approx(ADSORBATES[name].bond, abs=0.03)
        nearest = get_distances(system.positions[N_SLAB:], slab.atoms.positions, cell=system.cell, pbc=True)[
            1
        ].min()
        assert nearest > 1.2
    assert names == set(ADSORBATES)


@pytest.mark.parametrize("seed", [101, 202])
def test_the_shipped_file_is_drawn_again(seed: int) -> None:
    """All random choices of the shipped systems, on their slabs as relaxed then;
    only the relaxing is left out."""
    with gzip.open(SHIPPED_SEVENNET, "rt") as file:
        records = [r for r in map(json.loads, file) if r["slab"].startswith(f"{seed}-")][: 8 * 50]
    rng, same = Random(seed), 0
    for _, group in itertools.groupby(records, key=lambda r: r["slab"]):
        first, *_ = members = list(group)
        slab = draw_slab(rng)
        assert (slab.bulk, [int(c) for c in slab.facet]) == (first["bulk"], first["miller"])
        assert slab.atoms.get_chemical_symbols() == first["symbols"][:N_SLAB]
        np.testing.assert_allclose(slab.atoms.cell[:], first["cell"], atol=1e-5)
        np.testing.assert_allclose(slab.atoms.positions[:8], first["pos"][:8], atol=1e-4)
        slab.atoms.positions[:] = first["pos"][:N_SLAB]
        for record in members:
            name, kind, system = draw_adsorption(slab, rng)
            assert (name, kind) == (record["adsorbate"], record["start_site"])
            same += np.allclose(system.positions, record["pos_start"], atol=2e-3)
    # neighbours at one distance come in another order on positions of four decimals, hence not all
    assert same > 0.75 * len(records)


def test_the_wide_file_is_drawn_again() -> None:
    """Every slab from its own stream, by ASE's builders; what does not relax stands where it was built."""
    with gzip.open(WIDE, "rt") as file:
        records = [json.loads(line) for line in itertools.islice(file, 0, None, 8)]
    for number, record in enumerate(records):
        slab = surfaces.draw_slab(Random(f"{WIDE_SEED}/{number}"))
        n = len(slab.tags)
        assert [atomic_numbers[s] for s in record["symbols"][:n]] == slab.structure.numbers.tolist()
        assert (tuple(record["miller"]), record["strain"]) == (slab.miller, round(slab.strain, 5))
        np.testing.assert_allclose(record["cell"], slab.structure.lattice, atol=1e-5)
        below = slab.tags == BULK
        np.testing.assert_allclose(
            np.array(record["pos"])[:n][below], slab.structure.positions[below], atol=1e-4
        )


@pytest.mark.slow
def test_the_first_shipped_system_comes_out_again() -> None:
    ((made, shipped),) = reproduce_shipped(limit=1)
    assert made["sid"] == "7net-101-0-0"
    assert difference(made, shipped) < 0.005
    assert list(made) == list(shipped)
    np.testing.assert_allclose(made["pos"], shipped["pos"], atol=0.01)


@pytest.mark.slow
def test_the_first_slab_of_the_wide_file_comes_out_again(tmp_path: Path) -> None:
    """By the command that the page gives."""
    out = tmp_path / "first.jsonl"
    make(out, 1, WIDE_SEED, progress=False)
    again = [json.loads(line) for line in out.read_text().splitlines()]
    with gzip.open(WIDE, "rt") as lines:
        shipped = [json.loads(line) for line in itertools.islice(lines, 8)]
    assert [r["sid"] for r in again] == [r["sid"] for r in shipped]
    assert max(difference(a, b) for a, b in zip(again, shipped)) < 0.005


@pytest.mark.slow
def test_two_shipped_slabs_come_out_again(capsys: pytest.CaptureFixture[str]) -> None:
    assert making.main(parse(["--check"])) == 0
    assert "agrees" in capsys.readouterr().out


class Failing(EggBox):
    """A relaxation that blows up: that of the adsorbates, or that of the slab too."""

    def __init__(self, always: bool = False) -> None:
        super().__init__()
        self.always = always

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        if len(atoms) > N_SLAB or self.always:
            raise np.linalg.LinAlgError("blown up")
        super().calculate(atoms, properties, system_changes)


class Lifting(EggBox):
    """Pulls everything lighter than aluminium to 19 Å, far above any slab."""

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        stretch = np.where(atoms.numbers < 13, atoms.positions[:, 2] - 19.0, 0.0)
        self.results["energy"] += 2.5 * float((stretch**2).sum())
        self.results["forces"][:, 2] -= 5.0 * stretch


@pytest.mark.parametrize(
    ("calculator", "converged"),
    [(EggBox(), True), (Lifting(), True), (Failing(), False), (Failing(always=True), False)],
)
def test_what_desorbs_or_blows_up_is_recorded_as_not_ok(calculator: EggBox, converged: bool) -> None:
    records = list(slab_records(Random(4), "p0-0", 6, calculator, dict.fromkeys("HOCN", 0.0)))
    assert [r["converged"] for r in records] == [converged] * 6
    assert [r["ok"] for r in records] == [type(calculator) is EggBox] * 6
    assert all((r["energy"] is None) == (not converged) for r in records)
    assert all(len(r["symbols"]) == len(r["tags"]) == len(r["pos"]) for r in records)
    assert "NaN" not in json.dumps(records)


def test_difference_tells_systems_apart() -> None:
    record = {"symbols": ["Pt", "H"], "adsorbate": "H", "start_site": "top", "ok": True, "energy": -1.0}
    assert difference(record, record | {"energy": -1.25}) == pytest.approx(0.25)
    assert difference(record, record | {"start_site": "bridge"}) == np.inf
    assert difference(record | {"energy": None}, record) == np.inf


# --------------------------------------------------------------------------- runs


def test_records_are_readable_and_named_after_their_seed(unbroken: bytes, tmp_path: Path) -> None:
    records = [json.loads(line) for line in unbroken.splitlines()]
    assert [r["sid"] for r in records] == [f"diep-p3-{slab}-{k}" for slab in range(4) for k in range(2)]
    path = tmp_path / "four.jsonl"
    path.write_bytes(unbroken)
    systems = load_slabs(path)
    assert [s.sid for s in systems] == [r["sid"] for r in records if r["ok"]]
    assert systems
    energies = {r["sid"]: r["energy"] for r in records}
    assert all(s.energy == energies[s.sid] for s in systems)


def test_any_number_of_workers_makes_the_same_file(unbroken: bytes, tmp_path: Path) -> None:
    out = tmp_path / "four.jsonl.gz"
    make(out, 4, SEED, PER_SLAB, workers=2, factory=egg_box, progress=False)
    assert gzip.decompress(out.read_bytes()) == unbroken
    assert sorted(p.name for p in tmp_path.iterdir()) == ["four.jsonl.gz"]


@pytest.mark.slow
def test_labels_do_not_depend_on_the_process(tmp_path: Path) -> None:
    make(tmp_path / "one.jsonl", 2, SEED, 1, workers=1, progress=False)
    make(tmp_path / "two.jsonl", 2, SEED, 1, workers=2, progress=False)
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()


def test_another_seed_makes_other_slabs(unbroken: bytes, tmp_path: Path) -> None:
    make(tmp_path / "a.jsonl", 2, SEED + 1, PER_SLAB, factory=egg_box, progress=False)
    other = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    mine = [json.loads(line) for line in unbroken.splitlines()]
    assert all(a["pos"] != b["pos"] for a, b in zip(other, mine))


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for left-over workers in /proc")
def test_a_killed_run_goes_on_and_leaves_no_worker(unbroken: bytes, tmp_path: Path) -> None:
    out = tmp_path / "four.jsonl"
    part = part_path(out)
    process = run(out, slabs=200, workers=2)
    deadline = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.02)
    workers = children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not out.exists()
    done, _ = read_finished(part, SEED, PER_SLAB)
    assert 0 < len(done) < 200
    deadline = time.monotonic() + 20
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert workers and not any(map(alive, workers))
    with part.open("ab") as file:
        file.write(unbroken[:150])  # half a line, as a kill within a write leaves it
    make(out, 4, SEED, PER_SLAB, factory=egg_box, progress=False)
    assert out.read_bytes() == unbroken
    assert not part.exists()


@pytest.mark.parametrize("cut", [0, 2500, -1])
def test_a_part_cut_anywhere_makes_the_same_file(unbroken: bytes, tmp_path: Path, cut: int) -> None:
    out = tmp_path / "four.jsonl"
    part_path(out).write_bytes(unbroken[:cut])
    make(out, 4, SEED, PER_SLAB, factory=egg_box, progress=False)
    assert out.read_bytes() == unbroken


def test_only_whole_slabs_of_a_cut_file_count(unbroken: bytes, tmp_path: Path) -> None:
    part = tmp_path / "x.jsonl.part"
    ends = np.cumsum([len(line) for line in unbroken.splitlines(keepends=True)])[PER_SLAB - 1 :: PER_SLAB]
    for cut in range(0, len(unbroken) + 1, 97):
        part.write_bytes(unbroken[:cut])
        finished, size = read_finished(part, SEED, PER_SLAB)
        assert sorted(finished) == list(range(int((ends <= cut).sum())))
        assert size == max([0, *ends[ends <= cut].tolist()])


def test_a_finished_file_is_left_alone_or_extended(
    unbroken: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "four.jsonl.gz"
    make(out, 2, SEED, PER_SLAB, factory=egg_box, progress=False)
    first = out.read_bytes()
    assert gzip.decompress(first) == lines_of(unbroken, 2)

    def never() -> Potential:
        raise AssertionError("nothing is to be made")

    make(out, 2, SEED, PER_SLAB, factory=never, progress=False)
    assert "complete" in capsys.readouterr().err
    assert out.read_bytes() == first
    with pytest.raises(MakeError, match="already holds 2 slabs"):
        make(out, 1, SEED, PER_SLAB, factory=never, progress=False)
    make(out, 4, SEED, PER_SLAB, factory=egg_box, progress=False)
    assert gzip.decompress(out.read_bytes()) == unbroken


@pytest.mark.parametrize(("seed", "per_slab"), [(SEED + 1, PER_SLAB), (SEED, PER_SLAB + 1), (SEED, 1)])
def test_other_settings_are_refused(unbroken: bytes, tmp_path: Path, seed: int, per_slab: int) -> None:
    out = tmp_path / "four.jsonl"
    out.write_bytes(unbroken)
    with pytest.raises(MakeError, match=r"four.jsonl, line \d+: .* does not belong to --seed"):
        make(out, 9, seed, per_slab, factory=egg_box, progress=False)
    assert out.read_bytes() == unbroken


def test_damage_in_the_middle_is_named(unbroken: bytes, tmp_path: Path) -> None:
    out = tmp_path / "four.jsonl"
    lines = unbroken.splitlines(keepends=True)
    out.write_bytes(b"".join([*lines[:3], lines[3][:40] + b"\n", *lines[4:]]))
    with pytest.raises(MakeError, match="line 4: not a record"):
        make(out, 4, SEED, PER_SLAB, factory=egg_box, progress=False)
    packed = tmp_path / "four.jsonl.gz"
    packed.write_bytes(gzip.compress(unbroken)[:-40])
    with pytest.raises(MakeError, match="cannot be read"):
        make(packed, 4, SEED, PER_SLAB, factory=egg_box, progress=False)


def test_a_full_disk_is_told_and_survived(unbroken: bytes, tmp_path: Path) -> None:
    out = tmp_path / "four.jsonl"
    limit = len(lines_of(unbroken, 2)) + 100  # room for about two slabs
    process = run(out, slabs=4, workers=2, limit=limit)
    _, error = process.communicate(timeout=90)
    assert process.returncode == 1
    assert f"cannot write {part_path(out)}: File too large" in error
    assert "of 4 slabs are kept in" in error and "same command again" in error
    assert "Traceback" not in error
    assert not out.exists()
    make(out, 4, SEED, PER_SLAB, factory=egg_box, progress=False)
    assert out.read_bytes() == unbroken


def test_a_folder_that_cannot_be_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MakeError, match=r"cannot write .*no slab was finished yet"):
        make(tmp_path / "file" / "a.jsonl", 1, SEED, PER_SLAB, factory=egg_box, progress=False)


def test_a_worker_that_dies_is_told(tmp_path: Path) -> None:
    with pytest.raises(MakeError, match=r"a worker process died .* fewer --workers"):
        make(tmp_path / "a.jsonl", 2, SEED, PER_SLAB, workers=2, factory=partial(os._exit, 3), progress=False)


# --------------------------------------------------------------------------- the command


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    making.add_arguments(parser)
    return parser.parse_args(arguments)


def test_help_says_that_labels_are_not_dft() -> None:
    parser = argparse.ArgumentParser()
    making.add_arguments(parser)
    assert "not DFT" in parser.format_help()


def test_without_a_potential_one_line_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sevenn.calculator", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    diep.cache_clear()
    for arguments, said in (
        (["--out", str(tmp_path / "a.jsonl")], "pip install --no-deps diep"),
        (["--check"], "pip install sevenn"),
    ):
        assert making.main(parse(arguments)) == 1
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments", [["--out", "a.txt"], ["--out", "a.jsonl", "--slabs", "0"], ["--workers", "-1"]]
)
def test_wrong_options_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        parse(arguments)


def test_out_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    assert making.main(parse([])) == 2
    assert "--out" in capsys.readouterr().err
