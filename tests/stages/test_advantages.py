"""Advantages against the printed formula in NumPy, KL estimators against TRL's and against the true KL,
the loss by autograd."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from catmllm.stages.advantages import group_advantages, kl_estimate, policy_loss

rewards = arrays(
    np.float64,
    st.tuples(st.integers(1, 6), st.integers(2, 9)),
    elements=st.integers(-150, 100).map(lambda i: i / 10),
)


@given(r=rewards, delta=st.floats(1e-6, 1.0))
def test_advantages_are_eqs_45_to_47(r: np.ndarray, delta: float) -> None:
    advantages, informative = group_advantages(r, delta)
    assert advantages.shape == r.shape and informative.shape == r.shape
    for group, row in enumerate(r):
        if np.ptp(row) < 1e-7:
            continue  # the next test
        mean = sum(row) / len(row)
        std = (sum((v - mean) ** 2 for v in row) / len(row)) ** 0.5
        expected = [(v - mean) / (std + delta) for v in row]
        assert informative[group].all()
        np.testing.assert_allclose(advantages[group], expected, rtol=1e-9, atol=1e-9)
        assert abs(advantages[group].sum()) < 1e-7
        assert (np.argsort(advantages[group], kind="stable") == np.argsort(row, kind="stable")).all()


def test_a_group_of_equal_rewards_is_skipped() -> None:
    third = 1 / 3
    r = np.array([[third] * 3, [0.1 + 0.2, 0.3, 0.3], [1.0, 2.0, 3.0]])  # 0.1 + 0.2 is not quite 0.3
    advantages, informative = group_advantages(r, 1e-4)
    assert informative.tolist() == [[False] * 3, [False] * 3, [True] * 3]
    assert (advantages[:2] == 0).all() and (advantages[2] != 0).any()


def test_an_infinite_reward_is_an_error() -> None:
    with pytest.raises(ValueError, match="finite"):
        group_advantages(np.array([[1.0, np.inf]]), 1e-4)


@given(r=rewards, seed=st.integers(0, 99))
def test_an_answer_without_a_reward_takes_no_part(r: np.ndarray, seed: int) -> None:
    """Its group's advantages are those of the group without it."""
    holes = np.random.default_rng(seed).random(r.shape) < 0.4
    advantages, informative = group_advantages(np.where(holes, np.nan, r), 1e-4)
    assert not advantages[holes].any() and not informative[holes].any()
    for group, row in enumerate(r):
        there = ~holes[group]
        if there.any():
            alone, signal = group_advantages(row[None, there], 1e-4)
            np.testing.assert_allclose(advantages[group, there], alone[0], rtol=1e-12, atol=1e-12)
            assert (informative[group, there] == signal[0]).all()


def test_k3_is_trls_estimator_and_the_others_are_schulmans() -> None:
    generator = torch.Generator().manual_seed(0)
    lp, ref = torch.randn(50, generator=generator) - 2, torch.randn(50, generator=generator) - 2
    # trl.GRPOTrainer: per_token_kl = exp(ref - lp) - (ref - lp) - 1
    torch.testing.assert_close(
        kl_estimate(lp, ref, "k3"), torch.exp(ref - lp) - (ref - lp) - 1, rtol=1e-4, atol=1e-6
    )
    torch.testing.assert_close(kl_estimate(lp, ref, "k1"), lp - ref)
    torch.testing.assert_close(kl_estimate(lp, ref, "k2"), 0.5 * (lp - ref) ** 2)
    assert (kl_estimate(lp, ref, "k3") >= 0).all()
    with pytest.raises(ValueError, match="k1, k2 or k3"):
        kl_estimate(lp, ref, "k4")


def test_k3_keeps_its_digits_where_the_policies_are_nearly_equal() -> None:
    lp = torch.full((1,), -3.0)
    assert float(kl_estimate(lp, lp, "k3")) == 0.0
    near = kl_estimate(lp.double(), lp.double() + 1e-9, "k3")
    assert float(near) >= 0 and float(near) < 1e-16


def distributions() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(6, generator=generator, dtype=torch.float64)
    return logits, (logits + 0.3 * torch.randn(6, generator=generator, dtype=torch.float64)).log_softmax(0)


