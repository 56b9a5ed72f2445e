"""How fast OC20 becomes training data: texts and graphs against the ASE route, and the whole command on a made data set.

    python bench/data.py [--quick] [--json]

1. Three-part text and neighbour graph (12 Å, 20 nearest, strict) of a system, ours and ASE's in turn in one process on one
   thread: shipped 14-atom slabs, and made slabs of 70 atoms with OC20's vacuum. The text by ASE is CatBERTa's route
   (NeighborList over natural cutoffs, connectivity matrix), the graph ase.neighborlist.neighbor_list and one sort.
2. `catmllm data oc20` on an IS2RE LMDB of 100,000 made systems of 70 atoms: records a second on 2 processes, the resident
   memory of all processes (anonymous pages) after a quarter and at the end, and the hours for 460,000.
3. Pictures (`data.images`) a second on one thread, ours and by ASE's plot_atoms with matplotlib.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests' ASE route and writers of OC20's layouts

from catmllm.data.oc20.process import process
from catmllm.data.slabs import load_slabs
from catmllm.structure.graph import neighbour_graph
from catmllm.structure.system import System, make_system
from catmllm.structure.text import three_part_text

CUTOFF, NEIGHBOURS = 12.0, 20


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


def text_and_graph(systems: list[System], turns: int) -> dict[str, float]:
    """Median microseconds a system of both routes."""
    for system in systems:  # compiles, and shows that both do the same
        (ours, graph), (theirs, edges) = our_route(system), ase_route(system)
        assert ours == theirs and graph.edge_index.shape[1] == len(edges)

    def seconds(route: Callable[[System], Any]) -> float:
        start = time.perf_counter()
        for system in systems:
            route(system)
        return (time.perf_counter() - start) / len(systems)

    ours, theirs = [], []
    for _ in range(turns):
        ours += [seconds(our_route) for _ in range(5)]
        theirs.append(seconds(ase_route))
    found = {"ours": 1e6 * statistics.median(ours), "ase": 1e6 * statistics.median(theirs)}
    return found | {"ratio": found["ase"] / found["ours"]}


def pictures(systems: list[System], turns: int) -> dict[str, float]:
    """Median pictures a second of both routes."""
    from catmllm.data.images import render
    from tests.data.test_images import drawn_by_ase

    render(systems[0]), drawn_by_ase(systems[0])  # compiles, imports

    def rate(draw: Callable[[System], Any], some: list[System]) -> float:
        start = time.perf_counter()
        for system in some:
            draw(system)
        return len(some) / (time.perf_counter() - start)

    ours, theirs = [], []
    for _ in range(turns):
        ours += [rate(render, systems) for _ in range(3)]
        theirs.append(rate(drawn_by_ase, systems[:2]))
    found = {"ours": statistics.median(ours), "ase": statistics.median(theirs)}
    return found | {"ratio": found["ours"] / found["ase"]}


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
    """MiB of this process and all below it that no file backs (an LMDB's pages are the page cache's, not ours)."""
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
        "systems": n,
        "workers": workers,
        "seconds": seconds,
        "per_second": n / seconds,
        "hours_for_460000": 460_000 / (n / seconds) / 3600,
        "peak_mib_first_half": max(memory[: 2 * quarter], default=0.0),
        "peak_mib_last_quarter": max(memory[-quarter:], default=0.0),
        "bytes_per_system": size / n,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer systems and turns")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    args = parser.parse_args()
    rng = np.random.default_rng(1)
    turns = 2 if args.quick else 7
    cases = {
        "shipped, 14 atoms": load_slabs()[::150],
        "made, 70 atoms": [made_slab(rng) for _ in range(3 if args.quick else 8)],
    }
    routes = {name: text_and_graph(systems, turns) for name, systems in cases.items()}
    drawn = {name: pictures(systems, turns) for name, systems in cases.items()}
    command = whole_command(4_000 if args.quick else 100_000, workers=2)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    about = {
        "date": str(date.today()),
        "commit": commit,
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "machine": platform.processor() or platform.machine(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        "peak_mib_of_a_worker": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024,
    }
    if args.json:
        print(json.dumps({"about": about, "text_and_graph": routes, "pictures": drawn, "command": command}))
        return
    print(about)
    for name, row in routes.items():
        print(f"{name}: {row['ours']:.1f} µs a system, ASE {row['ase']:.0f} µs: {row['ratio']:.0f} x")
    for name, row in drawn.items():
        print(f"{name}: {row['ours']:.0f} pictures a second, ASE {row['ase']:.2f}: {row['ratio']:.0f} x")
    print(
        f"{command['systems']:,} systems of 70 atoms in {command['seconds']:.1f} s on {workers(command)}: "
        f"{command['per_second']:.0f} a second, 460,000 in {command['hours_for_460000']:.3f} h; "
        f"{command['bytes_per_system']:.0f} bytes a system"
    )
    print(
        f"anonymous memory of all processes: at most {command['peak_mib_first_half']:.0f} MiB in the first half, "
        f"{command['peak_mib_last_quarter']:.0f} MiB in the last quarter"
    )


def workers(command: dict[str, float]) -> str:
    return f"{command['workers']:.0f} processes"


if __name__ == "__main__":
    main()
