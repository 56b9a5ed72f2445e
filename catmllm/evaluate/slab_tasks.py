"""Slabs for the energies of their best sites: adsorbates, facet and energies are given, the metals free.

What a catalyst does is mostly told by where adsorbates bind most firmly. So an answer is a slab without an
adsorbate, and its energy is the lowest of those that relaxations from its different sites end at. The wanted
energies are those of test slabs, judged alike, so that each task has an answer. No pair of bulk and facet
that training or validation has may answer. Every arm predicts slab after slab, each adsorbate on all its
ideal sites; they differ in the order of slabs or in the predictor, and so many slabs are its budget.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from catmllm.config import Config
from catmllm.data.batches import Collator
from catmllm.data.oracle import POTENTIALS
from catmllm.data.subsets import learned
from catmllm.design.analogues import analogues
from catmllm.design.enumeration import enumerable, ideal_slab, on_sites
from catmllm.design.free import text_energies
from catmllm.design.predict import Predictor, energies_and_errors, predictor_of, question
from catmllm.design.reward import distances
from catmllm.design.search import make_task, structure_key
from catmllm.evaluate.baselines import FRAMES, KernelRidge, some
from catmllm.evaluate.benchmark import allowed_slabs, free_rules, free_task
from catmllm.evaluate.controls import budgets, closest
from catmllm.evaluate.design import JUDGES, design_curves
from catmllm.evaluate.judges import Judge
from catmllm.models.catalytic_mllm import CatalyticMLLM
from catmllm.seeds import Stream, generator, hash_seed
from catmllm.structure.formula import SEPARATOR
from catmllm.structure.system import ADSORBATE, System
from catmllm.world import World

Floats = NDArray[np.float64]

LEAST = 3  # labels of an adsorbate on a training surface from which the lowest is that of its best site


@dataclass(frozen=True)
class Lowest:
    """What a judge says of an adsorbate on a slab. energy: the lowest adsorption energy (eV) of the starts
    that count, nan where none does; sites: how many starts there were; left_out: of those that do not count,
    how many for which reason (`JudgedEnergy`)."""

    energy: float
    sites: int
    left_out: dict[str, int]


def lowest_energies(
    judge: Judge, asked: Sequence[tuple[System, str]], progress: bool = False
) -> list[Lowest]:
    """Of each slab without an adsorbate, and name of one, the adsorption energy of the best of the different
    sites: the adsorbate relaxes from each of `on_sites`. Equal ones are judged once."""
    keys = [(structure_key(slab), adsorbate) for slab, adsorbate in asked]
    starts = {key: on_sites(slab, adsorbate) for key, (slab, adsorbate) in zip(keys, asked)}
    verdicts = iter(judge.judge_many([s for each in starts.values() for s in each], progress=progress))
    found = {}
    for key, each in starts.items():
        mine = [next(verdicts) for _ in each]
        counted = [v.energy for v in mine if v.ok]
        reasons = Counter(v.reason for v in mine if v.reason is not None)
        found[key] = Lowest(min(counted, default=float("nan")), len(mine), dict(reasons))
    return [found[key] for key in keys]


@dataclass(frozen=True)
class SlabTask:
    """surface: a test slab on its ideal lattice, an answer that is known; wanted: energies (eV) by adsorbate;
    lines: the slabs that may answer, as identities `Pt9Cu3 (1 1 1)`."""

    surface: System
    wanted: Mapping[str, float]
    lines: Sequence[str]

    @property
    def identity(self) -> str:
        return SEPARATOR.join([" + ".join(self.wanted), self.surface.identity.partition(SEPARATOR)[2]])


def pick_slabs(test: Sequence[System], n: int, seed: int) -> list[System]:
    """n test systems whose slabs can be built, in a seeded order, as spread over pairs of bulk and facet as
    can be."""
    order = generator(Stream.SLAB_TASKS.key(seed)).permutation(len(test))
    seen: Counter[Any] = Counter()
    ranked = []
    for place, system in enumerate(test[int(i)] for i in order):
        if enumerable(system.identity) is None:
            pair = system.bulk, system.miller
            ranked.append((seen[pair], place, system))
            seen[pair] += 1
    return [system for _, _, system in sorted(ranked, key=lambda row: row[:2])[:n]]


def bare(system: System) -> System:
    """A system's slab without its adsorbate."""
    slab = system.tags != ADSORBATE
    numbers, tags = system.numbers[slab], system.tags[slab]
    return replace(
        system, frac=system.frac[slab], numbers=numbers, tags=tags,
        adsorbate="", energy=None, start=None, relaxed=False,
    )  # fmt: skip


