"""Run the Triton kernels of linear_logprob in Triton's interpreter and print as JSON their largest errors
over what rounding allows.

A script, because TRITON_INTERPRET must be set before Triton is first imported;
test_linear_logprob.py runs it.
"""

from __future__ import annotations

import itertools
import json
from typing import Any

import torch

from catmllm_kernels.interpret import strict
from catmllm_kernels.linear_logprob import IGNORED, linear_logprobs
from catmllm_kernels.linear_logprob import triton as kernels
from catmllm_kernels.linear_logprob.reference import linear_logprob as definition
from catmllm_kernels.rounding import error_bounds

# Several blocks, splits and slices even at sizes that an interpreter can do.
kernels.BLOCKS = dict.fromkeys(kernels.BLOCKS, (16, 32, 16, 4, 2))
kernels.WORKSPACE = 2048
kernels.SPLIT_TARGET = 6

SHAPES = [(1, 1, 2), (7, 16, 37), (33, 24, 300), (40, 50, 129)]  # tokens, width, words


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
        with strict():
            plain = run(inputs, entropy)
        with strict(seed=tokens):
            mixed = run(inputs, entropy)
        wide = tuple(x.double() if x.is_floating_point() else x for x in inputs)
        exact = run(wide, entropy, function=definition)
        largest = [float(b.abs().max()) for b in exact]
        if dtype == torch.float32:
            allowed = error_bounds(
                lambda wide=wide, entropy=entropy: run(wide, entropy, definition), 2.0**-24
            )
            bounds = [bound * size for bound, size in zip(allowed, largest, strict=True)]
        else:
            bounds = [2 * torch.finfo(dtype).eps * max(size, 1) for size in largest]  # eps is two roundings
        errors = [
            float((a.double() - b).abs().max() / bound) if bound else float((a != 0).any())
            for a, b, bound in zip(plain, exact, bounds, strict=True)
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
