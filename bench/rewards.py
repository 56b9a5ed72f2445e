"""Time from Python strings to finished scores: rewards_fast compared with pymatgen and gemmi,
in turn in one process.

    python bench/rewards.py [--quick] [--json] [--base COMMIT]

Kinds of text: what a model under training writes (`mix`: half short CIFs as LLMs write them, a fifth slabs,
three tenths broken), each kind by itself, and three texts of fixed size. `pymatgen parse` and `gemmi` only
parse (to a Structure, to the sites of the cell); `pymatgen` adds the density and the distance matrix that the
reward needs. A text that a peer refuses counts with the time to its exception.

Times are processor time of the whole process on one thread, so that other processes do not count;
two threads compared with one is wall time.
"""

from __future__ import annotations

import contextlib
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench import record  # first: it decides whose packages are measured
from rewards_fast import PVCP, _core

TARGET = "CO</s>Pt9Cu3 (1 1 1)"


def cif(
    cell: tuple[float, ...], symbols: list[str], frac: np.ndarray, operations: list[str], digits: int = 8
) -> str:
    """A CIF as pymatgen's writer lays it out."""
    names = ("length_a", "length_b", "length_c", "angle_alpha", "angle_beta", "angle_gamma")
    lines = ["data_x", *(f"_cell_{name}   {value:.{digits}f}" for name, value in zip(names, cell))]
    lines += ["loop_", " _symmetry_equiv_pos_site_id", " _symmetry_equiv_pos_as_xyz"]
    lines += [f"  {i}  '{operation}'" for i, operation in enumerate(operations, start=1)]
    lines += ["loop_", " _atom_site_type_symbol", " _atom_site_label", " _atom_site_symmetry_multiplicity"]
    lines += [" _atom_site_fract_x", " _atom_site_fract_y", " _atom_site_fract_z", " _atom_site_occupancy"]
    lines += [
        f"  {s}  {s}{i}  1  {x:.{digits}f}  {y:.{digits}f}  {z:.{digits}f}  1"
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


def short_cif(rng: np.random.Generator) -> str:
    """3 to 20 atoms on a rattled grid in a cell of about 4 Å an edge, with as many digits as models write."""
    n = int(rng.integers(3, 21))
    side = int(np.ceil(n ** (1 / 3)))
    grid = np.stack(np.meshgrid(*[np.arange(side) / side] * 3), -1).reshape(-1, 3)[:n]
    frac = (grid + rng.normal(0, 0.02, grid.shape)) % 1
    kinds = rng.choice(["Pt", "Cu", "Ni", "Ti", "Fe", "O", "N", "S", "Si", "La"], 3, replace=False)
    lengths = tuple(float(x) for x in 2.6 * side * rng.uniform(0.9, 1.2, 3))
    symbols = sorted(str(k) for k in rng.choice(kinds, n))
    return cif((*lengths, 90.0, 90.0, 90.0), symbols, frac, ["x, y, z"], digits=int(rng.choice([4, 8])))


def broken(text: str, rng: np.random.Generator) -> str:
    """Cut off, a number lost from a row, a number garbled, or a sentence in its place."""
    how = rng.integers(4)
    if how == 0:
        return text[: int(len(text) * rng.uniform(0.2, 0.95))]
    lines = text.splitlines()
    row = int(rng.integers(max(0, len(lines) - 3), len(lines)))
    if how == 1:
        lines[row] = lines[row].rsplit(None, 2)[0]
    elif how == 2:
        lines[row] = lines[row].replace("0.", "0.2.", 1)
    else:
        lines = ["The structure is a slab of platinum and copper with one molecule on it."]
    return "\n".join(lines)


RUTILE = ["x,y,z", "-x,-y,z", "-y+1/2,x+1/2,z+1/2", "y+1/2,-x+1/2,z+1/2", "-x+1/2,y+1/2,-z+1/2",
          "x+1/2,-y+1/2,-z+1/2", "y,x,-z", "-y,-x,-z", "-x,-y,-z", "x,y,-z", "y+1/2,-x+1/2,-z+1/2",
          "-y+1/2,x+1/2,-z+1/2", "x+1/2,-y+1/2,z+1/2", "-x+1/2,y+1/2,z+1/2", "-y,-x,z", "y,x,z"]  # fmt: skip


def texts() -> dict[str, list[str]]:
    """The kinds by name."""
    rng = np.random.default_rng(0)
    short = [short_cif(rng) for _ in range(60)]
    slabs = [slab(int(n)) for n in rng.integers(48, 101, 30)]
    both = [*short[:24], *slabs[:6]]
    spoiled = [broken(both[i % len(both)], rng) for i in range(18)]
    mix = [*short[24:54], *slabs[6:18], *spoiled]
    rng.shuffle(mix)
    rutile = cif(
        (4.594, 4.594, 2.959, 90, 90, 90), ["Ti", "O"], np.array([[0, 0, 0], [0.3048, 0.3048, 0]]), RUTILE
    )
    return {
        "mix": mix,
        "short CIFs": short,
        "slabs, 48 to 100 atoms": slabs,
        "broken": spoiled,
        "slab, 68 atoms": [slab(68)],
        "6 atoms from 16 operations": [rutile],
        "slab, 1,000 atoms": [slab(1000)],
    }


def peers() -> dict[str, Callable[[str], Any]]:
    """What is timed text by text."""
    import gemmi
    from pymatgen.core import Structure

    def reward(text: str) -> Any:
        cell = Structure.from_str(text, fmt="cif")
        distances = cell.distance_matrix
        np.fill_diagonal(distances, np.inf)
        return cell.volume, cell.density, float(distances.min()), cell.composition.get_el_amt_dict()

    def sites(text: str) -> Any:
        block = gemmi.cif.read_string(text).sole_block()
        return gemmi.make_small_structure_from_block(block).get_all_unit_cell_sites()

    return {
        "pymatgen": reward,
        "pymatgen parse": lambda text: Structure.from_str(text, fmt="cif"),
        "gemmi": sites,
    }


def one_by_one(call: Callable[[str], Any], some: list[str]) -> None:
    for text in some:
        with contextlib.suppress(Exception):
            call(text)


def measure(some: list[str], turns: int, theirs: dict[str, Callable[[str], Any]]) -> dict[str, list[float]]:
    """Microseconds of processor time a text, everything in turn."""
    scorer, repeats = PVCP(threads=1), -(-1024 // len(some))
    calls: dict[str, Callable[[], Any]] = {"ours": lambda: scorer.score(some * repeats, TARGET)}
    weights = {"ours": len(some) * repeats}
    for name, call in theirs.items():
        again = 1 if name.startswith("pymatgen") else -(-64 // len(some))
        asked = some * again
        calls[name] = lambda call=call, asked=asked: one_by_one(call, asked)
        weights[name] = len(asked)
    samples = record.in_turn(calls, turns, time.process_time, 1e6)
    return {name: [x / weights[name] for x in found] for name, found in samples.items()}


def two_threads(some: list[str], turns: int) -> dict[str, list[float]]:
    """Texts a second of wall time with two threads, compared with one."""
    asked = some * -(-2048 // len(some))
    scorers = {"two": PVCP(threads=2), "one": PVCP(threads=1)}
    calls = {name: (lambda s=s: s.score(asked, TARGET)) for name, s in scorers.items()}
    found = record.in_turn(calls, turns)
    return {name: [len(asked) / x for x in seconds] for name, seconds in found.items()}


def main() -> None:
    args = record.arguments(__doc__).parse_args()
    warnings.simplefilter("ignore")
    try:
        theirs = peers()
    except ImportError as error:
        record.skip(f"needs pymatgen and gemmi: {error}")
    turns, kinds = 3 if args.quick else 9, texts()
    conditions = {"turns": turns, "instruction set": _core.instruction_set()}
    claims = [
        record.claim(
            "reward",
            "CIF text to scores, one thread",
            "µs of processor time per text",
            {name: measure(some, turns, theirs) for name, some in kinds.items()},
            conditions,
        ),
        record.claim(
            "reward_threads",
            "scores with two threads compared with one",
            "texts per second, wall time",
            {name: two_threads(some, turns) for name, some in kinds.items()},
            conditions,
            less_is_better=False,
        ),
    ]
    record.finish(args, claims)


if __name__ == "__main__":
    main()
