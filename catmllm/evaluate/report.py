"""report.html of a run: one file without any outside resource, verdicts first, the numbers and figures behind them.

A run may be unfinished: the report shows what is there and says what is missing. Texts that models wrote are escaped
and control characters replaced; the page forbids itself scripts and requests (Content-Security-Policy).
"""

from __future__ import annotations

import html
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from catmllm.config import STAGES
from catmllm.evaluate.drawing import legend, structure_svg
from catmllm.evaluate.figures import (
    draw_design,
    draw_failures,
    draw_parity,
    draw_rewards,
    draw_seconds,
    draw_solved,
    draw_trace,
    draw_training,
    figure_svg,
    readme_figure,
    solved_by_iteration,
)
from catmllm.evaluate.summary import (
    STAGE_MEANINGS,
    STAGE_NAMES,
    Metrics,
    Table,
    claims,
    conditions,
    design_table,
    finite,
    generation_table,
    missing_parts,
    number,
    ordered,
    property_table,
    summary_table,
    time_table,
)
from catmllm.structure.cif import read_cif
from catmllm.structure.formula import parse_identity
from catmllm.trainer.metrics import read_log
from rewards_fast import extract_cif

__all__ = ["readme_figure", "summary_table", "write_report"]

_PICTURES = 6  # designs that are drawn
_EXAMPLE_CHARACTERS = 4000  # of a model's text that are shown
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_CSS = """
body { font: 15px/1.5 Verdana, "DejaVu Sans", sans-serif; color: #1a1a1a; background: #fff; max-width: 66rem;
  margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.15rem; border-bottom: 1px solid #ccc; margin: 2.4rem 0 .8rem; }
.conditions, figcaption, .notes { color: #555; font-size: .82rem; } .notes { margin: .3rem 0 1rem; padding-left: 1.1rem; }
.missing { border-left: 4px solid #e69f00; background: #fff8e8; padding: .5rem .9rem; }
.claims { list-style: none; padding: 0; } .claims li { margin: .5rem 0; padding-left: 6rem; position: relative; }
.verdict { position: absolute; left: 0; top: .1rem; width: 5rem; text-align: center; border-radius: 3px; color: #fff;
  font-size: .8rem; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.yes { background: #00734f; } .no { background: #b03a2e; } .unclear { background: #6b6b6b; }
.evidence { display: block; color: #555; font-size: .85rem; }
table { border-collapse: collapse; font-size: .85rem; margin: .6rem 0 .2rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: bold; white-space: nowrap; padding-bottom: .3rem; }
th, td { padding: .2rem .8rem .2rem 0; text-align: right; border-bottom: 1px solid #e4e4e4; }
th:first-child, td:first-child { text-align: left; } thead th { border-bottom: 1px solid #888; vertical-align: bottom; }
figure { margin: 1rem 0; } figure svg { max-width: 100%; height: auto; display: block; }
.pair { display: flex; flex-wrap: wrap; gap: 1.5rem; align-items: flex-start; } .pair figure { flex: 1 1 26rem; }
.designs { display: flex; flex-wrap: wrap; gap: 1rem; } .design { border: 1px solid #ddd; padding: .6rem; width: 19.5rem;
  break-inside: avoid; font-size: .82rem; box-sizing: border-box; } .design .views { display: flex; gap: .4rem; align-items: flex-end;
  margin-bottom: .4rem; }
.atoms { background: #fafafa; flex: none; } .dot { display: inline-block; width: .7em; height: .7em; border: 1px solid #555;
  border-radius: 50%; margin: 0 .2em 0 .5em; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
pre { font: 12px/1.35 monospace; background: #f6f6f6; padding: .7rem; overflow-x: auto; white-space: pre-wrap;
  unicode-bidi: isolate; } summary { cursor: pointer; margin: .3rem 0; }
@media print { h2 { break-after: avoid; } body { margin: 0; max-width: none; font-size: 11px; } figure, table, .claims li { break-inside: avoid; } }
"""


