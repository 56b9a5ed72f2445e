"""Cases of the decoder's ops: one token, odd widths, and the widths of a small model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from catmllm_kernels.decoder import op, reference
from catmllm_kernels.registry import Case

EPS = 1e-6
# The result and the gradients are rounded once (the kernels)
# or twice (a gradient through a definition that rounds its result).
TOLERANCE = {torch.bfloat16: 2 * 2.0**-8, torch.float16: 2 * 2.0**-11}


def arguments(
    shapes: tuple[tuple[int, ...], ...], n_learned: int, dtype: torch.dtype, device: torch.device, seed: int
) -> tuple[Tensor, ...]:
    """Random tensors; the first `n_learned` want gradients."""
    generator = torch.Generator().manual_seed(seed)
    made = (torch.randn(s, generator=generator, dtype=torch.float64).to(device, dtype) for s in shapes)
    return tuple(x.requires_grad_(i < n_learned) for i, x in enumerate(made))


def rms_norm(of: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    return of(*tensors, EPS)


def rotate(of: Callable[..., tuple[Tensor, Tensor]], *tensors: Tensor) -> Tensor:
    """[T, H + K, D]: both results side by side."""
    return torch.cat(of(*tensors), 1)


def swiglu(of: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    return of(*tensors)


def case(size: Literal["test", "slow"], call: Callable[..., Tensor], *shapes: tuple[int, ...]) -> Case:
    name = call.__name__
    return Case(
        op="decoder",
        name=f"{name} {' '.join('x'.join(map(str, shape)) for shape in shapes[:2])}",
        size=size,
        arguments=partial(arguments, shapes, 2),
        function=partial(call, getattr(op, name)),
        reference=partial(call, getattr(reference, name)),
        tolerance=TOLERANCE,
    )


def turned(size: Any, tokens: int, heads: int, kv_heads: int, width: int) -> Case:
    angles = (tokens, width)
    return case(size, rotate, (tokens, heads, width), (tokens, kv_heads, width), angles, angles)


CASES = [
    case("test", rms_norm, (1, 3), (3,)),
    case("test", rms_norm, (2, 5, 37), (37,)),
    case("slow", rms_norm, (300, 192), (192,)),
    turned("test", 1, 1, 1, 2),
    turned("test", 5, 6, 2, 38),
    turned("slow", 300, 6, 2, 32),
    case("test", swiglu, (1,), (1,)),
    case("test", swiglu, (5, 37), (5, 37)),
    case("slow", swiglu, (300, 512), (300, 512)),
]
