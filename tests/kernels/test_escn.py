"""The edge path as an op: what torch's own tools, compilers and planners see of it,
and what it keeps in memory."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from catmllm_kernels.backend import implementation
from catmllm_kernels.escn import edge_attention, op, reference, rotate_back_sum
from catmllm_kernels.escn.cases import SIZES, Size, inputs
from catmllm_kernels.escn.layout import EdgeAttention, gradients_of, unpack_wigner
from catmllm_kernels.registry import tensors_of

CPU = torch.device("cpu")
BOTH = [SIZES["L2M2 s2"], SIZES["L3M1 gate"]]


def flat(a: EdgeAttention, save: bool = True) -> tuple[Any, ...]:
    """The arguments of the registered op."""
    return (*op.to_op(a), save)


def with_gradients(a: EdgeAttention) -> EdgeAttention:
    for t in gradients_of(a):
        t.requires_grad_()
    return a


def m_zero(size: Size = BOTH[0]) -> tuple[Any, ...]:
    """Arguments of rotate_back_sum for messages of m = 0 alone."""
    a = inputs(size, torch.float64, CPU)
    generator = torch.Generator().manual_seed(5)
    values = torch.randn(len(a.radial), size.lmax + 1, 6, generator=generator, dtype=torch.float64)
    alpha = torch.rand(len(a.radial), 2, generator=generator, dtype=torch.float64)
    return (
        values.requires_grad_(),
        alpha.requires_grad_(),
        a.wigner,
        a.graph,
        len(a.x),
        size.lmax,
        size.mmax,
    )


@pytest.mark.parametrize("size", BOTH)
def test_opcheck(size: Size) -> None:
    a = with_gradients(inputs(size, torch.float64, CPU))
    torch.library.opcheck(torch.ops.catmllm.edge_attention.default, flat(a))
    with torch.no_grad():
        total, *kept = op._attention(*flat(a))
    arguments = (torch.randn_like(total), kept, *flat(inputs(size, torch.float64, CPU))[:-1])
    torch.library.opcheck(torch.ops.catmllm.edge_attention_backward.default, arguments)


def test_opcheck_of_the_last_step() -> None:
    values, alpha, wigner, graph, *sizes = m_zero()
    arguments = (values, alpha, wigner, list(graph), *sizes)
    torch.library.opcheck(torch.ops.catmllm.rotate_back_sum.default, arguments)


@pytest.mark.parametrize("size", BOTH)
def test_gradcheck(size: Size) -> None:
    small = Size(1, 1, size.act, (2, 0, 1), 2, 2, 1, 2, 2, 2, (4, 5))
    a = with_gradients(inputs(small, torch.float64, CPU))
    leaves = gradients_of(a)

    def function(*_: Tensor) -> Tensor:
        return edge_attention(a)

    assert torch.autograd.gradcheck(function, leaves)


def test_one_step_alone_is_its_dense_definition() -> None:
    """Σ over edges of (scale · D)ᵀ · (alpha · value), by matrices that are dense."""
    values, alpha, wigner, graph, n, lmax, mmax = m_zero()
    out = rotate_back_sum(values, alpha, wigner, graph, n, lmax, mmax)
    dense = unpack_wigner(wigner, lmax, mmax)[:, : lmax + 1]  # lmax = mmax: nothing was cut
    message = dense.transpose(1, 2) @ (values * alpha.repeat_interleave(3, 1)[:, None])
    expected = torch.zeros(n, (lmax + 1) ** 2, 6, dtype=torch.float64).index_add(0, graph.target, message)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    cotangent = torch.randn_like(out)
    for a, b in zip(
        torch.autograd.grad(out, (values, alpha), cotangent),
        torch.autograd.grad(expected, (values, alpha), cotangent),
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_the_last_step_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    from catmllm_kernels.interpret import strict

    values, alpha, *rest = m_zero()
    cotangent = torch.randn(len(rest[1].ptr) - 1, 9, 6, dtype=torch.float64)
    expected = torch.autograd.grad(rotate_back_sum(values, alpha, *rest), (values, alpha), cotangent)
    monkeypatch.setenv("CATMLLM_KERNELS", "triton")
    narrow = [t.detach().float().requires_grad_() for t in (values, alpha)]
    with strict(seed=3):
        out = rotate_back_sum(narrow[0], narrow[1], rest[0].float(), *rest[1:])
        found = torch.autograd.grad(out, narrow, cotangent.float())
    for a, b in zip(found, expected):
        assert (a - b).abs().max() < 2e-6 * b.abs().max()


@pytest.mark.parametrize("size", BOTH)
def test_compile_sees_one_op(size: Size) -> None:
    a = with_gradients(inputs(size, torch.float64, CPU))

    def function(x: Tensor) -> Tensor:
        return edge_attention(a._replace(x=2 * x)).square().sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    gradients = [torch.autograd.grad(f(a.x), gradients_of(a)) for f in (function, compiled)]
    for expected, found in zip(*gradients):
        torch.testing.assert_close(found, expected)


def test_weights_are_laid_out_by_one_launch_each_and_anew_in_every_pass() -> None:
    """So that whatever changed them (an optimizer, FSDP2's gathering, which leaves a tensor's version alone)
    is seen."""
    from catmllm_kernels.escn.triton.product import real_forms
    from catmllm_kernels.launch import recorded

    weights = [torch.randn(7, 5), torch.randn(12, 9), torch.randn(2, 3)]
    for _ in range(2):
        forms = real_forms(weights)
        assert forms[0] is weights[0]
        for form, w in zip(forms[1:], weights[1:], strict=True):
            assert torch.equal(form, reference.real_form(w))
        with torch.autograd._unsafe_preserve_version_counter(tuple(weights)):
            for w in weights:
                w.mul_(-0.5)
    with recorded() as found:
        real_forms(weights)
    assert len(found) == 2


def test_checkpointing_gives_the_same_gradients() -> None:
    a = with_gradients(inputs(BOTH[0], torch.float64, CPU))
    plain = torch.autograd.grad(edge_attention(a).square().sum(), gradients_of(a))
    again: Any = checkpoint(lambda x: edge_attention(a._replace(x=x)), a.x, use_reentrant=False)
    for expected, found in zip(plain, torch.autograd.grad(again.square().sum(), gradients_of(a))):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("saved", [True, False])
def test_selective_checkpointing_keeps_or_repeats_the_op(
    saved: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A policy names the op: what it keeps is not run again in the backward pass, what it does not is."""

    def policy(context: Any, function: Any, *args: Any, **options: Any) -> CheckpointPolicy:
        ours = function is torch.ops.catmllm.edge_attention.default
        return CheckpointPolicy.MUST_SAVE if ours and saved else CheckpointPolicy.PREFER_RECOMPUTE

    a = with_gradients(inputs(BOTH[0], torch.float64, CPU))
    plain = torch.autograd.grad(edge_attention(a).square().sum(), gradients_of(a))
    monkeypatch.setenv("CATMLLM_KERNELS", "reference")
    runs = []
    forward = reference.edge_attention_forward
    monkeypatch.setattr(reference, "edge_attention_forward", lambda *b: (runs.append(1), forward(*b))[1])
    contexts = partial(create_selective_checkpoint_contexts, policy)
    again: Any = checkpoint(
        lambda x: edge_attention(a._replace(x=x)).square(), a.x, use_reentrant=False, context_fn=contexts
    )
    for expected, found in zip(plain, torch.autograd.grad(again.sum(), gradients_of(a))):
        torch.testing.assert_close(found, expected)
    assert len(runs) == (1 if saved else 2)


