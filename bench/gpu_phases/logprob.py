"""`linear_logprob` with a 0.5B and a 7B head beside plain torch and Liger-Kernel: time and peak memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bench.gpu_phases import peers
from bench.gpu_phases.measure import Bench
from catmllm_kernels.linear_logprob import linear_logprob

SHAPES = [(8192, 896, 151936), (8192, 3584, 152064)]  # tokens, width, words
# Tiles to try in the forward pass: (tokens, words, width, warps, stages).
TILES = [
    (128, 128, 64, 8, 3),
    (128, 128, 64, 8, 4),
    (128, 256, 64, 8, 3),
    (128, 256, 64, 8, 4),
    (256, 128, 64, 8, 3),
]


def prepare(bench: Bench) -> Any:
    return peers.liger(bench)


def run(bench: Bench, liger: Any) -> None:
    for shape in [(16, 8, 50)] if bench.tiny else SHAPES:
        with bench.guard(" x ".join(map(str, shape))):
            timed(bench, liger, *shape)


def timed(bench: Bench, liger: Any, tokens: int, width: int, words: int) -> None:
    draw = torch.Generator(bench.device).manual_seed(0)
    options: dict[str, Any] = {"device": bench.device, "dtype": torch.bfloat16, "generator": draw}
    hidden = torch.randn(tokens, width, **options).requires_grad_()
    weight = (torch.randn(words, width, **options) * width**-0.5).requires_grad_()
    targets = torch.randint(0, words, (tokens,), device=bench.device)
    name = f"{tokens:,} x {width:,} x {words:,}"

    def eager() -> Tensor:
        logits = (hidden @ weight.T).float()
        return -torch.nn.functional.cross_entropy(logits, targets, reduction="none")

    ways: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: linear_logprob(hidden, weight, targets),
        "eager": eager,
    }
    if liger is not None:
        ways["Liger"] = lambda: liger.apply(hidden, weight, targets)[0]

    def rates(who: str, seconds: float, products: int) -> dict[str, float]:
        return {"TFLOP/s": 2 * tokens * width * words * products / seconds / 1e12}

    # Liger makes its gradients in the forward pass: it stands beside the others with them alone.
    for training in (False, True):
        calls = {w: call(f, [hidden, weight], training) for w, f in ways.items() if training or w != "Liger"}
        what = f"{name}, {'with gradients' if training else 'forward'}"
        bench.turns(what, calls, 1.5, lambda w, s, n=3 if training else 1: rates(w, s, n))
    if bench.gpu and not bench.quick:
        tiles(bench, name, call(ways["ours"], [], False))


def call(function: Callable[[], Tensor], leaves: list[Tensor], training: bool) -> Callable[[], Any]:
    def infer() -> Any:
        with torch.no_grad():
            return function()

    def train() -> Any:
        return torch.autograd.grad(function().float().sum(), leaves)

    return train if training else infer


def tiles(bench: Bench, name: str, forward: Callable[[], Any]) -> None:
    for tile in TILES:
        with bench.guard(f"{name}, tile {tile}"), first_tile(tile):
            bench.turns(f"{name}, forward, tile {tile}", {"ours": forward}, 0.4)


@contextmanager
def first_tile(tile: tuple[int, ...]) -> Iterator[None]:
    """The forward pass with this one in place of the architecture's own."""
    from catmllm_kernels.launch import architecture
    from catmllm_kernels.linear_logprob.triton import BLOCKS, HOPPER

    own = HOPPER if architecture() >= 90 else BLOCKS
    chosen = own["forward", 2]
    own["forward", 2] = tile
    try:
        yield
    finally:
        own["forward", 2] = chosen
