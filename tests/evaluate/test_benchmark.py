"""Design tasks as a file: what it holds, and that CIFs are scored as the designs of a run are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from catmllm.cli.main import main
from catmllm.config import Config, DataConfig
from catmllm.data.batches import Collator
from catmllm.data.open import open_data
from catmllm.design.search import ClosedLoop, TaskState
from catmllm.evaluate import BENCHMARK, design
from catmllm.evaluate.benchmark import (
    BenchmarkTask,
    benchmark_tasks,
    ideal_of,
    known_of,
    read_candidates,
    read_tasks,
    refuse_known,
    score,
    table,
    write_candidates,
    write_tasks,
)
from catmllm.models.catalytic_mllm import CatalyticMLLM
from catmllm.structure.cif import write_cif
from catmllm.structure.formula import parse_identity
from catmllm.structure.system import System
from tests.evaluate.test_design import ONE, configured

Data = dict[str, Sequence[System]]


@pytest.fixture(scope="module")
def data() -> Data:
    return dict(open_data())


@pytest.fixture(scope="module")
def shipped() -> list[BenchmarkTask]:
    return read_tasks(BENCHMARK)


def test_the_shipped_tasks_are_those_of_the_shipped_data(
    data: Data, shipped: list[BenchmarkTask], tmp_path: Path
) -> None:
    again = benchmark_tasks(data, 48, 0)
    assert shipped == again and len(again) == 96
    write_tasks(again, tmp_path / "tasks.csv")
    assert (tmp_path / "tasks.csv").read_bytes() == BENCHMARK.read_bytes()
    tests = {(s.bulk, s.miller) for s in data["test"]}
    seen = {(s.bulk, s.miller) for part in ("train", "val") for s in data[part]}
    for task in again:
        asked = parse_identity(task.task.identity)
        if task.metals:
            assert {(bulk, asked.miller) for bulk in task.known} <= seen
            assert not {(bulk, asked.miller) for bulk in task.known} & tests
    assert {t.name.rpartition("-")[0] for t in again} == {"fixed", "free"}


def test_tasks_of_another_split_are_refused(
    data: Data, shipped: list[BenchmarkTask], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(config: DataConfig, tasks: list[BenchmarkTask] = shipped, parts: Data | None = None) -> str:
        with pytest.raises(ValueError) as error:
            refuse_known(BENCHMARK, tasks, parts or dict(open_data(config)), config)
        return str(error.value)

    for own in (DataConfig(), DataConfig(split_seed=1), DataConfig(split_by="adsorbate")):
        parts = dict(open_data(own))
        refuse_known(BENCHMARK, benchmark_tasks(parts, 4, 0), parts, own)
    refuse_known(BENCHMARK, shipped, data, DataConfig())
    found = said(DataConfig(split_seed=1))
    assert "tasks.csv: 96 of 96 tasks" in found and "fixed-000, fixed-001, fixed-002, …" in found
    assert "`catmllm evaluate tasks --out FILE data.split_seed=1`" in found
    assert "data.split_by=metal data.hold_out=[Pt,Cu]`" in said(
        DataConfig(split_by="metal", hold_out=("Pt", "Cu"))
    )
    # nor may a free task leave open what training has; validation counts too
    for part in ("train", "val"):
        system = next(s for s in data["test"] if (s.bulk, s.miller) == ("PtAu", (1, 1, 1)))
        parts = {**data, part: [*data[part], system], "test": []}
        free = [t for t in shipped if t.metals and t.task.identity.endswith("(1 1 1)")]
        assert f": {len(free)} of {len(free)} tasks" in said(DataConfig(), free, parts)
        assert not any("PtAu" in t.known for t in free)
    write_tasks(benchmark_tasks(open_data(DataConfig(split_seed=1)), 2, 0), tmp_path / "1.csv")
    asked = ["--tasks", str(tmp_path / "1.csv")]
    for command in (["generator", str(tmp_path)], ["candidates", "evolution", "--out", str(tmp_path / "x")]):
        assert main(["evaluate", *command, *asked]) == 1
        assert "1.csv: 4 of 4 tasks ask for a bulk and facet" in capsys.readouterr().err
    assert main(["evaluate", "generator", str(tmp_path), "--judge", "sevennet"]) == 1
    assert "SevenNet-0 cannot judge designs at energies of DIEP" in capsys.readouterr().err


def slab(identity: str) -> str:
    from random import Random

    from catmllm.design.enumeration import ideal_system

    return write_cif(ideal_system(identity, Random(0)))


def test_what_a_free_task_takes(shipped: list[BenchmarkTask]) -> None:
    """Any composition of the metals that is new; all others miss the one of the task."""
    free = next(t for t in shipped if t.metals and t.task.identity.endswith("(1 1 1)"))
    adsorbate = parse_identity(free.task.identity).adsorbate

    def asked(formula: str, of: str = adsorbate) -> str:
        return free.asked(slab(f"{of}</s>{formula} (1 1 1)")).identity

    fixed = free.task.identity
    new = next(
        f"{a}{9}{b}{3}"
        for a in free.metals
        for b in free.metals
        if a < b and parse_identity(f"H</s>{a}3{b}").slab and asked(f"{a}9{b}3") not in (fixed,)
    )
    assert parse_identity(asked(new)).slab == parse_identity(f"H</s>{new}").slab
    old = sorted(free.known)[0]
    counts = parse_identity(f"H</s>{old}").slab
    whole = "".join(f"{m}{n * 12 // sum(counts.values())}" for m, n in counts.items())
    assert asked(whole) == fixed
    other = "H" if adsorbate != "H" else "O"
    assert asked(new, other) == fixed  # atoms of another adsorbate are no slab
    assert free.asked("no CIF").identity == fixed
    only = replace(free, metals=("Fe",))
    assert only.asked(slab(f"{adsorbate}</s>{new} (1 1 1)")).identity == fixed


def test_a_runs_designs_get_the_verdict_of_its_report(
    small_model: tuple[CatalyticMLLM, Collator],
    small_config: Config,
    data: Data,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Candidates of the closed loop and the ideal slabs beside it, written as CIFs and read again."""
    states: list[TaskState] = []
    real = design.search
    model, _ = small_model
    # energies of a few eV: rewards of such as are 50 eV off are all 0, and the first would be the best
    monkeypatch.setitem(model._buffers, "energy_std", 0.05 * model.energy_std)
    monkeypatch.setattr(design, "search", lambda *a, **k: states.extend(real(*a, **k)) or states)
    parts = {name: some[:40] for name, some in data.items()}
    config = configured(small_config, judge="none")
    config.ga_grpo = replace(config.ga_grpo, initial=4)
    report = design.evaluate_design(*small_model, config, parts, ONE)
    tasks = benchmark_tasks(parts, 2, config.seed)
    fixed = tasks[:2]
    limits = report["budgets"]
    tried = {t.name: [c.text for c in s.tried] for t, s in zip(fixed, states)}
    unrelaxed = {t.name: [False] * limits[-1] for t in fixed}
    write_candidates(tmp_path / "loop", tried, unrelaxed)
    ideal = {t.name: ideal_of(t, limits[-1], config.seed, k) for k, t in enumerate(fixed)}
    texts = {n: [write_cif(s, 9) for s in some] for n, some in ideal.items()}
    write_candidates(tmp_path / "ideal", texts, unrelaxed)
    loop = ClosedLoop(*small_model, config.ga_grpo)
    for name, method in (("loop", "search"), ("ideal", "enumeration")):
        texts, relaxed, more = read_candidates(tmp_path / name, tasks, limits[-1])
        assert more == 0 and relaxed == unrelaxed
        found = score(loop, fixed, texts, relaxed, limits)
        for mine, theirs in zip(found["items"], report["items"]):
            ours, run = mine["answers"]["search"], theirs["answers"][method]
            assert [a["feasible"] for a in ours] == [a["feasible"] for a in run]
            for a, b in zip(ours, run):
                assert (a["predicted"] is None) == (b["predicted"] is None)
                if a["predicted"] is not None:
                    assert a["predicted"] == pytest.approx(b["predicted"], rel=1e-4, abs=1e-3)
        curve = report["curves"][method]["own"]
        assert found["fixed"]["own"]["success"] == curve["success"]
        assert found["fixed"]["own"]["interval"] == curve["interval"]
    assert any(not np.isnan(c.predicted) for s in states for c in s.tried)  # else the loop's row says nothing
    assert found["fixed"]["failures"] == dict.fromkeys(("PF", "VF", "CM", "PV_0.7", "AD"), 0.0)


