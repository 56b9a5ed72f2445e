"""`make gpu` without a GPU: every phase runs, what is wrong costs its row, what was compiled travels."""

from __future__ import annotations

import io
import json
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu, record
from bench.gpu_phases import CLAIMS, SECONDS, UNFILLED, correct, prefill
from bench.gpu_phases.measure import Bench, Settings, write_row
from bench.gpu_phases.ranks import joined, overlap
from catmllm_kernels.registry import Case

ROOT = Path(__file__).parents[2]


# The dry run -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Every phase and two ranks on the CPU, where what a machine with a GPU may lack cannot be imported."""
    folder = tmp_path_factory.mktemp("gpu")
    absent = folder / "absent"
    absent.mkdir()
    for name in ("ase", "pymatgen", "lmdb", "sevenn", "fairchem", "liger_kernel", "vllm"):
        (absent / f"{name}.py").write_text(f"raise ModuleNotFoundError('no {name} here', name='{name}')\n")
    plain = {k: v for k, v in os.environ.items() if k not in ("FAIRCHEM_1_10", "VLLM_PYTHON")}
    plain |= {"TRITON_INTERPRET": "0", "PYTHONPATH": str(absent), "TRITON_CACHE_DIR": str(folder / "triton")}
    command = [sys.executable, str(ROOT / "bench" / "gpu.py"), "--device", "cpu", "--tiny", "--ranks", "2"]
    done = subprocess.run(
        [*command, "--folder", str(folder)],
        env=plain,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    return done, rows, folder


def test_every_phase_runs_without_a_gpu(dry: Any) -> None:
    done, rows, _ = dry
    assert done.returncode == 0, done.stdout + done.stderr
    assert not [row for row in rows if "error" in row or "wrong" in row or "cut" in row]
    ended = {row["phase"] for row in rows if row["case"] == "whole phase"}
    assert ended == {*SECONDS, "ranks"}
    for line in (f"{row['phase']:9s}" for row in rows):  # the table comes last
        assert line in done.stdout.split("=== ")[1]


def test_the_dry_run_does_the_work(dry: Any) -> None:
    _, rows, _ = dry
    cases = {(row["phase"], row["case"]) for row in rows}
    assert {
        ("pipeline", f"stage {s}") for s in ("encoder", "align", "joint", "instruct", "grpo", "ga_grpo")
    } <= cases
    assert {op for phase, case in cases if phase == "correct" for op in [case.split(",")[0]]} >= {
        "escn", "so3_pool_project", "linear_logprob", "varlen_attention", "decoder"}  # fmt: skip
    train = {row["case"]: row for row in rows if row["phase"] == "train" and "samples" in row}
    assert len(train) == 2 and all(row["tokens_per_s"] > 0 for row in train.values())
    assert train["tiny, precision=bf16"]["planned_GiB"] > 0
    who = {row["who"] for row in rows if row["phase"] == "rollout" and "samples" in row}
    assert who == {"ours", "generate"}
    (killed,) = (row for row in rows if row["case"] == "killed and resumed")
    assert killed["equal_losses"] and 4 <= killed["killed_after"] < killed["steps"] == 8


def test_what_is_missing_is_one_row_with_the_way_to_get_it(dry: Any) -> None:
    _, rows, _ = dry
    for peer in ("fairchem 1.10", "Liger-Kernel", "vLLM"):
        assert any(row["case"] == f"without {peer}" and row["install"] for row in rows), peer


def test_a_dry_run_writes_its_records_aside(dry: Any) -> None:
    _, _, folder = dry
    written = {p.stem: json.loads(p.read_text()) for p in (folder / "records").glob("*.json")}
    assert {name.removeprefix("gpu_") for name in written} == set(CLAIMS)
    for one in written.values():
        assert one["processor"] == {"device": "CPU (no measurement)"} and one["versions"]["torch"]
        assert set(one["ratio"]) <= set(one["value"])
    assert not list((ROOT / "bench" / "results").glob("gpu_*.cpu*"))


def test_without_a_gpu_it_says_so() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "gpu.py")], capture_output=True, text=True, check=False
    )
    if not torch.cuda.is_available():
        assert done.returncode == record.SKIPPED and "--device cpu --tiny" in done.stderr


def test_the_phases_fit_their_minutes() -> None:
    assert sum(SECONDS.values()) <= 8 * 60 and sum(SECONDS.values()) * UNFILLED <= 12 * 60


def test_the_two_calls_of_the_page_are_every_phase_within_their_time() -> None:
    page = (ROOT / "docs" / "gpu.md").read_text()
    calls = re.findall(r"timeout (\d+) python3 bench/gpu.py --phases (\S+) --folder", page)
    assert [name for _, phases in calls for name in phases.split(",")] == list(SECONDS)
    for limit, phases in calls:  # where nothing was compiled beforehand, and with the imports
        assert int(limit) >= UNFILLED * sum(SECONDS[name] for name in phases.split(",")) + 40
    assert sum(int(limit) for limit, _ in calls) <= 14 * 60


