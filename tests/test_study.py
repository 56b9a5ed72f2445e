"""Studies: which runs are asked for, what is kept, and what their table says."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from catmllm.cli.main import main
from catmllm.config import ConfigError, from_arguments, load_config, to_dict
from catmllm.config.load import SHIPPED
from catmllm.data.open import open_data
from catmllm.data.slabs import SHIPPED as SHIPPED_DATA
from catmllm.evaluate.baselines import evenly_spaced
from catmllm.pipeline import differences
from catmllm.stages import STAGES
from catmllm.study import compared, every_run, read, sentences, study, table, values_of
from catmllm.study.cells import arguments
from catmllm.study.compare import over_seeds, seeds_needed
from catmllm.study.page import commits
from catmllm.study.reuse import adopt, runs_below

ROOT = Path(__file__).parents[1]

FILE = """
base: {stages: [encoder], evaluate.judge: none, data.path: DATA}
cells:
  plain: {}
  better: {encoder.lr: 2e-3}
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


def pretend(errors: dict[str, float], ran: list[list[str]], noise: float = 0.001):
    """A trainer that writes what a run of the encoder leaves: errors of a size by the cell, a larger part
    that the systems of a pair have in common, and noise from run to run."""

    def run(words: list[str], folder: Path) -> None:
        ran.append(words)
        config = from_arguments(words)
        test = evenly_spaced(open_data(config.data)["test"], config.evaluate.property_systems)
        rng = np.random.default_rng(config.data.split_seed)
        common = {p: abs(rng.normal(0, 0.2)) for p in sorted({f"{s.bulk} {s.miller}" for s in test})}
        truth = np.array([s.known_energy for s in test])
        size = errors[folder.name] + noise * np.random.default_rng(len(ran)).normal()
        off = [size + common[f"{s.bulk} {s.miller}"] + 0.01 * rng.random() for s in test]
        parity = {"energy": truth.tolist(), "predicted": (truth + off).tolist()}
        for stage in config.stages:
            (folder / stage).mkdir(parents=True, exist_ok=True)
            (folder / stage / "catmllm.json").write_text(json.dumps(to_dict(config)))
        metrics = {
            "config": to_dict(config),
            "machine": {"ranks": 1},
            "parameters": {},
            "data": {},
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
    assert row["better"]["more"] == pytest.approx(-0.05, abs=3e-3)
    assert row["better"]["separate"] and row["plain"]["sd"] > 0
    low, high = row["plain"]["interval"]
    assert high - low > 0.04 and low < row["plain"]["mean"] < high
    assert "the difference holds" in said and (out / "table.md").read_text().strip() == said
    kept = json.loads((out / "study.json").read_text())
    assert kept["hours"] == {"expected": None, "taken": round(6 * 2 / 3600, 3)}
    assert (out / "figure.png").stat().st_size > 5000
    page = (out / "study.html").read_text()
    assert "the difference holds" in page and "<svg" in page and "encoder.lr" in page


def test_commits_are_those_of_adopted_stages_too() -> None:
    taken = {"commits": {"encoder": "a", "align": "d"}}
    before = {"stages": ["encoder"], "commit": "e"}  # as records had it once
    runs = [{"machine": {"commit": "b"}}, {"machine": {"commit": "c"}, "adopted": taken}, {"adopted": before}]
    assert commits(runs) == ["a", "b", "c", "d", "e"]


def test_cross_entropy_is_that_of_the_end_of_training(tmp_path: Path) -> None:
    (tmp_path / "joint").mkdir()
    rows = [{"step": k, "cross_entropy": float(k)} for k in range(10)] + [{"step": 9}]
    (tmp_path / "joint" / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = to_dict(from_arguments(["tiny/pipeline.yaml", "stages=[encoder,joint]"]))
    found = values_of({"config": tree, "property": {}}, tmp_path)
    (what, (values, _)), *others = found.items()
    assert (what, values, others) == ("joint: cross-entropy in training", [8.5], [])  # the last two of ten

    def beside(**changes: object) -> bool:
        """Whether a cell with other settings of `joint` is compared with this one."""
        cell = tree | {"joint": tree["joint"] | changes}
        values = {"plain": [found], "other": [values_of({"config": cell, "property": {}}, tmp_path)]}
        values["other"][0][what][0][0] += 1.0
        return "more" in compared(values)[what]["other"]

    assert beside(mmtg_sign="-") and not beside(property_share=0.9) and not beside(steps=7)


def test_a_cell_is_set_against_another_and_takes_what_it_left(file: Path, tmp_path: Path) -> None:
    third = "  best: {ga_grpo.predictor: '{runs}/better/joint'}\nagainst: {best: better}\nseeds:"
    text = file.read_text().replace("seeds:", third)
    file.write_text(text)
    ran: list[list[str]] = []
    said = study(file, tmp_path / "out", run=pretend({"plain": 0.2, "better": 0.15, "best": 0.12}, ran))
    assert f"ga_grpo.predictor={tmp_path}/out/0-0/better/joint" not in ran[0]
    assert f"ga_grpo.predictor={tmp_path}/out/1-8/better/joint" in ran[5]
    row = json.loads((tmp_path / "out" / "study.json").read_text())["rows"]["encoder: test error, eV"]
    assert row["better"]["more"] == pytest.approx(-0.05, abs=3e-3)
    assert row["best"]["more"] == pytest.approx(-0.03, abs=3e-3)
    assert "`best` is -0.0" in said and "from `better` (" in said
    file.write_text(text.replace("against: {best: better}", "against: {best: worse}"))
    with pytest.raises(ConfigError, match="`against` has a cell for some cells"):
        read(file)


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
    file.write_text(file.read_text().replace("encoder.lr: 2e-3", "encoder.lr: 3e-3"))
    with pytest.raises(ConfigError, match=r"better was run with other settings \(encoder.lr: 0.002 -> 0.003"):
        study(file, out, run=run)


def test_no_finished_run_of_other_settings_is_kept(file: Path, tmp_path: Path) -> None:
    text, out = file.read_text(), tmp_path / "out"
    file.write_text("ancestor: {stages: [encoder]}\n" + text)
    run = pretend({"plain": 0.2, "better": 0.2, "ancestor": 0.3}, [])
    study(file, out, more=["wandb=mine"], run=run)
    with pytest.raises(ConfigError, match="wandb: mine -> None"):  # what is asked for no more
        study(file, out, run=run)
    with pytest.raises(ConfigError, match="ranks: 1 -> 2"):
        study(file, out, more=["wandb=mine"], run=run, ranks=2)
    # an ancestor that was trained anew, as the message of before says, with others behind it
    shutil.rmtree(out / "0-7" / "ancestor")
    file.write_text("ancestor: {stages: [encoder], encoder.lr: 5e-3}\n" + text)
    with pytest.raises(ConfigError, match=r"plain was run with .*ancestor/encoder holds: then -> now"):
        study(file, out, more=["wandb=mine"], run=run)


def test_cells_that_end_at_different_stages_are_compared_by_their_last(data: Path) -> None:
    def run(**errors: float) -> list[dict[str, Any]]:
        config = load_config(overrides=[f"stages=[{','.join(errors)}]", f"data.path={data}"])
        test = evenly_spaced(open_data(config.data)["test"], config.evaluate.property_systems)
        found = {
            s: {
                "parity": {
                    "energy": [0.0] * len(test),
                    "predicted": [e] * len(test),
                    "others": {"start": [2 * e] * len(test)},
                }
            }
            for s, e in errors.items()
        }
        return [values_of({"config": to_dict(config), "property": found}, data)] * 2

    rows = compared({"both": run(encoder=0.3, joint=0.2), "encoder": run(encoder=0.3)})
    assert rows["last stage: test error, start, eV"]["encoder"]["more"] == pytest.approx(0.2)
    last = rows["last stage: test error, eV"]
    assert (last["both"]["mean"], last["encoder"]["mean"]) == pytest.approx((0.2, 0.3))
    assert last["encoder"]["more"] == pytest.approx(0.1)
    assert "encoder: test error, eV" not in rows  # the same in both
    third = compared(
        {"both": run(encoder=0.3, joint=0.2), "encoder": run(encoder=0.3), "other": run(encoder=0.4)}
    )
    assert "encoder: test error, eV: `encoder` has the numbers of `both`." in sentences(third)
    assert "last stage: test error, eV" not in compared(
        {"a": run(joint=0.2), "b": run(joint=0.3)}
    )  # as `joint` says


def test_a_part_of_the_test_systems_is_enough(file: Path, tmp_path: Path) -> None:
    """As the trainer measures them: evenly spaced."""
    file.write_text(file.read_text().replace("base: {", "base: {evaluate.property_systems: 10, "))
    study(file, tmp_path / "out", run=pretend({"plain": 0.2, "better": 0.15}, []))
    row = json.loads((tmp_path / "out" / "study.json").read_text())["rows"]["encoder: test error, eV"]
    assert row["better"]["more"] == pytest.approx(-0.05, abs=3e-3)


def test_what_differs_from_run_to_run_is_no_difference_of_cells(file: Path, tmp_path: Path) -> None:
    """The surfaces of a run have its noise in common, so an interval over surfaces alone would miss it."""
    said = study(file, tmp_path / "out", run=pretend({"plain": 0.2, "better": 0.2}, [], noise=0.05))
    cell = json.loads((tmp_path / "out" / "study.json").read_text())["rows"]["encoder: test error, eV"][
        "better"
    ]
    inner, outer = (cell[k][1] - cell[k][0] for k in ("more_interval", "more_over_seeds"))
    assert outer > 1.5 * inner
    assert not cell["separate"] and "not separate" in said and "would need" in said


def test_intervals_over_seeds_are_students_and_seeds_are_counted_by_them() -> None:
    from scipy.stats import nct, t, ttest_1samp

    rng = np.random.default_rng(0)
    differences = rng.normal(0.1, 0.2, 6)
    found = ttest_1samp(differences, 0.0).confidence_interval(0.95)
    assert over_seeds(differences.tolist()) == pytest.approx((found.low, found.high))
    assert over_seeds([0.1]) is None
    n = seeds_needed(0.1, 0.15)
    assert n is not None
    # the power by the noncentral distribution is what was asked for, and not with a seed less or two
    power = [1 - nct.cdf(t.ppf(0.975, k - 1), k - 1, 0.1 / 0.15 * np.sqrt(k)) for k in (n, n - 2)]
    assert power[0] > 0.79 and power[1] < 0.8
    assert seeds_needed(1e-4, 1.0) is None and seeds_needed(0.0, 1.0) is None


def test_answers_and_designs_are_compared_too(file: Path, tmp_path: Path) -> None:
    metrics_of = {}
    for name, shift in (("plain", 0.0), ("better", -0.4)):
        folder = tmp_path / name
        pretend({name: 0.2}, [])([*arguments(read(file), {}, (0, 7), folder)], folder)
        metrics = json.loads((folder / "metrics.json").read_text())
        metrics["generation"] = {"grpo": {}}
        (folder / "grpo").mkdir()
        fails = ["PF", "PV"] if name == "plain" else []
        row = {"identity": "CO</s>Pt12 (1 1 1)", "reward": 1.0 - shift, "fails": fails, "free": True}
        held = row | {"free": False, "fails": [], "reward": 9.0}
        (folder / "grpo" / "answers.jsonl").write_text(
            "".join(json.dumps(r) + "\n" for r in (held, row, row))
        )
        trace = [{"energies": [None, 1.0, 0.0]}, {"energies": [shift, shift]}]
        item = {
            "identity": "CO</s>Pt12 (1 1 1)",
            "energy": -1.0,
            "trace": trace,
            "success_own": name == "better",
            "answers": {
                "search": [
                    {"predicted": said, "feasible": True}
                    for said in (-1.0, -1.0 if name == "better" else 0.0)
                ]
            },
        }
        design = {"tolerance": 0.25, "budgets": [1, 96]}
        metrics["designs"] = {"grpo": design | {"items": [item]}}
        metrics["design"] = metrics["free_design"] = design | {"items": [item, item]}
        metrics_of[name] = [values_of(metrics, folder)]
    rows = compared(metrics_of)
    assert rows["grpo: PF"]["plain"]["mean"] == 1 and rows["grpo: PF"]["better"]["more"] == -1
    assert "grpo: VF" not in rows  # the same in both
    assert rows["grpo: reward"]["plain"]["each"] == [1.0]  # of what nothing held
    assert rows["design success after grpo, own"]["better"]["more"] == 1
    assert rows["design success with free metals, own"]["better"]["more"] == 1
    assert "design success with free metals, 1 prediction, own" not in rows  # the same in both
    last = rows["last candidates, |E_pred - E*|, eV"]
    assert (last["plain"]["mean"], last["better"]["mean"]) == pytest.approx((1.0, 0.6))
    assert "first candidates, |E_pred - E*|, eV" not in rows
    assert any("one seed says nothing" in s for s in sentences(rows))


def test_samples_become_steps_and_a_share(file: Path) -> None:
    text = "base: {stages: [joint], joint.batch_size: 8}\nranks: 2\nseeds: [[0, 0]]\n"
    text += "cells:\n  a: {samples: SAMPLES}\n"
    file.write_text(text.replace("SAMPLES", "{property: 960, design: 320}"))
    asked = read(file)
    config = from_arguments(arguments(asked, asked.cells["a"], (0, 0), Path("out")))
    assert (config.joint.steps, config.joint.property_share) == (1280 // 16, 0.75)
    assert config.joint.design_share == 0.125
    assert (
        from_arguments(
            arguments(read(file, ["joint.steps=2"]), asked.cells["a"], (0, 0), Path("out"))
        ).joint.steps
        == 2
    )
    twice = from_arguments(
        arguments(read(file, ["joint.batch_size=16"]), asked.cells["a"], (0, 0), Path("out"))
    )
    assert twice.joint.steps == 1280 // 32
    for wrong in ("{property: 961, design: 320}", "{property: 0, design: 0}", "3"):
        file.write_text(text.replace("SAMPLES", wrong))
        with pytest.raises(ConfigError, match="samples"):
            read(file)


def test_a_cell_takes_stages_of_another(file: Path, tmp_path: Path) -> None:
    """What two cells have in common is trained once a seed."""
    further = "  further: {stages: [encoder, align]}\n  least: {encoder.steps: 7}\nseeds:"
    file.write_text(file.read_text().replace("seeds:", further))
    there: dict[str, list[str]] = {}

    def run(words: list[str], folder: Path) -> None:
        there.setdefault(folder.name, []).append(",".join(sorted(p.name for p in folder.glob("*/"))))
        pretend({"plain": 0.2, "better": 0.15, "further": 0.2, "least": 0.3}, [])(words, folder)

    study(file, tmp_path / "out", run=run)
    assert there == {"plain": [""] * 3, "better": [""] * 3, "further": ["encoder"] * 3, "least": [""] * 3}


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
    row = compared({"a": [values_of(metrics, data)]})["encoder: test error, eV"]["a"]
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

    rows = compared({name: [values_of(run(x), data)] for name, x in (("default", 0.8), ("trained", 0.3))})
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
        ("cells: {a: {}}\nseeds: [[0, 0]]\naxis: {name: n, at: {b: 1}}", "names no cell: b"),
        ("cells: {a: {}}\nseeds: [[0, 0]]\naxis: {at: {a: 1}}", "`axis` has a `name`"),
        ("cells: {a: {}}\nseeds: [[0, 0]]\nfiles: [absent.yaml]", "absent.yaml"),
    ],
)
def test_a_wrong_file_is_told(file: Path, text: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError, match=said):
        read(file)
    assert main(["study", str(file), "--out", str(file.parent / "out")]) == 1
    assert "Traceback" not in capsys.readouterr().err


def test_every_study_is_one_on_oc20_too() -> None:
    """The same cells on eight GPUs, from a published encoder and LLM."""
    here = {p.stem: read(p) for p in (SHIPPED / "studies").glob("*.yaml")}
    there = {p.stem: read(p) for p in (SHIPPED / "studies" / "oc20").glob("*.yaml")}
    assert here.keys() == there.keys()
    for name, oc20 in there.items():
        tiny = here[name]
        if name == "encoder_llm":  # the paper's eight need two LLMs; here is one
            assert len(oc20.cells) == 8 and (oc20.seeds, oc20.asks) == (tiny.seeds, tiny.asks)
            kinds = {config.model.encoder.kind for config in every_run(oc20).values()}
            assert kinds == {config.model.encoder.kind for config in every_run(tiny).values()}
            continue
        assert (list(oc20.cells), oc20.seeds, oc20.asks) == (list(tiny.cells), tiny.seeds, tiny.asks)
        assert (oc20.ranks, oc20.hours, oc20.against) == (8, None, tiny.against)
        for cell, config in every_run(oc20).items():
            assert config.data.path == "data/oc20" and config.model.encoder.checkpoint, (name, cell)
            assert config.init is None and config.evaluate.judge == "none", (name, cell)
            assert "encoder" not in config.stages or name == "frames"
        for cell in tiny.cells:  # what a cell is about, it is about here too
            ours, theirs = tiny.cells[cell], oc20.cells[cell]
            assert {k for k in ours if k not in ("samples", "instruct.steps")} <= theirs.keys()


def test_shipped_studies_can_be_read() -> None:
    paths = sorted((SHIPPED / "studies").glob("*.yaml"))
    assert paths
    for path in paths:
        asked = read(path)
        assert asked.asks.endswith("?") and asked.hours and path.read_text().startswith("# ")
        assert len(asked.seeds) >= (5 if asked.hours <= 3 else 3)
        page = (SHIPPED.parent / "docs" / "studies.md").read_text(encoding="utf-8")
        assert f"configs/studies/{path.name}" in page or f"`{path.stem}`" in page


@pytest.mark.slow
def test_real_runs_make_a_table(tmp_path: Path) -> None:
    (path := tmp_path / "study.yaml").write_text(
        "base: {stages: [encoder], encoder.steps: 4, evaluate.judge: none}\n"
        "cells: {plain: {}, fast: {encoder.lr: 2e-3}}\nseeds: [[0, 0], [1, 1]]\n"
    )
    assert main(["study", str(path), "--out", str(tmp_path / "out")]) == 0
    rows = json.loads((tmp_path / "out" / "study.json").read_text())["rows"]
    assert all(0 < cell["mean"] < 5 for row in rows.values() for cell in row.values())


def finished(folder: Path, words: list[str], ranks: int = 1) -> Path:
    """What a run leaves that a study looks at."""
    tree = to_dict(from_arguments(words)) | {"encoder_precision": "fp32", "compile": False}
    metrics: dict[str, object] = {
        "config": tree,
        "machine": {"ranks": ranks, "commit": "abc", "date": "2026-01-01"},
        "parameters": {"total": 3},
        "data": {},
        "seconds": {"encoder": 1.0},
        "design": {"items": []},
    }
    for key in ("property", "validation"):
        metrics[key] = {stage: {key: stage} for stage in tree["stages"]}
    for stage in tree["stages"]:
        (folder / stage / "checkpoints").mkdir(parents=True)
        (folder / stage / "catmllm.json").write_text(json.dumps(tree))
        (folder / stage / "model.safetensors").write_text(f"{folder.name} {stage}")
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "report.html").write_text("")
    return folder


