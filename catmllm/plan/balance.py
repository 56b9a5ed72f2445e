"""How long ranks wait for each other in a stage, simulated by the trainer's own dealing.

Sharded ranks meet in every layer of every pass, so a pass takes as long as the rank whose part of it costs
most. A step takes the sum of that over its passes. Its ratio to the mean rank's is 1 at best.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from catmllm.config import Config
from catmllm.data.batches import Collator
from catmllm.data.loader import PACKS, cut
from catmllm.data.open import texts_only
from catmllm.data.prompts import Sample, cif_prompt, cif_sample, design_sample, property_sample
from catmllm.plan.made_up import qwen_like_tokenizer
from catmllm.stages import deal
from catmllm.structure.system import System
from catmllm.structure.text import three_part_text


class Costs:
    """What the samples cost that systems become: tokens, and for an atom of a shown structure as many as
    `atom_tokens` of the stage says."""

    def __init__(self, systems: Sequence[System], config: Config) -> None:
        self.systems, self.texts = systems, texts_only(systems)
        tokenizer = qwen_like_tokenizer(systems, config.data.decimals)
        self.collate = Collator(tokenizer, replace(config.data, images=False))
        self.atoms = np.array([0 if self.texts else len(s) for s in systems])

    def tokens(self, sample: Callable[[System], Sample]) -> np.ndarray:
        return np.array([self.collate.encoded(sample(s)).length for s in self.systems])

    @functools.cached_property
    def text(self) -> np.ndarray:
        return self.tokens(lambda s: Sample(three_part_text(s)))

    @functools.cached_property
    def property(self) -> np.ndarray:
        return self.tokens(property_sample)

    @functools.cached_property
    def cif(self) -> np.ndarray:
        return self.tokens(cif_sample)

    @functools.cached_property
    def design(self) -> np.ndarray:
        return self.tokens(lambda s: design_sample(s, None))

    @functools.cached_property
    def prompt(self) -> np.ndarray:
        return np.array([len(self.collate.encode(cif_prompt(s.identity))) for s in self.systems])

    @functools.cached_property
    def answer(self) -> np.ndarray:
        return self.cif - self.prompt

    def supervised(self, stage: str, config: Config, n: int, rng: np.random.Generator) -> np.ndarray:
        """Costs [n] of the samples of a supervised stage, in their order. Of `encoder`, where no token is
        read, atoms."""
        o: Any = getattr(config, stage)
        i = rng.integers(len(self.systems), size=n)
        if stage == "encoder":
            return self.atoms[i].astype(float)
        atoms = o.atom_tokens * self.atoms[i]
        if stage == "align":
            return self.text[i] + atoms
        asks = rng.random(n) < o.property_share
        seen = rng.random(n) >= o.drop_graph
        asked = self.property[i] + atoms * seen
        if self.texts:
            return asked
        return np.where(
            asks, asked, np.where(rng.random(n) < 1 - o.designs_of_rest, self.cif[i], self.design[i])
        )


def ratio(load: np.ndarray) -> float:
    """Of the slowest rank to the mean: load [passes, ranks]."""
    return float(load.max(1).sum() / load.mean(1).sum())


def waiting(costs: Costs, config: Config, stage: str, ranks: int, seed: int = 0) -> float:
    """The time of the slowest rank over the mean rank's, 1 or more, with systems drawn with repetition."""
    return (_updates if stage in ("grpo", "ga_grpo") else _supervised)(costs, config, stage, ranks, seed)


def _supervised(costs: Costs, config: Config, stage: str, ranks: int, seed: int) -> float:
    """Over 64 batches of each rank, or as many packs; each rank has windows of its own."""
    o: Any = getattr(config, stage)
    rng = np.random.default_rng([seed, ranks])
    n = PACKS * o.batch_size
    if o.batch_tokens is not None:
        mean = costs.supervised(stage, config, 1024, np.random.default_rng(seed)).mean()
        n = max(1, round(PACKS * o.batch_tokens / mean))
    sizes = costs.supervised(stage, config, ranks * n, rng).reshape(ranks, n)
    loads = []
    for mine in sizes:
        together = o.batch_tokens is not None or o.dealt
        windows = [mine] if together else mine.reshape(PACKS, o.batch_size)
        loads.append(
            [
                w[group].sum()
                for w in windows
                for group in cut(w.round().astype(int).tolist(), o.accumulate, o.batch_tokens, o.dealt)
            ]
        )
    least = min(map(len, loads))  # of packs one rank may have one more, which meets the others' next window
    return ratio(np.array([load[:least] for load in loads]).T)


def _updates(costs: Costs, config: Config, stage: str, ranks: int, seed: int) -> float:
    """Of one update: the answers of a group are as long as their system's CIF, give or take a token a number,
    since composition and form are given. GA-GRPO reads no prompts: hidden states are kept."""
    o: Any = getattr(config, stage)
    rng = np.random.default_rng([seed, ranks, 1])
    i = rng.integers(len(costs.systems), size=ranks * o.batch_size)
    lengths = [(costs.answer[s] + rng.integers(0, 7, o.group_size)).tolist() for s in i]
    heads = [int(costs.prompt[s]) if stage == "grpo" else 0 for s in i]
    if o.batch_tokens is not None:
        passes = deal.cut(heads, lengths, ranks, o.batch_tokens)
    else:
        passes = _own(lengths, ranks, o.batch_size, o.micro_batch)

    def cost(answers: Sequence[tuple[int, int]]) -> int:
        return sum(heads[g] for g in {g for g, _ in answers}) + sum(lengths[g][j] for g, j in answers)

    return ratio(np.array([[cost(one) for one in of_ranks] for of_ranks in passes]))


def _own(
    lengths: Sequence[Sequence[int]], ranks: int, groups: int, micro_batch: int
) -> list[list[list[tuple[int, int]]]]:
    """[pass][rank] -> (group, answer) where every rank reads its own, equally many in each pass."""
    own = [
        [(g, j) for g in range(r * groups, (r + 1) * groups) for j in range(len(lengths[g]))]
        for r in range(ranks)
    ]
    n = -(-len(own[0]) // micro_batch)
    parts = [np.array_split(np.arange(len(mine)), n) for mine in own]
    return [[[own[r][k] for k in parts[r][p]] for r in range(ranks)] for p in range(n)]
