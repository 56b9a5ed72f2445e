"""What a potential says of a run's designs that had no part in the labels.

Its energies have a zero of their own. One offset per adsorbate, the median over a few training systems, takes
it away; what is left is how far the two potentials differ. So its rate of success is set beside its own
ceiling: its rate on the test systems whose energies were asked for, which are right by definition.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from catmllm.design.exemplar_pool import Candidate
from catmllm.evaluate.design import candidate_system
from catmllm.evaluate.judges import Judge, JudgedEnergy
from catmllm.evaluate.metrics import wilson_interval
from catmllm.structure.system import System

SYSTEMS = 8  # of training, per adsorbate, for an offset


def offsets(
    judge: Judge, train: Sequence[System], adsorbates: set[str], workers: int = 1
) -> dict[str, float]:
    """Median of label less judged energy (eV) over `SYSTEMS` evenly spaced training systems of each
    adsorbate. One of which the judge accepts no system has no offset."""
    some: list[System] = []
    for name in sorted(adsorbates):
        of_it = [s for s in train if s.adsorbate == name]
        rows = np.linspace(0, len(of_it) - 1, min(SYSTEMS, len(of_it))).round().astype(int)
        some += [of_it[row] for row in rows]
    verdicts = judge.judge_many(some, workers)
    left: dict[str, list[float]] = {}
    for system, verdict in zip(some, verdicts):
        if verdict.ok:
            left.setdefault(system.adsorbate, []).append(system.known_energy - verdict.energy)
    return {name: float(np.median(values)) for name, values in left.items()}


def second_opinion(
    judge: Judge,
    items: Sequence[Mapping[str, Any]],
    data: Mapping[str, Sequence[System]],
    tolerance: float,
    workers: int = 1,
) -> dict[str, Any]:
    """Rates at which the finished tasks (`design.items` of metrics.json) and the test systems behind them are
    within `tolerance` (eV) of the wanted energies by a judge, of the n tasks whose adsorbate has an offset.

    success and ceiling have Wilson intervals; share is success over ceiling (nan where that is 0). A design
    that breaks a hard constraint is no success. Raises ValueError where the data are not those of the tasks.
    """
    known = {(s.identity, s.known_energy): s for s in data["test"]}
    truths = [known.get((item["identity"], item["energy"])) for item in items]
    if any(truth is None for truth in truths):
        raise ValueError("a design task asks for no system of the test part: these are other data")
    zero = offsets(judge, data["train"], {t.adsorbate for t in truths if t is not None}, workers)
    rows = [k for k, t in enumerate(truths) if t is not None and t.adsorbate in zero]
    named = [t for k in rows if (t := truths[k]) is not None]
    designed = {
        k: candidate_system(Candidate(**items[k]["best"]), items[k]["identity"])
        for k in rows
        if items[k]["feasible"] and items[k]["best"] is not None
    }
    verdicts = judge.judge_many([*named, *designed.values()], workers)
    of_design = dict(zip(designed, verdicts[len(named) :]))

    def near(k: int, verdict: JudgedEnergy | None) -> bool:
        if verdict is None or not verdict.ok:
            return False
        shift = zero[items[k]["identity"].partition("</s>")[0]]
        return abs(verdict.energy + shift - items[k]["energy"]) <= tolerance

    found: dict[str, Any] = {"judge": judge.name, "n": len(rows), "offsets": zero}
    hits = {
        "success": [near(k, of_design.get(k)) for k in rows],
        "ceiling": [near(k, verdict) for k, verdict in zip(rows, verdicts)],
    }
    for name, each in hits.items():
        found[name] = float(np.mean(each)) if rows else float("nan")
        found[f"{name}_interval"] = wilson_interval(found[name], len(rows)) if rows else (0.0, 1.0)
    found["share"] = found["success"] / found["ceiling"] if found["ceiling"] else float("nan")
    return found