BASE = ["seed=1", "data.split_seed=1", "stages=[encoder,align,joint,instruct,grpo]"]


@pytest.mark.parametrize(
    ("changes", "stages", "measured"),
    [
        ([], 5, 5),
        (["out=elsewhere", "tensorboard=false", "data.workers=1", "threads=2"], 5, 5),
        (["seed=2"], 0, 0),
        (["data.split_seed=2"], 0, 0),
        (["precision=fp32"], 0, 0),
        (["data.share=0.5"], 0, 0),
        (["model.projector=atoms"], 0, 0),
        (["encoder.lr=1e-5"], 0, 0),
        (["align.steps=7"], 1, 1),
        (["joint.steps=7"], 2, 2),
        (["joint.drop_configuration=0.3"], 0, 0),  # which the encoder's closed form of texts reads
        (["instruct.relaxed_text=0.3"], 0, 0),
        (["evaluate.slab_tasks=2"], 5, 5),
        (["instruct.steps=7"], 3, 3),
        (["grpo.beta=0.3"], 4, 4),
        (["stages=[encoder,align,joint]"], 3, 3),
        (["stages=[encoder,joint]"], 1, 1),
        (["ga_grpo.energy_weight=0"], 5, 5),
        (["evaluate.judge=none", "evaluate.free_tasks=0"], 5, 5),
        (["evaluate.property_systems=7"], 5, 0),
    ],
)
def test_stages_that_an_earlier_run_has_trained_are_taken(
    tmp_path: Path, changes: list[str], stages: int, measured: int
) -> None:
    run = finished(tmp_path / "first", BASE)
    finished(tmp_path / "less", [*BASE, "stages=[encoder]"])
    words, new = [*BASE, *changes, f"out={tmp_path}/new"], tmp_path / "new"
    named = adopt(words, new, 1, runs_below(tmp_path))
    assert named == list(from_arguments(words).stages[:stages])
    assert sorted(p.name for p in new.glob("*")) == sorted([*named, *(["metrics.json"] if named else [])])
    if not named:
        return
    for stage in named:
        kept = new / stage / "model.safetensors"
        # of two runs that have a stage the one that has more
        assert kept.read_bytes() == (run / stage / "model.safetensors").read_bytes() or stages == 1
        assert not (new / stage / "checkpoints").exists()
    metrics = json.loads((new / "metrics.json").read_text())
    assert list(metrics["validation"]) == named and metrics["adopted"]["commits"] == dict.fromkeys(
        named, "abc"
    )
    assert list(metrics.get("property", {})) == named[:measured]
    searches = {"ga_grpo", "evaluate"}
    same = stages == 5 and not any(word.split(".")[0] in searches for word in changes)
    assert ("design" in metrics) == same
    # the trainer goes on with it: nothing that it may not change has changed
    settled = to_dict(from_arguments(words)) | {"encoder_precision": "fp32", "compile": False}
    assert not list(differences(metrics["config"], settled))
    assert adopt(words, new, 1, runs_below(run)) == []  # begun already
    assert not (tmp_path / "new.part").exists()


