"""What the card and its host reach at the simplest: the numbers that all others are shares of."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from bench.gpu_phases.measure import Bench


def prepare(bench: Bench) -> None:
    import catmllm_kernels.so3_pool_project  # noqa: F401  seconds of imports


def run(bench: Bench, _: None) -> None:
    import triton

    about = {"torch": torch.__version__, "triton": triton.__version__, "cores": os.cpu_count()}
    if bench.gpu:
        found = torch.cuda.get_device_properties(0)
        about |= {
            "device": found.name,
            "GiB": found.total_memory / 2**30,
            "sm": f"{found.major}{found.minor}",
        }
        about |= {"multiprocessors": found.multi_processor_count, "cuda": torch.version.cuda}
    bench.row("device", **about)
    copy(bench)
    products(bench)
    host(bench)


def copy(bench: Bench) -> None:
    """Bytes read and written a second by a plain copy of 4 GiB."""
    n = 2**20 if bench.tiny else 2**30
    x, y = (torch.zeros(n, dtype=torch.int32, device=bench.device) for _ in range(2))
    bench.turns(f"copy of {4 * n / 2**30:.3g} GiB", {"ours": lambda: y.copy_(x)}, 0.5,
                lambda _, s: {"TB/s": 8 * n / s / 1e12})  # fmt: skip


def products(bench: Bench) -> None:
    n = 256 if bench.tiny else 8192
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        a, b = (torch.randn(n, n, device=bench.device, dtype=dtype) for _ in range(2))
        bench.turns(f"product {n} x {n} {str(dtype)[6:]}", {"ours": lambda a=a, b=b: a @ b}, 0.5,
                    lambda _, s: {"TFLOP/s": 2 * n**3 / s / 1e12})  # fmt: skip


def host(bench: Bench) -> None:
    """Microseconds of the host for a start: of a small operator of torch, of a custom op, of our own door."""
    from catmllm_kernels.so3_pool_project import so3_pool

    x = torch.zeros(4, 25, 128, device=bench.device)
    batch = torch.zeros(4, dtype=torch.int64, device=bench.device)
    calls: dict[str, Callable[[], Any]] = {
        "torch.add": lambda: torch.add(x, 1.0, out=x),
        "the custom op so3_pool": lambda: so3_pool(x, batch, 1, "max", None),
    }
    if bench.gpu:
        calls["launch() of a Triton kernel"] = our_start(bench.device)
    for name, call in calls.items():
        with bench.guard(f"host time of {name}"):
            n = 500 if bench.gpu else 5
            samples = []
            for _ in range(4):
                bench.sync()
                began = time.perf_counter()
                for _ in range(n):
                    call()
                samples.append(1e6 * (time.perf_counter() - began) / n)
            bench.row(f"host time of {name}", us=statistics.median(samples[1:]))


def our_start(device: torch.device) -> Callable[[], None]:
    """A small kernel by our own door."""
    from catmllm_kernels.launch import launch
    from catmllm_kernels.so3_pool_project.triton import stats_kernel

    x, stats = torch.zeros(4, 25, 128, device=device), torch.empty(4, 3, device=device)
    options: dict[str, Any] = {"L": 4, "C": 128, "JOINT": False, "BLOCK_S": 32, "BLOCK_C": 128}
    return lambda: launch(stats_kernel, (4,), x, stats, 1e-5, **options)
