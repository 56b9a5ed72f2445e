"""Inverse design on test systems: does the closed loop hit the wanted energy, and would less have hit it too?

Every task asks for a system that training has not seen (a bulk and Miller index of the test split) at the
energy of one of its members. Success is judged by the model's own predictor, which the search optimises, and
by SevenNet-0, which it does not know; beside both stand two controls.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from catmllm.config import Config
from catmllm.data.batches import Collator
from catmllm.design.search import ClosedLoop, Task, TaskState, summary
from catmllm.evaluate import metrics
from catmllm.models.catalytic_mllm import CatalyticMLLM
from catmllm.sample.engine import RolloutEngine
from catmllm.seeds import Stream, generator
from catmllm.structure.cif import read_cif
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


def search(
    model: CatalyticMLLM,
    collate: Collator,
    config: Config,
    tasks: Sequence[Task],
    seed: Sequence[int],
    progress: bool = False,
) -> list[TaskState]:
    """The closed loop with fixed weights: N0 candidates, then `iterations` refinements,
    of all tasks together."""
    from tqdm import tqdm

    loop = ClosedLoop(model, collate, config.ga_grpo)
    engine = RolloutEngine(model, collate, DTYPES[config.precision])
    states = loop.start(tasks, engine, seed)
    for iteration in tqdm(
        range(1, config.ga_grpo.iterations + 1), desc="design   ", disable=not progress, unit="iteration"
    ):
        loop.refine(states, engine, iteration, seed, keep=False)
    return states


def best_system(item: dict[str, Any]) -> System | None:
    """The best structure of a finished task as a System, or None where the pool stayed empty."""
    from catmllm.structure.formula import parse_identity

    if item["best"] is None:
        return None
    identity = parse_identity(item["identity"])
    return read_cif(extract_cif(item["best"]["text"]), identity.adsorbate, identity.miller)


def evaluate_design(
    model: CatalyticMLLM,
    collate: Collator,
    config: Config,
    test: Sequence[System],
    train: Sequence[System],
    world: World,
) -> dict[str, Any]:
    """Search for all tasks, judge the answers, and set success beside its controls; ranks share the work."""
    e = config.evaluate
    tasks = design_tasks(test, e.design_tasks, config.seed)
    mine = tasks[world.rank :: world.size]
    states = search(
        model, collate, config, mine, Stream.DESIGN_SEARCH.key(config.seed, world.rank), progress=world.main
    )
    items = [summary(s) for s in states]
    systems = [best_system(i) for i in items]
    if e.judge == "sevennet":
        from catmllm.evaluate.judges import SevenNetJudge

        present = [s for s in systems if s is not None]
        verdicts = iter(SevenNetJudge().judge_many(present, progress=world.main))
        for item, system in zip(items, systems):
            verdict = None if system is None else next(verdicts)
            item["judged"] = (
                None
                if verdict is None
                else {
                    "energy": verdict.energy,
                    "ok": verdict.ok,
                    "reason": verdict.reason,
                    "steps": verdict.steps,
                }
            )
    items = [item for part in world.gather(items) for item in part]
    return design_metrics(items, train, config)


def design_metrics(items: list[dict[str, Any]], train: Sequence[System], config: Config) -> dict[str, Any]:
    """All numbers of the design evaluation from the finished tasks."""
    e, tol = config.evaluate, config.evaluate.tolerance
    target = np.array([i["energy"] for i in items])
    feasible = np.array([i["feasible"] and i["best"] is not None for i in items])
    adsorbate = [i["identity"].split("</s>")[0] for i in items]
    retrieval = metrics.retrieval_control(
        target, adsorbate, [s.known_energy for s in train], [s.adsorbate for s in train], tol
    )

    def judged_by(energies: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
        hit = metrics.design_success(feasible, energies, target, tol)
        return hit, {
            "success": float(hit.mean()),
            "shuffled": metrics.shuffled_control(feasible, energies, target, None, tol),
            "shuffled_same_adsorbate": metrics.shuffled_control(feasible, energies, target, adsorbate, tol),
            "retrieval": retrieval,
        }

    own = np.array([np.nan if i["best"] is None else i["best"]["predicted"] for i in items])
    own_hit, own_rates = judged_by(own)
    out: dict[str, Any] = {
        "n": len(items),
        "tolerance": tol,
        "feasible": float(feasible.mean()),
        "own": own_rates,
    }
    out["sevennet"] = None
    final = own_hit
    if e.judge == "sevennet":
        ok = np.array([bool(i["judged"] and i["judged"]["ok"]) for i in items])
        energy = np.array([i["judged"]["energy"] if k else np.nan for i, k in zip(items, ok)])
        final, rates = judged_by(energy)
        rates["judged_ok"] = float(ok.mean())
        rates["mae"] = float(np.abs(energy - target)[ok].mean()) if ok.any() else float("nan")
        rates["predictor_mae"] = float(np.abs(energy - own)[ok].mean()) if ok.any() else float("nan")
        out["sevennet"] = rates
        for item, hit in zip(items, final):
            item["success_sevennet"] = bool(hit)
    for item, hit in zip(items, own_hit):
        item["success_own"] = bool(hit)
    out["success_ci"] = list(metrics.bootstrap_interval(final.astype(float)))
    curve = np.array(
        [
            [
                t["feasible"]
                and t["best_predicted"] is not None
                and abs(t["best_predicted"] - i["energy"]) <= tol
                for t in i["trace"]
            ]
            for i in items
        ]
    )
    out["iterations_to_success"] = metrics.iterations_to_success(curve)
    winners = [s for s, hit in zip(map(best_system, items), final) if hit and s is not None]
    out["diversity"] = metrics.diversity(winners)
    out["items"] = items
    return out