def test_fake_tensors_have_the_real_shapes() -> None:
    a = inputs(BOTH[1], torch.float16, CPU)
    real = op._attention(*flat(a))
    with FakeTensorMode() as mode:
        fake = torch.utils._pytree.tree_map_only(Tensor, mode.from_tensor, flat(a))
        out = op._attention(*fake)
        grads = op._attention_backward(out[0], list(out[1:]), *fake[:-1])
    for r, f in zip(real, out):
        assert (r.shape, r.dtype) == (f.shape, f.dtype)
    for t, f in zip(gradients_of(a), grads):
        assert (t.shape, t.dtype) == (f.shape, f.dtype)


def test_autocast_casts_what_is_learned() -> None:
    a = with_gradients(inputs(BOTH[0], torch.float32, CPU))
    expected = edge_attention(a)
    with torch.autocast("cpu", torch.bfloat16):
        out = edge_attention(a)
    assert out.dtype == torch.bfloat16
    assert (out - expected).abs().max() < 12 * 2.0**-8 * expected.abs().max()
    gradients = torch.autograd.grad(out.float().sum(), gradients_of(a))
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients)


def test_without_gradients_nothing_is_kept() -> None:
    a = inputs(BOTH[0], torch.float32, CPU)
    out = op._attention(*flat(a, save=False))
    assert [t.numel() for t in out[1:]] == [0, 0, 0, 0]
    torch.testing.assert_close(out[0], op._attention(*flat(a))[0])


