"""report.html of a run: one file without any outside resource, verdicts first,
the numbers and figures behind them.

A run may be unfinished: the report shows what is there and says what is missing. Texts that models wrote are
escaped and control characters replaced; the page forbids itself requests and every script but its own
(Content-Security-Policy). What these make live (`page.live`) is a picture or a table without them.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from catmllm.config import STAGES
from catmllm.evaluate.baselines import TRAINED
from catmllm.report import page as html
from catmllm.report.figures import (
    draw_curve,
    draw_design,
    draw_energies,
    draw_failures,
    draw_inclusion,
    draw_parity,
    draw_ranges,
    draw_rewards,
    draw_seconds,
    draw_solved,
    draw_timeline,
    draw_trace,
    draw_training,
    readme_figure,
    solved_by_iteration,
)
from catmllm.report.live import SCRIPTS, encoded, records
from catmllm.report.summary import (
    SHOWN_BY,
    SLAB_NAMES,
    STAGE_MEANINGS,
    STAGE_NAMES,
    Metrics,
    Table,
    claims,
    conditions,
    curve_table,
    design_table,
    finite,
    free_table,
    generation_table,
    judge_title,
    missing_parts,
    missing_table,
    number,
    ordered,
    property_table,
    shown_mode,
    slab_table,
    stages_table,
    summary_table,
    time_table,
)
from catmllm.structure.cif import read_cif
from catmllm.structure.formula import parse_identity
from catmllm.structure.system import System
from catmllm.train.metrics import read_log
from rewards_fast import extract_cif
from rewards_fast.pvcp import FLOORS

__all__ = ["ANSWERS", "readme_figure", "summary_table", "with_trained_baselines", "write_report"]

ANSWERS = "answers.jsonl"  # of a stage's folder: what was sampled to measure it, with every reward term
_PICTURES = 6  # designs that are drawn


def write_report(run: Path, tested: Sequence[System] = ()) -> Path:
    """Write run/report.html from run/metrics.json, run/<stage>/log.jsonl and run/<stage>/answers.jsonl;
    returns its path.

    tested: the systems whose energies were predicted, in the order of the record; the page then names and
    shows them. Parts that are missing, and a metrics.json that cannot be read, are told in the report. Raises
    FileNotFoundError where there is no run folder.
    """
    run = Path(run)
    if not run.is_dir():
        raise FileNotFoundError(f"{run} is no folder of a run")
    metrics, problem = _read_metrics(run / "metrics.json")
    metrics = with_trained_baselines(metrics, run)
    logs = {stage: rows for stage in STAGES if (rows := read_log(run / stage / "log.jsonl"))}
    missing = ([problem] if problem else []) + missing_parts(metrics, logs)
    title = f"Run {run.resolve().name}"
    answers = {stage: rows for stage in STAGES if (rows := read_log(run / stage / ANSWERS))}
    live = records(metrics, logs, tested, answers)
    sections = {
        "What holds, what does not": _headlines(metrics),
        "Energy prediction": _property(metrics),
        "Generated CIFs": _generation(metrics),
        "Predictions without a structure": _without_structures(metrics),
        "Sampled answers": _texts(metrics, bool(answers)),
        "Design by target energy": _design(metrics),
        "Training": _training(metrics, logs),
        "Configuration": _configuration(metrics),
    }
    shown = {name: content for name, content in sections.items() if content}
    body = [
        f"<h1>{html.text(title)}</h1>",
        f'<p class="conditions">{html.text(conditions(metrics))}</p>',
        html.contents(shown),
        _missing(missing),
        *(html.section(name, content) for name, content in shown.items()),
    ]
    path = run / "report.html"
    scripts = (encoded(live), SCRIPTS) if live else ()
    path.write_text(html.page(title, body, *scripts), encoding="utf-8")
    return path


def _read_metrics(path: Path) -> tuple[Metrics, str]:
    """The record of a run, or nothing and what is wrong with it."""
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}, "metrics.json"
    except ValueError as error:
        return {}, f"a readable metrics.json ({error})"
    return (
        (metrics, "") if isinstance(metrics, dict) else ({}, "a readable metrics.json (it holds no mapping)")
    )


def with_trained_baselines(metrics: Metrics, run: Path) -> Metrics:
    """The record with the graph networks that `make baselines` has measured on the same split, if it has."""
    path, data = Path(run) / TRAINED, (metrics.get("config") or {}).get("data") or {}
    if not path.is_file():
        return metrics
    found = json.loads(path.read_text(encoding="utf-8"))
    if any(data.get(key) != value for key, value in found["cell"].items()):
        return metrics
    return metrics | {"baselines": (metrics.get("baselines") or {}) | found["baselines"]}


# --------------------------------------------------------------------------- sections


def _missing(missing: list[str]) -> str:
    if not missing:
        return ""
    return f'<p class="missing"><b>Not in this run (yet):</b> {"; ".join(map(html.text, missing))}.</p>'


def _headlines(metrics: Metrics) -> str:
    found = claims(metrics)
    items = "\n".join(
        f'<li><span class="verdict {c.verdict}">{c.verdict}</span>{html.text(c.sentence)}'
        f'<span class="evidence">{html.text(c.evidence)}</span></li>'
        for c in found
    )
    explained = (
        "yes, no: the difference is larger than two standard errors (for baselines: of the model's MAE); of "
        "designs, the "
        "95\u00a0% interval lies above every control, or the rate is not above all of them. unclear: chance "
        "may explain it. "
        "“Did not lower” holds unless a drop is larger than two standard errors. Systems count as "
        "independent although several share a slab, so true errors are larger."
    )
    listed = f'<ul class="claims">\n{items}\n</ul>' if found else "<p>Nothing has been measured yet.</p>"
    notes = [explained, *STAGE_MEANINGS] if found else STAGE_MEANINGS
    return listed + html.notes(notes)


def _property(metrics: Metrics) -> str:
    table = property_table(metrics)
    stages = [s for s in ordered(metrics.get("property")) if metrics["property"][s].get("parity")]
    parity = ""
    if stages:
        result = metrics["property"][stages[-1]]
        way = SHOWN_BY[shown_mode(result)]
        caption = f"Energies {way} after {STAGE_NAMES[stages[-1]]}. Line: perfect prediction."
        still = html.figure(
            "parity",
            caption,
            (5.4, 4.3),
            lambda f: draw_parity(f.subplots(), result, "Energies of test systems"),
        )
        parity = html.live("parity", still)
    return html.table(table) + parity if table else ""


def _generation(metrics: Metrics) -> str:
    generation = metrics.get("generation") or {}
    table = generation_table(metrics)
    if table is None:
        return ""
    parts = [
        html.table(table),
        html.figure(
            "failures",
            "Share of sampled CIFs that fail each check; lines: 95 % Wilson intervals.",
            (8.6, 3.6),
            lambda f: draw_failures(f.subplots(), generation),
        ),
    ]
    if any(generation[stage].get("reward_hist") for stage in ordered(generation)):
        caption = "Rewards of single texts; an unreadable one is at the floor of -15."
        parts.append(html.figure("rewards", caption, (8.6, 2.9), lambda f: draw_rewards(f, generation)))
    parts += [
        html.table(_terms_table(generation)),
        html.table(_counts_table(generation, "reasons", "Why texts could not be read as a CIF")),
        html.table(_counts_table(generation, "faults", "Why the adsorbate of a readable text is none (AD)")),
    ]
    return "\n".join(parts)


def _without_structures(metrics: Metrics) -> str:
    table = missing_table(metrics)
    if table is None:
        return ""
    missing = metrics["missing"]
    found = missing[ordered(missing)[-1]]

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2, width_ratios=(1.5, 1.0))
        draw_ranges(left, found)
        draw_inclusion(right, found)

    caption = (
        "Left: energies of configurations and predictions without a structure, pairs in the order of their "
        "ranges. Right: share of predictions in the range; lines: 95 % bootstrap intervals over surfaces."
    )
    return html.table(table) + html.figure("missing", caption, (11.0, 4.6), draw)


def _terms_table(generation: Metrics) -> Table | None:
    stages = [stage for stage in ordered(generation) if generation[stage].get("terms")]
    if not stages:
        return None
    names = list(generation[stages[0]]["terms"])
    rows = [
        [STAGE_NAMES[s], *(number(generation[s]["terms"].get(name), 2) for name in names)] for s in stages
    ]
    floors = ", ".join(f"{floor:g} ({name})" for name, floor in FLOORS.items())
    note = f"Each is 10 at best; the floors are {floors} and -10 (adsorbate, which is no part of R)."
    return Table("Mean of each reward term", ["after stage", *names], rows, [note])


def _counts_table(generation: Metrics, key: str, title: str) -> Table | None:
    """How often each code of `reasons` or `faults` came, the most frequent first."""
    stages = ordered(generation)
    reasons = {stage: generation[stage].get(key) or {} for stage in stages}
    codes = sorted(
        {code for found in reasons.values() for code in found},
        key=lambda c: (-sum(r.get(c, 0) for r in reasons.values()), c),
    )
    if not codes:
        return None
    rows = [[code, *(str(reasons[stage].get(code, 0)) for stage in stages)] for code in codes]
    header = ["reason", *(f"{STAGE_NAMES[stage]} (of {generation[stage].get('n', '?')})" for stage in stages)]
    return Table(title, header, rows, [])


def _slabs(metrics: Metrics) -> list[str]:
    """The slabs that are judged at their best sites: for one adsorbate, and for several."""
    parts = []
    for kind in ("one", "several"):
        if (table := slab_table(metrics, kind)) is not None:
            draw = partial(_slab_curve, metrics["slab_design"][kind])
            caption = "Success over the number of slabs tried; lines: 95 % Wilson intervals."
            parts += [html.table(table), html.figure(f"slabs-{kind}", caption, (6.4, 3.6), draw)]
    return parts


def _slab_curve(design: Metrics, figure: Figure) -> None:
    draw_curve(figure.subplots(), design, SLAB_NAMES, "slabs")


def _design(metrics: Metrics) -> str:
    design = metrics.get("design") or {}
    table = design_table(metrics)
    if table is None or not design.get("n"):
        return ""
    items = design.get("items") or []
    parts = [
        html.table(table),
        html.figure(
            "design",
            "Share of tasks with a successful design, 95 % Wilson intervals; random training systems and "
            "shuffled targets are exact averages.",
            (8.6, 3.8),
            lambda f: draw_design(f.subplots(), design),
        ),
    ]
    curves = curve_table(metrics)
    parts.append(html.table(stages_table(metrics)))
    if curves is not None:
        caption = "Success over the number of predictions; lines: 95 % Wilson intervals."
        parts += [
            html.table(curves),
            html.figure("curve", caption, (6.4, 3.6), lambda f: draw_curve(f.subplots(), design)),
        ]
    if (free := free_table(metrics)) is not None:
        parts.append(html.table(free))
    parts += _slabs(metrics)
    if any(item.get("trace") for item in items):
        parts.append(_trace_figure(design))
    if any(item.get("trace") and "energies" in item["trace"][0] for item in items):
        caption = (
            "Every candidate's energy by the own predictor in the order of the search, the pool's best so "
            "far and the energy that was wanted (dashed); six tasks evenly spaced among all."
        )
        parts.append(html.figure("energies", caption, (8.6, 4.6), lambda f: draw_energies(f, design)))
    judge = judge_title(design, "judge")
    parts += [
        "<h3>Every task</h3>",
        html.live("tasks", _all_tasks(items, judge)),
        *_pictures(items, judge),
        html.table(_refusals(items)),
    ]
    return "\n".join(parts)


def _trace_figure(design: Metrics) -> str:
    solved = solved_by_iteration(design)

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        draw_trace(left, design)
        draw_solved(right, design)

    caption = (
        "Iteration 0 is drawn from the text alone, later ones with an exemplar from the pool: "
        f"{100 * solved[0]:.0f} % of the tasks were solved at iteration 0 and {100 * solved[-1]:.0f} % at "
        f"iteration {len(solved) - 1}, by the own predictor. More candidates alone raise this too. Bands: "
        "quartiles over tasks; a task without a candidate counts as an infinite error (a gap in a line: "
        "more than half of the tasks; a band up to the edge: more than a quarter)."
    )
    return html.figure("trace", caption, (8.6, 3.5), draw)


def _refusals(items: list[dict[str, Any]]) -> Table | None:
    """Why the independent judge did not accept designs."""
    judged = [item["judged"] for item in items if item.get("judged")]
    if not judged:
        return None
    counts = Counter(str(j.get("reason") or "not told") for j in judged if not j.get("ok"))
    none = sum(1 for item in items if not item.get("best"))
    rows = [[reason, str(count)] for reason, count in counts.most_common()]
    rows += [["no readable candidate at all", str(none)]] if none else []
    return (
        Table(f"Designs without a judged energy, of n = {len(items)}", ["reason", "designs"], rows, [])
        if rows
        else None
    )


# --------------------------------------------------------------------------- designs


def _miss(item: dict[str, Any]) -> float:
    """How far a design is from its target (eV) by the most independent judge that spoke;
    inf where none did."""
    judged, best = item.get("judged"), item.get("best") or {}
    if judged is not None:
        return (
            abs(judged["energy"] - item["energy"])
            if judged.get("ok") and finite(judged.get("energy"))
            else math.inf
        )
    return abs(best["predicted"] - item["energy"]) if finite(best.get("predicted")) else math.inf


def _pictures(items: list[dict[str, Any]], judge: str) -> list[str]:
    """The best designs and the farthest from their targets."""
    by = judge if any(item.get("judged") for item in items) else "the own predictor"
    some = [k for k, item in enumerate(items) if item.get("best")]
    feasible = [k for k in some if items[k]["best"].get("feasible")]
    failed = [
        k for k in some if not items[k].get("success_judge" if items[k].get("judged") else "success_own")
    ]
    drawn = (
        "From above with one cell dashed, and from the side; deeper atoms are paler, the adsorbate is ringed."
    )
    return [
        _gallery("Best designs", items, judge, sorted(feasible, key=lambda k: _miss(items[k])))
        + html.notes([f"The closest of {len(items)} by {by}, one per system: chosen, not typical. {drawn}"])
        if feasible
        else "",
        _gallery("Failures", items, judge, sorted(failed, key=lambda k: -_miss(items[k])))
        + html.notes([f"Refused, or farthest from the wanted energy by {by}, one per system."])
        if failed
        else "",
    ]


def _gallery(title: str, items: list[dict[str, Any]], judge: str, order: list[int]) -> str:
    """Cards of the first designs in an order (positions in `items`), one per system."""
    shown: dict[str, int] = {}
    for k in order:
        if len(shown) < _PICTURES:
            shown.setdefault(str(items[k]["identity"]), k)
    cards = "\n".join(_card(k, items[k], judge) for k in shown.values())
    return f'<h3>{title}</h3>\n<div class="designs">\n{cards}\n</div>'


def _card(k: int, item: dict[str, Any], judge: str) -> str:
    best = item["best"]

    def system() -> System:
        identity = parse_identity(item["identity"])
        return read_cif(extract_cif(best["text"]), identity.adsorbate, identity.miller)

    facts = (
        f"<b>{html.text(item['identity'])}</b><br>wanted {number(item['energy'], 2)} eV · predicted "
        f"{number(best.get('predicted'), 2)} eV · {html.text(_judged(item, judge))}"
    )
    text = html.details("CIF", html.pre(best["text"]))
    return f'<div class="design" data-task="{k}">{html.views(system)}<p>{facts}</p>{text}</div>'


def _judged(item: dict[str, Any], judge: str) -> str:
    judged = item.get("judged")
    if judged is None:
        return "not judged"
    if not judged.get("ok"):
        return f"refused by {judge}: {judged.get('reason')}"
    return f"{judge} {number(judged.get('energy'), 2)} eV"


def _all_tasks(items: list[dict[str, Any]], judge: str) -> str:
    rows = [
        [
            str(item["identity"]),
            number(item["energy"], 2),
            number((item.get("best") or {}).get("predicted"), 2),
            (item.get("best") or {}).get("fault") or "–",
            _judged(item, judge).removeprefix(f"{judge} ").removesuffix(" eV"),
            "yes" if item.get("success_own") else "no",
            "yes" if item.get("success_judge") else "no" if item.get("judged") else "–",
        ]
        for item in items
    ]
    header = [
        "system",
        "wanted (eV)",
        "predicted (eV)",
        "AD",
        f"{judge} (eV)",
        "success, own",
        f"success, {judge}",
    ]
    return html.details(f"All {len(items)} tasks", html.table(Table("", header, rows, []))) if rows else ""


# --------------------------------------------------------------------------- training, texts, configuration


def _training(metrics: Metrics, logs: dict[str, list[dict[str, Any]]]) -> str:
    parts = []
    if logs:
        caption = (
            "Loss of each stage and the number that tells its progress, from log.jsonl (pale: single steps, "
            "line: running mean). GA-GRPO's reward falls whenever new tasks begin."
        )
        size = (max(4.5, 2.35 * len(logs)), 4.2)
        still = html.figure("training", caption, size, lambda f: draw_training(f, logs))
        parts.append(html.live("training", still))
    timed = {s: rows for s, rows in logs.items() if any("seconds_decode" in row for row in rows)}
    if timed:
        caption = (
            "Where the seconds of each step of the RL stages go. Rewards are computed while others are "
            "still decoded; only what sampling then waited for them is drawn."
        )
        size = (4.3 * len(timed), 3.2)
        parts.append(html.figure("timeline", caption, size, lambda f: draw_timeline(f, timed)))
    seconds = {k: v for k, v in (metrics.get("seconds") or {}).items() if finite(v)}
    if seconds:
        caption = "Wall-clock time of every part; stages in their colours, everything else grey."
        size = (7.5, 0.7 + 0.27 * len(seconds))
        parts += [
            html.table(time_table(metrics)),
            html.figure("seconds", caption, size, lambda f: draw_seconds(f.subplots(), seconds)),
        ]
    return "\n".join(parts)


def _texts(metrics: Metrics, answered: bool) -> str:
    """Sampled answers: a table where a run has kept them all, else the first of each evaluation."""
    generation = metrics.get("generation") or {}
    parts = [
        html.details(f"Sampled after {STAGE_NAMES[stage]}, example {k}", html.pre(text))
        for stage in ordered(generation)
        for k, text in enumerate(generation[stage].get("examples") or [], start=1)
    ]
    still = "\n".join([*parts, html.notes(["As sampled, the first of each evaluation."])]) if parts else ""
    notes = [
        "Every row is one answer with its reward terms (10 is nothing to object to); a press on it shows "
        "the structure and the text. Fails are those of the table of generated CIFs."
    ]
    return html.live("answers", still) + html.notes(notes) if answered else still


def _configuration(metrics: Metrics) -> str:
    parts = [
        html.details(title, f"<pre>{html.text(json.dumps(metrics[key], indent=2, ensure_ascii=False))}</pre>")
        for key, title in (
            ("config", "Configuration"),
            ("machine", "Machine"),
            ("data", "Data"),
            ("parameters", "Parameters"),
        )
        if metrics.get(key)
    ]
    return "\n".join(parts)
