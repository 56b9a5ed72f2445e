"""Log-probabilities of target tokens against log_softmax in float64: values, gradients, chunks,
the Triton kernels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from catmllm_kernels.linear_logprob import IGNORED, cpu, linear_logprob, linear_logprobs
from catmllm_kernels.linear_logprob.reference import linear_logprob as definition
from catmllm_kernels.rounding import error_bounds

ROOT = Path(__file__).parents[2]


def problem(
    tokens: int, width: int = 16, vocabulary: int = 37, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    return hidden.to(dtype), weight.to(dtype), targets


def oracle(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, temperature: float, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values and gradients of the weighted sum in float64, by torch's own log_softmax."""
    h, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    value = torch.log_softmax(h @ w.T / temperature, -1)[torch.arange(len(targets)), targets]
    (value * scale.double()).sum().backward()
    assert h.grad is not None and w.grad is not None
    return value.detach(), h.grad, w.grad


def bounds(
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    temperature: float,
    slope: torch.Tensor | float = 1.0,
    of_entropy: float = 0.0,
) -> list[float]:
    """What float32 may be off by, relative to the largest element: of log-probability, entropy and the
    gradients to hidden and weight of sum(slope · logprob + of_entropy · entropy). Written in single steps, as
    an implementation takes them, for each of them rounds: 1 - exp(z - lse) cancels where a word is sure, and
    the z that is made again for the gradients, a chunk at a time, is rounded otherwise than lse's was."""
    hidden, weight = inputs[0].detach().double(), inputs[1].detach().double()
    kept = inputs[2] != IGNORED
    at = torch.arange(len(hidden)), inputs[2].where(kept, 0)
    target = torch.zeros(len(hidden), len(weight), dtype=torch.float64).index_put_(
        at, torch.tensor(1.0).double()
    )
    own = kept.double() * slope

    def by_steps() -> list[torch.Tensor]:
        z = hidden @ weight.T / temperature
        top = z.amax(-1, keepdim=True)
        lse = top + (z - top).exp().sum(-1, keepdim=True).log()
        logprob = z - lse
        p = logprob.exp()
        entropy = -(p * logprob).sum(-1)
        again = hidden @ weight.T / temperature - lse
        p = again.exp()
        d = own[:, None] * (target - p) / temperature
        if of_entropy:
            d = d - of_entropy * kept[:, None] * p * (again + entropy[:, None]) / temperature
        return [(logprob * target).sum(-1) * kept, entropy * kept, d @ weight, d.T @ hidden]

    return error_bounds(by_steps, 2.0**-24)


def exact(
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    temperature: float,
    of_entropy: float,
    slope: float = 1.0,
) -> list[torch.Tensor]:
    """What `bounds` is of, by autograd through the definition in float64."""
    h, w = (x.detach().double().requires_grad_() for x in inputs[:2])
    value, entropy = definition(h, w, inputs[2], temperature)
    (slope * value + of_entropy * entropy).sum().backward()
    assert h.grad is not None and w.grad is not None
    return [value.detach(), entropy.detach(), h.grad, w.grad]


def within(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], allowed: Sequence[float]) -> bool:
    return all(
        float((a.detach().double() - b).abs().max()) <= bound * float(b.abs().max().clamp_min(1e-300))
        for a, b, bound in zip(found, expected, allowed, strict=True)
    )


@given(
    tokens=st.integers(1, 40),
    width=st.integers(1, 33),
    vocabulary=st.integers(2, 70),
    chunk=st.integers(1, 50),
    temperature=st.sampled_from([0.3, 0.7, 1.0, 2.0]),
    seed=st.integers(0, 1000),
)
@example(tokens=13, width=31, vocabulary=58, chunk=2, temperature=0.7, seed=0)  # every word is sure
def test_values_and_gradients_against_float64(
    tokens: int, width: int, vocabulary: int, chunk: int, temperature: float, seed: int
) -> None:
    hidden, weight, targets = problem(tokens, width, vocabulary, seed)
    scale = torch.randn(tokens, generator=torch.Generator().manual_seed(seed))
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "LOGITS", chunk * vocabulary)
        patch.setattr(cpu, "KEEP", (seed % 2) * 10**6)
        ours = linear_logprob(h, w, targets, temperature)
        (ours * scale).sum().backward()
    assert ours.shape == (tokens,) and ours.dtype == torch.float32
    assert h.grad is not None and w.grad is not None
    value, _, *gradients = bounds((hidden, weight, targets), temperature, scale.double())
    expected = oracle(hidden, weight, targets, temperature, scale)
    assert within([ours, h.grad, w.grad], expected, [value, *gradients])


