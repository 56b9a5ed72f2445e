"""Random numbers of a run by named streams, from one table, so that no two of its draws share theirs.

What is drawn is a function of a key: the stream, the run's seed, and the place in the stream (a step, a rank,
a position). So no state of a generator has to be saved, and neither ranks nor workers nor passes change what
is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum, unique

import numpy as np

Key = tuple[int, ...]


@unique
class Stream(IntEnum):
    """What draws, and in brackets the places in it. A number is never used again for something else."""

    WEIGHTS = 1  # random weights of a new model
    ADAPTERS = 2  # ... of adapters
    DROPOUT = 3  # whatever a pass draws [step, rank]
    ALIGN_ORDER = 4  # which system comes when [epoch]
    JOINT_ORDER = 5  # [epoch], of property samples [1, epoch]
    JOINT_SAMPLES = 6  # task, symmetry, noise, words of a CIF or design [place], a property sample [place, 1]
    INSTRUCT_ORDER = 7  # as JOINT_ORDER
    INSTRUCT_SAMPLES = 8  # as JOINT_SAMPLES
    GRPO_ORDER = 9  # [epoch]
    GRPO_PROMPTS = 10  # [step, place in the batch of all ranks]
    GRPO_ANSWERS = 11  # [step, rank]
    REPLAY_ORDER = 12  # [epoch]
    REPLAY_SAMPLES = 13  # [step, place in the batch of all ranks]
    GA_GRPO_TASKS = 14  # [epoch]
    GA_GRPO_SEARCH = 15  # answers [step, rank, 0 or 1], exemplars [step, rank, 1, task]
    GENERATION = 16  # answers of the evaluation [rank]
    DESIGN_TASKS = 17  # of the evaluation
    DESIGN_SEARCH = 18  # of the evaluation; as GA_GRPO_SEARCH [rank, ...]
    COMMAND_SEARCH = 19  # `catmllm design` [...]
    BOOTSTRAP = 20  # rows of an interval
    ENCODER_ORDER = 21  # [epoch]
    ENCODER_SAMPLES = 22  # frame, symmetry and noise of a sample [position]
    DESIGN_CONTROLS = 23  # ideal slabs beside a search [task]
    GRPO_VALIDATION = 24  # answers [rank]
    GA_GRPO_VALIDATION = 25  # as GA_GRPO_SEARCH [rank, ...]
    GRPO_REFILL_ORDER = 27  # as GRPO_ORDER, GRPO_PROMPTS and GRPO_ANSWERS, of further rounds [step, round, …]
    GRPO_REFILL_PROMPTS = 28
    GRPO_REFILL_ANSWERS = 29
    PERMUTED_ENERGIES = 31  # which system has whose, of a control
    NETWORK_BASELINES = 26  # first weights, batches and frames
    MISSING = 40  # indicative CIFs of the evaluation [rank, 0], random systems [pair, 1]
    COMMAND_INDICATIVE = 41  # CIFs of `catmllm predict`
    BENCHMARK_ROWS = 42  # ideal slabs for a free task [task, 0], training systems for any [task, 1]
    FREE_SEARCH = 43  # answers of the evaluation with free metals [rank, iteration], exemplars [..., task]
    FREE_CONTROLS = 44  # ideal slabs beside it in the order of its slabs [task]
    SLAB_TASKS = 45  # which test slabs are asked for; arrangements of metals in slabs that answer [task, arm]
    BENCHMARK_ANSWERS = 70  # of a model [0], compositions that it is asked for [1, task]
    BENCHMARK_EVOLUTION = 71  # first members, parents and children of a task [task]
    DIFFUSION_BASELINE = 72  # weights, batches and noise [0], compositions that are free [1, task]
    CLOSED_FORM = 73  # the systems of a step by which its kernel is learned
    TEXT_BASELINES = 81  # first weights, batches and dropout [0: plain, 1: with pairs before]

    def key(self, seed: int, *place: int) -> Key:
        """What a draw is a function of; further places may be appended to it."""
        return (int(self), seed, *place)


def hash_seed(parts: Sequence[int]) -> int:
    """A key, or any integers, as one 63-bit seed, well mixed."""
    return int(np.random.SeedSequence(_entropy(parts)).generate_state(1, np.uint64)[0] >> 1)


def generator(key: Sequence[int]) -> np.random.Generator:
    """NumPy's generator of a key."""
    return np.random.default_rng(_entropy(key))


def _entropy(parts: Sequence[int]) -> list[int]:
    # With their number in front: to NumPy [3] and [3, 0] are one seed.
    return [len(parts), *(p & 0xFFFFFFFF for p in parts)]
