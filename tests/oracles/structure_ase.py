"""Bonds, three-part text and neighbours of a structure through ASE: slow and obvious,
independent of catmllm.structure.

The text is built the way CatBERTa does it: ASE's NeighborList over natural cutoffs,
then its connectivity matrix.
"""

from __future__ import annotations

from math import gcd

import numpy as np
from ase import Atoms
from ase.neighborlist import NeighborList, natural_cutoffs, neighbor_list
from pymatgen.core import Element


def ase_configuration(atoms: Atoms, scale: float = 1.0) -> str:
    """The third part of the text of an ase.Atoms with tags."""
    # skin is added to the radius of either atom: 2 x 0.05 Å
    neighbours = NeighborList(
        natural_cutoffs(atoms, mult=scale), skin=0.05, self_interaction=False, bothways=True
    )
    neighbours.update(atoms)
    connected = neighbours.get_connectivity_matrix(sparse=False)
    symbols, tags = atoms.get_chemical_symbols(), atoms.get_tags()
    text = ""
    for i in range(len(atoms)):
        if tags[i] != 2:
            continue
        primary = [j for j in range(len(atoms)) if connected[i, j] and tags[j] != 2]
        if not primary:
            continue
        site = {1: "atop", 2: "bridge"}.get(len(primary), "hollow")
        text += "[" + symbols[i]
        for j in primary:
            text += " " + symbols[j]
        text += " " + site
        for j in primary:
            inner = [symbols[j]] + [symbols[k] for k in range(len(atoms)) if connected[j, k]]
            text += " [" + " ".join(inner) + "]"
        text += "]"
    return text or "[]"


def ase_three_part_text(
    atoms: Atoms, adsorbate: str, miller: tuple[int, int, int], scale: float = 1.0
) -> str:
    """All three parts, the composition reduced and ordered by pymatgen's electronegativity."""
    slab = atoms[atoms.get_tags() != 2].symbols.formula.count()
    divisor = gcd(*slab.values())
    ordered = sorted(slab, key=lambda symbol: (Element(symbol).X, Element(symbol).Z))
    formula = "".join(s + (str(slab[s] // divisor) if slab[s] != divisor else "") for s in ordered)
    h, k, l = miller
    return f"{adsorbate}</s>{formula} ({h} {k} {l})</s>{ase_configuration(atoms, scale)}"


def ase_neighbours(lattice: np.ndarray, positions: np.ndarray, cutoff: float) -> list[np.ndarray]:
    """For every atom i the vectors [M, 3] to all its neighbours within the
    cutoff with their index as a 4th column, nearest first."""
    atoms = Atoms(numbers=np.ones(len(positions), int), positions=positions, cell=lattice, pbc=True)
    i, j, vector, distance = neighbor_list("ijDd", atoms, cutoff)
    rows = []
    for atom in range(len(positions)):
        mine = np.flatnonzero(i == atom)
        mine = mine[np.argsort(distance[mine], kind="stable")]
        rows.append(np.c_[vector[mine], j[mine]])
    return rows
