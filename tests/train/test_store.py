"""Runs whose checkpoints and stages lie on a store: in memory, and on servers that speak S3.

`make test-store` makes an environment with s3fs, moto's server and rclone's, and runs the slow ones. With
`S3_SERVER=http://host:9000` and the AWS_* variables of a client they run on that server instead, in a bucket
that they make and remove.
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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import torch.distributed as dist
from fsspec.implementations.memory import MemoryFileSystem
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader

from catmllm.config import ConfigError, load_config
from catmllm.config.needs import check_needs
from catmllm.models.state import load_model, save_model
from catmllm.stages.joint import Joint
from catmllm.train.loop import train
from catmllm.train.stage import Context
from catmllm.train.store import Folder, Mirror, StoreError, fetched
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


def test_a_model_on_a_store_is_copied_here(
    memory: MemoryFileSystem, make_context: MakeContext, tmp_path: Path
) -> None:
    """A stage, and the last finished one of a run, whose weights are those that were saved."""
    context = make_context(small())
    model, run = context.model, tmp_path / "run"
    for name, shift in (("encoder", 0.0), ("joint", 1.0)):
        state = {k: v + shift if v.is_floating_point() else v for k, v in model.state_dict().items()}
        save_model(run / name, model, state, context.config, context.collate)
    (run / "instruct" / "checkpoints").mkdir(parents=True)
    (run / "instruct" / "log.jsonl").write_text("{}\n")  # a stage that has not ended
    (run / "joint" / "checkpoints").mkdir()
    (run / "joint" / "checkpoints" / "step.json").write_text("{}")
    memory.put(str(run), "/runs/e", recursive=True)

    out = tmp_path / "out"
    last = fetched("memory://runs/e", out, context.world)
    assert last == out / "init" / "memory" / "runs" / "e" / "joint"
    assert not (last / "checkpoints").exists() and (last / "llm" / "config.json").is_file()
    for place, name in (
        (last, "joint"),
        (fetched("memory://runs/e/encoder/", out, context.world), "encoder"),
    ):
        theirs = load_file(run / name / "model.safetensors")
        found = load_model(place)[0].state_dict()
        assert all(torch.equal(found[k], v) for k, v in theirs.items())
    mirror = Mirror("memory://runs/f", out, context.world)
    mirror.begin()
    assert not memory.exists("/runs/f")  # it is there already
    with pytest.raises(FileNotFoundError, match="memory://runs/nowhere: no trained stage there"):
        fetched("memory://runs/nowhere", out, context.world)


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
    ("setting", "says"),
    [
        ("store=runs/mine", "is no address of a store, such as s3://"),
        ("store=sss://bucket/mine", "is no address of a store, such as s3://"),
        ("store=s3://bucket/mine", "needs s3fs: pip install s3fs"),
        ("init=sss://bucket/mine", "`init: sss://bucket/mine` is no address of a store, such as s3://"),
        ("init=s3://bucket/mine", "`init: s3://bucket/mine` needs s3fs: pip install s3fs"),
    ],
)
def test_what_a_store_needs_is_one_line(setting: str, says: str, monkeypatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "s3fs" else find(n, *a))
    with pytest.raises(ConfigError) as error:
        check_needs(load_config(None, ["evaluate.judge=none", setting]))
    assert says in str(error.value) and "\n" not in str(error.value)


# S3 ---------------------------------------------------------------------------------------------------------


HOME = "us-east-1"


@dataclass
class Server:
    """One that speaks S3: the variables of its client, and a bucket of ours."""

    client: dict[str, str]
    bucket: str = f"catmllm-test-{os.getpid()}"

    def files(self) -> Any:
        import s3fs

        region = self.client.get("AWS_DEFAULT_REGION", HOME)  # which alone may not be named of a new bucket
        return s3fs.S3FileSystem(
            client_kwargs={} if region == HOME else {"region_name": region},
            endpoint_url=self.client["AWS_ENDPOINT_URL"],
            key=self.client["AWS_ACCESS_KEY_ID"],
            secret=self.client["AWS_SECRET_ACCESS_KEY"],
            skip_instance_cache=True,
        )


def moto(port: int, folder: Path) -> list[str]:
    if importlib.util.find_spec("moto") is None:
        pytest.skip("make test-store has moto's server")
    return [sys.executable, "-m", "moto.server", "-p", str(port)]


def rclone(port: int, folder: Path) -> list[str]:
    """Unlike moto's it checks signatures, and keeps objects on a disk."""
    program = Path(sys.executable).parent / "rclone"
    if not program.exists():
        pytest.skip("make test-store has rclone")
    (folder / "objects").mkdir()
    options = ["--addr", f"127.0.0.1:{port}", "--auth-key", f"{KEY},{SECRET}", "--config", os.devnull]
    return [str(program), "serve", "s3", str(folder / "objects"), *options]


KEY, SECRET = "catmllm", "of-this-test-alone"
# With a part of an object rclone sends the checksum of the whole, which botocore would hold the part to.
UNCHECKED = {"AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required"}
KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
SERVERS = {"moto": moto, "rclone": rclone}


