"""The figures of a run. Every panel is drawn by one function,
so the report and the README show the same thing.

Nothing is left out to look better: bars start at zero, axes hold every point, a task without an answer counts
as an infinite error. Figures become inline SVG with text as text, without ids or addresses that could clash
in one page.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from catmllm.evaluate.metrics import TOLERANCE
from catmllm.report.summary import (
    ARMS,
    CONTROLS,
    JUDGES,
    METHOD_NAMES,
    RATE_NAMES,
    STAGE_NAMES,
    Metrics,
    finite,
    judge_title,
    last_judge,
    number,
    ordered,
    provenance,
    sampled_tasks,
    shown_mode,
    wilson_interval,
)

Floats = NDArray[np.float64]

# Okabe and Ito's colours, told apart by every kind of eye; a stage has the same one in all figures.
STAGE_COLOURS = {
    "encoder": "#b3a100",
    "align": "#8c8c8c",
    "joint": "#56b4e9",
    "instruct": "#0072b2",
    "grpo": "#e69f00",
    "ga_grpo": "#009e73",
}
JUDGE_COLOURS = {"own": "#cc79a7", "judge": "#d55e00"}
METHOD_COLOURS = {
    "search": "#009e73",
    "enumeration": "#0072b2",
    "kernel_ridge": "#e69f00",
    "analogues": "#cc79a7",
}
CONTROL_COLOURS = {
    "enumeration": "#0072b2",
    "kernel_ridge": "#e69f00",
    "analogues": "#cc79a7",
    "random": "#56b4e9",
    "retrieval": "#cccccc",
    "shuffled": "#7a7a7a",
    "shuffled_same_adsorbate": "#a3a3a3",
}
_BEST_ARM = "indicative_1"  # whose predictions are drawn beside those by two parts
ARM_COLOURS = {
    "two_parts": "#e69f00",
    "indicative_1": "#0072b2",
    "indicative_2": "#56b4e9",
    "indicative_4": "#56b4e9",
    "random": "#a3a3a3",
    "true": "#009e73",
}
ADSORBATE_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9") + (
    "#808080",
    "#b3a100",
    "#7b3294",
    "#00525e",
    "#a6611a",
    "#4d9221",
)
_STYLE: dict[Any, Any] = {
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8.0,
    "svg.fonttype": "none",
    "text.parse_math": False,  # names come from data: a `$` in one is no formula
}
_SHADES = {
    "#000000": "currentColor",
    "#222222": "currentColor",
    "#444444": "var(--soft)",
    "#ffffff": "var(--paper)",
    "#e6e6e6": "var(--line)",
}
LOSSES = {
    "encoder": "|error|/σ",
    "align": "InfoNCE (nats)",
    "joint": "MMTG loss",
    "instruct": "CE + |error|/σ",
    "grpo": "policy loss",
    "ga_grpo": "policy loss",
}
PROGRESS = {
    "encoder": ("energy_mae", "MAE, training batch (eV)"),
    "align": ("retrieval", "pairs matched in a batch"),
    "joint": ("energy_mae", "MAE, training batch (eV)"),
    "instruct": ("energy_mae", "MAE, training batch (eV)"),
    "grpo": ("reward", "mean reward R"),
    "ga_grpo": ("reward", "mean reward"),
}
_MANY_POINTS = 3000  # above this a scatter is drawn as pixels inside the SVG
README_LIMIT = 200_000  # bytes


# --------------------------------------------------------------------------- panels


def draw_parity(axes: Axes, result: Metrics, title: str) -> None:
    """Predicted against labelled energies of the test systems, coloured by adsorbate."""
    parity = result["parity"]
    energy, predicted = np.array(parity["energy"], float), np.array(parity["predicted"], float)
    names = np.array([str(name) for name in parity.get("adsorbate", [""] * len(energy))])
    known = np.isfinite(energy) & np.isfinite(predicted)
    low, high = (f(np.concatenate([energy[known], predicted[known], [0.0]])) for f in (np.min, np.max))
    ends = [low - 0.05 * (high - low) - 0.1, high + 0.05 * (high - low) + 0.1]
    axes.plot(ends, ends, color="#444444", linewidth=0.8, zorder=1)
    for k, name in enumerate(sorted(set(names))):
        mine = known & (names == name)
        axes.plot(
            energy[mine],
            predicted[mine],
            "o",
            color=ADSORBATE_COLOURS[k % len(ADSORBATE_COLOURS)],
            markersize=3.2,
            markeredgewidth=0,
            alpha=0.75,
            label=name,
            rasterized=len(energy) > _MANY_POINTS,
        )
    axes.set(xlim=ends, ylim=ends, xlabel="label (eV)", ylabel="predicted (eV)", title=title)
    axes.set_aspect("equal")
    shown = result.get(shown_mode(result), {})
    lost = f", {int((~known).sum())} not a number" if not known.all() else ""
    axes.text(
        0.03,
        0.97,
        f"MAE {number(shown.get('mae'))} eV\nR² {number(shown.get('r2'), 2)}\nn = {len(energy)}{lost}",
        transform=axes.transAxes,
        va="top",
    )
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), handletextpad=0.1, markerscale=1.4)


def draw_failures(axes: Axes, generation: Metrics) -> None:
    """Failure rates by stage with 95 % Wilson intervals and values."""
    stages = ordered(generation)
    rates = [rate for rate in RATE_NAMES if any(finite(generation[s].get(rate)) for s in stages)]
    width, top = 0.8 / max(1, len(stages)), 1.0
    for k, stage in enumerate(stages):
        n = generation[stage]["n"]
        for i, rate in enumerate(rates):
            value = generation[stage].get(rate)
            if not finite(value):
                continue
            x = i + (k - (len(stages) - 1) / 2) * width
            high = _bar(axes, x, value, n, 0.92 * width, STAGE_COLOURS[stage])
            top = max(top, high)
        axes.bar(0, 0, color=STAGE_COLOURS[stage], label=f"{STAGE_NAMES[stage]} (n = {n})")
    axes.set_xticks(range(len(rates)), [RATE_NAMES[rate] for rate in rates])
    axes.set(ylabel="share of sampled CIFs (%)", title="Failures of sampled CIFs")
    _percent_axis(axes, top)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=max(1, len(stages)))


def _bar(axes: Axes, x: float, share: float, n: int | None, width: float, colour: str) -> float:
    """A bar in percent with its value and, where n trials stand behind it, its interval;
    returns its top (%)."""
    high = share
    axes.bar(x, 100 * share, width, color=colour)
    if n:
        low, high = wilson_interval(share, n)
        axes.plot([x, x], [100 * low, 100 * high], color="#222222", linewidth=0.9)
    value = f"{100 * share:.1f}" if n is None or n >= 200 else f"{100 * share:.0f}"
    axes.annotate(
        value,
        (x, 100 * high),
        xytext=(0, 2),
        textcoords="offset points",
        ha="center",
        va="bottom",
        fontsize=7.0,
    )
    return 100 * high


def _percent_axis(axes: Axes, top: float) -> None:
    """Bars from zero with room for their values; no tick above 100 %."""
    limit = 1.12 * top
    axes.set_ylim(0, limit)
    axes.set_yticks(
        [
            tick
            for tick in MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(0, limit)
            if 0 <= tick <= min(100, limit)
        ]
    )
    axes.grid(axis="x", visible=False)


def draw_trace(axes: Axes, design: Metrics) -> None:
    """|E_pred - E*| over the iterations of the closed loop: median over tasks with the quartile band."""
    items = [item for item in design.get("items", []) if item.get("trace")]
    best = trace_values(items, lambda item, row: _distance(row.get("best_predicted"), item["energy"]))
    mean = trace_values(items, lambda item, row: _or_inf(row.get("mean_error")))
    steps = np.arange(best.shape[1])
    tolerance = design.get("tolerance", TOLERANCE)
    quantiles = [[_quantile(values, q) for q in (0.25, 0.5, 0.75)] for values in (mean, best)]
    top = 1.3 * float(np.max(quantiles, initial=tolerance, where=np.isfinite(quantiles)))
    for (low, middle, high), label, colour in zip(
        quantiles,
        ("valid candidates of the iteration, mean", "best of the pool"),
        ("#7a7a7a", JUDGE_COLOURS["own"]),
    ):
        # where the upper quartile is infinite the band runs out of the picture
        axes.fill_between(
            steps, np.minimum(low, top), np.minimum(high, top), color=colour, alpha=0.2, linewidth=0
        )
        shown = np.where(np.isfinite(middle), middle, np.nan)
        axes.plot(steps, shown, "o-", color=colour, markersize=3, label=label)
    axes.axhline(
        tolerance, color="#444444", linewidth=0.8, linestyle="--", label=f"tolerance {tolerance:g} eV"
    )
    axes.set(ylabel="|E_pred - E*| (eV)", title=f"Closed loop, own predictor, median of {len(items)} tasks")
    _over_iterations(axes, len(steps), top, "upper right")


def draw_energies(figure: Figure, design: Metrics) -> None:
    """Fig. 2 of the paper: every candidate's predicted energy in the order of the search, and the pool's
    best, towards the wanted energy; of six tasks evenly spaced among all."""
    items = [i for i in design.get("items", []) if i.get("trace") and "energies" in i["trace"][0]]
    shown = [items[k] for k in sorted({*np.linspace(0, len(items) - 1, 6).round().astype(int).tolist()})]
    panels = figure.subplots(-(-len(shown) // 3), min(3, len(shown)), squeeze=False).ravel()
    for axes, item in zip(panels, shown):
        ends = np.cumsum([len(row["energies"]) for row in item["trace"]])
        found = [(k, e) for k, e in enumerate(e for row in item["trace"] for e in row["energies"])]
        points = np.array([(k, e) for k, e in found if finite(e)], float).reshape(-1, 2)
        axes.plot(*points.T, ".", color="#7a7a7a", markersize=3, label="candidate")
        best = [float(e) if finite(e := row.get("best_predicted")) else np.nan for row in item["trace"]]
        axes.step(ends - 1, best, where="post", color=JUDGE_COLOURS["own"], label="best of the pool")
        axes.axhline(item["energy"], color="#444444", linewidth=0.9, linestyle="--", label="wanted")
        axes.set_title(item["identity"].replace("</s>", " on "), fontsize=8)
    for axes in panels[len(shown) :]:
        axes.set_axis_off()
    figure.supxlabel("candidate", fontsize=9)
    figure.supylabel("E_pred (eV)", fontsize=9)
    panels[0].legend(fontsize=7)


def draw_solved(axes: Axes, design: Metrics) -> None:
    """Share of tasks whose best structure is a success by the own predictor,
    and that have a valid structure at all."""
    items = [item for item in design.get("items", []) if item.get("trace")]
    solved, valid = solved_by_iteration(design), valid_by_iteration(design)
    steps = np.arange(len(solved))
    axes.plot(steps, 100 * valid, "s-", color="#7a7a7a", markersize=3, label="a valid structure in the pool")
    tolerance = design.get("tolerance", TOLERANCE)
    axes.plot(
        steps,
        100 * solved,
        "o-",
        color=JUDGE_COLOURS["own"],
        markersize=3,
        label=f"... predicted within {tolerance:g} eV",
    )
    axes.set(ylabel="share of tasks (%)", title=f"Tasks solved by the own predictor, n = {len(items)}")
    _over_iterations(axes, len(steps), 104, "best")


def _over_iterations(axes: Axes, steps: int, top: float, legend: Literal["upper right", "best"]) -> None:
    """The axis that both pictures of the closed loop have, and their legend."""
    axes.set(xlim=(-0.2, max(1.0, steps - 0.8)), ylim=(0, top), xlabel="iteration of the closed loop")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc=legend)


def draw_design(axes: Axes, design: Metrics) -> None:
    """Success by both judges beside the controls; those that are exact averages have no interval."""
    judges = [judge for judge in JUDGES if design.get(judge)]
    kinds = [
        "success",
        *(key for key in CONTROLS if any(finite(design[judge].get(key)) for judge in judges)),
    ]
    width, top = 0.84 / len(kinds), 1.0
    for i, judge in enumerate(judges):
        for k, kind in enumerate(kinds):
            value = design[judge].get(kind)
            if not finite(value):
                continue
            x = i + (k - (len(kinds) - 1) / 2) * width
            paint = JUDGE_COLOURS[judge] if kind == "success" else CONTROL_COLOURS[kind]
            sampled = design["n"] if kind == "success" else sampled_tasks(design, kind)
            top = max(top, _bar(axes, x, value, sampled or None, 0.92 * width, paint))
    for kind in kinds[1:]:
        axes.bar(0, 0, color=CONTROL_COLOURS[kind], label=f"control: {CONTROLS[kind]}")
    axes.set_xticks(range(len(judges)), [judge_title(design, judge) for judge in judges])
    axes.set(
        xlim=(-0.6, len(judges) - 0.4),
        xlabel="judge",
        ylabel="success (%)",
        title=f"Designs within {design.get('tolerance', TOLERANCE):g} eV of the target, n = {design['n']} "
        "tasks",
    )
    _percent_axis(axes, top)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2, columnspacing=1.2)


def draw_ranges(axes: Axes, missing: Metrics) -> None:
    """Twelve pairs of adsorbate and catalyst, evenly spaced by the width of their range: dots are energies of
    their configurations, bars what is predicted without a structure, by bonds of indicative CIFs and by two
    parts (the paper's Fig. 6a)."""
    pairs = sorted(missing["pairs"], key=lambda pair: np.ptp(pair["energies"]))
    shown = [pairs[k] for k in np.unique(np.linspace(0, len(pairs) - 1, 12).round().astype(int))]
    for x, pair in enumerate(shown):
        energies = np.array(pair["energies"])
        axes.vlines(x, energies.min(), energies.max(), color="#e6e6e6", linewidth=9, zorder=1)
        axes.plot(np.full(len(energies), x), energies, "o", color="#444444", markersize=3, zorder=2)
        for arm, side in (("two_parts", -1), (_BEST_ARM, 1)):
            predicted = [p for p in pair["predicted"][arm] if finite(p)]
            left, right = sorted((x + 0.12 * side, x + 0.42 * side))
            axes.hlines(predicted, left, right, colors=ARM_COLOURS[arm], linewidth=1.3, alpha=0.8, zorder=3)
    axes.plot([], [], "o", color="#444444", markersize=3, label="energies of configurations")
    for arm in ("two_parts", _BEST_ARM):
        axes.plot([], [], color=ARM_COLOURS[arm], label=f"predicted by {ARMS[arm]}")
    names = [str(pair["identity"]).replace("</s>", " on ") for pair in shown]
    axes.set_xticks(range(len(shown)), names, rotation=40, ha="right", fontsize=7.0)
    axes.set(ylabel="energy (eV)", title=f"{len(shown)} of {len(pairs)} pairs of adsorbate and catalyst")
    axes.grid(axis="x", visible=False)
    axes.legend(loc="best")


def draw_inclusion(axes: Axes, missing: Metrics) -> None:
    """PIR by what is read, of the model and of ridge regression, with bootstrap intervals (Fig. 6b)."""
    arms, top = missing["arms"], 1.0
    for i, arm in enumerate(ARMS):
        for row, shift, colour in ((arm, -0.2, ARM_COLOURS[arm]), (f"ridge_{arm}", 0.2, "#cccccc")):
            low, high = (100 * end for end in arms[row]["interval"])
            axes.bar(i + shift, 100 * arms[row]["pir"], 0.38, color=colour)
            axes.plot([i + shift] * 2, [low, high], color="#222222", linewidth=0.9)
            top = max(top, high)
    mean = 100 * arms["adsorbate_mean"]["pir"]
    axes.axhline(mean, color="#7a7a7a", linewidth=0.9, linestyle="--", label="mean of the adsorbate")
    axes.bar(0, 0, color="#cccccc", label="ridge regression on the same")
    short = ["two parts", *(f"indicative\n× {a[-1]}" for a in ARMS if a.startswith("ind")), "random", "true"]
    axes.set_xticks(range(len(ARMS)), short, fontsize=7.5)
    axes.set(ylabel="PIR (%)", title="Predictions in the range of energies")
    _percent_axis(axes, top)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)