def test_a_run_on_other_ranks_is_another(tmp_path: Path) -> None:
    finished(tmp_path / "first", BASE, ranks=2)
    assert adopt(BASE, tmp_path / "new", 1, runs_below(tmp_path)) == []
    assert runs_below(tmp_path / "first" / "encoder") == []


def test_what_a_run_began_with_counts(tmp_path: Path) -> None:
    """A cell behind its ancestor is a whole run's last stages, and only behind one of the same settings."""
    whole = finished(tmp_path / "whole", [*BASE, "stages=[encoder,align,joint]"])
    finished(tmp_path / "study" / "ancestor", [*BASE, "stages=[encoder,align]"])
    cell = [*BASE, "stages=[joint]", f"init={tmp_path}/study/ancestor/align"]
    assert adopt(cell, tmp_path / "study" / "cell", 1, runs_below(whole)) == ["joint"]
    finished(tmp_path / "other" / "ancestor", [*BASE, "stages=[encoder,align]", "align.steps=7"])
    cell[-1] = f"init={tmp_path}/other/ancestor/align"
    assert adopt(cell, tmp_path / "other" / "cell", 1, runs_below(whole)) == []
    # what was taken over may be taken over again, after the trainer has gone on from there
    taken = tmp_path / "study" / "cell"
    metrics = json.loads((taken / "metrics.json").read_text()) | {"machine": {"ranks": 1}}
    (taken / "metrics.json").write_text(json.dumps(metrics))
    (taken / "report.html").write_text("")
    again = [*BASE, "stages=[joint]", f"init={tmp_path}/study/ancestor/align"]
    assert adopt(again, tmp_path / "study" / "again", 1, runs_below(taken)) == ["joint"]
    # and the other way round: a whole run from an ancestor's stages
    words = [*BASE, "stages=[encoder,align,joint]", "joint.steps=7"]
    assert adopt(words, tmp_path / "new", 1, runs_below(tmp_path / "study")) == ["encoder", "align"]
    # stages that lie in two runs, each with what its own has measured
    assert adopt(words[:-1], tmp_path / "both", 1, runs_below(tmp_path / "study")) == [
        "encoder",
        "align",
        "joint",
    ]
    metrics = json.loads((tmp_path / "both" / "metrics.json").read_text())
    assert list(metrics["property"]) == list(metrics["adopted"]["commits"]) == ["encoder", "align", "joint"]
    assert (tmp_path / "both" / "align" / "model.safetensors").read_text() == "ancestor align"


