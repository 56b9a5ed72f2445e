"""Sampled answers as a batch of the whole model: prompts and the very tokens that were sampled, packed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from catmllm.data.batches import Batch, Collator, Encoded
from catmllm.data.prompts import Sample
from catmllm.models.attention import shares_prompts
from catmllm.models.catalytic_mllm import CatalyticMLLM
from catmllm.sample.answers import Rollout

MOST = 1 << 15  # tokens of a pass without gradients


def rollout_batch(
    collate: Collator, prompts: Sequence[Sample], rollouts: Sequence[Rollout], shared: bool = True
) -> Batch:
    """Prompts and the very tokens that were sampled, as a batch whose labels are those tokens.

    rollouts[i] answers prompts[rollouts[i].prompt]. `shared`: the tokens of a prompt are there once for all
    its answers, which costs a group of K a prompt instead of K (the same numbers, see docs/rl.md).
    """

    def encoded(prompt: int, answer: list[int]) -> Encoded:
        sample = collate.shown(prompts[prompt])
        return Encoded(collate.prompt_ids(sample), answer, None, sample.graph)

    if not shared:
        return collate.join([encoded(r.prompt, r.ids.tolist()) for r in rollouts])
    groups = [(p, list(group)) for p, group in itertools.groupby(rollouts, lambda r: r.prompt)]
    return collate.join_answers(
        [encoded(p, []) for p, _ in groups], [[r.ids.tolist() for r in group] for _, group in groups]
    )


@torch.no_grad()
def hidden_states(
    model: CatalyticMLLM,
    collate: Collator,
    prompts: Sequence[Sample],
    rollouts: Sequence[Rollout],
    dtype: torch.dtype,
) -> list[Rollout]:
    """The rollouts with the final hidden states [T, H] that their tokens were drawn from, zero at forced
    ones, as our own decoding keeps them. Prompt and answers of all are read in one packed pass, or in as few
    as `MOST` tokens each allow."""
    shared = shares_prompts(model.text) and collate.data.packed
    weight = model.text.embed_tokens.weight
    out = []
    for part in _passes(collate, prompts, rollouts):
        batch = rollout_batch(collate, prompts, part, shared).to(weight.device)
        states = model.hidden(batch)[batch.answer_at].to(dtype)
        for r, hidden in zip(part, states.split([len(r.ids) for r in part])):
            if r.choices is not None:
                at = r.choices.at.to(hidden.device)
                hidden = torch.zeros_like(hidden).index_copy(0, at, hidden[at])
            out.append(replace(r, hidden=hidden))
    return out


def _passes(
    collate: Collator, prompts: Sequence[Sample], rollouts: Sequence[Rollout]
) -> Iterator[list[Rollout]]:
    part: list[Rollout] = []
    tokens = 0
    for _, group in itertools.groupby(rollouts, lambda r: r.prompt):
        some = list(group)
        size = len(collate.prompt_ids(collate.shown(prompts[some[0].prompt]))) + sum(len(r.ids) for r in some)
        if part and tokens + size > MOST:
            yield part
            part, tokens = [], 0
        part, tokens = part + some, tokens + size
    if part:
        yield part
