"""Several runs of the pipeline side by side: what they wrote and designed, mean and spread over their seeds.

    python bench/seeds.py before=runs/old0,runs/old1,runs/old2 after=runs/new0,runs/new1,runs/new2

Each group is a name and folders of finished runs (or their metrics.json); without any, it is the recorded run. A value
is the mean over a group's runs ± the sample standard deviation; nothing is dropped.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

RECORDED = Path(__file__).parent / "results" / "tiny_pipeline.json"
Value = Callable[[dict[str, Any]], float]


def rows() -> list[tuple[str, Value]]:
    """What is compared: a name and where metrics.json has it."""
    out: list[tuple[str, Value]] = []
    for stage in ("grpo", "ga_grpo"):
        for key in ("reward", "PF", "VF", "CM", "PV"):
            out.append((f"after {stage}: {key}", lambda m, s=stage, k=key: m["generation"][s][k]))  # type: ignore[misc]
    out.append(("after ga_grpo: test MAE (eV)", lambda m: m["property"]["ga_grpo"]["both"]["mae"]))
    for judge in ("own", "sevennet"):
        for key in ("success", "shuffled", "shuffled_same_adsorbate", "retrieval"):
            out.append((f"design, {judge}: {key}", lambda m, j=judge, k=key: m["design"][j][k]))  # type: ignore[misc]
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("groups", nargs="*", metavar="NAME=RUN,RUN,…")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    args = parser.parse_args()
    groups = {}
    for text in args.groups or [f"recorded={RECORDED}"]:
        name, _, paths = text.partition("=")
        if not paths:
            parser.error(f"{text}: expected NAME=RUN,RUN,…")
        groups[name] = [read(Path(p)) for p in paths.split(",")]
    table = {
        label: {name: [float(value(m)) for m in runs] for name, runs in groups.items()}
        for label, value in rows()
    }
    if args.json:
        print(json.dumps(table))
        return
    print(f"{'':42s}" + "".join(f"{f'{name} ({len(runs)})':>20s}" for name, runs in groups.items()))
    for label, values in table.items():
        print(f"{label:42s}" + "".join(f"{spread(v):>20s}" for v in values.values()))


def spread(values: list[float]) -> str:
    """Mean ± sample standard deviation."""
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation}"


if __name__ == "__main__":
    main()
