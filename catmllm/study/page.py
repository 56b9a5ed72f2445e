"""A study from its file to `study.json`, `table.md`, `figure.png` and `study.html`."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from catmllm.report import page as html
from catmllm.report.figures import save_figure
from catmllm.report.summary import Table, conditions, taken
from catmllm.study.cells import Axis, Runner, Study, read, run_all, trainer
from catmllm.study.compare import HEADER, cells_of, compared, sentences, table, values_of


def study(
    path: Path,
    out: Path,
    ranks: int | None = None,
    only: str | None = None,
    run: Runner | None = None,
    seeds: int | None = None,
    more: Sequence[str] = (),
    reuse: Sequence[Path] = (),
) -> str:
    """Run what is missing and write what it says into `out`; returns the table and its sentences. `seeds`:
    so many of the file's alone; `more`: arguments of every run after all others;
    `reuse`: folders of earlier runs, whose stages are taken where they are the same."""
    asked = read(path, more, ranks)
    asked = dataclasses.replace(asked, seeds=asked.seeds[:seeds])
    out.mkdir(parents=True, exist_ok=True)
    _announce(asked, only)
    folders = run_all(asked, out, run or trainer(asked.ranks), only, reuse)
    records = {
        name: [json.loads((f / "metrics.json").read_text()) for f in each] for name, each in folders.items()
    }
    every = [m for each in records.values() for m in each]
    if asked.ancestor is not None:
        places = [out / f"{split}-{seed}" / "ancestor" / "metrics.json" for split, seed in asked.seeds]
        every += [json.loads(place.read_text()) for place in places]
    values = {n: [values_of(m, f) for m, f in zip(records[n], folders[n])] for n in folders}
    rows = compared(values, asked.against)
    said = {
        "study": str(path),
        "asks": asked.asks,
        "seeds": list(asked.seeds),
        "conditions": conditions(next(iter(records.values()))[0]),
        "commits": commits(every),
        "rows": rows,
        "sentences": sentences(rows),
        "hours": {"expected": asked.hours, "taken": hours_taken(asked.ranks, every)},
        "seconds": {
            name: [round(sum(m.get("seconds", {}).values()), 1) for m in each]
            for name, each in records.items()
        },
    }
    words = "\n".join([table(rows), "", *(f"- {s}" for s in said["sentences"])]).strip()
    (out / "study.json").write_text(json.dumps(said, indent=1) + "\n")
    (out / "table.md").write_text(words + "\n")
    if rows:
        save_figure(out / "figure.png", size(rows), lambda f: draw(f, rows, asked.axis))
    (out / "study.html").write_text(written(path.stem, said, asked), encoding="utf-8")
    return words


def _announce(asked: Study, only: str | None) -> None:
    n = len(asked.seeds) * ((1 if only else len(asked.cells)) + (asked.ancestor is not None))
    about = "" if asked.hours is None else f"; all of the file should take {asked.hours:g} CPU hours"
    print(f"{n} runs of {asked.ranks} rank(s){about}", file=sys.stderr, flush=True)


def commits(every: Sequence[dict[str, Any]]) -> list[str]:
    """Those that made the runs, ancestors with them, and the stages that they took from others."""
    made = {str(m["machine"].get("commit")) for m in every if "machine" in m}
    return sorted(made.union(*(taken(m).values() for m in every)))


def hours_taken(ranks: int, every: Sequence[dict[str, Any]]) -> float:
    """Hours of all ranks of all runs, ancestors with them."""
    return round(ranks * sum(sum(m.get("seconds", {}).values()) for m in every) / 3600, 3)


def _grid(n: int) -> tuple[int, int]:
    """Lines and columns of n panels: at most three beside each other, four as a square."""
    columns = 2 if n == 4 else min(3, n)
    return -(-n // columns), columns


def size(rows: Mapping[str, Any]) -> tuple[float, float]:
    """Of the figure, in inches."""
    lines, columns = _grid(len(rows))
    return 3.6 * columns, 2.7 * lines


def draw(figure: Figure, rows: Mapping[str, Any], axis: Axis | None) -> None:
    """A panel for each measured thing: means with their intervals, a dot a seed."""
    panels = figure.subplots(*_grid(len(rows)), squeeze=False).ravel()
    for axes, (what, row) in zip(panels, rows.items()):
        _panel(axes, row, axis)
        axes.set_title(what, fontsize=8)
    for axes in panels[len(rows) :]:
        axes.set_axis_off()


def _panel(axes: Axes, row: Mapping[str, Any], axis: Axis | None) -> None:
    on = [name for name in row if axis is None or name in axis.at]
    places = {name: float(k) if axis is None else axis.at[name] for k, name in enumerate(on)}
    for name, x in places.items():
        cell = row[name]
        axes.plot([x] * len(cell["each"]), cell["each"], ".", color="#a3a3a3", markersize=4, zorder=1)
        axes.vlines(x, *cell["interval"], color="#0072b2", linewidth=1.4)
        axes.plot(x, cell["mean"], "o", color="#0072b2", markersize=5)
    if axis is None:
        axes.set_xticks(list(places.values()), list(places), rotation=20, ha="right", fontsize=7)
        axes.set_xlim(-0.6, len(places) - 0.4)
        return
    if axis.log:
        axes.set_xscale("log")
    axes.plot(list(places.values()), [row[name]["mean"] for name in places], "-", color="#0072b2")
    for name, colour in zip((n for n in row if n not in axis.at), ("#d55e00", "#009e73", "#cc79a7")):
        axes.axhspan(*row[name]["interval"], color=colour, alpha=0.12, linewidth=0)
        axes.axhline(row[name]["mean"], color=colour, linestyle="--", linewidth=1.0, label=name)
    axes.set_xlabel(axis.name)
    if len(places) < len(row):
        axes.legend(fontsize=7)


def written(name: str, said: Mapping[str, Any], asked: Study) -> str:
    """study.html."""
    rows = said["rows"]
    expected, taken = said["hours"]["expected"], said["hours"]["taken"]
    hours = f"{taken:.2f} hours of all ranks" + ("" if expected is None else f"; {expected:g} were expected")
    caption = (
        "Means over the seeds with their 95 % intervals by a bootstrap over (seed, bulk, facet); dots: "
        "single seeds; bands: cells that are not on the axis."
    )
    body = [
        f"<h1>Study {html.text(name)}</h1>",
        f"<p>{html.text(said['asks'])}</p>",
        f'<p class="conditions">{html.text(said["conditions"])}; {html.text(hours)}</p>',
        html.section("What holds, what does not", html.notes(said["sentences"])),
        html.section("Every number", html.table(Table("", HEADER, cells_of(rows), []))),
    ]
    if rows:
        picture = html.figure("study", caption, size(rows), lambda f: draw(f, rows, asked.axis))
        body.append(html.section("Figure", picture))
    settings = {"cells": asked.cells, "base": asked.base, "ancestor": asked.ancestor, "seeds": asked.seeds}
    text = json.dumps({**settings, "files": list(asked.files), "more": list(asked.more)}, indent=1)
    body.append(html.section("Settings", html.pre(text)))
    return html.page(f"Study {name}", body)
