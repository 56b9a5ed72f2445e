"""The CIF text of a System, and a System from a CIF text.

The layout is that of the paper's Appendix C.3, which prints the first half; the rest is CrystaLLM's.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from catmllm.structure.elements import (
    ATOMIC_RADIUS,
    AVERAGE_IONIC_RADIUS,
    ELECTRONEGATIVITY,
    NUMBER,
    SYMBOLS,
    order_elements,
)
from catmllm.structure.formula import (
    Identity,
    Miller,
    count_elements,
    format_formula,
    parse_formula,
    parse_identity,
    reduce_counts,
)
from catmllm.structure.system import ADSORBATE, BULK, System, lattice_parameters, make_system
from catmllm.structure.tags import layers, surface_tags
from rewards_fast import Crystal, extract_cif, parse_cif

_DATA_LINE = re.compile(r"^\s*data_(.+)$", re.MULTILINE)

_ROW = re.compile(r"^([A-Z][a-z]? [A-Z][a-z]?)\d+ 1((?: 0\.\d+){3}) 1", re.MULTILINE)

_TEMPLATE = """\
data_{identity}
loop_
_atom_type_symbol
_atom_type_electronegativity
_atom_type_radius
_atom_type_ionic_radius
{elements}
_symmetry_space_group_name_H-M P1
_cell_length_a {a}
_cell_length_b {b}
_cell_length_c {c}
_cell_angle_alpha {alpha}
_cell_angle_beta {beta}
_cell_angle_gamma {gamma}
_symmetry_Int_Tables_number 1
_chemical_formula_structural {structural}
_chemical_formula_sum '{total}'
_cell_volume {volume}
_cell_formula_units_Z {units}
loop_
_symmetry_equiv_pos_site_id
_symmetry_equiv_pos_as_xyz
1 'x, y, z'
loop_
_atom_site_type_symbol
_atom_site_label
_atom_site_symmetry_multiplicity
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
_atom_site_occupancy
{sites}
"""


def write_cif(system: System, decimals: int = 3) -> str:
    """The CIF of a System, sites in its order; every number has `decimals` digits after the point.

    The structural formula is reduced and Z is the number of its units in the cell, as pymatgen writes them (1
    for nearly every adsorption system). A value that the element table lacks is `?`.
    """
    if decimals < 1:
        raise ValueError(f"decimals is at least 1, not {decimals}")

    def number(value: float) -> str:
        return _number(value, decimals)

    counts = system.target
    reduced, units = reduce_counts(counts)
    element_lines = [element_line(symbol, decimals) for symbol in counts]
    site_lines = [
        f"{symbol} {symbol}{i} 1 {x} {y} {z} 1"
        for i, (symbol, (x, y, z)) in enumerate(zip(system.symbols, _fractions(system.frac, decimals)))
    ]
    cell = dict(
        zip(("a", "b", "c", "alpha", "beta", "gamma"), map(number, lattice_parameters(system.lattice)))
    )
    return _TEMPLATE.format(
        identity=system.identity,
        elements="\n".join(element_lines),
        **cell,
        structural=format_formula(reduced),
        total=" ".join(f"{symbol}{count}" for symbol, count in counts.items()),
        volume=number(system.volume),
        units=units,
        sites="\n".join(site_lines),
    )


def by_layer(system: System) -> System:
    """The system with the rows of its slab layer by layer, in a layer the atoms of one element after those of
    another, in canonical order of the elements. Among those of one, and in the adsorbate, which comes last,
    the order stays, as does that of the layers by their first atoms."""
    slab = np.flatnonzero(system.tags != ADSORBATE)
    elements = list(system.slab_counts)
    of = np.array([elements.index(SYMBOLS[z]) for z in system.numbers[slab]])
    rows = slab[np.lexsort((of, layers(system.lattice, system.frac[slab])))]
    rows = np.concatenate([rows, np.flatnonzero(system.tags == ADSORBATE)])
    return replace(
        system,
        frac=system.frac[rows],
        numbers=system.numbers[rows],
        tags=system.tags[rows],
        start=None if system.start is None else system.start[rows],
    )


def cif_pattern(
    identity: str, target: Mapping[str, int], decimals: int = 3
) -> tuple[tuple[str, ...], list[tuple]]:
    """What `write_cif` can write for a system of these counts: its elements in order, and the file's parts.

    A part is ("text", what always stands there), ("number", most digits before the point), ("fraction",) for
    a coordinate in [0, 1), or ("site", index) for a row's symbol, label and multiplicity. The last line has
    no end.
    """
    symbols = tuple(order_elements(target))
    reduced, units = reduce_counts({s: target[s] for s in symbols})
    sites: list[tuple] = []
    for i in range(sum(target.values())):
        row = [("fraction",), ("text", " "), ("fraction",), ("text", " "), ("fraction",), ("text", " 1\n")]
        sites += [("site", i), *row]
    sites[-1] = ("text", " 1")
    names = ("a", "b", "c", "alpha", "beta", "gamma", "volume")
    text = _TEMPLATE.format(
        identity=identity,
        elements="\n".join(element_line(symbol, decimals) for symbol in symbols),
        structural=format_formula(reduced),
        total=" ".join(f"{symbol}{target[symbol]}" for symbol in symbols),
        units=units,
        sites="",
        **dict.fromkeys(names, "\0"),
    ).removesuffix("\n")
    parts: list[tuple] = []
    for name, piece in zip((*names, None), text.split("\0")):
        parts.append(("text", piece))
        if name is not None:
            # a slab's edge has at most two digits of Å: a third came from a digit too many
            parts.append(("number", 5 if name == "volume" else 2 if len(name) == 1 else 3))
    return symbols, parts + sites


def telling_spans(text: str, layered: bool) -> list[tuple[int, int]]:
    """Where a CIF that `write_cif` wrote says what follows from the question and from rows before, first
    character and end of each; none of a text without such a CIF.

    It is the element of each row, `Pd Pd` of symbol and label, and the coordinates of the adsorbate's atoms,
    the last rows; `layered`, of a system `by_layer`, those of each layer's last element too, which stands
    where the others do not."""
    rows, head = list(_ROW.finditer(text)), header_identity(text)
    atoms = 0 if head is None else sum(parse_formula(head.adsorbate).values())
    slab, follows = rows[: len(rows) - atoms], rows[len(rows) - atoms :]
    if layered and slab:
        crystal = parse_cif(extract_cif(text))
        of = layers(crystal.lattice, crystal.frac[: len(slab)]).tolist()
        last = {layer: m[1] for layer, m in zip(of, slab)}
        follows += [m for layer, m in zip(of, slab) if m[1] == last[layer]]
    return [m.span(1) for m in rows] + [m.span(2) for m in follows]


def element_line(symbol: str, decimals: int = 3) -> str:
    """`Pd 2.200 1.400 0.846`: electronegativity, atomic radius and average ionic radius (Å) of an element."""
    z = NUMBER[symbol]
    row = (ELECTRONEGATIVITY[z], ATOMIC_RADIUS[z], AVERAGE_IONIC_RADIUS[z])
    return " ".join([symbol, *(_number(value, decimals) for value in row)])


def _number(value: float, decimals: int) -> str:
    return "?" if np.isnan(value) else f"{value:.{decimals}f}"


def _fractions(frac: NDArray[np.float64], decimals: int) -> list[list[str]]:
    """Fractional coordinates as text in [0, 1): wrapped after rounding,
    so neither 1.000 nor -0.000 can appear."""
    steps = 10**decimals
    digits = np.rint((frac - np.floor(frac)) * steps).astype(np.int64) % steps
    return [[f"0.{digit:0{decimals}d}" for digit in row] for row in digits.tolist()]


def read_cif(text: str, adsorbate: str | None = None, miller: Miller | None = None) -> System:
    """The System of a CIF text, atoms in file order; tags by `surface_tags`.

    adsorbate: a formula as in `CHCH2OH`; None takes adsorbate and Miller index from the text's own `data_`
    line. The text is the CIF alone (`rewards_fast.extract_cif` finds it in an answer). Raises CIFError (a
    ValueError) for what does not parse, ValueError where the adsorbate is unknown or its atoms are not there.
    """
    crystal = parse_cif(text)
    if adsorbate is None or miller is None:
        header = header_identity(text)
        if adsorbate is None:
            if header is None:
                raise ValueError("the CIF has no line like 'data_CO</s>Pd6Ir6 (1 1 1)'; give `adsorbate`")
            adsorbate = header.adsorbate
        if miller is None and header is not None:
            miller = header.miller
    return system_from_crystal(crystal, adsorbate, miller)


def header_identity(text: str) -> Identity | None:
    """The identity in the first `data_` line that has one."""
    for match in _DATA_LINE.finditer(text):
        try:
            return parse_identity(match[1])
        except ValueError:
            continue
    return None


def system_from_crystal(crystal: Crystal, adsorbate: str, miller: Miller | None = None) -> System:
    """A System of a parsed crystal and the formula of its adsorbate; tags by `surface_tags`.

    Raises ValueError for sites that are no whole atom of an element, for a left-handed, flat or non-finite
    cell, and where the atoms of the adsorbate are not there.
    """
    require_whole_atoms(crystal)
    untagged = np.full(len(crystal.numbers), BULK)
    bare = make_system(crystal.lattice, None, crystal.numbers, untagged, adsorbate, miller, frac=crystal.frac)
    tags = surface_tags(bare.lattice, bare.frac, bare.numbers, parse_formula(adsorbate))
    return replace(bare, tags=tags)


def require_whole_atoms(crystal: Crystal) -> None:
    """Raises ValueError for sites that are no element, or partly occupied."""
    if not crystal.numbers.all():
        raise ValueError(
            f"site {int(np.argmin(crystal.numbers))} is no element: the cell holds {crystal.composition}"
        )
    held, counts = crystal.composition, Counter(crystal.numbers.tolist())
    if any(abs(held.get(SYMBOLS[z], 0) - count) > 1e-3 for z, count in counts.items()):
        sites = count_elements(SYMBOLS[z] for z in crystal.numbers)
        raise ValueError(f"partly occupied sites: {sites} on sites that hold {held}")
