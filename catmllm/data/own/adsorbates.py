"""Which atoms of a structure are the adsorbate: by indices, the clean slab, tags or a formula, and never by a
guess. What could be read in two ways is an `Unclear` that says what to give."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from catmllm.structure.elements import COVALENT_RADIUS, SYMBOLS
from catmllm.structure.formula import count_elements, parse_formula
from catmllm.structure.periodic import bond_matrix
from catmllm.structure.tags import LAYER_HEIGHT, heights

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

GIVE = (
    "say which atoms it is: --adsorbate-atoms last, last:N, tag:2 or 12,13 (from 0), the clean slabs by "
    "--slab, or a column `adsorbate_indices`"
)
# What is taken for an adsorbate over a slab that has none of it.
NONMETALS = frozenset((1, 6, 7, 8, 9, 15, 16, 17, 34, 35, 53))
_FIRST = {6: 0, 7: 1, 8: 2}
_MOVED = 1.2  # Å; a slab atom that a relaxation moved farther is not recognised in the clean slab
_BOND = 1.2  # sums of covalent radii within which two atoms of an adsorbate are one molecule


class Unclear(ValueError):
    """The atoms of the adsorbate are not certain; `reason` is the short name to count by."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Bare(NamedTuple):
    """A structure as far as the adsorbate is concerned: lattice [3, 3] Å with the vacuum along its third
    vector, positions [N, 3] Å, numbers [N], tags [N] or None, and whether these tags are OC20's for sure."""

    lattice: Floats
    positions: Floats
    numbers: NDArray[np.int64]
    tags: NDArray[np.int8] | None
    oc20: bool = False

    @property
    def height(self) -> Floats:
        frac: Floats = np.linalg.solve(self.lattice.T, self.positions.T).T.astype(np.float64)
        return heights(self.lattice, frac)

    def formula(self, mask: Mask) -> dict[str, int]:
        return count_elements(SYMBOLS[z] for z in self.numbers[mask])


def find_adsorbate(
    bare: Bare, name: str | None, rule: str | None, indices: Sequence[int] | None, slabs: Sequence[Bare]
) -> tuple[Mask, str]:
    """The atoms of the adsorbate [N] and by what they were told. Raises Unclear.

    Of what is given the first counts: indices of the file, a rule of the user, clean slabs, tags, a name, and
    last the nonmetals over a slab of metals. A name must agree with the atoms: its formula, or several times.
    """
    if indices is not None:
        mask, how = _by_indices(indices, len(bare.numbers)), "indices of the file"
    elif rule is not None:
        mask, how = _by_rule(bare, rule, name), f"--adsorbate-atoms {rule}"
    elif slabs:
        mask, how = _by_slab(bare, slabs), "the clean slab"
    else:
        found = None if bare.tags is None else _by_tags(bare)
        if found is not None:
            mask, how = found
        elif name:
            mask, how = _by_name(bare, name), "its formula"
        else:
            mask, how = _by_metals(bare), "nonmetals over a slab of metals"
    if not mask.any():
        raise Unclear("no adsorbate", f"no atom is adsorbate by {how}")
    if mask.all():
        raise Unclear("no slab", f"all atoms are adsorbate by {how}")
    if name and copies(bare.formula(mask), name) is None:
        raise Unclear(
            "adsorbate disagrees",
            f"it is called {name}, the atoms by {how} are {_write(bare.formula(mask))}",
        )
    return mask, how


def copies(counts: dict[str, int], name: str) -> int | None:
    """How many times a formula is in counts by element; None where it is not a whole number of times."""
    wanted = parse_formula(name)
    if not wanted or set(wanted) != set(counts):
        return None
    times = {counts[s] / n for s, n in wanted.items()}
    one = times.pop()
    return int(one) if not times and one == int(one) else None


def _by_indices(indices: Sequence[int], n: int) -> Mask:
    mask = np.zeros(n, dtype=np.bool_)
    wrong = [i for i in indices if not -n <= int(i) < n]
    if wrong:
        raise Unclear("adsorbate disagrees", f"atom {wrong[0]} of {n} (indices are from 0)")
    mask[np.asarray(indices, dtype=np.int64)] = True
    return mask


