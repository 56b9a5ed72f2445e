"""Two machines in network namespaces: one loses its power in the middle of a stage, the other notices and
says so, and the run goes on, on both or on one. Needs root, Linux and `ip` (iproute2)."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.small_run import ROOT

HANG_AFTER = 20.0  # seconds; a part of a step takes less than one
OPTIONS = ("stages=[joint]", "joint.steps=24", "joint.checkpoint_every=4", "precision=fp32")
pytestmark = pytest.mark.slow


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


class Node:
    """A machine: a namespace with one wired interface."""

    def __init__(self, name: str, wire: str, address: str) -> None:
        self.name, self.wire, self.address = name, wire, address
        ip("netns", "add", name)
        ip("link", "set", wire, "netns", name)
        self("ip", "addr", "add", f"{address}/24", "dev", wire)
        for interface in ("lo", wire):
            self("ip", "link", "set", interface, "up")

    def __call__(self, *command: str) -> None:
        subprocess.run(["ip", "netns", "exec", self.name, *command], check=True, capture_output=True)

    def start(self, nodes: int, log: Path, words: Sequence[str]) -> subprocess.Popen:
        """torchrun with one rank; the first node's address is the meeting place."""
        command = ["ip", "netns", "exec", self.name, sys.executable, "-m", "torch.distributed.run"]
        command += ["--nnodes", str(nodes), "--nproc-per-node", "1", "--local-addr", self.address]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "10.77.0.1:29500", "--rdzv-id", "nodes"]
        command += ["--rdzv-conf", f"is_host={int(self.address == '10.77.0.1')}", *words]
        own = {"GLOO_SOCKET_IFNAME": self.wire, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with log.open("a") as out:
            return subprocess.Popen(command, stdout=out, stderr=out, env=os.environ | own, cwd=log.parent)

    def pull_the_plug(self) -> None:
        """Nothing is sent any more, not even that a connection is closed; then nothing runs."""
        self("ip", "link", "set", self.wire, "down")
        self.kill()

    def kill(self) -> None:
        while pids := ip("netns", "pids", self.name).split():
            for pid in pids:
                try:
                    os.kill(int(pid), signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.05)

    def plug_in(self) -> None:
        self("ip", "link", "set", self.wire, "up")


@pytest.fixture
def nodes() -> Iterator[tuple[Node, Node]]:
    """Two that reach each other; they and all that runs on them are gone afterwards."""
    if os.geteuid() or shutil.which("ip") is None:
        pytest.skip("needs root and `ip` (apt-get install iproute2)")
    tag = f"{os.getpid():x}"[-6:]
    names, wires = (f"cat-{tag}-a", f"cat-{tag}-b"), (f"cat{tag}a", f"cat{tag}b")
    made: list[Node] = []
    try:
        ip("link", "add", wires[0], "type", "veth", "peer", "name", wires[1])
        for k in range(2):
            made.append(Node(names[k], wires[k], f"10.77.0.{k + 1}"))
        yield made[0], made[1]
    finally:
        for node in made:
            node.kill()
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
        subprocess.run(["ip", "link", "del", wires[0]], check=False, capture_output=True)


def rows(out: Path) -> list[dict]:
    path = out / "joint" / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in rows(out)]


def words(config: Path, out: Path, *more: str) -> list[str]:
    return [str(ROOT / "catmllm/train.py"), str(config), f"out={out}", *OPTIONS, *more]


def ended(processes: Sequence[subprocess.Popen], logs: Sequence[Path]) -> None:
    codes = [p.wait(timeout=500) for p in processes]
    assert codes == [0] * len(codes), "\n".join(log.read_text()[-3000:] for log in logs)


def test_a_node_without_power_is_noticed_and_the_run_goes_on(
    nodes: tuple[Node, Node], run_config: Path, tmp_path: Path
) -> None:
    """The unbroken run has one folder for both nodes; the other one has a disk for each and a store."""
    whole, first, second, alone = (tmp_path / name / "run" for name in ("whole", "a", "b", "alone"))
    for out in (whole, first, second, alone):
        out.parent.mkdir()
    logs = [tmp_path / f"{node.name}.log" for node in nodes]
    ended([n.start(2, log, words(run_config, whole)) for n, log in zip(nodes, logs)], logs)

    store = (f"store=file://{tmp_path}/store", f"hang_after={HANG_AFTER:g}")
    lines = [words(run_config, out, *store) for out in (first, second)]
    processes = [n.start(2, log, line) for n, log, line in zip(nodes, logs, lines)]
    while len(losses(first)) < 7:
        assert all(p.poll() is None for p in processes), logs[0].read_text()[-3000:]
        time.sleep(0.02)
    nodes[1].pull_the_plug()
    began = time.monotonic()
    assert processes[0].wait(timeout=500) != 0
    spent = time.monotonic() - began
    processes[1].wait()
    # a quarter more until the watch looks, the grace, and torchrun's own end
    assert spent < 1.25 * HANG_AFTER + 5 + 60
    said = logs[0].read_text()
    (line,) = re.findall(r"error: the run hangs .*", said)
    assert "rank 1 says nothing" in line, line
    assert re.search(r"rank 0 waits in \w+ \(catmllm/[\w/]+\.py:\d+\), begun in \w+ of step \d+", line), line
    assert not (first / "joint" / "model.safetensors").exists()
    saved = (tmp_path / "store" / "joint" / "checkpoints").glob("step-*/step.json")
    assert any(saved)
    shutil.copytree(tmp_path / "store", tmp_path / "copy")

    nodes[1].plug_in()
    ended([n.start(2, log, line) for n, log, line in zip(nodes, logs, lines)], logs)
    assert losses(first) == losses(whole)
    mine, theirs = (load_file(out / "joint" / "model.safetensors") for out in (first, whole))
    assert all(torch.equal(mine[k], v) for k, v in theirs.items())
    assert (second / "joint" / "model.safetensors").is_file()  # copied there for what comes next

    # One node with the batch of two: its sums are taken in another order, as in `test_layouts`.
    one = words(run_config, alone, f"store=file://{tmp_path}/copy", "joint.batch_size=12")
    ended([nodes[0].start(1, logs[0], one)], logs[:1])
    assert len(losses(alone)) == 24
    np.testing.assert_allclose(losses(alone), losses(whole), rtol=5e-5)
