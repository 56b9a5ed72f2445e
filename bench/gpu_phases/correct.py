"""Every op against its float64 definition, value and all gradients: all registered cases, and the sizes that
models have, whose kernels are other ones. Memory that nothing writes is NaN; a second run must give equal
bits."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from bench.gpu_phases.measure import Bench
from catmllm_kernels.escn import cases as escn
from catmllm_kernels.linear_logprob import cases as linear_logprob
from catmllm_kernels.registry import OPS, Case, as_double, cases, value_and_gradients
from catmllm_kernels.varlen_attention import cases as varlen

HALVES = (torch.float16, torch.bfloat16)


def problems(tiny: bool, large: bool = True) -> Iterator[tuple[Case, tuple[torch.dtype, ...]]]:
    """Cases and their dtypes, those of the 153M model last. `tiny`: sizes for a dry run on a CPU."""
    for case in (c for op in OPS for c in cases(op, "test")[: 1 if tiny else None]):
        yield case, case.dtypes
    sizes = escn.MODELS.items() if large else [(n, s) for n, s in escn.MODELS.items() if "L6" not in n]
    n = 2 if tiny else 8
    for name, size in sorted(sizes, key=lambda kv: kv[1].lmax):
        for degrees, edges in (((20,) * n, "whole tiles"), ((20,) * n + (0, 3, 14), "and a rest")):
            few = (
                replace(size, degrees=(2, 3), channels=4, hidden=8, value=2, alpha=4, radial=8)
                if tiny
                else None
            )
            made = few or replace(size, degrees=degrees)
            yield escn.case(f"{name}, {edges}", made, "model"), (torch.float32,) if tiny else HALVES
            if tiny:
                break
    for two in (False, True):
        shape = (5, 16, 40) if tiny else (300, 896, 8229)
        name = f"{' x '.join(map(str, shape))}{', two heads' if two else ''}"
        yield linear_logprob.case(name, "model", *shape, two), HALVES
    for case in cases("so3_pool_project", "model"):
        if not tiny and (large or "L6" not in case.name):
            # in half precision rounding moves maxima to other atoms
            yield case, (torch.float32,)
    heads = {"0.5B": (14, 2, 64), "7B": (28, 4, 128)}
    for name, size in heads.items():
        lengths, size = ([7, 1, 3], (4, 2, 8)) if tiny else ([700, 1, 64, 300], size)
        arguments = partial(varlen.arguments, lengths, *size)
        yield replace(cases("varlen_attention")[0], name=f"heads of {name}", arguments=arguments), HALVES


def prepare(bench: Bench) -> list[tuple[Case, torch.dtype, Any]]:
    """Arguments on the CPU."""
    return [
        (case, dtype, case.arguments(dtype, torch.device("cpu"), 0))
        for case, dtypes in problems(bench.tiny)
        for dtype in dtypes
    ]


def run(bench: Bench, work: list[tuple[Case, torch.dtype, Any]]) -> None:
    warnings.simplefilter("ignore")  # of operators without a deterministic form
    torch.use_deterministic_algorithms(True, warn_only=True)  # and torch.empty is NaN
    worst: dict[str, float] = {}
    for case, dtype, arguments in work:
        name = f"{case.op} {case.name} {str(dtype)[6:]}"
        with bench.guard(name):
            shares, same = compare(case, dtype, arguments, bench.device)
            share = max(shares) if all(map(math.isfinite, shares)) else math.inf
            worst[case.op] = max(worst.get(case.op, 0.0), share)
            if share > 1 or not same:
                tensor = shares.index(max(shares))  # 0: the value; then the gradients in order
                bench.row(name, wrong=True, of_tolerance=share, tensor=tensor, same_bits=same)
    for op, share in worst.items():
        number = sum(case.op == op for case, _, _ in work)
        bench.row(f"{op}, {number} cases", "ours", unit="of the tolerance", samples=[share])
    prefix(bench)


def compare(case: Case, dtype: torch.dtype, arguments: Any, device: torch.device) -> tuple[list[float], bool]:
    """The error of the value and of each gradient as a share of what is allowed; whether a second run is
    equal."""
    double = as_double(moved(arguments, device))
    exact = value_and_gradients(case.reference, double)
    ours, again = (value_and_gradients(case.function, moved(arguments, device)) for _ in range(2))
    bounds = case.bounds(dtype, double)
    errors = [relative(a, b) for a, b in zip(ours, exact, strict=True)]
    # nothing is calculated where nothing may differ: no edges, a maximum
    shares = [e / b if b else math.inf if e else 0.0 for e, b in zip(errors, bounds, strict=True)]
    return shares, all(torch.equal(a, b) for a, b in zip(ours, again))


def moved(part: Any, device: torch.device) -> Any:
    """Arguments as new leaves on a device."""
    if isinstance(part, torch.Tensor):
        return part.detach().to(device, copy=True).requires_grad_(part.requires_grad)
    if isinstance(part, tuple) and hasattr(part, "_fields"):
        return type(part)(*(moved(p, device) for p in part))
    return type(part)(moved(p, device) for p in part) if isinstance(part, list | tuple) else part


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """max |a - b| / max |b|; infinite where a value is not finite."""
    if not b.numel():
        return 0.0
    error = float((a.double() - b).abs().max() / b.abs().max().clamp_min(1e-30))
    return error if math.isfinite(error) else math.inf


def prefix(bench: Bench) -> None:
    """Answers that share their prompt, in bfloat16: torch's FlashAttention over gathered keys."""
    from catmllm_kernels.varlen_attention import continued, varlen_attention

    lengths, owners = [300, 40, 50, 200, 9], [-1, 0, 0, -1, 3]
    if bench.tiny:
        lengths = [5, 2, 3, 4, 1]
    with bench.guard("answers that share a prompt"):
        bounds = torch.tensor([0, *lengths], device=bench.device).cumsum(0, dtype=torch.int32)
        shared = continued(bounds, torch.tensor(owners, device=bench.device))
        made = [torch.randn(sum(lengths), heads, 64, device=bench.device) for heads in (14, 2, 2)]
        half = [x.to(torch.bfloat16) for x in made]
        ours = varlen_attention(*half, bounds, max(lengths), None, shared)
        exact = varlen_attention(*(x.double() for x in half), bounds, max(lengths), None, shared)
        error = relative(ours, exact) / varlen.TOLERANCE[torch.bfloat16]
        bench.row("answers that share a prompt", of_tolerance=error, **({"wrong": True} if error > 1 else {}))
