"""What the numbers of a run say: verdicts with their uncertainty,
and the tables that terminal and report both print.

A verdict is `yes` only where the difference is larger than what chance explains (two standard errors, or a 95
% interval that leaves the control out); in between it is `unclear`, and the numbers stand beside it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from catmllm.config import STAGES
from catmllm.design.constraints import MIN_DISTANCE
from catmllm.evaluate.metrics import TOLERANCE, wilson_interval

Metrics = dict[str, Any]

STAGE_NAMES = dict(zip(STAGES, ("encoder", "align", "joint", "instruct", "GRPO", "GA-GRPO"), strict=True))
STAGE_MEANINGS = (
    "encoder: the graph encoder learns energies by itself; the language model does not run",
    "align: the projector learns the frozen language model's view of a structure's text",
    "joint: CIF texts (a CIF lists a crystal's cell and atoms) are learned, and energies by their share",
    "instruct: the language model alone learns its tasks, with graph or text of energies left out at random",
    "GRPO: reinforcement learning on a rule-based reward for correct CIFs",
    "GA-GRPO: reinforcement learning in the closed loop that proposes, predicts and refines structures",
)
GENERATING = ("instruct", "grpo", "ga_grpo")  # the stages after which sampled CIFs are measured
MODES = {
    "both": "text + graph",
    "graph": "graph only",
    "text": "text only",
    "encoder": "encoder",
    "start": "at start",
    "generated": "written answer",
    "ensemble": "mean with ridge",
}
OF_TEXTS = ("text", "ensemble", "generated")  # where texts are all there is
BASELINE_NAMES = {
    "adsorbate_mean": "mean per adsorbate",
    "text_ridge": "ridge on words",
    "kernel_ridge": "kernel ridge",
    "kernel_ridge_frames": "kernel ridge, with starts",
    "schnet": "SchNet",
    "schnet_frames": "SchNet, with frames",
    "painn": "PaiNN",
    "painn_frames": "PaiNN, with frames",
    "dimenet": "DimeNet++",
    "dimenet_frames": "DimeNet++, with frames",
    "gemnet_oc": "GemNet-OC",
    "gemnet_oc_frames": "GemNet-OC, with frames",
    "chgnet": "CHGNet, zero-shot",
    "calculator": "another potential, zero-shot",
    "roberta": "small RoBERTa on texts",
    "roberta_gap": "small RoBERTa, graph pairs first",
    "catberta": "RoBERTa on texts (CatBERTa)",
    "catberta_gap": "RoBERTa, graph pairs first (GAP-CatBERTa)",
    "zero_shot": "the model it began with",
}
ON_FCC = "… on fcc slabs"  # the subset of the shipped systems that is the default
# What reads text; the others read the structure.
TEXT_BASELINES = ("adsorbate_mean", "text_ridge", "roberta", "roberta_gap", "catberta", "catberta_gap")
RATES = {
    "PF": "cannot be read as a CIF at all",
    "VF": "cell or coordinates out of bounds: volume, number of atoms, density, fractional coordinates",
    "CM": "the atoms are not exactly those that were asked for",
    "PV": f"two atoms closer than {MIN_DISTANCE} Å, or an absurd volume per atom",
    "PV_eq41": "the same with the paper's limit of 1.0 Å, which every correct O-H bond fails",
    "AD": "no real adsorbate: not one molecule with its gas-phase bonds (-15 to +20 %), not on the upper "
    "side of the slab, or out of its reach",
}
RATE_NAMES = {"PF": "PF", "VF": "VF", "CM": "CM", "PV": "PV", "PV_eq41": "PV at 1.0 Å", "AD": "AD"}
# What is read where no structure is known, the paper's comparison first.
ARMS = {
    "two_parts": "two parts alone",
    "indicative_1": "bonds of indicative CIFs",
    "indicative_2": "... by twice the radii",
    "indicative_4": "... by four times the radii",
    "random": "bonds of random systems",
    "true": "true bonds",
}
JUDGES = ("own", "judge")  # the more independent one last
# What success is set beside: answers chosen without the closed loop, then answers that ignore the target.
CONTROLS = {
    "enumeration": "ideal slabs, same predictor",
    "kernel_ridge": "ideal slabs, kernel ridge",
    "analogues": "training slabs with exchanged elements",
    "random": "one random ideal slab",
    "retrieval": "random training system",
    "shuffled": "shuffled targets",
    "shuffled_same_adsorbate": "shuffled within adsorbate",
}
METHOD_NAMES = {
    "search": "closed loop",
    **{k: CONTROLS[k] for k in ("enumeration", "kernel_ridge")},
    "ordered": "ideal slabs in the loop's order",
    "analogues": CONTROLS["analogues"],
}
# Of slabs that are judged at their best sites: the order in which they are tried, and who predicts.
SLAB_NAMES = {
    "search": "slabs in the model's order",
    "enumeration": "slabs in random order, same predictor",
    "kernel_ridge": "slabs in random order, kernel ridge",
    "analogues": CONTROLS["analogues"],
}

Verdict = Literal["yes", "no", "unclear"]


@dataclass(frozen=True)
class Claim:
    """One sentence that the run was made to test, whether it holds, and the numbers behind the verdict."""

    verdict: Verdict
    sentence: str
    evidence: str


@dataclass(frozen=True)
class Table:
    """A titled table of text cells, the first column left-aligned,
    with what a reader must know to read it."""

    title: str
    header: list[str]
    rows: list[list[str]]
    notes: list[str]


# --------------------------------------------------------------------------- numbers as text


def finite(value: Any) -> bool:
    """Whether a value of metrics.json is a number that says something (not None, nan or inf)."""
    return isinstance(value, int | float) and math.isfinite(value)


def number(value: Any, digits: int = 3) -> str:
    """A number with `digits` decimals (from 1e5 on as a power of ten); `–` where there is none."""
    if not finite(value):
        return "–"
    return f"{value:.{digits}f}" if abs(value) < 1e5 else f"{value:.1e}"


def percent(value: Any, digits: int = 1) -> str:
    """A share in [0, 1] as `12.5 %`, with a space that no line breaks at; `–` where there is none."""
    return f"{100 * value:.{digits}f}\u00a0%" if finite(value) else "–"


def provenance(metrics: Metrics) -> str:
    """Who made labels and judgements: to be read beside every energy."""
    labels = str(metrics.get("data", {}).get("labels") or "not recorded")
    name = (metrics.get("design") or {}).get("judge_name")
    if not name:
        return f"labels: {labels}"
    if labels.startswith(name):
        return f"labels and judge: {labels}"
    return f"labels: {labels}; judge: {name}, an MLIP, not DFT, whose zero may be another"


def ordered(parts: Metrics | None) -> list[str]:
    """The stages of a section of metrics.json in the order of training."""
    return [stage for stage in STAGES if stage in (parts or {})]


def conditions(metrics: Metrics) -> str:
    """One line on machine, date, commit, ranks, data and labels; what was not recorded is said."""
    machine, data = metrics.get("machine", {}), metrics.get("data", {})
    parameters = metrics.get("parameters", {}).get("total")
    parts = [
        str(machine.get("processor") or "processor not recorded"),
        f"{machine.get('cores', '?')} cores, {machine.get('ranks', '?')} ranks",
        f"torch {machine.get('torch', '?')}",
        str(machine.get("date") or "date not recorded"),
        f"commit {machine['commit']}" if machine.get("commit") else "commit not recorded",
        f"{parameters / 1e6:.2f} M parameters" if finite(parameters) else "parameters not recorded",
        "{} training, {} validation, {} test systems".format(
            *(data.get(part, "?") for part in ("train", "val", "test"))
        ),
        *([f"split: {data['split']}"] if data.get("split") else []),
        provenance(metrics),
    ]
    by_commit: dict[str, list[str]] = {}
    for stage, commit in taken(metrics).items():
        by_commit.setdefault(commit, []).append(stage)
    parts += [f"{', '.join(stages)} of a run of commit {commit}" for commit, stages in by_commit.items()]
    return " · ".join(parts)


def taken(metrics: Metrics) -> dict[str, str]:
    """The stages that a run took from another one, and the commits that trained them."""
    adopted = metrics.get("adopted", {})
    return adopted.get("commits") or dict.fromkeys(adopted.get("stages", ()), str(adopted.get("commit")))


# --------------------------------------------------------------------------- verdicts


def claims(metrics: Metrics) -> list[Claim]:
    """Verdicts on what a run should show, as far as it has got."""
    found = [_property_claim(metrics)]
    found += [
        _reward_claim(metrics, "instruct", "grpo", keeps=False),
        _reward_claim(metrics, "grpo", "ga_grpo", keeps=True),
    ]
    found += [_design_claim(metrics, judge) for judge in JUDGES]
    return [claim for claim in found if claim is not None]


# What the parity plot of a stage may show, the first that there is.
SHOWN_BY = {
    "ensemble": "of texts by the model and ridge together",
    "both": "from text and graph",
    "text": "from texts alone",
    "encoder": "by the encoder alone",
}


def shown_mode(result: Metrics) -> str:
    """By which way the energies of a stage's parity plot are."""
    return next((mode for mode in SHOWN_BY if mode in result), "both")


