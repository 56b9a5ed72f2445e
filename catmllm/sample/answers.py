"""Sampled answers: what each holds, and how they are kept until they end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from catmllm.config import SamplingConfig
from catmllm.data.batches import Collator
from catmllm.data.tokenizer import decode
from catmllm.sample.rows import Rows


@dataclass(frozen=True)
class Rollout:
    """One sampled answer.

    `prompt` indexes the prompts given; ids [T] are the sampled tokens, the end token included where it came;
    logprob [T] float32 are their log-probabilities under logits / T, before the top-p cut, the ban on markers
    and the grammar; hidden [T, H] the final hidden states that they were sampled from (None unless asked
    for); `finished` says whether the end token or a stop string came.
    """

    prompt: int
    ids: torch.Tensor
    logprob: torch.Tensor
    hidden: torch.Tensor | None
    finished: bool
    text: str


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

    def take(self, rows: Rows, token: torch.Tensor, logprob: torch.Tensor) -> torch.Tensor:
        """Keep the tokens of the rows that go on; says which rows [R] end with them."""
        on = ~rows.ended
        row, at = rows.row[on], rows.steps[on]
        self.ids[row, at], self.logprob[row, at] = token[on], logprob[on]
        if self.hidden is not None:
            self.hidden[row, at] = rows.hidden[on]
        said_end = (token == self.collate.end_id) & on
        ends = said_end | ((rows.steps + 1 >= self.params.max_new_tokens) & on)
        if self.params.stop:
            ends |= self._stopped(rows, on)
        for i in rows.row[ends].tolist():
            self.rollouts[i] = rollout = self._rollout(i)
            if self.on_answer is not None:
                self.on_answer(i, rollout)
        return ends

    def _stopped(self, rows: Rows, on: torch.Tensor) -> torch.Tensor:
        """Rows whose text has come to hold a stop string."""
        reach = max(map(len, self.params.stop))  # a token is at least a byte
        found = torch.zeros_like(on)
        for place in on.nonzero()[:, 0].tolist():
            row, end = int(rows.row[place]), int(rows.steps[place]) + 1
            tail = decode(self.collate.tokenizer, self.ids[row, max(0, end - 4 * reach) : end].tolist())
            found[place] = any(s in tail for s in self.params.stop)
        return found

    def _rollout(self, i: int) -> Rollout:
        length = int((self.ids[i] >= 0).sum())
        hidden = None if self.hidden is None else self.hidden[i, :length].clone()
        ids, logprob = self.ids[i, :length].cpu(), self.logprob[i, :length].cpu()
        return ended(self.collate, i // self.group_size, ids, logprob, hidden, self.params.stop)

    def done(self) -> list[Rollout]:
        return [r for r in self.rollouts if r is not None]


def ended(
    collate: Collator,
    prompt: int,
    ids: torch.Tensor,
    logprob: torch.Tensor,
    hidden: torch.Tensor | None,
    stop: Sequence[str],
) -> Rollout:
    """The answer of tokens ids [T] to the prompt of that number;
    its text ends before the first of the `stop` strings."""
    text = decode(collate.tokenizer, ids.tolist())
    stopped = [at for s in stop if (at := text.find(s)) >= 0]
    finished = bool(stopped) or bool(ids[-1] == collate.end_id)
    return Rollout(prompt, ids, logprob, hidden, finished, text[: min(stopped)] if stopped else text)
