"""Runs whose checkpoints and stages lie on a store: in memory, and on a server that speaks S3.

`make test-store` makes an environment with s3fs and moto's server and runs the slow ones.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import torch
import torch.distributed as dist
from fsspec.implementations.memory import MemoryFileSystem
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader

from catmllm.config import ConfigError, load_config
from catmllm.config.needs import check_needs
from catmllm.stages.joint import Joint
from catmllm.train.loop import train
from catmllm.train.stage import Context
from catmllm.train.store import Folder, Mirror, StoreError
from catmllm.world import World
from tests.contexts import MakeContext, small
from tests.small_run import ROOT


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture
def memory() -> Iterator[MemoryFileSystem]:
    """A store without anything in it."""
    fs = fsspec.filesystem("memory")
    fs.rm("/runs", recursive=True) if fs.exists("/runs") else None
    yield fs


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """This process, in a group of its own."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield World(0, 1, torch.device("cpu"))
    dist.destroy_process_group()


class Pulled(RuntimeError):
    """The plug of a machine."""


def on(context: Context, out: Path, address: str) -> Context:
    """The context of a machine whose `out` is this folder."""
    context.folder = out / "joint"
    context.folder.mkdir(parents=True, exist_ok=True)
    context.mirror = Mirror(address, out, context.world)
    context.mirror.begin()
    return context


def test_another_machine_goes_on_from_the_store(
    make_context: MakeContext, memory: MemoryFileSystem, tmp_path: Path
) -> None:
    config = small()
    config.joint.steps, config.joint.checkpoint_every = 9, 2
    unbroken = make_context(config)
    state, _ = train(Joint, unbroken)

    class Dies(Joint):
        def step(self, step):
            if step == 7:
                raise Pulled
            return super().step(step)

    context = on(make_context(config), tmp_path / "first", "memory://runs/a")
    with pytest.raises(Pulled):
        train(Dies, context)
    assert not (context.folder / "checkpoints").exists()
    place = Folder("memory://runs/a/joint/checkpoints")
    deadline = time.monotonic() + 60
    while (place / "step-0000006").read("step.json") is None:  # a plug pulled leaves the thread to end here
        assert time.monotonic() < deadline
        time.sleep(0.01)
    # what a write leaves that is cut off: parts, and half of a record
    (place / "step-0000008").write("extra-0.json", b"{}")
    (place / "step-0000007").write("step.json", b'{"step": 7, "wor')
    # copied to a disk it is what torch's own reader reads, with all weights that train and their moments
    memory.get("/runs/a/joint/checkpoints/step-0000006", str(tmp_path / "copy"), recursive=True)
    known = FileSystemReader(tmp_path / "copy").read_metadata()
    trained = [n for n, p in context.model.named_parameters() if p.requires_grad]
    assert {f"model.{n}" for n in trained} <= set(known.state_dict_metadata)
    assert {f"optimizer.state.{n}.exp_avg_sq" for n in trained} <= set(known.state_dict_metadata)

    again = on(make_context(config), tmp_path / "second", "memory://runs/a")
    found, _ = train(Joint, again)
    assert [r["loss"] for r in rows(again.folder)] == [r["loss"] for r in rows(unbroken.folder)]
    assert all(torch.equal(found[k], v) for k, v in state.items())
    assert place.names() == ["step-0000006", "step-0000008"]  # the last two
    assert (place / "step-0000008").read(".metadata") is not None