def draw_curve(
    axes: Axes,
    design: Metrics,
    names: Mapping[str, str] = METHOD_NAMES,
    counted: str = "predictions",
) -> None:
    """Success over the number of predictions with intervals, a line a method, and what ignores the target."""
    judge, budgets, top = last_judge(design), design["budgets"], 1.0
    methods = [m for m in names if judge in design["curves"].get(m, {})]
    for k, method in enumerate(methods):
        curve = design["curves"][method][judge]
        x = np.array(budgets) * 1.03 ** (k - 1)  # so that intervals stand beside each other
        low, high = 100 * np.array(curve["interval"]).T
        axes.plot(
            x,
            100 * np.array(curve["success"]),
            "o-",
            color=METHOD_COLOURS[method],
            label=names[method],
        )
        axes.vlines(x, low, high, color=METHOD_COLOURS[method], linewidth=0.9)
        top = max(top, float(high.max()))
    for key, style in (("retrieval", ":"), ("shuffled_same_adsorbate", "--")):
        share = design[judge].get(key)
        if finite(share):
            axes.axhline(100 * share, color="#7a7a7a", linewidth=0.9, linestyle=style, label=CONTROLS[key])
    axes.set_xscale("log")
    axes.set_xticks(budgets, [str(b) for b in budgets])
    axes.minorticks_off()
    axes.set(
        xlabel=f"{counted} for a task",
        ylabel="success (%)",
        title=f"Designs, judged by {judge_title(design, judge)}, n = {design['n']} tasks",
    )
    _percent_axis(axes, top)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2, columnspacing=1.2)


