"""Inverse design on test systems: does the closed loop hit the wanted energy, and would less have hit it too?

Every task asks for a system that training has not seen (a bulk and Miller index of the test split) at the
energy of one of its members. Success is judged by the model's own predictor, which the search optimises, and
by a potential that it does not know, after one prediction, a few, and all. Beside it stands what needs less:
ideal slabs screened by the same predictor or by kernel ridge regression, one of them at random, a random
training system, and the answers to other tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from catmllm.config import Config
from catmllm.data.batches import Collator
from catmllm.data.oracle import POTENTIALS
from catmllm.data.slabs import pair_of
from catmllm.data.subsets import learned
from catmllm.design.exemplar_pool import Candidate
from catmllm.design.predict import Predictor, energies_and_errors, predictor_of, question
from catmllm.design.reward import distances
from catmllm.design.search import ClosedLoop, Task, TaskState, structure_key, summary, told
from catmllm.evaluate import metrics
from catmllm.evaluate.baselines import FRAMES, KernelRidge, some
from catmllm.evaluate.controls import budgets, closest, ideal_candidates, sound_analogues
from catmllm.models.catalytic_mllm import CatalyticMLLM
from catmllm.sample.engine import RolloutEngine
from catmllm.seeds import Key, Stream, generator
from catmllm.structure.cif import read_cif
from catmllm.structure.formula import parse_identity
from catmllm.structure.system import System
from catmllm.world import DTYPES, World
from rewards_fast import extract_cif


def design_tasks(systems: Sequence[System], n: int, seed: int) -> list[Task]:
    """n tasks from different systems in a seeded order, as spread over identities as can be."""
    order = generator(Stream.DESIGN_TASKS.key(seed)).permutation(len(systems))
    seen: dict[str, int] = {}
    rank: list[tuple[int, int, int]] = []
    for i in order:
        identity = systems[i].identity
        rank.append((seen.get(identity, 0), len(rank), int(i)))
        seen[identity] = seen.get(identity, 0) + 1
    picks = [systems[i] for _, _, i in sorted(rank)[:n]]
    return [Task(s.identity, s.target, s.known_energy) for s in picks]


def search_seed(seed: int, rank: int = 0) -> Key:
    """The seed of a rank's search for the test tasks."""
    return Stream.DESIGN_SEARCH.key(seed, rank)


def search(
    model: CatalyticMLLM,
    collate: Collator,
    config: Config,
    tasks: Sequence[Task],
    seed: Sequence[int],
    progress: bool = False,
    given: Sequence[System | None] | None = None,
    predictor: Predictor | None = None,
    known: Sequence[System] = (),
) -> list[TaskState]:
    """The closed loop with fixed weights: N0 candidates, then `iterations` refinements, of all tasks
    together. given: of each task the structure that it begins with, or None; predictor: what says the
    energies, where it is not the model; known: systems with energies, of which `ga_grpo.analogues` are
    made."""
    from tqdm import tqdm

    loop = ClosedLoop(model, collate, config.ga_grpo, predictor)
    engine = RolloutEngine(model, collate, DTYPES[config.precision])
    states = loop.start(told(tasks, config.ga_grpo, known), engine, seed, given, known)
    iterations = range(1, config.ga_grpo.iterations + 1)
    bar = tqdm(iterations, desc="design   ", disable=not progress, unit="iteration")
    bar.set_postfix_str(_so_far(states))
    for iteration in bar:
        loop.refine(states, engine, iteration, seed, keep=False)
        bar.set_postfix_str(_so_far(states))
    return states


def _so_far(states: Sequence[TaskState]) -> str:
    """The best designs of a search: by how much their predicted energies miss, on average over the tasks that
    have one."""
    misses = [abs(best.predicted - s.task.energy) for s in states if (best := s.pool.best) is not None]
    return f"best {np.mean(misses):.3f} eV from the wanted energy" if misses else "nothing that parses yet"


