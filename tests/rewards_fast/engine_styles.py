"""CIF texts as programs and databases write them (each by hand in the manner of one of them), and what
editors, mail and encodings do to files. Held against pymatgen by test_engine_styles.py."""

import random
from collections.abc import Callable, Iterator

_CELL = """_cell_length_a                   {a}
_cell_length_b                   {b}
_cell_length_c                   {c}
_cell_angle_alpha                {alpha}
_cell_angle_beta                 {beta}
_cell_angle_gamma                {gamma}
"""


def _cell(a: object, b: object, c: object, alpha: object = 90, beta: object = 90, gamma: object = 90) -> str:
    return _CELL.format(a=a, b=b, c=c, alpha=alpha, beta=beta, gamma=gamma)


def _sites(columns: str, indent: str = "") -> str:
    """The head of a loop over sites with these columns."""
    return "loop_\n" + "".join(f"{indent}_atom_site_{name}\n" for name in columns.split())


_XYZ = "_atom_site_fract_x\n_atom_site_fract_y\n_atom_site_fract_z\n"

STYLES = {
    "COD mineral": """#------------------------------------------------------------------------------
#$Date: 2016-02-16 14:50:33 +0200 (Tue, 16 Feb 2016) $
# This file is available in the Crystallography Open Database (COD),
# http://www.crystallography.net/
#------------------------------------------------------------------------------
data_9000046
loop_
_publ_author_name
'Sasaki, S.'
'Fujino, K.'
"O'Keeffe, M."
_publ_section_title
;
 X-Ray Determination of Electron-Density Distributions in Oxides, MgO, MnO,
 CoO, and NiO, and Atomic Scattering Factors of their Constituent Atoms
;
_journal_name_full               'Proceedings of the Japan Academy'
_journal_page_first              43
_journal_volume                  55
_journal_year                    1979
_chemical_formula_sum            'Mg O'
_chemical_name_mineral           Periclase
_space_group_IT_number           225
_symmetry_space_group_name_Hall  '-F 4 2 3'
_symmetry_space_group_name_H-M   'F m -3 m'
"""
    + _cell("4.211(1)", "4.211(1)", "4.211(1)")
    + """_cell_volume                     74.671
_exptl_crystal_density_diffrn    3.586
_cod_database_code               9000046
loop_
_space_group_symop_operation_xyz
x,y,z
x,1/2+y,1/2+z
1/2+x,y,1/2+z
1/2+x,1/2+y,z
z,-x,y
-y,z,-x
-x,-y,-z
z,1/2-x,1/2+y
"""
    + _sites("label fract_x fract_y fract_z U_iso_or_equiv")
    + """Mg 0.00000 0.00000 0.00000 0.00395
O 0.50000 0.50000 0.50000 0.00431
loop_
_cod_related_entry_id
_cod_related_entry_database
_cod_related_entry_code
1 AMCSD 0000057
""",
    "COD mineral, mixed site": "data_9001683\n_chemical_name_mineral Olivine\n_symmetry_space_group_name_H-M "
        "'P b n m'\n"
    + _cell(4.7631, 10.2272, 5.9944)
    + """loop_
_space_group_symop_operation_xyz
x,y,z
1/2-x,1/2+y,z
1/2+x,1/2-y,1/2-z
-x,-y,1/2+z
1/2+x,1/2-y,z
1/2-x,1/2+y,1/2-z
x,y,1/2-z
-x,-y,-z
"""
    + _sites("label fract_x fract_y fract_z occupancy U_iso_or_equiv")
    + """MgM1 0.00000 0.00000 0.00000 0.88000 0.00519
FeM1 0.00000 0.00000 0.00000 0.12000 0.00519
MgM2 0.98975 0.27743 0.25000 0.90000 0.00507
FeM2 0.98975 0.27743 0.25000 0.10000 0.00507
Si 0.42693 0.09434 0.25000 ? 0.00405
O1 0.76580 0.09186 0.25000 ? 0.00557
O2 0.22012 0.44779 0.25000 ? 0.00595
O3 0.27810 0.16346 0.03431 ? 0.00621
""",
    "ICSD": """#(C) 2019 by FIZ Karlsruhe - Leibniz Institute for Information Infrastructure.  \
All rights reserved.
data_9008-ICSD
_database_code_ICSD 9008
_chemical_name_common 'Titanium oxide'
_chemical_formula_structural 'Ti O2'
_chemical_formula_sum 'O2 Ti1'
_chemical_name_structure_type Rutile#TiO2
_citation_title ?
"""
    + _cell("4.594(1)", "4.594(1)", "2.9586(9)", "90.", "90.", "90.")
    + """_cell_volume 62.44
_cell_formula_units_Z 2
_space_group_name_H-M_alt 'P 42/m n m'
_space_group_IT_number 136
loop_
_space_group_symop_id
_space_group_symop_operation_xyz
1 'y+1/2, -x+1/2, -z+1/2'
2 '-y+1/2, x+1/2, -z+1/2'
3 'y, x, -z'
4 '-y, -x, -z'
5 'y+1/2, -x+1/2, z+1/2'
6 '-y+1/2, x+1/2, z+1/2'
7 'y, x, z'
8 '-y, -x, z'
9 'x+1/2, -y+1/2, -z+1/2'
10 '-x+1/2, y+1/2, -z+1/2'
11 'x, y, -z'
12 '-x, -y, -z'
13 'x+1/2, -y+1/2, z+1/2'
14 '-x+1/2, y+1/2, z+1/2'
15 '-x, -y, z'
16 'x, y, z'
loop_
_atom_type_symbol
_atom_type_oxidation_number
O2- -2
Ti4+ 4
"""
    + _sites(
        "label type_symbol symmetry_multiplicity Wyckoff_symbol fract_x fract_y fract_z "
        "B_iso_or_equiv occupancy"
    )
    + """Ti1 Ti4+ 2 a 0 0 0 0.5(1) 1.
O1 O2- 4 f 0.3053(4) 0.3053(4) 0 . 1.
#End of TTdata_9008-ICSD
""",
    "ICSD, hexagonal axes and thirds": "data_51688-ICSD\n"
    + _cell("4.758(1)", "4.758(1)", "12.991(3)", "90.", "90.", "120.")
    + """_symmetry_space_group_name_H-M 'R -3 c H'
_symmetry_Int_Tables_number 167
_refine_ls_R_factor_all .031
loop_
_symmetry_equiv_pos_site_id
_symmetry_equiv_pos_as_xyz
1 'x-y, -y, -z+1/2'
2 '-x, -x+y, -z+1/2'
3 'y, x, -z+1/2'
4 'x, y, z'
5 '-y, x-y, z'
6 '-x+y, -x, z'
7 'x+2/3, y+1/3, z+1/3'
8 'x+1/3, y+2/3, z+2/3'
9 '-x, -y, -z'
loop_
_atom_type_symbol
_atom_type_oxidation_number
O2- -2
Al3+ 3
"""
    + _sites(
        "label type_symbol symmetry_multiplicity Wyckoff_symbol fract_x fract_y fract_z occupancy "
        "attached_hydrogens"
    )
    + """Al1 Al3+ 12 c 0 0 0.35228(8) 1. 0
O1 O2- 18 e 0.3064(4) 0 0.25 1. 0
""",
    "Materials Project": """# generated using pymatgen
data_Fe2O3
_symmetry_space_group_name_H-M   'P 1'
"""
    + _cell("5.43047200", "5.43047181", "5.43047214", "55.36307017", "55.36306899", "55.36307240")
    + """_symmetry_Int_Tables_number   1
_chemical_formula_structural   Fe2O3
_chemical_formula_sum   'Fe4 O6'
_cell_volume   101.02466023
_cell_formula_units_Z   2
loop_
 _symmetry_equiv_pos_site_id
 _symmetry_equiv_pos_as_xyz
  1  'x, y, z'
loop_
 _atom_type_symbol
 _atom_type_oxidation_number
  Fe3+  3.0
  O2-  -2.0
"""
    + _sites("type_symbol label symmetry_multiplicity fract_x fract_y fract_z occupancy", indent=" ")
    + """  Fe3+  Fe0  1  0.14500000  0.14500000  0.14500000  1.0
  Fe3+  Fe1  1  0.35500000  0.35500000  0.35500000  1.0
  Fe3+  Fe2  1  0.64500000  0.64500000  0.64500000  1.0
  Fe3+  Fe3  1  0.85500000  0.85500000  0.85500000  1.0
  O2-  O4  1  0.05600000  0.44400000  0.75000000  1.0
  O2-  O5  1  0.25000000  0.94400000  0.55600000  1.0
  O2-  O6  1  0.44400000  0.75000000  0.05600000  1.0
  O2-  O7  1  0.55600000  0.25000000  0.94400000  1.0
  O2-  O8  1  0.75000000  0.05600000  0.44400000  1.0
  O2-  O9  1  0.94400000  0.55600000  0.25000000  1.0
""",
    "pymatgen, magnetic moments": "# generated using pymatgen\ndata_MnO\n_symmetry_space_group_name_H-M   'P "
        "1'\n"
    + _cell("3.1", "3.1", "5.2", 90, 90, 120)
    + "loop_\n _symmetry_equiv_pos_site_id\n _symmetry_equiv_pos_as_xyz\n  1  'x, y, z'\nloop_\n "
        "_atom_site_type_symbol\n"
    " _atom_site_label\n _atom_site_symmetry_multiplicity\n _atom_site_fract_x\n _atom_site_fract_y\n "
    "_atom_site_fract_z\n"
    " _atom_site_occupancy\n  Mn  Mn0  1  0.0  0.0  0.0  1\n  O  O1  1  0.33333333  0.66666667  0.50000000 "
    " 1\n"
    "loop_\n _atom_site_moment_label\n _atom_site_moment_crystalaxis_x\n _atom_site_moment_crystalaxis_y\n"
    " _atom_site_moment_crystalaxis_z\n  Mn0  0.00000  0.00000  4.50000\n",
    "VESTA": """
#======================================================================
# CRYSTAL DATA
#----------------------------------------------------------------------
data_VESTA_phase_1

_chemical_name_common                  'Ba Ti O3'
"""
    + _cell("4.000000", "4.000000", "4.000000", "90.000000", "90.000000", "90.000000")
    + """_cell_volume                           64.000000
_space_group_name_H-M_alt              'P m -3 m'
_space_group_IT_number                 221

loop_
_space_group_symop_operation_xyz
   'x, y, z'
   '-x, -y, -z'
   '-x, -y, z'
   'x, y, -z'
   '-x, y, -z'
   'x, -y, z'

"""
    + _sites("label occupancy fract_x fract_y fract_z adp_type U_iso_or_equiv type_symbol", indent="   ")
    + """   Ba1        1.0     0.000000     0.000000     0.000000    Uiso  0.012665 Ba
   Ti1        1.0     0.500000     0.500000     0.500000    Uiso  0.012665 Ti
   O1         1.0     0.500000     0.500000     0.000000    Uiso  ? O
   O2         1.0     0.500000     0.000000     0.500000    Uiso  ? O
   O3         1.0     0.000000     0.500000     0.500000    Uiso  ? O
""",
    "CrystaLLM": """data_Na1Cl1
loop_
_atom_type_symbol
_atom_type_electronegativity
_atom_type_radius
_atom_type_ionic_radius
Na 0.9300 1.8000 1.1600
Cl 3.1600 1.0000 1.0967
_symmetry_space_group_name_H-M Fm-3m
_cell_length_a 5.6000
_cell_length_b 5.6000
_cell_length_c 5.6000
_cell_angle_alpha 90.0000
_cell_angle_beta 90.0000
_cell_angle_gamma 90.0000
_symmetry_Int_Tables_number 225
_chemical_formula_structural NaCl
_chemical_formula_sum 'Na4 Cl4'
_cell_volume 175.6160
_cell_formula_units_Z 4
loop_
_symmetry_equiv_pos_site_id
_symmetry_equiv_pos_as_xyz
1 'x, y, z'
2 '-x, -y, -z'
3 'x, y+1/2, z+1/2'
4 'x+1/2, y, z+1/2'
5 'x+1/2, y+1/2, z'
"""
    + _sites("type_symbol label symmetry_multiplicity fract_x fract_y fract_z occupancy")
    + """Na Na0 4 0.0000 0.0000 0.0000 1
Cl Cl1 4 0.0000 0.0000 0.5000 1
""",
    "ASE": """data_image0
_chemical_formula_structural       Cu4
_chemical_formula_sum              "Cu4"
_cell_length_a       3.61
_cell_length_b       3.6100000000000003
_cell_length_c       3.61
_cell_angle_alpha    90.00000000000001
_cell_angle_beta     90.0
_cell_angle_gamma    89.99999999999999

_space_group_name_H-M_alt    "P 1"
_space_group_IT_number       1

loop_
  _space_group_symop_operation_xyz
  'x, y, z'

"""
    + _sites("type_symbol label symmetry_multiplicity fract_x fract_y fract_z occupancy", indent="  ")
    + """  Cu  Cu1       1.0  0.0  0.0  0.0  1.0000
  Cu  Cu2       1.0  -1.2335811384723961e-17  0.5000000000000001  0.5  1.0000
  Cu  Cu3       1.0  0.49999999999999994  0.0  5e-01  1.0000
  Cu  Cu4       1.0  0.5  0.5  0.0  1.0000
""",
    "GSAS-II": """data_NaCl
_gsas_i100_meas_flag 'yes'
_pd_block_id
 2015-09-11T10:51|PBSO4|Rietveld|Overall
_pd_phase_name  "Sodium Chloride"
"""
    + _cell("5.64056(5)", "5.64056", "5.64056", "90", "90", "90")
    + """_cell_volume 179.464(5)
_symmetry_cell_setting cubic
_symmetry_space_group_name_H-M "F m 3 m"
loop_ _symmetry_equiv_pos_site_id _symmetry_equiv_pos_as_xyz
     1 x,y,z
     2 z,x,y
     3 y,z,x
     4 x,y,-z
     5 x+1/2,y+1/2,z
     6 x+1/2,y,z+1/2
     7 x,y+1/2,z+1/2

# ATOMIC COORDINATES AND DISPLACEMENT PARAMETERS
"""
    + _sites(
        "label type_symbol fract_x fract_y fract_z occupancy adp_type U_iso_or_equiv "
        "symmetry_multiplicity", indent="   ",
    )
    + """Na1    Na+1 0.00000     0.00000     0.00000     1.000      Uiso 0.0173(3)  4
Cl1    Cl-1 0.50000     0.50000     0.50000     1.000      Uiso 0.0151(2)  4
""",
    "FullProf": """##############################################################################
###     FullProf-generated CIF output file (version: February 2008)        ###
##############################################################################
data_Lanthanum_manganite
_publ_contact_author_name    ' '
_audit_creation_method  'FullProf Suite'
_pd_calc_method   'Rietveld Refinement'
_symmetry_cell_setting            Orthorhombic
_symmetry_space_group_name_H-M   'P n m a'
_symmetry_space_group_name_Hall   '-P 2ac 2n'
loop_
   _symmetry_equiv_pos_as_xyz   #<--must include 'x,y,z'
'x,y,z'
'x+1/2,-y+1/2,-z+1/2'
'-x,y+1/2,-z'
'-x+1/2,-y,z+1/2'
'-x,-y,-z'
'-x+1/2,y+1/2,z+1/2'
'x,-y+1/2,z'
'x+1/2,y,-z+1/2'
"""
    + _cell("5.69980(14)", "7.71820(18)", "5.53910(13)", "90.00000", "90.00000", "90.00000")
    + """_cell_volume                      243.67(1)
"""
    + _sites("label fract_x fract_y fract_z U_iso_or_equiv occupancy")
    + """_atom_site_adp_type              # Not in version 2.0.1
_atom_site_type_symbol
La    0.05130(30) 0.25000     0.99500(50) 0.00500(40) 1.00000     Uiso      LA
Mn    0.00000     0.00000     0.50000     0.00220(60) 1.00000     Uiso      MN
O1    0.48490(50) 0.25000     0.07770(50) 0.00670(60) 1.00000     Uiso      O
O2    0.30850(30) 0.04080(30) 0.72260(30) 0.00810(40) 1.00000     Uiso      O
""",
    "SHELX and the CSD": """
data_shelx_a

_audit_creation_method            'SHELXL-2018/3'
_chemical_name_systematic         ?
_chemical_formula_moiety          'C2 H5 N O2'
_chemical_formula_weight          75.07

loop_
 _atom_type_symbol
 _atom_type_description
 _atom_type_scat_dispersion_real
 _atom_type_scat_dispersion_imag
 _atom_type_scat_source
 'C'  'C'   0.0033   0.0016
 'International Tables Vol C Tables 4.2.6.8 and 6.1.1.4'
 'H'  'H'   0.0000   0.0000
 'International Tables Vol C Tables 4.2.6.8 and 6.1.1.4'
 'N'  'N'   0.0061   0.0033
 'International Tables Vol C Tables 4.2.6.8 and 6.1.1.4'
 'O'  'O'   0.0106   0.0060
 'International Tables Vol C Tables 4.2.6.8 and 6.1.1.4'

_space_group_crystal_system       monoclinic
_space_group_IT_number            14
_space_group_name_H-M_alt         'P 21/n'
_space_group_name_Hall            '-P 2yn'

loop_
 _space_group_symop_operation_xyz
 'x, y, z'
 '-x+1/2, y+1/2, -z+1/2'
 '-x, -y, -z'
 'x-1/2, -y-1/2, z-1/2'

"""
    + _cell("5.1054(4)", "11.9688(8)", "5.4645(4)", "90", "111.697(3)", "90")
    + """_cell_volume                      310.25(4)
_shelx_res_file
;
TITL glycine in P2(1)/n
CELL 0.71073 5.1054 11.9688 5.4645 90 111.697 90
HKLF 4
END
;
"""
    + _sites(
        "label type_symbol fract_x fract_y fract_z U_iso_or_equiv adp_type occupancy "
        "site_symmetry_order calc_flag refinement_flags_posn disorder_assembly disorder_group", indent=" ",
    )
    + """O1 O 0.30505(9) 0.09413(4) -0.23542(8) 0.01621(12) Uani 1 1 d . . .
O2 O -0.15134(9) 0.14155(4) -0.39327(9) 0.01675(12) Uani 1 1 d . . .
N1 N 0.30086(10) 0.08949(4) 0.25868(9) 0.01318(12) Uani 1 1 d . . .
H1A H 0.280(2) 0.0151(11) 0.213(2) 0.033(3) Uiso 1 1 d . U .
H1B H 0.484(3) 0.1129(10) 0.260(2) 0.031(3) Uiso 1 1 d . U .
C1 C 0.07549(11) 0.12484(5) -0.21270(10) 0.01177(12) Uani 1 1 d . . .
C2 C 0.06499(11) 0.14484(5) 0.06118(11) 0.01290(12) Uani 1 1 d . . .
H2A H 0.085(2) 0.2260(10) 0.099(2) 0.5 Uiso 0.5 1 d . A 1
D2B D -0.115(2) 0.1146(10) 0.067(2) 0.5 Uiso 0.5 1 d . A -2

loop_
 _geom_bond_atom_site_label_1
 _geom_bond_atom_site_label_2
 _geom_bond_distance
O1 C1 1.2500(7)
""",
    "CSD without symbols": "data_ABABAB\n_symmetry_cell_setting triclinic\n_symmetry_space_group_name_H-M 'P "
        "-1'\n"
    "loop_\n_symmetry_equiv_pos_site_id\n_symmetry_equiv_pos_as_xyz\n1 x,y,z\n2 -x,-y,-z\n"
    + _cell("6.137(2)", "7.2430(10)", "8.1(3)", "101.27(4)", "95.6(1)", "89.99")
    + "loop_\n_atom_site_label\n_atom_site_type_symbol\n_atom_site_fract_x\n_atom_site_fract_y\n"
        "_atom_site_fract_z\n"
    "Cl1 Cl 0.1234(5) 0.2345(6) 0.3456(7)\nC1 C .4321(5) -.1111 1.0500\nC1A C 0.6 0.7 ? \n",
    "disorder groups": "data_dis\n_space_group_IT_number 2\n"
    + _cell(7, 8, 9, 80, 95, 100)
    + "loop_\n_atom_site_label\n_atom_site_type_symbol\n"
    + _XYZ
    + "_atom_site_occupancy\n_atom_site_disorder_group\n"
    "C1 C 0.1 0.2 0.3 0.67(2) 1\nC1' C 0.11 0.2 0.3 0.33(2) 2\nF1 F 0.1 0.2 0.30005 .33 2\n"
    "O1W O 0.5 0.5 0.5 0.5 -1\nO2W O 0 0 0 0.25 .\nN1\" N 0.7 0.1 0.9 1 .\n",
    "mCIF": """#\\#CIF_2.0
data_5yOhtAoR
_audit_creation_method            "Bilbao Crystallographic Server"
_space_group_magn.number_BNS  "62.448"
_space_group_magn.name_BNS  "Pn'ma'"
"""
    + _cell("5.582", "7.583", "7.787", "90.0", "90.0", "90.0")
    + """loop_
_space_group_symop_magn_operation.id
_space_group_symop_magn_operation.xyz
1 x,y,z,+1
2 x+1/2,-y+1/2,-z+1/2,-1
3 -x,y+1/2,-z,+1
4 -x,-y,-z,+1
loop_
_space_group_symop_magn_centering.id
_space_group_symop_magn_centering.xyz
1 x,y,z,+1
"""
    + _sites("label type_symbol fract_x fract_y fract_z occupancy")
    + """Gd1 Gd 0.05900 0.25000 0.98300 1
Mn1 Mn 0.00000 0.00000 0.50000 1
O1  O  0.47100 0.25000 0.10700 1
"""
    + _sites("moment.label moment.crystalaxis_x moment.crystalaxis_y moment.crystalaxis_z moment.symmform")
    + """Gd1 0.0 6.5(1) 0.0 0,my,0
Mn1 3.2 0.0 0.0 mx,my,mz
""",
    "JANA, modulated": "data_I\n_cell_modulation_dimension 1\nloop_\n_cell_wave_vector_seq_id\n"
        "_cell_wave_vector_x\n1 0.25\n"
    + _cell(4, 5, 6)
    + "loop_\n_atom_site_label\n" + _XYZ + "Na1 0.1 0.2 0.3\n",
    "numbers alone": "data_n\n_symmetry_Int_Tables_number 227\n"
    + _cell(5.43, 5.43, 5.43)
    + "loop_\n_atom_site_label\n" + _XYZ + "Si1 0.125 0.125 0.125\n",
    "name with a setting": "data_n\n_symmetry_space_group_name_H-M 'F d -3 m :1'\n"
        "_symmetry_Int_Tables_number 227\n"
    + _cell(5.43, 5.43, 5.43)
    + "loop_\n_atom_site_label\n" + _XYZ + "Si1 0 0 0\n",
    "name with a setting, glued": "data_n\n_symmetry_space_group_name_H-M Fd-3m:1\n"
    + _cell(5.43, 5.43, 5.43) + "loop_\n_atom_site_label\n" + _XYZ + "Si1 0 0 0\n",
    "hexagonal setting": "data_n\n_space_group_name_H-M_alt 'R -3 m :H'\n"
    + _cell(2.82, 2.82, 14.05, 90, 90, 120)
    + "loop_\n_atom_site_label\n"
        "_atom_site_type_symbol\n" + _XYZ + "Li1 Li 0 0 .5\nCo1 Co 0 0 0\nO1 O 0 0 0.2395\n",
    "rhombohedral setting": "data_n\n_space_group_name_H-M_alt R-3m:R\n_space_group_crystal_system trigonal\n"
    + _cell(4.96, 4.96, 4.96, 32.99, 32.99, 32.99)
    + "loop_\n_atom_site_label\n" + _XYZ + "Co1 0 0 0\nO1 0.2395 0.2395 0.2395\n",
    "underscores in the name": "data_n\n_symmetry_space_group_name_H-M P_6_3/m_m_c\n"
    + _cell(3.2, 3.2, 5.2, 90, 90, 120)
    + "loop_\n_atom_site_label\n" + _XYZ + "Mg 0.33333 0.66667 0.25\n",
    "lower-case name": "data_n\n_symmetry_space_group_name_h-m 'p m -3 m'\n" + _cell(4, 4, 4)
    + "loop_\n_atom_site_label\n" + _XYZ + "Po 0 0 0\n",
    "Hall name alone": "data_n\n_space_group_name_Hall '-P 4 2 3'\n" + _cell(4, 4, 4)
    + "loop_\n_atom_site_label\n" + _XYZ + "Po 0 0 0\n",
    "no symmetry at all": "data_n\n" + _cell(3, 4, 5, 80, 85, 95)
    + "loop_\n_atom_site_label\n" + _XYZ + "H1 0 0 0\nHe2 0.5 0.5 0.5\n",
    "unknown symmetry": "data_n\n_symmetry_space_group_name_H-M ?\n"
        "_symmetry_Int_Tables_number .\n" + _cell(3, 4, 5)
    + "loop_\n_atom_site_label\n" + _XYZ + "H1 0 0 0\nHe2 0.5 0.5 0.5\n",
    "operations of both dictionaries": "data_n\n" + _cell(4, 4, 4)
    + "loop_\n_space_group_symop_operation_xyz\nx,y,z\n-x,-y,-z\nloop_\n_symmetry_equiv_pos_as_xyz\nx,y,z\n"
        "'-x, y, z'\n"
    "loop_\n_atom_site_label\n" + _XYZ + "Fe 0.1 0.2 0.3\n",
    "decimal operations": "data_n\n" + _cell(4, 4, 4)
    + "loop_\n_symmetry_equiv_pos_as_xyz\nX,Y,Z\n'+X+0.5, -Y+.5, Z'\n'1/2 - x, y - 1/2, +z'\n"
    "loop_\n_atom_site_label\n" + _XYZ + "Fe 0.1 0.2 0.3\n",
    "CIF 2 and text in triple quotes": "#\\#CIF_2.0\ndata_n\n_note '''a'''\n" + _cell(4, 4, 4)
    + "loop_\n_atom_site_label\n" + _XYZ + "Fe 0.1 0.2 0.3\n",
    "dots in names": "data_n\n_cell.length_a 4\n_cell.length_b 4\n_cell.length_c 4\n_cell.angle_alpha 90\n",
    "macromolecule": "data_1ABC\n#\n_entry.id 1ABC\n#\n_cell.length_a 50.1\nloop_\n_atom_site.group_PDB\n"
        "_atom_site.id\n"
    "_atom_site.Cartn_x\nATOM 1 11.1\n",
    "two structures and an empty "
    "block": "data_global\n_publ_contact_author 'A. N. Other'\n\ndata_one\n" + _cell(3, 3, 3)
    + "loop_\n_atom_site_label\n" + _XYZ + "Po1 0 0 0\n\ndata_two\n" + _cell(4, 4, 4)
    + "loop_\n_atom_site_label\n" + _XYZ + "Ar1 0 0 0\n",
    "powder pattern behind the "
    "phase": "data_phase\n" + _cell(3, 3, 3) + "loop_\n_atom_site_label\n" + _XYZ + "Po1 0 0 0\n\n"
    "data_powder_pattern\nloop_\n_pd_meas_2theta\n_pd_meas_counts\n10.0 12 10.1 13\n10.2\n",
    "quoted labels": "data_n\n" + _cell(4, 4, 4) + "loop_\n_atom_site_label\n" + _XYZ
    + "'Fe 1' 0 0 0\n\"O'\" 0.5 0.5 0.5\n'O''' 0.5 0 0\n'C#' '0.25' \"0.25\" 0.25\n",
    "odd labels": "data_n\n" + _cell(6, 6, 6) + "loop_\n_atom_site_label\n" + _XYZ
    + "Fe(1) 0 0 0\nO* 0.5 0.5 0.5\n2C 0.5 0 0\nH_1 0.2 0.2 0.2\nCl-1 0.3 0 0.1\nc12 0.7 0.7 0.7\nCA 0.8 0.1 "
        "0.1\nHW1 .1 .1 .9\n",
    "deuterium": "data_n\n" + _cell(6, 6, 6) + "loop_\n_atom_site_label\n_atom_site_type_symbol\n" + _XYZ
    + "D1 D 0 0 0\nH1 H 0.5 0.5 0.5\nT1 T 0.5 0 0\n",
    "vacancies and unknown "
    "species": "data_n\n" + _cell(6, 6, 6) + "loop_\n_atom_site_label\n_atom_site_type_symbol\n" + _XYZ
    + "_atom_site_occupancy\nVac1 Vac 0 0 0 1\nM1 M 0.5 0.5 0.5 0.5\nX1 ? 0.5 0 0 1\nLa1 La3+ 0.1 0.1 0.2 "
        "0.95\n",
    "calculated positions left out": "data_n\n" + _cell(6, 6, 6) + "loop_\n_atom_site_label\n" + _XYZ
    + "_atom_site_calc_flag\nC1 0.1 0.2 0.3 d\nH1 ? ? ? dum\n",
    "Cartesian only": "data_n\n" + _cell(6, 6, 6)
    + "loop_\n_atom_site_label\n_atom_site_Cartn_x\n_atom_site_Cartn_y\n_atom_site_Cartn_z\nC1 1 2 3\n",
    "coordinates outside the cell": "data_n\n" + _cell(6, 6, 6) + "loop_\n_atom_site_label\n" + _XYZ
    + "C1 -0.25 1.25 0.5\nN1 12.5 -3.4 +0.75\nO1 -0 -0.0 1.\n",
    "Pauling file": "data_n\n" + _cell(4, 4, 4) + "loop_\n_atom_site_label\n_atom_site_type_symbol\n" + _XYZ
    + "_atom_site_occupancy\nM1 '0.8Nb + 0.2Zr' 0 0 0 1\nO1 O 0.5 0.5 0.5 1\n",
    "one long line": "data_n " + _cell(4, 4, 4).replace("\n", " ") + "loop_ _atom_site_label "
    + _XYZ.replace("\n", " ") + " ".join(f"C{i} 0.{i:02d} 0.5 0.25" for i in range(90)) + " # the end",
    "rows over several lines": "data_n\n" + _cell(4, 4, 4) + "loop_\n_atom_site_label\n" + _XYZ
    + "C1 0.1\n0.2\n   0.3 N1 0.5 0.5 0.5 O1\n0.7 0.7 0.7\n",
    "comments everywhere": "# a\ndata_n # b\n" + _cell(4, 4, 4).replace("\n", " # Angstrom\n")
    + "loop_ # c\n_atom_site_label # d\n" + _XYZ + "#C0 0 0 0\nC1 0.1 0.2 0.3 # e\nC#2 0.5 0.5 0.5 #f\n",
    "text fields of every "
    "kind": "data_n\n_a\n;\n;\n_b\n; one line\n;\n_c\n;two\nlines; 'here'\n; _d 1\n" + _cell(4, 4, 4)
    + "loop_\n_atom_site_label\n" + _XYZ + "C1 0.1 0.2\n;0.3\n;\n",
    "reserved words": "data_n\nsave_frame\nglobal_\nstop_\n" + _cell(4, 4, 4)
    + "loop_\n_atom_site_label\n" + _XYZ + "C1 0.1 0.2 0.3\nstop_ 0 0 0\n",
    "keys without values": "data_n\n_chemical_name_mineral\n" + _cell(4, 4, 4)
    + "loop_\n_atom_site_label\n" + _XYZ + "C1 0.1 0.2 0.3\n",
    "upper-case keys": "data_n\n_Cell_Length_A 4\n" + _cell(4, 4, 4)
    + "LOOP_\n_atom_site_label\n" + _XYZ + "C1 0 0 0\n",
    "refined cell in other "
    "units": "data_n\n" + _cell("4.0(5)e0", "4,0", "4.0") + "loop_\n_atom_site_label\n" + _XYZ + "C 0 0 0\n",
    "occupancies by uncertainty": "data_n\n" + _cell(4, 4, 4) + "loop_\n_atom_site_label\n" + _XYZ
    + "_atom_site_occupancy\nFe1 0 0 0 0.5(1)\nCo1 0 0 0 0.5000(1)\nO1 .5 .5 .5 1.00(2)\nN1 .5 0 0 .\nF1 0 "
        ".5 0 -0.1\n",
    "sites in two loops": "data_n\n" + _cell(4, 4, 4) + "loop_\n_atom_site_label\n" + _XYZ + "Fe1 0 0 0\n"
    "loop_\n_atom_site_label\n" + _XYZ + "Co1 0.5 0.5 0.5\nO1 0.5 0 0\n",
    "symmetric copies written out": "data_n\n_symmetry_space_group_name_H-M 'I m -3 "
        "m'\n" + _cell(2.87, 2.87, 2.87)
    + "loop_\n_atom_site_label\n" + _XYZ + "Fe1 0 0 0\nFe2 0.5 0.5 0.5\n",
    "aniso loop before the sites": "data_n\n" + _cell(4, 4, 4)
    + "loop_\n_atom_site_aniso_label\n_atom_site_aniso_U_11\nFe1 0.01(1)\nloop_\n"
        "_atom_site_label\n" + _XYZ + "Fe1 0 0 0\n",
    "OQMD": "data_OQMD\n_chemical_formula_sum 'Al1 Ni3'\n_symmetry_int_tables_number "
        "221\n" + _cell(3.56, 3.56, 3.56)
    + "loop_\n_symmetry_equiv_pos_as_xyz\n'+x,+y,+z'\n'-y,+x,+z'\n'+z,+x,+y'\nloop_\n_atom_site_label\n"
    "_atom_site_type_symbol\n" + _XYZ + "Al1 Al 0.0 0.0 0.0\nNi1 Ni 0.5 0.5 0.0\n",
    "AFLOW": "# AFLOW.org Repositories\ndata_AB_cF8_225_a_b\n_pd_phase_name AB_cF8_225_a_b\n"
    + _cell("5.63931", "5.63931", "5.63931", "90.00000", "90.00000", "90.00000")
    + "_symmetry_space_group_name_H-M \"F m -3 m\"\n_symmetry_Int_Tables_Number 225\nloop_\n"
        "_space_group_symop_id\n"
    "_space_group_symop_operation_xyz\n1 x,y,z\n2 x,-y,-z\n3 x+0,y+1/2,z+1/2\nloop_\n_atom_site_label\n"
    "_atom_site_occupancy\n"
    + _XYZ + "_atom_site_thermal_displace_type\nCl1 1.0 0.00000 0.00000 0.00000 Uiso\nNa1 1.0 0.50000 "
        "0.50000 0.50000 Uiso\n",
    "OVITO and atomsk": "# Crystallographic information file for Al\n# Generated by Atomsk\ndata_Al\n"
        "_pd_phase_name 'Al'\n"
    + _cell("4.04600000", "4.04600000", "4.04600000")
    + "_symmetry_space_group_name_H-M 'P 1'\n_symmetry_Int_Tables_number 1\nloop_\n"
        "_symmetry_equiv_pos_as_xyz\n   'x, y, z'\n"
    "loop_\n   _atom_site_label\n   _atom_site_occupancy\n   " + _XYZ.replace("\n", "\n   ")
    + "_atom_site_thermal_displace_type\n   _atom_site_B_iso_or_equiv\n   _atom_site_type_symbol\n"
    "   Al1   1.0   0.00000000  0.00000000  0.00000000   Biso   1.000000   Al\n"
    "   Al2   1.0   0.50000000  0.50000000  0.00000000   Biso   1.000000   Al\n",
    "zeolite database": "data_SOD\n_cell_length_a 8.9650(0)\n_cell_length_b 8.9650(0)\n_cell_length_c "
        "8.9650(0)\n"
    "_cell_angle_alpha 90.0000(0)\n_cell_angle_beta 90.0000(0)\n_cell_angle_gamma 90.0000(0)\n"
    "_symmetry_space_group_name_H-M 'I m -3 m'\n_symmetry_Int_Tables_number 229\n_symmetry_cell_setting "
    "cubic\n"
    "loop_\n_symmetry_equiv_pos_as_xyz\n'+x,+y,+z'\n'1/2+x,1/2+y,1/2+z'\n'-x,+y,+z'\n'+y,+z,+x'\nloop_\n"
    "_atom_site_label\n"
    "_atom_site_type_symbol\n" + _XYZ + "O1 O 0.3540 0.3540 0.0000\nT1 Si 0.2500 0.5000 0.0000\n",
}  # fmt: skip

