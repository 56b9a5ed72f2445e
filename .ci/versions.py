"""Exact versions for pip's --constraint, as `name==version` lines: of all that an install takes,
or the oldest that may be.

    pip install --dry-run --ignore-installed --report - … | python .ci/versions.py resolved
    python .ci/versions.py oldest

`oldest` are the lower bounds of pyproject.toml; what has none there,
or is needed only by another package, stays free.
"""

from __future__ import annotations

import json
import re
import sys
import tomllib
from itertools import chain
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
OWN = tomllib.loads(PROJECT.read_text())["project"]


def resolved(report: str) -> list[str]:
    """Of a report of pip: every package but this one. A local label as in 2.13.0+cpu goes:
    it is of one index only."""
    found = [package["metadata"] for package in json.loads(report)["install"]]
    pins = {p["name"].lower(): p["version"].partition("+")[0] for p in found if p["name"] != OWN["name"]}
    return [f"{name}=={version}" for name, version in sorted(pins.items())]


def oldest() -> list[str]:
    """The lower bound of each requirement; the highest where an extra asks for more than the reward alone."""
    pins: dict[str, str] = {}
    for requirement in chain(OWN["dependencies"], *OWN["optional-dependencies"].values()):
        bound = re.match(r"([\w.-]+)(?:\[.*?\])?\s*(?:>=|~=|==)\s*([\w.]+)", requirement)
        if bound:
            pins[bound[1]] = max(pins.get(bound[1], "0"), bound[2], key=numbers)
    return [f"{name}=={version}" for name, version in sorted(pins.items())]


def numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


if __name__ == "__main__":
    print("\n".join(resolved(sys.stdin.read()) if sys.argv[1:] == ["resolved"] else oldest()))
