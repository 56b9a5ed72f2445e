"""The CPU library behind csrc/so2 against fairchem's float64 runs and the plain definition,
for every instruction set.

CATMLLM_ESCN_REFERENCES (default ../shared/reference/escn) is a folder with runs of fairchem 1.10; one is in
tests/fixtures. Without Python the same kernels are tested by `make test-so2`, under both sanitizers.
"""

from __future__ import annotations

import functools
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from catmllm_kernels import native
from catmllm_kernels.escn import Sphere, cpu, edge_attention, edge_graph, reference, rotate_back_sum
from catmllm_kernels.escn.cases import Size, inputs
from catmllm_kernels.escn.layout import EdgeAttention, gradients_of, n_rows, with_learned
from catmllm_kernels.rounding import error_bounds

ROOT = Path(__file__).parents[2]
REFERENCES = Path(os.environ.get("CATMLLM_ESCN_REFERENCES", ROOT.parent / "shared" / "reference" / "escn"))
FILES = {
    path.stem: path
    for path in [*REFERENCES.glob("ref_L*.npz"), *(ROOT / "tests/fixtures").glob("ref_L*.npz")]
}
CPU = torch.device("cpu")
SETS = ["avx512", "avx2", "portable"]


@pytest.fixture(autouse=True)
def forced(monkeypatch):
    """A library that is missing is an error here, not a way to the reference."""
    monkeypatch.setenv("CATMLLM_KERNELS", "cpu")


@pytest.fixture(params=SETS)
def instruction_set(request, monkeypatch):
    monkeypatch.setenv("CATMLLM_ISA", request.param)
    if native.instruction_set() != request.param:
        pytest.skip(f"this machine has no {request.param}")


