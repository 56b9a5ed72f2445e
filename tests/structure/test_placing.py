"""Where an atom may stand, against the verdict on the whole structure with the atom there."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from catmllm.structure.adsorbed import adsorbate_fault
from catmllm.structure.cif import read_cif, write_cif
from catmllm.structure.formula import parse_formula
from catmllm.structure.placing import Growing
from catmllm.structure.system import System, lattice_parameters

VALUES = np.arange(1000) / 1000


def growing(system: System, rows: int) -> tuple[Growing, str]:
    """A structure whose CIF is written as far as so many rows, and the row that comes next."""
    head, _, sites = write_cif(system).partition("_atom_site_occupancy\n")
    lines = sites.splitlines(keepends=True)
    found = Growing(system.slab_counts, parse_formula(system.adsorbate))
    text = head + "_atom_site_occupancy\n" + "".join(lines[:rows])
    for i in range(0, len(text), 7):  # in whatever pieces
        found.read(text[i : i + 7])
    return found, lines[rows]


def begin(found: Growing, row: str, coordinates: int) -> None:
    """Write a row up to so many coordinates."""
    found.read(" ".join(row.split()[: 3 + coordinates]))


@pytest.mark.parametrize("part", range(3))
def test_a_last_height_is_free_where_the_whole_structure_is_sound(
    train_systems: list[System], part: int
) -> None:
    """Of relaxed structures, of such whose slab is rattled, and of such whose last atom stands elsewhere."""
    rng = np.random.default_rng(part)
    for system in train_systems[part::157]:
        frac = system.frac.copy()
        if part == 1:
            frac[:-1] += rng.normal(0, 0.01, frac[:-1].shape)
        if part == 2:
            frac[-1, :2] += rng.normal(0, 0.05, 2)
        system = read_cif(write_cif(replace(system, frac=frac)), system.adsorbate, system.miller)
        found, row = growing(system, len(system) - 1)
        begin(found, row, 2)
        free = found.free(VALUES)
        some = rng.choice(len(VALUES), 60, replace=False)

        def sound(k: int, system: System = system) -> bool:
            at = system.frac.copy()
            at[-1, 2] = VALUES[k]
            return adsorbate_fault(replace(system, frac=at)) is None

        there = [sound(k) for k in some]
        if free is None:  # none could stand here, or all
            assert len(set(there)) == 1
        else:
            assert free[some].tolist() == there


def test_what_the_data_holds_is_free(train_systems: list[System]) -> None:
    """Every coordinate of shipped systems, as it is written."""
    for system in train_systems[::211]:
        for k in range(len(system)):
            for coordinate in range(3):
                found, row = growing(system, k)
                begin(found, row, coordinate)
                free = found.free(VALUES)
                value = round(float(row.split()[3 + coordinate]) * 1000)
                assert free is None or free[value], (system.sid, k, coordinate)


def test_no_slab_is_longer_than_a_chain_of_its_atoms(train_systems: list[System]) -> None:
    """The bound on a cell's edges refuses nothing that the data has, and an edge of ten times the length."""
    for system in train_systems[::7]:
        longest = Growing(system.slab_counts, parse_formula(system.adsorbate)).longest
        edges = lattice_parameters(system.lattice)[:2]
        assert max(edges) < longest < 10 * min(edges)


def test_an_edge_is_told_while_it_is_written(train_systems: list[System]) -> None:
    head = write_cif(train_systems[0]).partition("_cell_length_b ")
    found = Growing(train_systems[0].slab_counts, parse_formula(train_systems[0].adsorbate))
    found.read(head[0])
    assert found.edge() is None
    found.read("_cell_length_b ")
    assert found.edge() == ""
    found.read("5")
    assert found.edge() == "5"
    found.read(".346\n_cell_length_c 1")
    assert found.edge() is None
