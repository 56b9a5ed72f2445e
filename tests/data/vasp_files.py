"""A vasprun.xml and an OUTCAR in VASP's own form, as far as ASE and pymatgen ask for it."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
from ase import Atoms

Step = tuple[Atoms, float, np.ndarray]  # atoms, energy (eV) without smearing, forces (eV/Å) [N, 3]
SMEARING = 0.02  # eV that the free energy lies under the one extrapolated to none

XML_HEAD = """<?xml version="1.0" encoding="ISO-8859-1"?>
<modeling>
 <generator>
  <i name="program" type="string">vasp </i>
  <i name="version" type="string">6.3.0  </i>
 </generator>
 <incar>
  <i type="int" name="IBRION">     2</i>
  <i type="int" name="NSW">    50</i>
 </incar>
 <kpoints>
  <generation param="Gamma">
   <v type="int" name="divisions">       1        1        1 </v>
   <v name="usershift">      0.00000000       0.00000000       0.00000000 </v>
  </generation>
  <varray name="kpointlist" >
   <v>       0.00000000       0.00000000       0.00000000 </v>
  </varray>
  <varray name="weights" >
   <v>       1.00000000 </v>
  </varray>
 </kpoints>
 <parameters>
  <i name="ENMAX">    400.00000000</i>
  <i type="int" name="NELM">    60</i>
  <i type="int" name="NSW">    50</i>
  <i type="int" name="IBRION">     2</i>
  <i type="int" name="ISPIN">     1</i>
 </parameters>
"""
XML_ATOMS = """ <atominfo>
  <atoms>   {n} </atoms>
  <types>   {kinds} </types>
  <array name="atoms" >
   <dimension dim="1">ion</dimension>
   <field type="string">element</field>
   <field type="int">atomtype</field>
   <set>
{atoms}   </set>
  </array>
  <array name="atomtypes" >
   <dimension dim="1">type</dimension>
   <field type="int">atomspertype</field>
   <field type="string">element</field>
   <field>mass</field>
   <field>valence</field>
   <field type="string">pseudopotential</field>
   <set>
{types}   </set>
  </array>
 </atominfo>
"""
OUTCAR_HEAD = """   number of bands    NBANDS=     40
   total plane-waves  NPLWV =   8000
   number of dos      NEDOS =    301   number of ions     NIONS = {n:6d}
   ISPIN  =      1    spin polarized calculation?
   NSW    =     50    number of steps for IOM
   IBRION =      2    ionic relax: 0-MD 1-quasi-New 2-CG
"""
OUTCAR_STEP = """
--------------------------------------- Iteration {k:6d}(   5)  -----------------

  VOLUME and BASIS-vectors are now :
  energy-cutoff  :      400.00
  volume of cell : {volume:12.2f}
      direct lattice vectors                 reciprocal lattice vectors
{cell}
 POSITION                                       TOTAL-FORCE (eV/Angst)
 {line}
{rows} {line}
    total drift:                                0.000000      0.000000      0.000000

  FREE ENERGIE OF THE ION-ELECTRON SYSTEM (eV)
  {line}
  free  energy   TOTEN  = {free:18.8f} eV

  energy  without entropy= {whole:18.8f}  energy(sigma->0) = {energy:18.8f}
"""


def species(atoms: Atoms) -> list[tuple[str, int]]:
    """Elements in runs, as VASP has them."""
    return [(symbol, len(list(some))) for symbol, some in itertools.groupby(atoms.get_chemical_symbols())]


def varray(rows: np.ndarray, name: str) -> str:
    lines = "".join("    <v> {:16.8f} {:16.8f} {:16.8f} </v>\n".format(*row) for row in rows)
    return f'   <varray name="{name}" >\n{lines}   </varray>\n'


def structure(atoms: Atoms, name: str = "", more: str = "") -> str:
    crystal = varray(atoms.cell[:], "basis") + f'   <i name="volume"> {atoms.get_volume():16.8f} </i>\n'
    crystal += varray(atoms.cell.reciprocal()[:], "rec_basis")
    positions = varray(atoms.get_scaled_positions(), "positions")
    head = f'  <structure name="{name}" >\n' if name else "  <structure>\n"
    return f"{head}   <crystal>\n{crystal}   </crystal>\n{positions}{more}  </structure>\n"


def write_vasprun(path: Path, steps: list[Step], fixed: list[int], whole: bool = True) -> Path:
    """whole: False ends it in the middle of a step after those given, as a queue does."""
    first, kinds = steps[0][0], species(steps[0][0])
    numbered = [(symbol, k) for k, (symbol, n) in enumerate(kinds, 1) for _ in range(n)]
    text = XML_HEAD + XML_ATOMS.format(
        n=len(first),
        kinds=len(kinds),
        atoms="".join(f"    <rc><c>{symbol:2s}</c><c>{k:4d}</c></rc>\n" for symbol, k in numbered),
        types="".join(
            f"    <rc><c>{n:4d}</c><c>{symbol:2s}</c><c> 100.0</c><c> 10.0</c><c>PAW_PBE {symbol}</c></rc>\n"
            for symbol, n in kinds
        ),
    )
    flags = ["F  F  F" if i in fixed else "T  T  T" for i in range(len(first))]
    free = "".join(f'    <v type="logical" > {flag} </v>\n' for flag in flags)
    free = f'   <varray type="logical" name="selective" >\n{free}   </varray>\n'
    text += structure(first, "initialpos", free)
    for atoms, energy, forces in steps:
        kind = {"e_fr_energy": energy - SMEARING, "e_wo_entrp": energy + SMEARING, "e_0_energy": energy}
        said = "".join(f'   <i name="{name}"> {value:16.8f} </i>\n' for name, value in kind.items())
        said = f"  <energy>\n{said}  </energy>\n"
        text += f" <calculation>\n  <scstep>\n{said}  </scstep>\n{structure(atoms)}"
        text += varray(forces, "forces") + varray(np.zeros((3, 3)), "stress") + said + " </calculation>\n"
    text += structure(steps[-1][0], "finalpos") + "</modeling>\n" if whole else " <calculation>\n  <scstep>\n"
    path.write_text(text)
    return path


def write_outcar(path: Path, steps: list[Step]) -> Path:
    kinds = species(steps[0][0])
    text = " vasp.6.3.0 20Jan22 (build Feb 10 2022 15:15:41) complex\n\n"
    text += 2 * "".join(f" POTCAR:    PAW_PBE {symbol} 04Feb2005\n" for symbol, _ in kinds)  # twice, as VASP
    text += "".join(f"   VRHFIN ={symbol}: s1d9\n   TITEL  = PAW_PBE {symbol}\n" for symbol, _ in kinds)
    text += f"   ions per type =             {''.join(f'{n:4d}' for _, n in kinds)}\n"
    text += OUTCAR_HEAD.format(n=len(steps[0][0]))
    for k, (atoms, energy, forces) in enumerate(steps, 1):
        both = np.hstack([atoms.cell[:], atoms.cell.reciprocal()[:]])
        rows = zip(atoms.positions, forces)
        text += OUTCAR_STEP.format(
            k=k,
            volume=atoms.get_volume(),
            line="-" * 83,
            cell="".join("  " + "".join(f"{x:15.9f}" for x in row) + "\n" for row in both),
            rows="".join(
                " " + "".join(f"{x:13.5f}" for x in p) + "   " + "".join(f"{x:14.6f}" for x in f) + "\n"
                for p, f in rows
            ),
            free=energy - SMEARING,
            whole=energy + SMEARING,
            energy=energy,
        )
    path.write_text(text + "\n General timing and accounting informations for this job:\n")
    return path
