"""The numbers that are reported: property errors, failure rates of generated CIFs,
design success and its controls.

Everything is computed over all samples. Nothing that failed is dropped: a text that does not parse fails
every check, a design that the judge could not relax is no success, an outlier stays in the mean. Shares are
in [0, 1], energies in eV.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from catmllm.design.constraints import MIN_DISTANCE, parsed, sane_volume
from catmllm.seeds import Stream, generator
from catmllm.structure.adsorbed import Fault
from rewards_fast import Crystal, Scores
from rewards_fast.pvcp import Thresholds

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

TOLERANCE = 0.25  # eV; the paper gives none


# --------------------------------------------------------------------------- property


def _pair(predicted: ArrayLike, true: ArrayLike) -> tuple[Floats, Floats]:
    p, t = np.asarray(predicted, dtype=np.float64), np.asarray(true, dtype=np.float64)
    if p.shape != t.shape or p.ndim != 1:
        raise ValueError(f"predicted {p.shape} and true {t.shape} must be two vectors of one length")
    return p, t


def mae(predicted: ArrayLike, true: ArrayLike) -> float:
    """Mean absolute error of [n] against [n]; nan if anything is nan or n is 0,
    for nothing may be left out."""
    p, t = _pair(predicted, true)
    return float(np.abs(p - t).mean()) if len(t) else float("nan")


def r2(predicted: ArrayLike, true: ArrayLike) -> float:
    """Coefficient of determination, 1 - SS_res / SS_tot; nan where all true values are equal."""
    p, t = _pair(predicted, true)
    total = float(((t - t.mean()) ** 2).sum()) if len(t) else 0.0
    return 1.0 - float(((p - t) ** 2).sum()) / total if total else float("nan")


def bootstrap_interval(
    *samples: ArrayLike,
    statistic: Callable[..., float] = lambda values: float(np.mean(values)),
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
    groups: Sequence[Hashable] | None = None,
) -> tuple[float, float]:
    """Percentile bootstrap interval of `statistic(*samples)`,
    drawing rows of all samples ([n] each) together.

    `bootstrap_interval(hits)` is that of a rate, `bootstrap_interval(predicted, true, statistic=mae)` that of
    an MAE. Where systems come in groups (many sites of one slab) rows are not independent: with the label of
    its group for every row, whole groups are drawn, as many as there are.
    """
    arrays = [np.asarray(sample) for sample in samples]
    n = len(arrays[0])
    if n == 0 or any(len(array) != n for array in arrays):
        raise ValueError(
            f"samples of lengths {[len(array) for array in arrays]}: give at least one row, one length"
        )
    labels = np.arange(n) if groups is None else _labels(groups, n)
    members = [np.flatnonzero(labels == label) for label in range(labels.max() + 1)]
    rng = generator(Stream.BOOTSTRAP.key(seed))
    drawn = rng.integers(len(members), size=(draws, len(members)))
    values = [
        statistic(*(array[rows] for array in arrays))
        for rows in (np.concatenate([members[g] for g in picks]) for picks in drawn)
    ]
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def wilson_interval(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % Wilson score interval of a share of n independent trials; it is no point at 0 and 1."""
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def inclusion_ratio(predicted: ArrayLike, low: ArrayLike, high: ArrayLike) -> float:
    """PIR (Eq. 57) as a share: predictions [n] inside their system's energy range [low, high] ([n] each,
    ends in)."""
    p, bottom = _pair(predicted, low)
    _, top = _pair(predicted, high)
    return float(((p >= bottom) & (p <= top)).mean()) if len(p) else float("nan")


# --------------------------------------------------------------------------- generation


def generation_rates(
    scores: Scores, faults: Sequence[Fault | None], thresholds: Thresholds | None = None
) -> dict[str, float]:
    """Shares of `generation_failures` over all texts; NaN of none."""
    failures = generation_failures(scores, faults, thresholds)
    return {name: float(failed.mean()) if len(failed) else float("nan") for name, failed in failures.items()}


