"""Adsorption systems and what is read off them: CIF, three-part text, neighbour graph.

`System` is the one structure type; everything else here is a function of it.
Atoms stand in the order of their source.
"""

from catmllm.structure.cif import read_cif, system_from_crystal, write_cif
from catmllm.structure.formula import Identity, parse_formula, parse_identity
from catmllm.structure.graph import Graph, neighbour_graph
from catmllm.structure.system import Miller, System, lattice_from_parameters, make_system
from catmllm.structure.text import configuration, three_part_text

__all__ = [
    "Graph",
    "Identity",
    "Miller",
    "System",
    "configuration",
    "lattice_from_parameters",
    "make_system",
    "neighbour_graph",
    "parse_formula",
    "parse_identity",
    "read_cif",
    "system_from_crystal",
    "three_part_text",
    "write_cif",
]