def _property_claim(metrics: Metrics) -> Claim | None:
    stages, baselines = ordered(metrics.get("property")), metrics.get("baselines") or {}
    if not stages or not baselines:
        return None
    result = metrics["property"][stages[-1]]
    mode = shown_mode(result)
    shown = result.get(mode, {})
    error = shown.get("mae")
    against = ", ".join(
        f"{number(b.get('mae'))} for {BASELINE_NAMES.get(k, k)}" for k, b in baselines.items()
    )
    sentence = f"Energies {SHOWN_BY[mode]} after {STAGE_NAMES[stages[-1]]} beat all baselines"
    n = shown.get("n", "?")
    if not finite(error):
        return Claim("no", sentence, f"the MAE is not a number (n = {n}); baselines: {against}")
    spread = _mae_standard_error(result)
    evidence = (
        f"MAE {number(error)} eV"
        + (f" ± {number(spread)} (standard error)" if spread else "")
        + f" on n = {n} test systems; baselines: {against}; {provenance(metrics)}"
    )
    best = min((b["mae"] for b in baselines.values() if finite(b.get("mae"))), default=math.nan)
    return Claim(_verdict(best - error, 2 * (spread or 0.0)), sentence, evidence)


def _mae_standard_error(result: Metrics) -> float | None:
    """Standard error (eV) of the MAE from the parity points, as if all systems were independent."""
    parity = result.get("parity") or {}
    errors = np.abs(np.subtract(parity.get("predicted", []), parity.get("energy", [])))
    return float(errors.std(ddof=1) / math.sqrt(len(errors))) if len(errors) > 1 else None


