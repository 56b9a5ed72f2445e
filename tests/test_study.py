"""Studies: which runs are asked for, what is kept, and what their table says."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from catmllm.cli.main import main
from catmllm.config import ConfigError, load_config, to_dict
from catmllm.config.load import SHIPPED
from catmllm.data.open import open_data
from catmllm.data.slabs import SHIPPED as SHIPPED_DATA
from catmllm.evaluate.baselines import evenly_spaced
from catmllm.study import compared, read, study, table

FILE = """
base: {stages: [encoder], evaluate.judge: none, data.path: DATA}
cells:
  plain: {}
  better: {encoder.lr: 1e-3}
seeds: [[0, 7], [1, 8], [2, 9]]
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every eighth shipped system: a few hundred read faster than all."""
    path = tmp_path_factory.mktemp("data") / "some.jsonl"
    path.write_bytes(b"".join(gzip.decompress(SHIPPED_DATA.read_bytes()).splitlines(keepends=True)[::8]))
    return path


@pytest.fixture
def file(tmp_path: Path, data: Path) -> Path:
    (path := tmp_path / "study.yaml").write_text(FILE.replace("DATA", str(data)))
    return path


def pretend(errors: dict[str, float], ran: list[list[str]]):
    """A trainer that writes what a run of the encoder leaves: errors of a size by the cell, and a larger part
    that the systems of a pair have in common."""

    def run(words: list[str], folder: Path) -> None:
        ran.append(words)
        config = load_config(overrides=words)
        test = evenly_spaced(open_data(config.data)["test"], config.evaluate.property_systems)
        rng = np.random.default_rng(config.data.split_seed)
        common = {p: abs(rng.normal(0, 0.2)) for p in sorted({f"{s.bulk} {s.miller}" for s in test})}
        truth = np.array([s.known_energy for s in test])
        size = errors[folder.name]
        off = [size + common[f"{s.bulk} {s.miller}"] + 0.01 * rng.random() for s in test]
        parity = {"energy": truth.tolist(), "predicted": (truth + off).tolist()}
        folder.mkdir(parents=True)
        metrics = {
            "config": to_dict(config),
            "property": {"encoder": {"parity": parity}},
            "seconds": {"encoder": 2.0},
        }
        (folder / "metrics.json").write_text(json.dumps(metrics))
        (folder / "report.html").write_text("")

    return run


def test_cells_are_compared_seed_by_seed(file: Path, tmp_path: Path) -> None:
    ran: list[list[str]] = []
    out = tmp_path / "out"
    said = study(file, out, run=pretend({"plain": 0.2, "better": 0.15}, ran))
    assert len(ran) == 6 and len({tuple(words) for words in ran}) == 6
    for words in ran:
        assert {'stages=["encoder"]', "evaluate.judge=none"} <= set(words)
    row = json.loads((out / "study.json").read_text())["rows"]["encoder: test error, eV"]
    # the common part is ten times the difference, and falls out of it
    assert row["better"]["more"] == pytest.approx(-0.05, abs=1e-6)
    assert row["better"]["separate"] and row["plain"]["sd"] > 0
    low, high = row["plain"]["interval"]
    assert high - low > 0.04 and low < row["plain"]["mean"] < high
    assert "-0.050" in said and (out / "table.md").read_text().strip() == said


def test_what_is_done_is_kept(file: Path, tmp_path: Path) -> None:
    ran: list[list[str]] = []
    run = pretend({"plain": 0.2, "better": 0.2}, ran)
    out = tmp_path / "out"

    def dies(words: list[str], folder: Path) -> None:
        if len(ran) == 3:
            raise RuntimeError("killed")
        run(words, folder)

    with pytest.raises(RuntimeError):
        study(file, out, run=dies)
    assert not (out / "study.json").exists()
    said = study(file, out, run=run)
    assert len(ran) == 6 and "not separate" in said
    assert study(file, out, run=run) == said and len(ran) == 6
    only = study(file, out, only="better", run=run)
    assert "plain" not in only and len(ran) == 6
    file.write_text(file.read_text().replace("encoder.lr: 1e-3", "encoder.lr: 3e-3"))
    with pytest.raises(ConfigError, match=r"better was run with other settings \(encoder.lr: 0.001 -> 0.003"):
        study(file, out, run=run)


def test_a_part_of_the_test_systems_is_enough(file: Path, tmp_path: Path) -> None:
    """As the trainer measures them: evenly spaced."""
    file.write_text(file.read_text().replace("base: {", "base: {evaluate.property_systems: 10, "))
    study(file, tmp_path / "out", run=pretend({"plain": 0.2, "better": 0.15}, []))
    row = json.loads((tmp_path / "out" / "study.json").read_text())["rows"]["encoder: test error, eV"]
    assert row["better"]["more"] == pytest.approx(-0.05, abs=1e-6)


def test_an_ancestor_is_run_once_a_seed(file: Path, tmp_path: Path) -> None:
    file.write_text("ancestor: {stages: [encoder]}\n" + file.read_text())
    ran: list[list[str]] = []
    out = tmp_path / "out"
    study(file, out, run=pretend({"plain": 0.2, "better": 0.2, "ancestor": 0.3}, ran))
    assert len(ran) == 9
    inits = [next((w for w in words if w.startswith("init=")), None) for words in ran]
    assert inits.count(None) == 3
    assert inits.count(f"init={out}/1-8/ancestor/encoder") == 2


def test_intervals_know_that_systems_of_a_pair_go_together(data: Path) -> None:
    """Where a pair's systems have one error, the interval is that of the few pairs, not of the systems."""
    config = load_config(overrides=["stages=[encoder]", f"data.path={data}"])
    test = open_data(config.data)["test"]
    rng = np.random.default_rng(0)
    by_pair = {pair: abs(rng.normal()) for pair in sorted({f"{s.bulk} {s.miller}" for s in test})}
    off = [by_pair[f"{s.bulk} {s.miller}"] for s in test]
    parity = {"energy": [0.0] * len(test), "predicted": off}
    metrics = {"config": to_dict(config), "property": {"encoder": {"parity": parity}}}
    row = compared({"a": [metrics]})["encoder: test error, eV"]["a"]
    low, high = row["interval"]
    assert high - low > 1.4 * 3.92 * float(np.std(off)) / np.sqrt(len(off))
    assert row["sd"] is None and table({"x": {"a": row}}).count("\n") == 2


