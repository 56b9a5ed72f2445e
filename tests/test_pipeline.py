"""The whole pipeline under torchrun on two ranks, small: what trains moves, what is frozen does not,
kills lose nothing."""

import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from catmllm.config import Config, DataConfig
from catmllm.data.shards import write_shards
from catmllm.data.slabs import load_slabs
from catmllm.pipeline import begins_anew
from catmllm.world import World
from tests.behaviour.test_layouts import forks
from tests.small_run import ROOT, kill, launch

STAGES = ("encoder", "align", "joint", "instruct", "grpo", "ga_grpo")
ENCODER = ("encoder.", "energy_head.graph.")
FROZEN = {
    "align": ("llm.", "energy_head.", "encoder."),
    "joint": (*ENCODER, "prior.", "text_prior."),
    "instruct": (*ENCODER, "projector."),
    "grpo": (*ENCODER, "projector."),
    "ga_grpo": (*ENCODER, "projector.", "llm.model.", "energy_head."),
}


def rows(out: Path, stage: str) -> list[dict]:
    path = out / stage / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def test_every_stage_moves_what_it_trains_and_nothing_else(unbroken: Path) -> None:
    weights = {s: load_file(unbroken / s / "model.safetensors") for s in STAGES}
    for before, stage in itertools.pairwise(STAGES):
        moved = {k for k in weights[stage] if not torch.equal(weights[stage][k], weights[before][k])}
        wrong = [k for k in moved if k.startswith(FROZEN[stage])]
        assert not wrong, f"{stage} moved {wrong}"
        # after so few steps ga_grpo writes nothing that parses: tests/stages moves that one
        if stage not in ("align", "ga_grpo"):
            assert "llm.lm_head.weight" in moved, f"{stage} did not move the LM head"
        if stage in ("instruct", "grpo"):
            assert any(k.startswith("llm.model.language_model.layers.0.") for k in moved)
            for part in ("energy_head.correction.weight", "energy_head.text.weight"):
                assert part in moved or not weights[stage][part].any()  # what does not help counts by 0


@pytest.mark.parametrize(
    ("stages", "data", "anew"),
    [
        (["encoder", "joint"], {"path": "other"}, True),
        (["align", "joint"], {"path": "other"}, True),
        (["joint"], {"labels": "sevennet"}, True),
        (["joint"], {"slabs": "all"}, True),
        (["joint"], {"split_seed": 3, "train_systems": 100}, False),
        (["instruct", "grpo", "ga_grpo"], {"path": "other"}, False),  # or they would know no energy at all
    ],
)
def test_energies_begin_anew_where_labels_are_others_and_are_fitted(
    stages: list[str], data: dict[str, Any], anew: bool
) -> None:
    now = Config(stages=tuple(stages), data=DataConfig(**data))  # type: ignore[arg-type]
    assert begins_anew(Config(), now) == anew


def test_the_first_stage_moves_what_reads_structures_only(unbroken: Path, run_config: Path) -> None:
    from catmllm.config import load_config
    from catmllm.data.open import open_data
    from catmllm.models.build import new_model

    c = load_config(run_config)
    model, _ = new_model(c, open_data(c.data)["train"])
    first, trained = model.state_dict(), load_file(unbroken / "encoder" / "model.safetensors")
    moved = {k for k in trained if not torch.equal(trained[k], first[k])}
    assert any(k.startswith("encoder.blocks.0.") for k in moved)
    assert "energy_head.graph.0.weight" in moved
    statistics = (
        "energy_mean",
        "energy_std",
        "energy_head.centre",
        "energy_head.deviation",
        "prior.",
        "text_prior.",
    )
    assert all(k.startswith((*ENCODER, *statistics)) for k in moved), moved