def _verdict(gain: float, margin: float) -> Verdict:
    if not math.isfinite(gain) or gain <= -margin:
        return "no"
    return "yes" if gain > margin else "unclear"


def _reward_claim(metrics: Metrics, before: str, after: str, keeps: bool) -> Claim | None:
    generation = metrics.get("generation") or {}
    if before not in generation or after not in generation:
        return None
    a, b = generation[before], generation[after]
    gain = b["reward"] - a["reward"]
    error = math.hypot(a.get("reward_se") or 0.0, b.get("reward_se") or 0.0)
    verdict = _verdict(gain, 2 * error)
    if keeps and verdict == "unclear":
        verdict = "yes"
    verb = "did not lower" if keeps else "raised"
    return Claim(
        verdict,
        f"{STAGE_NAMES[after]} {verb} the mean reward of sampled CIFs",
        f"{number(a['reward'], 2)} ± {number(a.get('reward_se'), 2)} before (n = {a['n']}), "
        f"{number(b['reward'], 2)} ± {number(b.get('reward_se'), 2)} after (n = {b['n']}): {gain:+.2f} ± "
        f"{error:.2f} standard error; scale -15 to 10",
    )


def _design_claim(metrics: Metrics, judge: str) -> Claim | None:
    design = metrics.get("design") or {}
    rates = design.get(judge)
    if not rates or not design.get("n"):
        return None
    low, high = wilson_interval(rates["success"], design["n"])
    controls = {key: rates[key] for key in CONTROLS if finite(rates.get(key))}
    if not controls:
        return None
    verdict: Verdict = "no" if rates["success"] <= max(controls.values()) else "unclear"
    if all(_beaten(design, judge, key, low, share) for key, share in controls.items()):
        verdict = "yes"
    listed = ", ".join(f"{CONTROLS[key]} {percent(share)}" for key, share in controls.items())
    return Claim(
        verdict,
        f"Designs hit the wanted energy more often than the controls, judged by {_judge_name(design, judge)}",
        f"{percent(rates['success'])} of n = {design['n']} tasks (95\u00a0% interval {percent(low, 0)} to "
        f"{percent(high, 0)}); "
        f"controls: {listed}; {provenance(metrics)}",
    )


def _beaten(design: Metrics, judge: str, control: str, low: float, share: float) -> bool:
    """Whether success is above a control: at the same tasks, by its paired interval, where there is one."""
    curve = (design.get("curves") or {}).get(control, {}).get(judge)
    return curve["search_more_interval"][-1][0] > 0 if curve else low > share


def _judge_name(design: Metrics, judge: str) -> str:
    if judge == "own":
        return "the model's own predictor, which the search optimises"
    return str(design.get("judge_name", "a potential"))


