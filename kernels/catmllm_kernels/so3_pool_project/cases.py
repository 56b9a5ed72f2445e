"""Cases of the pooling: both norms and none, systems of one atom and of more than a tile."""

from __future__ import annotations

from typing import Any, Literal

import torch

from catmllm_kernels.registry import Case
from catmllm_kernels.so3_pool_project import op, reference


def arguments(
    counts: tuple[int, ...], lmax: int, channels: int, mode: str, norm: str, dtype: torch.dtype,
    device: torch.device, seed: int,
) -> tuple[Any, ...]:  # fmt: skip
    """x, batch, n_systems, mode, norm ("layer", "rms" or "")."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        x = (
            torch.randn(shape, generator=generator, dtype=torch.float64)
            if device.type != "meta"
            else torch.empty(shape)
        )
        return x.to(device=device, dtype=dtype).requires_grad_()

    batch = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).to(device)
    x = random(sum(counts), (lmax + 1) ** 2, channels)
    learned = (random(lmax + 1, channels), random(channels), norm == "rms") if norm else None
    return x, batch, len(counts), mode, learned


def case(
    name: str, kind: Literal["test", "slow", "model"], counts: tuple[int, ...], lmax: int, channels: int,
    mode: str, norm: str
) -> Case:  # fmt: skip
    def compile_case(dtype: torch.dtype) -> None:
        from catmllm_kernels.so3_pool_project import triton

        x, batch, n, *how = arguments(counts, lmax, channels, mode, norm, dtype, torch.device("meta"), 0)
        features, arg, stats = triton.pool_forward(x, batch, n, how[0], how[1])
        triton.pool_backward(torch.empty_like(features), x, batch, n, how[0], how[1], features, arg, stats)

    return Case(
        op="so3_pool_project",
        name=name,
        size=kind,
        arguments=lambda dtype, device, seed: arguments(
            counts, lmax, channels, mode, norm, dtype, device, seed
        ),
        function=op.so3_pool,
        reference=reference.so3_pool,
        # half precision: the normalised value, its norm, the gradient and its result are rounded; with these
        # seeds no rounding moves a maximum to another atom
        tolerance={torch.float16: 4 * 2.0**-11, torch.bfloat16: 4 * 2.0**-8},
        compile=compile_case,
    )


CASES = [
    case("max, layer norm", "test", (3, 1, 20), 2, 5, "max", "layer"),
    case("max, rms norm", "test", (2, 4), 3, 3, "max", "rms"),
    case("invariant, layer norm", "test", (3, 1), 2, 4, "invariant", "layer"),
    case("invariant, rms norm", "test", (1, 18), 1, 4, "invariant", "rms"),
    case("max, no norm", "test", (4, 2), 2, 4, "max", ""),
    case("invariant, no norm", "test", (1,), 0, 4, "invariant", ""),
]
for lmax in (4, 6):
    for mode in ("max", "invariant"):
        CASES.append(case(f"L{lmax} {mode}", "model", (80,) * 4, lmax, 128, mode, "layer"))