# What happens to files on their way.
TREATMENTS: dict[str, Callable[[str], str]] = {
    "as it is": lambda s: s,
    "Windows": lambda s: s.replace("\n", "\r\n"),
    "old Macintosh": lambda s: s.replace("\n", "\r"),
    "byte order mark": lambda s: "\ufeff" + s,
    "byte order mark and a line": lambda s: "\ufeff\n" + s,
    "tabs": lambda s: s.replace(" ", "\t"),
    "trailing spaces": lambda s: s.replace("\n", "  \n"),
    "indented": lambda s: "  " + s.replace("\n", "\n  "),
    "empty lines": lambda s: s.replace("\n", "\n\n"),
    "no last line break": lambda s: s.rstrip("\n"),
    "mail quoting": lambda s: s.replace("\n", "\n> "),
    "no-break spaces": lambda s: s.replace("  ", " \u00a0"),
    "UTF-8 read as Latin-1": lambda s: "# \u00c3\u2026ngstr\u00c3\u00b6m\n" + s.replace("'", "\u00b4", 1),
    "typographic quotes and minus": lambda s: s.replace("'", "\u2019").replace("-", "\u2212"),
    "wide characters in names": lambda s: s.replace("_chemical", "_ch\u00e9mical").replace("Mg", "\uff2dg"),
    "emoji": lambda s: s.replace("data_", "data_\U0001f48e", 1),
    "replacement characters": lambda s: s.replace("(", "\ufffd(", 3),
    "form feeds": lambda s: s.replace("loop_", "\x0cloop_"),
    "vertical tabs between words": lambda s: s.replace(" ", "\x0b"),
    "next-line characters": lambda s: s.replace("\n", "\x85\n"),
    "line separators": lambda s: s.replace("\n", "\u2028"),
    "unit separators": lambda s: s.replace(" ", "\x1f"),
    "NUL at the end": lambda s: s + "\x00",
    "control-Z at the end": lambda s: s + "\x1a",
    "end of file mark": lambda s: s + "#END\n",
    "twice": lambda s: s + s,
    "cut in the middle": lambda s: s[: 2 * len(s) // 3],
    "comment on every line": lambda s: s.replace("\n", " # c\n"),
    "semicolons for commas": lambda s: s.replace(",", ";"),
    "decimal commas": lambda s: s.replace(".", ","),
    "upper case": str.upper,
    "lower case": str.lower,
    "double quotes": lambda s: s.replace("'", '"'),
    "without quotes": lambda s: s.replace("'", ""),
    "an appended remark": lambda s: s + "\nThis file was checked by hand.\n",
    "wrapped at 40": lambda s: "\n".join(
        line[i : i + 40] for line in s.split("\n") for i in range(0, max(1, len(line)), 40)
    ),
}  # fmt: skip


def treated(n: int, seed: int) -> Iterator[tuple[str, str]]:
    """n texts, each of a style and up to three treatments, with their description."""
    generator = random.Random(seed)
    for _ in range(n):
        style = generator.choice(list(STYLES))
        chosen = generator.sample(list(TREATMENTS), generator.randint(1, 3))
        text = STYLES[style]
        for name in chosen:
            text = TREATMENTS[name](text)
        yield f"{style}: {', '.join(chosen)}", text
