"""Runs that are killed, stopped, out of disk or off the rails: what was trained stays,
and the rest is as if unbroken."""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import types
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.fsdp import fully_shard

from catmllm.stages.joint import Joint
from catmllm.train import loop
from catmllm.train.checkpoint import CheckpointError, Checkpoints
from catmllm.train.fused_adam import over_shards
from catmllm.train.loop import train
from catmllm.train.setup import Ready, clip
from catmllm.train.sharding import mesh_of
from catmllm.train.stage import Context
from catmllm.train.stop import EXIT_SAVED, LossWatch, TrainingError
from catmllm.train.store import Folder
from tests.behaviour.standin.apex import optimizers
from tests.behaviour.test_layouts import forks
from tests.contexts import MakeContext, small


@pytest.fixture(scope="session")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return forks("resumes", tmp_path_factory.mktemp("resumes"))


@pytest.mark.parametrize(
    ("name", "unbroken"), [("term", "unbroken"), ("usr1", "unbroken lora"), ("apex", "unbroken apex")]
)
def test_a_signal_saves_and_the_same_command_goes_on(resumed: dict, name: str, unbroken: str) -> None:
    """SIGTERM to all, SIGUSR1 to one rank alone (of a run with adapters and dropout): all stop after the same
    step. Also with apex's optimizer (what stands in for it), whose states are laid out otherwise."""
    assert resumed[f"{name} status"] == [EXIT_SAVED, EXIT_SAVED]
    assert 3 <= resumed[f"{name} saved"] < 12
    assert resumed[name] == resumed[unbroken]
    assert resumed["equal weights"]


def test_apex_trains_as_torch_does(resumed: dict) -> None:
    """Over the shards of two ranks, some of them empty."""
    np.testing.assert_allclose(resumed["unbroken apex"], resumed["unbroken"], rtol=5e-5)


@pytest.mark.parametrize("installed", [False, True])
def test_apex_says_what_it_lacks(make_context: MakeContext, monkeypatch, installed: bool) -> None:
    """apex itself is missing, or it is there and cannot run."""
    module = None
    if installed:
        module = types.ModuleType("apex.optimizers")
        module.FusedAdam = Hollow
    monkeypatch.setitem(sys.modules, "apex.optimizers", module)
    config = small()
    config.optimizer = "apex"
    with pytest.raises(TrainingError, match="requires cuda" if installed else "github.com/NVIDIA/apex"):
        train(Joint, make_context(config))


class Hollow(torch.optim.Optimizer):
    def __init__(self, params, lr, betas, adam_w_mode):
        raise RuntimeError("apex.optimizers.FusedAdam requires cuda extensions")


def test_another_number_of_ranks_goes_on_alike(resumed: dict) -> None:
    np.testing.assert_allclose(resumed["term one rank"], resumed["unbroken"], rtol=5e-5)


@pytest.mark.slow
def test_twenty_kills_change_nothing(tmp_path: Path) -> None:
    found = forks("kills", tmp_path)
    assert found["kills"] == 20 and found["while saving"] >= 1
    assert found["equal losses"] and found["equal weights"] and found["steps"] == 90


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(place)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting needs root; the limit on file sizes below checks the same")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def watched_writes(monkeypatch: pytest.MonkeyPatch) -> list[Future]:
    """Futures of the checkpoints' writes, as they begin."""
    writes: list[Future] = []
    save = Checkpoints.save

    def watched(self, *args, **options):
        save(self, *args, **options)
        if self.pending is not None:
            writes.append(self.pending[1])

    monkeypatch.setattr(Checkpoints, "save", watched)
    return writes