def write_report(run: Path) -> Path:
    """Write run/report.html from run/metrics.json and run/<stage>/log.jsonl; returns its path.

    Parts that are missing, and a metrics.json that cannot be read, are told in the report. Raises FileNotFoundError
    where there is no run folder.
    """
    run = Path(run)
    if not run.is_dir():
        raise FileNotFoundError(f"{run} is no folder of a run")
    metrics, problem = _read_metrics(run / "metrics.json")
    logs = {stage: rows for stage in STAGES if (rows := read_log(run / stage / "log.jsonl"))}
    missing = ([problem] if problem else []) + missing_parts(metrics, logs)
    title = f"Run {run.resolve().name}"
    body = [
        f"<h1>{_text(title)}</h1>",
        f'<p class="conditions">{_text(conditions(metrics))}</p>',
        _missing(missing),
        _headlines(metrics),
        _property(metrics),
        _generation(metrics),
        _design(metrics),
        _training(metrics, logs),
        _texts(metrics),
        _configuration(metrics),
    ]
    page = (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta http-equiv="Content-Security-Policy" '
        f'content="{_POLICY}">\n<meta name="viewport" content="width=device-width">\n<title>{_text(title)}</title>\n'
        f"<style>{_CSS}</style>\n</head>\n<body>\n" + "\n".join(filter(None, body)) + "\n</body>\n</html>\n"
    )
    path = run / "report.html"
    path.write_text(page, encoding="utf-8")
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


# --------------------------------------------------------------------------- pieces of HTML


def _text(value: Any) -> str:
    """Any text made harmless: escaped, control and direction characters and lone surrogates replaced."""
    return html.escape(_CONTROL.sub("\ufffd", str(value).replace("\r\n", "\n")))


def _section(title: str, *parts: str) -> str:
    return "\n".join([f"<section>\n<h2>{_text(title)}</h2>", *filter(None, parts), "</section>"])


def _table(table: Table | None) -> str:
    if table is None:
        return ""
    head = "".join(f'<th scope="col">{_text(cell)}</th>' for cell in table.header)
    rows = "\n".join(
        "<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in table.rows
    )
    return (
        f"<table><caption>{_text(table.title)}</caption>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table>"
        + _notes(table.notes)
    )


def _notes(notes: Iterable[str]) -> str:
    items = "".join(f"<li>{_text(note)}</li>" for note in notes)
    return f'\n<ul class="notes">{items}</ul>' if items else ""


def _figure(name: str, caption: str, size: tuple[float, float], draw: Callable[[Figure], None]) -> str:
    svg = figure_svg(name, caption, size, draw)
    return f"<figure>{svg}<figcaption>{_text(caption)}</figcaption></figure>"


def _details(summary: str, body: str) -> str:
    return f"<details><summary>{_text(summary)}</summary>\n{body}\n</details>"


def _pre(text: Any) -> str:
    shown = str(text)[:_EXAMPLE_CHARACTERS]
    cut = len(str(text)) - len(shown)
    return f"<pre>{_text(shown)}</pre>" + (f'<p class="notes">{cut} more characters</p>' if cut else "")


# --------------------------------------------------------------------------- sections


def _missing(missing: list[str]) -> str:
    if not missing:
        return ""
    return f'<p class="missing"><b>Not in this run (yet):</b> {"; ".join(map(_text, missing))}.</p>'


def _headlines(metrics: Metrics) -> str:
    found = claims(metrics)
    items = "\n".join(
        f'<li><span class="verdict {c.verdict}">{c.verdict}</span>{_text(c.sentence)}'
        f'<span class="evidence">{_text(c.evidence)}</span></li>'
        for c in found
    )
    explained = (
        "yes, no: the difference is larger than two standard errors (for baselines: of the model's MAE); of designs, the "
        "95\u00a0% interval lies above every control, or the rate is not above all of them. unclear: chance may explain it. "
        "“Did not lower” holds unless a drop is larger than two standard errors. Systems count as independent although "
        "several share a slab, so true errors are larger."
    )
    listed = f'<ul class="claims">\n{items}\n</ul>' if found else "<p>Nothing has been measured yet.</p>"
    notes = [explained, *STAGE_MEANINGS] if found else STAGE_MEANINGS
    return _section("What holds, what does not", listed, _notes(notes))


def _property(metrics: Metrics) -> str:
    table = property_table(metrics)
    stages = [s for s in ordered(metrics.get("property")) if metrics["property"][s].get("parity")]
    parity = ""
    if stages:
        result = metrics["property"][stages[-1]]
        caption = (
            f"Energy head with text and graph, after {STAGE_NAMES[stages[-1]]}. Line: perfect prediction."
        )
        parity = _figure(
            "parity",
            caption,
            (5.4, 4.3),
            lambda f: draw_parity(f.subplots(), result, "Energies of test systems"),
        )
    return _section("Energy prediction", _table(table), parity) if table else ""