# Rows, turns and claims ------------------------------------------------------------------------------------


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench("correct", Settings("cpu", True, False, False, 0, False, tmp_path))


def rows_of(bench: Bench) -> list[dict[str, Any]]:
    return [json.loads(line) for line in bench.settings.rows.read_text().splitlines()]


def test_a_wrong_case_costs_its_row_only(bench: Bench) -> None:
    calls = iter(range(100))
    ways = {
        "right": lambda x: 2 * x,
        "wrong": lambda x: 2 * x + 0.1 * (x > 0),
        "lost": lambda x: torch.where(x > 0, math.nan, 2 * x),
        "other bits": lambda x: 2 * x * (1 + 1e-6 * next(calls)),
        "raises": lambda x: x.view(-1, 7),
        "right again": lambda x: x + x,
    }

    def arguments(dtype: torch.dtype, device: torch.device, seed: int) -> tuple[torch.Tensor]:
        return (torch.linspace(-1, 1, 5, dtype=dtype).requires_grad_(),)

    made = [
        Case("escn", name, "test", arguments, way, ways["right"], {torch.float32: 1e-3})
        for name, way in ways.items()
    ]
    cpu = torch.device("cpu")
    correct.run(bench, [(case, torch.float32, case.arguments(torch.float32, cpu, 0)) for case in made])
    torch.use_deterministic_algorithms(False)
    rows = {row["case"]: row for row in rows_of(bench)}
    assert "escn right float32" not in rows and "escn right again float32" not in rows  # nothing to say
    assert rows["escn wrong float32"]["wrong"] and rows["escn wrong float32"]["same_bits"]
    assert rows["escn lost float32"]["of_tolerance"] == math.inf
    assert rows["escn other bits float32"]["same_bits"] is False
    assert "RuntimeError" in rows["escn raises float32"]["error"]
    assert rows["escn, 6 cases"]["samples"] == [math.inf]


def test_a_way_that_fails_costs_its_row_only(bench: Bench) -> None:
    def fails() -> None:
        raise ValueError("no such tile")

    medians = bench.turns("case", {"ours": lambda: None, "peer": fails, "other": lambda: None}, 0.1)
    assert set(medians) == {"ours", "other"}
    assert [row["who"] for row in rows_of(bench) if "error" in row] == ["peer"]


def test_a_broken_device_ends_the_process(bench: Bench) -> None:
    with pytest.raises(SystemExit) as end, bench.guard("case"):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    assert end.value.code == 3 and "illegal" in rows_of(bench)[0]["error"]


def stuck(link: Connection, settings: Settings) -> None:
    """A phase that says something and then hangs, with a child."""
    os.setsid()
    link.send({"python": "3"})
    link.recv()
    link.send("device")
    child = subprocess.Popen(["sleep", "60"])
    write_row(settings.rows, "stuck", "first", child=child.pid)
    time.sleep(60)


def test_a_call_that_is_told_to_end_leaves_nothing_behind(tmp_path: Path) -> None:
    """`timeout` sends SIGTERM."""
    command = [sys.executable, str(ROOT / "bench" / "gpu.py"), "--device", "cpu", "--tiny", "--phases", "env"]
    there = os.environ | {"TRITON_CACHE_DIR": str(tmp_path / "triton"), "TRITON_INTERPRET": "0"}
    call = subprocess.Popen([*command, "--folder", str(tmp_path)], env=there, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (tmp_path / "env.log").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    call.send_signal(signal.SIGTERM)
    assert call.wait(60) == 143
    while left := [p for p in Path("/proc").glob("[0-9]*") if str(tmp_path) in environment(p)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def environment(process: Path) -> str:
    try:
        return (process / "environ").read_text(errors="replace")
    except OSError:  # it has ended, or is another user's
        return ""


def dies(link: Connection) -> None:
    os._exit(7)


def test_a_phase_over_its_time_is_ended_with_what_it_started(bench: Bench) -> None:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=stuck, args=(theirs, bench.settings))
    process.start()
    facts: dict[str, Any] = {}
    assert gpu.take_turn(process, ours, 1.0, "stuck", facts) == {"cut": "over its time"}
    assert process.exitcode == -9 and facts == {"stuck": {"python": "3"}, "device": "device"}
    (row,) = rows_of(bench)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{row['child']}").exists() and time.monotonic() < deadline:
        if "Z" in Path(f"/proc/{row['child']}/stat").read_text().split(")")[1].split()[0]:
            break
        time.sleep(0.05)
    assert time.monotonic() < deadline


def test_a_phase_that_dies_is_said_with_its_status() -> None:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=dies, args=(theirs,))
    process.start()
    theirs.close()
    assert gpu.take_turn(process, ours, 5.0, "dies", {}) == {"error": "its process ended with 7"}


