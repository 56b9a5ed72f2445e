"""Time from Python strings to finished scores: rewards_fast beside pymatgen and gemmi, in turn in one process.

pymatgen and gemmi only parse (to a Structure, to the sites of the cell); "pymatgen reward" adds the density and the distance
matrix that the reward needs. Medians of many turns. One-thread times are processor time of the calling thread (on an idle
machine the same as wall time), so that other processes do not count; two threads against one is wall time.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import platform
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable
from datetime import date
from typing import Any

import numpy as np

from rewards_fast import PVCP, _core


def cif(cell: tuple[float, ...], symbols: list[str], frac: np.ndarray, operations: list[str]) -> str:
    """A CIF as pymatgen's writer lays it out."""
    names = ("length_a", "length_b", "length_c", "angle_alpha", "angle_beta", "angle_gamma")
    lines = ["data_x", *(f"_cell_{name}   {value:.8f}" for name, value in zip(names, cell))]
    lines += ["loop_", " _symmetry_equiv_pos_site_id", " _symmetry_equiv_pos_as_xyz"]
    lines += [f"  {i}  '{operation}'" for i, operation in enumerate(operations, start=1)]
    lines += ["loop_", " _atom_site_type_symbol", " _atom_site_label", " _atom_site_symmetry_multiplicity"]
    lines += [" _atom_site_fract_x", " _atom_site_fract_y", " _atom_site_fract_z", " _atom_site_occupancy"]
    lines += [
        f"  {s}  {s}{i}  1  {x:.8f}  {y:.8f}  {z:.8f}  1"
        for i, (s, (x, y, z)) in enumerate(zip(symbols, frac))
    ]
    return "\n".join(lines) + "\n"


def slab(n: int) -> str:
    """A slab-like cell of n atoms: layers 2.3 Å apart below 12 Å of vacuum, slightly rattled."""
    side = max(1, round((n / 4) ** 0.5))
    layers = -(-n // (side * side))
    height = 2.3 * layers + 12
    generator = np.random.default_rng(n)
    frac = [
        ((i + 0.5 * (k % 2)) / side, j / side, (2.3 * k + 1) / height)
        for k in range(layers)
        for i in range(side)
        for j in range(side)
    ]
    sites = np.array(frac[:n]) + generator.normal(scale=0.004, size=(n, 3))
    symbols = ["Pt" if i % 4 else "Cu" for i in range(n - 2)] + ["C", "O"]
    return cif((2.8 * side, 2.8 * side, height, 90, 90, 90), symbols, sites % 1, ["x, y, z"])


RUTILE = ["x,y,z", "-x,-y,z", "-y+1/2,x+1/2,z+1/2", "y+1/2,-x+1/2,z+1/2", "-x+1/2,y+1/2,-z+1/2", "x+1/2,-y+1/2,-z+1/2",
          "y,x,-z", "-y,-x,-z", "-x,-y,-z", "x,y,-z", "y+1/2,-x+1/2,-z+1/2", "-y+1/2,x+1/2,-z+1/2", "x+1/2,-y+1/2,z+1/2",
          "-x+1/2,y+1/2,z+1/2", "-y,-x,z", "y,x,z"]  # fmt: skip


def texts() -> dict[str, str]:
    """The cases by name."""
    rutile = cif(
        (4.594, 4.594, 2.959, 90, 90, 90), ["Ti", "O"], np.array([[0, 0, 0], [0.3048, 0.3048, 0]]), RUTILE
    )
    return {
        "68-atom slab": slab(68),
        "6-atom cell, 16 operations": rutile,
        "100 atoms": slab(100),
        "1000 atoms": slab(1000),
    }


def seconds(call: Callable[[], Any], clock: Callable[[], float] = time.thread_time) -> float:
    """Seconds of one call by a clock."""
    start = clock()
    call()
    return clock() - start


def peers(text: str) -> dict[str, Callable[[], Any]]:
    """What is timed one text at a time, as far as it is installed."""
    found: dict[str, Callable[[], Any]] = {}
    try:
        structure = importlib.import_module("pymatgen.core").Structure
    except ImportError:
        pass
    else:
        found["pymatgen parse"] = lambda: structure.from_str(text, fmt="cif")

        def reward() -> None:
            cell = structure.from_str(text, fmt="cif")
            distances = cell.distance_matrix
            np.fill_diagonal(distances, np.inf)
            _ = (cell.volume, cell.density, float(distances.min()), cell.composition.get_el_amt_dict())

        found["pymatgen reward"] = reward
    try:
        gemmi = importlib.import_module("gemmi")
    except ImportError:
        pass
    else:
        found["gemmi parse to sites"] = lambda: gemmi.make_small_structure_from_block(
            gemmi.cif.read_string(text).sole_block()
        ).get_all_unit_cell_sites()
    return found


def measure(text: str, batch: int, turns: int) -> dict[str, float]:
    """Median microseconds a text, everything in turn."""
    calls = peers(text)
    batch_texts = [text] * batch
    one, two = PVCP(threads=1), PVCP(threads=2)
    samples: dict[str, list[float]] = {
        name: [] for name in ("ours", "wall, 1 thread", "wall, 2 threads", *calls)
    }
    slow_turns = max(3, turns // 5)
    target = "CO</s>Pt9Cu3 (1 1 1)"
    for turn in range(turns):
        samples["ours"].append(seconds(lambda: one.score(batch_texts, target)) / batch)
        for name, scorer in (("wall, 1 thread", one), ("wall, 2 threads", two)):
            call = functools.partial(scorer.score, batch_texts, target)
            samples[name].append(seconds(call, time.perf_counter) / batch)
        for name, peer in calls.items():
            if not name.startswith("pymatgen"):
                samples[name].append(seconds(lambda p=peer: [p() for _ in range(32)]) / 32)
            elif turn < slow_turns:
                samples[name].append(seconds(peer))
    return {name: 1e6 * statistics.median(values) for name, values in samples.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    result: dict[str, Any] = {
        name: measure(text, 256, 5 if arguments.quick else 41) for name, text in texts().items()
    }
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    about = {"date": str(date.today()), "commit": commit, "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1),
             "machine": platform.processor() or platform.machine(), "python": platform.python_version(), "scan": _core.instruction_set()}  # fmt: skip
    if arguments.json:
        print(json.dumps({"about": about, "microseconds": result}))
        return
    print(about)
    for name, row in result.items():
        ours, pair = row["ours"], row["wall, 1 thread"] / row["wall, 2 threads"]
        print(f"\n{name}: {ours:.2f} µs a text; 2 threads {pair:.2f} x one")
        for peer, value in row.items():
            if peer.startswith(("pymatgen", "gemmi")):
                print(f"  {peer:<22} {value:10.1f} µs   {value / ours:8.1f} x ours")
    ratio = result["1000 atoms"]["ours"] / result["100 atoms"]["ours"]
    print(f"\n1000 atoms take {ratio:.1f} x the time of 100")


if __name__ == "__main__":
    main()
