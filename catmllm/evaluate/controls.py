"""What a search for designs must beat: ideal slabs of the asked composition, under the same constraints, and
training slabs with their elements exchanged.

One of them at random needs no model at all. The best of many by the search's own predictor, with as many
predictions as the search has, shows what the search adds; the best by kernel ridge regression, what the
predictor does.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import numpy as np
from numpy.typing import ArrayLike

from catmllm.config import Config, GAGRPOConfig
from catmllm.design.analogues import analogues
from catmllm.design.enumeration import enumerable, ideal_system
from catmllm.design.predict import Predictor, energies_and_errors, question
from catmllm.design.reward import distances
from catmllm.design.search import Task
from catmllm.seeds import Stream, hash_seed
from catmllm.structure.adsorbed import adsorbate_fault
from catmllm.structure.system import System

_TRIES = 20  # for each candidate; on the shipped systems the first has always been sound


def budgets(config: Config) -> list[int]:
    """Numbers of predictions at which success is told, ascending: one, those of the configuration, and all
    that the closed loop makes for a task."""
    loop = config.ga_grpo
    whole = loop.initial + loop.iterations * loop.group_size
    return sorted({1, whole, *(b for b in config.evaluate.budgets if b < whole)})


def ideal_candidates(task: Task, n: int, seed: int, place: int) -> list[System]:
    """n random ideal slabs of the asked composition with a real adsorbate, by a seed and the number of the
    task; none where `enumerable` says why, or where too few of many are sound."""
    if enumerable(task.identity):
        return []
    rng = Random(hash_seed(Stream.DESIGN_CONTROLS.key(seed, place)))
    found: list[System] = []
    for _ in range(_TRIES * n):
        system = ideal_system(task.identity, rng)
        if adsorbate_fault(system) is None:
            found.append(system)
            if len(found) == n:
                return found
    return []


def sound_analogues(
    slabs: Sequence[Sequence[str]], tasks: Sequence[Task], known: Sequence[System], n: int
) -> list[list[System]]:
    """`analogues` of each task's slabs (identity lines), at most n, that have a real adsorbate."""
    found = analogues(slabs, [t.energy for t in tasks], known, n)
    return [[s for s in some if adsorbate_fault(s) is None] for some in found]


def ideal_controls(
    predictor: Predictor, config: GAGRPOConfig, tasks: Sequence[Task], n: int, seed: int
) -> list[dict[str, tuple[System, float]]]:
    """For each task, with their energies by the predictor: `random` one ideal slab, `enumeration` of n the
    one that is nearest to the wanted energy, as the closed loop counts it. Neither where no ideal slab can be
    made."""
    ideal = [ideal_candidates(task, n, seed, k) for k, task in enumerate(tasks)]
    flat = [question(s) for slabs in ideal for s in slabs]
    said = np.stack(energies_and_errors(*predictor, flat, batch_size=128))
    ends = np.cumsum([len(slabs) for slabs in ideal])[:-1]
    found = []
    for task, slabs, (mine, errors) in zip(tasks, ideal, np.split(said, ends, axis=1)):
        picks = closest(distances(mine, task.energy, errors, config), [1, n]) if slabs else []
        found.append({name: (slabs[k], float(mine[k])) for name, k in zip(("random", "enumeration"), picks)})
    return found


def closest(distance: ArrayLike, limits: Sequence[int]) -> list[int]:
    """Of the first b of distances [n] from a target, for each b of `limits`, the place of the least."""
    distance = np.asarray(distance, dtype=np.float64)
    return [int(np.argmin(distance[:b])) for b in limits]