def make_tasks(
    judge: Judge,
    picks: Sequence[System],
    adsorbates: Sequence[Sequence[str]],
    data: Mapping[str, Sequence[System]],
    progress: bool = False,
) -> list[SlabTask | None]:
    """Of each picked system's slab the task with its energies of the adsorbates [n]; None where the judge
    has none of one, or no other slab is allowed."""
    # its own arrangement on the ideal lattice, where candidates are too
    slabs = [replace(ideal_slab(s.identity, Random(0)), numbers=bare(s).numbers) for s in picks]
    asked = [(slab, name) for slab, names in zip(slabs, adsorbates) for name in names]
    judged = iter(lowest_energies(judge, asked, progress))
    rules = free_rules(data)
    tasks: list[SlabTask | None] = []
    for system, slab, names in zip(picks, slabs, adsorbates):
        wanted = {name: next(judged).energy for name in names}
        allowed = allowed_slabs(free_task("", make_task(system.identity, 0.0), rules))
        lines = [line.partition(SEPARATOR)[2] for line in allowed if enumerable(line) is None]
        told = all(np.isfinite(energy) for energy in wanted.values())
        tasks.append(SlabTask(slab, wanted, lines) if told and lines else None)
    return tasks


# --------------------------------------------------------------------------- the order of slabs


def lowest_labels(train: Sequence[System]) -> list[System]:
    """Of each adsorbate on a bulk and facet with `LEAST` labels or more the system of the lowest energy."""
    groups: dict[Any, list[System]] = defaultdict(list)
    for system in train:
        groups[system.adsorbate, system.bulk, system.miller].append(system)
    return [min(g, key=lambda s: s.known_energy) for g in groups.values() if len(g) >= LEAST]


def text_shifts(predictor: Predictor, lowest: Sequence[System]) -> dict[str, float]:
    """By adsorbate how much `lowest_labels` are above what the model says of their two-part texts, on average
    (eV): a text is one of all sites, so its energy is that of a common one and not of the best."""
    said = text_energies(predictor, [s.identity for s in lowest])
    off: dict[str, list[float]] = defaultdict(list)
    for system in lowest:
        off[system.adsorbate].append(system.known_energy - said[system.identity])
    return {name: float(np.mean(values)) for name, values in off.items()}


def in_order(predictor: Predictor, tasks: Sequence[SlabTask], shifts: Mapping[str, float]) -> list[list[str]]:
    """Of each task its lines in the order of how far the energies of their two-part texts, shifted, are from
    the wanted ones; of several adsorbates the one that is furthest off counts."""
    every = [SEPARATOR.join((name, line)) for t in tasks for name in t.wanted for line in t.lines]
    said = text_energies(predictor, every)

    def off(task: SlabTask, line: str) -> float:
        return max(
            abs(said[SEPARATOR.join((name, line))] + shifts.get(name, 0.0) - energy)
            for name, energy in task.wanted.items()
        )

    return [sorted(t.lines, key=lambda line, t=t: off(t, line)) for t in tasks]  # type: ignore[misc]


def built(lines: Sequence[str], n: int, rng: Random) -> list[System]:
    """n ideal slabs of the lines in turn, each arrangement random."""
    # an identity names an adsorbate; which one is the same to a slab
    return [ideal_slab(SEPARATOR.join(("O", line)), rng) for line in islice(cycle(lines), n)]


def exchanged(task: SlabTask, lowest: Sequence[System], n: int) -> list[System]:
    """Training slabs whose lowest label is nearest to the wanted energy, as slabs of the task (`analogues`);
    none where energies of several adsorbates are wanted, which no system has."""
    if len(task.wanted) > 1:
        return []
    ((name, energy),) = task.wanted.items()
    lines = [SEPARATOR.join((name, line)) for line in task.lines]
    return [bare(s) for s in analogues([lines], [energy], lowest, n)[0]]