# The closed loop; ideal slabs screened by whom, `ordered` where the metals are free; and training slabs with
# their elements exchanged, screened by the same predictor.
METHODS = ("search", "enumeration", "kernel_ridge", "ordered", "analogues")
JUDGES = ("own", "judge")  # the predictor, and the potential of `evaluate.judge`


def candidate_system(candidate: Candidate, identity: str) -> System:
    """The structure of a candidate that has an energy."""
    asked = parse_identity(identity)
    return read_cif(extract_cif(candidate.text), asked.adsorbate, asked.miller)


def evaluate_design(
    model: CatalyticMLLM,
    collate: Collator,
    config: Config,
    data: Mapping[str, Sequence[System]],
    world: World,
) -> dict[str, Any]:
    """Search for tasks of the test systems, judge the answers, and set success beside its controls; ranks
    share the work. Kernel ridge is fitted to `val` of data and the part of `train` whose energies are
    learned."""
    e, data = config.evaluate, learned(data, config.data)
    tasks = design_tasks(data["test"], e.design_tasks, config.seed)
    places = range(len(tasks))[world.rank :: world.size]
    mine = [tasks[k] for k in places]
    predictor = predictor_of(config, world.device) or (model, collate)
    seed = search_seed(config.seed, world.rank)
    states = search(
        model, collate, config, mine, seed, progress=world.main, predictor=predictor, known=data["train"]
    )
    limits = budgets(config)
    ideal = [ideal_candidates(t, limits[-1], config.seed, k) for k, t in zip(places, mine)]
    screened = screen(predictor, config, ideal, mine, data)
    known = sound_analogues([[t.identity] for t in mine], mine, data["train"], limits[-1])
    items, systems = [], []
    for state, slabs, others in zip(
        states, screened, screen(predictor, config, known, mine, None, "analogues")
    ):
        item, chosen = answers_to(state, slabs, limits)
        items.append(item)
        systems += chosen + add_screened(item, others, limits)
    if e.judge != "none":
        judge_answers(e.judge, items, systems, progress=world.main)
    items = [item for part in world.gather(items) for item in part]
    return design_metrics(items, limits, data["train"], config)


class Screened(NamedTuple):
    """Structures for a task that no model made: their energies by the model's predictor (eV), and by method
    how far each is from the wanted energy."""

    slabs: Sequence[System]
    energies: np.ndarray
    distances: Mapping[str, np.ndarray]


def screen(
    predictor: Predictor,
    config: Config,
    ideal: Sequence[Sequence[System]],
    tasks: Sequence[Task],
    data: Mapping[str, Sequence[System]] | None,
    method: str = "enumeration",
) -> list[Screened]:
    """Every task's structures by the predictor, as the closed loop counts distances; and where there is
    `data` by kernel ridge, which is fitted to its `train` and `val`."""
    flat = [s for slabs in ideal for s in slabs]
    target = np.repeat([t.energy for t in tasks], [len(slabs) for slabs in ideal])
    own, errors = energies_and_errors(*predictor, [question(s) for s in flat], batch_size=128)
    found = {method: distances(own, target, errors, config.ga_grpo)}
    if data is not None:
        ridge = np.zeros(0)
        if flat:
            ridge = KernelRidge.fit(some(data["train"]), some(data["val"]), FRAMES).predict(flat)
        found["kernel_ridge"] = np.abs(ridge - target)
    ends = np.cumsum([len(slabs) for slabs in ideal])[:-1]
    parts = {name: np.split(numbers, ends) for name, numbers in found.items()}
    return [
        Screened(slabs, energies, {name: part[k] for name, part in parts.items()})
        for k, (slabs, energies) in enumerate(zip(ideal, np.split(own, ends)))
    ]


def answers_to(
    state: TaskState, screened: Screened, limits: Sequence[int]
) -> tuple[dict[str, Any], list[System | None]]:
    """The record of a task with every method's answer after each number of predictions, and the structures of
    these answers in turn. A method that cannot be had for the task has no answers."""
    item = summary(state)
    found, chosen = answers_of(state, limits)
    item["answers"] = {"search": found}
    return item, chosen + add_screened(item, screened, limits)