def judge_title(design: Metrics, judge: str) -> str:
    """One of `JUDGES` in a table's head or a figure."""
    return "own predictor" if judge == "own" else _judge_name(design, judge)


# --------------------------------------------------------------------------- tables


def _apart(metrics: Metrics) -> str:
    """What keeps test systems from training, as the split has it."""
    data = (metrics.get("config") or {}).get("data") or {}
    by, names = data.get("split_by", "pair"), data.get("hold_out")
    what = {"pair": "pair of bulk metal and facet", "column": "value of the user's column"}.get(by, by)
    if names is not None:
        return f" with the {what} {', '.join(names)}, which no training system has"
    if by == "metal":
        return " whose set of metals is that of no training system"
    return f" whose {what} does not occur in training"


def property_table(metrics: Metrics) -> Table | None:
    """MAE and R² by stage and inference mode, the baselines first."""
    stages, baselines = ordered(metrics.get("property")), metrics.get("baselines") or {}
    if not stages and not baselines:
        return None
    tested = [next(iter(metrics["property"][stage].values())).get("n") for stage in stages]
    n = tested[-1] if tested else metrics.get("data", {}).get("test", "?")
    texts = any("ensemble" in metrics["property"][stage] for stage in stages)
    modes = OF_TEXTS if texts else tuple(m for m in MODES if m != "ensemble")
    rows = []
    for k, b in baselines.items():
        name = f"{BASELINE_NAMES.get(k, k)} (baseline)"
        rows.append([name, *(_baseline_cell(k, b, mode, texts) for mode in modes)])
        if "subset" in b:
            part = b["subset"] | _in_subset({"start": b.get("start")})
            rows.append([ON_FCC, *(_baseline_cell(k, part, mode, texts) for mode in modes)])
    for stage in stages:
        result = metrics["property"][stage]
        rows.append([STAGE_NAMES[stage], *(_cell(result.get(mode), mode) for mode in modes)])
        if part := _in_subset(result):
            rows.append([ON_FCC, *(_cell(part.get(mode), mode) for mode in modes)])
    notes = [
        f"Mean absolute error in eV / R² (1 is perfect, 0 is no better than the mean) on n = {n} test systems"
        f"{_apart(metrics)}. No outlier is dropped.",
        "Baselines: the mean training energy of the adsorbate, a ridge regression on the words of the "
        "text, and a kernel ridge regression on descriptors of the surface around the adsorbate, also with "
        "the training systems' starts. Others are there once `make baselines` has trained them.",
        "Encoder: the head on its features, without the LLM. At start: text and graph of "
        "structures as their relaxation began.",
        "Written answer: the energy read from the text that the model writes; the other columns are its "
        "energy head.",
    ]
    if texts:
        share = ", ".join(f"{e['share']:.0%}" for e in (metrics.get("ensemble") or {}).values())
        notes[1:3] = [
            "Baselines: the mean training energy of the adsorbate, and a ridge regression on the words of "
            "the text, its strength by validation.",
            f"Mean with ridge: that of the model's energy ({share} of it, by validation) and of the ridge's.",
        ]
    inside = [part for stage in stages if (part := _in_subset(metrics["property"][stage]))]
    if inside:
        n = next(iter(inside[-1].values()))["n"]
        notes.append(f"{ON_FCC}: the same on those n = {n} of them that `data.slabs: fcc` tests on.")
    headings = ["", *(MODES[mode] for mode in modes)]
    return Table(f"Predicted adsorption energies ({provenance(metrics)})", headings, rows, notes)


def _in_subset(results: Mapping[str, Any]) -> Metrics:
    """Of results by name those on the subset alone, where they have it."""
    return {k: r["subset"] for k, r in results.items() if isinstance(r, Mapping) and "subset" in r}


def _cell(result: Metrics | None, mode: str) -> str:
    if mode == "generated":
        return _written_cell(result)
    return number((result or {}).get("mae")) if mode == "start" else _error_cell(result)


def _baseline_cell(name: str, result: Metrics, mode: str, texts: bool) -> str:
    if mode == ("text" if texts or name in TEXT_BASELINES else "graph"):
        return _error_cell(result)
    return number(result["start"].get("mae")) if mode == "start" and "start" in result else ""


def _error_cell(result: Metrics | None) -> str:
    return f"{number(result.get('mae'))} / {number(result.get('r2'), 2)}" if result else "–"