def test_known_systems_and_nothing_are_no_answers(
    small_model: tuple[CatalyticMLLM, Collator],
    small_config: Config,
    data: Data,
    shipped: list[BenchmarkTask],
) -> None:
    loop = ClosedLoop(*small_model, small_config.ga_grpo)
    tasks = [shipped[0], shipped[48]]
    known = {t.name: [write_cif(s) for s in known_of(t, data["train"], 3, 0, k)] for k, t in enumerate(tasks)}
    ideal = ideal_of(shipped[48], 3, 0, 48)
    assert not {s.bulk for s in ideal} & shipped[48].known and len({s.identity for s in ideal}) > 1
    new = {shipped[48].name: [write_cif(ideal[0]), "data_x", *(write_cif(s) for s in ideal[1:])]}
    rows = {
        name: score(
            loop, tasks, texts, {n: [name == "training"] * len(mine) for n, mine in texts.items()}, [1, 3]
        )
        for name, texts in (("training", known), ("ideal", new))
    }
    json.dumps(rows)
    for kind in ("fixed", "free"):
        of = rows["training"][kind]
        assert (of["candidates"], of["failures"]["CM"], of["own"]["success"]) == (3, 1.0, [0.0, 0.0])
    of = rows["ideal"]["free"]
    assert (of["candidates"], of["failures"]["PF"], of["failures"]["CM"]) == (4, 0.25, 0.25)
    assert rows["ideal"]["fixed"]["answered"] == 0
    assert np.isnan(rows["ideal"]["fixed"]["failures"]["PF"])
    words = table(rows).splitlines()
    assert len(words) == 6 and words[5].startswith("| ideal | 1 free | 1 | 4 | 25.0 % |")


