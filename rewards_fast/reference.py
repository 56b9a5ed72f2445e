"""The reward through pymatgen and plain Python: slow and obvious, the definition that every faster path is
tested with.

A text is parsed once, into a `Crystal` and the few numbers that the formulas need (`Measurement`); the
formulas (paper Eqs. 12-44) work on those. "Parses" means that `Structure.from_str(text, fmt="cif")` of
pymatgen accepts the text (its defaults throughout).
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rewards_fast.crystal import ATOMIC_NUMBER, ELEMENTS, CIFError, Crystal
from rewards_fast.pvcp import FIELD_NAMES, Thresholds, Weights, shortest_vector
from rewards_fast.targets import COUNT_TOLERANCE

# pymatgen is quadratic in the rows; a cell of 10,000 sites has about 600,000 characters
MAX_CHARS = 2_000_000
SITE_TOLERANCE = 1e-4  # fractional; pymatgen's `site_tolerance`
ERROR_TOLERANCE = 1e-9  # so that 3/30 lands on 0.10 whatever the order of the sum

_CELL_KEYS = (
    "_cell_length_a",
    "_cell_length_b",
    "_cell_length_c",
    "_cell_angle_alpha",
    "_cell_angle_beta",
    "_cell_angle_gamma",
)
_SYMMETRY_KEYS = (
    "_symmetry_equiv_pos_as_xyz",
    "_space_group_symop_operation_xyz",
    "_symmetry_space_group_name_H-M",
    "_space_group_name_H-M_alt",
    "_space_group_name_Hall",
    "_space_group_IT_number",
    "_symmetry_Int_Tables_number",
)
_SITE_KEYS = tuple(f"_atom_site_fract_{axis}" for axis in "xyz")


@dataclass(frozen=True)
class Measurement:
    """What the formulas read of one parsed text. Undefined numbers are nan;
    `min_distance` is inf for one site."""

    crystal: Crystal
    composition: Mapping[str, float]
    n_sites: int
    volume: float
    density: float
    min_distance: float
    raw_frac: NDArray[np.float64]  # [R, 3] the coordinates as written, one row a site row of the file
    fields: Mapping[str, bool]


def measure(text: str) -> Measurement:
    """Parses a text as it stands and measures the first structure.
    Raises CIFError for what pymatgen rejects."""
    if len(text) > MAX_CHARS:
        raise CIFError("limit", f"the text has {len(text)} characters, more than {MAX_CHARS}")
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        parser, structure, data, operations = _first_structure(text)
        order, raw = _file_order(parser, structure, data, operations)
        frac = np.asarray(structure.frac_coords, dtype=np.float64).reshape(-1, 3)[order]
        lattice = np.array(structure.lattice.matrix, dtype=np.float64)
        composition = _element_counts(structure.composition)
        numbers = np.array([_number(structure[i].species) for i in order], dtype=np.int64)
        return Measurement(
            crystal=Crystal(lattice, frac, numbers, composition),
            composition=composition,
            n_sites=len(structure),
            volume=float(structure.volume),
            density=_density(structure),
            min_distance=min_distance(lattice, frac),
            raw_frac=raw,
            fields=_fields(data),
        )


def _first_structure(text: str) -> tuple[Any, Any, dict[str, Any], list[Any]]:
    """What `CifParser.from_str(text).parse_structures(primitive=False)[0]` does,
    keeping the block it came from."""
    from pymatgen.io.cif import CifParser

    first: tuple[Any, Any, dict[str, Any], list[Any]] | None = None
    blame = ""
    try:
        parser: Any = CifParser.from_str(text)
        if not parser._cif.data:
            raise CIFError("no_block", "no `data_` block at the start of a line")
        for block in parser._cif.data.values():
            try:
                structure = parser._get_structure(block, primitive=False, symmetrized=False, check_occu=True)
            except (KeyError, ValueError) as error:  # pymatgen goes on to the next block
                blame = blame or _reason(error)
                continue
            if structure is not None and len(structure) and first is None:
                first = (parser, structure, block.data, list(parser.symmetry_operations))
    except CIFError:
        raise
    except Exception as error:
        raise CIFError(_reason(error), f"{type(error).__name__}: {error}"[:500]) from None
    if first is None:
        raise CIFError(blame or "no_sites", "no block holds a structure")
    return first


def _reason(error: Exception) -> str:
    """The code of a pymatgen exception, coarse: `loop`, `cell`, `occupancy`, `sites`,
    `number` or `unsupported`."""
    message = str(error)
    if isinstance(error, ZeroDivisionError) or "is not a multiple" in message or "zip()" in message:
        return "loop"
    if "_cell_" in message or "thickness" in message or "Singular" in message or "lattice" in message.lower():
        return "cell"
    if "ccupanc" in message:
        return "occupancy"
    if "_atom_site_" in message or isinstance(error, IndexError):
        return "sites"
    if "convert" in message or isinstance(error, OverflowError):
        return "number"
    return "unsupported"


def _file_order(
    parser: Any, structure: Any, data: dict[str, Any], operations: list[Any]
) -> tuple[list[int], NDArray[np.float64]]:
    """The sites' indices in the order of the file's rows, and the rows' coordinates as written [R, 3].

    pymatgen sorts by electronegativity; each row's images are found again by the operations. Rows that
    pymatgen drops (no symbol, occupancy <= 0) are no atoms and are left out of both.
    """
    from pymatgen.io.cif import str2float

    rows = []
    symbols = data.get("_atom_site_type_symbol", data["_atom_site_label"])
    for i, _ in enumerate(data["_atom_site_label"]):
        try:
            occupancy = str2float(data["_atom_site_occupancy"][i])
        except (KeyError, ValueError):
            occupancy = 1.0
        if parser._parse_symbol(symbols[i]) and occupancy > 0:
            rows.append([str2float(data[key][i]) for key in _SITE_KEYS])
    raw = np.array(rows, dtype=np.float64).reshape(-1, 3)

    frac = np.asarray(structure.frac_coords, dtype=np.float64)
    matrices = np.array([operation.affine_matrix for operation in operations], dtype=np.float64)
    order: list[int] = []
    free = np.ones(len(frac), dtype=bool)
    for row in raw:
        for image in matrices[:, :3, :3] @ row + matrices[:, :3, 3]:
            offset = frac - (image - np.floor(image))
            offset -= np.round(offset)
            hits = np.flatnonzero(free & np.all(np.abs(offset) < SITE_TOLERANCE, axis=1))
            order.extend(int(i) for i in hits)
            free[hits] = False
        if not free.any():
            break
    order.extend(int(i) for i in np.flatnonzero(free))
    return order, raw


def _element_counts(composition: Any) -> dict[str, float]:
    counts: dict[str, float] = {}
    for species, amount in composition.items():
        symbol = str(species.symbol)
        symbol = ELEMENTS[ATOMIC_NUMBER[symbol] - 1] if symbol in ATOMIC_NUMBER else symbol
        counts[symbol] = counts.get(symbol, 0.0) + float(amount)
    return counts


def _number(species: Any) -> int:
    """Atomic number of a site's most abundant species, the first of equals; 0 for what is no element."""
    most, symbol = -math.inf, ""
    for kind, amount in species.items():
        if amount > most:
            most, symbol = amount, str(kind.symbol)
    return ATOMIC_NUMBER.get(symbol, 0)


