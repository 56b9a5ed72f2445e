"""How fast OC20 becomes training data: texts, graphs and pictures compared with ASE's,
and the whole command on a made data set.

    python bench/data.py [--part text …] [--quick] [--json] [--base COMMIT]

- `text`: three-part text and neighbour graph (12 Å, 20 nearest, strict) of a system, ours and ASE's in turn
  in one process on one thread: shipped 14-atom slabs, and made slabs of 70 atoms with OC20's vacuum. The text
  by ASE is CatBERTa's route (NeighborList over natural cutoffs, connectivity matrix), the graph
  ase.neighborlist.neighbor_list and one sort.
- `pictures` (`data.images`) on one thread, ours and by ASE's plot_atoms with matplotlib.
- `command`: `catmllm data oc20` on an IS2RE LMDB of 100,000 made systems of 70 atoms on 2 processes: records
  per second, and the resident memory of all processes (anonymous pages) in the first half and in the last
  quarter.

Text and pictures count processor time, the command wall time.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

# for the tests' ASE route and writers of OC20's layouts, too
sys.path.insert(0, str(Path(__file__).parents[1]))
from bench import record  # first: it decides whose packages are measured
from catmllm.data.oc20.process import process
from catmllm.data.slabs import load_slabs
from catmllm.structure.graph import neighbour_graph
from catmllm.structure.system import System, make_system
from catmllm.structure.text import three_part_text

CUTOFF, NEIGHBOURS = 12.0, 20
PARTS = ("text", "pictures", "command")


def made_slab(rng: np.random.Generator, sid: str = "made") -> System:
    """64 metal atoms, jittered as relaxed ones are, under CH2CH2 and 20 Å of vacuum."""
    from ase.build import fcc111

    metal = str(rng.choice(["Pt", "Cu", "Ni", "Pd", "Ag", "Au", "Al", "Ir", "Rh"]))
    slab = fcc111(metal, (4, 4, 4), vacuum=10.0, periodic=True)
    top = slab.positions[-1] + [0, 0, 2.0]
    molecule = top + np.array(
        [[0, 0, 0], [1.4, 0, 0.1], [-0.6, 0.9, 0.3], [-0.6, -0.9, 0.3], [2.0, 0.9, 0.4], [2.0, -0.9, 0.4]]
    )
    positions = np.vstack([slab.positions, molecule])
    positions += rng.normal(0, 0.05, positions.shape)
    numbers = [*slab.numbers, 6, 6, 1, 1, 1, 1]
    tags = [0] * 48 + [1] * 16 + [2] * 6
    return make_system(
        slab.cell[:], positions, numbers, tags, "CH2CH2", (1, 1, 1), energy=float(rng.normal(-1, 1)), sid=sid
    )


# --------------------------------------------------------------------------- text and graph


def ase_route(system: System) -> tuple[str, np.ndarray]:
    from ase.neighborlist import neighbor_list

    from tests.oracles.structure_ase import ase_three_part_text

    atoms = system.as_ase()
    text = ase_three_part_text(atoms, system.adsorbate, system.known_miller)
    target, source, vectors, distance = neighbor_list("ijDd", atoms, CUTOFF)
    order = np.lexsort((distance, target))
    rank = np.arange(len(order)) - np.searchsorted(target[order], target[order])
    kept = order[rank < NEIGHBOURS]
    return text, np.c_[source[kept], target[kept], vectors[kept]]


def our_route(system: System) -> tuple[str, Any]:
    graph = neighbour_graph(system.lattice, system.positions, CUTOFF, NEIGHBOURS, strict=True)
    return three_part_text(system), graph


def text_and_graph(systems: list[System], turns: int) -> dict[str, list[float]]:
    """Microseconds per system of both routes, which are shown to do the same first."""
    for system in systems:
        (ours, graph), (theirs, edges) = our_route(system), ase_route(system)
        assert ours == theirs and graph.edge_index.shape[1] == len(edges)
    return by_system({"ours": our_route, "ASE": ase_route}, systems, turns, 10)


def pictures(systems: list[System], turns: int) -> dict[str, list[float]]:
    """Microseconds per picture of both routes."""
    from catmllm.data.images import render
    from tests.data.test_images import drawn_by_ase

    return by_system({"ours": render, "ASE": drawn_by_ase}, systems[:2], turns, 5)


def by_system(
    routes: dict[str, Callable[[System], Any]], systems: list[System], turns: int, repeats: int
) -> dict[str, list[float]]:
    """Microseconds of processor time per system, in turn; ours, the first,
    goes through the systems several times a turn."""
    calls, counts = {}, {}
    for name, route in routes.items():
        asked = systems * (repeats if not calls else 1)
        calls[name] = lambda route=route, asked=asked: [route(system) for system in asked]
        counts[name] = len(asked)
    found = record.in_turn(calls, turns, time.process_time, 1e6)
    return {name: [x / counts[name] for x in samples] for name, samples in found.items()}


# --------------------------------------------------------------------------- the command


def made_lmdb(folder: Path, n: int) -> None:
    """An IS2RE LMDB of n systems and its mapping. 500 different ones; every record has a sid of its own."""
    import pickle

    import lmdb

    from tests.data.oc20_files import Case, pyg_fields, pyg_pickle

    rng = np.random.default_rng(0)
    marker = 0x5A5A5A5A
    rows = []
    for _ in range(min(n, 500)):
        system = made_slab(rng)
        atoms = system.as_ase()
        from ase.constraints import FixAtoms

        atoms.set_constraint(FixAtoms(np.flatnonzero(system.tags == 0)))
        case = Case(atoms, marker, system.adsorbate, system.bulk, system.known_miller, system.known_energy)
        rows.append((pyg_pickle(pyg_fields(case, "is2re"), old=False), system.bulk))
    pattern = b"J" + marker.to_bytes(4, "little")
    mapping = {}
    environment = lmdb.open(str(folder / "data.lmdb"), map_size=1 << 34, subdir=False, sync=False)
    for first in range(0, n, 10_000):
        with environment.begin(write=True) as transaction:
            for i in range(first, min(n, first + 10_000)):
                row, bulk = rows[i % len(rows)]
                sid = 100_000 + i
                transaction.put(b"%d" % i, row.replace(pattern, b"J" + sid.to_bytes(4, "little")))
                mapping[f"random{sid}"] = {
                    "ads_symbols": "*CH2CH2",
                    "bulk_symbols": bulk,
                    "bulk_mpid": f"mp-{i % 97}",
                    "miller_index": (1, 1, 1),
                    "shift": 0.1,
                    "top": True,
                    "anomaly": 0,
                }
    with environment.begin(write=True) as transaction:
        transaction.put(b"length", pickle.dumps(n))
    environment.close()
    (folder / "mapping.pkl").write_bytes(pickle.dumps(mapping))


def anonymous_pages() -> float:
    """MiB of this process and all below it that no file backs
    (an LMDB's pages are the page cache's, not ours)."""
    parents: dict[int, int] = {}
    sizes: dict[int, int] = {}
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        except OSError:
            continue
        pid = int(status.parent.name)
        parents[pid] = int(fields["PPid"])
        sizes[pid] = int(fields.get("RssAnon", "0 kB").split()[0])

    def below(pid: int) -> Iterator[int]:
        yield pid
        for child, parent in parents.items():
            if parent == pid:
                yield from below(child)

    return sum(sizes.get(pid, 0) for pid in below(os.getpid())) / 1024


def whole_command(n: int, workers: int) -> dict[str, float]:
    """What it made per second and how much memory all processes took."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made_lmdb(folder, n)
        samples: list[tuple[float, float]] = []
        running = threading.Event()

        def watch() -> None:
            while not running.wait(0.25):
                samples.append((time.perf_counter(), anonymous_pages()))

        watcher = threading.Thread(target=watch)
        watcher.start()
        start = time.perf_counter()
        shards = process(
            [folder / "data.lmdb"], folder / "out", [folder / "mapping.pkl"], workers=workers, progress=True
        )
        seconds = time.perf_counter() - start
        running.set()
        watcher.join()
        assert len(shards) == n, shards.facts
        memory = [m for _, m in samples]
        size = sum(p.stat().st_size for p in (folder / "out").iterdir())
    quarter = max(1, len(memory) // 4)
    return {
        "systems per second": n / seconds,
        "bytes per system": size / n,
        "MiB, most in the first half": max(memory[: 2 * quarter], default=0.0),
        "MiB, most in the last quarter": max(memory[-quarter:], default=0.0),
    }


def main() -> None:
    parser = record.arguments(__doc__)
    parser.add_argument("--part", action="append", choices=PARTS, help="only this part; may be given again")
    args = parser.parse_args()
    parts, turns = args.part or PARTS, 2 if args.quick else 7
    rng = np.random.default_rng(1)
    cases = {
        "14 atoms, shipped": load_slabs()[::150],
        "70 atoms, made": [made_slab(rng) for _ in range(3 if args.quick else 8)],
    }
    conditions = {"turns": turns, "threads": 1}
    claims = []
    if "text" in parts:
        routes = {name: text_and_graph(systems, turns) for name, systems in cases.items()}
        says = "three-part text and neighbour graph (12 Å, 20 nearest) of a system"
        claims.append(record.claim("data_text_graph", says, "µs of processor time", routes, conditions))
    if "pictures" in parts:
        drawn = {name: pictures(systems, turns) for name, systems in cases.items()}
        claims.append(
            record.claim("data_pictures", "picture of a system", "µs of processor time", drawn, conditions)
        )
    if "command" in parts:
        n = 4_000 if args.quick else 100_000
        found = {name: {"ours": [x]} for name, x in whole_command(n, workers=2).items()}
        says = "`catmllm data oc20` on an IS2RE LMDB of made systems of 70 atoms"
        claims.append(
            record.claim("data_command", says, "see each value", found, {"systems": n, "processes": 2})
        )
    record.finish(args, claims)


if __name__ == "__main__":
    main()
