"""RMSNorm, rotary embedding and SwiGLU of csrc/rows against their definitions in float64 and transformers'
own modules, in every instruction set; and the log-softmax pass of linear_logprob beside torch's operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from catmllm_kernels import decoder, native
from catmllm_kernels.decoder import reference
from catmllm_kernels.linear_logprob import cpu, linear_logprobs

SETS = ["avx512", "avx2", "portable"]
BOUND = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8}  # of the largest value: bfloat16 is rounded once
EPS = 1e-6


def random(*shape: int, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + 1000 * seed)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def problems(
    tokens: int, heads: int, kv_heads: int, width: int
) -> dict[str, tuple[Any, Any, list[Any], int]]:
    """By name: the op, its definition, the arguments in float64, how many of them have gradients."""
    flat = tokens, heads * width
    turned = [random(tokens, h, width, seed=h) for h in (heads, kv_heads)]
    return {
        "rms_norm": (decoder.rms_norm, reference.rms_norm, [random(*flat), random(flat[1]), EPS], 2),
        "rotate": (
            decoder.rotate,
            reference.rotate,
            [*turned, random(tokens, width, seed=8), random(tokens, width, seed=9)],
            2,
        ),
        "swiglu": (decoder.swiglu, reference.swiglu, [random(*flat, scale=5), random(*flat, seed=1)], 2),
    }


def results(function: Callable[..., Any], arguments: list[Any], count: int, dtype: torch.dtype) -> list[Any]:
    """Outputs and the gradients of the first `count` arguments,
    for output gradients that do not depend on dtype."""
    made = [x.to(dtype) if isinstance(x, torch.Tensor) else x for x in arguments]
    leaves = [x.detach().requires_grad_() for x in made[:count]]
    out = function(*leaves, *made[count:])
    outputs = out if isinstance(out, tuple) else (out,)
    grads = [random(*o.shape, seed=5).to(torch.bfloat16).to(dtype) for o in outputs]
    return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, leaves, grads)]


def close(found: list[Any], expected: list[Any], bound: float) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert (a.double() - b).abs().max() <= bound * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["rms_norm", "rotate", "swiglu"])
def test_it_is_the_definition_in_float64(
    name: str, dtype: torch.dtype, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CATMLLM_ISA", isa)
    for size in ((1, 1, 1, 2), (5, 6, 2, 32), (130, 3, 1, 38)):
        ours, definition, arguments, count = problems(*size)[name]
        rounded = [x.to(dtype).double() if isinstance(x, torch.Tensor) else x for x in arguments]
        found = results(ours, arguments, count, dtype)
        assert all(x.dtype == dtype for x in found)
        close(found, results(definition, rounded, count, torch.float64), BOUND[dtype])


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(1, 200),
    heads=st.integers(1, 5),
    kv_heads=st.integers(1, 3),
    half=st.integers(1, 35),
    name=st.sampled_from(["rms_norm", "rotate", "swiglu"]),
)
def test_any_shape(tokens: int, heads: int, kv_heads: int, half: int, name: str) -> None:
    ours, definition, arguments, count = problems(tokens, heads, kv_heads, 2 * half)[name]
    exact = results(
        definition, [x.float().double() if torch.is_tensor(x) else x for x in arguments], count, torch.float64
    )
    close(results(ours, arguments, count, torch.float32), exact, BOUND[torch.float32])


def test_threads_and_layouts_change_no_bit() -> None:
    threads = torch.get_num_threads()
    try:
        for ours, _, arguments, count in problems(300, 4, 2, 32).values():
            runs = []
            for n in (1, 3):
                torch.set_num_threads(n)
                runs.append(results(ours, arguments, count, torch.float32))
            turned = [x.mT.contiguous().mT if torch.is_tensor(x) and x.ndim > 1 else x for x in arguments]
            runs.append(results(ours, turned, count, torch.float32))
            for other in runs[1:]:
                assert all(torch.equal(a, b) for a, b in zip(runs[0], other))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("path", ["cpu", "triton"])
def test_they_are_transformers_own(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CATMLLM_KERNELS", path)
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen

    x = random(1, 9, 48).float()
    norm = qwen.Qwen2_5_VLRMSNorm(48, 1e-5)
    torch.nn.init.normal_(norm.weight)
    torch.testing.assert_close(decoder.rms_norm(x, norm.weight, 1e-5), norm(x))
    q, k = random(1, 3, 9, 16).float(), random(1, 1, 9, 16).float()
    angle = random(1, 9, 8, scale=10).float().repeat(1, 1, 2)
    expected = qwen.apply_rotary_pos_emb(q, k, angle.cos(), angle.sin())
    gate = random(9, 48).float()
    torch.testing.assert_close(decoder.swiglu(gate, x[0]), torch.nn.functional.silu(gate) * x[0])
    found = decoder.rotate(q[0].transpose(0, 1), k[0].transpose(0, 1), angle[0].cos(), angle[0].sin())
    for a, b in zip(found, expected):
        torch.testing.assert_close(a.transpose(0, 1), b[0])


@pytest.mark.parametrize("isa", SETS)
def test_extreme_values(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CATMLLM_ISA", isa)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.tensor([0.0, -0.0, 1e30, -1e30, 90, -90, torch.inf, torch.nan], dtype=dtype)
        one = torch.ones_like(x).requires_grad_()
        gate = x.clone().requires_grad_()
        found = decoder.swiglu(gate, one)
        torch.testing.assert_close(found[:7], torch.nn.functional.silu(x)[:7])
        assert found[7].isnan()
        found[:6].sum().backward()
        torch.testing.assert_close(gate.grad[:6], torch.tensor([0.5, 0.5, 1, 0, 1, 0], dtype=dtype))
        one = one.detach()
        assert decoder.swiglu(x.new_tensor([-torch.inf]), one[:1]).abs() < 1e-30
        assert decoder.rms_norm(torch.zeros(2, 3, dtype=dtype), one[:3], EPS).eq(0).all()
        assert decoder.rms_norm(x[None, 6:], one[:2], EPS).isnan().all()
        large = torch.full((1, 5), 1e15, dtype=dtype)
        torch.testing.assert_close(decoder.rms_norm(large, one[:5], EPS), torch.ones(1, 5, dtype=dtype))


def test_rounding_to_bfloat16_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    bits = torch.randint(-(2**31), 2**31, (40_000,), generator=torch.Generator().manual_seed(0))
    x = bits.to(torch.int32).view(torch.float32)
    x = x[x.isfinite() & (x.abs() > 1e-37) & (x.abs() < 1e37)]
    # A turn by nothing: in float32 it is the identity, and its rounding is the only one.
    zero, one = torch.zeros(len(x), 2), torch.ones(len(x), 2)
    pair = torch.stack([x, x], 1)[:, None]
    for isa in SETS:
        monkeypatch.setenv("CATMLLM_ISA", isa)
        same, _ = decoder.rotate(pair, pair, one, zero)
        assert torch.equal(same, pair)
        half = pair.bfloat16()
        # x + x·2^-9 lies between two bfloat16 numbers
        between, _ = decoder.rotate(half, half, one.bfloat16(), one.bfloat16() * 2.0**-9)
        exact = half.double() + torch.stack([-half[..., 1], half[..., 0]], -1).double() * 2.0**-9
        assert torch.equal(between, exact.float().bfloat16())


def test_the_torch_library_contract() -> None:
    for (ours, _, arguments, count), name in zip(
        problems(6, 2, 1, 8).values(), ("rms_norm", "rotate", "swiglu")
    ):
        made = [x.float() if torch.is_tensor(x) else x for x in arguments]
        made = [x.requires_grad_() if i < count else x for i, x in enumerate(made)]
        extra = (False,) if name == "rotate" else ()
        torch.library.opcheck(getattr(torch.ops.catmllm, name).default, (*made, *extra))
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            ghosts = [fake.from_tensor(x.detach()) if torch.is_tensor(x) else x for x in made]
            out = ours(*ghosts)
        assert (out[0] if isinstance(out, tuple) else out).shape == arguments[0].shape


def test_what_they_leave_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(2, 4)
    assert decoder.fits(x) and decoder.fits(x.bfloat16())
    assert not decoder.fits(x.half()) and not decoder.fits(x.double()) and not decoder.fits(x, x.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert not decoder.fits(x)
    for forced, taken in (("reference", False), ("triton", True), ("cpu", True)):
        monkeypatch.setenv("CATMLLM_KERNELS", forced)
        assert decoder.fits(x) == taken
        assert decoder.fits(x.half()) == (forced == "triton")
    monkeypatch.setenv("CATMLLM_KERNELS", "none")
    with pytest.raises(ValueError, match="choose one of"):
        decoder.fits(x)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda x: decoder.rms_norm(x, x[0, :3], EPS), r"need x \[\.\.\., H\]"),
        (lambda x: decoder.rms_norm(x.half(), x[0], EPS), "float16 on cpu, torch.float32 on cpu"),
        (lambda x: decoder.swiglu(x, x[:1]), "one shape"),
        (lambda x: decoder.swiglu(x, x.bfloat16()), "of one dtype"),
        (lambda x: decoder.rotate(x[:, None, :3], x[:, None, :3], x[:, :3], x[:, :3]), "D even"),
        (lambda x: decoder.rotate(x[:1, None], x[:, None], x, x), r"key \[T, K, D\]"),
    ],
)
def test_what_does_not_fit_is_said(call: Callable[[torch.Tensor], Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call(torch.ones(5, 4))


@pytest.mark.parametrize("isa", [*SETS, "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("entropy", [True, False])
def test_log_probabilities_and_entropies_with_their_gradients(
    isa: str, dtype: torch.dtype, keep: bool, entropy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each instruction set, and torch's operators, which stand in where the library is missing."""
    monkeypatch.setenv("CATMLLM_ISA", isa)
    if isa == "torch":
        monkeypatch.setattr(cpu, "one_pass", lambda z: False)
    monkeypatch.setattr(cpu, "KEEP", 10**6 if keep else 0)
    monkeypatch.setattr(cpu, "LOGITS", 20 * 203)  # several chunks, the last one ragged
    hidden, weight = random(53, 24).to(dtype), random(203, 24).to(dtype)
    targets = torch.arange(53) * 7 % 203
    targets[5] = -100
    # one token that is certain: its gradient vanishes
    hidden[9] = 3 * weight[targets[9]]
    up, of_entropy = random(53).to(dtype).double(), random(53, seed=1).to(dtype).double()

    def value(lp: torch.Tensor, spread: torch.Tensor | None) -> torch.Tensor:
        total = (lp * up.to(lp.dtype)).sum()
        return total if spread is None else total + (spread * of_entropy.to(lp.dtype)).sum()

    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    found = linear_logprobs(h, w, targets, 0.7, entropy=entropy)
    value(found.logprob, found.entropy).backward()
    a, b = hidden.double().requires_grad_(), weight.double().requires_grad_()
    exact = torch.log_softmax(a @ b.t() / 0.7, 1)
    asked = targets >= 0
    own = exact.gather(1, targets.clamp_min(0)[:, None])[:, 0].where(asked, 0.0)
    spread = -(exact.exp() * exact).sum(1).where(asked, 0.0) if entropy else None
    value(own, spread).backward()
    bound = 1e-5 if dtype == torch.float32 else 0.04
    pairs = [(found.logprob, own), (h.grad, a.grad), (w.grad, b.grad)]
    for x, y in pairs + ([(found.entropy, spread)] if entropy else []):
        assert x is not None and y is not None
        assert (x.double() - y).abs().max() <= bound * y.detach().abs().max()


def test_a_missing_library_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from catmllm_kernels import backend

    monkeypatch.setattr(native, "library", lambda name: f"_{name} was not built")
    backend.warn_once.cache_clear()
    with pytest.warns(UserWarning, match="_rows was not built"):
        assert not decoder.fits(torch.ones(2))
    backend.warn_once.cache_clear()
