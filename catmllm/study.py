"""A study: cells of settings times seeds, each an ordinary run of the trainer, and what they say together.

    catmllm study configs/studies/spread.yaml --out runs/spread [--ranks 2] [--only CELL]

The file has `cells` (a name and `key: value` overrides each), `seeds` (pairs of split seed and seed, the same
for every cell) and, if it likes, `base` (overrides of all) and `ancestor` (overrides of a run per seed whose
last stage every cell of that seed starts from). A killed study goes on by the same command: what has its
report is kept, the trainer resumes the rest. Errors of systems of one bulk and facet go together, so
intervals are by a bootstrap over (seed, bulk, facet), and cells are compared seed by seed.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from catmllm.config import ConfigError, from_dict, load_config, to_dict
from catmllm.data.open import open_data
from catmllm.evaluate.baselines import evenly_spaced
from catmllm.evaluate.metrics import bootstrap_interval
from catmllm.evaluate.missing import hits_of
from catmllm.pipeline import differences

Metrics = dict[str, Any]
Runner = Callable[[list[str], Path], None]
# Of every system or task one number: what a row of the table averages, and the pair that each belongs to.
Values = tuple[list[float], list[str]]


@dataclass(frozen=True)
class Study:
    """What the file says."""

    cells: Mapping[str, Mapping[str, Any]]
    seeds: Sequence[tuple[int, int]]  # (data.split_seed, seed)
    base: Mapping[str, Any] = field(default_factory=dict)
    ancestor: Mapping[str, Any] | None = None


def read(path: Path) -> Study:
    """Raises ConfigError where the file is none or a cell's settings are not the trainer's."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {error}") from error
    tree = tree if isinstance(tree, dict) else {}
    strange = set(tree) - {"cells", "seeds", "base", "ancestor"}
    if strange or not isinstance(tree.get("cells"), dict) or not tree["cells"] or not tree.get("seeds"):
        raise ConfigError(
            f"{path}: a study has `cells`, `seeds` and perhaps `base` and `ancestor`"
            + (f", not {', '.join(map(repr, sorted(strange)))}" if strange else "")
        )
    try:
        seeds = [(int(split), int(seed)) for split, seed in tree["seeds"]]
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path}: `seeds` are pairs [split seed, seed]: {error}") from error
    cells = {str(name): values or {} for name, values in tree["cells"].items()}
    for name in cells:
        if "/" in name or name in ("ancestor", ".", ".."):
            raise ConfigError(f"{path}: a cell's runs are in a folder of its name, which cannot be {name!r}")
    for name, values in {"base": tree.get("base"), "ancestor": tree.get("ancestor"), **cells}.items():
        if not isinstance(values or {}, dict):
            raise ConfigError(f"{path}: `{name}` has no `key: value` pairs but {values!r}")
    study = Study(cells, seeds, tree.get("base") or {}, tree.get("ancestor"))
    for values in (*cells.values(), study.ancestor or {}):
        load_config(overrides=arguments(study, values, seeds[0], Path("out")))
    return study


def arguments(study: Study, values: Mapping[str, Any], seeds: tuple[int, int], out: Path) -> list[str]:
    """The trainer's `key=value` arguments of one run."""
    merged = {**study.base, **values, "data.split_seed": seeds[0], "seed": seeds[1], "out": str(out)}
    return [
        f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in merged.items()
    ]


def run_all(study: Study, out: Path, run: Runner, only: str | None = None) -> dict[str, list[Path]]:
    """Every run that has no report yet; the folders of each cell's runs, in the order of the seeds."""
    if only is not None and only not in study.cells:
        raise ConfigError(f"no cell {only!r}: there are {', '.join(study.cells)}")
    folders: dict[str, list[Path]] = {name: [] for name in study.cells if only in (None, name)}
    for split, seed in study.seeds:
        place = out / f"{split}-{seed}"
        more: dict[str, Any] = {}
        if study.ancestor is not None:
            _once(
                arguments(study, study.ancestor, (split, seed), place / "ancestor"), place / "ancestor", run
            )
            stages = json.loads((place / "ancestor" / "metrics.json").read_text())["config"]["stages"]
            more["init"] = str(place / "ancestor" / stages[-1])
        for name in folders:
            folder = place / name
            _once(arguments(study, {**study.cells[name], **more}, (split, seed), folder), folder, run)
            folders[name].append(folder)
    return folders


def _once(words: list[str], folder: Path, run: Runner) -> None:
    """Raises ConfigError where a finished run is of other settings: the study's file was edited."""
    if not (folder / "report.html").is_file():
        return run(words, folder)
    ran, asked = (
        json.loads((folder / "metrics.json").read_text())["config"],
        to_dict(load_config(None, words)),
    )
    # what is asked for as null has become what fits the device
    changed = [f"{key}: {old} -> {new}" for key, old, new in differences(ran, asked) if new is not None]
    if changed:
        raise ConfigError(
            f"{folder} was run with other settings ({'; '.join(changed[:3])}): give another --out, or remove "
            "that folder"
        )