def add_screened(item: dict[str, Any], screened: Screened, limits: Sequence[int]) -> list[System | None]:
    """Put the answers of screened slabs into the record of a task; returns their structures in turn."""
    slabs, energies, by = screened
    chosen: list[System | None] = []
    for method, distance in by.items():
        picks = closest(distance, limits) if slabs else []
        # The predictor whose word counts is the model's, whoever chose.
        item["answers"][method] = [{"predicted": float(energies[k]), "feasible": True} for k in picks]
        chosen += [slabs[k] for k in picks]
    return chosen


def answers_of(state: TaskState, limits: Sequence[int]) -> tuple[list[dict[str, Any]], list[System | None]]:
    """What the candidates of a task come to after each number of predictions, and the structures chosen."""
    found, chosen = list[dict[str, Any]](), list[System | None]()
    for limit in limits:
        best = state.best_of(limit)
        found.append(
            {
                "predicted": None if best is None else best.predicted,
                "feasible": best is not None and best.feasible,
            }
        )
        chosen.append(None if best is None else candidate_system(best, state.task.identity))
    return found, chosen


def judge_answers(
    name: str, items: Sequence[dict[str, Any]], systems: Sequence[System | None], progress: bool
) -> None:
    """The word of a potential on every answer, whose structures are given in turn, those of an item together;
    each is judged once."""
    from catmllm.evaluate.judges import Judge

    keys = [None if s is None else structure_key(s) for s in systems]
    different = {key: s for key, s in zip(keys, systems) if key is not None and s is not None}
    verdicts = Judge(name).judge_many(list(different.values()), progress=progress)
    said = {
        key: {"energy": v.energy, "ok": v.ok, "reason": v.reason, "steps": v.steps}
        for key, v in zip(different, verdicts)
    }
    for answer, key in zip((a for i in items for each in i["answers"].values() for a in each), keys):
        answer["judged"] = None if key is None else said[key]
    for item in items:
        item["judged"] = item["answers"]["search"][-1]["judged"]


def hits(items: Sequence[dict[str, Any]], method: str, judge: str, tolerance: float) -> np.ndarray:
    """[items, numbers of predictions] which answers are feasible and within the tolerance of the target."""

    def energy(answer: dict[str, Any]) -> float:
        if judge == "own":
            return np.nan if answer["predicted"] is None else float(answer["predicted"])
        judged = answer["judged"]
        return float(judged["energy"]) if judged and judged["ok"] else np.nan

    rows = [item["answers"][method] for item in items]
    target = [[item["energy"]] * len(row) for item, row in zip(items, rows)]
    energies = [[energy(a) for a in row] for row in rows]
    return metrics.design_success([[a["feasible"] for a in row] for row in rows], energies, target, tolerance)


def design_curves(items: Sequence[dict[str, Any]], judges: Sequence[str], tolerance: float) -> dict[str, Any]:
    """Success over the numbers of predictions: by method its n tasks and, by judge, the rates with Wilson
    intervals and (but for the search) what the search has more at the same tasks, with an interval by a
    bootstrap over (bulk, Miller index)."""
    curves: dict[str, Any] = {}
    for method in METHODS:
        answered = [item for item in items if item["answers"].get(method)]
        curves[method] = {"n": len(answered)}
        pairs = [pair_of(item["identity"]) for item in answered]
        for judge in judges if answered else ():
            hit = hits(answered, method, judge, tolerance)
            rates = hit.mean(0).tolist()
            found = {"success": rates, "interval": [metrics.wilson_interval(r, len(answered)) for r in rates]}
            if method != "search":
                more = hits(answered, "search", judge, tolerance).astype(float) - hit
                found["search_more"] = more.mean(0).tolist()
                found["search_more_interval"] = [
                    metrics.bootstrap_interval(column, groups=pairs) for column in more.T
                ]
            curves[method][judge] = found
    return curves