def _density(structure: Any) -> float:
    try:
        return float(structure.density)
    except Exception:  # a species without a mass, a cell without a volume
        return math.nan


def _fields(data: dict[str, Any]) -> dict[str, bool]:
    """Completeness of the key fields of the block (paper 6.2(3))."""
    labels = data["_atom_site_label"]
    values = (
        all(data.get(key) for key in _CELL_KEYS),
        any(data.get(key) for key in _SYMMETRY_KEYS),
        all(isinstance(data.get(key), list) for key in ("_atom_site_label", *_SITE_KEYS)),
        isinstance(labels, list) and len(set(labels)) < len(labels),
    )
    return dict(zip(FIELD_NAMES, values))


def _reduced(lattice: NDArray[np.float64]) -> NDArray[np.float64]:
    """A short basis of the same lattice: vectors are shortened by one another until none gets shorter."""
    basis = lattice.copy()
    for _ in range(1000):
        changed = False
        for i in range(3):
            j, k = (i + 1) % 3, (i + 2) % 3
            pair = np.stack([basis[j], basis[k]])
            nearest = np.linalg.lstsq(pair.T, basis[i], rcond=None)[0]
            best, best_norm = None, float(basis[i] @ basis[i])
            for step in itertools.product((-1, 0, 1), repeat=2):
                candidate = basis[i] - (np.round(nearest) + np.array(step)) @ pair
                if float(candidate @ candidate) < best_norm * (1 - 1e-12):
                    best, best_norm = candidate, float(candidate @ candidate)
            if best is not None:
                basis[i] = best
                changed = True
        if not changed:
            break
    return basis


