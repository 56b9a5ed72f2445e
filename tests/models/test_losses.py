"""MMTG against the theorems of the paper's Appendix A.4,
InfoNCE against a plain loop and across processes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from catmllm.data.prompts import Sample
from catmllm.models.losses import info_nce, mmtg_loss
from catmllm.stages.align import text_keys
from catmllm.structure.system import System
from catmllm.structure.text import three_part_text
from tests.ranks import two_ranks

losses = st.floats(0, 50, allow_subnormal=False)
lambdas = st.floats(0.01, 1.0)


def mmtg(a: float, b: float, lam: float, sign: str = "+") -> float:
    pair = [torch.tensor(v, dtype=torch.float64) for v in (a, b)]
    return float(mmtg_loss(pair[0], pair[1], lam, sign))


def gradient(a: float, b: float, lam: float, sign: str = "+") -> tuple[float, float]:
    pair = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (a, b)]
    mmtg_loss(pair[0], pair[1], lam, sign).backward()
    assert pair[0].grad is not None and pair[1].grad is not None
    return float(pair[0].grad), float(pair[1].grad)


@given(a=losses, b=losses, lam=lambdas)
def test_mmtg_is_the_formula_and_symmetric(a: float, b: float, lam: float) -> None:
    for sign, s in (("+", 1), ("-", -1)):
        expected = max(a, b) * (2 + s * lam * math.tanh(min(a, b)))
        assert mmtg(a, b, lam, sign) == pytest.approx(expected, rel=1e-12)
        assert mmtg(a, b, lam, sign) == mmtg(b, a, lam, sign)
    assert mmtg(a, b, lam, "sum") == a + b


@given(a=losses, b=losses, more=st.floats(0, 10), lam=lambdas)
def test_plus_is_monotone_in_both(a: float, b: float, more: float, lam: float) -> None:
    here = mmtg(a, b, lam)
    assert mmtg(a + more, b, lam) >= here * (1 - 1e-12)
    assert mmtg(a, b + more, lam) >= here * (1 - 1e-12)


@given(a=losses, lam=lambdas, step=st.floats(1e-12, 1e-6))
def test_plus_is_continuous_where_the_losses_meet(a: float, lam: float, step: float) -> None:
    here = mmtg(a, a, lam)
    for b in (a + step, max(0.0, a - step)):
        bound = (3 + a) * step * 1.01 + 1e-12  # steepest slope times the step
        assert abs(mmtg(a, b, lam) - here) <= bound
        assert abs(mmtg(b, a, lam) - here) <= bound


@given(a=st.floats(0.001, 50), b=st.floats(0.001, 50), lam=lambdas)
def test_the_gradient_of_plus_is_bounded_and_never_negative(a: float, b: float, lam: float) -> None:
    """d/dL_max = 2 + lam tanh L_min in [2, 2 + lam); d/dL_min = lam L_max sech^2 L_min in [0, lam L_max]."""
    if a == b:
        b += 0.5
    da, db = gradient(a, b, lam)
    high, low = (da, db) if a > b else (db, da)
    assert 2 <= high <= 2 + lam
    assert 0 <= low <= lam * max(a, b)
    expected = lam * max(a, b) / math.cosh(min(a, b)) ** 2
    assert low == pytest.approx(expected, rel=1e-6, abs=1e-12)


@given(a=st.floats(0.01, 5), lam=lambdas)
def test_the_gradient_where_the_losses_meet_lies_between_both_sides(a: float, lam: float) -> None:
    da, db = gradient(a, a, lam)
    sides = (2 + lam * math.tanh(a), lam * a / math.cosh(a) ** 2)
    assert da == pytest.approx(db)
    assert da + db == pytest.approx(sum(sides))


@given(a=st.floats(0.1, 5), gap=st.floats(0.1, 5), lam=st.floats(0.1, 1.0))
def test_minus_pushes_the_smaller_loss_up(a: float, gap: float, lam: float) -> None:
    """What Eq. 56 prints: descent along its gradient raises the loss that is already small."""
    _, low = gradient(a + gap, a, lam, "-")
    assert low < 0
    assert mmtg(a + gap, a + 0.05, lam, "-") < mmtg(a + gap, a, lam, "-")
    assert mmtg(a + gap, a + 0.05, lam, "+") > mmtg(a + gap, a, lam, "+")


def test_mmtg_works_element_by_element() -> None:
    a, b = torch.rand(3, 4), torch.rand(3, 4)
    joined = mmtg_loss(a, b, 0.5)
    assert joined.shape == (3, 4)
    assert float(joined[1, 2]) == pytest.approx(mmtg(float(a[1, 2]), float(b[1, 2]), 0.5), rel=1e-6)


def looped_info_nce(
    graph: np.ndarray, text: np.ndarray, temperature: float, key: list[int] | None = None
) -> float:
    """The definition in float64: mean over both directions of -log softmax of the cosine similarities."""
    n, total = len(graph), 0.0
    key = list(range(n)) if key is None else key

    def cosine(u: np.ndarray, v: np.ndarray) -> float:
        return float(u @ v / math.sqrt(u @ u) / math.sqrt(v @ v))

    for i in range(n):
        others = [j for j in range(n) if j == i or key[j] != key[i]]
        own = math.exp(cosine(graph[i], text[i]) / temperature)
        rows = sum(math.exp(cosine(graph[i], text[j]) / temperature) for j in others)
        columns = sum(math.exp(cosine(graph[j], text[i]) / temperature) for j in others)
        total -= math.log(own / rows) + math.log(own / columns)
    return total / (2 * n)


@pytest.mark.parametrize("temperature", [0.07, 0.5, 2.0])
def test_info_nce_is_the_plain_double_loop(temperature: float) -> None:
    rng = np.random.default_rng(0)
    graph, text = rng.normal(size=(6, 5)), rng.normal(size=(6, 5)) * 3
    for key in (list(range(6)), [0, 1, 0, 3, 1, 0]):  # equal texts are no negatives of each other
        ours = info_nce(torch.tensor(graph), torch.tensor(text), temperature, torch.tensor(key))
        assert float(ours) == pytest.approx(looped_info_nce(graph, text, temperature, key), rel=1e-5)


def test_equal_texts_have_equal_keys(train_systems: list[System], small_model: Any) -> None:
    collate = small_model[1]
    texts = [three_part_text(s) for s in train_systems[:120]]
    keys = text_keys(collate([Sample(t, "", s) for t, s in zip(texts, train_systems)])).tolist()
    assert len(set(texts)) == len(set(keys)) < len(texts)
    assert all((a == b) == (s == t) for a, s in zip(keys, texts) for b, t in zip(keys, texts))


def test_info_nce_of_equal_pairs_is_small_and_of_swapped_ones_large() -> None:
    x, key = torch.eye(4), torch.arange(4)
    assert float(info_nce(x, x * 7, 0.07, key)) < 1e-4
    assert float(info_nce(x, x.roll(1, 0), 0.07, key)) > 10
    ones = torch.ones(4, 3)
    assert float(info_nce(ones, ones, 0.07, key)) == pytest.approx(math.log(4), rel=1e-5)


KEY = torch.tensor([0, 1, 2, 0, 4, 1])  # equal texts on two ranks


def pairs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(6, 4, generator=generator) for _ in range(2))  # type: ignore[return-value]


def info_nce_rank(rank: int, store: str, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    graph, text = (t[rank * 3 : rank * 3 + 3].clone().requires_grad_() for t in pairs())
    loss = info_nce(graph, text, 0.2, KEY[rank * 3 : rank * 3 + 3])
    loss.backward()
    torch.save({"loss": loss.detach(), "graph": graph.grad, "text": text.grad}, f"{out}{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_give_the_loss_and_gradient_of_the_whole_batch(tmp_path: Path) -> None:
    two_ranks(info_nce_rank, str(tmp_path / "store"), str(tmp_path / "rank"))
    parts = [torch.load(tmp_path / f"rank{r}.pt") for r in range(2)]
    graph, text = (t.clone().requires_grad_() for t in pairs())
    loss = info_nce(graph, text, 0.2, KEY)
    loss.backward()
    torch.testing.assert_close((parts[0]["loss"] + parts[1]["loss"]) / 2, loss.detach())
    # Data-parallel training averages the gradients of the ranks' own losses.
    torch.testing.assert_close(torch.cat([p["graph"] for p in parts]) / 2, graph.grad)
    torch.testing.assert_close(torch.cat([p["text"] for p in parts]) / 2, text.grad)
