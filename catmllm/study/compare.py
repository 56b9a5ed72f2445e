"""What the runs of a study say: each measured thing by cell, and how far a cell is from the first one.

Two things vary besides the cells: systems of one bulk and facet err alike, and two runs of one setting
differ. So a difference, paired by seed and system, has two intervals: a bootstrap over (seed, bulk, facet),
and Student's over the seeds. It holds where both leave out 0. The first alone holds back chance among
surfaces only: with a noise of 0.03 eV from run to run it covered the truth in 63 to 83 % of simulated
studies in place of 95 % (docs/log.md).
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from catmllm.config import from_dict
from catmllm.data.open import open_data
from catmllm.evaluate.baselines import evenly_spaced
from catmllm.evaluate.design import hits as hits_of_search
from catmllm.evaluate.metrics import bootstrap_interval
from catmllm.evaluate.missing import hits_of
from catmllm.train.metrics import read_log

Metrics = dict[str, Any]
# Of every system, answer or task one number: what a row averages, and the pair that each belongs to.
Values = tuple[list[float], list[str]]
MODES = ("graph", "text", "encoder", "start", "encoder_start")  # besides what the parity plot shows
FAILURES = ("PF", "VF", "CM", "PV_0.7", "AD")
MOST_SEEDS = 1000
LAST = "last stage"  # whatever it is: cells may end at different ones
# What makes the samples of a supervised stage. A cross-entropy over others is none to compare with.
_SAMPLES = (
    "steps",
    "batch_size",
    "batch_tokens",
    "property_share",
    "design_share",
    "drop_text",
    "drop_graph",
)


def values_of(metrics: Metrics, folder: Path) -> dict[str, Values]:
    """Of one finished run: each measured thing, by system, answer or task, with (bulk, facet) of each. What
    is one number of a whole run is of the pair "", or of what else must be alike for a comparison."""
    return (
        _property(metrics)
        | _cross_entropy(metrics, folder)
        | _missing(metrics)
        | _generation(metrics, folder)
        | _designs(metrics)
    )


def _cross_entropy(metrics: Metrics, folder: Path) -> dict[str, Values]:
    """Of the answers in the last fifth of a supervised stage's training, and what makes its samples."""
    found: dict[str, Values] = {}
    config = metrics["config"]
    for stage in config["stages"]:
        samples = {key: config[stage].get(key) for key in _SAMPLES} | {"data": config["data"]}
        said = [r["cross_entropy"] for r in read_log(folder / stage / "log.jsonl") if "cross_entropy" in r]
        if last := said[-(len(said) // 5 or 1) :]:
            found[f"{stage}: cross-entropy in training"] = [float(np.mean(last))], [json.dumps(samples)]
    return found


def _missing(metrics: Metrics) -> dict[str, Values]:
    """Predictions without a structure, after the last stage."""
    last = metrics["config"]["stages"][-1]
    found: dict[str, Values] = {}
    if missing := metrics.get("missing", {}).get(last):
        surfaces = [pair["surface"] for pair in missing["pairs"]]
        for arm in ("two_parts", "indicative_1", "indicative_4", "true"):
            inside, distance = hits_of(missing["pairs"], arm)
            found[f"{last}: PIR, {arm}"] = inside.tolist(), surfaces
            found[f"{last}: PIR of means, {arm}"] = hits_of(missing["pairs"], arm, True)[0].tolist(), surfaces
            if not np.isnan(distance).any():
                found[f"{last}: off the middle, eV, {arm}"] = distance.tolist(), surfaces
    return found


def _property(metrics: Metrics) -> dict[str, Values]:
    config = from_dict(metrics["config"], "metrics.json")
    test = evenly_spaced(open_data(config.data)["test"], config.evaluate.property_systems)  # as measured
    pairs = [f"{s.bulk} {s.miller}" for s in test]
    found: dict[str, Values] = {}
    for stage, measured in metrics["property"].items():
        parity = measured["parity"]
        truth = np.array(parity["energy"])

        def off(predicted: Sequence[float], truth: np.ndarray = truth) -> Values:
            return np.abs(np.array(predicted) - truth).tolist(), pairs

        found[f"{stage}: test error, eV"] = off(parity["predicted"])
        if stage != config.stages[-1]:
            continue
        found[f"{LAST}: test error, eV"] = found[f"{stage}: test error, eV"]
        others = parity.get("others", {})
        for of in (stage, LAST):
            found |= {f"{of}: test error, {m}, eV": off(others[m]) for m in MODES if m in others}
        for mode in ("both", "graph", "text"):
            if mode in measured:
                found[f"{stage}: test R², {mode}"] = [measured[mode]["r2"]], [""]
    for name, said in metrics.get("baselines", {}).items():
        if isinstance(said.get("mae"), float):
            found[f"baseline {name}: MAE, eV"] = [said["mae"]], [""]
    return found


def _generation(metrics: Metrics, folder: Path) -> dict[str, Values]:
    """Rewards and failures of the sampled answers; those that nothing held, where there are such."""
    found: dict[str, Values] = {}
    for stage in metrics.get("generation", {}):
        rows = read_log(folder / stage / "answers.jsonl")
        rows = [row for row in rows if row.get("free")] or rows
        pairs = [row["identity"].partition("</s>")[2] for row in rows]
        if not rows:
            continue
        said = {"reward": [float(row["reward"]) for row in rows]}
        said |= {name: [float(name in row["fails"]) for row in rows] for name in FAILURES}
        for of in (stage, LAST) if stage == metrics["config"]["stages"][-1] else (stage,):
            found |= {f"{of}: {name}": (values, pairs) for name, values in said.items()}
    return found


def _designs(metrics: Metrics) -> dict[str, Values]:
    """Success of the closed loop and of ideal slabs screened by the same predictor, and how far candidates
    are from the wanted energy at the start and at the end of the search."""
    found: dict[str, Values] = {}
    after = {f"after {stage}": design for stage, design in metrics.get("designs", {}).items()}
    last = {"": metrics.get("design") or {}, "with free metals": metrics.get("free_design") or {}}
    for when, design in {**after, **last}.items():
        items = design.get("items", [])
        tasks = [item["identity"].partition("</s>")[2] for item in items]
        for judge in ("own", "judge"):
            if items and f"success_{judge}" in items[0]:
                name = " ".join(filter(None, ("design success", when)))
                hits = [float(item[f"success_{judge}"]) for item in items]
                found[f"{name}, {judge}"] = hits, tasks
                fewer = hits_of_search(items, "search", judge, design["tolerance"])[:, :-1]
                for k, column in zip(design["budgets"], fewer.T):
                    found[f"{name}, {k} prediction{'s' * (k > 1)}, {judge}"] = (
                        column.astype(float).tolist(),
                        tasks,
                    )
        for name, k in (("first", 0), ("last", -1)):
            distances = [_distance(item, k) for item in items]
            if distances and all(math.isfinite(d) for d in distances):
                named = " ".join(filter(None, (f"{name} candidates", when)))
                found[f"{named}, |E_pred - E*|, eV"] = distances, tasks
    design = metrics.get("design") or {}
    accepted = [
        item
        for item in design.get("items", [])
        if item.get("success_own") and (item.get("judged") or {}).get("ok")
    ]
    if accepted:
        more = [item["best"]["predicted"] - item["judged"]["energy"] for item in accepted]
        found["accepted designs, E_pred - E_judge, eV"] = (
            more,
            [item["identity"].partition("</s>")[2] for item in accepted],
        )
    curve = (metrics.get("design") or {}).get("curves", {}).get("enumeration", {})
    for judge in ("own", "judge"):
        if judge in curve:
            found[f"ideal slabs, success, {judge}"] = [curve[judge]["success"][-1]], [""]
    return found


def _distance(item: Metrics, k: int) -> float:
    """Mean |E_pred - E*| (eV) of a task's candidates in an iteration; NaN where none has an energy, or there
    are none since the task allows no slab."""
    energies = [e for e in item["trace"][k].get("energies", []) if e is not None] if item["trace"] else []
    return float(np.mean(np.abs(np.array(energies) - item["energy"]))) if energies else math.nan


def compared(
    values: Mapping[str, Sequence[Mapping[str, Values]]], against: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Rows of the table: by what was measured, each cell's mean over the seeds with its sd and interval, and
    how far it is from the first cell's, or from that of the cell that `against` names, paired by seed and
    system where both measured the same ones. What is the same in every cell is left out, and what another row
    says already."""
    first = next(iter(values))
    names = dict.fromkeys(what for each in values.values() for one in each for what in one)
    rows: dict[str, Any] = {}
    for what in names:
        row: dict[str, Any] = {}
        for name, each in values.items():
            if all(what in one for one in each):
                other = (against or {}).get(name, first)
                has = other != name and other in values and all(what in one for one in values[other])
                row[name] = _cell(what, each, values[other] if has else None)
                if other != first:
                    row[name]["base"] = other
        same = len(row) > 1 and len({tuple(cell["each"]) for cell in row.values()}) == 1
        if row and not same:
            rows[what] = row
    for what in [what for what in rows if what.startswith(LAST)]:
        if any(row == rows[what] for other, row in rows.items() if other != what):
            del rows[what]
    return rows


def _cell(
    what: str, each: Sequence[Mapping[str, Values]], base: Sequence[Mapping[str, Values]] | None
) -> dict[str, Any]:
    by_seed = [np.array(one[what][0]) for one in each]
    groups = [f"{k} {pair}" for k, one in enumerate(each) for pair in one[what][1]]
    means = [float(v.mean()) for v in by_seed]
    cell: dict[str, Any] = {
        "mean": statistics.fmean(means),
        "sd": statistics.stdev(means) if len(means) > 1 else None,
        "each": means,
        "interval": bootstrap_interval(np.concatenate(by_seed), groups=groups),
    }
    if base is None or [one[what][1] for one in each] != [one[what][1] for one in base]:
        return cell
    more = [mine - np.array(one[what][0]) for mine, one in zip(by_seed, base)]
    interval = bootstrap_interval(np.concatenate(more), groups=groups)
    over = over_seeds([float(m.mean()) for m in more])
    deviation = math.sqrt(len(more)) * (interval[1] - interval[0]) / (2 * 1.96)
    if len(more) > 1:
        deviation = max(deviation, statistics.stdev(float(m.mean()) for m in more))
    size = statistics.fmean(float(m.mean()) for m in more)
    return cell | {
        "more": size,
        "more_interval": interval,
        "more_over_seeds": over,
        "separate": over is not None and all(low > 0 or high < 0 for low, high in (interval, over)),
        "seeds_needed": seeds_needed(size, deviation),
    }


def over_seeds(differences: Sequence[float], level: float = 0.95) -> tuple[float, float] | None:
    """Student's interval of the mean of one difference a seed; None of a single one."""
    from scipy.stats import t

    n = len(differences)
    if n < 2:
        return None
    mean = statistics.fmean(differences)
    half = float(t.ppf((1 + level) / 2, n - 1)) * statistics.stdev(differences) / math.sqrt(n)
    return mean - half, mean + half


def seeds_needed(size: float, deviation: float) -> int | None:
    """The least number of seeds by which a difference of this size, whose deviation from seed to seed is this
    one, leaves out 0 (95 %) with a power of 80 %; None above `MOST_SEEDS`."""
    from scipy.stats import t

    n = np.arange(2, MOST_SEEDS + 1)
    reach = (t.ppf(0.975, n - 1) + t.ppf(0.8, n - 1)) * deviation / np.sqrt(n)
    enough = n[reach <= abs(size)]
    return int(enough[0]) if size and len(enough) else None


def sentences(rows: Mapping[str, Any]) -> list[str]:
    """For each comparison whether it holds, by its intervals, or how many seeds it would need."""
    said = []
    for what, row in rows.items():
        first = next(iter(row))
        for name, cell in row.items():
            if "more" not in cell:
                continue
            a, b = cell["more_interval"]
            base = cell.get("base", first)
            if a == b == cell["more"] == 0:
                said.append(f"{what}: `{name}` has the numbers of `{base}`.")
                continue
            words = f"{what}: `{name}` is {cell['more']:+.3f} from `{base}` "
            words += f"({a:+.3f} to {b:+.3f} over surfaces"
            if cell["more_over_seeds"] is None:
                words += "; one seed says nothing of how runs differ): not separate."
            else:
                n, (c, d) = len(cell["each"]), cell["more_over_seeds"]
                words += f", {c:+.3f} to {d:+.3f} over {n} seeds): "
                words += "the difference holds." if cell["separate"] else "not separate."
            if not cell["separate"]:
                needed = cell["seeds_needed"]
                few = f"about {needed} seeds" if needed else f"more than {MOST_SEEDS:,} seeds"
                words += f" A difference of this size would need {few}." if cell["more"] else ""
            said.append(words)
    return said


HEADER = ["", "cell", "mean ± sd", "95 %", "more than the first cell", "... over seeds"]


def cells_of(rows: Mapping[str, Any]) -> list[list[str]]:
    """The rows as words, under `HEADER`."""
    lines = []
    for what, row in rows.items():
        for name, cell in row.items():
            low, high = cell["interval"]
            sd = "" if cell["sd"] is None else f" ± {cell['sd']:.3f}"
            more = seeds = ""
            if "more" in cell:
                a, b = cell["more_interval"]
                more = f"{cell['more']:+.3f} ({a:+.3f} to {b:+.3f})"
                more += "" if cell["separate"] else ", not separate"
                more += f", from `{cell['base']}`" if "base" in cell else ""
                over = cell["more_over_seeds"]
                seeds = "–" if over is None else f"{over[0]:+.3f} to {over[1]:+.3f}"
            lines.append([what, name, f"{cell['mean']:.3f}{sd}", f"{low:.3f} to {high:.3f}", more, seeds])
    return lines


def table(rows: Mapping[str, Any]) -> str:
    """The rows as a Markdown table."""
    lines = ["| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
    lines += ["| " + " | ".join(w.replace("|", "\\|") for w in cells) + " |" for cells in cells_of(rows)]
    return "\n".join(lines)
