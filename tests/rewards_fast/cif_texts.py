"""CIF texts of the tests' own making."""

from collections.abc import Sequence

SLAB = """data_CO</s>Pt3Cu (1 1 1)
loop_
_atom_type_symbol
_atom_type_electronegativity
Cu 1.900
Pt 2.280
_symmetry_space_group_name_H-M P1
_cell_length_a 5.500
_cell_length_b 5.500
_cell_length_c 15.000
_cell_angle_alpha 90.000
_cell_angle_beta 90.000
_cell_angle_gamma 60.000
_symmetry_Int_Tables_number 1
_chemical_formula_structural PtCuCO
_chemical_formula_sum 'Cu1 Pt3 C1 O1'
_cell_volume 392.954
_cell_formula_units_Z 1
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
Pt Pt0 1 0.000 0.000 0.300 1
Cu Cu1 1 0.500 0.000 0.300 1
Pt Pt2 1 0.000 0.500 0.300 1
Pt Pt3 1 0.500 0.500 0.300 1
C C4 1 0.000 0.000 0.423 1
O O5 1 0.000 0.000 0.500 1
"""
TARGET = "CO</s>Pt3Cu (1 1 1)"


def cell_cif(
    cell: Sequence[float],
    sites: Sequence[tuple[str, float, float, float]],
    symmetry: Sequence[str] = ("x, y, z",),
    occupancies: Sequence[float | str] | None = None,
) -> str:
    """A CIF of a cell (a, b, c, alpha, beta, gamma) with one row a site."""
    names = ("length_a", "length_b", "length_c", "angle_alpha", "angle_beta", "angle_gamma")
    lines = ["data_test"]
    lines += [f"_cell_{name} {value}" for name, value in zip(names, cell)]
    lines += ["loop_", "_symmetry_equiv_pos_as_xyz", *(f"'{s}'" for s in symmetry)]
    lines += ["loop_", "_atom_site_type_symbol", "_atom_site_label"]
    lines += ["_atom_site_fract_x", "_atom_site_fract_y", "_atom_site_fract_z", "_atom_site_occupancy"]
    for i, (symbol, x, y, z) in enumerate(sites):
        occupancy = 1 if occupancies is None else occupancies[i]
        lines.append(f"{symbol} {symbol}{i} {x} {y} {z} {occupancy}")
    return "\n".join(lines) + "\n"