def _reached(items: Sequence[dict[str, Any]], tolerance: float, iterations: int) -> list[list[bool]]:
    """Of each task whether the best candidate after each iteration is a success by the predictor's own word;
    none is of a task that allows no slab, which has no trace."""

    def reaches(step: dict[str, Any], target: float) -> bool:
        best = step["best_predicted"]
        return bool(step["feasible"] and best is not None and abs(best - target) <= tolerance)

    return [[reaches(step, i["energy"]) for step in i["trace"]] or [False] * iterations for i in items]


def predictor_bias(
    more: np.ndarray, accepted: np.ndarray, items: Sequence[dict[str, Any]]
) -> dict[str, Any] | None:
    """Mean of E_pred - E_judge (eV) over the n designs that the search accepts by its predictor and the judge
    could relax, with a bootstrap over (bulk, Miller index); None of none."""
    if not accepted.any():
        return None
    pairs = [pair_of(item["identity"]) for item, one in zip(items, accepted) if one]
    interval = metrics.bootstrap_interval(more[accepted], groups=pairs)
    return {"mean": float(more[accepted].mean()), "interval": interval, "n": int(accepted.sum())}


def design_metrics(
    items: list[dict[str, Any]], limits: Sequence[int], train: Sequence[System], config: Config
) -> dict[str, Any]:
    """All numbers of the design evaluation from the finished tasks."""
    e, tol = config.evaluate, config.evaluate.tolerance
    target = np.array([i["energy"] for i in items])
    feasible = np.array([i["feasible"] and i["best"] is not None for i in items])
    judges = JUDGES if e.judge != "none" else JUDGES[:1]
    curves = design_curves(items, judges, tol)
    adsorbate = [i["identity"].split("</s>")[0] for i in items]
    retrieval = metrics.retrieval_control(
        target, adsorbate, [s.known_energy for s in train], [s.adsorbate for s in train], tol
    )

    def judged_by(judge: str, energies: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
        controls = {
            method: curves[method][judge]["success"][-1] for method in METHODS[1:] if curves[method]["n"]
        }
        if curves["enumeration"]["n"]:
            controls["random"] = curves["enumeration"][judge]["success"][0]
        hit = metrics.design_success(feasible, energies, target, tol)
        return hit, {
            "success": float(hit.mean()),
            "shuffled": metrics.shuffled_control(feasible, energies, target, None, tol),
            "shuffled_same_adsorbate": metrics.shuffled_control(feasible, energies, target, adsorbate, tol),
            "retrieval": retrieval,
            **controls,
        }

    own = np.array([np.nan if i["best"] is None else i["best"]["predicted"] for i in items])
    own_hit, own_rates = judged_by("own", own)
    out: dict[str, Any] = {
        "n": len(items),
        "tolerance": tol,
        "feasible": float(feasible.mean()),
        "AD": float(np.mean([i["best"] is None or i["best"]["fault"] is not None for i in items])),
        "budgets": list(limits),
        "curves": curves,
        "own": own_rates,
    }
    out["judge"], final = None, own_hit
    if e.judge != "none":
        ok = np.array([bool(i["judged"] and i["judged"]["ok"]) for i in items])
        energy = np.array([i["judged"]["energy"] if k else np.nan for i, k in zip(items, ok)])
        final, rates = judged_by("judge", energy)
        rates["judged_ok"] = float(ok.mean())
        for name, other in (("mae", target), ("predictor_mae", own)):
            rates[name] = float(np.abs(energy - other)[ok].mean()) if ok.any() else float("nan")
        out["judge"] = rates | {"bias": predictor_bias(own - energy, own_hit & ok, items)}
        out["judge_name"] = POTENTIALS[e.judge]
        for item, hit in zip(items, final):
            item["success_judge"] = bool(hit)
    for item, hit in zip(items, own_hit):
        item["success_own"] = bool(hit)
    out["success_ci"] = list(metrics.bootstrap_interval(final.astype(float)))
    reached = _reached(items, tol, config.ga_grpo.iterations + 1)
    out["iterations_to_success"] = metrics.iterations_to_success(reached)
    winners = [candidate_system(Candidate(**i["best"]), i["identity"]) for i, hit in zip(items, final) if hit]
    out["diversity"] = metrics.diversity(winners)
    out["items"] = items
    return out