def generation_failures(
    scores: Scores, faults: Sequence[Fault | None], thresholds: Thresholds | None = None
) -> dict[str, Bools]:
    """Which texts fail [n] (Table 3): PF parse, VF any R_valid penalty, CM composition,
    PV any R_phys penalty; and AD no real adsorbate (ours; `faults` by `adsorbate_faults`).

    A text that does not parse fails all of them. PV is that of Eq. 41 (`thresholds.near`, 1.0 Å, which every
    correct O-H bond fails) whatever the thresholds the scores were made with; `PV_0.7` allows pairs from 0.7
    Å on. A text without target composition (R_comp 0, a value that no composition gets) does not fail CM.
    """
    thresholds = thresholds or Thresholds()
    ok = parsed(scores)
    roomy = sane_volume(scores, thresholds)
    passed = {
        "PF": ok,
        "VF": ok & (scores.valid >= 10.0),
        "CM": ok & ((scores.comp >= 10.0) | (scores.comp == 0.0)),
        "PV": ok & roomy & (scores.min_distance >= thresholds.near),
        "PV_0.7": ok & roomy & (scores.min_distance >= MIN_DISTANCE),
        "AD": ok & np.array([fault is None for fault in faults], dtype=bool),
    }
    return {name: ~fine for name, fine in passed.items()}


# --------------------------------------------------------------------------- design


def design_success(
    feasible: ArrayLike, energies: ArrayLike, targets: ArrayLike, tolerance: float = TOLERANCE
) -> Bools:
    """[n] which designs are feasible and have a judged energy within `tolerance` (eV) of the target;
    nan is no hit."""
    return np.asarray(feasible, dtype=bool) & _hits(energies, targets, tolerance)


def _hits(energies: ArrayLike, targets: ArrayLike, tolerance: float) -> Bools:
    difference = np.abs(np.asarray(energies, dtype=np.float64) - np.asarray(targets, dtype=np.float64))
    return difference <= tolerance + 1e-9  # -1.00 + 0.25 is a hit for -1.00 however it rounds; nan is False


def shuffled_control(
    feasible: ArrayLike,
    energies: ArrayLike,
    targets: ArrayLike,
    groups: Sequence[Hashable] | None = None,
    tolerance: float = TOLERANCE,
) -> float:
    """Success rate of the same designs for one another's targets: what ignoring the target would reach.

    Exact average over all shuffles that leave no design its own target: in these each other target is equally
    likely, so it is the mean over all ordered pairs. groups: shuffle only within equal labels (the adsorbate,
    or the whole prompt), a stricter control, for the adsorbate alone tells much of the energy. A design that
    is alone in its group has no other target and is left out; nan if all are.
    """
    ok = np.asarray(feasible, dtype=bool)
    e, t = _pair(energies, targets)
    labels = _labels(groups, len(t))
    rates = []
    for label in range(labels.max() + 1 if len(labels) else 0):
        rows = np.flatnonzero(labels == label)
        if len(rows) > 1:
            hit = ok[rows, None] & _hits(e[rows, None], t[None, rows], tolerance)
            np.fill_diagonal(hit, False)
            rates.append(hit.sum(1) / (len(rows) - 1))
    return float(np.concatenate(rates).mean()) if rates else float("nan")


def _labels(groups: Sequence[Hashable] | None, n: int) -> NDArray[np.int64]:
    if groups is None:
        return np.zeros(n, dtype=np.int64)
    if len(groups) != n:
        raise ValueError(f"{len(groups)} group labels for {n} designs")
    number: dict[Hashable, int] = {}
    return np.array([number.setdefault(group, len(number)) for group in groups], dtype=np.int64)