def _by_rule(bare: Bare, rule: str, name: str | None) -> Mask:
    n = len(bare.numbers)
    if match := re.fullmatch(r"last(?::(\d+))?", rule):
        if match[1] is None and not name:
            raise Unclear(
                "no adsorbate", "--adsorbate-atoms last needs the adsorbate's formula; or give last:N"
            )
        count = int(match[1]) if match[1] else sum(parse_formula(name or "").values())
        if not 0 < count < n:
            raise Unclear("adsorbate disagrees", f"the last {count} of {n} atoms")
        return np.arange(n) >= n - count
    if match := re.fullmatch(r"tag:(-?\d+)", rule):
        if bare.tags is None:
            raise Unclear("no adsorbate", f"--adsorbate-atoms {rule}, and the file has no tags")
        return bare.tags == int(match[1])
    if re.fullmatch(r"-?\d+(,-?\d+)*", rule):
        return _by_indices([int(i) for i in rule.split(",")], n)
    raise ValueError(f"--adsorbate-atoms {rule!r}: give last, last:N, tag:N, or indices from 0 as 12,13")


def _by_slab(bare: Bare, slabs: Sequence[Bare]) -> Mask:
    """Atoms that a clean slab of the same cell lacks."""
    here = bare.formula(np.ones(len(bare.numbers), dtype=np.bool_))
    best: tuple[float, Mask] | None = None
    for slab in slabs:
        counts = slab.formula(np.ones(len(slab.numbers), dtype=np.bool_))
        in_plane = np.abs(slab.lattice[:2] - bare.lattice[:2]).max()
        if in_plane > 0.02 * np.abs(bare.lattice[:2]).max() or any(
            here.get(symbol, 0) < count for symbol, count in counts.items()
        ):
            continue
        found = _unmatched(bare, slab)
        if found is not None and (best is None or found[0] < best[0]):
            best = found
    if best is None:
        raise Unclear("no clean slab", f"none of the {len(slabs)} clean slabs has this cell and these atoms")
    return best[1]


def _unmatched(bare: Bare, slab: Bare) -> tuple[float, Mask] | None:
    """Mean distance of the slab's atoms to theirs here, and the atoms that are left; None where one moved too
    far. Atoms of an element are matched one to one at the least sum of distances."""
    from scipy.optimize import linear_sum_assignment

    mask = np.ones(len(bare.numbers), dtype=np.bool_)
    total = 0.0
    inverse = np.linalg.inv(bare.lattice)
    for z in np.unique(slab.numbers):
        mine, theirs = np.flatnonzero(bare.numbers == z), np.flatnonzero(slab.numbers == z)
        way = (bare.positions[mine][None] - slab.positions[theirs][:, None]) @ inverse
        distance = np.linalg.norm((way - np.round(way)) @ bare.lattice, axis=2)
        rows, columns = linear_sum_assignment(distance)
        if distance[rows, columns].max() > _MOVED:
            return None
        total += float(distance[rows, columns].sum())
        mask[mine[columns]] = False
    return total / len(slab.numbers), mask


def _by_tags(bare: Bare) -> tuple[Mask, str] | None:
    """The adsorbate by OC20's tags (2 over 1 over 0) or by ASE's (layers counted from the top, the adsorbate
    0); None where the tags say nothing of it. Raises Unclear for tags that fit neither."""
    assert bare.tags is not None
    tags, height = bare.tags, bare.height
    values = sorted(set(tags.tolist()))
    if values == [0]:
        return None
    mean = {t: float(height[tags == t].mean()) for t in values}
    layers = [t for t in values if t >= 1]
    if set(values) <= {0, 1, 2} and 2 in values and len(values) > 1:
        rest = float(height[tags != 2].mean())
        # an atom that sank among those of the surface is still over the bulk, as the surface is
        sunk = {0, 1} <= set(values) and min(mean[1], mean[2]) > mean[0]
        if bare.oc20 or sunk or (mean[2] > rest and mean[2] > mean.get(1, -np.inf)):
            return tags == 2, "tags of OC20's kind (2)"
    falling = all(mean[a] > mean[b] for a, b in pairwise(layers))
    if 0 in values and layers[:1] == [1] and falling and mean[0] > mean[1]:
        return tags == 0, "tags of ASE's kind (0, over layers 1, 2, …)"
    if set(values) <= {0, 1} or (0 not in values and falling):
        return None  # a slab's own tags: no atom is said to be an adsorbate
    raise Unclear(
        "tags unclear",
        f"the tags {values} are neither OC20's (2 is the adsorbate, over 1 and 0) nor ASE's (layers from the "
        f"top, 0 the adsorbate); {GIVE}",
    )


