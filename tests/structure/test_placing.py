"""Where an atom may stand, against the verdict on the whole structure with the atom there."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from pymatgen.core import Lattice

from catmllm.structure.adsorbed import adsorbate_fault
from catmllm.structure.cif import by_layer, read_cif, write_cif
from catmllm.structure.formula import parse_formula
from catmllm.structure.placing import Growing
from catmllm.structure.system import SURFACE, System, lattice_parameters
from catmllm.structure.templates import Shape, Template, Templates

VALUES = np.arange(1000) / 1000


def growing(
    system: System,
    rows: int,
    template: Template | None = None,
    shape: Shape | None = None,
    by_layer: bool = False,
) -> tuple[Growing, str]:
    """A structure whose CIF is written as far as so many rows, and the row that comes next."""
    head, _, sites = write_cif(system).partition("_atom_site_occupancy\n")
    lines = sites.splitlines(keepends=True)
    found = Growing(
        system.slab_counts,
        parse_formula(system.adsorbate),
        template=template,
        shape=shape,
        by_layer=by_layer,
    )
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


def test_a_number_of_the_cell_has_bounds_while_it_is_written(train_systems: list[System]) -> None:
    system = train_systems[0]
    slab, molecule = system.slab_counts, parse_formula(system.adsorbate)
    text = write_cif(system)
    template = Templates.fit(train_systems).slab(slab, system.miller, 3)
    assert template is not None
    free, bound = Growing(slab, molecule), Growing(slab, molecule, template=template)
    for found in (free, bound):
        found.read(text[: text.index("_cell_length_b ")])
        assert found.bounds() is None
    for written in ("_cell_length_b ", "5"):
        for found in (free, bound):
            found.read(written)
        digits = written.strip("_abcdefghlnt ")
        assert free.bounds() == (digits, 0.0, free.longest)
        assert bound.bounds() == (digits, *template.cell[1])
    for found in (free, bound):
        found.read(text[text.index("_cell_length_b ") + len("_cell_length_b 5") :].partition("gamma ")[0])
        found.read("gamma ")
    assert free.bounds() is None
    assert bound.bounds() == ("", *template.cell[5])
    # the volume is that of the cell as it is written
    rest, volume, _ = text.partition("_cell_volume ")
    for found in (free, bound):
        found.read(rest.partition("gamma ")[2] + volume + "4")
        cell = Lattice.from_parameters(*found.cell)
        assert found.bounds() == ("4", *[pytest.approx(cell.volume, rel=1e-12)] * 2)


@pytest.mark.parametrize("layers", [False, True])
def test_what_most_of_the_data_holds_is_free_by_templates(train_systems: list[System], layers: bool) -> None:
    """Every coordinate of starts as it is written, rows as the data has them or by layers: in the lower
    layers and inside the molecule all, in the top layer, which relaxes, nearly all."""
    starts = [s.frame(0.0) for s in train_systems]
    templates = Templates.fit(starts)
    top: list[bool] = []
    for system in starts[::111]:
        template, shape = (
            templates.slab(system.slab_counts, system.miller, 3),
            templates.shape(system.adsorbate),
        )
        if layers:
            system = by_layer(system)
        for k in range(len(system)):
            for coordinate in range(3):
                found, row = growing(system, k, template, shape, layers)
                begin(found, row, coordinate)
                free = found.free(VALUES)
                kept = free is None or bool(free[round(float(row.split()[3 + coordinate]) * 1000)])
                if system.tags[k] == SURFACE:
                    top.append(kept)
                else:
                    assert kept, (system.sid, k, coordinate)
    assert len(top) > 200 and np.mean(top) > 0.9