def retrieval_control(
    targets: ArrayLike,
    adsorbates: Sequence[str],
    train_energies: ArrayLike,
    train_adsorbates: Sequence[str],
    tolerance: float = TOLERANCE,
) -> float:
    """Success rate of answering with a random training system of the same adsorbate,
    averaged exactly over all of them.

    targets [n] with adsorbates [n]; train_energies [m] with train_adsorbates [m]. An adsorbate that training
    does not have cannot be answered: 0. On the shipped data this is about 0.16.
    """
    wanted = np.asarray(targets, dtype=np.float64)
    known = np.asarray(train_energies, dtype=np.float64)
    if len(wanted) != len(adsorbates) or len(known) != len(train_adsorbates):
        raise ValueError("give one adsorbate for each target and one for each training energy")
    if not len(wanted):
        return float("nan")
    train_names = np.array(train_adsorbates)
    pools = {name: known[train_names == name] for name in set(adsorbates)}
    rates = [
        _hits(pools[name], target, tolerance).mean() if len(pools[name]) else 0.0
        for name, target in zip(adsorbates, wanted)
    ]
    return float(np.mean(rates))


def iterations_to_success(success: ArrayLike) -> dict[str, Any]:
    """How soon a search hits. success: bool [tasks, iterations],
    whether the best design after each one is a success.

    Returns `share` of tasks that ever hit; `mean` of the first successful iteration (counted from 1) over
    these, nan if none; `mean_all`, where a task that never hits counts as all iterations and one more;
    `curve` [iterations], the share of tasks that have hit by then.
    """
    hit = np.asarray(success, dtype=bool)
    if hit.ndim != 2 or 0 in hit.shape:
        raise ValueError(f"success must be [tasks, iterations] with at least one of each, not {hit.shape}")
    ever = hit.any(axis=1)
    first = np.where(ever, hit.argmax(axis=1) + 1, hit.shape[1] + 1)
    return {
        "share": float(ever.mean()),
        "mean": float(first[ever].mean()) if ever.any() else float("nan"),
        "mean_all": float(first.mean()),
        "curve": np.maximum.accumulate(hit, axis=1).mean(axis=0).tolist(),
    }


# --------------------------------------------------------------------------- diversity


def distance_fingerprint(crystal: Crystal) -> tuple[tuple[int, ...], Floats]:
    """What a structure is up to rotation, mirror image, order of atoms,
    origin and choice of the cell's vectors.

    Returns the sorted atomic numbers and a vector: shortest lattice vector (Å), then for each pair of
    elements in turn the sorted minimum-image distances (Å) of their pairs of sites.
    """
    from ase.geometry import find_mic, minkowski_reduce

    order = np.argsort(crystal.numbers, kind="stable")
    numbers = crystal.numbers[order]
    positions = (crystal.frac @ crystal.lattice)[order]
    shortest = np.linalg.norm(minkowski_reduce(crystal.lattice)[0], axis=1).min()
    i, j = np.triu_indices(len(numbers), 1)
    distance = (
        find_mic(positions[i] - positions[j], crystal.lattice, pbc=True)[1]
        if len(i)
        else np.empty(0, dtype=np.float64)
    )
    by_pair = np.lexsort((distance, numbers[j], numbers[i]))
    return tuple(numbers.tolist()), np.concatenate([[shortest], distance[by_pair]])


def distinct_structures(crystals: Sequence[Crystal], tolerance: float = 0.1) -> NDArray[np.int64]:
    """[n] a number for each structure, the same for the same structure, counted from 0 as they first come.

    Two are the same if their atoms are and no entry of their `distance_fingerprint` differs by more than
    `tolerance` (Å). Each is compared with the first of every kind so far.
    """
    kinds: dict[tuple[int, ...], list[tuple[int, Floats]]] = {}
    labels = []
    count = 0
    for crystal in crystals:
        numbers, vector = distance_fingerprint(crystal)
        known = kinds.setdefault(numbers, [])
        label = next((k for k, first in known if np.abs(first - vector).max() <= tolerance), None)
        if label is None:
            label, count = count, count + 1
            known.append((label, vector))
        labels.append(label)
    return np.array(labels, dtype=np.int64)


def diversity(crystals: Sequence[Crystal], tolerance: float = 0.1) -> dict[str, float]:
    """`n` structures (the successes, say), how many of them are `distinct`,
    and that as a `share` (nan for none)."""
    n = len(crystals)
    distinct = len(set(distinct_structures(crystals, tolerance).tolist()))
    return {"n": n, "distinct": distinct, "share": distinct / n if n else float("nan")}
