"""Training runs as forked processes: Python and torch are imported once,
so that a run of many ranks starts at once.

A file of its own, run as `python -m tests.behaviour.forks CASE FOLDER`: after autograd has run in a process
its forks cannot run it, and pytest's process has. The case `agent` is one rank under torchrun.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import random
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from catmllm.config import Config, load_config
from catmllm.data.open import open_data
from catmllm.models.build import new_model
from catmllm.stages import STAGES
from catmllm.train.loop import train
from catmllm.train.stage import Context
from catmllm.train.stop import EXIT_SAVED, Stopped
from catmllm.world import start
from tests.conftest import SMALL_MODEL

BASE = (
    *SMALL_MODEL,
    "joint.train_encoder=true",  # every part of the model trains
    "tensorboard=false",
    "precision=fp32",
    "joint.steps=16",
    "joint.batch_size=8",
    "joint.warmup=2",
    "joint.log_every=1",
    "joint.checkpoint_every=1000",  # a checkpoint takes as long as three steps; who wants some says so
    "joint.lr=1e-3",
)


class Prepared:
    """Data and a model, made once before any fork."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.data = {k: v[:80] for k, v in open_data().items()}
        self.model, self.collate = new_model(load_config(None, BASE), self.data["train"])

    def rank(self, config: Config, stage: str, folder: Path) -> int:
        """Train as the process that the environment describes; returns the exit status."""
        world = start(config)
        folder.mkdir(parents=True, exist_ok=True)
        collate = dataclasses.replace(self.collate, data=config.data)
        context = Context(config, copy.deepcopy(self.model), collate, self.data, world, folder)
        try:
            state, _ = train(STAGES[stage], context)
        except Stopped as stopped:
            print(stopped, flush=True)
            return EXIT_SAVED
        if world.main:
            save_file(state, folder / "model.safetensors")
        return 0

    def fork(self, ranks: int, overrides: Sequence[str], folder: Path, stage: str = "joint") -> list[int]:
        """Start a run; returns the ids of its processes."""
        config = load_config(None, [*BASE, *overrides])
        return fork(ranks, folder, partial(self.rank, config, stage, folder))

    def run(self, ranks: int, overrides: Sequence[str], folder: Path, stage: str = "joint") -> list[int]:
        return wait(self.fork(ranks, overrides, folder, stage))


def fork(ranks: int, folder: Path, rank: Callable[[], int]) -> list[int]:
    """Processes that find each other as torchrun's do and end with the status of `rank()`; their ids. What
    they print goes to `folder`/rank-N.txt."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    children = []
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(ranks):
        child = os.fork()
        if child:
            children.append(child)
            continue
        status = 1
        try:
            os.environ |= {"RANK": str(k), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
            os.environ["MASTER_PORT"] = str(port)
            out = os.open(folder / f"rank-{k}.txt", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
            os.dup2(out, 1)
            os.dup2(out, 2)
            status = rank()
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return children


def wait(children: Sequence[int]) -> list[int]:
    """Exit statuses; minus the signal's number where one ended a process."""
    return [os.waitstatus_to_exitcode(os.waitpid(c, 0)[1]) for c in children]


def said(folder: Path) -> str:
    """The end of what a run's first rank has printed."""
    return (folder / "rank-0.txt").read_text()[-4000:]


def losses(folder: Path) -> list[float]:
    path = folder / "log.jsonl"
    return [json.loads(row)["loss"] for row in path.read_text().splitlines()] if path.is_file() else []


