"""Which answers a rank reads in which pass, so that no rank waits for another.

Sharded ranks meet in every layer of every pass: a pass takes as long as that of the rank with most tokens.
So the answers of all ranks are dealt to passes of equal cost, and those that change their rank are sent.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from catmllm.data.prompts import Sample
from catmllm.sample.answers import Rollout
from catmllm.world import World


class Share(NamedTuple):
    """What this rank reads of a step: prompts, answers (whose `prompt` indexes them), their advantages, and
    the answers of each pass. Every rank has equally many passes; one may be empty."""

    prompts: Sequence[Sample]
    rollouts: list[Rollout]
    advantages: np.ndarray
    passes: list[np.ndarray]


def deal(heads: Sequence[int], answers: Sequence[Sequence[int]], bins: int) -> list[list[tuple[int, int]]]:
    """(group, answer) pairs in so many bins of near equal cost.

    answers[g]: the tokens of each answer of group g; heads[g]: those of its prompt, which cost once a bin.
    Long answers go first, so that short ones are left to make ends meet. A bin takes the whole groups that
    fit, and of one more the part that comes nearest: so few prompts are read twice.
    """
    order = [sorted(range(len(group)), key=lambda i: -group[i]) for group in answers]
    # cost[g, j] of the first j + 1 answers that are left of group g, with its prompt; inf where it has fewer
    cost = np.full((len(answers), max(map(len, answers), default=0)), np.inf)
    whole, longest = np.zeros((2, len(answers)))  # of all that is left of a group; of its longest answer

    def take(g: int, count: int) -> list[tuple[int, int]]:
        taken, order[g] = order[g][:count], order[g][count:]
        left = [answers[g][i] for i in order[g]]
        cost[g] = np.inf
        cost[g, : len(left)] = heads[g] + np.cumsum(left)
        whole[g], longest[g] = (heads[g] + sum(left), left[0]) if left else (0, 0)
        return [(g, i) for i in taken]

    for g in range(len(answers)):
        take(g, 0)
    out: list[list[tuple[int, int]]] = []
    for left in range(bins, 0, -1):
        room = whole.sum() / left if left > 1 else np.inf
        taken: list[tuple[int, int]] = []
        while (fits := np.flatnonzero((whole > 0) & (whole <= room))).size:
            g = int(fits[np.argmax(longest[fits])])
            room -= whole[g]
            taken += take(g, len(order[g]))
        off = np.abs(room - cost) if room < np.inf else np.zeros(0)
        if off.size and off.min() < room:
            g, j = divmod(int(off.argmin()), cost.shape[1])
            taken += take(g, j + 1)
        out.append(taken)
    return out


def cut(
    heads: Sequence[int], lengths: Sequence[Sequence[int]], ranks: int, budget: int
) -> list[list[list[tuple[int, int]]]]:
    """[pass][rank] -> (group, answer) pairs: as few passes as keep to the budget (but for an answer that
    alone is longer), every rank with bins of near equal cost in each."""
    total = sum(sum(x) + h for h, x in zip(heads, lengths))
    alone = max((h + max(x) for h, x in zip(heads, lengths)), default=0)

    def cost(bin_: list[tuple[int, int]]) -> int:
        return sum(heads[g] for g in {g for g, _ in bin_}) + sum(lengths[g][i] for g, i in bin_)

    for n in itertools.count(-(-total // (ranks * budget))):
        bins = sorted(deal(heads, lengths, n * ranks), key=cost, reverse=True)
        if not n or cost(bins[0]) <= max(budget, alone):
            return [bins[k * ranks : (k + 1) * ranks] for k in range(n)]
    raise AssertionError("one answer a pass keeps to the budget")


def spread(
    world: World,
    rollouts: Sequence[Rollout],
    advantages: np.ndarray,
    informative: np.ndarray,
    prompts: Sequence[Sample],
    heads: Sequence[int],
    budget: int,
) -> Share:
    """The passes over the informative answers of all ranks, at most `budget` tokens in each, dealt so that
    all cost the same. Collective.

    prompts: those that `Rollout.prompt` indexes, or none where the answers have hidden states; heads: the
    tokens that each prompt costs a pass.
    """
    kept = np.flatnonzero(informative).tolist()
    told = world.gather([(rollouts[i].prompt, len(rollouts[i].ids), heads[rollouts[i].prompt]) for i in kept])
    groups: dict[tuple[int, int], list[tuple[int, int]]] = {}  # (rank, prompt) -> (place, tokens) of answers
    costs = []
    for rank, answers in enumerate(told):
        for place, (prompt, length, head) in enumerate(answers):
            if (rank, prompt) not in groups:
                costs.append(head)
            groups.setdefault((rank, prompt), []).append((place, length))
    lengths = [[length for _, length in group] for group in groups.values()]
    origin = [[(rank, place) for place, _ in group] for (rank, _), group in groups.items()]
    passes = cut(costs, lengths, world.size, budget)
    # Of this rank's own answers, by the rank that reads them: where among its own, and in which pass.
    leaving: list[list[tuple[int, int]]] = [[] for _ in range(world.size)]
    for k, bins in enumerate(passes):
        for reader, bin_ in enumerate(bins):
            for rank, place in (origin[g][i] for g, i in bin_):
                if rank == world.rank:
                    leaving[reader].append((kept[place], k))
    parcels = []
    for some in leaving:
        bare = [(k, replace(rollouts[i], hidden=None), float(advantages[i])) for i, k in some]
        parcels.append((bare, {r.prompt: prompts[r.prompt] for _, r, _ in bare} if prompts else {}))
    arrived = world.trade(parcels)
    hidden: Sequence[torch.Tensor | None] = [None] * sum(len(bare) for bare, _ in arrived)
    if not prompts:
        blank = rollouts[0].hidden
        assert blank is not None
        states = [[h for i, _ in some if (h := rollouts[i].hidden) is not None] for some in leaving]
        sent = world.exchange([torch.cat([blank[:0], *part]) for part in states])
        hidden = torch.cat(sent).split([len(r.ids) for bare, _ in arrived for _, r, _ in bare])
    share: list[Rollout] = []
    passed: list[list[int]] = [[] for _ in passes]
    given: list[float] = []
    number: dict[tuple[int, int], int] = {}
    asked: list[Sample] = []
    for rank, (bare, samples) in enumerate(arrived):
        for k, r, advantage in bare:
            if (rank, r.prompt) not in number:
                number[rank, r.prompt] = len(number)
                asked += [samples[r.prompt]] if samples else []
            passed[k].append(len(share))
            share.append(replace(r, prompt=number[rank, r.prompt], hidden=hidden[len(share)]))
            given.append(advantage)
    # Answers to one prompt stand together, which then is read once.
    mine = [np.array(sorted(one, key=lambda i: share[i].prompt), dtype=np.int64) for one in passed]
    return Share(asked, share, np.array(given), mine)
