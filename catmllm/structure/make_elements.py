"""Writes `elements.json` from pymatgen and ASE: `python -m catmllm.structure.make_elements`."""

from __future__ import annotations

import json
import math
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

COLUMNS = (
    "symbol", "electronegativity", "atomic_radius", "average_ionic_radius", "covalent_radius", "colour",
)  # fmt: skip


def element_rows() -> list[list[Any]]:
    """One row of `COLUMNS` for each of the 118 elements, by atomic number; radii in Å,
    colours as jmol's `#rrggbb` (beyond Mt that of Mt), None where there is no value."""
    from ase.data import covalent_radii
    from ase.data.colors import jmol_colors
    from pymatgen.core import Element

    rows = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pymatgen warns of every element without electronegativity
        for z in range(1, 119):
            element = Element.from_Z(z)
            x = float(element.X)
            radius = element.atomic_radius
            rows.append(
                [
                    element.symbol,
                    None if math.isnan(x) else x,
                    None if radius is None else float(radius),
                    round(float(element.average_ionic_radius), 6),
                    float(covalent_radii[z]),
                    "#" + bytes(round(float(c) * 255) for c in jmol_colors[min(z, 109)]).hex(),
                ]
            )
    return rows


def table_text(rows: list[list[Any]]) -> str:
    """The JSON file, a line an element."""
    source = f"pymatgen {version('pymatgen')}, ase {version('ase')}"
    lines = ",\n".join("    " + json.dumps(row) for row in rows)
    return (
        f'{{\n  "source": {json.dumps(source)},\n  "columns": {json.dumps(COLUMNS)},\n  "elements": [\n'
        f"{lines}\n  ]\n}}\n"
    )


if __name__ == "__main__":
    path = Path(__file__).with_name("elements.json")
    path.write_text(table_text(element_rows()), encoding="ascii")
    print(f"wrote {path}")
