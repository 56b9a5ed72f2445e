"""Every registered op on the CUDA device at hand: first correct, then timed.

    python bench/gpu.py [--quick] [--json] [--base COMMIT] [--tune] [--plot FILE] [--op escn]

1. Every case against its float64 definition, forward and all gradients,
   twice (equal bits asked of the second run).
2. Forward and forward + backward of the model-sized cases at 32,000 edges (--quick: 4,000) in float16 and
   bfloat16, CUDA events, medians after warm-up, L2 flushed in between: our op, the definition in eager torch,
   the definition under torch.compile, and fairchem 1.10's attention where FAIRCHEM_1_10 names its folder.
   Beside the time stand achieved FLOP/s and bytes/s, of the counts in `work`, and their share of the card's
   peak.
3. --tune times every candidate tile of the edge path's kernels.

`--device cpu` runs the same script without a GPU (definitions instead of kernels, tiny sizes): it proves that
the script runs, and its times mean nothing. Without a CUDA device and without that option it ends with one
message.
"""

from __future__ import annotations

import importlib
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench import record  # first: it decides whose packages are measured
from catmllm_kernels.escn import cases as escn_cases
from catmllm_kernels.escn.layout import n_half, n_rows, wigner_offset
from catmllm_kernels.registry import OPS, Case, cases

# dense half-precision FLOP/s and bytes/s as the makers state them, by a part of the device's name
PEAKS = {"A100-SXM4-80": (312e12, 2039e9), "A100": (312e12, 1555e9), "H100": (989e12, 3350e9),
         "H200": (989e12, 4800e9)}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = record.arguments(__doc__)
    parser.add_argument("--tune", action="store_true", help="time every candidate tile")
    parser.add_argument("--plot", metavar="FILE", help="write a bar chart of the times (PNG or SVG)")
    parser.add_argument("--op", choices=OPS, action="append", help="only this op; may be repeated")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        record.skip(
            "needs a CUDA device, and torch sees none (`--device cpu --quick` tries the script itself)"
        )
    device = torch.device(args.device)
    ops = tuple(args.op or OPS)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU (no measurement)"
    result: dict[str, Any] = {"device": name, "torch": torch.__version__, "edges": edges(args.quick, device)}
    say = (lambda *_, **__: None) if args.json else print
    say(f"{name}, torch {torch.__version__}")
    result["correct"] = correctness(ops, device, args.quick, say)
    wrong = [row for row in result["correct"] if not row["ok"]]
    if wrong:
        say(f"{len(wrong)} cases are wrong: nothing is timed")
    else:
        result["times"] = [row for op in ops for row in timings(op, device, args.quick, say)]
        if args.tune and "escn" in ops:
            result["tiles"] = tune(device, args.quick, say)
        if args.plot:
            plot(result, args.plot)
    if device.type == "cuda" and not wrong:
        record.finish(args, claims_of(result))
    return 1 if wrong else 0


def claims_of(result: dict[str, Any]) -> list[dict[str, Any]]:
    """A claim an op; a CPU gives none."""
    found = []
    for op in dict.fromkeys(row["op"] for row in result["times"]):
        rows = [row for row in result["times"] if row["op"] == op]
        cases = {
            f"{r['case']}, {r['dtype']}, {'training' if r['training'] else 'inference'}": {
                who: [ms] for who, ms in r["ms"].items() if ms == ms
            }
            for r in rows
        }
        rates = {
            name: {k: r[k] for k in ("TFLOP/s", "GB/s", "of_peak") if k in r} for name, r in zip(cases, rows)
        }
        conditions = {"edges": result["edges"]} if op == "escn" else {}
        conditions |= {"rates": rates} if any(rates.values()) else {}
        found.append(
            record.claim(
                f"gpu_{op}", "medians by CUDA events, L2 flushed in between", "ms", cases, conditions
            )
            | {"device": result["device"]}
        )
    return found


def edges(quick: bool, device: torch.device) -> int:
    return 80 if device.type == "cpu" else 4_000 if quick else 32_000


# ------------------------------------------------------------------------------------------ 1. correct