# --------------------------------------------------------------------------- predictions and answers


def screen_slabs(
    predictor: Predictor,
    config: Config,
    ridge: KernelRidge | None,
    slabs: Sequence[System],
    task: SlabTask,
) -> tuple[Floats, dict[str, Floats]]:
    """Of slabs [n] the predicted energies of the best ideal sites [n, adsorbates] (eV), and how far each is
    from the task, by the predictor (`own`: as the closed loop counts distances) and by ridge; of several
    adsorbates the one that is furthest off counts."""
    starts = [on_sites(slab, name) for slab in slabs for name in task.wanted]
    flat = [s for each in starts for s in each]
    ends = np.cumsum([len(each) for each in starts])[:-1]
    shape = (len(slabs), len(task.wanted))
    wanted = np.array(list(task.wanted.values()))
    energies, errors = energies_and_errors(*predictor, [question(s) for s in flat], batch_size=128)
    best = [int(np.argmin(part)) for part in np.split(energies, ends)] if slabs else []
    mine, theirs = (
        np.array([p[k] for p, k in zip(np.split(x, ends), best)]).reshape(shape) for x in (energies, errors)
    )
    found = {"own": distances(mine, wanted, theirs, config.ga_grpo).max(axis=1, initial=0.0)}
    if ridge is not None:
        low = np.array([p.min() for p in np.split(ridge.predict(flat), ends)]).reshape(shape)
        found["ridge"] = np.abs(low - wanted).max(axis=1, initial=0.0)
    return mine, found


def furthest(energies: Sequence[float], wanted: Mapping[str, float]) -> float:
    """How far above the wanted energy (eV) that of the adsorbate is that is furthest off; nan where one has
    none."""
    off = np.array(energies) - np.array(list(wanted.values()))
    return float("nan") if np.isnan(off).any() else float(off[np.argmax(np.abs(off))])


def answers_of(
    task: SlabTask, slabs: Sequence[System], energies: Floats, distance: Floats, limits: Sequence[int]
) -> tuple[list[dict[str, Any]], list[System]]:
    """What is answered after each number of slabs, and the slabs chosen. `predicted` is `furthest`, as
    `design_curves` counts with a wanted energy of 0."""
    picks = closest(distance, limits) if len(slabs) else []
    found = [
        {
            "slab": slabs[k].slab_formula,
            "energies": energies[k].tolist(),
            "predicted": furthest(energies[k], task.wanted),
            "feasible": True,
        }
        for k in picks
    ]
    return found, [slabs[k] for k in picks]


def search_slabs(
    predictor: Predictor,
    config: Config,
    tasks: Mapping[int, SlabTask],
    train: Sequence[System],
    ridge: KernelRidge,
) -> list[tuple[dict[str, Any], list[System]]]:
    """Of each task, by its number in the run, its record with every arm's answers, and the slabs of these
    answers in turn."""
    limits = budgets(config)
    n, lowest = limits[-1], lowest_labels(train)
    order = in_order(predictor, list(tasks.values()), text_shifts(predictor, lowest))
    done = []
    for (place, task), lines in zip(tasks.items(), order):
        rngs = [Random(hash_seed(Stream.SLAB_TASKS.key(config.seed, place, arm))) for arm in (0, 1)]
        shuffled = rngs[1].sample(lines, len(lines))
        arms = {
            "search": built(lines, n, rngs[0]),
            "enumeration": built(shuffled, n, rngs[1]),
            "analogues": exchanged(task, lowest, n),
        }
        truth, _ = screen_slabs(predictor, config, None, [task.surface], task)
        item: dict[str, Any] = {
            "identity": task.identity,
            "wanted": dict(task.wanted),
            "energy": 0.0,  # from which `predicted` and `judged` count
            "known": truth[0].tolist(),
            "answers": {},
        }
        chosen: list[System] = []
        for arm, slabs in arms.items():
            by = ridge if arm == "enumeration" else None
            energies, far = screen_slabs(predictor, config, by, slabs, task)
            for method, one in ((arm, "own"), ("kernel_ridge", "ridge")):
                if one in far:
                    item["answers"][method], mine = answers_of(task, slabs, energies, far[one], limits)
                    chosen += mine
        done.append((item, chosen))
    return done


