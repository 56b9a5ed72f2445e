"""Rows of the design benchmark side by side: the closed loop's and those of generators without it.

catmllm evaluate candidates evolution --out rows/evolution      # and the other rows
catmllm evaluate generator rows/* --judge diep --out rows.json
python bench/generators.py rows.json                            # of several files, if they were scored apart
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if __package__:
    from bench import record
else:
    import record

from bench.spread import words

KINDS = ("fixed", "free")


def main() -> int:
    parser = record.arguments(__doc__)
    parser.add_argument("scores", nargs="+", type=Path, help="what `catmllm evaluate generator --out` wrote")
    args = parser.parse_args()
    rows = {
        name: row
        for path in args.scores
        for name, row in json.loads(path.read_text(encoding="utf-8")).items()
    }
    if "search" not in rows:
        record.skip("the row `search` is needed: `catmllm evaluate candidates search`")
    first = rows["search"]
    cases = {
        f"{kind}, {n}": {"search": [first[kind]["judge"]["success"][k]]}
        for kind in KINDS
        for k, n in enumerate(first["budgets"])
    }
    about = {
        "tolerance": first["tolerance"],
        "budgets": first["budgets"],
        "surfaces": {k: [i["identity"].partition("</s>")[2] for i in items(first, k)] for k in KINDS},
        "rows": {name: {kind: outcomes(row, kind) for kind in KINDS} for name, row in rows.items()},
    }
    says = "design tasks that a row answers; each row's outcomes, task by task, are conditions"
    record.finish(args, [record.claim("generators", says, "share", cases, about, less_is_better=False)])
    return 0


def items(row: Mapping[str, Any], kind: str) -> list[dict[str, Any]]:
    return [item for item in row["items"] if item["task"].startswith(kind)]


def outcomes(row: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """By judge whether each task is answered, a digit each number of predictions; what its CIFs fail."""
    told = {j: words(items(row, kind), "search", j, row["tolerance"]) for j in ("own", "judge")}
    return {**told, "failures": row[kind]["failures"], "CIFs": row[kind]["candidates"]}


if __name__ == "__main__":
    sys.exit(main())