FAULTS = {
    "a product of each sum": lambda h, w: torch.nn.functional.linear(h[:, 1:], w[:, 1:]),
    "the last word": lambda h, w: torch.nn.functional.linear(h, w).index_fill(1, torch.tensor(36), -1e4),
    "logits in half precision": lambda h, w: torch.nn.functional.linear(h, w).half().float(),
    "every other word by 32 units in the last place": lambda h, w: torch.nn.functional.linear(
        h, w * (1 + 2.0**-18 * (torch.arange(37)[:, None] % 2))
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_kernel_is_outside_the_bounds(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = problem(20)
    expected, allowed = exact(inputs, 0.7, 0.0)[0], bounds(inputs, 0.7)[0]
    assert within([linear_logprob(*inputs, 0.7)], [expected], [allowed])
    monkeypatch.setattr(cpu, "product", FAULTS[fault])
    assert not within([linear_logprob(*inputs, 0.7)], [expected], [allowed])


def test_chunks_change_nothing_beyond_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets = problem(23)
    expected, allowed = (
        exact((hidden, weight, targets), 0.7, 1.0, 2.0),
        bounds((hidden, weight, targets), 0.7, 2.0, 1.0),
    )
    monkeypatch.setattr(cpu, "KEEP", 0)
    for logits in (cpu.LOGITS, 23 * 37, 22 * 37 + 5, 8 * 37, 100, 1):
        monkeypatch.setattr(cpu, "LOGITS", logits)
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        out = linear_logprobs(h, w, targets, 0.7, entropy=True)
        assert out.entropy is not None
        (2 * out.logprob + out.entropy).sum().backward()
        assert h.grad is not None and w.grad is not None
        assert within([out.logprob, out.entropy, h.grad, w.grad], expected, allowed)


def test_kept_or_made_again_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets = problem(20)
    targets[5] = IGNORED
    expected, allowed = (
        exact((hidden, weight, targets), 0.7, 1.0, 2.0),
        bounds((hidden, weight, targets), 0.7, 2.0, 1.0),
    )
    for keep in (0, 10**6):
        monkeypatch.setattr(cpu, "KEEP", keep)
        for logits in (cpu.LOGITS, 100):
            monkeypatch.setattr(cpu, "LOGITS", logits)
            h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
            out = linear_logprobs(h, w, targets, 0.7, entropy=True, reference=weight)
            assert out.entropy is not None
            (2 * out.logprob + out.entropy).sum().backward(retain_graph=True)
            first = h.grad.clone()  # type: ignore[union-attr]
            h.grad = None
            (2 * out.logprob + out.entropy).sum().backward()  # what was kept is still there
            assert h.grad is not None and torch.equal(h.grad, first) and w.grad is not None
            assert within([out.logprob, out.entropy, h.grad, w.grad / 2], expected, allowed)


def test_float64_stays_float64() -> None:
    hidden, weight, targets = problem(5, dtype=torch.float64)
    value, _, _ = oracle(hidden, weight, targets, 1.3, torch.ones(5))
    ours = linear_logprob(hidden, weight, targets, 1.3)
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, value, rtol=1e-12, atol=1e-12)
    inputs = (hidden.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(
        lambda h, w: linear_logprobs(h, w, targets, 1.3, entropy=True)[:2], inputs
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 8e-2), (torch.float16, 1e-2)])
def test_half_precision_has_a_float32_softmax(dtype: torch.dtype, tolerance: float) -> None:
    hidden, weight, targets = problem(20, dtype=dtype)
    ours = linear_logprob(hidden, weight, targets)
    assert ours.dtype == torch.float32
    value, _, _ = oracle(hidden, weight, targets, 1.0, torch.ones(20))
    torch.testing.assert_close(ours.double(), value, rtol=tolerance, atol=tolerance)
    # all else equal the probabilities of one row add up to one, to float32 and not to half precision
    row = hidden[:1].expand(weight.shape[0], -1)
    logprob = linear_logprob(row, weight, torch.arange(weight.shape[0])).double()
    # A logit, their logsumexp and the difference are each rounded at the size of the largest at most.
    assert abs(float(logprob.exp().sum()) - 1) < 3 * 2.0**-24 * float(logprob.abs().max() + 37)


def test_large_logits_do_not_overflow() -> None:
    hidden, weight, targets = problem(8)
    ours = linear_logprob(hidden * 1e4, weight, targets)
    assert ours.isfinite().all() and (ours <= 0).all()


def test_no_token_is_no_value() -> None:
    hidden, weight, targets = problem(0)
    assert linear_logprob(hidden, weight, targets).shape == (0,)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    linear_logprob(hidden, weight, targets).sum().backward()
    assert hidden.grad is not None and hidden.grad.shape == hidden.shape
    assert weight.grad is not None and not weight.grad.any()


def test_an_ignored_target_is_zero_and_has_no_gradient() -> None:
    hidden, weight, targets = problem(9)
    targets[[0, 4, 8]] = IGNORED
    asked = targets != IGNORED
    rest = hidden[asked], weight, targets[asked]
    value, entropy, of_hidden, of_weight = exact(rest, 1.0, 1.0)
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    found = linear_logprobs(h, w, targets, entropy=True, reference=weight)
    assert found.entropy is not None and found.reference is not None
    (found.logprob + found.entropy).sum().backward()
    assert h.grad is not None and w.grad is not None
    by_token = [found.logprob, found.entropy, h.grad, found.reference]
    for x in by_token:
        assert (x[~asked] == 0).all()
    allowed = bounds(rest, 1.0, 1.0, 1.0)
    assert within(
        [*(x[asked] for x in by_token), w.grad],
        [value, entropy, of_hidden, value, of_weight],
        [*allowed[:3], allowed[0], allowed[3]],
    )


def test_entropy_and_reference_against_the_definition() -> None:
    hidden, weight, targets = problem(12)
    other = torch.randn(weight.shape, generator=torch.Generator().manual_seed(5)).requires_grad_()
    out = linear_logprobs(hidden, weight, targets, 0.6, entropy=True, reference=other)
    value, entropy = definition(hidden.double(), weight.double(), targets, 0.6)
    of_reference, _ = definition(hidden.double(), other.detach().double(), targets, 0.6)
    assert out.entropy is not None and out.reference is not None and not out.reference.requires_grad
    allowed = [*bounds((hidden, weight, targets), 0.6)[:2], bounds((hidden, other, targets), 0.6)[0]]
    assert within([out.logprob, out.entropy, out.reference], [value, entropy, of_reference], allowed)
    uniform = linear_logprobs(hidden * 0, weight, targets, entropy=True).entropy
    assert uniform is not None
    torch.testing.assert_close(uniform, torch.full((12,), 37.0).log())


def test_equal_to_torchs_own_cross_entropy() -> None:
    hidden, weight, targets = problem(30)
    targets[3] = IGNORED
    h, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    theirs = -torch.nn.functional.cross_entropy(torch.nn.functional.linear(h, w), targets, reduction="sum")
    theirs.backward()
    a, b = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    ours = linear_logprob(a, b, targets).sum()
    ours.backward()
    assert h.grad is not None and w.grad is not None and a.grad is not None and b.grad is not None
    value, _, *gradients = bounds((hidden, weight, targets), 1.0)
    assert within([ours, a.grad, b.grad], [theirs.detach(), h.grad, w.grad], [value, *gradients])


def test_the_torch_library_contract() -> None:
    """Schema, fake outputs, autograd registration, and the same under torch.compile's tracing."""
    hidden, weight, targets = problem(6)
    targets[1] = IGNORED
    for reference, entropy in ((None, False), (weight.clone(), True)):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        torch.library.opcheck(
            torch.ops.catmllm.linear_logprob.default, (h, w, targets, 0.7, entropy, reference, entropy)
        )
    lse = torch.randn(6)
    grad = torch.randn(6)
    for of_entropy in (None, grad):
        torch.library.opcheck(
            torch.ops.catmllm.linear_logprob_backward.default,
            (grad, of_entropy, hidden, weight, targets, lse, lse, 0.7, True, of_entropy is None, None),
        )


def test_compiled_it_is_one_node_of_one_graph() -> None:
    hidden, weight, targets = problem(6)
    compiled = torch.compile(linear_logprob, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(hidden, weight, targets, 0.7), linear_logprob(hidden, weight, targets, 0.7)
    )


def test_autocast_casts_as_a_linear_layer_does() -> None:
    hidden, weight, targets = problem(6)
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        ours = linear_logprob(h, w, targets)
    assert torch.equal(ours, linear_logprob(hidden.bfloat16(), weight.bfloat16(), targets))
    ours.sum().backward()
    assert h.grad is not None and h.grad.dtype == torch.float32


def test_flops_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    hidden, weight, targets = problem(10)
    product = 2 * 10 * 16 * 37
    with FlopCounterMode(display=False) as counter:
        linear_logprob(hidden.requires_grad_(), weight.requires_grad_(), targets).sum().backward()
    assert counter.get_total_flops() == 3 * product  # once forward, a gradient each; so few logits are kept
    monkeypatch.setattr(cpu, "KEEP", 0)
    with FlopCounterMode(display=False) as counter:
        linear_logprob(hidden, weight, targets).sum().backward()
    assert counter.get_total_flops() == 4 * product  # the logits once more
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        linear_logprobs(hidden, weight, targets, reference=weight)
    assert counter.get_total_flops() == 2 * product


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hidden": torch.zeros(3, 5)}, r"hidden \[T, H\] and weight \[V, H\]"),
        ({"targets": torch.zeros(4, dtype=torch.int64)}, "one target for each of the 3"),
        ({"targets": torch.tensor([0, 37, 1])}, "target 37 is outside the vocabulary of 37"),
        ({"targets": torch.tensor([0, -1, 1])}, "target -1 is outside"),
        ({"weight": torch.zeros(37, 16, dtype=torch.bfloat16)}, "cast one"),
        ({"reference": torch.zeros(36, 16)}, "reference head"),
    ],
)
def test_what_does_not_fit_is_said(change: dict[str, Any], says: str) -> None:
    hidden, weight, targets = problem(3)
    with pytest.raises(ValueError, match=says):
        linear_logprobs(**({"hidden": hidden, "weight": weight, "targets": targets} | change))