LAYOUTS: dict[str, tuple[int, Sequence[str]]] = {
    "one rank": (1, ()),
    "two ranks": (2, ("joint.batch_size=4",)),
    "accumulation x 4": (1, ("joint.accumulate=4",)),
    "two ranks, accumulation x 2": (2, ("joint.batch_size=4", "joint.accumulate=2")),
    "two copies": (2, ("joint.batch_size=4", "replicate=2")),
    "two copies of two shards": (4, ("joint.batch_size=2", "replicate=2")),
    "nothing freed": (2, ("joint.batch_size=4", "joint.reshard=none")),
    "all freed": (2, ("joint.batch_size=4", "joint.reshard=all")),
    "padded": (1, ("data.packed=false",)),
    "selective checkpointing": (1, ("checkpointing=selective",)),
    "full checkpointing": (1, ("checkpointing=full",)),
}
# Minutes of compilation.
COMPILED: dict[str, tuple[int, Sequence[str]]] = {
    "compiled": (1, ("compile=true",)),
    "compiled, two ranks": (2, ("compile=true", "joint.batch_size=4")),
    "compiled, selective checkpointing": (1, ("compile=true", "checkpointing=selective")),
}


def layouts(folder: Path, chosen: dict[str, tuple[int, Sequence[str]]] = LAYOUTS) -> dict[str, Any]:
    """The loss curve of one run under every layout of processes and passes."""
    prepared, out = Prepared(), {}
    for name, (ranks, overrides) in chosen.items():
        place = folder / name.replace(" ", "-")
        assert prepared.run(ranks, overrides, place) == [0] * ranks, said(place)
        out[name] = losses(place)
    return out


def resumes(folder: Path) -> dict[str, Any]:
    """A run ended by signals and gone on with, also on another number of ranks."""
    prepared, out = Prepared(), {}
    steps = ("joint.batch_size=4",)
    sys.path.insert(0, str(Path(__file__).parent / "standin"))  # for `optimizer=apex`
    prepared.run(2, steps, folder / "unbroken")
    out["unbroken"] = losses(folder / "unbroken")
    lora = (*steps, "lora.r=4", "lora.dropout=0.1")
    assert prepared.run(2, lora, folder / "unbroken lora") == [0, 0]
    out["unbroken lora"] = losses(folder / "unbroken lora")
    apex = (*steps, "optimizer=apex")
    assert prepared.run(2, apex, folder / "unbroken apex") == [0, 0], said(folder / "unbroken apex")
    out["unbroken apex"] = losses(folder / "unbroken apex")
    for name, number, hit, options in (
        ("term", signal.SIGTERM, [0, 1], steps),
        ("usr1", signal.SIGUSR1, [1], lora),
        ("apex", signal.SIGTERM, [0, 1], apex),
    ):
        children = prepared.fork(2, options, folder / name)
        while len(losses(folder / name)) < 3:
            time.sleep(0.002)
        for k in hit:
            os.kill(children[k], number)
        out[f"{name} status"] = wait(children)
        out[f"{name} saved"] = len(losses(folder / name))
        shutil.copytree(folder / name, folder / f"{name} one rank")
        assert prepared.run(2, options, folder / name) == [0, 0]
        out[name] = losses(folder / name)
    one = ("joint.batch_size=8",)
    assert prepared.run(1, one, folder / "term one rank") == [0]
    out["term one rank"] = losses(folder / "term one rank")
    out["equal weights"] = equal_weights(folder / "unbroken", folder / "term") and equal_weights(
        folder / "unbroken lora", folder / "usr1"
    )
    out["equal weights"] &= equal_weights(folder / "unbroken apex", folder / "apex")
    return out


