"""What a kernel is compiled for: once for its constants, whatever the sizes of a batch."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton.runtime.interpreter")

from catmllm_kernels.aot import config_of, launches, specialised
from catmllm_kernels.decoder import cases as decoder
from catmllm_kernels.escn import cases as escn
from catmllm_kernels.launch import SIZES, Launch, recorded
from catmllm_kernels.linear_logprob import cases as linear_logprob
from catmllm_kernels.registry import cases
from catmllm_kernels.so3_pool_project import cases as pooling

META = torch.device("meta")


def edge_path(nodes: int, edges: int) -> None:
    degrees = (edges - nodes + 1, *(1,) * (nodes - 1))
    escn.compile_case(escn.Size(2, 1, "s2", degrees, 16, 16, 2, 16, 16, 16), torch.float16)


def pooled(nodes: int, edges: int) -> None:
    from catmllm_kernels.so3_pool_project import triton

    x, batch, n, mode, norm = pooling.arguments((nodes,), 2, 16, "max", "layer", torch.float16, META, 0)
    features, arg, stats = triton.pool_forward(x, batch, n, mode, norm)
    triton.pool_backward(torch.empty_like(features), x, batch, n, mode, norm, features, arg, stats)


def log_probability(tokens: int, words: int) -> None:
    linear_logprob.case("", "model", tokens, 64, 4096, True).compile(torch.float16)  # type: ignore[misc]


def between_products(tokens: int, _: int) -> None:
    shapes = {"rms_norm": ((tokens, 64), (64,)), "swiglu": ((tokens, 64),) * 2}
    shapes["rotate"] = ((tokens, 4, 16), (tokens, 2, 16), (tokens, 16), (tokens, 16))
    for name, of in shapes.items():
        decoder.compile_case(name, *of)(torch.float16)


@pytest.mark.parametrize("op", [edge_path, pooled, log_probability, between_products])
def test_another_number_of_edges_nodes_or_tokens_compiles_nothing_new(op: Callable[[int, int], None]) -> None:
    draw = random.Random(0)
    sizes = [(1, 1), (16, 160), (1, 16), (16, 17)]
    sizes += [(n, n + draw.randrange(60)) for n in (draw.randrange(1, 200) for _ in range(196))]
    keys: dict[tuple[str, str], set[str]] = {}
    for size in sizes:
        with recorded() as found:
            op(*size)
        for start in found:
            keys.setdefault((start.kernel.__name__, config_of(start)), set()).add(repr(specialised(start)))
    assert keys and {len(of) for of in keys.values()} == {1}, {k: len(of) for k, of in keys.items()}


def test_every_integer_argument_is_a_stride_or_named_as_a_size() -> None:
    """A new kernel with another name for its number of edges would compile in mid-training."""
    fixed = {"gates_edge", "extra_edge", "grad_edge", "n_words", "width"}
    with recorded() as found:
        edge_path(2, 3)
        pooled(2, 3)
        log_probability(3, 4)
        between_products(3, 4)
    given = [(name, value) for start in found for name, value in zip(start.kernel.arg_names, start.arguments)]
    names = {name for name, value in given if isinstance(value, int)}
    assert names == fixed | set(SIZES)


def test_a_size_is_no_constant_and_a_stride_is() -> None:
    import triton

    @triton.jit(do_not_specialize=SIZES)
    def kernel(x, n_edges, stride):  # type: ignore[no-untyped-def]
        pass

    def of(n_edges: int, stride: int) -> tuple[dict[str, str], ...]:
        return specialised(  # type: ignore[return-value]
            Launch(kernel, (1,), (torch.ones(2), n_edges, stride))
        )

    assert of(1, 8) == of(16, 8) == of(7, 8)
    assert of(7, 1)[0]["stride"] == "constexpr" and len({repr(of(7, s)) for s in (1, 2, 16)}) == 3
    assert of(2**31, 8)[0]["n_edges"] == "i64"


def test_every_branch_that_a_model_compiles_is_run_by_a_test_case() -> None:
    """A flag, or whether widths are whole tiles, decides what is compiled: a branch that only models take (no
    masks in the product) would never be interpreted."""

    def branches(size: str) -> set[tuple[str, tuple[tuple[str, bool], ...]]]:
        found = set()
        for case in (c for c in cases(size=size) if c.compile):
            for start in launches(case, torch.float16, 90):
                given = start.constants
                flags = [(k, v) for k, v in given.items() if isinstance(v, bool)]
                for width, block in (("C", "BLOCK_K"), ("HIDDEN", "BLOCK_C")):
                    if width in given and block in given:
                        flags.append((f"{width} % {block}", given[width] % given[block] > 0))
                found.add((start.kernel.__name__, tuple(sorted(flags))))
        return found

    models = branches("model")
    whole = (("C % BLOCK_K", False), ("HIDDEN % BLOCK_C", False), ("SPHERE", True))
    assert ("product_kernel", whole) in models
    assert models <= branches("test"), models - branches("test")
