"""Small inputs of users' own: slabs by ASE with adsorbates, in every format, each by the library that its
users write it with; and what is read of them."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import ase.db
import ase.io
import lmdb
import numpy as np
from ase import Atoms
from ase.build import add_adsorbate, fcc111, molecule
from ase.calculators.singlepoint import SinglePointCalculator

from catmllm.data.own.reading import Found, Wanted, read_systems
from catmllm.structure.system import System


def slab(metal: str = "Pt", adsorbate: str = "CO", n: int = 2, layers: int = 3, tags: str = "ASE") -> Atoms:
    """An fcc(111) slab with one molecule on it, slab first. tags: "ASE", "OC20" or "none"."""
    atoms = fcc111(metal, (n, n, layers), vacuum=8.0)
    clean = len(atoms)
    gas = Atoms(adsorbate) if len(adsorbate) == 1 else molecule(adsorbate)
    if adsorbate == "CO":
        gas.rotate(180, "x")
    add_adsorbate(atoms, gas, 1.5, "fcc")
    atoms.info = {}  # ASE keeps its sites there, which no file carries
    atoms.positions[clean:, 2] += atoms.positions[:clean, 2].max() + 1.3 - atoms.positions[clean:, 2].min()
    atoms.pbc = True
    if tags != "ASE":
        layer = atoms.get_tags()
        atoms.set_tags(np.where(np.arange(len(atoms)) >= clean, 2, layer == 1) if tags == "OC20" else 0)
    return atoms


def calculated(atoms: Atoms, energy: float, **info: Any) -> Atoms:
    """With a calculation's total energy, and other values beside."""
    atoms = atoms.copy()
    atoms.calc = SinglePointCalculator(atoms, energy=energy)
    atoms.info |= info
    return atoms


def rutile_with_oxygen() -> Atoms:
    """A RuO2-like slab with an O on it: the adsorbate's element is the slab's too."""
    atoms = fcc111("Ru", (2, 2, 3), a=3.82, vacuum=8.0)
    oxygen = Atoms("O4", atoms.positions[:4] + [0.0, 1.6, 1.2])
    atoms = atoms + oxygen + Atoms("O", [atoms.positions[-1] + [0, 0, 2.0]])
    atoms.set_tags(0)
    atoms.pbc = True
    return atoms


def row(atoms: Atoms, **beside: Any) -> dict[str, Any]:
    """A structure as a row of a table."""
    return {
        "symbols": atoms.get_chemical_symbols(),
        "cell": atoms.cell[:].tolist(),
        "pos": atoms.positions.tolist(),
        **beside,
    }


def write_lmdb(path: Path, records: list[dict[str, Any]]) -> Path:
    """Plain dicts with NumPy arrays, pickled by the newest protocol as people do today."""
    with (
        lmdb.open(str(path), subdir=False, map_size=1 << 24) as environment,
        environment.begin(write=True) as t,
    ):
        for i, record in enumerate(records):
            t.put(f"{i}".encode(), pickle.dumps(record, protocol=5))
    return path


def write_catalysis_hub(path: Path, reactions: list[tuple[dict, dict, float, str, dict[str, Atoms]]]) -> Path:
    """A local database as `cathub` writes it: ASE's tables and those of reactions. A reaction: reactants,
    products, energy (eV), facet, structures by name."""
    import sqlite3

    identifiers: list[dict[str, str]] = []
    with ase.db.connect(str(path)) as database:
        for *_, structures in reactions:
            identifiers.append({k: database.get(database.write(a)).unique_id for k, a in structures.items()})
    connection = sqlite3.connect(path)
    connection.execute(
        "CREATE TABLE reaction (id INTEGER PRIMARY KEY AUTOINCREMENT, chemical_composition text, "
        "surface_composition text, facet text, sites text, coverages text, reactants text, products text, "
        "reaction_energy real, activation_energy real, dft_code text, dft_functional text, username text, "
        "pub_id text)"
    )
    connection.execute(
        "CREATE TABLE reaction_system (name text, energy_correction real, ase_id text, id integer)"
    )
    for k, (reactants, products, energy, facet, _) in enumerate(reactions, start=1):
        connection.execute(
            "INSERT INTO reaction VALUES (?, '', '', ?, '', '', ?, ?, ?, NULL, 'QE', 'BEEF-vdW', 'me', 'P')",
            (k, facet, json.dumps(reactants), json.dumps(products), energy),
        )
        for name, unique in identifiers[k - 1].items():
            connection.execute("INSERT INTO reaction_system VALUES (?, 0, ?, ?)", (name, unique, k))
    connection.commit()
    connection.close()
    return path


def found(path: Path, **options: object) -> Found:
    return read_systems([path], Wanted(**options))  # type: ignore[arg-type]


def one(path: Path, **options: object) -> System:
    """The only system of a file."""
    (system,) = (result := found(path, **options)).systems
    assert result.read == 1
    return system


def refusal(path: Path, **options: object) -> str:
    """Reason and message of the only record of a file."""
    result = found(path, **options)
    assert not result.items and result.refused.total() == result.read == 1
    ((reason, (message,)),) = result.examples.items()
    return f"{reason}: {message}"
