"""Designs with free metals on test systems: adsorbate, facet and wanted energy are given, and no pair of bulk
and facet that training or validation has may answer.

Beside the closed loop stand ideal slabs: of random allowed compositions, screened by the same predictor or
by kernel ridge regression, and of the loop's own order of slabs, which shows what its CIFs add; and training
slabs with their elements exchanged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from random import Random
from typing import Any

from catmllm.config import Config
from catmllm.data.batches import Collator
from catmllm.data.subsets import learned
from catmllm.design.enumeration import enumerable, ideal_system
from catmllm.design.free import nearest_slabs, search_free
from catmllm.design.predict import predictor_of
from catmllm.evaluate.benchmark import allowed_slabs, benchmark_tasks, ideal_of
from catmllm.evaluate.controls import budgets, sound_analogues
from catmllm.evaluate.design import add_screened, answers_to, design_metrics, judge_answers, screen
from catmllm.models.catalytic_mllm import CatalyticMLLM
from catmllm.seeds import Key, Stream, hash_seed
from catmllm.structure.adsorbed import adsorbate_fault
from catmllm.structure.system import System
from catmllm.world import World


def free_seed(seed: int, rank: int = 0) -> Key:
    """The seed of a rank's search with free metals."""
    return Stream.FREE_SEARCH.key(seed, rank)


def evaluate_free(
    model: CatalyticMLLM,
    collate: Collator,
    config: Config,
    data: Mapping[str, Sequence[System]],
    world: World,
) -> dict[str, Any]:
    """As `evaluate_design`, with the metals free."""
    e = config.evaluate
    tasks = [t for t in benchmark_tasks(data, e.free_tasks, config.seed) if t.kind == "free"]
    data = learned(data, config.data)
    places = range(len(tasks))[world.rank :: world.size]
    mine = [tasks[k] for k in places]
    asked, limits = [t.task for t in mine], budgets(config)
    predictor = predictor_of(config, world.device) or (model, collate)
    slabs, seed = [allowed_slabs(t) for t in mine], free_seed(config.seed, world.rank)
    states = search_free(model, collate, config, asked, slabs, seed, world.main, predictor, data["train"])
    order, n = nearest_slabs(predictor, asked, slabs), limits[-1]
    ideal = [ideal_of(t, n, config.seed, k) for k, t in zip(places, mine)]
    ordered = [ideal_ordered(lines, n, config.seed, k) for k, lines in zip(places, order)]
    known = sound_analogues(slabs, asked, data["train"], n)
    items: list[dict[str, Any]] = []
    systems: list[System | None] = []
    for state, at_random, in_order, others in zip(
        states,
        screen(predictor, config, ideal, asked, data),
        screen(predictor, config, ordered, asked, None, "ordered"),
        screen(predictor, config, known, asked, None, "analogues"),
    ):
        item, chosen = answers_to(state, at_random, limits)
        systems += chosen + add_screened(item, in_order, limits) + add_screened(item, others, limits)
        items.append(item)
    if e.judge != "none":
        judge_answers(e.judge, items, systems, progress=world.main)
    items = [item for part in world.gather(items) for item in part]
    return design_metrics(items, limits, data["train"], config)


def ideal_ordered(lines: Sequence[str], n: int, seed: int, place: int) -> list[System]:
    """n random ideal slabs with a real adsorbate, of the identity lines in turn; none where none can be
    made."""
    rng = Random(hash_seed(Stream.FREE_CONTROLS.key(seed, place)))
    turn = cycle([line for line in lines if enumerable(line) is None])
    found: list[System] = []
    for line in turn:
        system = ideal_system(line, rng)
        while adsorbate_fault(system) is not None:
            system = ideal_system(line, rng)
        found.append(system)
        if len(found) == n:
            break
    return found
