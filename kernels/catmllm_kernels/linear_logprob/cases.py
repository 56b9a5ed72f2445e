"""Cases of the log-probability: one token, an ignored one, several tiles of words and of tokens,
with and without the second head."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from catmllm_kernels.linear_logprob import op, reference
from catmllm_kernels.linear_logprob.arguments import Backward, Forward
from catmllm_kernels.registry import Case

TEMPERATURE = 0.7
# Logits are at most 4 here. Rounded to half precision and divided by the temperature they move a
# log-probability, and the share of a probability, by 6 units in the last place; the gradient of the logits
# and the result are rounded once each.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 8 * 2.0**-11, torch.bfloat16: 8 * 2.0**-8}


def arguments(
    tokens: int, width: int, words: int, two: bool, dtype: torch.dtype, device: torch.device, seed: int
) -> tuple[Any, ...]:
    """hidden, weight, targets, and the second head where there is one."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        if device.type == "meta":
            return torch.empty(shape, dtype=dtype, device=device)
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(device, dtype)

    hidden = random(tokens, width).requires_grad_()
    weight = random(words, width, scale=width**-0.5).requires_grad_()
    targets = torch.randint(0, words, (tokens,), generator=generator)
    if tokens > 1:
        targets[tokens // 2] = reference.IGNORED
    heads = (random(words, width, scale=width**-0.5),) if two else ()
    return hidden, weight, targets.to(device), *heads


def function(hidden: Tensor, weight: Tensor, targets: Tensor, other: Tensor | None = None) -> Tensor:
    """[T], or with a second head [3, T]: log-probability, entropy, log-probability of the other head."""
    if other is None:
        return op.linear_logprob(hidden, weight, targets, TEMPERATURE)
    out = op.linear_logprobs(hidden, weight, targets, TEMPERATURE, entropy=True, reference=other)
    assert out.entropy is not None and out.reference is not None
    return torch.stack([out.logprob, out.entropy, out.reference])


def definition(hidden: Tensor, weight: Tensor, targets: Tensor, other: Tensor | None = None) -> Tensor:
    logprob, entropy = reference.linear_logprob(hidden, weight, targets, TEMPERATURE)
    if other is None:
        return logprob
    return torch.stack(
        [logprob, entropy, reference.linear_logprob(hidden.detach(), other, targets, TEMPERATURE)[0]]
    )


def case(
    name: str, kind: Literal["test", "slow", "model"], tokens: int, width: int, words: int, two: bool
) -> Case:
    def compile_case(dtype: torch.dtype) -> None:
        from catmllm_kernels.linear_logprob import triton

        device = torch.device("meta")
        hidden, weight, targets, *heads = arguments(tokens, width, words, two, dtype, device, 0)
        other = heads[0] if two else None
        with torch.no_grad():
            given = Forward(hidden, weight, targets, TEMPERATURE, two, other)
            _, lse, spread, *_ = triton.forward(given)
            grad = torch.empty_like(lse)
            of_entropy = grad if two else None
            triton.backward(Backward(grad, of_entropy, *given[:3], lse, spread, TEMPERATURE, True, True))

    return Case(
        op="linear_logprob",
        name=name,
        size=kind,
        arguments=lambda dtype, device, seed: arguments(tokens, width, words, two, dtype, device, seed),
        function=function,
        reference=definition,
        tolerance=TOLERANCE,
        compile=compile_case,
    )


CASES = [
    case("one token, two words", "test", 1, 1, 2, False),
    case("an odd width, three tiles of words", "test", 7, 23, 300, False),
    case("entropy and a second head", "test", 20, 16, 129, True),
    case("whole tiles of the width, as models", "test", 3, 64, 40, False),
    case("whole tiles, two heads", "test", 3, 64, 40, True),
    case("two tiles of tokens", "slow", 130, 70, 400, False),
    case("two tiles of tokens, two heads", "slow", 130, 64, 257, True),
    case("7B", "model", 4096, 3584, 152064, False),
    case("7B, entropy and a second head", "model", 4096, 3584, 152064, True),
]