@pytest.fixture(scope="module", params=["given"] if "S3_SERVER" in os.environ else [*SERVERS])
def s3(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with an empty bucket."""
    pytest.importorskip("s3fs", reason="make test-store has it")
    with contextlib.ExitStack() as stack:
        if request.param == "given":
            given = {n: os.environ[n] for n in (*KEYS, "AWS_DEFAULT_REGION") if n in os.environ}
            assert {*KEYS} <= {*given}, f"S3_SERVER needs {' and '.join(KEYS)}"
            server = Server({"AWS_ENDPOINT_URL": os.environ["S3_SERVER"]} | given)
        else:
            folder = tmp_path_factory.mktemp(request.param)
            server = stack.enter_context(served(SERVERS[request.param], folder))
            server.client |= UNCHECKED if request.param == "rclone" else {}
        server.client.setdefault("AWS_DEFAULT_REGION", HOME)
        server.files().mkdir(server.bucket)
        yield server
        server.files().rm(server.bucket, recursive=True)


@contextlib.contextmanager
def served(command: Callable[[int, Path], list[str]], folder: Path) -> Iterator[Server]:
    """A server of this machine, until the end of the block."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    words = command(port, folder)
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT)
    server = Server({
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
    })  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while True:
            assert process.poll() is None and time.monotonic() < deadline, (folder / "log.txt").read_text()
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.1)
        yield server
    finally:
        process.kill()
        process.wait()


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
    run_config: Path, tmp_path: Path, s3: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks are killed (-9) in the second stage and their disk with them: another machine ends the run
    as if nothing had happened, to the last bit of every weight."""
    for name, value in s3.client.items():
        monkeypatch.setenv(name, value)
    address = f"s3://{s3.bucket}/mine"
    unbroken, first, second = tmp_path / "u" / "run", tmp_path / "a" / "run", tmp_path / "b" / "run"
    process = run(run_config, unbroken, [], s3.client)
    assert process.wait(timeout=400) == 0, unbroken.with_suffix(".log").read_text()[-4000:]
    store = [f"store={address}"]
    process = run(run_config, first, store, s3.client)
    checkpoints = Folder(f"{address}/instruct/checkpoints")
    deadline = time.monotonic() + 300
    while not any((checkpoints / name).read("step.json") for name in checkpoints.names()):
        assert process.poll() is None and time.monotonic() < deadline, first.with_suffix(".log").read_text()
        time.sleep(0.05)
    process.kill()  # its workers die with it
    process.wait()
    time.sleep(2.0)
    assert not (first / "instruct" / "model.safetensors").exists(), "killed too late to show anything"
    shutil.rmtree(first)
    process = run(run_config, second, store, s3.client)
    assert process.wait(timeout=400) == 0, second.with_suffix(".log").read_text()[-4000:]
    for stage in ("joint", "instruct"):
        assert [r["loss"] for r in rows(second / stage)] == [r["loss"] for r in rows(unbroken / stage)]
        mine, theirs = (load_file(p / stage / "model.safetensors") for p in (second, unbroken))
        assert all(torch.equal(mine[k], v) for k, v in theirs.items())
    said = second.with_suffix(".log").read_text()
    assert "joint: LLM" not in said and "instruct: LLM" in said  # the first stage is taken as it is
    copied = Folder(address)
    assert (copied / "instruct").read("model.safetensors") == (
        second / "instruct" / "model.safetensors"
    ).read_bytes()
    assert copied.read("metrics.json") == (second / "metrics.json").read_bytes()
    # What another run begins with may lie there too.
    begun = {}
    for init in (str(second), address):
        out = tmp_path / f"begins{len(begun)}" / "run"
        process = run(run_config, out, [f"init={init}", "stages=[instruct]", "instruct.steps=2"], s3.client)
        assert process.wait(timeout=400) == 0, out.with_suffix(".log").read_text()[-4000:]
        begun[init] = [r["loss"] for r in rows(out / "instruct")]
    assert begun[address] == begun[str(second)] and len(begun[address]) == 2
    taken = tmp_path / "begins1" / "run" / "init" / "s3" / s3.bucket / "mine" / "instruct"
    assert {p.name for p in taken.iterdir()} == {
        p.name for p in (second / "instruct").iterdir() if p.name != "checkpoints"
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrong", "address", "says"),
    [
        ({}, "s3://catmllm-test-absent/mine", "bucket does not exist"),
        (
            {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"},
            "s3://{bucket}/mine",
            "Could not connect|Connect call failed",
        ),
        ({"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}, "s3://{bucket}/mine", "credentials"),
    ],
)
def test_an_s3_that_cannot_be_used_is_one_line(
    wrong: dict[str, str | None],
    address: str,
    says: str,
    s3: Server,
    alone: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import s3fs

    address = address.format(bucket=s3.bucket)
    for name, value in (s3.client | wrong).items():
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
