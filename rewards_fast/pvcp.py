"""The PVCP reward: weights, thresholds, result types, and the door to the engine that scores (csrc/pvcp).

The formulas (paper Eqs. 12-44) stand in plain Python in reference.py, with which the engine is tested.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rewards_fast._core import REASONS
from rewards_fast.crystal import ELEMENTS, CIFError, Crystal
from rewards_fast.targets import Target, number_targets

# The terms by name, and what each is for a text that does not parse; 10 is the most of all of them.
FLOORS = {"comp": -15.0, "parse": -20.0, "valid": -10.0, "phys": -10.0}
TERMS = tuple(FLOORS)


@dataclass(frozen=True)
class Weights:
    """Weights of the four terms (Eq. 13)."""

    comp: float = 0.60
    parse: float = 0.20
    valid: float = 0.10
    phys: float = 0.10


@dataclass(frozen=True)
class Thresholds:
    """Where penalties begin. `near` 1.0 is Eq. 41 and hits correct O-H bonds (0.98 Å); training uses 0.7.

    own_images: a site's own images count for the least distance too. Eq. 41 takes different sites alone,
    so that a cell 0.6 Å wide with one atom across scores in full.
    """

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
    own_images: bool = False


SCORE_NAMES = ("total", *TERMS, "n_sites", "volume", "density", "min_distance")
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


def _crystal(parsed: tuple[Any, ...]) -> Crystal:
    lattice, frac, numbers, counts = parsed
    named = {k if isinstance(k, str) else ELEMENTS[k - 1]: n for k, n in counts.items()}
    return Crystal(lattice, frac, numbers, named)


class Crystals(Sequence["Crystal | None"]):
    """The crystals of a batch, None where a text does not parse. Texts are parsed again when one is asked
    for: that takes microseconds, while most callers want the scores alone."""

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

    reason: None or the code of what was wrong. terms: the sub-terms by name (`TERM_NAMES`). fields:
    completeness of the text's key fields by name (bool [n], all False where nothing parsed;
    `duplicate_labels` is a fault). rows: all numbers as they came, [n, 19], the columns `SCORE_NAMES` and
    then `TERM_NAMES`; the arrays are views of it, made when they are first asked for: all of them would take
    longer than scoring one text.
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


def shortest_vector(lattice: ArrayLike) -> float:
    """How far a site is from its own nearest image (Å): the shortest vector of the lattice, rows in Å [3, 3],
    any skew. nan for non-finite input or a cell without volume."""
    from rewards_fast import _core

    return float(_core.shortest_vector(np.ascontiguousarray(lattice, dtype=np.float64).reshape(3, 3)))


def floor_scores(weights: Weights) -> dict[str, float]:
    """The terms of a text that does not parse."""
    total = sum(floor * getattr(weights, name) for name, floor in FLOORS.items())
    return {"total": total, **FLOORS, **dict.fromkeys(TERM_NAMES, math.nan)}


def score_range(weights: Weights) -> tuple[float, float]:
    """The total of a text that does not parse, and the most that any text gets."""
    return floor_scores(weights)["total"], sum(10.0 * getattr(weights, name) for name in TERMS)


def parse_cif(text: str) -> Crystal:
    """The first structure of a CIF text, accepted and read as pymatgen does.
    Raises CIFError with `.reason`."""
    from rewards_fast import _core

    if not isinstance(text, str):
        raise TypeError(f"a text is a str, not {type(text).__name__}")
    reason, parsed = _core.parse(text, False)
    if parsed is None:
        raise CIFError(reason, REASONS[reason][0])
    return _crystal(parsed)


def min_distance(lattice: ArrayLike, frac: ArrayLike) -> float:
    """Least distance (Å) between two different sites with all periodic images, a site's own images left out.

    lattice: [3, 3], rows in Å, any skew. frac: [N, 3]. Fewer than two sites give inf;
    non-finite input or a cell without volume gives nan.
    """
    from rewards_fast import _core

    rows = np.ascontiguousarray(lattice, dtype=np.float64).reshape(3, 3)
    return float(_core.min_distance(rows, np.ascontiguousarray(frac, dtype=np.float64).reshape(-1, 3)))


class PVCP:
    """The reward of texts against target compositions; immutable after it is made.

    weights: `Weights`, a mapping of its names or four numbers in the order of `TERMS`. thresholds:
    `Thresholds` or a mapping of names to change. threads: at most this many (None: all cores). extract: find
    the CIF inside the answer first; False scores the text as it stands.
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
        if not all(math.isfinite(getattr(weights, name)) for name in TERMS):
            raise ValueError(f"weights must be finite, not {weights}")
        if threads is not None and threads < 1:
            raise ValueError(f"threads must be at least 1, not {threads}")
        self.weights, self.thresholds, self.threads, self.extract = weights, thresholds, threads, extract

    def score(self, texts: Sequence[str], targets: Sequence[Target] | Target = None) -> Scores:
        """Scores of n texts. targets: one per text, or a single one for all; see `parse_target`.

        No text raises: what cannot be parsed has the floor (-15 with the default weights) and a reason. A
        wrong target raises ValueError, wrong types TypeError.
        """
        from rewards_fast import _core

        if isinstance(texts, str):
            raise TypeError("texts is a sequence of strings; wrap a single text in a list")
        texts = list(texts)
        wanted, target_of_text = number_targets(targets, len(texts))
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