def min_distance(lattice: NDArray[np.float64], frac: NDArray[np.float64]) -> float:
    """Least distance (Å) of different sites over all images; inf below two sites, nan for non-finite input.

    Every image that can be as near as the best pair so far is tried: a vector of length d spans at most d /
    spacing_k cells along axis k, `spacing` being the distance of lattice planes.
    """
    lattice = np.asarray(lattice, dtype=np.float64).reshape(3, 3)
    frac = np.asarray(frac, dtype=np.float64).reshape(-1, 3)
    if len(frac) < 2:
        return math.inf
    if not (np.isfinite(lattice).all() and np.isfinite(frac).all()):
        return math.nan
    scale = float(np.abs(lattice).max())
    if scale == 0.0:
        return math.nan
    basis = _reduced(lattice / scale)
    try:
        inverse = np.linalg.inv(basis)
    except np.linalg.LinAlgError:
        return math.nan
    with np.errstate(all="ignore"):
        spacing = 1.0 / np.linalg.norm(inverse, axis=0)
    if not (np.isfinite(spacing).all() and (spacing > 0).all()):
        return math.nan  # no volume in floating point
    change = np.round(lattice / scale @ inverse)  # whole numbers: the same lattice in another basis
    scaled = (frac - np.floor(frac)) @ change
    scaled -= np.floor(scaled)
    best = math.inf
    for i in range(len(scaled) - 1):  # row by row: memory stays linear
        offset = scaled[i + 1 :] - scaled[i]
        offset -= np.round(offset)
        vectors = offset @ basis
        best = min(best, float(np.sqrt((vectors * vectors).sum(axis=1).min())))
    reach = [min(math.floor(min(best / s, 1e6) + 0.5), 300) for s in spacing]
    if math.prod(2 * n + 1 for n in reach) > 200_000:  # a needle: in a reduced basis the next images suffice
        reach = [min(n, 2) for n in reach]
    images = np.array(list(itertools.product(*(range(-n, n + 1) for n in reach))), dtype=np.float64) @ basis
    for i in range(len(scaled) - 1):
        offset = scaled[i + 1 :] - scaled[i]
        offset -= np.round(offset)
        vectors = (offset @ basis)[:, None, :] + images[None, :, :]
        best = min(best, float(np.sqrt((vectors * vectors).sum(axis=2).min())))
    return best * scale


def composition_score(
    composition: Mapping[str, float], target: Mapping[str, float]
) -> tuple[float, int, int, float]:
    """R_comp (Eqs. 17-24) with the numbers of missing and extra
    elements and the mean relative count error."""
    present = {symbol for symbol, amount in composition.items() if not amount <= COUNT_TOLERANCE}
    missing = sum(symbol not in present for symbol in target)
    extra = sum(symbol not in target for symbol in present)
    if missing:
        return max(-15.0, -8.0 - 2.0 * missing), missing, extra, math.nan
    if extra:
        return max(-15.0, -5.0 - 2.0 * extra), missing, extra, math.nan
    differences = [(abs(composition[symbol] - wanted), wanted) for symbol, wanted in target.items()]
    if all(difference <= COUNT_TOLERANCE for difference, _ in differences):
        return 10.0, 0, 0, 0.0
    error = sum(d / wanted for d, wanted in differences if d > COUNT_TOLERANCE) / len(differences)
    for limit, score in ((0.05, 8.0), (0.10, 5.0), (0.20, 2.0), (0.30, -2.0), (0.50, -5.0)):
        if error < limit - ERROR_TOLERANCE:
            return score, 0, 0, error
    return -10.0, 0, 0, error


def _outside(value: float, low: float, high: float) -> bool:
    return not (low <= value <= high)  # nan is outside


def score_measurement(
    measured: Measurement, target: Mapping[str, float], weights: Weights, thresholds: Thresholds
) -> dict[str, float]:
    """All terms and sub-terms of one parsed text (Eqs. 12-44). nan takes the heavier penalty of its term."""
    t, n, volume = thresholds, measured.n_sites, measured.volume
    comp, missing, extra, error = (
        composition_score(measured.composition, target) if target else (0.0, 0, 0, math.nan)
    )
    raw = measured.raw_frac
    bad = int(np.count_nonzero(np.any(~((raw >= t.coord_min) & (raw <= t.coord_max)), axis=1)))
    volume_penalty = 3.0 if _outside(volume, t.volume_min, t.volume_max) else 0.0
    sites_penalty = 10.0 if n < 1 else 2.0 if n > t.max_sites else 0.0
    coord_penalty = min(3.0, 0.5 * bad)
    density_penalty = 2.0 if _outside(measured.density, t.density_min, t.density_max) else 0.0
    d_min = measured.min_distance
    if t.own_images and not math.isnan(d_min):
        own = shortest_vector(measured.crystal.lattice)
        d_min = own if math.isnan(own) else min(d_min, own)
    distance_penalty = 0.0 if d_min >= t.near else 3.0 if d_min >= t.close else 8.0
    per_atom = volume / n if n else math.nan
    vpa_penalty = (
        2.0 if per_atom > t.volume_per_atom_max else 0.0 if per_atom >= t.volume_per_atom_min else 4.0
    )
    valid = max(-10.0, 10.0 - volume_penalty - sites_penalty - coord_penalty - density_penalty)
    phys = max(-10.0, 10.0 - distance_penalty - vpa_penalty)
    total = weights.comp * comp + weights.parse * 10.0 + weights.valid * valid + weights.phys * phys
    return {
        "total": total,
        "comp": comp,
        "parse": 10.0,
        "valid": valid,
        "phys": phys,
        "missing": missing,
        "extra": extra,
        "count_error": error,
        "volume_penalty": volume_penalty,
        "sites_penalty": sites_penalty,
        "coord_penalty": coord_penalty,
        "density_penalty": density_penalty,
        "distance_penalty": distance_penalty,
        "volume_per_atom_penalty": vpa_penalty,
        "bad_coords": bad,
    }
