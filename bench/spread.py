"""What runs of one setting on several splits say together: errors of energies, what fails among free answers,
and every design task's outcome, so that the intervals in docs/studies.md can be made again.

    catmllm study configs/studies/spread.yaml --out runs/spread
    python bench/spread.py                  # of runs/spread; others by their folders
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__:
    from bench import record
else:
    import record

from catmllm.evaluate.design import METHODS, hits
from catmllm.report.summary import taken

FAILURES = ("PF", "VF", "CM", "PV", "AD")
BASELINES = {  # baseline of a run -> which energies, and the key of its error
    "kernel ridge": ("relaxed structures", "kernel_ridge", "mae"),
    "kernel ridge, starts too": ("starts", "kernel_ridge_frames", "start"),
    "ridge on words": ("texts", "text_ridge", "mae"),
}


def main() -> int:
    parser = record.arguments(__doc__)
    parser.add_argument("runs", nargs="*", type=Path, help="folders of finished runs, one a split")
    args = parser.parse_args()
    args.runs = args.runs or [path.parent for path in Path("runs/spread").glob("*/*/metrics.json")]
    if len(args.runs) < 2:
        record.skip("two finished runs or more are needed: `catmllm study` as above makes them")
    runs = [json.loads((run / "metrics.json").read_text(encoding="utf-8")) for run in args.runs]
    runs.sort(key=lambda run: run["config"]["data"]["split_seed"])
    about = {
        "splits": [run["config"]["data"]["split_seed"] for run in runs],
        "commits": [run["machine"]["commit"] for run in runs],
        "taken": [taken(run) for run in runs],
        "dates": [run["machine"]["date"] for run in runs],
        "errors": (said := errors(runs)),
        "failures": failures(runs),
        "tasks": {"fixed": tasks(runs, "design"), "free": tasks(runs, "free_design")},
        "second judges": second(runs),
    }
    says = "test MAE of runs of one setting on several splits; their answers and designs are conditions"
    record.finish(args, [record.claim("spread", says, "eV", said, about)])
    return 0


def errors(runs: Sequence[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Test MAE in eV by what is read, of the last stage and of the run's baselines."""
    found: dict[str, dict[str, list[float]]] = {}
    for shown, mode in (("relaxed structures", "both"), ("starts", "start"), ("texts", "text")):
        found[shown] = {"model": [r["property"][r["config"]["stages"][-1]][mode]["mae"] for r in runs]}
    for who, (shown, name, key) in BASELINES.items():
        said = [r["baselines"][name][key] for r in runs]
        found[shown][who] = [e["mae"] if isinstance(e, dict) else e for e in said]
    return found


def failures(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Shares of failed answers by stage, under the grammar and without it, and how many answers a split."""
    found: dict[str, Any] = {"answers": [run["generation"]["instruct"]["n"] for run in runs]}
    for stage in runs[0]["generation"]:
        said = [run["generation"][stage] for run in runs]
        found[stage] = {k: [one[k] for one in said] for k in FAILURES if k in said[0]}
        found[f"{stage}, free"] = {
            k: [one["free"][k] for one in said] for k in FAILURES if k in said[0]["free"]
        }
    return found


def tasks(runs: Sequence[dict[str, Any]], kind: str) -> dict[str, Any]:
    """By split each task's surface, and by judge and method whether its answers are within the tolerance."""
    designs = [run[kind] for run in runs]
    found: dict[str, Any] = {
        "tolerance": designs[0]["tolerance"],
        "budgets": designs[0]["budgets"],
        "surfaces": [[i["identity"].partition("</s>")[2] for i in d["items"]] for d in designs],
    }
    for judge in ("own", "judge"):
        found[judge] = {
            method: [words(d["items"], method, judge, d["tolerance"]) for d in designs]
            for method in METHODS
            if all(i["answers"].get(method) for d in designs for i in d["items"])
        }
    return found


def words(items: Sequence[dict[str, Any]], method: str, judge: str, tolerance: float) -> str:
    """Outcomes of all tasks of a run: "0111 1111", a digit each number of predictions, a word each task."""
    return " ".join("".join(str(int(x)) for x in row) for row in hits(items, method, judge, tolerance))


def second(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of other judges of the designs by split: share of tasks, and of test structures that reach the same."""
    found: dict[str, Any] = {}
    for name in sorted({name for run in runs for name in run["design"].get("second", {})}):
        said = [run["design"].get("second", {}).get(name, {}) for run in runs]
        found[name] = {key: [one.get(key) for one in said] for key in ("success", "ceiling")}
    return found


if __name__ == "__main__":
    sys.exit(main())
