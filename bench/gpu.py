"""A GPU's first minutes: is everything right there, does it run, how fast beside the best others.

    python bench/gpu.py [--phases env,correct,…] [--tune] [--ranks 8] [--quick] [--base COMMIT]
    python bench/gpu.py --device cpu --tiny          runs every phase without a GPU; its times mean nothing

Each phase (`bench/gpu_phases/`, docs/gpu.md) is a process with seconds of its own. All prepare at once and
take turns on the GPU; one that is over its time is ended and keeps its rows. A case that is wrong, or
fails, costs its row only. Rows go to FOLDER/rows.jsonl as they come, what a phase prints to
FOLDER/PHASE.log, records to --out; a table comes last. Exit status 1 if a row is wrong or failed, 77
without a GPU.

Kernels compiled beforehand (`make gpu-prefill`) are taken from build/triton.tar.xz; without them every phase
gets half as long again.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import multiprocessing
import os
import signal
import statistics
import sys
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench import record  # first: it decides whose packages are measured
from bench.gpu_phases import (
    CLAIMS,
    DRY,
    RANKS_SECONDS,
    READY_SECONDS,
    SECONDS,
    UNFILLED,
    VLLM_SECONDS,
    prefill,
)
from bench.gpu_phases.measure import Settings, serve, write_row

# A dry run on a CPU imports once and forks: with a GPU each phase imports for itself.
IMPORTED_ONCE = [
    "catmllm.pipeline",
    "catmllm.plan.trace",
    "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
    "torch.nn.attention.varlen",
]


def main(arguments: list[str] | None = None) -> int:
    parser = record.arguments(__doc__)
    parser.add_argument("--phases", default=",".join(SECONDS), help="some of them, in their order")
    parser.add_argument("--tune", action="store_true", help="phase edges: time every candidate tile")
    parser.add_argument("--ranks", type=int, default=0, metavar="N", help="add the part for N GPUs of a node")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes for a dry run")
    parser.add_argument("--folder", type=Path, default=record.ROOT / "runs" / "gpu", help="rows and logs")
    parser.add_argument("--compiled", type=Path, default=prefill.ARCHIVE, help="made by `make gpu-prefill`")
    args = parser.parse_args(arguments)
    if unknown := set(args.phases.split(",")) - set(SECONDS):
        parser.error(f"--phases: {', '.join(sorted(unknown))}; choose of {', '.join(SECONDS)}")
    if importlib.util.find_spec("rewards_fast._core") is None:
        record.skip("the reward's library is not built: `python setup.py build_ext --inplace`, a minute")
    if args.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            record.skip("needs a CUDA device, and torch sees none (`--device cpu --tiny` tries the script)")
    seconds = {name: SECONDS[name] for name in args.phases.split(",")}
    seconds |= {"rollout": SECONDS["rollout"] + VLLM_SECONDS} if os.environ.get("VLLM_PYTHON") else {}
    seconds |= {"ranks": RANKS_SECONDS} if args.ranks else {}
    args.folder.mkdir(parents=True, exist_ok=True)
    filled = prefill.take(args.compiled)
    if args.compiled.is_file() and not filled:
        print(
            f"{args.compiled}: of another Triton or Python; kernels are compiled on the way", file=sys.stderr
        )
    how = (args.device, args.tiny, args.quick, args.tune, args.ranks, filled)
    settings = Settings(*how, args.folder.resolve())
    settings.rows.unlink(missing_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the phases end too
    began = time.monotonic()
    factor = DRY if args.device == "cpu" else 1 if filled else UNFILLED
    facts = conduct({name: factor * s for name, s in seconds.items()}, settings)
    rows = [json.loads(line) for line in settings.rows.read_text().splitlines()]
    made = records(rows, facts, args)
    if args.json:
        print(json.dumps(made, ensure_ascii=False))
    else:
        print_table(rows, time.monotonic() - began)
    return 1 if any("error" in row or row.get("wrong") for row in rows) else 0


def conduct(seconds: dict[str, float], settings: Settings) -> dict[str, Any]:
    """All phases in turn. Returns the device's name, and by phase the packages that it imported."""
    context = multiprocessing.get_context("forkserver")
    os.environ |= {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    os.environ.setdefault("OMP_NUM_THREADS", "2" if settings.device == "cuda" else "1")
    context.set_forkserver_preload(IMPORTED_ONCE if settings.device == "cpu" else [])
    running: dict[str, tuple[ForkServerProcess, Any]] = {}
    facts: dict[str, Any] = {}
    try:
        for name in seconds:
            ours, theirs = context.Pipe()
            running[name] = context.Process(target=serve, args=(name, settings, theirs)), ours
            running[name][0].start()
            theirs.close()
        for name, limit in seconds.items():
            began, compiled = time.monotonic(), prefill.count()
            end = take_turn(*running[name], limit, name, facts)
            more = {"compiled": prefill.count() - compiled} if settings.device == "cuda" else {}
            took = time.monotonic() - began
            write_row(settings.rows, name, "whole phase", seconds=took, limit=limit, **end, **more)
            if "error" in end:
                log = (settings.folder / f"{name}.log").read_text(errors="replace").splitlines()
                print("\n".join([f"--- {name}: {end['error']}", *log[-12:]]), file=sys.stderr, flush=True)
    finally:
        for process, _ in running.values():
            end_session(process)
    return facts


def take_turn(process: Any, link: Any, limit: float, name: str, facts: dict[str, Any]) -> dict[str, str]:
    """A phase's turn: {} if it went well, what cut it short, or its error."""
    try:
        if not link.poll(max(READY_SECONDS, limit)):
            return {"error": f"was not prepared after {READY_SECONDS} s"}
        facts[name] = link.recv()
        link.send(limit)
        facts["device"] = link.recv()
    except (EOFError, OSError):
        process.join()
        return {"error": f"its process ended with {process.exitcode}"}
    process.join(limit)
    if process.exitcode is None:
        end_session(process)
        return {"cut": "over its time"}
    return {"error": f"its process ended with {process.exitcode}"} if process.exitcode else {}


def end_session(process: Any) -> None:
    """A phase and what it started: it leads a session of its own."""
    if process.exitcode is None:
        with contextlib.suppress(ProcessLookupError):  # if it has not come so far
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()


def records(rows: list[dict[str, Any]], facts: dict[str, Any], args: Any) -> list[dict[str, Any]]:
    """A record a phase, of the rows that have samples; those of a CPU stay with the rows."""
    out = args.out if args.device == "cuda" else args.folder / "records"
    made = []
    for phase in (p for p in CLAIMS if p in facts):
        claim = claim_of(phase, [row for row in rows if row["phase"] == phase and "samples" in row])
        if not claim["value"]:
            continue
        stamp = record.stamp(args.quick, facts["device"]) | {"versions": facts[phase]}
        made.append(record.rounded(claim | stamp))
        record.write(out, made[-1])
    return made


def claim_of(phase: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Cases that we have a number of, beside those of the others; what else was measured is a condition."""
    says, unit, less = CLAIMS[phase]
    cases: dict[str, dict[str, list[float]]] = {}
    more: dict[str, Any] = {}
    for row in rows:
        cases.setdefault(row["case"], {})[row["who"]] = row["samples"]
        also = {k: v for k, v in row.items() if k not in ("phase", "case", "who", "unit", "samples")}
        more[f"{row['case']}, {row['who']}"] = also
    known = {case: {"ours": who.pop("ours"), **who} for case, who in cases.items() if "ours" in who}
    conditions = {"clock": "CUDA events, L2 flushed before each, in turn", "also": more}
    return record.claim(f"gpu_{phase}", says, unit, known, conditions, less_is_better=less)


def quantities(row: dict[str, Any]) -> str:
    """What a row says beside its case."""
    shown = []
    for key, value in row.items():
        if key in ("phase", "case", "who", "unit"):
            continue
        if key == "samples":
            key, value = row["unit"], statistics.median(value)
        shown.append(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}")
    return "  ".join(shown)


def print_table(rows: list[dict[str, Any]], seconds: float) -> None:
    """A line a row."""
    print(f"\n=== {seconds:.0f} s")
    for row in rows:
        name = f"{row['case']}, {row['who']}" if row.get("who") else row["case"]
        mark = "WRONG " if row.get("wrong") else "FAILED " if "error" in row else ""
        print(f"{row['phase']:9s}{mark}{name:64s}  {quantities(row)}"[:240])


if __name__ == "__main__":
    sys.exit(main())