def test_files_that_cannot_be_read_are_told(
    shipped: list[BenchmarkTask], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("2.relaxed.cif", "10.cif", "1.cif"):
        (tmp_path / "dir" / "free-003").mkdir(parents=True, exist_ok=True)
        (tmp_path / "dir" / "free-003" / name).write_text(name)
    assert read_candidates(tmp_path / "dir", shipped, 2) == (
        {"free-003": ["1.cif", "2.relaxed.cif"]},
        {"free-003": [False, True]},
        1,
    )
    (tmp_path / "dir" / "fre-003").mkdir()
    with pytest.raises(ValueError, match="fre-003: no task has this name; one is free-003"):
        read_candidates(tmp_path / "dir", shipped, 2)
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=r"no CIFs; a task's are .*none/fixed-000/1.cif"):
        read_candidates(tmp_path / "none", shipped, 2)
    text = BENCHMARK.read_text()
    (tmp_path / "bom.csv").write_text(text, encoding="utf-8-sig")  # as a spreadsheet saves it
    assert read_tasks(tmp_path / "bom.csv") == shipped
    energy = repr(shipped[1].task.energy)
    for old, new, said in (
        (f",{energy},", ",nan,", "csv:3: the energy nan is no number; give one in eV"),
        (f",{energy},", ",-inf,", "csv:3: the energy -inf is no number"),
        (" Cu ", " Cuu ", "csv:50: 'Cuu' is no element; write the metals as 'Cu Ni Pt'"),
        ("\n1,fixed-001", "\n2,fixed-001", "csv:3: tasks of version 2; these rules are version 1"),
        ("fixed-001", "fixed-000", "the task fixed-000 is there twice"),
        ("fixed-001", "../x", "csv:3: a task's name is that of a folder"),
        ("version,task", "version,name", "no column task"),
    ):
        (tmp_path / "tasks.csv").write_text(text.replace(old, new, 1))
        assert main(["evaluate", "generator", str(tmp_path / "dir"), "--tasks", str(tmp_path / "tasks.csv")])
        assert said in capsys.readouterr().err
