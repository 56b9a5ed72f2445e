"""Run the Triton kernels of linear_logprob in Triton's interpreter and print their largest errors as JSON.

A script, because TRITON_INTERPRET must be set before Triton is first imported;
test_linear_logprob.py runs it.
"""

from __future__ import annotations

import itertools
import json
import random
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import TensorHandle, interpreter_builder

from catmllm_kernels.linear_logprob import IGNORED, linear_logprobs
from catmllm_kernels.linear_logprob import triton as kernels
from catmllm_kernels.linear_logprob.reference import linear_logprob as definition

# Several blocks, splits and slices even at sizes that an interpreter can do.
kernels.BLOCKS = dict.fromkeys(kernels.BLOCKS, (16, 32, 16, 4, 2))
kernels.WORKSPACE = 2048
kernels.SPLIT_TARGET = 6

SHAPES = [(1, 1, 2), (7, 16, 37), (33, 24, 300), (40, 50, 129)]  # tokens, width, words


def poison() -> None:
    """What is allocated and never written shows as NaN."""
    for name in ("new_empty", "empty_like"):
        owner: Any = torch.Tensor if name == "new_empty" else torch
        plain = getattr(owner, name)

        def filled(*args: Any, plain: Any = plain, **options: Any) -> torch.Tensor:
            t = plain(*args, **options)
            return t.fill_(torch.nan) if t.is_floating_point() else t

        setattr(owner, name, filled)


def widen_bfloat16() -> None:
    """The interpreter keeps bfloat16 as raw 16-bit integers and would multiply those:
    widen them first, exactly."""
    plain = interpreter_builder.create_dot

    def float32(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    interpreter_builder.create_dot = lambda a, b, *rest: plain(float32(a), float32(b), *rest)


def shuffle(seed: int | None) -> None:
    """Have the interpreter visit the programs of a launch in another order (None: in its own)."""

    def visit(x: int, y: int, z: int) -> None:
        nx, ny, nz = interpreter_builder.grid_dim
        programs = list(itertools.product(range(nx), range(ny), range(nz)))
        if seed is not None:
            random.Random(seed).shuffle(programs)
        interpreter_builder.grid_idx = programs[(x * ny + y) * nz + z]

    interpreter_builder.set_grid_idx = visit


def run(
    inputs: tuple[torch.Tensor, ...], entropy: bool, function: Any = linear_logprobs
) -> list[torch.Tensor]:
    """Values and gradients of a weighted sum, weights of both signs."""
    hidden, weight, targets, reference, scale = inputs
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    if function is linear_logprobs:
        value, spread, other = linear_logprobs(h, w, targets, 0.7, entropy, reference if entropy else None)
    else:
        value, spread = definition(h, w, targets, 0.7)
        other = definition(h, reference, targets, 0.7)[0] if entropy else None
    total = value * scale.to(value.dtype)
    if entropy:
        total = total + spread
    total.sum().backward()
    assert h.grad is not None and w.grad is not None
    return [x.detach() for x in (value, *((spread, other) if entropy else ()), h.grad, w.grad)]


def main() -> None:
    poison()
    widen_bfloat16()
    rows = []
    for (tokens, width, words), dtype, entropy in itertools.product(
        SHAPES, (torch.float32, torch.float16, torch.bfloat16), (False, True)
    ):
        generator = torch.Generator().manual_seed(tokens)
        hidden, weight, reference = (
            torch.randn(n, width, generator=generator).to(dtype) for n in (tokens, words, words)
        )
        targets = torch.randint(0, words, (tokens,), generator=generator)
        if tokens > 1:
            targets[tokens // 2] = IGNORED
        inputs = (hidden, weight, targets, reference, torch.randn(tokens, generator=generator))
        shuffle(None)
        plain = run(inputs, entropy)
        shuffle(tokens)
        mixed = run(inputs, entropy)
        exact = run(
            tuple(x.double() if x.is_floating_point() else x for x in inputs), entropy, function=definition
        )
        errors = [
            float((a.double() - b).abs().max() / b.abs().max().clamp_min(1))
            for a, b in zip(plain, exact, strict=True)
        ]
        rows.append(
            {
                "shape": [tokens, width, words],
                "dtype": str(dtype).removeprefix("torch."),
                "entropy": entropy,
                "error": max(errors) if all(e == e for e in errors) else float("inf"),
                "same_bits_in_any_order": all(torch.equal(a, b) for a, b in zip(plain, mixed, strict=True)),
            }
        )
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