def kills(folder: Path, count: int = 20) -> dict[str, Any]:
    """A run of two ranks killed (-9) at `count` random moments; whether it then equals the unbroken one."""
    prepared, rng = Prepared(), random.Random(0)
    steps = ("joint.batch_size=4", "joint.checkpoint_every=2", "joint.steps=90", "precision=bf16")
    assert prepared.run(2, steps, folder / "unbroken") == [0, 0]
    place, done, while_saving, starts = folder / "killed", 0, 0, []
    while done < count:
        children = prepared.fork(2, steps, place)
        # At a random moment of the start, or after a few more steps: every second step begins a save.
        before, more = len(losses(place)), rng.randrange(7)
        deadline = time.monotonic() + 120
        while more and len(losses(place)) < before + more and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(rng.uniform(0.0, 0.2 if more else 2.0))
        running = [c for c in children if os.waitpid(c, os.WNOHANG)[0] == 0]
        assert len(running) == 2, said(place)
        for child in rng.sample(children, 2):
            os.kill(child, signal.SIGKILL)
        wait(children)
        done += 1
        written = place.glob("checkpoints/step-*")
        while_saving += not all((p / "step.json").exists() for p in written)
        starts.append(len(losses(place)))
        if (place / "model.safetensors").exists():
            raise AssertionError(f"the run ended before kill {done}; steps seen: {starts}")
    assert prepared.run(2, steps, place) == [0, 0], said(place)
    return {
        "kills": done,
        "while saving": while_saving,
        "steps when killed": starts,
        "equal losses": losses(place) == losses(folder / "unbroken"),
        "steps": len(losses(place)),
        "equal weights": equal_weights(folder / "unbroken", place),
    }


def equal_weights(a: Path, b: Path) -> bool:
    x, y = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


def half(folder: Path) -> dict[str, Any]:
    """200 steps in float32 and in float16 with its scaler."""
    prepared, out = Prepared(), {}
    for name in ("fp32", "fp16"):
        steps = (f"precision={name}", "joint.steps=200", "joint.warmup=20")
        assert prepared.run(1, steps, folder / name) == [0]
        out[name] = [json.loads(r) for r in (folder / name / "log.jsonl").read_text().splitlines()]
    return out


def pipelines(folder: Path) -> dict[str, Any]:
    """Runs of all stages of a configuration, as `train.py` starts them, on two ranks: `killed` goes on, is
    killed (-9) in three of its stages and then left to end; `from_shards` is that of `shards.yaml`."""
    import transformers.models.qwen2_5_vl.modeling_qwen2_5_vl  # noqa: F401  once, before the forks

    from catmllm import pipeline

    os.environ["CATMLLM_TRACEBACK"] = "1"
    killed, from_shards = folder / "killed", folder / "from_shards"

    def begin(name: str, out: Path) -> list[int]:
        config = load_config(folder / name, [f"out={out}"])
        return fork(2, out / "ranks", partial(pipeline.run, config))

    for stage, step in (("joint", 3), ("grpo", 2), ("ga_grpo", 2)):
        children = begin("small.yaml", killed)
        while len(losses(killed / stage)) <= step:
            assert not os.waitpid(children[0], os.WNOHANG)[0], said(killed / "ranks")
            time.sleep(0.02)
        for child in children:
            os.kill(child, signal.SIGKILL)
        wait(children)
        assert not (killed / stage / "model.safetensors").exists(), "killed too late to show anything"
    assert wait(begin("small.yaml", killed)) == [0, 0], said(killed / "ranks")
    assert wait(begin("shards.yaml", from_shards)) == [0, 0], said(from_shards / "ranks")
    return {}


def agent(folder: Path, overrides: Sequence[str]) -> int:
    """One rank under torchrun; rank 1 of the first life kills itself in the middle."""
    joint = STAGES["joint"]

    def fragile(context: Context) -> Any:
        stage = joint(context)
        step = stage.step

        def dies(k: int) -> Any:
            if k == 6 and context.world.rank == 1 and not (folder / "killed").exists():
                (folder / "killed").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return step(k)

        stage.step = dies  # type: ignore[method-assign]
        return stage

    STAGES["joint"] = fragile
    config = load_config(None, [*BASE, "joint.checkpoint_every=4", *overrides])
    return Prepared().rank(config, "joint", folder)


if __name__ == "__main__":
    case, folder = sys.argv[1], Path(sys.argv[2])
    if case == "agent":
        sys.exit(agent(folder, sys.argv[3:]))
    cases = {
        "layouts": layouts,
        "compiled": partial(layouts, chosen=COMPILED),
        "resumes": resumes,
        "kills": kills,
        "pipelines": pipelines,
        "half": half,
    }
    (folder / "result.json").write_text(json.dumps(cases[case](folder)))