def test_run_leaves_complete_records(unbroken: Path) -> None:
    metrics = json.loads((unbroken / "metrics.json").read_text())
    assert set(metrics["property"]) == set(STAGES)
    assert set(metrics["generation"]) == set(metrics["missing"]) == {"instruct", "grpo", "ga_grpo"}
    pairs = metrics["missing"]["grpo"]["pairs"]  # one by each rank; answers of 40 tokens are no CIFs
    assert [len(pair["energies"]) for pair in pairs] == [3, 3]
    assert all(np.isfinite(pair["predicted"]["true"]).all() for pair in pairs)
    assert metrics["missing"]["grpo"]["arms"]["indicative_1"]["unread"] == 4
    for stage in STAGES:
        for mode in ("encoder",) if stage == "encoder" else ("both", "graph", "text", "encoder", "start"):
            assert np.isfinite(metrics["property"][stage][mode]["mae"])
        assert metrics["seconds"][stage] > 0
    assert metrics["design"]["n"] == 4 and len(metrics["design"]["items"]) == 4
    trace = metrics["design"]["items"][0]["trace"]
    assert [len(row["energies"]) for row in trace] == [3, 3, 3]
    (earlier,) = metrics["designs"].items()
    assert earlier[0] == "grpo" and earlier[1]["n"] == 4 and metrics["seconds"]["design grpo"] > 0
    page = (unbroken / "report.html").read_text()
    assert "by the stage whose weights search" in page and "Every candidate" in page
    assert (unbroken / "report.html").stat().st_size > 10_000
    assert [r["step"] for r in rows(unbroken, "grpo")] == list(range(4))
    assert (unbroken / "grpo" / "samples.jsonl").read_text().count("\n") >= 1
    answers = [json.loads(line) for line in (unbroken / "grpo" / "answers.jsonl").open()]
    held = [row["reward"] for row in answers if not row.get("free")]
    assert (len(held), len(answers)) == (8, 16) and sum(row["energy"] is None for row in answers) == 8
    assert np.isclose(np.mean(held), metrics["generation"]["grpo"]["reward"], atol=1e-4)