def test_stages_read_no_other_settings_than_their_own() -> None:
    """Or they are in the table that decides what may be taken over."""
    found = {
        (file.stem, stage)
        for file in (ROOT / "catmllm" / "stages").glob("*.py")
        for stage in re.findall(r"\b(?:config|c)\.config\.(\w+)\b|\bconfig\.(\w+)\b", file.read_text())
        for stage in stage
        if stage in STAGES and stage != file.stem
    }
    assert found == {("supervised", "joint"), ("supervised", "instruct"), ("grpo", "instruct")}


def test_a_study_takes_what_is_there(file: Path, tmp_path: Path) -> None:
    ran: list[list[str]] = []
    first = pretend({"plain": 0.2, "better": 0.15}, ran)
    words = arguments(read(file), {}, (0, 7), tmp_path / "earlier")
    finished(tmp_path / "earlier", words)
    seen: list[bool] = []

    def run(words: list[str], folder: Path) -> None:
        if seen.append((folder / "encoder").is_dir()) or seen[-1]:
            shutil.rmtree(folder)
        first(words, folder)

    with pytest.raises(ConfigError, match="absent: no finished run"):
        study(file, tmp_path / "out", run=run, reuse=[tmp_path / "absent"])
    study(file, tmp_path / "out", run=run, reuse=[tmp_path / "earlier"])
    assert seen == [True, False, False, False, False, False]