def judge_slabs(
    judge: Judge, items: Sequence[dict[str, Any]], slabs: Sequence[System], progress: bool = False
) -> None:
    """The word of a judge on every answer, whose slabs are given in turn."""
    answers = [(i, a) for i in items for each in i["answers"].values() for a in each]
    asked = [(slab, name) for (item, _), slab in zip(answers, slabs, strict=True) for name in item["wanted"]]
    said = iter(lowest_energies(judge, asked, progress))
    for item, answer in answers:
        lows = [next(said) for _ in item["wanted"]]
        energy = furthest([low.energy for low in lows], item["wanted"])
        left_out = sum((Counter(low.left_out) for low in lows), Counter[str]())
        answer["judged"] = {
            "energy": energy,
            "ok": bool(np.isfinite(energy)),
            "energies": [low.energy for low in lows],
            "sites": sum(low.sites for low in lows),
            "left_out": dict(left_out),
        }


def evaluate_slabs(
    model: CatalyticMLLM,
    collate: Collator,
    config: Config,
    data: Mapping[str, Sequence[System]],
    world: World,
) -> dict[str, Any]:
    """`one` adsorbate, that of the picked test system, and `several` (`evaluate.slab_adsorbates`) asked for
    on the same test slabs: of each the curves of success and the tasks one by one; ranks share the work.
    Empty where no test slab can be built (`enumerable`)."""
    e = config.evaluate
    picks = pick_slabs(data["test"], e.slab_tasks, config.seed)
    if not picks:
        return {}
    predictor = predictor_of(config, world.device) or (model, collate)
    train = learned(data, config.data)["train"]
    ridge = KernelRidge.fit(some(train), some(data["val"]), FRAMES)
    judge = Judge(e.judge)
    kinds: dict[str, list[tuple[str, ...]]] = {"one": [(s.adsorbate,) for s in picks]}
    if e.slab_adsorbates:
        kinds["several"] = [e.slab_adsorbates] * len(picks)
    found: dict[str, Any] = {}
    for kind, adsorbates in kinds.items():
        mine = range(len(picks))[world.rank :: world.size]
        made = make_tasks(judge, [picks[k] for k in mine], [adsorbates[k] for k in mine], data, world.main)
        tasks = {k: task for k, task in zip(mine, made) if task is not None}
        done = search_slabs(predictor, config, tasks, train, ridge)
        judge_slabs(judge, [item for item, _ in done], [s for _, slabs in done for s in slabs], world.main)
        items = [item for part in world.gather([item for item, _ in done]) for item in part]
        found[kind] = slab_metrics(items, config)
    return found


def slab_metrics(items: list[dict[str, Any]], config: Config) -> dict[str, Any]:
    """All numbers of the finished tasks of a kind. `bias`: of the predictor on the known slabs, mean of
    E_pred - E_judge (eV); `off`: mean of its absolute; `left_out`: starts of answers that do not count."""
    limits, tolerance = budgets(config), config.evaluate.tolerance
    curves = design_curves(items, JUDGES, tolerance)
    off = np.array([e - w for i in items for e, w in zip(i["known"], i["wanted"].values())])
    judged = [a["judged"] for i in items for each in i["answers"].values() for a in each]
    return {
        "n": len(items),
        "tolerance": tolerance,
        "budgets": limits,
        "curves": curves,
        "own": {"success": curves["search"]["own"]["success"][-1]} if items else None,
        "judge": {"success": curves["search"]["judge"]["success"][-1]} if items else None,
        "judge_name": POTENTIALS[config.evaluate.judge],
        "bias": float(off.mean()) if items else None,
        "off": float(np.abs(off).mean()) if items else None,
        "sites": sum(j["sites"] for j in judged),
        "left_out": dict(sum((Counter(j["left_out"]) for j in judged), Counter[str]())),
        "items": items,
    }