def correctness(
    ops: tuple[str, ...], device: torch.device, quick: bool, say: Callable[..., None]
) -> list[dict[str, Any]]:
    """The largest relative error of values and gradients of every case, against float64 on the CPU."""
    sizes = ("test",) if quick else ("test", "slow")
    found = []
    for case in (c for op in ops for c in cases(op) if c.size in sizes):
        for dtype in case.dtypes:
            args = case.arguments(dtype, torch.device("cpu"), 0)
            double = moved(args, torch.device("cpu"), torch.float64)
            exact, bounds = outcome(case.reference, double), case.bounds(dtype, double)
            ours = outcome(case.function, moved(args, device))
            again = outcome(case.function, moved(args, device))
            errors = [relative(a, b) for a, b in zip(ours, exact)]
            error = max(errors)
            same = all(torch.equal(a, b) for a, b in zip(ours, again))
            row = {
                "op": case.op,
                "case": case.name,
                "dtype": str(dtype)[6:],
                "error": error,
                "same_bits": same,
            }
            row["ok"] = same and all(e <= b for e, b in zip(errors, bounds))
            found.append(row)
            say(
                f"{'ok   ' if row['ok'] else 'WRONG'} {case.op:18s} "
                f"{case.name:24s} {row['dtype']:9s} {error:.1e}"
            )
    return found


