"""Writes `tests/structure/fairchem_graphs.json`: neighbour graphs by
fairchem-core 1.10.0's own `radius_graph_pbc`.

    pip install torch-geometric; pip install --no-deps --target DIR fairchem-core==1.10.0
    PYTHONPATH=.:DIR python -m tests.oracles.structure_fairchem

Every case has its atoms inside the cell (fairchem looks for too few images otherwise). Edges are listed only
where no two neighbours of an atom tie at the limit, for fairchem breaks ties at random; degrees without a
limit always.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np

from catmllm.data.slabs import load_slabs

TARGET = Path(__file__).parents[1] / "structure" / "fairchem_graphs.json"


def cases() -> list[dict[str, Any]]:
    """Cells and positions: random ones of all sizes and skews, and two shipped slabs."""
    rng = np.random.default_rng(3)
    found = []
    for n, edge, skew in ((1, 2.5, 0.4), (2, 2.9, 0.8), (5, 4.0, 1.2), (12, 7.0, 0.5), (30, 10.0, 0.3)):
        lattice = np.eye(3) * edge + np.tril(rng.uniform(-skew, skew, (3, 3)) * edge, -1)
        found.append((lattice, rng.uniform(0, 1, (n, 3)) @ lattice))
    for system in load_slabs()[40:60:13]:
        found.append((system.lattice, (system.frac - np.floor(system.frac)) @ system.lattice))
    return [
        {"lattice": cell.round(5).tolist(), "positions": points.round(5).tolist()} for cell, points in found
    ]


def fairchem_graph(case: dict[str, Any], cutoff: float, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """edge_index [2, E] and integer cell offsets [E, 3] of fairchem's strict mode."""
    import torch

    sys.modules.setdefault("torch_scatter", MagicMock())  # imported by that module, not used by this function
    from fairchem.core.common.utils import radius_graph_pbc

    data = SimpleNamespace(
        pos=torch.tensor(case["positions"], dtype=torch.float32),
        cell=torch.tensor(case["lattice"], dtype=torch.float32)[None],
        natoms=torch.tensor([len(case["positions"])]),
    )
    edge_index, offsets, _ = radius_graph_pbc(data, cutoff, limit, enforce_max_neighbors_strictly=True)
    return edge_index.numpy(), offsets.numpy().astype(int)


def main() -> None:
    rows = []
    for case in cases():
        for cutoff, limit in ((6.0, 20), (4.0, 7)):
            every, offsets = fairchem_graph(case, cutoff, 10**6)
            n = len(case["positions"])
            row = {**case, "cutoff": cutoff, "max_neighbours": limit}
            row["degrees"] = np.bincount(every[1], minlength=n).tolist()
            points, cell = np.array(case["positions"]), np.array(case["lattice"])
            distances = np.linalg.norm(points[every[0]] + offsets @ cell - points[every[1]], axis=1)
            sorted_distances = [np.sort(distances[every[1] == i]) for i in range(n)]
            if all(len(d) <= limit or d[limit] - d[limit - 1] > 1e-3 for d in sorted_distances):
                edge_index, offsets = fairchem_graph(case, cutoff, limit)
                row["edges"] = [
                    " ".join(map(str, edge)) for edge in sorted(np.c_[edge_index.T, offsets].tolist())
                ]
            rows.append(row)
    TARGET.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n", encoding="ascii")
    print(f"{TARGET}: {len(rows)} graphs, {sum('edges' in row for row in rows)} with edges")


if __name__ == "__main__":
    main()
