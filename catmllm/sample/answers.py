"""Sampled answers: what each holds, and how they are kept until they end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch

from catmllm.config import SamplingConfig
from catmllm.data.batches import Collator
from catmllm.data.tokenizer import decode
from catmllm.sample.rows import Rows
from catmllm_kernels.linear_logprob import Allowed


@dataclass(frozen=True)
class Choices:
    """Where an answer under a grammar had a choice: at [F] int64, the places among its tokens, and for each
    the tokens that were allowed. All others were forced."""

    at: torch.Tensor
    sets: tuple[torch.Tensor, ...]

    @staticmethod
    def join(rollouts: Sequence[Rollout]) -> tuple[torch.Tensor, Allowed] | None:
        """Of all answers, their tokens end to end: the places of choices [F] and the sets there; None for
        answers without a grammar."""
        some = [r.choices for r in rollouts if r.choices is not None]
        if not some:
            return None
        if len(some) < len(rollouts):
            raise ValueError("answers with a grammar and without one have no log-probability in common")
        begins = np.cumsum([0, *(len(r.ids) for r in rollouts)])
        at = torch.cat([c.at + int(begin) for c, begin in zip(some, begins)])
        return at, Allowed.join(list(chain.from_iterable(c.sets for c in some)))


@dataclass(frozen=True)
class Rollout:
    """One sampled answer.

    `prompt` indexes the prompts given; ids [T] are the sampled tokens, the end token included where it came;
    logprob [T] float32 are their log-probabilities under logits / T before the top-p cut, over the whole
    vocabulary or, under a grammar, over the tokens that it allows (0 where it forced one: `choices` has the
    others); hidden [T, H] the final hidden states that they were sampled from, zero at forced ones (None
    unless asked for); `finished` says whether the end token or a stop string came.
    """

    prompt: int
    ids: torch.Tensor
    logprob: torch.Tensor
    hidden: torch.Tensor | None
    finished: bool
    text: str
    choices: Choices | None = None


class Answers:
    """What has been sampled so far, by answer; turns each into a `Rollout` when it ends."""

    def __init__(
        self,
        collate: Collator,
        weight: torch.Tensor,
        n: int,
        group_size: int,
        params: SamplingConfig,
        keep_hidden: bool,
        on_answer: Callable[[int, Rollout], None] | None,
    ) -> None:
        """`weight`: one of the tower's [_, H], for its width, dtype and device."""
        self.collate, self.group_size, self.params = collate, group_size, params
        self.on_answer = on_answer
        shape, device = (n, params.max_new_tokens), weight.device
        self.ids = torch.full(shape, -1, dtype=torch.int64, device=device)
        self.logprob = torch.zeros(shape, device=device)
        self.hidden = weight.new_zeros(*shape, weight.shape[1]) if keep_hidden else None
        self.rollouts: list[Rollout | None] = [None] * n
        self.choices: list[tuple[list[int], list[torch.Tensor]]] = []  # by answer, under a grammar

    def begin(self, tokens: Sequence[Sequence[int]]) -> None:
        """Under a grammar: the forced tokens that each answer begins with."""
        self.choices = [([], []) for _ in tokens]
        for i, some in enumerate(tokens):
            self.ids[i, : len(some)] = torch.tensor(some, dtype=torch.int64)

    def take(
        self,
        rows: Rows,
        token: torch.Tensor,
        count: torch.Tensor,
        logprob: torch.Tensor,
        sets: Sequence[torch.Tensor] | None,
    ) -> torch.Tensor:
        """Keep what the rows that go on have gained: token [N], `count` [R] of each row, of which the first
        was drawn, with log-probability [R] and out of `sets` [R]. Says which rows [R] end with it."""
        on = ~rows.ended
        row, at = rows.row[on], rows.steps[on]
        self.logprob[row, at] = logprob[on]
        if self.hidden is not None:
            self.hidden[row, at] = rows.hidden[on]
        which = torch.arange(len(count), device=count.device).repeat_interleave(count)
        end = count.cumsum(0)
        place = rows.steps[which] + torch.arange(len(token), device=count.device) - (end - count)[which]
        kept = on[which] & (place < self.params.max_new_tokens)
        self.ids[rows.row[which][kept], place[kept]] = token[kept]
        if sets is not None:
            for i, k, s, goes_on in zip(rows.row.tolist(), rows.steps.tolist(), sets, on.tolist()):
                if goes_on and len(s) > 1:
                    self.choices[i][0].append(k)
                    self.choices[i][1].append(s)
        steps = rows.steps + count
        ends = ((token[end - 1] == self.collate.end_id) | (steps >= self.params.max_new_tokens)) & on
        if self.params.stop:
            ends |= self._stopped(rows, on, steps)
        for i in rows.row[ends].tolist():
            self.rollouts[i] = rollout = self._rollout(i)
            if self.on_answer is not None:
                self.on_answer(i, rollout)
        return ends

    def _stopped(self, rows: Rows, on: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        """Rows whose text has come to hold a stop string."""
        reach = max(map(len, self.params.stop))  # a token is at least a byte
        found = torch.zeros_like(on)
        for place in on.nonzero()[:, 0].tolist():
            row, begin, end = int(rows.row[place]), int(rows.steps[place]), int(steps[place])
            recent = self.ids[row, max(0, begin - 4 * reach) : end]
            tail = decode(self.collate.tokenizer, recent[recent >= 0].tolist())
            found[place] = any(s in tail for s in self.params.stop)
        return found

    def _rollout(self, i: int) -> Rollout:
        length = int((self.ids[i] >= 0).sum())
        hidden = None if self.hidden is None else self.hidden[i, :length].clone()
        ids, logprob = self.ids[i, :length].cpu(), self.logprob[i, :length].cpu()
        choices = None
        if self.choices:
            at, sets = self.choices[i]
            choices = Choices(torch.tensor(at, dtype=torch.int64), tuple(sets))
        prompt = i // self.group_size
        return ended(self.collate, prompt, ids, logprob, hidden, self.params.stop, choices)

    def done(self) -> list[Rollout]:
        return [r for r in self.rollouts if r is not None]


def ended(
    collate: Collator,
    prompt: int,
    ids: torch.Tensor,
    logprob: torch.Tensor,
    hidden: torch.Tensor | None,
    stop: Sequence[str],
    choices: Choices | None = None,
) -> Rollout:
    """The answer of tokens ids [T] to the prompt of that number;
    its text ends before the first of the `stop` strings."""
    text = decode(collate.tokenizer, ids.tolist())
    stopped = [at for s in stop if (at := text.find(s)) >= 0]
    finished = bool(stopped) or bool(ids[-1] == collate.end_id)
    whole = text[: min(stopped)] if stopped else text
    return Rollout(prompt, ids, logprob, hidden, finished, whole, choices)