def test_predictions_without_structures_are_rows(data: Path) -> None:
    config = load_config(overrides=["stages=[instruct]", f"data.path={data}", "evaluate.property_systems=4"])

    def run(shift: float) -> dict[str, object]:
        pairs = [
            {"surface": f"Pt {k // 2}", "energies": [0.0, 1.0, 0.5]}
            | {
                "predicted": {
                    a: [shift + 0.1 * k] for a in ("two_parts", "true", "indicative_1", "indicative_4")
                }
            }
            for k in range(6)
        ]
        parity = {"energy": [0.0] * 4, "predicted": [0.1] * 4}
        missing = {"instruct": {"pairs": pairs}}
        return {"config": to_dict(config), "property": {"instruct": {"parity": parity}}, "missing": missing}

    rows = compared({"default": [run(0.8)], "trained": [run(0.3)]})
    row = rows["instruct: PIR, two_parts"]
    assert (row["default"]["mean"], row["trained"]["mean"]) == (3 / 6, 6 / 6)
    off = rows["instruct: off the middle, eV, indicative_1"]
    assert off["default"]["mean"] == pytest.approx(np.mean([abs(0.3 + 0.1 * k) for k in range(6)]))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cells: {a: {}}", "`seeds`"),
        ("cells: {a: {}}\nseeds: [[0, 0]]\ncell: 1", "'cell'"),
        ("cells: {a: {}}\nseeds: [0]", "pairs"),
        ("cells: {a: {encoder.lrr: 1}}\nseeds: [[0, 0]]", "encoder.lr"),
        ("cells: [", "study.yaml"),
        ("cells: [a, b]\nseeds: [[0, 0]]", "`cells`"),
        ("cells: {a: 1e-3}\nseeds: [[0, 0]]", "`a` has no"),
        ("cells: {ancestor: {}}\nseeds: [[0, 0]]", "cannot be 'ancestor'"),
    ],
)
def test_a_wrong_file_is_told(file: Path, text: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError, match=said):
        read(file)
    assert main(["study", str(file), "--out", str(file.parent / "out")]) == 1
    assert "Traceback" not in capsys.readouterr().err


def test_shipped_studies_can_be_read() -> None:
    paths = sorted((SHIPPED / "studies").glob("*.yaml"))
    assert paths
    for path in paths:
        assert len(read(path).seeds) >= 5


@pytest.mark.slow
def test_real_runs_make_a_table(tmp_path: Path) -> None:
    (path := tmp_path / "study.yaml").write_text(
        "base: {stages: [encoder], encoder.steps: 4, evaluate.judge: none}\n"
        "cells: {plain: {}, fast: {encoder.lr: 2e-3}}\nseeds: [[0, 0], [1, 1]]\n"
    )
    assert main(["study", str(path), "--out", str(tmp_path / "out")]) == 0
    rows = json.loads((tmp_path / "out" / "study.json").read_text())["rows"]
    assert all(0 < cell["mean"] < 5 for row in rows.values() for cell in row.values())