def _written_cell(result: Metrics | None) -> str:
    if not result:
        return "–"
    unread, read = result.get("unread", 0), result.get("n", 0)
    if not unread:
        return _error_cell(result)
    return f"{_error_cell(result)} ({unread} unread)" if read else f"none of {unread} read"


def generation_table(metrics: Metrics) -> Table | None:
    """Mean reward and failure rates by stage."""
    generation = metrics.get("generation") or {}
    stages = ordered(generation)
    if not stages:
        return None
    rows = []
    ways = [(STAGE_NAMES[stage], generation[stage]) for stage in stages]
    ways += [(f"{STAGE_NAMES[s]}, free", generation[s]["free"]) for s in stages if generation[s].get("free")]
    for name, g in ways:
        reward = f"{number(g.get('reward'), 2)} ± {number(g.get('reward_se'), 2)}"
        rows.append([name, str(g.get("n", "?")), reward, *(percent(g.get(rate)) for rate in RATES)])
    notes = [
        "R: mean PVCP reward ± standard error, from -15 (unreadable) to 10 (nothing to object to).",
        *(f"{RATE_NAMES[rate]}: {meaning}." for rate, meaning in RATES.items()),
        *(["free: the same weights where no grammar holds the answers."] if len(ways) > len(stages) else []),
        f"Shares are of all n texts sampled{_sampling(metrics)}, the same prompts for every stage; an "
        "unreadable text fails every check.",
    ]
    return Table(
        "CIFs sampled for unseen systems, checked by rules alone (no energies)",
        ["after stage", "n", "R", *RATE_NAMES.values()],
        rows,
        notes,
    )


def _sampling(metrics: Metrics) -> str:
    settings = ((metrics.get("config") or {}).get("evaluate") or {}).get("sampling") or {}
    if "temperature" not in settings or "top_p" not in settings:
        return ""
    return f" at temperature {settings['temperature']:g} and top-p {settings['top_p']:g}"


def missing_table(metrics: Metrics) -> Table | None:
    """Predictions where no structure is known, after the last stage that was measured: by what is read, of
    the model and of ridge regression on the same."""
    missing = metrics.get("missing") or {}
    if not (stages := ordered(missing)):
        return None
    found = missing[stages[-1]]
    arms = found["arms"]

    def cells(arm: str, means: bool) -> list[str]:
        row, kind = arms[arm], "mean_" if means else ""
        return [percent(row[f"{kind}pir"]), number(row[f"{kind}distance"], 2)]

    rows = []
    for arm, name in ARMS.items():
        row = arms[arm]
        low, high, less, more = (100 * end for end in (*row["interval"], *row["more_interval"]))
        beside = "" if arm == "two_parts" else f"{100 * row['more']:+.0f} ({less:+.0f} to {more:+.0f})"
        pir, off = cells(arm, False)
        single = [f"{pir} ({low:.0f}-{high:.0f})", off, beside]
        rows.append([name, *single, *cells(arm, True), *cells(f"ridge_{arm}", False)])
    rows.append(["the adsorbate's mean", *cells("adsorbate_mean", False), "", "", "", "", ""])
    written = arms["indicative_1"]
    notes = [
        "PIR: share of predictions inside the range of energies that adsorbate and catalyst leave open, over "
        f"{len(found['pairs'])} pairs of these in the test part with 3 or more configurations. Half of the "
        f"ranges are wider than {number(found['width'], 2)} eV, and wide ones are easily hit, so beside it "
        "stands how far predictions are off the middle of the range. A pair counts once.",
        f"In brackets 95 % intervals by a bootstrap over {found['surfaces']} surfaces. More: points above "
        "two parts, at the same pairs. Of means: one prediction a pair, the mean of its predictions.",
        f"Indicative CIFs: {found['candidates']} a pair, written by the model for adsorbate, composition and "
        f"Miller index; {written['unread']} of {written['n']} could not be read and count as missed. Ridge: "
        "regression fitted to training texts of the row's kind.",
    ]
    header = ["what is read", "PIR", "off (eV)", "more", "of means", "off (eV)", "ridge", "off (eV)"]
    return Table(
        f"Energies where no structure is known, after {STAGE_NAMES[stages[-1]]}", header, rows, notes
    )