@pytest.fixture(scope="session")
def again(unbroken: Path, run_config: Path) -> Path:
    """The folder of two more runs. `killed`: by a kill of torchrun in its first stage, then on forked ranks
    in three others; `from_shards`: the first stage, of the same systems in shards."""
    folder = unbroken.parent
    settings = yaml.safe_load(run_config.read_text())
    systems = sorted(load_slabs(settings["data"]["path"]), key=lambda s: s.sid)
    write_shards(folder / "shards", systems, shard_size=50)
    settings["data"]["path"], settings["stages"] = str(folder / "shards"), ["encoder"]
    (folder / "shards.yaml").write_text(yaml.safe_dump(settings))
    out = folder / "killed"
    process = launch(run_config, out)
    deadline = time.monotonic() + 300
    while len(rows(out, "encoder")) <= 2:
        assert process.poll() is None, out.with_suffix(".log").read_text()[-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    kill(process, out)
    assert not (out / "encoder" / "model.safetensors").exists(), "killed too late to show anything"
    forks("pipelines", folder)
    return folder


def test_killed_and_resumed_run_repeats_the_unbroken_one(unbroken: Path, again: Path) -> None:
    out = again / "killed"
    for stage in STAGES:
        expected, found = rows(unbroken, stage), rows(out, stage)
        assert [r["step"] for r in found] == [r["step"] for r in expected]
        assert [r["loss"] for r in found] == [r["loss"] for r in expected], stage
        for name, tensor in load_file(unbroken / stage / "model.safetensors").items():
            assert torch.equal(tensor, load_file(out / stage / "model.safetensors")[name]), (stage, name)
    mine, theirs = (json.loads((p / "metrics.json").read_text()) for p in (out, unbroken))
    for part in (
        "design",
        "generation",
        "missing",
        "property",
    ):  # as text: a mean over nothing is NaN, which equals nothing
        assert json.dumps(mine[part]) == json.dumps(theirs[part])


def test_another_configuration_is_refused(unbroken: Path, run_config: Path) -> None:
    process = subprocess.run(
        [
            sys.executable,
            str(ROOT / "catmllm/train.py"),
            str(run_config),
            f"out={unbroken}",
            "joint.lr=0.5",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 1
    assert "joint.lr" in process.stderr and "Traceback" not in process.stderr


def test_unknown_key_names_the_nearest() -> None:
    process = subprocess.run(
        [sys.executable, str(ROOT / "catmllm/train.py"), "grpo.betta=1"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 2
    assert "grpo.beta" in process.stderr


def test_a_folder_of_shards_trains_as_the_file_does(unbroken: Path, again: Path) -> None:
    """The same systems in the same order, so every loss is the same to the last bit."""
    out = again / "from_shards"
    assert [r["loss"] for r in rows(out, "encoder")] == [r["loss"] for r in rows(unbroken, "encoder")]
    mine, theirs = (json.loads((p / "metrics.json").read_text()) for p in (out, unbroken))
    assert mine["baselines"] == theirs["baselines"]
    assert mine["property"]["encoder"] == theirs["property"]["encoder"]


@pytest.mark.parametrize(
    ("overrides", "noted"),
    [
        ([], False),
        (["stages=[align, joint]"], True),
        (["stages=[align, joint]", "joint.train_encoder=true"], False),
        (["stages=[align, joint]", "align.train_encoder=true"], False),
        (["stages=[joint]", "align.train_encoder=true"], True),
        (["stages=[joint]", "init=runs/other/align"], False),
    ],
)
def test_a_run_whose_encoder_stays_random_is_told(overrides: list[str], noted: bool) -> None:
    from catmllm.config import load_config
    from catmllm.pipeline import _random_encoder

    assert _random_encoder(load_config(None, overrides)) == noted


def test_a_start_that_failed_claims_nothing(tmp_path: Path) -> None:
    """A wrong data.path or init leaves no folder; a record without any training gives way to another."""
    from catmllm.config import Config, load_config
    from catmllm.pipeline import _open, run
    from catmllm.world import start

    out = tmp_path / "run"
    for wrong in (f"data.path={tmp_path}/absent", f"init={tmp_path}/absent"):
        assert run(load_config(overrides=[f"out={out}", wrong])) == 1
        assert not out.exists()

    def config(seed: int) -> Config:
        return load_config(overrides=[f"out={out}", f"seed={seed}"])

    world = start(config(0))
    try:
        assert _open(config(0), out, world).values["config"]["seed"] == 0
        assert _open(config(1), out, world).values["config"]["seed"] == 1
        (out / "joint").mkdir()
        (out / "joint" / "log.jsonl").touch()
        with pytest.raises(ValueError, match="another configuration"):
            _open(config(2), out, world)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def test_weights_of_another_make_are_refused_before_any_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each key that makes weights is named with both values and what to write; others may differ."""
    from catmllm.config import load_config, to_dict
    from catmllm.pipeline import _begins_from, run

    stage, out = tmp_path / "before" / "instruct", tmp_path / "out"
    stage.mkdir(parents=True)
    (stage / "model.safetensors").touch()
    words = ["data.cutoff=5.0", "model.encoder.num_layers=3", "model.projector=invariant"]
    (stage / "catmllm.json").write_text(json.dumps(to_dict(load_config(overrides=words))))
    begin = [f"init={stage}", f"out={out}", "stages=[grpo]"]
    assert run(load_config(overrides=begin)) == 1
    said = capsys.readouterr().err
    assert "`model.projector` is max here and invariant there" in said and f"add {' '.join(words)}" in said
    assert not out.exists()
    others = ["model.llm.attention=eager", "model.closed_form=false", "precision=fp32"]
    config = load_config(overrides=[*begin, *words, *others])
    config.model.encoder.checkpoint = "weights.pt"
    assert _begins_from(config, out, World(0, 1, torch.device("cpu"))) == stage


def test_the_folder_of_a_stage_is_no_folder_of_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from catmllm.config import load_config
    from catmllm.pipeline import run

    (tmp_path / "joint").mkdir()
    (tmp_path / "joint" / "model.safetensors").touch()
    assert run(load_config(overrides=[f"out={tmp_path / 'joint'}"])) == 1
    assert "folder of a stage" in capsys.readouterr().err


def test_a_judge_with_another_zero_is_refused_before_anything_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from catmllm.config import load_config
    from catmllm.pipeline import judge_note, run

    assert run(load_config(overrides=[f"out={tmp_path / 'run'}", "evaluate.judge=sevennet"])) == 1
    said = capsys.readouterr().err
    assert "SevenNet-0 cannot judge designs at energies of DIEP" in said and "Give diep or none" in said
    assert "`catmllm evaluate RUN --judge sevennet`" in said and not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match=r"DIEP \(r2SCAN\) cannot judge .* Give sevennet or none"):
        judge_note(load_config(overrides=["data.labels=sevennet"]))
    for fine in (
        ["data.labels=sevennet", "evaluate.judge=sevennet"],
        ["data.labels=sevennet", "evaluate.judge=none"],
        ["data.labels=sevennet", "evaluate.design_tasks=0"],
        ["data.labels=sevennet", "stages=[joint, grpo]"],
        ["data.path=mine", "evaluate.judge=none"],
    ):
        assert judge_note(load_config(overrides=fine)) == ""
    assert "Who made the labels of mine is not known" in judge_note(load_config(overrides=["data.path=mine"]))


def test_without_design_tasks_there_is_no_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from catmllm import pipeline
    from catmllm.config import load_config
    from catmllm.world import start

    def measured(*_: Any) -> None:
        raise AssertionError("a model was loaded to search with")

    monkeypatch.setattr(pipeline, "_to_measure", measured)
    free = ["evaluate.free_tasks=2"]
    config = load_config(overrides=[*free, "evaluate.design_tasks=0"])
    world = start(config)
    try:
        record = pipeline.Record(tmp_path / "metrics.json", world)
        pipeline._design(config, {}, record, world)
        assert not record.values
        with pytest.raises(AssertionError, match="to search with"):
            pipeline._design(load_config(overrides=free), {}, record, world)
    finally:
        torch.distributed.destroy_process_group()
