"""Attention over samples end to end: the dense definition in float64, torch's own SDPA sample by sample,
magnitudes that overflow float16, and what compile, planning and FLOP counting see of the op."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from catmllm_kernels import backend, native
from catmllm_kernels.rounding import error_bounds
from catmllm_kernels.varlen_attention import continued, cpu, op, reference, varlen_attention

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
LENGTHS = [1, 63, 64, 65, 7, 0, 200]


def problem(
    lengths: list[int], heads: int = 6, kv_heads: int = 2, width: int = 16, device: str = "cpu"
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Query, key, value and the result's gradient, float64, and the bounds."""
    generator = torch.Generator().manual_seed(sum(lengths))
    tensors = [
        torch.randn(sum(lengths), h, width, generator=generator, dtype=torch.float64).to(device)
        for h in (heads, kv_heads, kv_heads, heads)
    ]
    bounds = torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)
    return tensors, bounds


def results(
    run: object, tensors: list[torch.Tensor], dtype: torch.dtype, *arguments: object
) -> list[torch.Tensor]:
    """Output and the gradients of query, key and value."""
    q, k, v = (x.to(dtype).detach().requires_grad_() for x in tensors[:3])
    out = run(q, k, v, *arguments)  # type: ignore[operator]
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), tensors[3].to(dtype))]


# Half the gap above one.
ROUNDING = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
}