def moved(part: Any, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """Arguments as new leaves on a device, floating ones in another dtype if given."""
    if isinstance(part, torch.Tensor):
        t = part.detach().to(device)
        t = t.to(dtype) if dtype and t.is_floating_point() else t.clone()
        return t.requires_grad_(part.requires_grad)
    if isinstance(part, tuple) and hasattr(part, "_fields"):
        return type(part)(*(moved(p, device, dtype) for p in part))
    return type(part)(moved(p, device, dtype) for p in part) if isinstance(part, list | tuple) else part


def leaves_of(part: Any) -> list[torch.Tensor]:
    if isinstance(part, torch.Tensor):
        return [part] if part.requires_grad else []
    return [t for p in part for t in leaves_of(p)] if isinstance(part, list | tuple) else []


def outcome(function: Callable[..., Any], args: Any) -> list[torch.Tensor]:
    """The output and every gradient of a fixed weighting of it, on the CPU."""
    out = function(*args)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = torch.autograd.grad(out, leaves_of(args), weights.to(out.device, out.dtype))
    return [t.detach().cpu() for t in (out, *gradients)]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """max |a - b| / max |b|; infinite where a value is not finite."""
    if not b.numel():
        return 0.0
    error = float((a.double() - b).abs().max() / b.abs().max().clamp_min(1e-30))
    return error if error == error else float("inf")


# ------------------------------------------------------------------------------------------ 2. timed


def timings(op: str, device: torch.device, quick: bool, say: Callable[..., None]) -> list[dict[str, Any]]:
    """Medians of the model-sized cases."""
    rows = []
    dtypes = (torch.float16,) if quick else (torch.float16, torch.bfloat16)
    if device.type == "cpu":
        dtypes = (torch.float32,)
    for case in cases(op, "model"):
        for dtype in dtypes:
            args, flops, traffic = problem(case, dtype, device, quick)
            ways: dict[str, Callable[..., Any] | None] = {"ours": case.function, "eager": case.reference}
            if device.type == "cuda":
                ways["compiled"] = torch.compile(case.reference, dynamic=False)
            for training in (False, True):
                times = {}
                for name, function in ways.items():
                    try:
                        times[name] = clock(step(function, args, training), device, quick)
                    except torch.OutOfMemoryError:
                        times[name] = float("nan")
                if op == "escn":
                    theirs = fairchem_attention(case, args, dtype, device)
                    if theirs is not None:
                        times["fairchem"] = clock(theirs(training), device, quick)
                factor = 3 if training else 1
                row: dict[str, Any] = {
                    "op": op,
                    "case": case.name,
                    "dtype": str(dtype)[6:],
                    "training": training,
                }
                row["ms"] = {k: 1e3 * v for k, v in times.items()}
                if flops:
                    row["TFLOP/s"] = factor * flops / times["ours"] / 1e12
                    row["GB/s"] = factor * traffic / times["ours"] / 1e9
                    peak = (
                        next((v for k, v in PEAKS.items() if k in torch.cuda.get_device_name()), None)
                        if device.type == "cuda"
                        else None
                    )
                    if peak:
                        row["of_peak"] = [row["TFLOP/s"] * 1e12 / peak[0], row["GB/s"] * 1e9 / peak[1]]
                rows.append(row)
                shown = "  ".join(f"{k} {v:8.3f} ms" for k, v in row["ms"].items())
                rate = f"  {row['TFLOP/s']:.1f} TFLOP/s {row['GB/s']:.0f} GB/s" if flops else ""
                rate += (
                    f" ({row['of_peak'][0]:.0%}, {row['of_peak'][1]:.0%} of peak)" if "of_peak" in row else ""
                )
                say(
                    f"{op:18s} {case.name:15s} {row['dtype']:9s} "
                    f"{'train' if training else 'infer'}  {shown}{rate}"
                )
    return rows


def problem(case: Case, dtype: torch.dtype, device: torch.device, quick: bool) -> tuple[Any, float, float]:
    """Arguments of a model-sized case, its least FLOP and bytes forward (0 where nobody counted)."""
    if case.op != "escn":
        return moved(case.arguments(dtype, torch.device("cpu"), 0), device), 0.0, 0.0
    n = edges(quick, device)
    size = replace(escn_cases.MODELS[case.name], degrees=(20,) * (n // 20))
    args = escn_cases.arguments(size, dtype, torch.device("cpu"), 0)
    return moved(args, device), n * work(size)[0], n * work(size)[1]


def work(s: escn_cases.Size) -> tuple[float, float]:
    """(FLOP, bytes) an edge of the forward pass in half precision: products, rotations and the two-stage
    sphere; what the kernels and the products between them must load and store, with each node gathered at
    every edge."""
    n0, rows, half = s.lmax + 1, n_rows(s.lmax, s.mmax), n_half(s.lmax, s.mmax)
    width, extra = s.heads * s.value, s.heads * s.alpha + s.hidden * (1 if s.act == "s2" else s.lmax)
    squares = [(1 if m == 0 else 4) * (n0 - m) ** 2 for m in range(s.mmax + 1)]
    products = sum(q * (2 * s.channels * s.hidden + s.hidden * width) for q in squares)
    products += extra * n0 * 2 * s.channels + s.radial * half * 2 * s.channels
    rotations = wigner_offset(n0, s.mmax) * (2 * s.channels + width)
    lat, lon = s.resolution
    sphere = s.hidden * (2 * lat * rows + 2 * lat * lon * (2 * s.mmax + 1)) if s.act == "s2" else 0
    values = 2 * n0**2 * s.channels + 2 * 2 * half * s.channels + 2 * rows * 2 * s.channels
    values += 2 * extra + 4 * rows * s.hidden + 2 * rows * width + s.radial
    return 2.0 * (products + rotations + sphere), 2.0 * values + 3 * 4 * wigner_offset(n0, s.mmax)


def step(function: Any, args: Any, training: bool) -> Callable[[], Any]:
    leaves = leaves_of(args)

    def infer() -> Any:
        with torch.no_grad():
            return function(*args)

    def train() -> Any:
        return torch.autograd.grad(function(*args).float().sum(), leaves)

    return train if training else infer


def clock(run: Callable[[], Any], device: torch.device, quick: bool) -> float:
    """Seconds: the median over repeats."""
    repeats = 5 if quick else 30
    if device.type == "cpu":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    for _ in range(3 if quick else 10):
        run()
    flush = torch.empty(64 * 2**20, dtype=torch.int32, device=device)  # larger than any L2
    seconds = []
    for _ in range(repeats):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(seconds)


def fairchem_attention(
    case: Case, args: Any, dtype: torch.dtype, device: torch.device
) -> Callable[[bool], Callable[[], Any]] | None:
    """fairchem 1.10's attention module at the same sizes under autocast,
    or None where it is not installed."""
    folder = os.environ.get("FAIRCHEM_1_10")
    if not folder or device.type == "cpu":
        return None
    if folder not in sys.path:
        sys.path.insert(0, folder)
        import types

        for name in ("torch_scatter", "torch_sparse"):
            stub = types.ModuleType(name)
            vars(stub).update(dict.fromkeys(("scatter", "segment_coo", "segment_csr", "SparseTensor")))
            sys.modules.setdefault(name, stub)
    base = "fairchem.core.models.equiformer_v2."
    so3, block, lists, frames = (
        importlib.import_module(base + m) for m in ("so3", "transformer_block", "module_list", "edge_rot_mat")
    )
    s = escn_cases.MODELS[case.name]
    rotation = so3.SO3_Rotation(s.lmax)
    grid = lists.ModuleListInfo("grid")
    for l in range(s.lmax + 1):
        grid.append(
            torch.nn.ModuleList(
                [so3.SO3_Grid(l, m, resolution=18, normalization="component") for m in range(s.lmax + 1)]
            )
        )
    module = block.SO2EquivariantGraphAttention(
        s.channels, s.hidden, s.heads, s.alpha, s.value, s.channels, [s.lmax], [s.mmax],
        torch.nn.ModuleList([rotation]), so3.CoefficientMappingModule([s.lmax], [s.mmax]), grid, 90,
        [600, 128, 128], True, False, "silu", False, True, s.act == "gate", s.act == "s2", 0.0,
    ).to(device)  # fmt: skip
    x, graph = args[0].x, args[0].graph
    n_edges = len(graph.source)
    rotation.set_wigner(frames.init_edge_rot_mat(torch.randn(n_edges, 3, device=device)))
    nodes = x.detach().float().requires_grad_()
    numbers, basis = torch.full((len(x),), 29, device=device), torch.rand(n_edges, 600, device=device)
    edge_index = torch.stack([graph.source, graph.target])

    def run() -> Any:
        embedding = so3.SO3_Embedding(0, [s.lmax], s.channels, device, torch.float32)
        embedding.set_embedding(nodes)
        embedding.set_lmax_mmax([s.lmax], [s.lmax])
        with torch.autocast("cuda", dtype):
            return module(embedding, numbers, basis, edge_index).embedding

    def of(training: bool) -> Callable[[], Any]:
        def train() -> Any:
            wanted = [nodes, *module.parameters()]
            return torch.autograd.grad(run().float().sum(), wanted, allow_unused=True)

        def infer() -> Any:
            with torch.no_grad():
                return run()

        return train if training else infer

    return of


# ------------------------------------------------------------------------------------------ 3. tiles


def tune(device: torch.device, quick: bool, say: Callable[..., None]) -> list[dict[str, Any]]:
    """Forward + backward of the edge path with every candidate tile of every kernel in turn."""
    from catmllm_kernels.aot import first_tile
    from catmllm_kernels.escn.triton import TILES

    found = []
    for case in cases("escn", "model"):
        args, _, _ = problem(case, torch.float16, device, quick)
        for name, tiles in TILES.items():
            for index in range(len(tiles)):
                with first_tile("escn", name, index):
                    seconds = clock(step(case.function, args, True), device, quick)
                found.append({"case": case.name, "kernel": name, "tile": tiles[index], "ms": 1e3 * seconds})
                say(f"{case.name:15s} {name:18s} {seconds * 1e3:8.3f} ms  {tiles[index]}")
    return found


def plot(result: dict[str, Any], path: str) -> None:
    """Bars of the times, one group a case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = result["times"]
    figure, axes = plt.subplots(figsize=(9, 1 + 0.5 * len(rows)), layout="constrained")
    ways = list(dict.fromkeys(k for row in rows for k in row["ms"]))
    for i, way in enumerate(ways):
        places = [j + 0.8 * i / len(ways) for j, row in enumerate(rows) if way in row["ms"]]
        axes.barh(places, [row["ms"][way] for row in rows if way in row["ms"]], 0.8 / len(ways), label=way)
    labels = [f"{r['op']} {r['case']} {r['dtype']} {'train' if r['training'] else 'infer'}" for r in rows]
    axes.set_yticks([j + 0.3 for j in range(len(rows))], labels)
    axes.invert_yaxis()
    axes.set(xlabel="ms", title=f"{result['device']}, {result['edges']} edges", xscale="log")
    axes.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
