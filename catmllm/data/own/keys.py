"""What a column or key beside a structure means: the names that are taken, and how their values are read."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from catmllm.structure.formula import Miller

# Meaning -> the names that have it, in any case; of several the first that is there counts.
KEYS: dict[str, tuple[str, ...]] = {
    "adsorption energy": (
        "adsorption_energy", "ads_energy", "e_ads", "eads", "e_adsorption", "energy_adsorption", "y_relaxed",
        "reaction_energy",
    ),
    # REF_energy in capitals is MACE's name for the energy of the reference method, a total one.
    "total energy": ("total_energy", "energy_total", "e_total", "e_tot", "dft_energy", "raw_y", "REF_energy"),
    "energy": ("energy", "e", "y"),
    "reference energy": ("reference_energy", "ref_energy", "e_ref"),
    "slab energy": ("slab_energy", "e_slab", "energy_slab", "clean_slab_energy"),
    "gas energy": ("gas_energy", "e_gas", "energy_gas", "molecule_energy"),
    "reference state": ("reference_state",),
    "adsorbate": ("adsorbate", "ads_symbols", "ads", "adsorbate_formula", "adsorbate_name"),
    "adsorbate atoms": ("adsorbate_indices", "adsorbate_atoms", "ads_indices"),
    "Miller index": ("miller", "miller_index", "millers", "miller_idx", "hkl", "facet", "surface_index"),
    "id": ("sid", "system_id", "id", "name", "uid", "unique_id"),
    "clean slab": ("slab_file", "clean_slab"),
    "split": ("split",),
    "file": ("file", "filename", "path", "structure_file"),
    "cell": ("cell", "lattice"),
    "positions": ("pos", "positions", "coords", "coordinates"),
    "fractional positions": ("frac", "frac_coords", "scaled_positions"),
    "start positions": ("pos_start", "initial_positions"),
    "elements": ("symbols", "elements", "species", "numbers", "atomic_numbers"),
    "tags": ("tags",),
    "largest force": ("fmax", "max_force"),
    "text": ("text", "description", "three_part_text"),
    "structure": ("structure", "cif", "poscar", "contcar", "extxyz", "xyz", "atoms"),
    "usable": ("ok",),
}  # fmt: skip
_CASED = {"REF_energy"}  # told from ref_energy by its capitals alone
_MEANING = {name.lower(): meaning for meaning, names in KEYS.items() for name in names if name not in _CASED}


def meaning(key: str) -> str | None:
    """What a key means, or None where it is none of `KEYS`."""
    return "total energy" if key in _CASED else _MEANING.get(key.lower())


def find(beside: Mapping[str, Any], wanted: str) -> tuple[str, Any] | None:
    """Key and value that have a meaning, by the order of `KEYS`; empty values do not count."""
    by_name = {(k if k in _CASED else k.lower()): k for k in beside if isinstance(k, str)}
    for name in KEYS[wanted]:
        key = by_name.get(name)
        if key is not None and not _empty(beside[key]):
            return key, beside[key]
    return None


def value(beside: Mapping[str, Any], wanted: str) -> Any:
    """The value that has a meaning, or None."""
    found = find(beside, wanted)
    return None if found is None else found[1]


def _empty(value: Any) -> bool:
    if value is None or (isinstance(value, str) and not value.strip()):
        return True
    return isinstance(value, float) and bool(np.isnan(value))


def number(value: Any, key: str) -> float:
    """One number of a value as files have them. Raises ValueError that names the key."""
    try:
        found = np.asarray(value, dtype=np.float64).reshape(-1)
    except (TypeError, ValueError):
        found = np.empty(0)
    if len(found) != 1:
        raise ValueError(f"`{key}` is {str(value)[:40]!r}, not a number")
    return float(found[0])


def plain(value: Any) -> Any:
    """A cell of a table: JSON where it is written so, else the text itself."""
    if isinstance(value, str) and value[:1] in "[{" and value:
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def miller(value: Any) -> Miller | None:
    """(1, 1, 1) of [1, 1, 1], "1 1 1", "111", "fcc(111)", "1-11" and of four indices of a hexagonal lattice,
    "0001"; None for what names no plane. Raises ValueError for what is none."""
    if isinstance(value, str):
        text = re.sub(
            r"^(fcc|bcc|hcp|rutile|anatase)?[\s([]*|[\s)\]]*$", "", value.strip(), flags=re.IGNORECASE
        )
        if re.fullmatch(r"(-?\d)*", text):
            indices = [int(i) for i in re.findall(r"-?\d", text)]
        elif re.fullmatch(r"-?\d+([\s,;x]+-?\d+)+", text):
            indices = [int(i) for i in re.findall(r"-?\d+", text)]
        else:
            return None  # "stepped", "111-4x4": a name, not an index
    else:
        flat = np.asarray(value).reshape(-1)
        if flat.dtype.kind not in "iuf" or not np.equal(flat, np.round(flat)).all():
            raise ValueError(f"a Miller index is three whole numbers, not {value!r}")
        indices = [int(i) for i in flat]
        if len(indices) == 1:  # 111, 011 or 0001, read as a number
            return miller(f"{indices[0]:0{3 + (indices[0] < 0)}d}")
    if len(indices) == 4 and indices[0] + indices[1] + indices[2] == 0:
        del indices[2]
    if len(indices) != 3 or not any(indices):
        raise ValueError(f"a Miller index is three whole numbers, not all 0, and not {value!r}")
    return indices[0], indices[1], indices[2]
