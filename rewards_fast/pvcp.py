"""The PVCP reward: weights, thresholds, result types, target parsing and the score formulas (paper Eqs. 12-44).

A text is parsed once, into a `Crystal` and the few numbers the formulas need (`Measurement`); everything below works
on those numbers, so the pymatgen reference and any faster parser are scored by the same rules.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

_PERIODIC_TABLE = (
    "H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br Kr Rb Sr Y Zr Nb "
    "Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe Cs Ba La Ce Pr Nd Pm Sm Eu Gd Tb Dy Ho Er Tm Yb Lu Hf Ta W Re Os Ir Pt Au "
    "Hg Tl Pb Bi Po At Rn Fr Ra Ac Th Pa U Np Pu Am Cm Bk Cf Es Fm Md No Lr Rf Db Sg Bh Hs Mt Ds Rg Cn Nh Fl Mc Lv Ts Og"
)
ELEMENTS = _PERIODIC_TABLE.split()
ATOMIC_NUMBER = {symbol: z for z, symbol in enumerate(ELEMENTS, start=1)} | {"D": 1, "T": 1}

COUNT_TOLERANCE = 1e-3  # two counts of an element within this are equal
ERROR_TOLERANCE = 1e-9  # so that 3/30 lands on 0.10 whatever the order of the sum
FLOORS = {"comp": -15.0, "parse": -20.0, "valid": -10.0, "phys": -10.0}


class CIFError(ValueError):
    """A text that is no crystal; `reason` is a short stable code, the message says more."""

    def __init__(self, reason: str, message: str = "") -> None:
        super().__init__(message or reason)
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.reason, str(self))


@dataclass(frozen=True, eq=False)
class Crystal:
    """A parsed cell, its sites in the order of the file (symmetry images follow their row).

    lattice: float64 [3, 3], rows a, b, c in Å (c along z, as pymatgen puts them). frac: float64 [N, 3] in [0, 1).
    numbers: int64 [N], the atomic number of the (most abundant) species of a site, 0 for what is no element.
    counts: atoms by symbol in the whole cell where occupancies or dummies make them differ from `numbers`.
    """

    lattice: NDArray[np.float64]
    frac: NDArray[np.float64]
    numbers: NDArray[np.int64]
    counts: Mapping[str, float] | None = None

    @property
    def composition(self) -> dict[str, float]:
        """Atoms of the whole cell by symbol: oxidation states stripped, D and T as H, occupancies counted."""
        if self.counts is not None:
            return dict(self.counts)
        values, amounts = np.unique(self.numbers, return_counts=True)
        return {ELEMENTS[z - 1] if z else "X": float(n) for z, n in zip(values, amounts)}

    @property
    def volume(self) -> float:
        """Cell volume in Å³."""
        return float(abs(np.linalg.det(self.lattice)))

    @property
    def positions(self) -> NDArray[np.float64]:
        """Cartesian coordinates [N, 3] in Å."""
        return self.frac @ self.lattice


@dataclass(frozen=True)
class Weights:
    """Weights of the four terms (Eq. 13)."""

    comp: float = 0.60
    parse: float = 0.20
    valid: float = 0.10
    phys: float = 0.10


@dataclass(frozen=True)
class Thresholds:
    """Where penalties begin. `near` 1.0 is Eq. 41 and hits correct O-H bonds (0.98 Å); training uses 0.7."""

    close: float = 0.5
    near: float = 1.0
    volume_min: float = 1.0
    volume_max: float = 100_000.0
    max_sites: int = 1000
    coord_min: float = -0.1
    coord_max: float = 1.1
    density_min: float = 0.1
    density_max: float = 30.0
    volume_per_atom_min: float = 3.0
    volume_per_atom_max: float = 150.0


# What the reason of a text that does not parse means; `docs/rewards_fast.md` has an example of each.
REASONS = {
    "no_block": "no `data_` block at the start of a line",
    "loop": "a loop whose values are no multiple of its columns",
    "cell": "cell parameters missing, unreadable or without thickness",
    "sites": "no atom site, or a site loop without the columns it needs",
    "number": "a coordinate that is no number",
    "occupancy": "occupancies of one site sum to more than 1; a repeated row does",
    "symmetry": "symmetry operations that cannot be read",
    "magnetic": "a magnetic structure beyond explicit operations",
    "unsupported": "refused by pymatgen's rules",
    "limit": "larger than the limits of the engine",
}
SCORE_NAMES = ("total", "comp", "parse", "valid", "phys", "n_sites", "volume", "density", "min_distance")
FIELD_NAMES = ("lattice", "space_group", "site_loop", "duplicate_labels")
TERM_NAMES = (
    "missing",
    "extra",
    "count_error",
    "volume_penalty",
    "sites_penalty",
    "coord_penalty",
    "density_penalty",
    "distance_penalty",
    "volume_per_atom_penalty",
    "bad_coords",
)


@dataclass(frozen=True)
class Measurement:
    """What the formulas read of one parsed text. Undefined numbers are nan; `min_distance` is inf for one site."""

    crystal: Crystal
    composition: Mapping[str, float]
    n_sites: int
    volume: float
    density: float
    min_distance: float
    raw_frac: NDArray[np.float64]  # [R, 3] the coordinates as written, one row a site row of the file
    fields: Mapping[str, bool]


def _crystal(parsed: tuple[Any, ...]) -> Crystal:
    lattice, frac, numbers, counts = parsed
    named = {k if isinstance(k, str) else ELEMENTS[k - 1]: n for k, n in counts.items()}
    return Crystal(lattice, frac, numbers, named)


class Crystals(Sequence["Crystal | None"]):
    """The crystals of a batch, None where a text does not parse. Texts are parsed again when one is asked for: that takes
    microseconds, while most callers want the scores alone."""

    def __init__(self, texts: list[str], extract: bool) -> None:
        self._texts, self._extract = texts, extract

    def __len__(self) -> int:
        return len(self._texts)

    @overload
    def __getitem__(self, index: int) -> Crystal | None: ...
    @overload
    def __getitem__(self, index: slice) -> list[Crystal | None]: ...
    def __getitem__(self, index: int | slice) -> Crystal | list[Crystal | None] | None:
        from rewards_fast import _core

        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        parsed = _core.parse(self._texts[index], self._extract)[1]
        return None if parsed is None else _crystal(parsed)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (list(self),)


_COLUMN = {name: i for i, name in enumerate((*SCORE_NAMES, *TERM_NAMES))}
_FIELD_BITS = np.array([[1 << i] for i in range(len(FIELD_NAMES))], dtype=np.uint8)


class Scores:
    """Rewards of a batch; every array is float64 [n]. Numbers of a text that does not parse are nan.

    reason: None or the code of what was wrong. terms: the sub-terms by name (`TERM_NAMES`). fields: completeness of
    the text's key fields by name (bool [n], all False where nothing parsed; `duplicate_labels` is a fault).
    rows: all numbers as they came, [n, 19], the columns `SCORE_NAMES` and then `TERM_NAMES`; the arrays are views of it, made
    when they are first asked for: all of them would take longer than scoring one text.
    """

    total: NDArray[np.float64]
    comp: NDArray[np.float64]
    parse: NDArray[np.float64]
    valid: NDArray[np.float64]
    phys: NDArray[np.float64]
    n_sites: NDArray[np.float64]
    volume: NDArray[np.float64]
    density: NDArray[np.float64]
    min_distance: NDArray[np.float64]

    def __init__(
        self,
        rows: NDArray[np.float64],
        field_bits: NDArray[np.uint8],
        reason: list[str | None],
        crystals: Sequence[Crystal | None],
    ) -> None:
        self.rows, self.reason, self.crystals, self._field_bits = rows, reason, crystals, field_bits

    def __getattr__(self, name: str) -> Any:
        if name not in SCORE_NAMES:
            raise AttributeError(f"Scores has no {name!r}")
        column = self.rows[:, _COLUMN[name]]
        setattr(self, name, column)
        return column

    @functools.cached_property
    def terms(self) -> dict[str, NDArray[np.float64]]:
        return {name: self.rows[:, _COLUMN[name]] for name in TERM_NAMES}

    @functools.cached_property
    def fields(self) -> dict[str, NDArray[np.bool_]]:
        return dict(zip(FIELD_NAMES, self._field_bits & _FIELD_BITS != 0))

    def __len__(self) -> int:
        return len(self.reason)

    def __repr__(self) -> str:
        return f"Scores(total={self.total!r}, reason={self.reason!r})"


_FORMULA_PIECE = re.compile(r"([A-Z][a-z]?)(\d+(?:\.\d+)?|\.\d+)?|([(\[])|([)\]])(\d+(?:\.\d+)?|\.\d+)?")
# A word is tried from its first letter only and an index has few digits: no prompt takes more than linear time.
_PROMPT = re.compile(
    r"(?<![^\s<>])([^\s<>]+)\s*</s>\s*([A-Za-z0-9.()\[\]]+?)"
    r"\s*\(\s*-?\d{1,3}\s*,?\s*-?\d{1,3}\s*,?\s*-?\d{1,3}\s*\)"
)
_PROMPT_BARE = re.compile(r"(?<![^\s<>])([^\s<>]+)\s*</s>\s*([A-Za-z0-9.()\[\]]+)")


def _parse_formula(formula: str) -> dict[str, float]:
    stack: list[dict[str, float]] = [{}]
    position = 0
    text = re.sub(r"[\s*]", "", formula)
    while position < len(text):
        piece = _FORMULA_PIECE.match(text, position)
        if piece is None:
            raise ValueError(
                f"cannot read the formula {formula!r} at {text[position:]!r}; write it like 'Pt9Cu3CO'"
            )
        position = piece.end()
        symbol, count, opening, closing, times = piece.groups()
        if symbol:
            _add(stack[-1], symbol, float(count or 1), formula)
        elif opening:
            stack.append({})
        elif closing:
            if len(stack) == 1:
                raise ValueError(f"unbalanced bracket in the formula {formula!r}")
            for inner, amount in stack.pop().items():
                _add(stack[-1], inner, amount * float(times or 1), formula)
    if len(stack) != 1:
        raise ValueError(f"unbalanced bracket in the formula {formula!r}")
    return stack[0]


def _add(counts: dict[str, float], symbol: str, amount: float, source: object) -> None:
    number = ATOMIC_NUMBER.get(symbol)
    if number is None:
        raise ValueError(f"{symbol!r} in the target {source!r} is no element")
    symbol = ELEMENTS[number - 1]
    counts[symbol] = counts.get(symbol, 0.0) + amount


def parse_target(target: str | Mapping[str, float | None] | None) -> dict[str, float]:
    """Counts by element of a target: a prompt (`CO</s>Pt9Cu3 (1 1 1)`: adsorbate + slab, other text around it is
    passed over), a formula, or counts (a count of None is none). Empty (None, '', {}) gives {}. D and T count as H.

    Raises ValueError for what is none of these.
    """
    if target is None:
        return {}
    if isinstance(target, Mapping):
        counts: dict[str, float] = {}
        for symbol, amount in target.items():
            if amount is None:  # Arrow and Parquet fill the elements that a row does not have
                amount = 0.0
            if not 0 <= amount < math.inf:
                raise ValueError(f"the target {target!r} has the count {amount!r} for {symbol}")
            _add(counts, str(symbol), float(amount), target)
    elif not isinstance(target, str):
        raise TypeError(f"a target is a prompt, a formula or a dict of counts, not {type(target).__name__}")
    elif "</s>" in target:
        prompt = _PROMPT.search(target) or _PROMPT_BARE.search(target)
        if prompt is None:
            raise ValueError(f"cannot read the prompt {target!r}; write it like 'CO</s>Pt9Cu3 (1 1 1)'")
        counts = _parse_formula(prompt.group(1).strip("\"'`*"))
        for symbol, amount in _parse_formula(prompt.group(2)).items():
            _add(counts, symbol, amount, target)
    else:
        counts = _parse_formula(target)
    if not all(map(math.isfinite, counts.values())):
        raise ValueError(f"the target {target!r} has a count that is no finite number")
    return {symbol: amount for symbol, amount in counts.items() if amount > COUNT_TOLERANCE}


def composition_score(
    composition: Mapping[str, float], target: Mapping[str, float]
) -> tuple[float, int, int, float]:
    """R_comp (Eqs. 17-24) with the numbers of missing and extra elements and the mean relative count error."""
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


def floor_scores(weights: Weights) -> dict[str, float]:
    """The terms of a text that does not parse."""
    w = weights
    total = -15.0 * w.comp - 20.0 * w.parse - 10.0 * w.valid - 10.0 * w.phys
    return {"total": total, **FLOORS, **dict.fromkeys(TERM_NAMES, math.nan)}


def parse_cif(text: str) -> Crystal:
    """The first structure of a CIF text, accepted and read as pymatgen does. Raises CIFError with `.reason`."""
    from rewards_fast import _core

    if not isinstance(text, str):
        raise TypeError(f"a text is a str, not {type(text).__name__}")
    reason, parsed = _core.parse(text, False)
    if parsed is None:
        raise CIFError(reason, REASONS.get(reason, ""))
    return _crystal(parsed)


def min_distance(lattice: ArrayLike, frac: ArrayLike) -> float:
    """Least distance (Å) between two different sites with all periodic images, a site's own images left out.

    lattice: [3, 3], rows in Å, any skew. frac: [N, 3]. Fewer than two sites give inf; non-finite input or a cell
    without volume gives nan.
    """
    from rewards_fast import _core

    rows = np.ascontiguousarray(lattice, dtype=np.float64).reshape(3, 3)
    return float(_core.min_distance(rows, np.ascontiguousarray(frac, dtype=np.float64).reshape(-1, 3)))


Target = str | Mapping[str, float | None] | None


def prompt_target(prompt: str) -> str | None:
    """The part of a prompt that names a composition (`CO</s>Pt9Cu3 (1 1 1)`), None where it names none."""
    for pattern in (_PROMPT, _PROMPT_BARE):
        for found in pattern.finditer(prompt):
            try:
                parse_target(found.group())
            except ValueError:
                continue
            return found.group()
    return None


class PVCP:
    """The reward of texts against target compositions; immutable after it is made.

    weights: `Weights`, a mapping of its names or four numbers (comp, parse, valid, phys). thresholds: `Thresholds` or
    a mapping of names to change. threads: at most this many (None: all cores). extract: find the CIF inside the
    answer first; False scores the text as it stands.
    """

    def __init__(
        self,
        weights: Weights | Mapping[str, float] | Sequence[float] | None = None,
        thresholds: Thresholds | Mapping[str, float] | None = None,
        threads: int | None = None,
        extract: bool = True,
    ) -> None:
        if weights is None:
            weights = Weights()
        elif isinstance(weights, Mapping):
            weights = replace(Weights(), **weights)
        elif not isinstance(weights, Weights):
            weights = Weights(*weights)
        if thresholds is None:
            thresholds = Thresholds()
        elif isinstance(thresholds, Mapping):
            thresholds = replace(Thresholds(), **thresholds)  # type: ignore[arg-type]
        if not all(math.isfinite(w) for w in (weights.comp, weights.parse, weights.valid, weights.phys)):
            raise ValueError(f"weights must be finite, not {weights}")
        if threads is not None and threads < 1:
            raise ValueError(f"threads must be at least 1, not {threads}")
        self.weights, self.thresholds, self.threads, self.extract = weights, thresholds, threads, extract

    def score(self, texts: Sequence[str], targets: Sequence[Target] | Target = None) -> Scores:
        """Scores of n texts. targets: one per text, or a single one for all; see `parse_target`.

        No text raises: what cannot be parsed has the floor (-15 with the default weights) and a reason. A wrong
        target raises ValueError, wrong types TypeError.
        """
        from rewards_fast import _core

        if isinstance(texts, str):
            raise TypeError("texts is a sequence of strings; wrap a single text in a list")
        texts = list(texts)
        wanted, target_of_text = _parse_targets(targets, len(texts))
        rows, reasons, bits = _core.score(
            texts,
            wanted,
            target_of_text,
            _numbers(self.weights),
            _numbers(self.thresholds),
            self.threads or 0,
            self.extract,
        )
        return Scores(rows, bits, reasons, Crystals(texts, self.extract))


@functools.lru_cache(maxsize=64)
def _numbers(settings: Weights | Thresholds) -> tuple[float, ...]:
    return tuple(float(getattr(settings, f.name)) for f in fields(settings))


def _parse_targets(
    targets: Sequence[Target] | Target, n: int
) -> tuple[list[tuple[tuple[int, float], ...]], list[int]]:
    """The different targets as (atomic number, count) pairs, and for each text which of them is its ([]: the first)."""
    if targets is None or isinstance(targets, str | Mapping):
        return [_numbered(targets)], []
    if len(targets) != n:
        raise ValueError(f"{n} texts but {len(targets)} targets")
    known: dict[str | None, int] = {}
    parsed: list[tuple[tuple[int, float], ...]] = []
    index: list[int] = []
    for target in targets:
        if isinstance(target, str) or target is None:
            if target not in known:
                known[target] = len(parsed)
                parsed.append(_numbered(target))
            index.append(known[target])
        else:
            index.append(len(parsed))
            parsed.append(_numbered(target))
    return parsed, index


def _numbered(target: Target) -> tuple[tuple[int, float], ...]:
    if isinstance(target, str):
        return _numbered_text(target)
    return tuple((ATOMIC_NUMBER[symbol], amount) for symbol, amount in parse_target(target).items())


@functools.lru_cache(maxsize=4096)
def _numbered_text(target: str) -> tuple[tuple[int, float], ...]:
    return tuple((ATOMIC_NUMBER[symbol], amount) for symbol, amount in parse_target(target).items())
