"""Several runs of the pipeline side by side: what they wrote and designed, mean and spread over their seeds.

    python bench/seeds.py before=runs/old0,runs/old1,runs/old2 after=runs/new0,runs/new1,runs/new2

Each group is a name and folders of finished runs (or their metrics.json); without any, the bench has nothing
to compare. The last group is ours. Nothing is dropped: `each` in the record has the value of every run,
`value` and `peer` their means, `deviation` the sample standard deviation.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench import record

Value = Callable[[dict[str, Any]], float]


def rows() -> list[tuple[str, Value]]:
    """What is compared: a name and where metrics.json has it."""
    out: list[tuple[str, Value]] = []
    for stage in ("grpo", "ga_grpo"):
        for key in ("reward", "PF", "VF", "CM", "PV", "AD"):
            out.append(
                (
                    f"after {stage}: {key}",
                    lambda m, s=stage, k=key: m["generation"][s][k],  # type: ignore[misc]
                )
            )
    out.append(("after ga_grpo: test MAE (eV)", lambda m: m["property"]["ga_grpo"]["both"]["mae"]))
    for judge in ("own", "judge"):
        for key in ("success", "shuffled", "shuffled_same_adsorbate", "retrieval"):
            out.append(
                (
                    f"design, {judge}: {key}",
                    lambda m, j=judge, k=key: m["design"][j][k],  # type: ignore[misc]
                )
            )
    out.append(("design: feasible", lambda m: m["design"]["feasible"]))
    for part in ("grpo", "ga_grpo", "design"):
        out.append((f"seconds: {part}", lambda m, p=part: m["seconds"][p]))  # type: ignore[misc]
    return out


def read(path: Path) -> dict[str, Any]:
    """The metrics of a run's folder or file; ends with a message where there are none."""
    file = path / "metrics.json" if path.is_dir() else path
    try:
        found: dict[str, Any] = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {file}: {error}") from None
    if "design" not in found:
        raise SystemExit(f"error: {file}: the run has not finished: it has no design part")
    return found


def main() -> None:
    parser = record.arguments(__doc__)
    parser.add_argument("groups", nargs="*", metavar="NAME=RUN,RUN,…")
    args = parser.parse_args()
    if not args.groups:
        record.skip("needs finished runs: python bench/seeds.py before=RUN,RUN after=RUN,RUN")
    groups = {}
    for text in args.groups:
        name, _, paths = text.partition("=")
        if not paths:
            parser.error(f"{text}: expected NAME=RUN,RUN,…")
        groups[name] = [read(Path(p)) for p in paths.split(",")]
    *_, ours = groups
    order = [ours, *(name for name in groups if name != ours)]
    each = {
        label: {name: [float(value(m)) for m in groups[name]] for name in order} for label, value in rows()
    }
    found = record.claim(
        "rl_seeds",
        "runs of the pipeline compared over their seeds",
        "as named; means",
        {label: {name: [statistics.mean(v)] for name, v in of.items()} for label, of in each.items()},
        {"runs": {name: len(runs) for name, runs in groups.items()}},
        less_is_better=False,
    )
    found["deviation"] = {
        label: {name: statistics.stdev(v) if len(v) > 1 else None for name, v in of.items()}
        for label, of in each.items()
    }
    record.finish(args, [found | {"each": each}])


if __name__ == "__main__":
    main()