def design_table(metrics: Metrics) -> Table | None:
    """Design success by method, the controls below, in a column a judge."""
    design = metrics.get("design") or {}
    if not design:
        return None
    n = design.get("n", 0)
    judges = [judge for judge in JUDGES if design.get(judge)]
    budgets = design.get("budgets")
    search = f"closed loop, {budgets[-1]} predictions" if budgets else "closed loop"
    rows = [[search, *(_success_cell(design[judge]["success"], n) for judge in judges)]]
    for key, name in CONTROLS.items():
        shares = [design[judge].get(key) for judge in judges]
        if any(map(finite, shares)):
            rows.append([name, *(_success_cell(share, sampled_tasks(design, key)) for share in shares)])
    return Table(
        f"Structures designed for a wanted adsorption energy, n = {n} tasks ({provenance(metrics)})",
        ["success (95\u00a0% interval)", *(f"judged by {judge_title(design, judge)}" for judge in judges)],
        rows,
        _design_notes(design),
    )


def sampled_tasks(design: Metrics, control: str) -> int:
    """Of how many tasks a control is the rate; 0 for one that is an exact average."""
    curves = design.get("curves") or {}
    return int(curves.get("enumeration" if control == "random" else control, {}).get("n", 0))


def _success_cell(share: Any, n: int) -> str:
    if not finite(share) or not n:
        return percent(share)
    low, high = wilson_interval(share, n)
    return f"{percent(share)} ({percent(low, 0)} to {percent(high, 0)})"


def curve_table(metrics: Metrics) -> Table | None:
    """Success over the number of predictions, by the most independent judge that spoke."""
    notes = ["Ideal slabs: the lattice constant between those of the metals, random order, random site."]
    return _curves(metrics.get("design") or {}, "Success over the number of predictions for a task", notes)


def free_table(metrics: Metrics) -> Table | None:
    """The same where the metals are free."""
    design = metrics.get("free_design") or {}
    title = "Success with free metals over the number of predictions for a task"
    notes = [
        "Adsorbate, facet and energy are given; a slab whose bulk training or validation has there does "
        "not count. The loop tries slabs in the order of what the model says of their two-part texts; ideal "
        "slabs are of random allowed compositions, or in that order."
    ]
    return _curves(design, title, notes)


def slab_table(metrics: Metrics, kind: str = "one") -> Table | None:
    """Success of slabs that are judged at their best sites; kind: for `one` adsorbate, or for `several`."""
    design = (metrics.get("slab_design") or {}).get(kind) or {}
    if not design.get("n"):
        return None
    wanted = [" and ".join(item["wanted"]) for item in design["items"]]
    asked = "one adsorbate" if kind == "one" else wanted[0]
    left_out, sites = sum(design["left_out"].values()), design["sites"]
    notes = [
        "Facet and energies are given, the metals are free; a slab whose bulk training or validation has "
        "there does not count. E is the lowest over the slab's different sites, and that of every adsorbate "
        "asked for must be within the tolerance. The wanted energies are those of test slabs, so each task "
        "has an answer.",
        "A slab costs a prediction for each of its sites (3 to 10) and adsorbate, the same in every row. The "
        "first slab in random order is a random slab.",
        f"On the test slabs the predictor is off by {number(design['off'], 2)} eV, on average "
        f"{design['bias']:+.2f}. {left_out} of {sites} relaxations of answers do not count.",
    ]
    title = f"Slabs for the best sites' energies of {asked} over the number of slabs tried for a task"
    return _curves(design, title, notes, SLAB_NAMES, "slabs")


def _curves(
    design: Metrics,
    title: str,
    notes: list[str],
    names: Mapping[str, str] = METHOD_NAMES,
    counted: str = "predictions",
) -> Table | None:
    curves, judge = design.get("curves") or {}, last_judge(design)
    methods = [m for m in names if judge in curves.get(m, {})]
    if not methods:
        return None
    first = "the model's order" if counted == "slabs" else "the closed loop"
    rows, compared = [], []
    for method in methods:
        curve = curves[method][judge]
        cells = [_success_cell(share, curves[method]["n"]) for share in curve["success"]]
        rows.append([f"{names[method]} (n = {curves[method]['n']})", *cells])
        if method != "search":
            low, high = (100 * x for x in curve["search_more_interval"][-1])
            compared.append(
                f"With all {counted} {first} has {100 * curve['search_more'][-1]:+.0f} points "
                f"({low:+.0f} to {high:+.0f}) against {names[method]}, at the same tasks; interval by "
                "a bootstrap over pairs of bulk and facet."
            )
    header = ["", *map(str, design["budgets"])]
    return Table(f"{title}, judged by {judge_title(design, judge)}", header, rows, compared + notes)