def _generation(metrics: Metrics) -> str:
    generation = metrics.get("generation") or {}
    table = generation_table(metrics)
    if table is None:
        return ""
    parts = [
        _table(table),
        _figure(
            "failures",
            "Share of sampled CIFs that fail each check; lines: 95 % Wilson intervals.",
            (8.6, 3.6),
            lambda f: draw_failures(f.subplots(), generation),
        ),
    ]
    if any(generation[stage].get("reward_hist") for stage in ordered(generation)):
        caption = "Rewards of single texts; an unreadable one is at the floor of -15."
        parts.append(_figure("rewards", caption, (8.6, 2.9), lambda f: draw_rewards(f, generation)))
    parts += [_table(_terms_table(generation)), _table(_reasons_table(generation))]
    return _section("Generated CIFs", *parts)


def _terms_table(generation: Metrics) -> Table | None:
    stages = [stage for stage in ordered(generation) if generation[stage].get("terms")]
    if not stages:
        return None
    names = list(generation[stages[0]]["terms"])
    rows = [
        [STAGE_NAMES[s], *(number(generation[s]["terms"].get(name), 2) for name in names)] for s in stages
    ]
    note = "Each is 10 at best; the floors are -15 (comp), -20 (parse), -10 (valid) and -10 (phys)."
    return Table("Mean of each reward term", ["after stage", *names], rows, [note])


def _reasons_table(generation: Metrics) -> Table | None:
    stages = ordered(generation)
    reasons = {stage: generation[stage].get("reasons") or {} for stage in stages}
    codes = sorted(
        {code for found in reasons.values() for code in found},
        key=lambda c: (-sum(r.get(c, 0) for r in reasons.values()), c),
    )
    if not codes:
        return None
    rows = [[code, *(str(reasons[stage].get(code, 0)) for stage in stages)] for code in codes]
    header = ["reason", *(f"{STAGE_NAMES[stage]} (of {generation[stage].get('n', '?')})" for stage in stages)]
    return Table("Why texts could not be read as a CIF", header, rows, [])


def _design(metrics: Metrics) -> str:
    design = metrics.get("design") or {}
    table = design_table(metrics)
    if table is None or not design.get("n"):
        return ""
    items = design.get("items") or []
    parts = [
        _table(table),
        _figure(
            "design",
            "Share of tasks with a successful design, 95 % Wilson intervals; controls are exact averages.",
            (8.6, 3.4),
            lambda f: draw_design(f.subplots(), design),
        ),
    ]
    if any(item.get("trace") for item in items):
        parts.append(_trace_figure(design))
    pictures = _pictures(items)
    if pictures:
        parts.append(pictures)
    parts += [_table(_refusals(items)), _all_tasks(items)]
    return _section("Design by target energy", *parts)


def _trace_figure(design: Metrics) -> str:
    solved = solved_by_iteration(design)

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        draw_trace(left, design)
        draw_solved(right, design)

    caption = (
        f"Iteration 0 is drawn from the text alone, later ones with an exemplar from the pool: {100 * solved[0]:.0f} % of the "
        f"tasks were solved at iteration 0 and {100 * solved[-1]:.0f} % at iteration {len(solved) - 1}, by the own predictor. "
        "More candidates alone raise this too. Bands: quartiles over tasks; a task without a candidate counts as an "
        "infinite error (a gap in a line: more than half of the tasks; a band up to the edge: more than a quarter)."
    )
    return _figure("trace", caption, (8.6, 3.5), draw)


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
    """How far a design is from its target (eV) by the most independent judge that spoke; inf where none did."""
    judged, best = item.get("judged"), item.get("best") or {}
    if judged is not None:
        return (
            abs(judged["energy"] - item["energy"])
            if judged.get("ok") and finite(judged.get("energy"))
            else math.inf
        )
    return abs(best["predicted"] - item["energy"]) if finite(best.get("predicted")) else math.inf


def _pictures(items: list[dict[str, Any]]) -> str:
    shown: list[dict[str, Any]] = []
    feasible = [item for item in items if item.get("best") and item["best"].get("feasible")]
    for item in sorted(feasible, key=_miss):
        if len(shown) < _PICTURES and item["identity"] not in {other["identity"] for other in shown}:
            shown.append(item)
    if not shown:
        return ""
    cards = "\n".join(map(_card, shown))
    judge = "SevenNet-0" if any(item.get("judged") for item in shown) else "the own predictor"
    note = (
        f"The {len(shown)} closest of {len(items)} by {judge}, one a system: chosen, not typical; all tasks are below. From "
        "above with one cell dashed, and from the side; deeper atoms are paler, the adsorbate is ringed."
    )
    return f'<p><b>Best designs</b></p>\n<div class="designs">\n{cards}\n</div>{_notes([note])}'


