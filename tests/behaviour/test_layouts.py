"""The same training on one rank, two ranks, copies, cut batches, two torchrun agents:
the loss curves agree."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.distributed import TCPStore

from tests.small_run import ROOT


def forks(case: str, folder: Path) -> dict[str, Any]:
    """The result of one case of `forks.py`, in a process of its own."""
    command = [sys.executable, "-m", "tests.behaviour.forks", case, str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads((folder / "result.json").read_text())


@pytest.fixture(scope="session")
def curves(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    return forks("layouts", tmp_path_factory.mktemp("layouts"))


def test_every_layout_gives_the_curve_of_one_rank(curves: dict[str, list[float]]) -> None:
    one = curves["one rank"]
    assert len(one) == 16 and np.mean(one[:4]) - np.mean(one[-4:]) > 0.5  # it learns
    for name, losses in curves.items():
        # float32 sums in another order: 1e-5 after so many steps of AdamW
        np.testing.assert_allclose(losses, one, rtol=5e-5, err_msg=name)


def test_what_is_freed_changes_no_bit(curves: dict[str, list[float]]) -> None:
    assert curves["two ranks"] == curves["nothing freed"] == curves["all freed"]


def test_two_agents_restart_a_killed_worker_and_repeat_two_ranks(
    curves: dict[str, list[float]], tmp_path: Path
) -> None:
    """`torchrun --nnodes 2` on loopback, one worker each; rank 1 kills itself at step 6 of its first life."""
    # The store outlives both agents: the one that hosted it could end before the other has said goodbye.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{store.port}", "--rdzv-id", "agents"]
    command += ["--rdzv-conf", "is_host=false"]
    command += ["--max-restarts", "1", "--monitor-interval", "0.2", "-m", "tests.behaviour.forks", "agent"]
    command += [str(tmp_path / "run"), "joint.batch_size=4"]
    # Agents count restarts each for itself, and the store that they
    # share keeps the addresses of dead workers.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    logs = [(tmp_path / f"agent-{k}.txt").open("w") for k in range(2)]
    agents = [subprocess.Popen(command, cwd=ROOT, env=environment, stdout=f, stderr=f) for f in logs]
    try:
        codes = [a.wait(timeout=900) for a in agents]
    finally:
        for a in agents:
            a.kill()
    assert codes == [0, 0], (tmp_path / "agent-0.txt").read_text()[-3000:]
    assert (tmp_path / "run" / "killed").exists()
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [r["loss"] for r in rows] == curves["two ranks"]


@pytest.mark.slow
def test_compiled_blocks_give_the_curve_of_eager_ones(curves: dict[str, list[float]], tmp_path: Path) -> None:
    for name, losses in forks("compiled", tmp_path).items():
        # fused kernels sum in another order
        np.testing.assert_allclose(losses, curves["one rank"], rtol=5e-5, err_msg=name)


@pytest.mark.slow
def test_float16_follows_float32_for_200_steps(tmp_path: Path) -> None:
    rows = forks("half", tmp_path)
    loss = {k: np.array([r["loss"] for r in v]) for k, v in rows.items()}
    assert all(len(v) == 200 for v in loss.values())
    # After 200 steps: means of the last 20. On the way, where the loss falls fastest,
    # smoothed curves lie 2.3 % apart.
    after = {k: v[-20:].mean() for k, v in loss.items()}
    assert abs(after["fp16"] / after["fp32"] - 1) < 0.01
    assert rows["fp16"][-1]["skipped_steps"] <= 2
