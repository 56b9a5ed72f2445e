"""A small run of the whole pipeline on two ranks, made once for the tests that read it."""

import contextlib
import fcntl
import gzip
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from catmllm.data.slabs import SHIPPED

ROOT = Path(__file__).parents[1]
SMALL = """
tensorboard: false
data: {{path: {data}, max_neighbours: 8, cutoff: 4.0}}
model:
  llm:
    {{hidden_size: 64, num_hidden_layers: 2, num_attention_heads: 4, num_key_value_heads: 2,
     intermediate_size: 96}}
  encoder:
    {{num_layers: 1, sphere_channels: 16, attn_hidden_channels: 16, num_heads: 2, ffn_hidden_channels: 16}}
encoder: {{steps: 4, batch_size: 6, checkpoint_every: 2, log_every: 1}}
align: {{steps: 4, batch_size: 6, checkpoint_every: 2, log_every: 1}}
joint: {{steps: 6, batch_size: 6, checkpoint_every: 2, log_every: 1}}
instruct: {{steps: 6, batch_size: 6, checkpoint_every: 2, log_every: 1}}
grpo:
  {{steps: 4, batch_size: 2, group_size: 3, micro_batch: 4, checkpoint_every: 2, log_every: 1,
   validate_every: 0, updates_per_rollout: 2, property_share: 0.5, sampling: {{max_new_tokens: 40}}}}
ga_grpo:
  {{tasks: 4, batch_size: 1, initial: 3, pool: 2, iterations: 2, group_size: 3, checkpoint_every: 1,
   validate_every: 0, log_every: 1, sampling: {{max_new_tokens: 40}}}}
evaluate:
  {{generation_samples: 8, indicative: 2, design_tasks: 4, design_after: [grpo, ga_grpo], judge: none,
   sampling: {{max_new_tokens: 40}}}}
"""


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the small run, the same in every process of these tests."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "small"
    folder.mkdir(exist_ok=True)
    return folder


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Who comes first makes what is missing in the folder; the others wait and find it."""
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def run_config(small_folder: Path) -> Path:
    path = small_folder / "small.yaml"
    with alone(small_folder):
        if not path.exists():
            with gzip.open(SHIPPED, "rt") as f:
                (small_folder / "slabs.jsonl").write_text("".join(line for line, _ in zip(f, range(240))))
            path.write_text(SMALL.format(data=small_folder / "slabs.jsonl"))
    return path


def launch(config: Path, out: Path, ranks: int = 2) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    command += ["--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    command += [str(ROOT / "catmllm/train.py"), str(config), f"out={out}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CATMLLM_TRACEBACK": "1"}
    log = open(out.with_suffix(".log"), "a")  # noqa: SIM115  the child writes it after we return
    return subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=out.parent, start_new_session=True
    )


def kill(process: subprocess.Popen, out: Path) -> None:
    """End torchrun as `kill -9` does, and wait until its workers, which have sessions of their own,
    are gone too."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 20
    while any(f"out={out}" in line for line in command_lines()):
        assert time.monotonic() < deadline, "workers outlived torchrun"
        time.sleep(0.05)


def command_lines() -> list[str]:
    """Of every process that still runs."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return found


def finish(config: Path, out: Path, ranks: int = 2) -> None:
    process = launch(config, out, ranks)
    try:
        assert process.wait(timeout=400) == 0, out.with_suffix(".log").read_text()[-4000:]
    finally:
        if process.poll() is None:
            kill(process, out)


@pytest.fixture(scope="session")
def unbroken(run_config: Path, small_folder: Path) -> Path:
    out = small_folder / "unbroken"
    with alone(small_folder):
        if not (out / "report.html").exists():
            finish(run_config, out)
    return out