def test_a_stages_weights_come_last(
    memory: MemoryFileSystem, alone: World, tmp_path: Path, monkeypatch
) -> None:
    """Both ways: a machine that dies in the middle leaves no stage that looks finished."""
    out = tmp_path / "out"
    (out / "joint" / "checkpoints" / "step-1").mkdir(parents=True)
    for name in ("model.safetensors", "zzz.json", "checkpoints/step-1/step.json", "part.tmp"):
        (out / "joint" / name).write_text(name)
    (out / "metrics.json").write_text("{}")
    order: list[str] = []
    for name in ("put_file", "get_file"):
        act = getattr(MemoryFileSystem, name)

        def noted(self, a, b, *args, act=act, **options):
            order.append(Path(a).name)
            return act(self, a, b, *args, **options)

        monkeypatch.setattr(MemoryFileSystem, name, noted)
    mirror = Mirror("memory://runs/b", out, alone)
    mirror.share()
    assert order[-1] == "model.safetensors" and {*order[:-1]} == {"metrics.json", "zzz.json"}
    order.clear()
    mirror.share()
    assert order == []  # nothing has changed
    Mirror("memory://runs/b", tmp_path / "other", alone).begin()
    assert {*order} == {"metrics.json", "zzz.json", "model.safetensors"}
    fetched = [name for name in order if not name.endswith(".safetensors")]
    assert len(fetched) == 2 and order[-1] == "model.safetensors"
    assert (tmp_path / "other" / "joint" / "zzz.json").read_text() == "zzz.json"


def test_the_longer_history_wins(memory: MemoryFileSystem, alone: World, tmp_path: Path) -> None:
    """A machine that comes back has an old log, or a newer one than the store."""
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    (first / "log.jsonl").write_text("1\n")
    (mine := Mirror("memory://runs/c", first, alone)).begin()
    (theirs := Mirror("memory://runs/c", second, alone)).begin()
    assert (second / "log.jsonl").read_text() == "1\n"
    (first / "log.jsonl").write_text("1\n2\n")
    mine.share()
    theirs.begin()
    assert (second / "log.jsonl").read_text() == "1\n2\n"
    (second / "log.jsonl").write_text("1\n2\n3\n")
    later = time.time() + 5
    os.utime(second / "log.jsonl", (later, later))
    Mirror("memory://runs/c", second, alone).begin()
    assert memory.cat("/runs/c/log.jsonl") == b"1\n2\n3\n"


class Refusing(MemoryFileSystem):
    """A store that one may read."""

    protocol = "refusing"
    store: dict = {}  # noqa: RUF012  shared, as MemoryFileSystem's
    pseudo_dirs = [""]  # noqa: RUF012

    def pipe_file(self, *args, **options):
        raise PermissionError("Access Denied")


def test_a_store_that_refuses_is_told_and_training_goes_on(
    make_context: MakeContext, capfd: pytest.CaptureFixture[str]
) -> None:
    fsspec.register_implementation("refusing", Refusing, clobber=True)
    config = small()
    config.joint.steps, config.joint.checkpoint_every = 5, 2
    context = make_context(config)
    context.mirror = Mirror("refusing://runs/d", context.folder.parent / "none", context.world)
    train(Joint, context)
    err = capfd.readouterr().err
    assert err.count("could not be written") == 2 and "Access Denied" in err and "be written;" in err
    assert "MiB free" not in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("runs/mine", "is no address of a store, such as s3://"),
        ("sss://bucket/mine", "is no address of a store, such as s3://"),
        ("s3://bucket/mine", "needs s3fs: pip install s3fs"),
    ],
)
def test_what_a_store_needs_is_one_line(address: str, says: str, monkeypatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "s3fs" else find(n, *a))
    with pytest.raises(ConfigError) as error:
        check_needs(load_config(None, ["evaluate.judge=none", f"store={address}"]))
    assert says in str(error.value) and "\n" not in str(error.value)


