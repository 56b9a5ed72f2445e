"""The edge path of an EquiformerV2 layer in bfloat16, a full batch and a single system: ours, by kernel; its
definition eager and compiled; fairchem 1.10's layer. And whether 200 batches of other sizes compile
anything."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from bench.gpu_phases import peers
from bench.gpu_phases.correct import moved
from bench.gpu_phases.measure import Bench, compilations
from catmllm_kernels.escn import cases as escn
from catmllm_kernels.escn.layout import EdgeAttention, n_half, n_rows, wigner_offset
from catmllm_kernels.registry import tensors_of

PER_ATOM = 20
TINY = escn.Size(2, 1, "s2", (), 4, 8, 2, 4, 2, 8, (6, 5))


@dataclass(eq=False)
class Problem:
    """One size at one number of edges; arguments on the CPU."""

    name: str
    size: escn.Size
    edges: int
    arguments: EdgeAttention


def sizes(tiny: bool) -> dict[str, escn.Size]:
    return {"tiny": TINY} if tiny else {n: s for n, s in escn.MODELS.items() if s.act == "s2"}


def prepare(bench: Bench) -> tuple[list[Problem], Any]:
    import triton  # noqa: F401  a second of imports

    numbers = (40,) if bench.tiny else (4_000,) if bench.quick else (32_000, 1_600)
    dtype = torch.float32 if bench.tiny else torch.bfloat16
    found = []
    for name, size in sizes(bench.tiny).items():
        for edges in numbers:
            made = replace(size, degrees=(PER_ATOM,) * (edges // PER_ATOM))
            found.append(Problem(name, made, edges, escn.arguments(made, dtype, torch.device("cpu"))[0]))
    theirs = {}
    for name, size in sizes(bench.tiny).items():
        with bench.guard(name, "fairchem 1.10"):
            theirs[name] = peers.fairchem_edges(bench, size)
    return sorted(found, key=lambda p: (p.size.lmax, -p.edges)), theirs


def run(bench: Bench, prepared: tuple[list[Problem], Any]) -> None:
    problems, theirs = prepared
    first = problems[0]
    small = [p for p in problems if p.size.lmax == first.size.lmax]
    large = [p for p in problems if p not in small]
    # what compiles for minutes comes last: L6M3 unless it was compiled beforehand, and the definition
    soon, late = (large, []) if bench.settings.filled else ([], large)
    for p in small:
        guarded(bench, p, theirs.get(p.name))
    with bench.guard("other sizes"):
        other_sizes(bench, first)
    for p in soon:
        guarded(bench, p, theirs.get(p.name))
    if bench.settings.tune:
        tiles(bench, first)
    if not bench.quick:
        compiled(bench, first)
    for p in late:
        guarded(bench, p, theirs.get(p.name))


def guarded(bench: Bench, p: Problem, theirs: Any) -> None:
    with bench.guard(p.name):
        timed(bench, p, theirs)


def timed(bench: Bench, p: Problem, theirs: Any) -> None:
    (a,) = moved((p.arguments,), bench.device)
    case = escn.case(p.name, p.size, "model")
    for training in (False, True):
        what = f"{p.name}, {p.edges:,} edges, {'training' if training else 'inference'}"
        ways = {"ours": call(case.function, a, training), "eager": call(case.reference, a, training)}
        if theirs is not None:
            with bench.guard(what, "fairchem 1.10"):
                ways["fairchem 1.10"] = call(theirs(a, a.x.dtype), a, training)
        bench.turns(what, ways, 2.0, rates(p, training))
        bench.host_row(what, ways["ours"], kernels=14)


def call(function: Callable[..., Any], a: EdgeAttention, training: bool) -> Callable[[], Any]:
    leaves = getattr(function, "leaves", None) or [t for t in tensors_of(list(a)) if t.requires_grad]
    inputs = (leaves[0],) if hasattr(function, "leaves") else (a,)

    def infer() -> Any:
        with torch.no_grad():
            return function(*inputs)

    def train() -> Any:
        return torch.autograd.grad(function(*inputs).float().sum(), leaves, allow_unused=True)

    return train if training else infer


def rates(p: Problem, training: bool) -> Callable[[str, float], dict[str, float]]:
    flop, least = work(p.size)
    factor = 3 if training else 1

    def of(who: str, seconds: float) -> dict[str, float]:
        each = {"ns_edge": 1e9 * seconds / p.edges}
        if who != "ours":
            return each
        each["TFLOP/s"] = factor * p.edges * flop / seconds / 1e12
        return each | {"TB/s": factor * p.edges * least / seconds / 1e12}

    return of


def work(s: escn.Size) -> tuple[float, float]:
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


def other_sizes(bench: Bench, p: Problem) -> None:
    """Random numbers of nodes and edges, forward and backward, after the sizes above."""
    draw, batches = random.Random(0), 3 if bench.tiny else 200
    case = escn.case(p.name, p.size, "model")
    dtype = p.arguments.x.dtype
    with compilations() as found:
        for _ in range(batches):
            nodes = draw.randrange(1, 5 if bench.tiny else 40)
            size = replace(p.size, degrees=tuple(draw.randrange(8) for _ in range(nodes)))
            (a,) = escn.arguments(size, dtype, torch.device("cpu"))
            call(case.function, moved((a,), bench.device)[0], True)()
    wrong = {"wrong": True, "kernels": ", ".join(sorted(set(found)))} if found else {}
    bench.row(f"{batches} batches of other sizes", compilations=len(found), **wrong)


def tiles(bench: Bench, p: Problem) -> None:
    """Forward and backward with every candidate tile of every kernel in turn."""
    from catmllm_kernels.aot import first_tile
    from catmllm_kernels.escn.triton import TILES

    (a,) = moved((p.arguments,), bench.device)
    train = call(escn.case(p.name, p.size, "model").function, a, True)
    for name, candidates in TILES.items():
        for index, tile in enumerate(candidates if len(candidates) > 1 else ()):
            with first_tile("escn", name, index):
                bench.turns(f"{p.name}, {p.edges:,} edges, {name} {tile}", {"ours": train}, 0.5)


def compiled(bench: Bench, p: Problem) -> None:
    """Last, since it may take what is left: the definition under torch.compile, and ours again beside it."""
    if bench.tiny:
        return
    (a,) = moved((p.arguments,), bench.device)
    case = escn.case(p.name, p.size, "model")
    for training in (False, True):
        what = f"{p.name}, {p.edges:,} edges, {'training' if training else 'inference'}, beside the compiled"
        definition = torch.compile(case.reference, dynamic=False)
        ways = {"ours": call(case.function, a, training), "torch.compile": call(definition, a, training)}
        bench.turns(what, ways, 1.0, rates(p, training))