def _card(item: dict[str, Any]) -> str:
    best = item["best"]
    try:
        identity = parse_identity(item["identity"])
        system = read_cif(extract_cif(best["text"]), identity.adsorbate, identity.miller)
        views = structure_svg(system, "top", 150) + structure_svg(system, "side", 118)
        picture = f'<div class="views">{views}</div>{legend(system)}'
    except ValueError as error:
        picture = f"<p>cannot be drawn: {_text(error)}</p>"
    facts = (
        f"<b>{_text(item['identity'])}</b><br>wanted {number(item['energy'], 2)} eV · predicted "
        f"{number(best.get('predicted'), 2)} eV · {_text(_judged(item))}"
    )
    text = _details("CIF", _pre(best["text"]))
    return f'<div class="design">{picture}<p>{facts}</p>{text}</div>'


def _judged(item: dict[str, Any]) -> str:
    judged = item.get("judged")
    if judged is None:
        return "not judged"
    if not judged.get("ok"):
        return f"refused by SevenNet-0: {judged.get('reason')}"
    return f"SevenNet-0 {number(judged.get('energy'), 2)} eV"


def _all_tasks(items: list[dict[str, Any]]) -> str:
    rows = [
        [
            str(item["identity"]),
            number(item["energy"], 2),
            number((item.get("best") or {}).get("predicted"), 2),
            _judged(item).removeprefix("SevenNet-0 ").removesuffix(" eV"),
            "yes" if item.get("success_own") else "no",
            "yes" if item.get("success_sevennet") else "no" if item.get("judged") else "–",
        ]
        for item in items
    ]
    header = [
        "system",
        "wanted (eV)",
        "predicted (eV)",
        "SevenNet-0 (eV)",
        "success, own",
        "success, SevenNet-0",
    ]
    return _details(f"All {len(items)} tasks", _table(Table("", header, rows, []))) if rows else ""


# --------------------------------------------------------------------------- training, texts, configuration


def _training(metrics: Metrics, logs: dict[str, list[dict[str, Any]]]) -> str:
    parts = []
    if logs:
        caption = (
            "Loss of each stage and the number that tells its progress, from log.jsonl (pale: single steps, line: running "
            "mean). GA-GRPO's reward falls whenever new tasks begin."
        )
        size = (max(4.5, 2.35 * len(logs)), 4.2)
        parts.append(_figure("training", caption, size, lambda f: draw_training(f, logs)))
    seconds = {k: v for k, v in (metrics.get("seconds") or {}).items() if finite(v)}
    if seconds:
        caption = "Wall-clock time of every part; stages in their colours, everything else grey."
        size = (7.5, 0.7 + 0.27 * len(seconds))
        parts += [
            _table(time_table(metrics)),
            _figure("seconds", caption, size, lambda f: draw_seconds(f.subplots(), seconds)),
        ]
    refit = metrics.get("refit") or {}
    if refit:
        parts.append(
            f"<p>Before GA-GRPO the energy head was refitted on the frozen backbone: validation MAE "
            f"{number(refit.get('val_mae_before'))} → {number(refit.get('val_mae_after'))} eV.</p>"
        )
    return _section("Training", *parts) if parts else ""


def _texts(metrics: Metrics) -> str:
    generation = metrics.get("generation") or {}
    parts = [
        _details(f"Sampled after {STAGE_NAMES[stage]}, example {k}", _pre(text))
        for stage in ordered(generation)
        for k, text in enumerate(generation[stage].get("examples") or [], start=1)
    ]
    return (
        _section("Example answers", *parts, _notes(["As sampled, the first of each evaluation."]))
        if parts
        else ""
    )


def _configuration(metrics: Metrics) -> str:
    parts = [
        _details(title, f"<pre>{_text(json.dumps(metrics[key], indent=2, ensure_ascii=False))}</pre>")
        for key, title in (
            ("config", "Configuration"),
            ("machine", "Machine"),
            ("data", "Data"),
            ("parameters", "Parameters"),
        )
        if metrics.get(key)
    ]
    return _section("Configuration", *parts) if parts else ""