def test_k1_and_k3_expect_the_kl_and_only_k2_and_k3_pull_back() -> None:
    """Expectations over the whole vocabulary, exactly: k1 as a loss has no gradient on average."""
    logits, reference = distributions()
    logits.requires_grad_()
    policy = logits.log_softmax(0)
    p = policy.exp().detach()
    truth = float((p * (policy - reference)).sum().detach())
    (true_gradient,) = torch.autograd.grad(
        (policy.exp() * (policy - reference)).sum(), logits, retain_graph=True
    )
    gradients = {}
    for kind in ("k1", "k2", "k3"):
        expected = (p * kl_estimate(policy, reference, kind)).sum()
        (gradients[kind],) = torch.autograd.grad(expected, logits, retain_graph=True)
        if kind != "k2":
            assert float(expected.detach()) == pytest.approx(truth, rel=1e-9)
    assert gradients["k1"].abs().max() < 1e-12
    torch.testing.assert_close(gradients["k2"], true_gradient)  # of KL(policy || reference)
    # k3's pulls toward the reference too, by the gradient of KL(reference || policy)
    torch.testing.assert_close(gradients["k3"], p - reference.exp())


def sampled(n_rows: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    row = torch.tensor([0, 0, 0, 1, 2, 2])
    logprob = -torch.rand(6, generator=generator, dtype=torch.float64) * 3
    reference = logprob + 0.2 * torch.randn(6, generator=generator, dtype=torch.float64)
    advantage = torch.tensor([1.5, -0.7, 0.4], dtype=torch.float64)[:n_rows]
    return logprob.requires_grad_(), reference, advantage, row


def test_with_the_policy_that_sampled_the_gradient_is_that_of_minus_a_times_l() -> None:
    """Eqs. 48-52: -A l + beta KL, l the mean log-probability of a sample's tokens."""
    logprob, reference, advantage, row = sampled()
    beta = 0.1
    loss, kl = policy_loss(logprob, logprob.detach(), reference, advantage, row, 3, beta, kl="k1", clip=0.2)
    (ours,) = torch.autograd.grad(loss.sum(), logprob)
    expected_loss = []
    for i in range(3):
        mine = row == i
        length = int(mine.sum())
        l = logprob[mine].sum() / length
        divergence = (logprob[mine] - reference[mine]).sum() / length
        assert float(kl[i].detach()) == pytest.approx(float(divergence.detach()))
        expected_loss.append(-advantage[i] * l + beta * divergence)
    (expected,) = torch.autograd.grad(torch.stack(expected_loss).sum(), logprob)
    torch.testing.assert_close(ours, expected)
    # the value is -A + beta KL, as the ratio is one
    torch.testing.assert_close(loss, -advantage + beta * kl)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_beta_weighs_the_kl(kind: str) -> None:
    logprob, reference, advantage, row = sampled()
    losses = [
        policy_loss(logprob, logprob.detach(), reference, advantage, row, 3, beta, kind, 0.2)[0]
        for beta in (0.0, 0.5)
    ]
    kl = policy_loss(logprob, logprob.detach(), reference, advantage, row, 3, 0.0, kind, 0.2)[1]
    torch.testing.assert_close(losses[1] - losses[0], 0.5 * kl)


def test_the_clip_stops_what_went_far_enough_and_only_that() -> None:
    """PPO's objective min(r A, clip(r) A) per token, by cases."""
    clip = 0.2
    old = torch.full((6,), -2.0, dtype=torch.float64)
    ratio = torch.tensor([1.5, 0.5, 1.5, 0.5, 1.1, 0.9], dtype=torch.float64)
    advantage = torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    logprob = (old + ratio.log()).requires_grad_()
    row = torch.arange(6)
    loss, _ = policy_loss(logprob, old, old, advantage, row, 6, 0.0, "k3", clip)
    (gradient,) = torch.autograd.grad(loss.sum(), logprob)
    expected = []
    for r, a in zip(ratio.tolist(), advantage.tolist()):
        expected.append(-min(r * a, min(max(r, 1 - clip), 1 + clip) * a))
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64))
    moving = gradient != 0
    # a gain beyond the clip no longer pulls; a loss that got worse still does
    assert moving.tolist() == [False, True, True, False, True, True]
    torch.testing.assert_close(gradient[moving], (-ratio * advantage)[moving])


def test_the_clip_does_nothing_at_the_first_update() -> None:
    logprob, reference, advantage, row = sampled()
    gradients = []
    for clip in (0.01, 0.2, 1.0):
        loss, _ = policy_loss(logprob, logprob.detach(), reference, advantage, row, 3, 0.1, "k3", clip)
        gradients.append(torch.autograd.grad(loss.sum(), logprob)[0])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)
    torch.testing.assert_close(gradients[0], gradients[2], rtol=0, atol=0)


def test_a_longer_answer_does_not_weigh_more() -> None:
    for length in (1, 10):
        logprob = torch.full((length,), -1.0, requires_grad=True)
        loss, _ = policy_loss(
            logprob, logprob.detach(), logprob.detach(), torch.ones(1),
            torch.zeros(length, dtype=torch.int64), 1, 0.0, "k3", 0.2,
        )  # fmt: skip
        loss.sum().backward()
        assert logprob.grad is not None
        assert float(logprob.grad.sum()) == pytest.approx(-1.0)