def draw_rewards(figure: Figure, generation: Metrics) -> None:
    """The distribution of rewards, a panel a stage on common axes."""
    stages = [stage for stage in ordered(generation) if generation[stage].get("reward_hist")]
    panels = figure.subplots(1, len(stages), sharey=True, squeeze=False)[0]
    for axes, stage in zip(panels, stages):
        g = generation[stage]
        edges, counts = np.array(g["reward_hist"]["edges"]), np.array(g["reward_hist"]["counts"], float)
        share = 100 * counts / max(1.0, counts.sum())
        axes.bar(edges[:-1], share, np.diff(edges), align="edge", color=STAGE_COLOURS[stage])
        axes.axvline(g["reward"], color="#222222", linewidth=0.9, linestyle="--")
        at_top = share[edges[:-1] >= 9.0].sum()
        note = f"mean {number(g['reward'], 2)} (dashed) · floor {share[0]:.1f} % · R ≥ 9: {at_top:.1f} %"
        axes.set(xlabel="reward R", xlim=(edges[0] - 0.5, edges[-1] + 0.5))
        axes.set_title(f"{STAGE_NAMES[stage]} (n = {g['n']})", pad=18)
        axes.annotate(
            note,
            (0.5, 1.0),
            (0, 5),
            "axes fraction",
            "offset points",
            ha="center",
            fontsize=7.0,
            annotation_clip=False,
        )
    panels[0].set(ylabel="share of sampled CIFs (%)", ylim=(0, None))