@pytest.fixture
def threads():
    """Sets torch's threads, and back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def relative(a: Tensor, b: Tensor) -> float:
    a, b = a.detach(), b.detach()
    return (
        float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-300))
        if b.numel()
        else 0.0
    )


def cast(a: EdgeAttention, dtype: torch.dtype) -> EdgeAttention:
    def of(value):
        if isinstance(value, Tensor):
            return value.to(dtype) if value.is_floating_point() else value
        if isinstance(value, list):
            return [of(v) for v in value]
        if isinstance(value, tuple):
            parts = [of(v) for v in value]
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        return value

    return of(a)


# ------------------------------------------------------------------------------------ fairchem's float64 runs


class Attention(torch.nn.Module):
    """fairchem's attention around the op, from the arrays of one run."""

    def __init__(self, arrays: dict[str, Tensor], lmax: int, mmax: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.lmax, self.mmax = lmax, mmax
        self.message = edge_attention
        prefix = "w/block.ga."
        for key, value in arrays.items():
            if key.startswith(prefix) and f"ga_grad_w/{key[len(prefix) :]}" in arrays:
                self.register_parameter(
                    key[len(prefix) :].replace(".", "/"), torch.nn.Parameter(value.to(dtype))
                )
        self.arrays = {k: v.to(dtype) if v.is_floating_point() else v for k, v in arrays.items()}
        self.wigner = self.packed(arrays["wigner"]).to(dtype)
        self.sphere = None if "gate" in arrays else self.factors().to_dtype(dtype)

    def packed(self, wigner: Tensor) -> Tensor:
        """Dense [E, S, S] -> [E, P]."""
        return torch.cat(
            [
                wigner[
                    :, l * l + l - min(l, self.mmax) : l * l + l + min(l, self.mmax) + 1, l * l : (l + 1) ** 2
                ].flatten(1)
                for l in range(self.lmax + 1)
            ],
            dim=1,
        )

    def factors(self) -> _Sphere:
        """At longitude 0 every sine is 0 and every cosine 1: what is left are the factors by latitude."""
        reduced = [
            (l, m) for l in range(self.lmax + 1) for m in range(-min(l, self.mmax), min(l, self.mmax) + 1)
        ]
        half = [reduced.index((l, m)) for m in range(self.mmax + 1) for l in range(m, self.lmax + 1)]
        to, back = (self.arrays[name][:, 0][:, half] for name in ("to_grid", "from_grid"))
        n = self.arrays["to_grid"].shape[1]
        phi = 2 * math.pi * torch.arange(n, dtype=torch.float64) / n
        waves = [torch.ones_like(phi)]
        for m in range(1, self.mmax + 1):
            waves += [torch.cos(m * phi), torch.sin(m * phi)]
        return _Sphere(to, back, torch.stack(waves, 1))

    def weight(self, name: str) -> Tensor:
        return getattr(self, name.replace(".", "/"))

    def forward(self, x: Tensor) -> Tensor:
        a, w, orders = self.arrays, self.weight, range(self.mmax)
        source, target = a["edge_index"]
        numbers = a["Z"]
        radial = torch.cat(
            [
                a["edge_rbf"],
                F.embedding(numbers[source], w("source_embedding.weight")),
                F.embedding(numbers[target], w("target_embedding.weight")),
            ],
            dim=1,
        )
        net = "so2_conv_1.rad_func.net."
        for linear, norm in ((0, 1), (3, 4)):
            radial = F.linear(radial, w(f"{net}{linear}.weight"), w(f"{net}{linear}.bias"))
            radial = F.silu(
                F.layer_norm(radial, radial.shape[1:], w(f"{net}{norm}.weight"), w(f"{net}{norm}.bias"))
            )
        conv = [
            [w(f"so2_conv_{i}.fc_m0.weight"), *(w(f"so2_conv_{i}.so2_m_conv.{m}.fc.weight") for m in orders)]
            for i in (1, 2)
        ]
        message = EdgeAttention(
            x=x,
            radial=radial,
            radial_weight=w(f"{net}6.weight"),
            radial_bias=w(f"{net}6.bias"),
            wigner=self.wigner,
            graph=edge_graph(a["edge_index"], len(x)),
            conv1=conv[0],
            conv1_bias=w("so2_conv_1.fc_m0.bias"),
            alpha_norm=(w("alpha_norm.weight"), w("alpha_norm.bias")),
            alpha_dot=w("alpha_dot"),
            conv2=conv[1],
            conv2_bias=w("so2_conv_2.fc_m0.bias"),
            sphere=self.sphere,
            lmax=self.lmax,
            mmax=self.mmax,
        )
        total = self.message(message)
        degree = torch.tensor([l for l in range(self.lmax + 1) for _ in range(2 * l + 1)])
        out = torch.einsum("nsi,soi->nso", total, w("proj.weight")[degree])
        return torch.cat([out[:, :1] + w("proj.bias"), out[:, 1:]], dim=1)


class _Sphere(Sphere):
    def to_dtype(self, dtype: torch.dtype) -> Sphere:
        return Sphere(*(t.to(dtype).contiguous() for t in self))


def of_file(name: str, dtype: torch.dtype) -> tuple[Attention, dict[str, Tensor]]:
    arrays = {k: torch.from_numpy(v) for k, v in np.load(FILES[name]).items()}
    if "gate" in name:
        arrays["gate"] = torch.ones(())
    return Attention(arrays, int(name[5]), int(name[7]), dtype), arrays


def outcome(attention: Attention) -> dict[str, Tensor]:
    """The output and every gradient."""
    names, parameters = zip(*attention.named_parameters(), strict=True)
    x = attention.arrays["x"].clone().requires_grad_()
    out = attention(x)
    gradients = torch.autograd.grad(out, [x, *parameters], attention.arrays["ga_cotangent"])
    return dict(zip(("out", "x", *names), (out.detach(), *gradients), strict=True))


def errors(name: str, dtype: torch.dtype) -> dict[str, float]:
    """Of the output and every gradient against one of fairchem's runs, relative to its largest element."""
    attention, arrays = of_file(name, dtype)
    found = outcome(attention)
    weights = {n for n in found if n not in ("out", "x")}
    assert {f"ga_grad_w/{n.replace('/', '.')}" for n in weights} == {
        k for k in arrays if k.startswith("ga_grad_w/")
    }
    expected = {n: arrays[f"ga_grad_w/{n.replace('/', '.')}"] for n in weights}
    expected |= {"out": arrays["ga_out"], "x": arrays["ga_grad_x"]}
    if dtype == torch.float64:
        assert (found["out"] - arrays["ga_out"]).abs().max() < 1e-10
    return {n: relative(t, expected[n]) for n, t in found.items()}


@functools.cache
def bounds(name: str, dtype: torch.dtype) -> dict[str, float]:
    """Of each error: float64 agrees to the last digits, float32 as far as its sums can (`rounding`)."""
    attention, _ = of_file(name, torch.float64)
    names = ["out", "x", *(n for n, _ in attention.named_parameters())]
    if dtype == torch.float64:
        return dict.fromkeys(names, 1e-10)
    attention.message = lambda a: reference.edge_attention(a)[0]
    found = error_bounds(lambda: list(outcome(attention).values()), 2.0**-24)
    return dict(zip(names, found, strict=True))


def compare_with_fairchem(name: str, dtype: torch.dtype) -> None:
    found, bound = errors(name, dtype), bounds(name, dtype)
    assert not {n: (e, bound[n]) for n, e in found.items() if not e <= bound[n]}


DTYPES = [torch.float64, torch.float32]


@pytest.mark.parametrize("name", sorted(FILES))
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_fairchem_with_every_gradient(name, dtype, instruction_set):
    compare_with_fairchem(name, dtype)


@pytest.mark.parametrize("name", sorted(FILES))
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_definition_equals_fairchem_too(name, dtype, monkeypatch):
    monkeypatch.setenv("CATMLLM_KERNELS", "reference")
    compare_with_fairchem(name, dtype)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", sorted(FILES))
def test_triton_interpreted_equals_fairchem_too(name, monkeypatch):
    pytest.importorskip("triton.runtime.interpreter")
    from catmllm_kernels.interpret import strict

    monkeypatch.setenv("CATMLLM_KERNELS", "triton")
    with strict(seed=1):
        compare_with_fairchem(name, torch.float32)


# --------------------------------------------------------------------------------------- the plain definition

SIZES = {
    "unequal degrees, a lone atom": Size(2, 2, "s2", (3, 0, 1, 5)),
    "one atom": Size(2, 1, "gate", (0,)),
    "several blocks a target, odd widths": Size(
        3, 2, "s2", (3, 130, 1, 65, 0, 7), 24, 20, 3, 20, 5, 18, (8, 9), keep=True
    ),
    "gates, no norm": Size(4, 2, "gate", (70, 3, 3, 3), channels=16, hidden=16, norm=False),
    "L6M3": Size(6, 3, "s2", (7, 3, 20), channels=16, hidden=16, resolution=(18, 18)),
    "L5M0": Size(5, 0, "s2", (7, 3, 20), channels=16, hidden=16, resolution=(12, 1)),
    "L8M8": Size(8, 8, "s2", (3, 2), resolution=(18, 19)),
}


def everything(a: EdgeAttention, grad: Tensor) -> list[Tensor]:
    """What an implementation returns forward and backward, by the definition."""
    leaves = [t.detach().requires_grad_() for t in gradients_of(a)]
    out = reference.edge_attention(with_learned(a, leaves))
    return [*(t.detach() for t in out), *torch.autograd.grad(out[0], leaves, grad)]


@pytest.mark.parametrize("name", SIZES)
def test_equals_the_definition(name, instruction_set, threads):
    exact = inputs(SIZES[name], torch.float64, CPU)
    expected = reference.edge_attention_forward(exact, True)
    grad = torch.randn(expected[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected_gradients = reference.edge_attention_backward(grad, exact, *expected[1:])
    narrow = error_bounds(lambda: everything(exact, grad), 2.0**-24)
    for dtype, limits in ((torch.float64, None), (torch.float32, narrow)):
        a = cast(exact, dtype)
        results = []
        for n in (1, 2):
            threads(n)
            out = cpu.edge_attention_forward(a, True)
            results.append([*out, *cpu.edge_attention_backward(grad.to(dtype), a, *out[1:])])
        for i, (ours, theirs) in enumerate(zip(results[0], [*expected, *expected_gradients], strict=True)):
            assert ours.shape == theirs.shape
            assert relative(ours, theirs) <= (limits[i] if limits else 1e-12)
        assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))
        assert torch.equal(cpu.edge_attention_forward(a, False)[0], results[0][0])


def test_as_trained_in_several_chunks():
    """Full widths of the 31M model, more edges than one chunk of the backward pass holds."""
    a = inputs(Size(4, 2, "s2", (30,) * 24, 128, 64, 8, 64, 16, 128, (18, 18)), torch.float32, CPU)
    exact = cast(a, torch.float64)
    grad = torch.randn(24, 25, 128, generator=torch.Generator().manual_seed(1))
    out = cpu.edge_attention_forward(a, True)
    ours = [*out, *cpu.edge_attention_backward(grad, a, *out[1:])]
    theirs = everything(exact, grad.double())
    limits = error_bounds(lambda: everything(exact, grad.double()), 2.0**-24, runs=1)
    for x, y, limit in zip(ours, theirs, limits, strict=True):
        assert relative(x, y) <= limit


@pytest.mark.parametrize("act", ["s2", "gate"])
def test_gradients_by_differences(act):
    a = inputs(Size(2, 1, act, (2, 0, 3), 3, 4, 2, 3, 2, 3, (6, 5), keep=True), torch.float64, CPU)
    leaves = [t.requires_grad_() for t in gradients_of(a)]
    assert torch.autograd.gradcheck(
        lambda *_: edge_attention(a), leaves, fast_mode=True, check_undefined_grad=False
    )


@pytest.mark.parametrize("only_zero", [False, True])
def test_rotate_back_sum(only_zero, instruction_set):
    a = inputs(Size(3, 2, "s2", (3, 0, 70, 5)), torch.float64, CPU)
    rows = 4 if only_zero else n_rows(3, 2)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(78, rows, 6, dtype=torch.float64, generator=generator).requires_grad_()
    alpha = torch.randn(78, 2, dtype=torch.float64, generator=generator).requires_grad_()
    args = (a.wigner, a.graph, 4, 3, 2)
    ours = rotate_back_sum(values, alpha, *args)
    theirs = reference.rotate_back_sum(values, alpha, *args)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    grad = torch.randn_like(ours)
    for x, y in zip(*(torch.autograd.grad(t, (values, alpha), grad) for t in (ours, theirs)), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)
    narrow = rotate_back_sum(values.detach().float(), alpha.detach().float(), a.wigner.float(), *args[1:])
    assert relative(narrow, theirs) < 2e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_runs_in_float32_and_is_rounded_once(dtype):
    a = inputs(Size(2, 2, "s2", (3, 0, 1, 5)), dtype, CPU)
    out = cpu.edge_attention_forward(a, True)
    wide = cpu.edge_attention_forward(cast(a, torch.float32), True)
    assert [t.dtype for t in out] == [dtype] * 4 + [torch.float32]
    assert all(torch.equal(x, y.to(x.dtype)) for x, y in zip(out, wide, strict=True))
    gradients = cpu.edge_attention_backward(torch.ones_like(out[0]), a, *out[1:])
    assert all(
        g.dtype == t.dtype and g.isfinite().all() for g, t in zip(gradients, gradients_of(a), strict=True)
    )


# ------------------------------------------------------------------------------------------ what cannot run


def test_too_high_a_degree_is_an_error():
    with pytest.raises(ValueError, match="lmax 1 to 8, not 9"):
        cpu.edge_attention_forward(inputs(Size(9, 1, "gate", (1,)), torch.float32, CPU), False)


@pytest.mark.parametrize("edge", [(4, 0), (-1, 0), (0, 4)])
def test_an_edge_from_or_to_nowhere_is_an_error(edge):
    a = inputs(Size(2, 1, "gate", (1, 0, 0, 2)), torch.float32, CPU)
    edge_index = torch.stack([a.graph.source, a.graph.target])
    edge_index[:, -1] = torch.tensor(edge)
    order = edge_index[1].argsort(stable=True)
    with pytest.raises(IndexError, match="outside the 4 nodes"):
        cpu.edge_attention_forward(a._replace(graph=edge_graph(edge_index[:, order], 4)), False)
