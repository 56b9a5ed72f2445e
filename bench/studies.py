"""Full runs of studies for docs/studies.md: what each has measured becomes a record, its figure a picture.

    catmllm study configs/studies/mmtg.yaml --out runs/mmtg
    python bench/studies.py runs/mmtg       # into bench/results/studies and docs/studies; then `make tables`

A folder has the name of its study. A record holds every row; the page shows those of `SHOWN`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

if __package__:
    from bench import record
else:
    import record

from catmllm.report.figures import save_figure
from catmllm.study.cells import read
from catmllm.study.compare import LAST
from catmllm.study.page import draw, size

RESULTS = record.RESULTS / "studies"
PICTURES = record.ROOT / "docs" / "studies"
# Study -> row of its study.json -> how the page calls it. What ends in % is a share.
_ENERGIES = {
    "joint: test error, eV": "text and relaxed structure, eV",
    "joint: test error, graph, eV": "structure alone, eV",
    "joint: test error, text, eV": "text alone, eV",
    "joint: test error, start, eV": "start, eV",
}
SHOWN: dict[str, dict[str, str]] = {
    "bridge": {row.replace("joint", LAST): words for row, words in _ENERGIES.items()},
    "inverse_helps": _ENERGIES,
    "mmtg": _ENERGIES | {"joint: cross-entropy in training": "cross-entropy of answers"},
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, help="folders of finished studies, each with its study's name"
    )
    for folder in parser.parse_args().runs:
        keep(folder)
    return 0


def keep(folder: Path, results: Path = RESULTS, pictures: Path = PICTURES) -> None:
    """The record and the picture of a finished study."""
    name = folder.name
    if name not in SHOWN:
        raise SystemExit(f"error: {folder}: no study {name!r} stands in SHOWN; there are {', '.join(SHOWN)}")
    said = json.loads((folder / "study.json").read_text(encoding="utf-8"))
    for drop in ("sentences", "study"):  # they follow from the rows, and from the name
        said.pop(drop)
    results.mkdir(parents=True, exist_ok=True)
    (results / f"{name}.json").write_text(record.layout(record.rounded(said)) + "\n", encoding="utf-8")
    rows = shown(name, said)
    axis = read(record.ROOT / "configs" / "studies" / f"{name}.yaml").axis
    pictures.mkdir(parents=True, exist_ok=True)
    save_figure(pictures / f"{name}.png", size(rows), lambda figure: draw(figure, rows, axis))


def shown(name: str, said: dict[str, Any]) -> dict[str, Any]:
    """The rows that the page shows, under the page's names. Raises KeyError where the study has none such."""
    return {words: said["rows"][row] for row, words in SHOWN[name].items()}


if __name__ == "__main__":
    sys.exit(main())