def stages_table(metrics: Metrics) -> Table | None:
    """Design success by the stage whose weights search, where more than one was asked for."""
    earlier, last = metrics.get("designs") or {}, metrics.get("design") or {}
    if not earlier or not last:
        return None
    config = metrics.get("config") or {}
    asked = (config.get("evaluate") or {}).get("design_after") or []
    found = earlier | dict.fromkeys([s for s in config.get("stages", ()) if s in asked][-1:], last)
    judges = [judge for judge in JUDGES if last.get(judge)]
    rows = [
        [STAGE_NAMES[s], *(_success_cell(found[s][judge]["success"], found[s]["n"]) for judge in judges)]
        + [percent(found[s].get("feasible"))]
        for s in ordered(found)
    ]
    header = ["after stage", *(f"judged by {judge_title(last, judge)}" for judge in judges), "feasible"]
    return Table("Success of the closed loop by the stage whose weights search", header, rows, [])


def last_judge(design: Metrics) -> str:
    """The most independent judge that has spoken."""
    return next((judge for judge in reversed(JUDGES) if design.get(judge)), "own")


def _design_notes(design: Metrics) -> list[str]:
    tolerance = number(design.get("tolerance", TOLERANCE), 2)
    notes = [
        "Success: readable, exactly the atoms asked for, no overlap, a real adsorbate, and the judged "
        "energy within "
        f"{tolerance} eV of the wanted one. The search optimises the own predictor. The judge relaxes the "
        "adsorbate and has no part in the search. Where it made the labels too, it is independent of the "
        "predictor, not of what that was trained on.",
        "Controls: ideal slabs of the asked composition, as many as the closed loop has predictions, of "
        "which the same predictor or kernel ridge takes one; one of them at random, without a predictor; a "
        "random training system of the adsorbate; the same designs for one another's targets (of all tasks; "
        "of the same adsorbate).",
        *_chance(design),
        *_second(design),
    ]
    facts = [f"{percent(design.get('feasible'))} of the tasks ended with a valid structure"]
    if finite(design.get("AD")):
        facts.append(f"{percent(design['AD'])} without a real adsorbate (AD)")
    judged = design.get("judge") or {}
    if "judged_ok" in judged:
        facts.append(f"{judge_title(design, 'judge')} accepted {percent(judged['judged_ok'])}")
    if finite(judged.get("mae")):
        facts.append(f"its energies are {number(judged['mae'])} eV from the wanted ones on average")
    if finite(judged.get("predictor_mae")):
        facts.append(f"and {number(judged['predictor_mae'])} eV from the own predictor's")
    notes.append(", ".join(facts) + ".")
    if bias := judged.get("bias"):
        low, high = bias["interval"]
        notes.append(
            f"Bias of the predictor: on the {bias['n']} designs that it accepts and the judge could relax, "
            f"E_pred - E_judge is {bias['mean']:+.3f} eV on average (95\u00a0% {low:+.3f} to {high:+.3f})."
        )
    diversity = design.get("diversity") or {}
    successes = diversity.get("n", diversity.get("successes"))
    if successes is not None:
        notes.append(
            f"{diversity.get('distinct', '?')} of the {successes} successes are different structures."
        )
    return notes


def _chance(design: Metrics) -> list[str]:
    """How much of the success needs no model."""
    judge = last_judge(design)
    rates = design.get(judge) or {}
    success, random = rates.get("success"), rates.get("random")
    if not finite(success) or not finite(random):
        return []
    share = percent(min(1.0, random / success), 0) if success else "nothing"
    return [
        f"By chance: one random ideal slab of the asked composition hits {percent(random)} by "
        f"{judge_title(design, judge)}, without any model. Of the closed loop's {percent(success)} that is "
        f"{share}."
    ]


def _second(design: Metrics) -> list[str]:
    """What judges say that had no part in the labels."""
    notes = []
    for said in (design.get("second") or {}).values():
        low, high = (percent(share, 0) for share in said["success_interval"])
        notes.append(
            f"{said['judge']}, with one offset per adsorbate fitted on training systems, finds "
            f"{percent(said['success'])} of the closed loop's designs within the tolerance (n = {said['n']}, "
            f"95\u00a0% interval {low} to {high}), and {percent(said['ceiling'])} of the test systems whose "
            "energies were asked for."
        )
    return notes


