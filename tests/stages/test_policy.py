"""The policy under a grammar against enumeration: of a toy grammar every answer there is, in float64."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from catmllm.sample.answers import Choices, Rollout
from catmllm.sample.grammar import Grammar, Pattern, Walk
from catmllm.stages.advantages import kl_estimate, policy_loss
from catmllm.stages.ga_grpo import GAGRPO
from catmllm.stages.grpo import GRPO
from catmllm.train.loop import train
from catmllm_kernels.linear_logprob import LogProbs, allowed_logprobs, linear_logprob
from tests.contexts import MakeContext, small

END = 0
PATTERN = Pattern(
    (("text", "x: "), ("site", 0), ("fraction",), ("text", " "), ("site", 1), ("fraction",), ("text", "\n.")),
    ("C", "Cu"),
    (1, 1),
    1,
)
TEMPERATURE = 0.7


def toy_tokenizer() -> PreTrainedTokenizerFast:
    """Characters, and some tokens of several: inside fixed text, across a choice, and overlapping."""
    merges = [("C", "u"), ("x", ":"), ("0", "."), ("0.", "3"), ("0.", "7"), ("Ġ", "0")]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<end>", *alphabet, *(a + b for a, b in merges)]
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(words)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


@pytest.fixture(scope="module")
def answers() -> list[Rollout]:
    """Every answer that the grammar has, each once."""
    grammar = Grammar(toy_tokenizer(), END)
    found: list[Rollout] = []

    def go_on(tokens: list[int]) -> None:
        """All answers that continue the choices made so far."""
        walk = Walk(grammar, [PATTERN], 99)
        ids, at, sets = list(walk.begun[0]), [], []
        for token in tokens:
            at.append(len(ids))
            sets.append(walk.allowed(0))
            ids += walk.take(0, token)
        if ids[-1] == END:
            choices = Choices(torch.tensor(at), tuple(sets))
            text = "".join(grammar.text[i] for i in ids)
            found.append(Rollout(0, torch.tensor(ids), torch.zeros(len(ids)), None, True, text, choices))
            return
        for token in walk.allowed(0).tolist():
            go_on([*tokens, token])

    go_on([])
    return found


class Toy(torch.nn.Module):
    """Hidden states that depend on all tokens before, and a head."""

    def __init__(self, words: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def matrix(*shape: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64))

        self.embedding, self.mix, self.head = matrix(words, 8), matrix(8, 8), matrix(words, 8)

    def forward(self, rollouts: list[Rollout]) -> LogProbs:
        """Log-probabilities of the choices of all answers, end to end."""
        hidden = []
        for r in rollouts:
            state = torch.zeros(8, dtype=torch.float64)
            for token in r.ids.tolist():
                hidden.append(state)
                state = torch.tanh(state @ self.mix + self.embedding[token])
        chosen = Choices.join(rollouts)
        assert chosen is not None
        at, allowed = chosen
        targets = torch.cat([r.ids for r in rollouts])[at]
        return allowed_logprobs(
            torch.stack(hidden)[at], self.head, targets, allowed, TEMPERATURE, entropy=True
        )


def summed(values: torch.Tensor, rollouts: list[Rollout]) -> torch.Tensor:
    """Of each answer, over its choices."""
    return torch.stack([v.sum() for v in values.split([len(r.choices.at) for r in rollouts])])  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def policy() -> Toy:
    return Toy(len(toy_tokenizer()), 0)


def test_all_answers_together_have_probability_one(answers: list[Rollout], policy: Toy) -> None:
    texts = {r.text.removesuffix("<end>") for r in answers}
    expected = {
        f"x: {a} {a}0 1 0.{i} {b} {b}1 1 0.{j}\n."
        for a, b in (("C", "Cu"), ("Cu", "C"))
        for i in range(10)
        for j in range(10)
    }
    assert texts == expected and len(answers) >= len(texts)
    total = summed(policy(answers).logprob, answers).exp().sum()
    assert float(total.detach()) == pytest.approx(1.0, abs=1e-12)
    assert min(len(r.ids) - len(r.choices.at) for r in answers) > 10  # type: ignore[union-attr]


def test_the_estimators_expectation_is_the_gradient_of_the_expected_reward(
    answers: list[Rollout], policy: Toy
) -> None:
    reward = torch.tensor([len(r.text) + 3.0 * r.text.count("7") for r in answers], dtype=torch.float64)
    weights = tuple(policy.parameters())
    logprob = policy(answers).logprob
    probability = summed(logprob, answers).exp()
    exact = torch.autograd.grad((probability * reward).sum(), weights)
    logprob = policy(answers).logprob
    lengths = torch.tensor([len(r.choices.at) for r in answers])  # type: ignore[union-attr]
    row = torch.arange(len(answers)).repeat_interleave(lengths)
    loss, _ = policy_loss(
        logprob, logprob.detach(), logprob.detach(), reward, row, len(answers), 0.0, "k3", 0.2, "token"
    )
    estimated = torch.autograd.grad(-(probability.detach() * loss).sum(), weights)
    for a, b in zip(exact, estimated):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        assert float(a.abs().max()) > 1e-3


def test_the_kl_is_that_of_enumeration(answers: list[Rollout], policy: Toy) -> None:
    """Of the two policies as distributions over answers; k1 and k3 are unbiased estimates of it."""
    other = Toy(len(toy_tokenizer()), 1)
    with torch.no_grad():
        found, reference = policy(answers), other(answers).logprob
        p, q = summed(found.logprob, answers), summed(reference, answers)
        expected = float((p.exp() * (p - q)).sum())
        for kind in ("k1", "k3"):
            estimate = summed(kl_estimate(found.logprob, reference, kind), answers)
            assert float((p.exp() * estimate).sum()) == pytest.approx(expected, rel=1e-10)
        assert expected > 0.1
        entropy = summed(found.entropy, answers)  # type: ignore[arg-type]
        assert float((p.exp() * entropy).sum()) == pytest.approx(float(-(p.exp() * p).sum()), rel=1e-10)


def test_a_set_of_all_words_gives_the_free_log_probabilities() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=generator) for n in (9, 40))
    targets = torch.randint(0, 40, (9,), generator=generator)
    from catmllm_kernels.linear_logprob import Allowed

    allowed = Allowed.join([torch.arange(40)] * 9)
    ours = allowed_logprobs(hidden, weight, targets, allowed, 0.8).logprob
    torch.testing.assert_close(ours, linear_logprob(hidden, weight, targets, 0.8), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="none of the words allowed"):
        allowed_logprobs(hidden, weight, targets, Allowed.join([torch.tensor([40])] * 9))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage_of", [GRPO, GAGRPO])
def test_the_stages_read_the_sampling_policys_log_probabilities(
    make_context: MakeContext, stage_of: type[GRPO] | type[GAGRPO], precision: str
) -> None:
    """What the update reads of the sampled answers is what sampling said, and the first KL is zero."""
    config = small()
    config.precision = precision  # type: ignore[assignment]
    for rl in (config.grpo, config.ga_grpo):
        rl.sampling.grammar, rl.sampling.max_new_tokens, rl.sampling.temperature = True, 60, 0.8
    context = make_context(config)
    seen = []

    def make(c):  # type: ignore[no-untyped-def]
        stage = stage_of(c)
        if isinstance(stage, GRPO):
            stage.reward = lambda texts, asked: [float(len(t)) + 1e-3 * i for i, t in enumerate(texts)]
        add, read = stage.add_policy, stage._read

        def spy(work, *rest):  # type: ignore[no-untyped-def]
            rollouts = rest[-3]
            seen.append([])
            n = len(rollouts)
            add(work, *rest[:-3], rollouts, np.linspace(-1, 1, n), np.ones(n, dtype=bool))
            kept.append(rollouts)

        def reads(*given):  # type: ignore[no-untyped-def]
            found = read(*given)
            seen[-1].append((found.logprob.detach().float(), found.reference.float()))
            return found

        stage.add_policy, stage._read = spy, reads
        return stage

    kept: list[list[Rollout]] = []
    before = copy.deepcopy(context.model.llm.lm_head.weight.detach())
    state, _ = train(make, context)
    policy, reference = (torch.cat(x) for x in zip(*seen[0]))
    sampled = torch.cat([r.logprob[r.choices.at] for r in kept[0]])  # type: ignore[union-attr]
    bound = 2e-4 if precision == "fp32" else 5e-2
    torch.testing.assert_close(policy, sampled, rtol=0, atol=bound)
    torch.testing.assert_close(policy, reference, rtol=0, atol=1e-6)
    assert len(sampled) > 20 and all(float(r.logprob.sum()) < 0 for r in kept[0])
    assert not torch.equal(state["llm.lm_head.weight"], before)
    log = [json.loads(line) for line in (context.folder / "log.jsonl").read_text().splitlines()]
    assert log[0]["kl"] == pytest.approx(0.0, abs=1e-6) and log[1]["kl"] > 0
