"""New labels for old systems: from where they stand, by slab, again after a kill."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import numpy as np
import pytest

from catmllm.data.relabel import by_slab, relabel, relabelled
from catmllm.data.slabs import SHIPPED_SEVENNET, load_slabs
from catmllm.data.surfaces import surface_records
from catmllm.potentials.relax import by_calculator
from tests.data.toy_calculator import EggBox

POTENTIAL = by_calculator(EggBox())


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shipped slabs with all their systems."""
    path = tmp_path_factory.mktemp("three") / "three.jsonl"
    groups = list(by_slab(SHIPPED_SEVENNET).values())[:3]
    path.write_text("".join(json.dumps(r) + "\n" for group in groups for r in group))
    return path


def test_a_killed_run_goes_on_to_the_same_file(three: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    counts = relabel(three, whole, POTENTIAL, "7net", progress=False)
    assert sum(counts.values()) == 24
    data = whole.read_bytes()
    for size in (0, 100, len(data) // 2, len(data) - 1):
        cut.write_bytes(data[:size])
        assert relabel(three, cut, POTENTIAL, "7net", progress=False) == counts
        assert cut.read_bytes() == data
    for wrong, source in ((whole, "old"), (three, "7net")):  # of another source, and no relabelled file
        before = wrong.read_bytes()
        with pytest.raises(ValueError, match=f"without `energy_{source}`"):
            relabel(three, wrong, POTENTIAL, source, progress=False)
        assert wrong.read_bytes() == before
    with pytest.raises(ValueError, match=r"new.jsonl.gz: a plain file"):
        relabel(three, tmp_path / "new.jsonl.gz", POTENTIAL, progress=False)
    (other := tmp_path / "other.jsonl").write_text(json.dumps({"slab": "p1-1"}) + "\n")
    with pytest.raises(ValueError, match="p1-1"):
        relabel(three, other, POTENTIAL, progress=False)


@pytest.mark.parametrize(
    ("line", "said"),
    [('{"slab": "a"}', "line 2: no `sid`"), ("{", "line 2: not a JSON"), ("3", "line 2: not a")],
)
def test_a_line_that_is_no_record_is_told(three: Path, tmp_path: Path, line: str, said: str) -> None:
    (path := tmp_path / "bad.jsonl").write_text(three.read_text().splitlines()[0] + f"\n{line}\n")
    with pytest.raises(ValueError, match=f"bad.jsonl, {said}"):
        relabel(path, tmp_path / "new.jsonl", POTENTIAL, progress=False)
    assert not (tmp_path / "new.jsonl").exists()


def test_the_old_label_stays_and_the_new_one_is_the_potentials(three: Path) -> None:
    old = next(iter(by_slab(three).values()))
    references = {"H": 0.1, "O": 0.2, "N": 0.3, "C": 0.4}
    for record, was in zip(relabelled(old, POTENTIAL, references, "7net"), old):
        assert (record["sid"], record["energy_7net"], record["ok_7net"]) == (
            was["sid"],
            was["energy"],
            was["ok"],
        )
        slab = np.array(record["tags"]) != 2
        bottom = np.array(record["tags"]) == 0
        new, start = np.array(record["pos"]), np.array(record["pos_start"])
        np.testing.assert_allclose(new[bottom], np.array(was["pos"])[bottom], atol=1e-4)
        np.testing.assert_array_equal(new[slab], start[slab])
        symbols = [s for s, t in zip(record["symbols"], record["tags"]) if t == 2]
        waves = 0.002 * np.sqrt([{"H": 1, "C": 6, "N": 7, "O": 8}[s] for s in symbols])
        own = (waves[:, None] * (1 - np.cos(2 * np.pi / 2.3 * new[~slab]))).sum()
        assert record["energy"] == pytest.approx(own - sum(references[s] for s in symbols), abs=1e-3)
        assert record["ok"] == (record["reason"] is None)


def test_systems_that_data_make_made_can_be_relabelled(tmp_path: Path) -> None:
    """Their adsorbates have more elements, and their frames have old energies."""
    zero = dict.fromkeys(("H", "O", "N", "C", "S", "F", "Cl"), 0.0)
    made = [r for k in range(3) for r in surface_records(Random(k), f"p0-{k}", 6, POTENTIAL, zero)]
    assert {"S", "F", "Cl"} & {r["adsorbate"] for r in made} and all("frames" in r for r in made)
    (path := tmp_path / "made.jsonl").write_text("".join(json.dumps(r) + "\n" for r in made))
    counts = relabel(path, tmp_path / "new.jsonl", POTENTIAL, "before", progress=False)
    new = [json.loads(line) for line in (tmp_path / "new.jsonl").read_text().splitlines()]
    assert counts.total() == len(new) == len(made) and not any("frames" in r for r in new)


def test_the_file_is_one_that_training_reads(three: Path, tmp_path: Path) -> None:
    out = tmp_path / "new.jsonl"
    counts = relabel(three, out, POTENTIAL, progress=False)
    systems = load_slabs(out)
    assert len(systems) == counts["ok"]
    assert all(s.start is not None for s in systems)