def test_a_full_disk_keeps_the_last_good_checkpoint(
    make_context: MakeContext,
    tiny_disk: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    writes = watched_writes(monkeypatch)
    config = small()
    config.joint.steps, config.joint.checkpoint_every = 8, 2
    context = make_context(config)
    context.folder = tiny_disk / "joint"
    context.folder.mkdir()

    class Filling(Joint):
        def step(self, step):
            if step in (3, 4):
                writes[-1].exception()  # a busy machine may not have written what the step before began
            if step == 3:
                with open(tiny_disk / "others", "wb") as f:
                    left = os.statvfs(tiny_disk)
                    f.truncate(0)
                    f.write(b"x" * (left.f_bavail * left.f_bsize - 200_000))
            if step == 5:
                (tiny_disk / "others").unlink()
                kept = sorted(p.name for p in (context.folder / "checkpoints").iterdir())
                assert kept[0] == "step-0000002"
            return super().step(step)

    train(Filling, context)
    err = capfd.readouterr().err
    assert "step 4 could not be written" in err and " MiB free" in err and "step-0000002" in err
    assert sorted(p.name for p in (context.folder / "checkpoints").iterdir())[-1] == "step-0000006"


@contextlib.contextmanager
def limits_undone() -> Iterator[tuple[int, int]]:
    """Whatever happens inside, afterwards files may be as large as before; yields that limit."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        yield before
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


@pytest.mark.parametrize(
    ("values", "lost", "kept"),
    [((5.0, 3.0, 4.0, 6.0), 2, 3), ((5.0, 3.0, 5.5, 6.0), 2, 1), ((3.0, float("nan")), 1, 2)],
)
def test_where_the_best_checkpoint_is_lost_the_next_best_is_kept(
    make_context: MakeContext,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    values: tuple[float, ...],
    lost: int,
    kept: int,
) -> None:
    """A better one after it, the one before it, or where there is none the last weights."""
    writes = watched_writes(monkeypatch)
    config = small()
    o = config.joint
    o.steps, o.validate_every, o.checkpoint_every = len(values), 1, 100
    context = make_context(config)
    weights: list[torch.Tensor] = []

    class Judged(Joint):
        def validate(self) -> dict[str, float]:
            weights.append(context.model.llm.lm_head.weight.full_tensor().detach().clone())
            if writes:
                writes[-1].exception()
            small_files = 50_000 if len(weights) == lost else limit[0]
            resource.setrlimit(resource.RLIMIT_FSIZE, (small_files, limit[1]))
            return {"val": values[len(weights) - 1]}

    with limits_undone() as limit:
        state, _ = train(Judged, context)
    said = capfd.readouterr()
    assert f"the checkpoint of step {lost} could not be written" in said.err
    assert torch.equal(state["llm.lm_head.weight"], weights[kept - 1])
    noted = f"the weights of step {kept} are kept (validation {values[kept - 1]:.4g})"
    assert (noted in said.out + said.err) == (kept < len(values))


def test_three_failed_checkpoints_in_a_row_stop_the_run(
    make_context: MakeContext, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    writes = watched_writes(monkeypatch)
    config = small()
    config.joint.steps, config.joint.checkpoint_every = 12, 2
    context = make_context(config)

    class Limited(Joint):
        def step(self, step):
            if step == 3:
                writes[-1].exception()  # on a busy machine the good one may still be on its way
                resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
            return super().step(step)

    with (
        limits_undone() as before,
        pytest.raises(CheckpointError, match=r"3 checkpoints in a row.*step-0000002 is good"),
    ):
        train(Limited, context)
    assert [p.name for p in (context.folder / "checkpoints").iterdir()] == ["step-0000002"]
    train(Joint, context_again(make_context, context))
    assert [r["step"] for r in rows(context.folder)] == list(range(12))


def context_again(make_context: MakeContext, context):
    again = make_context(context.config)
    again.folder = context.folder
    return again


@pytest.mark.parametrize("kind", ["torch", "apex"])
def test_a_checkpoint_before_the_first_step_counts_no_step(
    context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Three updates with no checkpoint before them, with one, and from that one."""
    monkeypatch.setitem(sys.modules, "apex.optimizers", optimizers)

    def updated(saves: bool = False, reads: bool = False) -> torch.Tensor:
        torch.manual_seed(0)
        model = fully_shard(torch.nn.Linear(3, 2), mesh=mesh_of(context.config, context.world))
        group = {"params": [*model.parameters()], "weight_decay": 0.0}
        optimizer = (
            over_shards([group], 0.1, (0.9, 0.98))
            if kind == "apex"
            else torch.optim.AdamW([group], lr=0.1, betas=(0.9, 0.98), fused=True)
        )
        checkpoints = Checkpoints(Folder(tmp_path), context.world, 2)
        if reads:
            assert checkpoints.restore(model, optimizer) is not None
        if saves:
            checkpoints.save(0, model, optimizer, {})
            checkpoints.settle()
        for k in range(3):
            model(torch.full((1, 3), 1.0 + k)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return model.weight.full_tensor().detach()

    alone = updated()
    assert torch.equal(updated(saves=True), alone)
    assert torch.equal(updated(reads=True), alone)


def test_rotation_keeps_the_last_ones(make_context: MakeContext) -> None:
    config = small()
    config.joint.steps, config.joint.checkpoint_every, config.keep_checkpoints = 9, 1, 3
    context = make_context(config)
    train(Joint, context)
    names = sorted(p.name for p in (context.folder / "checkpoints").iterdir())
    assert names == ["step-0000006", "step-0000007", "step-0000008"]


@pytest.mark.parametrize(
    ("wrong", "spike"), [(float("nan"), 20.0), (1e6, 20.0), (float("inf"), 0.0), (float("-inf"), 0.0)]
)
def test_a_loss_gone_wrong_stops_before_the_update_and_saves_the_batch(
    make_context: MakeContext, wrong: float, spike: float
) -> None:
    """Without a watch for jumps too, as in the RL stages."""
    config = small()
    config.joint.steps, config.joint.checkpoint_every, config.joint.spike = 40, 24, spike
    context = make_context(config)
    seen = {}

    class Broken(Joint):
        def step(self, step):
            work = super().step(step)
            if step == 25:
                seen["ids"] = work.passes[0].batch.input_ids
                seen["weights"] = {k: v.clone() for k, v in context.model.state_dict().items()}
                good = work.passes[0].loss
                work.passes[0].loss = lambda: good() * wrong
            return work

    with pytest.raises(TrainingError, match=r"at step 25.*bad-step-0000025-rank-\*\.pt"):
        train(Broken, context)
    saved = torch.load(context.folder / "bad-step-0000025-rank-0.pt", weights_only=True)
    assert saved["step"] == 25 and torch.equal(saved["batches"][0]["input_ids"], seen["ids"])
    assert saved["batches"][0]["graph"]["edge_vec"].dtype == torch.float32
    now = context.model.state_dict()
    assert all(torch.equal(now[k], v) for k, v in seen["weights"].items())
    assert (context.folder / "checkpoints" / "step-0000024" / "step.json").exists()


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_gradient_that_is_not_finite_changes_no_weight(
    make_context: MakeContext, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """The loss is finite. In float16 the step is skipped and counted, else the run ends."""
    config = small()
    config.precision = precision  # type: ignore[assignment]
    context = make_context(config)
    before: dict[str, torch.Tensor] = {}

    def overflowed(ready: Ready, most: float) -> torch.Tensor:
        if not before:
            before.update({k: v.clone() for k, v in context.model.state_dict().items()})
            ready.trained[0].grad.to_local().fill_(torch.inf)  # type: ignore[union-attr]
        return clip(ready, most)

    monkeypatch.setattr(loop, "clip", overflowed)
    if precision == "fp16":
        train(Joint, context)
        assert [r["skipped_steps"] for r in rows(context.folder)] == [1, 1]
        return
    with pytest.raises(TrainingError, match=r"the gradient is not finite at step 0.*bad-step-0000000"):
        train(Joint, context)
    now = context.model.state_dict()
    assert all(torch.equal(now[k], v) for k, v in before.items())
    assert (context.folder / "bad-step-0000000-rank-0.pt").is_file()


def test_the_watch_tells_jumps_from_noise() -> None:
    rng = np.random.default_rng(0)
    watch = LossWatch(20.0)
    for step in range(2000):
        assert watch.judge(5 * np.exp(-step / 300) + 0.5 + rng.normal() * 0.1) is None
    assert "jumped" in (watch.judge(5.0) or "")
    assert watch.judge(0.5) is None  # the jump was not remembered
    assert LossWatch(0.0).judge(float("inf")) == "the loss is inf"