@pytest.mark.slow
def test_a_stage_behind_what_was_taken_is_the_same(tmp_path: Path, data: Path) -> None:
    sizes = (
        f"data.path: {data}, model.closed_form: false, joint.steps: 2, align.steps: 2, encoder.steps: 2, "
        "evaluate.property_systems: 4, evaluate.judge: none"
    )
    (path := tmp_path / "study.yaml").write_text(
        f"base: {{{sizes}}}\nancestor: {{stages: [encoder, align]}}\n"
        "cells: {plain: {stages: [joint]}}\nseeds: [[0, 0]]\n"
    )
    assert main(["study", str(path), "--out", str(tmp_path / "plain")]) == 0
    whole = [f"out={tmp_path}/run", "stages=[encoder,align]", *sizes.replace(": ", "=").split(", ")]
    subprocess.run([sys.executable, str(ROOT / "catmllm" / "train.py"), *whole], check=True)
    assert main(["study", str(path), "--out", str(tmp_path / "taken"), "--reuse", str(tmp_path / "run")]) == 0
    taken, plain = (tmp_path / name / "0-0" for name in ("taken", "plain"))
    commits = json.loads((taken / "ancestor" / "metrics.json").read_text())["adopted"]["commits"]
    assert list(commits) == ["encoder", "align"]
    weights = Path("plain") / "joint" / "model.safetensors"
    assert (taken / weights).read_bytes() == (plain / weights).read_bytes()