def test_a_claim_is_made_of_rows_that_ours_has() -> None:
    rows = [
        {"phase": "logprob", "case": "a", "who": "eager", "unit": "ms", "samples": [4.0], "GiB": 2.0},
        {"phase": "logprob", "case": "a", "who": "ours", "unit": "ms", "samples": [2.0], "GiB": 1.0},
        {"phase": "logprob", "case": "b", "who": "eager", "unit": "ms", "samples": [1.0]},
    ]
    made = gpu.claim_of("logprob", rows)
    assert made["claim"] == "gpu_logprob" and made["value"] == {"a": 2.0}
    assert made["ratio"] == {"a": {"eager": 2.0}} and made["conditions"]["also"]["a, ours"] == {"GiB": 1.0}


# Several GPUs ----------------------------------------------------------------------------------------------


def test_what_of_communication_hides_behind_compute() -> None:
    events = [("ncclDevKernel_AllGather", 0, 10), ("gemm", 4, 6), ("gemm2", 5, 8), ("Memcpy DtoD", 0, 10)]
    assert overlap([*events, ("ncclDevKernel_ReduceScatter", 20, 24), ("gemm", 22, 30)]) == (14, 4 + 2)
    assert joined([(5, 6), (0, 2), (1, 3)]) == [(0, 3), (5, 6)]


# Compiled beforehand ---------------------------------------------------------------------------------------

COMPILE = """
import sys
from pathlib import Path
from bench.gpu_phases import prefill
from catmllm_kernels.launch import recorded
from catmllm_kernels.so3_pool_project import cases
import torch
case = cases.case("one", "model", (3, 2), 1, 16, "max", "layer")
with recorded() as found:
    case.compile(torch.float16)
print(prefill.compile_all(90, [s for s in found if s.kernel.__name__ == "stats_kernel"], 1))
"""


def test_compiled_kernels_travel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled into one folder, unpacked into another: nothing is compiled again, not even written."""

    def compile_into(folder: Path) -> None:
        paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
        there = os.environ | {"TRITON_CACHE_DIR": str(folder), "TRITON_INTERPRET": "0", "PYTHONPATH": paths}
        done = subprocess.run(
            [sys.executable, "-c", COMPILE], env=there, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == "[0]"

    made, other = tmp_path / "made", tmp_path / "other"
    compile_into(made)
    (made / prefill.NOTE).write_text(json.dumps({"triton_key": prefill.own_key()}))
    with tarfile.open(tmp_path / "triton.tar.gz", "w:gz") as packed:
        packed.add(made, ".")
    made.rename(tmp_path / "gone")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(other))
    assert prefill.take(tmp_path / "triton.tar.gz") and prefill.count() == 1
    before = {p: p.stat().st_mtime_ns for p in other.rglob("*") if p.is_file() and p.name != "lock"}
    compile_into(other)
    assert {p: p.stat().st_mtime_ns for p in other.rglob("*") if p.is_file() and p.name != "lock"} == before


@pytest.mark.parametrize(
    "phases",
    [
        ("env", "edges", "encoder", "logprob"),
        pytest.param(("correct", "train", "pipeline"), marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_what_the_phases_start_is_compiled_beforehand(tmp_path: Path, phases: tuple[str, ...]) -> None:
    """By the phases' own code at their sizes, on fake tensors."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    plain = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": paths}
    command = [sys.executable, "-m", "tests.bench.gpu_starts", str(tmp_path / "starts.json"), *phases]
    done = subprocess.run(command, cwd=ROOT, env=plain, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "starts.json").read_text())
    for phase in phases:
        # gradients of the smallest case lie at an odd place of their memory, as none of a model does
        missing = [k for k in found[phase]["not compiled beforehand"] if "HEADS=1 KV_HEADS=1 HALF=1" not in k]
        assert found[phase]["started"] and not missing, phase


def test_another_tritons_kernels_are_not_counted_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    assert not prefill.take(tmp_path / "absent.tar.gz")
    # of the same version, but of the wheel for another Python: another library, so other keys
    note = json.dumps({"triton": record.version_of("triton"), "triton_key": "0"}).encode()
    with tarfile.open(tmp_path / "old.tar.gz", "w:gz") as packed:
        about = tarfile.TarInfo(prefill.NOTE)
        about.size = len(note)
        packed.addfile(about, io.BytesIO(note))
    assert not prefill.take(tmp_path / "old.tar.gz")