# S3 ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a client of moto's server, which has a bucket `runs`."""
    pytest.importorskip("s3fs", reason="make test-store has it")
    if importlib.util.find_spec("moto") is None:
        pytest.skip("make test-store has moto's server")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    log = (tmp_path_factory.mktemp("moto") / "log.txt").open("w")
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-p", str(port)], stdout=log, stderr=subprocess.STDOUT
    )
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while True:
            assert server.poll() is None and time.monotonic() < deadline
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/moto-api/"):
                break
            time.sleep(0.1)
        urllib.request.urlopen(urllib.request.Request(f"{address}/runs", method="PUT"))
        yield {
            "AWS_ENDPOINT_URL": address,
            "AWS_ACCESS_KEY_ID": "a",
            "AWS_SECRET_ACCESS_KEY": "b",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
    finally:
        server.kill()
        server.wait()


def run(config: Path, out: Path, options: list[str], environment: dict[str, str]) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", str(ROOT / "catmllm/train.py")]
    command += [str(config), f"out={out}", "stages=[joint,instruct]", *options]
    out.parent.mkdir(exist_ok=True)
    with out.with_suffix(".log").open("a") as log:
        return subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | environment | {"OMP_NUM_THREADS": "1"},
        )


@pytest.mark.slow
def test_a_machine_that_is_lost_goes_on_from_s3(
    run_config: Path, tmp_path: Path, s3: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks are killed (-9) in the second stage and their disk with them: another machine ends the run
    as if nothing had happened, to the last bit of every weight."""
    for name, value in s3.items():
        monkeypatch.setenv(name, value)
    unbroken, first, second = tmp_path / "u" / "run", tmp_path / "a" / "run", tmp_path / "b" / "run"
    process = run(run_config, unbroken, [], s3)
    assert process.wait(timeout=400) == 0, unbroken.with_suffix(".log").read_text()[-4000:]
    store = ["store=s3://runs/mine"]
    process = run(run_config, first, store, s3)
    checkpoints = Folder("s3://runs/mine/instruct/checkpoints")
    deadline = time.monotonic() + 300
    while not any((checkpoints / name).read("step.json") for name in checkpoints.names()):
        assert process.poll() is None and time.monotonic() < deadline, first.with_suffix(".log").read_text()
        time.sleep(0.05)
    process.kill()  # its workers die with it
    process.wait()
    time.sleep(2.0)
    assert not (first / "instruct" / "model.safetensors").exists(), "killed too late to show anything"
    shutil.rmtree(first)
    process = run(run_config, second, store, s3)
    assert process.wait(timeout=400) == 0, second.with_suffix(".log").read_text()[-4000:]
    for stage in ("joint", "instruct"):
        assert [r["loss"] for r in rows(second / stage)] == [r["loss"] for r in rows(unbroken / stage)]
        mine, theirs = (load_file(p / stage / "model.safetensors") for p in (second, unbroken))
        assert all(torch.equal(mine[k], v) for k, v in theirs.items())
    said = second.with_suffix(".log").read_text()
    assert "joint: LLM" not in said and "instruct: LLM" in said  # the first stage is taken as it is
    copied = Folder("s3://runs/mine")
    assert (copied / "instruct").read("model.safetensors") == (
        second / "instruct" / "model.safetensors"
    ).read_bytes()
    assert copied.read("metrics.json") == (second / "metrics.json").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrong", "address", "says"),
    [
        ({}, "s3://absent/mine", "bucket does not exist"),
        (
            {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"},
            "s3://runs/mine",
            "Could not connect|Connect call failed",
        ),
        ({"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}, "s3://runs/mine", "credentials"),
    ],
)
def test_an_s3_that_cannot_be_used_is_one_line(
    wrong: dict[str, str | None],
    address: str,
    says: str,
    s3: dict[str, str],
    alone: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import s3fs

    for name, value in (s3 | wrong).items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    (tmp_path / "metrics.json").write_text("{}")
    with pytest.raises(StoreError, match=says) as error:
        Mirror(address, tmp_path, alone).begin()
    s3fs.S3FileSystem.clear_instance_cache()
    assert address in str(error.value) and "AWS_ACCESS_KEY_ID" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_that_is_not_there_is_empty(memory: MemoryFileSystem) -> None:
    nowhere = Folder("memory://runs/nowhere")
    nowhere.delete("step.json")
    nowhere.remove()
    assert nowhere.names() == [] and nowhere.read("step.json") is None