def test_never_more_logits_at_a_time_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor made on the way, forward and backward: a chunk, or the size of an input."""
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes: list[int] = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            sizes.extend(
                t.numel() for t in (out if isinstance(out, tuple | list) else [out]) if torch.is_tensor(t)
            )
            return out

    monkeypatch.setattr(cpu, "LOGITS", 8 * 512)
    monkeypatch.setattr(cpu, "KEEP", 8 * 512)
    hidden, weight, targets = problem(64, width=8, vocabulary=512)
    h, w = hidden.requires_grad_(), weight.requires_grad_()
    with Sizes():
        linear_logprob(h, w, targets).sum().backward()
    assert max(sizes) == 8 * 512


def run_alone(script: str, **environment: str) -> Any:
    """The JSON that a script of this folder prints, from a process of its own:
    Triton reads its switches on import."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "kernels" / script)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"} | environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_triton_kernels_equal_float64_in_the_interpreter() -> None:
    """Odd shapes, memory poisoned with NaN, programs in shuffled order; the errors over what rounding allows:
    in float32 by the condition of its sums, in half precision four roundings of what is stored."""
    cases = run_alone("linear_logprob_interpreted.py", TRITON_INTERPRET="1", CATMLLM_KERNELS="triton")
    assert len(cases) >= 12
    for case in cases:
        assert case["error"] < 1, case
        assert case["same_bits_in_any_order"], case