def test_keep_is_a_factor_of_the_attention() -> None:
    a = inputs(BOTH[0], torch.float64, CPU)
    assert a.keep is None
    half = torch.full((len(a.radial), 2), 0.5, dtype=torch.float64)
    torch.testing.assert_close(edge_attention(a._replace(keep=half)), edge_attention(a) / 2)


def test_errors_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    a = inputs(BOTH[0], torch.float32, CPU)
    with pytest.raises(TypeError, match="share one dtype"):
        edge_attention(a._replace(x=a.x.double()))
    with pytest.raises(ValueError, match=r"wigner \[9, 35\], not \[4, 9, 4\] and \[9, 34\]"):
        edge_attention(a._replace(wigner=a.wigner[:, 1:]))
    monkeypatch.setenv("CATMLLM_KERNELS", "cuda")
    with pytest.raises(ValueError, match="choose one of triton, cpu, reference"):
        implementation("escn", a.x)
    monkeypatch.setenv("CATMLLM_KERNELS", "triton")
    with pytest.raises(RuntimeError, match="float64 is for the reference"):
        implementation("escn", a.x.double())
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        implementation("escn", a.x)
    monkeypatch.setenv("CATMLLM_KERNELS", "reference")
    assert implementation("escn", a.x) is reference


def saved(module: torch.nn.Module, x: Tensor, geometry: Any, shared: list[Tensor]) -> int:
    """Bytes that autograd keeps of a module's forward pass, without parameters and `shared` tensors."""
    others = {t.untyped_storage().data_ptr() for t in [*module.parameters(), *shared]}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in others:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = module(x, geometry)
    del out
    return sum(kept.values())


def test_a_layer_of_the_31m_model_keeps_8_kib_an_edge() -> None:
    from catmllm.models.equiformer_v2 import EquiformerV2, EquiformerV2Config

    model: Any = EquiformerV2(EquiformerV2Config.preset("31M", num_layers=1)).half()
    sizes = {}
    for degree in (5, 15):  # the difference leaves out what nodes keep
        target = torch.arange(4).repeat_interleave(degree)
        edge_index = torch.stack([torch.randint(0, 4, (4 * degree,)), target])
        geometry = model.geometry(torch.full((4,), 29), edge_index, torch.randn(4 * degree, 3))
        shared = tensors_of([list(vars(geometry).values())])  # what all layers share
        x = torch.randn(4, 25, 128, dtype=torch.float16, requires_grad=True)
        sizes[4 * degree] = saved(model.blocks[0].ga, x, geometry, shared)
    kept = (sizes[60] - sizes[20]) / 40
    print(f"{kept / 1024:.2f} KiB an edge and layer")
    assert kept < 8 * 1024
