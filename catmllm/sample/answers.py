"""Sampled answers: what each holds, and how they are kept until they end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch

from catmllm.config import SamplingConfig
from catmllm.data.batches import Collator
from catmllm.data.prompts import design_sample
from catmllm.data.tokenizer import decode
from catmllm.sample.rows import Rows, Runs
from catmllm.structure.elements import SYMBOLS
from catmllm.structure.formula import parse_identity
from catmllm.structure.system import SURFACE, make_system
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
    unless asked for); `finished` says whether the end token or a stop string came; `limit` is the number of
    tokens that it might have had.
    """

    prompt: int
    ids: torch.Tensor
    logprob: torch.Tensor
    hidden: torch.Tensor | None
    finished: bool
    text: str
    choices: Choices | None = None
    limit: int = 0


def answer_limits(
    collate: Collator, params: SamplingConfig, asked: Sequence[tuple[str, Mapping[str, int]]]
) -> list[int]:
    """The most tokens of an answer to each prompt for a system, by identity line and counts of its cell:
    `max_new_tokens`, or where that is null what a CIF of the cell takes, and a quarter more."""
    if params.max_new_tokens is not None:
        return limits_of(params, len(asked), None)
    return [cif_tokens(collate, identity, target) * 5 // 4 for identity, target in asked]


def limits_of(params: SamplingConfig, n: int, limits: Sequence[int] | None) -> list[int]:
    """The limits [n] given, or n times `max_new_tokens`. Raises ValueError where neither is there."""
    if limits is not None:
        return list(limits)
    if params.max_new_tokens is None:
        raise ValueError("`max_new_tokens: null` needs the systems that are asked for")
    return [params.max_new_tokens] * n


def cif_tokens(collate: Collator, identity: str, target: Mapping[str, int]) -> int:
    """Tokens of the answer that is a CIF of a cell with these counts, its atoms anywhere."""
    named, n = parse_identity(identity), sum(target.values())
    numbers = [SYMBOLS.index(symbol) for symbol, count in target.items() for _ in range(count)]
    tags = [SURFACE] * n
    place = (np.arange(3 * n).reshape(n, 3) * 0.618034) % 1
    lattice = np.diag([12.345, 12.345, 34.567])
    system = make_system(
        lattice, None, numbers, tags, named.adsorbate, named.miller or (1, 1, 1), 0.0, frac=place
    )
    return len(collate.encode(design_sample(system, None, collate.data.decimals).answer))


class Answers:
    """What has been sampled so far, by answer; turns each into a `Rollout` when it ends."""

    def __init__(
        self,
        collate: Collator,
        weight: torch.Tensor,
        n: int,
        group_size: int,
        params: SamplingConfig,
        limits: Sequence[int],
        keep_hidden: bool,
        on_answer: Callable[[int, Rollout], None] | None,
    ) -> None:
        """`weight`: one of the tower's [_, H], for its width, dtype and device; limits [n]: the most tokens
        of each answer."""
        self.collate, self.group_size, self.params = collate, group_size, params
        self.on_answer = on_answer
        # The last place is nobody's: what rows that have ended would keep goes there.
        shape, device = (n + 1, max(limits, default=0)), weight.device
        self.most = np.array([*limits, 1])
        self.limits = torch.tensor([*limits, 1], dtype=torch.int64, device=device)
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

    def take(self, rows: Rows, runs: Runs | None, logprob: torch.Tensor) -> None:
        """Keep what the rows that go on gain: their `token`, or runs of tokens whose first was drawn, with
        log-probability [R]; and mark the rows that end with it. Asks the device nothing."""
        on = ~rows.ended
        limit = self.limits[rows.row]
        row, at = torch.where(on, rows.row, rows.nobody), torch.where(on, rows.steps, 0)
        self.logprob[row, at] = logprob
        if self.hidden is not None:
            self.hidden[row, at] = rows.hidden
        if runs is None:
            self.ids[row, at] = rows.token
            last, steps = rows.token, rows.steps + 1
        else:
            place = rows.steps[runs.row] + runs.place
            kept = on[runs.row] & (place < limit[runs.row])
            whose = torch.where(kept, rows.row[runs.row], rows.nobody)
            self.ids[whose, torch.where(kept, place, 0)] = runs.token
            last, steps = runs.token[runs.last], rows.steps + runs.gains
        rows.ended.logical_or_((last == self.collate.end_id) | (steps >= limit))

    def due(self, rows: Rows, asked: bool) -> bool:
        """Whether it is time to look which rows have ended: when asked, where text may end an answer, and
        when all rows are at their limits."""
        full = rows.begun_tokens + rows.length + 1 >= self.most[rows.answer]
        return asked or bool(self.params.stop) or bool((full | rows.gone).all())

    def look(self, rows: Rows) -> None:
        """Hand over the answers that have ended; waits for the device."""
        ended = np.array(rows.ended.tolist()[: rows.n], dtype=bool)
        if self.params.stop:
            stopped = self._stopped(rows)
            rows.ended[: rows.n] |= torch.from_numpy(stopped).to(rows.ended.device)
            ended |= stopped
        self._hand_over(rows, ended)

    def choose(self, rows: Rows, sets: Sequence[torch.Tensor]) -> None:
        """Under a grammar: keep the sets out of which the rows that go on draw."""
        steps = (rows.begun_tokens + rows.length).tolist()
        for i, k, s, over in zip(rows.answer.tolist(), steps, sets, rows.gone.tolist()):
            if not over and len(s) > 1:
                self.choices[i][0].append(k)
                self.choices[i][1].append(s)

    def end(self, rows: Rows, tokens: Sequence[Sequence[int]]) -> None:
        """Hand over the answers that end with these tokens of theirs, by the rule of `take`."""
        steps = rows.begun_tokens + rows.length + [len(t) for t in tokens]
        last = np.array([t[-1] for t in tokens])
        self._hand_over(rows, (last == self.collate.end_id) | (steps >= self.most[rows.answer]))

    def _hand_over(self, rows: Rows, ended: np.ndarray) -> None:
        which = rows.answer[ended & ~rows.gone]
        rows.gone |= ended
        if not len(which):
            return
        index = torch.from_numpy(which).to(self.ids.device, non_blocking=True)
        ids, logprobs = self.ids[index].cpu(), self.logprob[index].cpu()
        for i, sampled, logprob in zip(which.tolist(), ids, logprobs):
            length = int((sampled >= 0).sum())
            self.rollouts[i] = rollout = self._rollout(i, sampled[:length].clone(), logprob[:length].clone())
            if self.on_answer is not None:
                self.on_answer(i, rollout)

    def _stopped(self, rows: Rows) -> np.ndarray:
        """Rows whose text has come to hold a stop string."""
        reach = max(map(len, self.params.stop))  # a token is at least a byte
        found = np.zeros(rows.n, dtype=bool)
        for place in np.flatnonzero(~rows.gone).tolist():
            end = int(rows.begun_tokens[place] + rows.length[place]) + 1
            recent = self.ids[int(rows.answer[place]), max(0, end - 1 - 4 * reach) : end]
            tail = decode(self.collate.tokenizer, recent[recent >= 0].tolist())
            found[place] = any(s in tail for s in self.params.stop)
        return found

    def _rollout(self, i: int, ids: torch.Tensor, logprob: torch.Tensor) -> Rollout:
        hidden = None if self.hidden is None else self.hidden[i, : len(ids)].clone()
        choices = None
        if self.choices:
            at, sets = self.choices[i]
            choices = Choices(torch.tensor(at, dtype=torch.int64), tuple(sets))
        prompt, limit = i // self.group_size, int(self.most[i])
        return ended(self.collate, prompt, ids, logprob, hidden, self.params.stop, choices, limit)

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
    limit: int = 0,
) -> Rollout:
    """The answer of tokens ids [T], at most `limit`, to the prompt of that number;
    its text ends before the first of the `stop` strings."""
    text = decode(collate.tokenizer, ids.tolist())
    stopped = [at for s in stop if (at := text.find(s)) >= 0]
    finished = bool(stopped) or bool(ids[-1] == collate.end_id)
    whole = text[: min(stopped)] if stopped else text
    return Rollout(prompt, ids, logprob, hidden, finished, whole, choices, limit)