def trainer(ranks: int) -> Runner:
    """Runs the trainer in processes of its own. Raises RuntimeError with its status where it fails."""

    def run(words: list[str], folder: Path) -> None:
        print(f"== {folder}", file=sys.stderr, flush=True)
        script = [str(Path(__file__).with_name("train.py")), *words]
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        done = subprocess.run([sys.executable, *(launch if ranks > 1 else []), *script], check=False)
        if done.returncode:
            raise RuntimeError(
                f"{folder}: the trainer ended with {done.returncode}; the same command goes on from there"
            )

    return run


# --------------------------------------------------------------------------- what they say


def values_of(metrics: Metrics) -> dict[str, Values]:
    """Of one finished run: each measured thing, by system or by task, with (bulk, facet) of each."""
    config = from_dict(metrics["config"], "metrics.json")
    found: dict[str, Values] = {}
    last = config.stages[-1]
    parity = metrics["property"][last]["parity"]
    test = evenly_spaced(open_data(config.data)["test"], config.evaluate.property_systems)  # as measured
    pairs = [f"{s.bulk} {s.miller}" for s in test]
    off = np.abs(np.array(parity["predicted"]) - np.array(parity["energy"]))
    found[f"{last}: test error, eV"] = off.tolist(), pairs
    if missing := metrics.get("missing", {}).get(last):
        surfaces = [pair["surface"] for pair in missing["pairs"]]
        for arm in ("two_parts", "indicative_1", "indicative_4", "true"):
            inside, distance = hits_of(missing["pairs"], arm)
            found[f"{last}: PIR, {arm}"] = inside.tolist(), surfaces
            found[f"{last}: PIR of means, {arm}"] = hits_of(missing["pairs"], arm, True)[0].tolist(), surfaces
            if not np.isnan(distance).any():
                found[f"{last}: off the middle, eV, {arm}"] = distance.tolist(), surfaces
    items = metrics.get("design", {}).get("items", [])
    tasks = [item["identity"].partition("</s>")[2] for item in items]
    for judge in ("own", "judge"):
        if items and f"success_{judge}" in items[0]:
            hits = [float(item[f"success_{judge}"]) for item in items]
            found[f"design success, {judge}"] = hits, tasks
    return found


def compared(runs: Mapping[str, Sequence[Metrics]]) -> dict[str, Any]:
    """Rows of the table: by what was measured, each cell's mean over the seeds with its sd and interval, and
    how far it is from the first cell's, paired by seed and system where both measured the same ones."""
    values = {name: [values_of(m) for m in metrics] for name, metrics in runs.items()}
    first = next(iter(values))
    rows: dict[str, Any] = {}
    for what in values[first][0]:
        row: dict[str, Any] = {}
        for name, each in values.items():
            if any(what not in one for one in each):
                continue
            by_seed = [one[what][0] for one in each]
            groups = [f"{k} {pair}" for k, one in enumerate(each) for pair in one[what][1]]
            means = [statistics.fmean(v) for v in by_seed]
            row[name] = {
                "mean": statistics.fmean(means),
                "sd": statistics.stdev(means) if len(means) > 1 else None,
                "each": means,
                "interval": bootstrap_interval(np.concatenate(by_seed), groups=groups),
            }
            base = [one[what][0] for one in values[first]]
            if name != first and [one[what][1] for one in each] == [one[what][1] for one in values[first]]:
                more = np.concatenate(by_seed) - np.concatenate(base)
                interval = bootstrap_interval(more, groups=groups)
                row[name] |= {
                    "more": float(more.mean()),
                    "more_interval": interval,
                    "separate": bool(interval[0] > 0 or interval[1] < 0),
                }
        rows[what] = row
    return rows


def table(rows: Mapping[str, Any]) -> str:
    """The rows as a Markdown table."""
    lines = ["| | cell | mean ± sd | 95 % | more than the first cell |", "|---|---|---|---|---|"]
    for what, row in rows.items():
        for name, cell in row.items():
            low, high = cell["interval"]
            sd = "" if cell["sd"] is None else f" ± {cell['sd']:.3f}"
            more = ""
            if "more" in cell:
                a, b = cell["more_interval"]
                more = f"{cell['more']:+.3f} ({a:+.3f} to {b:+.3f})"
                more += "" if cell["separate"] else ", not separate"
            lines.append(f"| {what} | {name} | {cell['mean']:.3f}{sd} | {low:.3f} to {high:.3f} | {more} |")
    return "\n".join(lines)


def study(path: Path, out: Path, ranks: int = 1, only: str | None = None, run: Runner | None = None) -> str:
    """Run what is missing, write `study.json` and `table.md` into `out`; returns the table."""
    asked = read(path)
    out.mkdir(parents=True, exist_ok=True)
    folders = run_all(asked, out, run or trainer(ranks), only)
    runs = {
        name: [json.loads((f / "metrics.json").read_text()) for f in each] for name, each in folders.items()
    }
    rows = compared(runs)
    seconds = {
        name: [round(sum(m.get("seconds", {}).values()), 1) for m in each] for name, each in runs.items()
    }
    said = {"study": str(path), "seeds": list(asked.seeds), "rows": rows, "seconds": seconds}
    (out / "study.json").write_text(json.dumps(said, indent=1) + "\n")
    (out / "table.md").write_text(table(rows) + "\n")
    return table(rows)
