"""What a person sees of a run: rows, progress, the line at the start, the profile, FLOPs, optional W&B."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from catmllm.config import Config
from catmllm.stages.align import Align
from catmllm.stages.joint import Joint
from catmllm.train.loop import train
from catmllm.train.metrics import StageLog, optional
from catmllm.train.throughput import PHASES, ModelFlops, phase_rows
from tests.contexts import MakeContext, small


def test_a_run_tells_what_it_does(make_context: MakeContext, capfd: pytest.CaptureFixture[str]) -> None:
    config = small()
    config.profile, config.precision, config.tensorboard = True, "fp16", True
    config.joint.steps, config.joint.checkpoint_every = 7, 3
    context = make_context(config)
    train(Joint, context)
    out, err = capfd.readouterr()
    line = next(l for l in out.splitlines() if l.startswith("joint: LLM"))
    for part in ("(trained)", "encoder", "1 x CPU", "fp16", "master weights fp32", "attention varlen"):
        assert part in line
    for part in ("loss=", "tok/s=", "GiB=", "data=", "scale=", "skipped="):
        assert part in err
    rows = [json.loads(l) for l in (context.folder / "log.jsonl").read_text().splitlines()]
    for key in ("tflops", "memory_gib", "loss_scale", "skipped_steps", "grad_norm", "prepare_seconds"):
        assert all(key in r for r in rows)
    assert all(0 < r["memory_gib"] < 10 and r["tflops"] > 0 for r in rows)
    assert list((context.folder.parent / "tensorboard" / "joint").glob("events*"))
    trace = json.loads((context.folder / "profile" / "trace-0.json").read_text())
    assert any(e.get("name") == "phase:backward" for e in trace["traceEvents"])
    phases = json.loads((context.folder / "profile" / "phases-0.json").read_text())
    assert tuple(phases) == PHASES
    assert all(phases[p]["host_ms"] > 0 for p in ("data", "forward", "backward", "optimizer", "checkpoint"))
    assert "ms host" in err + out


def test_comm_is_the_time_inside_collectives() -> None:
    class Event:
        def __init__(self, name: str, host: float, device: float = 0.0) -> None:
            self.name, self.cpu_time_total, self.device_time_total = name, host, device

    events = [Event("phase:forward", 4000, 6000), Event("gloo:all_gather", 1000), Event("nccl:x", 10, 3000)]
    rows = phase_rows([*events, Event("aten::mm", 9e9)], 2)
    assert rows["forward"] == {"host_ms": 2.0, "device_ms": 3.0}
    assert rows["comm"] == {"host_ms": 0.505, "device_ms": 1.5}


@pytest.mark.parametrize("frozen", [False, True])
def test_flops_are_those_that_torch_counts(make_context: MakeContext, frozen: bool) -> None:
    """A sequence of 96 tokens, forward and backward; frozen:
    the gradient passes through to the input alone."""
    model = make_context(small()).model
    model.text.requires_grad_(not frozen)
    model.llm.lm_head.requires_grad_(not frozen)
    x = torch.randn(1, 96, model.text.config.hidden_size, requires_grad=True)
    ours = ModelFlops(model, True).of(96, 1)
    with FlopCounterMode(display=False) as counter:
        hidden = model.text(inputs_embeds=x, use_cache=False).last_hidden_state
        model.llm.lm_head(hidden).sum().backward()
    # torch counts what its attention's backward pass computes again too, the first of two products
    c = model.text.config
    again = 2 * 96**2 * c.num_hidden_layers * c.num_attention_heads * model.text.layers[0].self_attn.head_dim
    assert ours == pytest.approx(counter.get_total_flops() - again, rel=1e-6)
    assert ModelFlops(model, False).of(96, 1) == pytest.approx(ours / (2 if frozen else 3), rel=0.2)


def test_a_frozen_llm_is_not_credited_with_training(make_context: MakeContext) -> None:
    context = make_context(small())
    train(Align, context)
    row = json.loads((context.folder / "log.jsonl").read_text().splitlines()[0])
    tokens = row["tokens_per_s"] * row["seconds"]
    c = context.model.text.config
    layer = c.hidden_size * (2 * c.hidden_size + 2 * 2 * c.hidden_size // c.num_attention_heads)
    weights = c.num_hidden_layers * (layer + 3 * c.hidden_size * c.intermediate_size)
    weights += c.hidden_size * c.vocab_size
    assert row["tflops"] * row["seconds"] * 1e12 == pytest.approx(2 * weights * tokens, rel=0.3)


def test_wandb_without_its_package_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="pip install wandb"):
        optional("wandb")


def test_wandb_gets_every_row(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list = []

    class Run:
        def log(self, values, step):
            seen.append((step, values))

        def finish(self, exit_code):
            seen.append(exit_code)

    def init(**options):
        seen.append(options)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", type(sys)("wandb"))
    monkeypatch.setattr(sys.modules["wandb"], "init", init, raising=False)
    monkeypatch.setattr(sys.modules["wandb"], "Table", dict, raising=False)
    config = Config(tensorboard=False, wandb="catalysts")
    with StageLog(tmp_path / "run" / "joint", "joint", 0, 2, config, True) as log:
        log.row(0, {"loss": 1.0})
        log.table(0, [{"prompt": "x", "reward": 1.5}])
    assert seen[0]["project"] == "catalysts" and seen[0]["resume"] == "allow"
    table = {"columns": ["prompt", "reward"], "data": [["x", 1.5]]}
    assert seen[1:] == [(0, {"loss": 1.0}), (0, {"answers": table}), 0]


def test_mlflow_keeps_rows_tables_and_the_run_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    config = Config(tensorboard=False, mlflow="catalysts")
    for first in (0, 2):  # the second goes on where the first ended
        with StageLog(tmp_path / "run" / "joint", "joint", first, 4, config, True) as log:
            for step in range(first, first + 2):
                log.row(step, {"loss": 1.0 / (1 + step)})
            log.table(first, [{"prompt": "x", "reward": 1.5}])
    client = mlflow.MlflowClient()
    where = client.get_experiment_by_name("catalysts").experiment_id
    (run,) = client.search_runs([where])
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(m.step, m.value) for m in history] == [(k, 1.0 / (1 + k)) for k in range(4)]
    assert run.info.status == "FINISHED"
    names = [f.path for f in client.list_artifacts(run.info.run_id, "answers")]
    assert names == ["answers/step-0000000.json", "answers/step-0000002.json"]


def test_trackio_keeps_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio")
    config = Config(tensorboard=False, trackio="catalysts")
    with StageLog(tmp_path / "run" / "joint", "joint", 0, 4, config, True) as log:
        log.row(0, {"loss": 1.0})
        log.row(1, {"loss": 0.5})
    (run,) = trackio.Api().runs("catalysts")
    assert run.name.startswith("run-joint-")