@functools.cache
def condition(width: int, owner: tuple[int, ...] | None) -> list[float]:
    """What each of the `results` on LENGTHS may be off by, relative to its largest element, for each unit of
    rounding: by the terms of every sum and product. Softmax in single steps, for each of them rounds. The
    gradients of keys and values are sums over queries, added up one by one: n terms round n times at the size
    of the sum, which by chance are √n units (Higham and Mary 2019)."""
    tensors, bounds = problem(LENGTHS, width=width)
    lengths = bounds.diff().long()
    sample = torch.arange(len(lengths)).repeat_interleave(lengths)
    owners = torch.full((len(lengths),), -1) if owner is None else torch.tensor(owner)
    other = (sample[:, None] != sample) & (owners[sample][:, None] != sample)
    hidden = other | torch.ones(len(sample), len(sample)).triu(1).bool()

    def by_steps(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        keys, values = (x.repeat_interleave(3, 1).transpose(0, 1) for x in (k, v))
        scores = q.transpose(0, 1) @ keys.mT * 0.25
        top = scores.detach().masked_fill(hidden, -torch.inf).amax(-1, keepdim=True)
        weights = (scores - top).exp().masked_fill(hidden, 0)
        return (weights / weights.sum(-1, keepdim=True) @ values).transpose(0, 1)

    unit = 2.0**-24  # small enough for the errors to add up
    found = error_bounds(lambda: results(by_steps, tensors, torch.float64), unit, runs=2)
    one_by_one = (3 * int((~hidden).sum(0).max())) ** 0.5  # three query heads a key head
    return [bound / unit + more for bound, more in zip(found, (0, 0, one_by_one, one_by_one), strict=True)]


def rounding(dtype: torch.dtype, width: int, owner: tuple[int, ...] | None = None) -> list[float]:
    """What each of the `results` on LENGTHS may be off by, relative to its largest element. Half precision
    has float32 sums and rounds what it stores: a result, and before it scores and weights or their
    gradients."""
    if dtype.itemsize == 2:
        return [3 * ROUNDING[dtype]] * 4
    return [ROUNDING[dtype] * c for c in condition(width, owner)]


def within(ours: list[torch.Tensor], expected: list[torch.Tensor], allowed: list[float]) -> bool:
    return all(
        float((a.double() - b).abs().max()) <= bound * float(b.abs().max())
        for a, b, bound in zip(ours, expected, allowed, strict=True)
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_it_is_the_definition_in_float64(device: str, dtype: torch.dtype) -> None:
    tensors, bounds = problem(LENGTHS, device=device)
    rounded = [x.to(dtype) for x in tensors]
    ours = results(varlen_attention, rounded, dtype, bounds, 200)
    expected = results(reference.varlen_attention, rounded, torch.float64, bounds, 0.25)
    assert all(x.dtype == dtype for x in ours)
    assert within(ours, expected, rounding(dtype, 16))


def of_token(x: torch.Tensor, token: int, factor: float) -> torch.Tensor:
    return x * (1 + (factor - 1) * (torch.arange(len(x)) == token)[:, None, None])


# What a kernel could do wrong, as a change of what it reads: (query, key, value, bounds) -> the same.
FAULTS = {
    "a value that is not added": lambda q, k, v, b: (q, k, of_token(v, 250, 0), b),
    "a value by 32 units in the last place": lambda q, k, v, b: (q, k, of_token(v, 1, 1 + 2.0**-18), b),
    "a score without its last product": lambda q, k, v, b: (q * (torch.arange(16) < 15), k, v, b),
    "scores in half precision": lambda q, k, v, b: (q.half().float(), k, v, b),
    "a token of the sample before": lambda q, k, v, b: (q, k, v, b - (b == 200).int()),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_kernel_is_outside_the_bounds(fault: str) -> None:
    tensors, bounds = problem(LENGTHS)
    q, k, v = (x.float() for x in tensors[:3])
    expected = [reference.varlen_attention(q.double(), k.double(), v.double(), bounds, 0.25)]
    allowed = rounding(torch.float32, 16)[:1]
    assert within([varlen_attention(q, k, v, bounds, 200)], expected, allowed)
    *wrong, other = FAULTS[fault](q, k, v, bounds)
    assert not within([varlen_attention(*wrong, other, 201)], expected, allowed)


def test_it_is_sdpa_of_each_sample() -> None:
    (q, k, v, _), bounds = problem(LENGTHS)

    def heads_first(x: torch.Tensor, a: int, b: int) -> torch.Tensor:
        return x[a:b].transpose(0, 1)[None]

    pairs = zip(bounds.tolist(), bounds.tolist()[1:])
    parts = [
        torch.nn.functional.scaled_dot_product_attention(
            heads_first(q, a, b), heads_first(k, a, b), heads_first(v, a, b), is_causal=True, enable_gqa=True
        )[0].transpose(0, 1)
        for a, b in pairs
        if b > a
    ]
    torch.testing.assert_close(varlen_attention(q, k, v, bounds, 200), torch.cat(parts))


@settings(max_examples=25)
@given(
    lengths=st.lists(st.integers(1, 140), min_size=1, max_size=6),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    width=st.sampled_from([1, 4, 24]),
)
def test_any_lengths_and_heads(lengths: list[int], kv_heads: int, group: int, width: int) -> None:
    tensors, bounds = problem(lengths, kv_heads * group, kv_heads, width)
    ours = results(varlen_attention, tensors, torch.float64, bounds, max(lengths), 0.7)
    expected = results(reference.varlen_attention, tensors, torch.float64, bounds, 0.7)
    for a, b in zip(ours, expected):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_another_samples_tokens_change_nothing() -> None:
    """Nor do NaN and infinities there: they stay in their sample."""
    (q, k, v, _), bounds = problem([50, 70, 90])
    clean = varlen_attention(q, k, v, bounds, 90)
    for x in (q, k, v):
        x[50:120] = torch.nan
    spoilt = varlen_attention(q, k, v, bounds, 90)
    assert torch.equal(spoilt[:50], clean[:50]) and torch.equal(spoilt[120:], clean[120:])
    assert spoilt[50:120].isnan().all()


def test_scores_beyond_float16_stay_finite() -> None:
    """Qwen2.5's key biases are in the hundreds: q.k passes 65504 before the scale is applied."""
    tensors, bounds = problem([70, 30], width=64)
    tensors[0] *= 40
    tensors[1] *= 40
    tensors[1] += 150
    assert (tensors[0] @ tensors[1].repeat_interleave(3, 1).transpose(1, 2)).abs().max() > 65504
    ours = results(varlen_attention, tensors, torch.float16, bounds, 70)
    assert all(x.isfinite().all() for x in ours)
    halves = [x.half().double() for x in tensors]
    expected = results(reference.varlen_attention, halves, torch.float64, bounds, 64**-0.5)
    assert (ours[0].double() - expected[0]).abs().mean() < 0.05  # scores in the thousands: half a unit each


# Of LENGTHS: a prompt with two answers, one alone, one with an empty answer, one alone.
OWNERS = [-1, 0, 0, -1, -1, 4, -1]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("path", ["cpu", "reference"])
@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_a_sample_that_continues_another_sees_it(
    device: str, path: str, isa: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Output and gradients, those that a prompt gets from its answers included,
    are the dense definition's."""
    if path == "reference" or dtype != torch.float64:
        monkeypatch.setenv("CATMLLM_KERNELS", path)
    monkeypatch.setenv("CATMLLM_ISA", isa)
    tensors, bounds = problem(LENGTHS, width=20, device=device)
    rounded = [x.to(dtype) for x in tensors]
    owner = torch.tensor(OWNERS, device=device)
    prefix = continued(bounds, owner)
    ours = results(varlen_attention, rounded, dtype, bounds, 200, 0.25, prefix)
    expected = results(reference.varlen_attention, rounded, torch.float64, bounds, 0.25, owner)
    assert within(ours, expected, rounding(dtype, 20, tuple(OWNERS)))


def test_what_each_sample_sees_laid_end_to_end_is_the_same() -> None:
    """The way of CUDA's FlashAttention: keys repeated behind each owner, the last query at the last key."""
    (q, k, v, _), bounds = problem(LENGTHS)
    prefix = continued(bounds, torch.tensor(OWNERS))
    expected = reference.varlen_attention(q, k, v, bounds, 0.25, prefix.owner)
    seen = prefix.cu_seqlens_k.tolist()
    for i, (a, b) in enumerate(zip(bounds.tolist(), bounds.tolist()[1:])):
        at = prefix.key_at[seen[i] : seen[i + 1]]
        mask = torch.ones(b - a, len(at)).tril(len(at) - (b - a)).bool()
        keys, values = (x[at].repeat_interleave(3, 1).transpose(0, 1) for x in (k, v))
        out = torch.nn.functional.scaled_dot_product_attention(
            q[a:b].transpose(0, 1), keys, values, mask, scale=0.25
        )
        torch.testing.assert_close(out.transpose(0, 1), expected[a:b])
    assert prefix.max_length_k == 200 and seen[-1] == len(prefix.key_at)


def test_threads_and_neighbours_change_no_bit() -> None:
    tensors, bounds = problem(LENGTHS)
    prefix = continued(bounds, torch.tensor(OWNERS))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = results(varlen_attention, tensors, torch.float32, bounds, 200, None, prefix)
        torch.set_num_threads(3)
        together = results(varlen_attention, tensors, torch.float32, bounds, 200, None, prefix)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(alone, together))
    last = [x[-200:] for x in tensors]
    own = results(varlen_attention, last, torch.float32, torch.tensor([0, 200], dtype=torch.int32), 200)
    assert all(torch.equal(a[-200:], b) for a, b in zip(alone, own))


def test_the_library_is_there_and_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it every result is right and training is a fifth slower: nobody would see."""
    assert cpu.unfit(torch.zeros(1)) == ""
    assert torch.float64 not in cpu.DTYPES
    calls = []
    plain = cpu.forward
    monkeypatch.setattr(cpu, "forward", lambda *a: calls.append(1) or plain(*a))
    (q, k, v, _), bounds = problem([5])
    varlen_attention(q.float(), k.float(), v.float(), bounds, 5)
    assert calls


def test_a_missing_library_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda name: f"_{name} was not built")
    backend.warn_once.cache_clear()
    (q, k, v, _), bounds = problem([5, 3])
    with pytest.warns(
        UserWarning, match=r"varlen_attention runs by its plain definition.*was not built"
    ) as said:
        for _ in range(2):
            found = varlen_attention(q.float(), k.float(), v.float(), bounds, 5)
    assert len(said) == 1
    allowed = error_bounds(lambda: [reference.varlen_attention(q, k, v, bounds, 0.25)], 2.0**-24)
    assert within([found], [varlen_attention(q, k, v, bounds, 5)], allowed)


@pytest.mark.parametrize("owner", [[-1, -1, 0], [-1, 1, -1], [1, -1, -1], [-1, 0, 1]])
def test_a_prefix_in_the_wrong_place_is_an_error(owner: list[int]) -> None:
    (q, k, v, _), bounds = problem([2, 3, 4])
    with pytest.raises(ValueError, match=r"sample \d continues \d: it must follow it directly"):
        varlen_attention(q, k, v, bounds, 4, None, continued(bounds, torch.tensor(owner)))


@pytest.mark.parametrize("bounds", [[0, 3], [1, 5], [0, 4, 3, 5], []])
def test_wrong_bounds_are_an_error(bounds: list[int]) -> None:
    (q, k, v, _), _ = problem([5])
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to 5"):
        varlen_attention(q, k, v, torch.tensor(bounds, dtype=torch.int32), 5)
    with pytest.raises(ValueError, match="K dividing H"):
        varlen_attention(q, k[:, :1].expand(-1, 4, -1), v[:, :1].expand(-1, 4, -1), torch.tensor([0, 5]), 5)


def test_what_torch_needs_of_an_op() -> None:
    (q, k, v, _), bounds = problem([5, 9])
    arguments = (q.float().requires_grad_(), k.float().requires_grad_(), v.float(), bounds, 9, 0.25)
    torch.library.opcheck(torch.ops.catmllm.varlen_attention.default, (*arguments, None))
    torch.library.opcheck(torch.ops.catmllm.varlen_attention.default, (*arguments, torch.tensor([-1, 0])))


def test_a_compiled_caller_agrees_and_is_one_graph() -> None:
    torch.compiler.reset()
    tensors, _ = problem([30, 40])
    compiled = torch.compile(lambda *a: varlen_attention(*a) * 2, backend="aot_eager", fullgraph=True)
    for lengths in ([30, 40], [20, 50], [10, 25, 35]):
        bounds = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
        ours = results(compiled, tensors, torch.float64, bounds, max(lengths))
        expected = results(varlen_attention, tensors, torch.float64, bounds, max(lengths))
        for a, b in zip(ours, expected):
            torch.testing.assert_close(a, 2 * b)


def test_flops_are_those_that_torch_counts_for_its_own_attention() -> None:
    (q, k, v, _), bounds = problem([48, 16], kv_heads=6)
    with FlopCounterMode(display=False) as ours:
        varlen_attention(q, k, v, bounds, 48)
    with FlopCounterMode(display=False) as theirs, sdpa_kernel(SDPBackend.MATH):
        for part in ((x.split([48, 16])[i].transpose(0, 1)[None] for x in (q, k, v)) for i in range(2)):
            torch.nn.functional.scaled_dot_product_attention(*part, is_causal=True)
    assert ours.get_total_flops() == theirs.get_total_flops() > 0
    with FakeTensorMode() as fake, FlopCounterMode(display=False) as planned:
        varlen_attention(*(fake.from_tensor(x) for x in (q, k, v, bounds)), 48)  # type: ignore[arg-type]
    assert planned.get_total_flops() == 4 * 2 * 48**2 * 6 * 16  # every sample as the longest


@pytest.mark.parametrize("keyword", [True, False])
def test_torchs_attention_is_called_as_its_release_wants(
    keyword: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch 2.11 has no `enable_gqa`, later releases refuse grouped heads without it."""
    from torch.nn.attention import varlen

    given: dict[str, object] = {}

    def before(  # type: ignore[no-untyped-def]
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)
    ):
        given.update(scale=scale, window_size=window_size)
        return query

    def since(query, *rest, enable_gqa=False, **options):  # type: ignore[no-untyped-def]
        given.update(options, enable_gqa=enable_gqa)
        return query

    monkeypatch.setattr(varlen, "varlen_attn", since if keyword else before)
    monkeypatch.setattr(op, "flash", lambda query: True)
    (q, k, v, _), bounds = problem([5, 9])
    assert varlen_attention(q, k, v, bounds, 9) is q
    assert given == {"scale": 0.25, "window_size": (-1, 0)} | ({"enable_gqa": True} if keyword else {})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch's FlashAttention needs a CUDA device")
def test_cuda_half_precision_is_torchs_flash_attention() -> None:
    (q, k, v, _), bounds = problem([48, 16], width=32, device="cuda")
    with torch.profiler.profile() as profile:
        varlen_attention(q.half(), k.half(), v.half(), bounds, 48)
    assert any("flash" in e.key for e in profile.key_averages())