def _by_name(bare: Bare, name: str) -> Mask:
    """All atoms of the formula's elements, where the slab has none of them; several molecules must all lie
    outside of the slab."""
    wanted = parse_formula(name)
    everything = bare.formula(np.ones(len(bare.numbers), dtype=np.bool_))
    if missing := [s for s, n in wanted.items() if everything.get(s, 0) < n]:
        raise Unclear(
            "adsorbate disagrees", f"{name} needs {missing[0]}, the cell holds {_write(everything)}"
        )
    mask = np.isin([SYMBOLS[z] for z in bare.numbers], list(wanted))
    times = copies(bare.formula(mask), name)
    if times is None or mask.all() or (times > 1 and not _outside(bare, mask)):
        shared = [s for s, n in wanted.items() if everything[s] > n]
        raise Unclear(
            "ambiguous adsorbate",
            f"{name}: the cell holds {_write(everything)}, so {', '.join(shared)} is in the slab too, or "
            f"there is more than one; {GIVE}",
        )
    return mask


def _by_metals(bare: Bare) -> Mask:
    mask = np.isin(bare.numbers, list(NONMETALS))
    if not mask.any() or mask.all() or not _outside(bare, mask):
        raise Unclear("no adsorbate", f"neither tags nor a name say which atoms it is; {GIVE}")
    return mask


def _outside(bare: Bare, mask: Mask) -> bool:
    """Whether all masked atoms lie over the top layer of the rest, or under its lowest atom."""
    height = bare.height
    slab = height[~mask]
    top = slab[slab >= slab.max() - LAYER_HEIGHT].mean()
    # a vacuum between slab and adsorbate may count as the largest gap, so that below is above
    return bool(((height[mask] > top - 0.8) | (height[mask] < slab.min() + 0.8)).all())


def adsorbate_name(bare: Bare, mask: Mask, given: str | None) -> str:
    """The name of the adsorbate as the texts have it: the given one, `(O)4` where it is there four times; of
    the atoms where none is given, each molecule as OC20 writes them (`CH2CO`: heavy atoms, C and N and O
    first, each with its hydrogens), several in brackets: `(CO)(OH)2`."""
    if given:
        times = copies(bare.formula(mask), given)
        return given.replace("*", "") if times in (None, 1) else f"({given.replace('*', '')}){times}"
    at = np.flatnonzero(mask)
    numbers = bare.numbers[at]
    near = bond_matrix(bare.lattice, bare.positions[at], COVALENT_RADIUS[numbers] * _BOND, 0.0)
    bonded = bond_matrix(bare.lattice, bare.positions[at], COVALENT_RADIUS[numbers], 0.1)
    piece = np.arange(len(at))
    for i in range(len(at)):
        for j in np.flatnonzero(near[i]):
            piece[piece == piece[j]] = piece[i]
    names: dict[str, int] = {}
    for label in dict.fromkeys(piece.tolist()):
        mine = np.flatnonzero(piece == label)
        # carbon, then nitrogen, then oxygen, so that a CO whose O comes first is no other adsorbate
        mine = mine[np.argsort([_FIRST.get(int(z), 3) for z in numbers[mine]], kind="stable")]
        if len(set(numbers[mine].tolist())) == 1:  # N2, not NN
            name = SYMBOLS[numbers[mine[0]]] + str(len(mine)) * (len(mine) > 1)
        else:
            name = molecule_name(numbers[mine], bonded[np.ix_(mine, mine)])
        names[name] = names.get(name, 0) + 1
    if sum(names.values()) == 1:
        return next(iter(names))
    return "".join(f"({name}){count if count > 1 else ''}" for name, count in names.items())


def molecule_name(numbers: NDArray[np.int64], bonded: Mask) -> str:
    """`CH2CO`: heavy atoms in order, each with the hydrogens bonded to it, then those that are left."""
    name, free = "", set(np.flatnonzero(numbers == 1).tolist())
    for i in np.flatnonzero(numbers != 1):
        mine = [h for h in sorted(free) if bonded[i, h]]
        free -= set(mine)
        name += SYMBOLS[numbers[i]] + ("H" + str(len(mine)) * (len(mine) > 1) if mine else "")
    return name + ("H" + str(len(free)) * (len(free) > 1) if free else "")


def _write(counts: dict[str, int]) -> str:
    return " ".join(f"{symbol}{count}" for symbol, count in counts.items()) or "nothing"
