"""Two generators without a language model that answer the design tasks: what the search must beat.

`evolve` is a population search of the kind of MAGECS: a slab's elements change places, an adsorbate changes
its site, parents exchange one for the other, and a surrogate ranks. The surrogate is the closed loop's own
predictor, with as many predictions. `transmuted` needs no search: the training slabs of the adsorbate and the
facet that are nearest to what is asked for, their elements exchanged and their cells scaled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from random import Random

import numpy as np

from catmllm.config import GAGRPOConfig
from catmllm.data.fcc_slabs import FCC_CONSTANT
from catmllm.design.enumeration import enumerable, ideal_system
from catmllm.design.exemplar_pool import Candidate
from catmllm.design.search import ClosedLoop
from catmllm.evaluate.benchmark import BenchmarkTask, allowed_slabs
from catmllm.seeds import Stream, hash_seed
from catmllm.structure.adsorbed import adsorbate_fault
from catmllm.structure.cif import write_cif
from catmllm.structure.elements import NUMBER
from catmllm.structure.formula import format_identity, parse_identity
from catmllm.structure.system import ADSORBATE, System, make_system

_TRIES = 20  # for a child with a real adsorbate


@dataclass(frozen=True)
class Member:
    """One of a population: its structure and what was said of it."""

    system: System
    said: Candidate

    @property
    def rank(self) -> tuple[bool, float]:
        """The larger the better: whether it is feasible, then its reward."""
        return self.said.feasible, self.said.reward


def evolve(
    loop: ClosedLoop, tasks: Sequence[BenchmarkTask], seed: int, decimals: int
) -> dict[str, list[str]]:
    """CIFs of each task in the order of their predictions, as many as the closed loop makes: first ideal
    slabs at random, then generations of children of the best so far. Tasks of which no ideal slab can be made
    have none. All tasks advance together."""
    o: GAGRPOConfig = loop.config
    rngs = [Random(hash_seed(Stream.BENCHMARK_EVOLUTION.key(seed, k))) for k in range(len(tasks))]
    open_to = [_open(task) for task in tasks]
    members: list[list[Member]] = [[] for _ in tasks]
    texts: list[list[str]] = [[] for _ in tasks]
    for generation in range(o.iterations + 1):
        made = [
            _generation(members[k], open_to[k], o, generation, rngs[k]) if open_to[k] else []
            for k in range(len(tasks))
        ]
        owner = [k for k, systems in enumerate(made) for _ in systems]
        flat = [s for systems in made for s in systems]
        written = [write_cif(s, decimals) for s in flat]
        said, _ = loop.judge([tasks[k].asked(text) for k, text in zip(owner, written)], written, generation)
        for k, system, text, candidate in zip(owner, flat, written, said):
            texts[k].append(text)
            members[k].append(Member(system, candidate))
        for mine in members:  # what a parent is drawn from
            mine.sort(key=lambda m: m.rank, reverse=True)
            del mine[o.initial :]
    return {task.name: mine for task, mine in zip(tasks, texts) if mine}


def _open(task: BenchmarkTask) -> list[str]:
    """The identity lines that answers may have and of which ideal slabs can be made."""
    identities = allowed_slabs(task) if task.metals else [task.task.identity]
    return [identity for identity in identities if enumerable(identity) is None]


def _generation(
    members: Sequence[Member], open_to: Sequence[str], config: GAGRPOConfig, generation: int, rng: Random
) -> list[System]:
    if generation == 0:
        return [_sound(lambda: ideal_system(rng.choice(open_to), rng)) for _ in range(config.initial)]
    return [_sound(lambda: child(members, open_to, rng)) for _ in range(config.group_size)]


def _sound(make: Callable[[], System]) -> System:
    """One with a real adsorbate, or after many tries the last."""
    system = make()
    for _ in range(_TRIES):
        if adsorbate_fault(system) is None:
            break
        system = make()
    return system


def child(members: Sequence[Member], open_to: Sequence[str], rng: Random) -> System:
    """Of a parent by one operator: two atoms of the slab change their elements, or the adsorbate goes to
    another site, or to that of another parent, or (where compositions are free) the slab becomes another."""
    parent = _parent(members, rng).system
    ways = ["permute", "move", "cross", *(["exchange"] if len(open_to) > 1 else [])]
    way = rng.choice(ways)
    if way == "permute" and len(parent.slab_counts) > 1:
        return permuted(parent, rng)
    if way == "cross":
        return with_adsorbate(parent, _parent(members, rng).system)
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


# Retrieval


def transmuted(task: BenchmarkTask, train: Sequence[System], n: int) -> list[System]:
    """The n nearest training slabs of the adsorbate and facet as what the task asks for: those of which
    fewest atoms change their element come first, then those whose energy is nearest. Fewer where no more can
    become it: a slab of 9 and 3 atoms has no composition of 6 and 6."""
    asked = parse_identity(task.task.identity)
    same = [s for s in train if (s.adsorbate, s.miller) == (asked.adsorbate, asked.miller)]
    identities = allowed_slabs(task) if task.metals else [task.task.identity]
    wanted = [w for i in identities if set(w := parse_identity(i).slab) <= set(FCC_CONSTANT)]
    ranked = sorted(
        (
            (sum(count for old, count in s.slab_counts.items() if names[old] != old), off, k, names)
            for k, s in enumerate(same)
            if set(s.slab_counts) <= set(FCC_CONSTANT)
            for off in (abs(s.known_energy - task.task.energy),)
            for slab in wanted
            for names in renamings(s.slab_counts, slab)
        ),
        key=lambda row: row[:3],
    )
    return [exchanged(same[k], names) for _, _, k, names in ranked[:n]]


def renamings(old: dict[str, int], new: dict[str, int]) -> Iterator[dict[str, str]]:
    """Every way to give the metals of a slab other names so that it has the composition `new`."""
    if len(new) == 1:
        (metal, count), total = *new.items(), sum(old.values())
        if count == total:
            yield dict.fromkeys(old, metal)
        return
    if len(old) == len(new):
        for names in permutations(new):
            if all(old[metal] == new[name] for metal, name in zip(old, names)):
                yield dict(zip(old, names))


def exchanged(system: System, names: dict[str, str]) -> System:
    """The slab of other metals, scaled by the mean of their lattice constants over that of its own, the
    vacuum as high as it was; an adsorbate keeps its form, its anchor its height above the slab."""
    numbers = system.numbers.copy()
    slab = system.tags != ADSORBATE
    symbols = [s for s, of in zip(system.symbols, slab) if of]
    numbers[slab] = [NUMBER[names[s]] for s in symbols]
    scale = float(np.mean([FCC_CONSTANT[names[s]] for s in symbols])) / float(
        np.mean([FCC_CONSTANT[s] for s in symbols])
    )
    positions, lattice = system.frac @ system.lattice, system.lattice.copy()
    thick = float(np.ptp(positions[slab, 2]))
    lattice[:2] *= scale
    lattice[2] *= 1 + (scale - 1) * thick / lattice[2, 2]
    anchor = positions[~slab][0]
    top = positions[slab, 2].max()
    moved = np.array([*(anchor[:2] * scale), top * scale + anchor[2] - top])
    positions[~slab] += moved - anchor
    positions[slab] *= scale
    made = make_system(lattice, positions, numbers, system.tags, system.adsorbate, system.miller)
    return replace(made, relaxed=False, sid=format_identity(made.adsorbate, made.slab_counts, made.miller))
