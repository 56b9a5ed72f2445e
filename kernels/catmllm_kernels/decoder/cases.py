"""Cases of the decoder's ops: one token, odd widths, and the widths of a small and of a large model."""

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
    if device.type == "meta":
        return tuple(torch.empty(s, dtype=dtype, device=device) for s in shapes)
    made = (torch.randn(s, generator=generator, dtype=torch.float64).to(device, dtype) for s in shapes)
    return tuple(x.requires_grad_(i < n_learned) for i, x in enumerate(made))


def rms_norm(of: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    return of(*tensors, EPS)


def rotate(of: Callable[..., tuple[Tensor, Tensor]], *tensors: Tensor) -> Tensor:
    """[T, H + K, D]: both results side by side."""
    return torch.cat(of(*tensors), 1)


def swiglu(of: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    return of(*tensors)


def compile_case(name: str, *shapes: tuple[int, ...]) -> Callable[[torch.dtype], None]:
    """What the op's kernels start forward and backward."""

    def compile(dtype: torch.dtype) -> None:
        from catmllm_kernels.decoder import triton

        a, b, *rest = arguments(shapes, 0, dtype, torch.device("meta"), 0)
        if name == "rms_norm":
            out, inverse = triton.rms_norm_forward(a, b, EPS)
            triton.rms_norm_backward(out, a, b, inverse, EPS)
        elif name == "rotate":
            for transposed in (False, True):
                triton.rotate(a, b, rest[0], rest[1], transposed)
        else:
            triton.swiglu_backward(triton.swiglu_forward(a, b), a, b)

    return compile


def case(
    size: Literal["test", "slow", "model"], call: Callable[..., Tensor], *shapes: tuple[int, ...]
) -> Case:
    name = call.__name__
    return Case(
        op="decoder",
        name=f"{name} {' '.join('x'.join(map(str, shape)) for shape in shapes[:2])}",
        size=size,
        arguments=partial(arguments, shapes, 2),
        function=partial(call, getattr(op, name)),
        reference=partial(call, getattr(reference, name)),
        tolerance=TOLERANCE,
        compile=compile_case(name, *shapes),
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
    # a layer of the 7B model
    case("model", rms_norm, (8192, 3584), (3584,)),
    turned("model", 8192, 28, 4, 128),
    case("model", swiglu, (8192, 18944), (8192, 18944)),
]