def draw_training(figure: Figure, logs: dict[str, list[dict[str, Any]]]) -> None:
    """Loss and the telling number of every stage over its steps."""
    stages = ordered(logs)
    panels = figure.subplots(2, len(stages), squeeze=False)
    for column, stage in enumerate(stages):
        key, label = PROGRESS[stage]
        curves = [("loss", LOSSES[stage]), (key, label)]
        if not any(key in row for row in logs[stage]):
            curves.pop()
            panels[1, column].set_axis_off()
        for axes, (name, ylabel) in zip(panels[:, column], curves):
            rows = [(row["step"], row[name]) for row in logs[stage] if finite(row.get(name))]
            steps, values = (np.array(part, float) for part in zip(*rows)) if rows else (np.zeros(0),) * 2
            _curve(axes, steps, values, STAGE_COLOURS[stage])
            axes.set(xlabel="step", ylabel=ylabel)
            if name in ("retrieval", "energy_mae"):
                axes.set_ylim(bottom=0)
        panels[0, column].set_title(STAGE_NAMES[stage])


def _curve(axes: Axes, steps: Floats, values: Floats, colour: str) -> None:
    """The values; where there are many also their running mean, the values then pale."""
    window = len(values) // 15
    if window < 3:
        axes.plot(steps, values, ".-", color=colour, linewidth=1.2, markersize=4)
        return
    axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.35)
    smooth = np.convolve(values, np.ones(window) / window, mode="valid")
    axes.plot(steps[window // 2 : window // 2 + len(smooth)], smooth, color=colour, linewidth=1.6)


def draw_seconds(axes: Axes, seconds: Metrics) -> None:
    """Minutes of each part of the run, in the order in which they were recorded."""
    parts = {key: value for key, value in seconds.items() if finite(value)}
    for i, (key, value) in enumerate(parts.items()):
        axes.barh(i, value / 60, color=STAGE_COLOURS.get(key, "#dcdcdc"), height=0.7)
        axes.annotate(
            f"{value:.0f} s",
            (value / 60, i),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
            fontsize=7.5,
        )
    names = [STAGE_NAMES.get(key, key) for key in parts]
    axes.set_yticks(range(len(parts)), names)
    axes.set(xlabel="minutes", xlim=(0, 1.12 * max(parts.values()) / 60 or 1), ylim=(len(parts) - 0.5, -0.5))
    axes.grid(axis="y", visible=False)


def draw_timeline(figure: Figure, logs: dict[str, list[dict[str, Any]]]) -> None:
    """Where the seconds of each RL step go, stacked: what happens beside decoding (the reward)
    is not added."""
    stages = [s for s in ordered(logs) if any("seconds_decode" in row for row in logs[s])]
    for axes, stage in zip(np.atleast_1d(figure.subplots(1, len(stages))), stages):
        rows = [row for row in logs[stage] if "seconds_decode" in row]
        steps = np.array([row["step"] for row in rows])
        parts = {
            name: np.array([row.get(key, 0.0) for row in rows])
            for name, key in (
                ("prefill", "seconds_prefill"),
                ("decode", "seconds_decode"),
                ("wait for rewards", "seconds_wait"),
                ("predict", "seconds_predict"),
            )
        }
        parts["update"] = np.array([row["seconds"] - row["prepare_seconds"] for row in rows])
        known = sum(parts.values())
        parts["other"] = np.maximum(np.array([row["seconds"] for row in rows]) - known, 0.0)
        shown = {name: values for name, values in parts.items() if values.max() > 0}
        axes.stackplot(steps, *shown.values(), labels=list(shown), step="post" if len(steps) > 1 else None)
        axes.set(xlabel="step", ylabel="seconds", title=STAGE_NAMES[stage], ylim=(0, None))
        axes.legend(loc="upper right", fontsize=7)


# --------------------------------------------------------------------------- the numbers behind the traces


def trace_values(
    items: Sequence[dict[str, Any]], value: Callable[[dict[str, Any], dict[str, Any]], float]
) -> Floats:
    """float64 [tasks, iterations]: `value(item, row)` along every task's trace,
    as long as the shortest one."""
    length = min((len(item["trace"]) for item in items), default=0)
    rows = [[value(item, row) for row in item["trace"][:length]] for item in items]
    return np.array(rows, dtype=np.float64).reshape(len(items), length)


def solved_by_iteration(design: Metrics) -> Floats:
    """[iterations] share of tasks whose best structure so far is valid and predicted within the tolerance."""
    items = [item for item in design.get("items", []) if item.get("trace")]
    tolerance = design.get("tolerance", TOLERANCE) + 1e-9
    hit = trace_values(
        items,
        lambda item, row: (
            bool(row.get("feasible")) and _distance(row.get("best_predicted"), item["energy"]) <= tolerance
        ),
    )
    return np.maximum.accumulate(hit, axis=1).mean(axis=0) if hit.size else np.zeros(0)


def valid_by_iteration(design: Metrics) -> Floats:
    """[iterations] share of tasks with a structure in the pool that meets the hard constraints."""
    items = [item for item in design.get("items", []) if item.get("trace")]
    values = trace_values(items, lambda item, row: bool(row.get("feasible")))
    return values.mean(axis=0) if values.size else np.zeros(0)


def _distance(predicted: Any, target: float) -> float:
    return abs(predicted - target) if finite(predicted) else np.inf


def _or_inf(value: Any) -> float:
    return float(value) if finite(value) else np.inf


def _quantile(values: Floats, q: float) -> Floats:
    """Quantile over tasks [iterations]; an infinite error is the largest of all and may be the quantile."""
    found: Floats = np.quantile(values, q, axis=0, method="inverted_cdf")
    return found


# --------------------------------------------------------------------------- figures


def figure_svg(name: str, description: str, size: tuple[float, float], draw: Callable[[Figure], None]) -> str:
    """An `<svg>` to stand in an HTML page. name: tells its ids from other figures'; size: inches."""
    with rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return _inline(buffer.getvalue(), description)


def save_figure(path: Path, size: tuple[float, float], draw: Callable[[Figure], None]) -> None:
    """A figure as a file of its own, by the suffix; size: inches."""
    with rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        figure.savefig(path, dpi=110)


def _inline(svg: str, description: str) -> str:
    """Strips what only a file of its own needs: prolog, metadata, namespaces, ids that repeat,
    the font's name."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (?:xmlns(?::\w+)?|version)="[^"]*"', "", svg)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r' id="[A-Za-z][\w.]*_\d{1,4}"', "", svg)  # those of clips and markers end in ten hex digits
    svg = re.sub(
        r"(font(?:-family)?:[^;\"]*?)'DejaVu Sans'[^;\"]*", r"\1Verdana, 'DejaVu Sans', sans-serif", svg
    )
    for shade, name in _SHADES.items():  # the page's own, so that a dark page has light ink
        svg = svg.replace(shade, name)
    svg = re.sub(r"\n\s*", "\n", re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL))
    return svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(description)}"', 1).strip()


def readme_figure(run: Path, out: Path) -> None:
    """One figure for the README, PNG or SVG by the suffix of `out`, at most 200 kB: parity after the last
    stage, failure modes by stage, design success over the number of predictions, and beside its controls. A
    part that the run lacks says so.

    Raises FileNotFoundError without a metrics.json, ValueError for another suffix.
    """
    import json

    if out.suffix not in (".png", ".svg"):
        raise ValueError(f"{out}: the figure is written as .png or .svg")
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    for dpi in (130, 110, 90, 70):
        with rc_context({**_STYLE, "svg.hashsalt": "readme"}):
            figure = Figure(figsize=(11.5, 9.5), layout="constrained")
            _draw_readme(figure, metrics)
            figure.savefig(out, dpi=dpi, metadata={"Date": None} if out.suffix == ".svg" else None)
        if out.suffix == ".svg" or out.stat().st_size <= README_LIMIT:
            break
    if out.stat().st_size > README_LIMIT:
        raise ValueError(f"{out} has {out.stat().st_size} bytes, more than {README_LIMIT}; write it as .png")


def _draw_readme(figure: Figure, metrics: Metrics) -> None:
    panels = figure.subplots(2, 2).ravel()
    stages = [s for s in ordered(metrics.get("property")) if metrics["property"][s].get("parity")]
    generation, design = metrics.get("generation") or {}, metrics.get("design") or {}
    drawn: list[tuple[bool, Callable[[Axes], None], str]] = [
        (
            bool(stages),
            lambda a: draw_parity(
                a,
                metrics["property"][stages[-1]],
                f"Energies of unseen surfaces after {STAGE_NAMES[stages[-1]]}",
            ),
            "energy prediction",
        ),
        (bool(ordered(generation)), lambda a: draw_failures(a, generation), "sampled CIFs"),
        (bool(design.get("curves")), lambda a: draw_curve(a, design), "success over predictions"),
        (bool(design.get("n")), lambda a: draw_design(a, design), "design evaluation"),
    ]
    for axes, (present, draw, what) in zip(panels, drawn):
        if present:
            draw(axes)
        else:
            axes.set_axis_off()
            axes.text(0.5, 0.5, f"{what}: not in this run", ha="center", transform=axes.transAxes)
    figure.supxlabel(provenance(metrics), fontsize=9)