def time_table(metrics: Metrics) -> Table | None:
    """Minutes by stage, training and evaluation side by side, then whatever else was timed."""
    seconds = {k: v for k, v in (metrics.get("seconds") or {}).items() if finite(v)}
    if not seconds:
        return None

    def minutes(key: str) -> str:
        return f"{seconds[key] / 60:.1f}" if key in seconds else "–"

    staged = [s for s in STAGES if s in seconds or f"evaluate {s}" in seconds]
    rows = [[STAGE_NAMES[s], minutes(s), minutes(f"evaluate {s}")] for s in staged]
    known = {key for s in staged for key in (s, f"evaluate {s}")}
    rows += [[key, "–", minutes(key)] for key in seconds if key not in known]
    rows.append(["all", f"{sum(seconds.get(s, 0.0) for s in staged) / 60:.1f}", ""])
    rows[-1][2] = f"{sum(seconds.values()) / 60 - sum(seconds.get(s, 0.0) for s in staged) / 60:.1f}"
    machine = metrics.get("machine", {})
    title = (
        f"Minutes on {machine.get('cores', '?')} cores "
        f"({machine.get('processor') or 'processor not recorded'})"
    )
    return Table(title, ["", "training", "evaluation"], rows, [])


# --------------------------------------------------------------------------- what is not there


def missing_parts(metrics: Metrics, logged: Collection[str] | None = None) -> list[str]:
    """What a finished run of this configuration has and this one has not. logged:
    stages with a log of their own."""
    config = metrics.get("config") or {}
    stages = [stage for stage in config.get("stages", STAGES) if stage in STAGES]
    missing = [
        f"{what} (`{key}`)"
        for key, what in (("config", "configuration"), ("machine", "machine"), ("data", "data"))
        if not metrics.get(key)
    ]
    if logged is not None:
        missing += [f"training log of {STAGE_NAMES[stage]}" for stage in stages if stage not in logged]
    if not metrics.get("baselines"):
        missing.append("property baselines")
    missing += _absent("energy prediction after", stages, metrics.get("property"))
    generating = [s for s in stages if s in GENERATING]
    missing += _absent("sampled CIFs after", generating, metrics.get("generation"))
    if (config.get("evaluate") or {}).get("indicative"):
        missing += _absent("predictions without a structure after", generating, metrics.get("missing"))
    design = metrics.get("design") or {}
    asked = (config.get("evaluate") or {}).get("design_after", ["ga_grpo"])
    if {*asked} & {*stages} and not design:
        missing.append("design evaluation")
    if design and not design.get("judge"):
        off = (config.get("evaluate") or {}).get("judge") == "none"
        missing.append(
            "a potential's judgement of the designs" + (" (off: `evaluate.judge: none`)" if off else "")
        )
    if not metrics.get("seconds"):
        missing.append("times")
    return missing


def _absent(what: str, stages: Sequence[str], section: Metrics | None) -> list[str]:
    return [f"{what} {STAGE_NAMES[stage]}" for stage in stages if stage not in (section or {})]


# --------------------------------------------------------------------------- the terminal


def summary_table(metrics: Metrics) -> str:
    """The results of a run as plain text of at most 120 columns,
    for a reader who knows nothing of the project."""
    lines = [
        "CatalyticMLLM: a language model that predicts and designs catalyst surfaces with adsorbates",
        "",
    ]
    lines += _wrapped(conditions(metrics), "")
    lines.append("")
    for claim in claims(metrics):
        lines += _wrapped(f"{claim.verdict.upper():8}{claim.sentence}: {claim.evidence}", " " * 8)
    for table in tables(metrics):
        lines += [
            "",
            table.title,
            *_aligned(table),
            *(s for note in table.notes for s in _wrapped(note, "  ")),
        ]
    lines += ["", "Stages in the order of training:", *(f"  {meaning}" for meaning in STAGE_MEANINGS)]
    missing = missing_parts(metrics)
    if missing:
        lines += ["", *_wrapped("Not in this run: " + ", ".join(missing), "  ")]
    return "\n".join(lines)


def tables(metrics: Metrics) -> list[Table]:
    """All tables that a run has numbers for."""
    made = (
        property_table,
        generation_table,
        missing_table,
        design_table,
        stages_table,
        curve_table,
        free_table,
        slab_table,
        lambda m: slab_table(m, "several"),
        time_table,
    )
    return [table for make in made if (table := make(metrics)) is not None]


def _wrapped(text: str, indent: str) -> list[str]:
    import textwrap

    return textwrap.wrap(text, 116, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _aligned(table: Table) -> list[str]:
    widths = [max(map(len, column)) for column in zip(table.header, *table.rows)]
    rule = "-" * (sum(widths) + 2 * len(widths) - 2)

    def line(cells: Sequence[str]) -> str:
        first, *rest = (
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths))
        )
        return "  ".join([first, *rest]).rstrip()

    return [rule, line(table.header), rule, *map(line, table.rows), rule]
