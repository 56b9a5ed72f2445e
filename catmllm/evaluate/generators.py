"""Generators that answer the design tasks without the closed loop: what the search must beat.

`evolve` is a population search of the kind of MAGECS: a slab's elements change places, an adsorbate changes
its site, parents exchange one for the other, and a surrogate ranks. The surrogate is the closed loop's own
predictor, with as many predictions. `answers` is of the kind of CrysText: a language model is asked and
answers, with nothing that searches and nothing that holds its text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from random import Random

import numpy as np

from catmllm.config import GAGRPOConfig, SamplingConfig
from catmllm.data.batches import Collator
from catmllm.data.prompts import Sample, design_prompt
from catmllm.design.enumeration import enumerable, ideal_system
from catmllm.design.exemplar_pool import Candidate
from catmllm.design.search import ClosedLoop, Task, make_task, structure_key
from catmllm.evaluate.benchmark import BenchmarkTask, allowed_slabs
from catmllm.models.catalytic_mllm import CatalyticMLLM
from catmllm.sample.answers import answer_limits
from catmllm.sample.engine import RolloutEngine
from catmllm.seeds import Stream, hash_seed
from catmllm.structure.adsorbed import adsorbate_fault
from catmllm.structure.cif import write_cif
from catmllm.structure.formula import parse_identity
from catmllm.structure.system import ADSORBATE, System, make_system

_TRIES = 20  # for a new child with a real adsorbate


@dataclass(frozen=True)
class Member:
    """One of a population: its structure and what was said of it."""

    system: System
    said: Candidate

    @cached_property
    def key(self) -> str:
        """Equal keys are equal structures."""
        return structure_key(self.system)

    @property
    def rank(self) -> tuple[bool, float]:
        """The larger the better: whether it is feasible, then its reward."""
        return self.said.feasible, self.said.reward


def answers(
    model: CatalyticMLLM,
    collate: Collator,
    sampling: SamplingConfig,
    tasks: Sequence[BenchmarkTask],
    n: int,
    seed: int,
) -> dict[str, list[str]]:
    """n answers of the model to each task's prompt, in the order of sampling; to a free task each about
    another random composition that it allows. No exemplar is shown, and no grammar holds them. Tasks that
    allow none have none."""
    asked: list[Task] = []
    open_to = {k: lines for k, task in enumerate(tasks) if (lines := allowed_slabs(task))}
    for k, lines in open_to.items():
        rng = Random(hash_seed(Stream.BENCHMARK_ANSWERS.key(seed, 1, k)))
        asked += [make_task(line, tasks[k].task.energy) for line in rng.choices(lines, k=n)]
    rollouts = RolloutEngine(model, collate).generate(
        [Sample(design_prompt(a.identity, a.energy)) for a in asked],
        replace(sampling, grammar=False),
        Stream.BENCHMARK_ANSWERS.key(seed, 0),
        limits=answer_limits(collate, sampling, [(a.identity, a.target) for a in asked]),
    )
    texts = [r.text for r in rollouts]
    return {tasks[k].name: texts[i * n : (i + 1) * n] for i, k in enumerate(open_to)}


def evolve(
    loop: ClosedLoop, tasks: Sequence[BenchmarkTask], seed: int, decimals: int
) -> dict[str, list[str]]:
    """CIFs of each task in the order of their predictions, as many as the closed loop makes: first ideal
    slabs at random, then generations of children of the best so far, each structure once where another can be
    found in some tries. Tasks of which no ideal slab can be made have none. All tasks advance together."""
    o: GAGRPOConfig = loop.config
    rngs = [Random(hash_seed(Stream.BENCHMARK_EVOLUTION.key(seed, k))) for k in range(len(tasks))]
    open_to = [_open(task) for task in tasks]
    members: list[list[Member]] = [[] for _ in tasks]
    known: list[set[str]] = [set() for _ in tasks]  # keys of all that was tried
    texts: list[list[str]] = [[] for _ in tasks]
    for generation in range(o.iterations + 1):
        made = [
            _generation(members[k], known[k], open_to[k], o, generation, rngs[k]) if open_to[k] else []
            for k in range(len(tasks))
        ]
        owner = [k for k, systems in enumerate(made) for _ in systems]
        flat = [s for systems in made for s in systems]
        written = [write_cif(s, decimals) for s in flat]
        said, _ = loop.judge([tasks[k].asked(text) for k, text in zip(owner, written)], written, generation)
        for k, system, text, candidate in zip(owner, flat, written, said):
            texts[k].append(text)
            members[k].append(Member(system, candidate))
        for k, mine in enumerate(members):  # what a parent is drawn from
            best = sorted(mine, key=lambda m: m.rank, reverse=True)
            members[k] = list({m.key: m for m in best}.values())[: o.initial]
    return {task.name: mine for task, mine in zip(tasks, texts) if mine}


def _open(task: BenchmarkTask) -> list[str]:
    """The identity lines that answers may have and of which ideal slabs can be made."""
    return [identity for identity in allowed_slabs(task) if enumerable(identity) is None]


def _generation(
    members: Sequence[Member],
    known: set[str],
    open_to: Sequence[str],
    config: GAGRPOConfig,
    generation: int,
    rng: Random,
) -> list[System]:
    if generation == 0:
        return [_new(lambda: ideal_system(rng.choice(open_to), rng), known) for _ in range(config.initial)]
    return [_new(lambda: child(members, open_to, rng), known) for _ in range(config.group_size)]


def _new(make: Callable[[], System], known: set[str]) -> System:
    """One with a real adsorbate whose key is not among the known, to which it is added; after many tries the
    last."""
    for _ in range(_TRIES + 1):
        system = make()
        if adsorbate_fault(system) is None and structure_key(system) not in known:
            break
    known.add(structure_key(system))
    return system


def child(members: Sequence[Member], open_to: Sequence[str], rng: Random) -> System:
    """Of a parent by one operator: two atoms of the slab change their elements, or the adsorbate goes to
    another site, or to that of another parent, or (where compositions are free) the slab becomes another."""
    first = _parent(members, rng)
    parent, others = first.system, [m for m in members if m is not first]
    ways = ["permute", "move", *(["cross"] if others else []), *(["exchange"] if len(open_to) > 1 else [])]
    way = rng.choice(ways)
    if way == "permute" and len(parent.slab_counts) > 1:
        return permuted(parent, rng)
    if way == "cross":
        return with_adsorbate(parent, _parent(others, rng).system)
    if way == "exchange":
        near = [i for i in open_to if set(parse_identity(i).slab) & set(parent.slab_counts)] or open_to
        return with_adsorbate(ideal_system(rng.choice(near), rng), parent)
    return with_adsorbate(parent, ideal_system(parent.identity, rng))


def _parent(members: Sequence[Member], rng: Random) -> Member:
    """The better of two at random; members come best first."""
    return members[min(rng.randrange(len(members)), rng.randrange(len(members)))]


def permuted(system: System, rng: Random) -> System:
    """Two slab atoms of different elements have changed places."""
    numbers = system.numbers.copy()
    slab = np.flatnonzero(system.tags != ADSORBATE).tolist()
    first = rng.choice(slab)
    second = rng.choice([k for k in slab if numbers[k] != numbers[first]])
    numbers[[first, second]] = numbers[[second, first]]
    return replace(system, numbers=numbers)


def with_adsorbate(slab: System, giver: System) -> System:
    """The slab of one with the adsorbate of another of the same facet: its anchor at the same place of the
    cell and height above the top layer, its form as it is there."""
    of, on = giver.tags == ADSORBATE, slab.tags != ADSORBATE
    there, here = giver.frac @ giver.lattice, slab.frac @ slab.lattice
    anchor = np.flatnonzero(of)[0]
    height = there[anchor, 2] - there[~of, 2].max() + here[on, 2].max()
    moved = _anchored(giver.frac[anchor], height, slab.lattice) + there[of] - there[anchor]
    return replace(
        make_system(
            slab.lattice,
            np.vstack([here[on], moved]),
            np.concatenate([slab.numbers[on], giver.numbers[of]]),
            np.concatenate([slab.tags[on], giver.tags[of]]),
            giver.adsorbate,
            slab.miller,
        ),
        relaxed=False,
    )


def _anchored(frac: np.ndarray, height: float, lattice: np.ndarray) -> np.ndarray:
    """Å of a place by its first two fractional coordinates and its height; c stands upright."""
    flat = frac[0] * lattice[0] + frac[1] * lattice[1]
    return np.array([flat[0], flat[1], height])
