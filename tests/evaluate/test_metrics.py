"""The reported numbers against scikit-learn-like definitions, brute force over permutations, and pymatgen."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pymatgen.analysis.structure_matcher import StructureMatcher
from pymatgen.core import Lattice, Structure
from scipy.stats import bootstrap, pearsonr

from catmllm.data.slabs import SHIPPED_SEVENNET, load_slabs
from catmllm.design.constraints import adsorbate_faults, hard_constraints, read_systems
from catmllm.evaluate import metrics
from catmllm.structure.adsorbed import Fault
from catmllm.structure.cif import write_cif
from catmllm.structure.system import System, make_system
from rewards_fast import PVCP, Scores, min_distance

SYSTEMS = load_slabs(SHIPPED_SEVENNET)
vectors = st.lists(st.floats(-5, 5), min_size=2, max_size=6)

# --------------------------------------------------------------------------- property


def test_mae_and_r2() -> None:
    rng = np.random.default_rng(0)
    true = rng.normal(size=50)
    predicted = true + rng.normal(size=50) / 3
    assert metrics.mae(predicted, true) == pytest.approx(
        sum(abs(p - t) for p, t in zip(predicted, true)) / 50
    )
    assert metrics.r2(true, true) == 1.0
    assert metrics.r2(np.full(50, true.mean()), true) == pytest.approx(0.0)
    slope, offset = np.polyfit(predicted, true, 1)  # for the best line R² is the squared correlation
    assert metrics.r2(slope * predicted + offset, true) == pytest.approx(pearsonr(predicted, true)[0] ** 2)


def test_nothing_is_left_out() -> None:
    assert np.isnan(metrics.mae([1.0, np.nan], [1.0, 2.0]))
    assert np.isnan(metrics.mae([], []))
    assert np.isnan(metrics.r2([1.0, 2.0], [3.0, 3.0]))
    with pytest.raises(ValueError, match="two vectors of one length"):
        metrics.mae([1.0], [1.0, 2.0])


def test_bootstrap_agrees_with_scipy() -> None:
    values = np.random.default_rng(3).exponential(size=80)
    low, high = metrics.bootstrap_interval(values, draws=5000)
    other = bootstrap((values,), np.mean, method="percentile", n_resamples=5000, rng=0).confidence_interval
    assert (low, high) == pytest.approx((other.low, other.high), abs=0.02)
    assert metrics.bootstrap_interval(values) == metrics.bootstrap_interval(values)
    predicted, true = values + 0.1, values
    assert metrics.bootstrap_interval(predicted, true, statistic=metrics.mae) == pytest.approx((0.1, 0.1))
    with pytest.raises(ValueError, match="lengths"):
        metrics.bootstrap_interval(values, values[1:], statistic=metrics.mae)


def test_inclusion_ratio_counts_the_ends() -> None:
    assert metrics.inclusion_ratio([1.0, 2.0, 3.0, np.nan], [1.0] * 4, [2.0] * 4) == 0.5


# --------------------------------------------------------------------------- generation


def altered(text: str, old: str, new: str) -> str:
    assert old in text
    return text.replace(old, new)


@pytest.fixture(scope="module")
def scored() -> tuple[Scores, list[str]]:
    """One text of every kind with its name, scored: good, OH, unparseable, wrong atom, overlap,
    huge cell, far away."""
    carbon = next(s for s in SYSTEMS if s.adsorbate == "C")
    hydroxyl = next(s for s in SYSTEMS if s.adsorbate == "OH" and min_distance(s.lattice, s.frac) < 0.99)
    good = write_cif(carbon)
    wrong = dict(carbon.target) | {"C": 2}
    squeezed = make_system(
        carbon.lattice * 0.2, None, carbon.numbers, carbon.tags, "C", carbon.miller, frac=carbon.frac
    )
    blown = make_system(
        carbon.lattice * [[1], [1], [90]],
        None,
        carbon.numbers,
        carbon.tags,
        "C",
        carbon.miller,
        frac=carbon.frac,
    )
    length = next(line for line in good.splitlines() if line.startswith("_cell_length_a"))
    rows = {
        "good": (good, carbon.target),
        "no target": (good, None),
        "OH": (write_cif(hydroxyl), hydroxyl.target),
        "unparseable": (altered(good, length, "_cell_length_a ?"), carbon.target),
        "composition": (good, wrong),
        "overlap": (write_cif(squeezed), carbon.target),
        "empty": (write_cif(blown), carbon.target),
    }
    return PVCP().score([t for t, _ in rows.values()], [t for _, t in rows.values()]), list(rows)


def faults_of(scores: Scores, names: list[str]) -> list[Fault | None]:
    asked = [("OH" if name == "OH" else "C", (1, 1, 1)) for name in names]
    return adsorbate_faults(read_systems(scores, asked))


def test_failures_are_counted_over_all_texts(scored: tuple[Scores, list[str]]) -> None:
    scores, names = scored
    failed = {
        "PF": {"unparseable"},
        "VF": {"unparseable", "overlap", "empty"},  # too dense and too thin
        "CM": {"unparseable", "composition"},
        "PV": {"unparseable", "overlap", "empty", "OH"},  # Eq. 41 fails every O-H bond
        "PV_0.7": {"unparseable", "overlap", "empty"},
        "AD": {"unparseable", "overlap", "empty"},  # in a cell 90 times as long nothing is in reach
    }
    rates = metrics.generation_rates(scores, faults_of(scores, names))
    assert rates == pytest.approx({name: len(which) / len(names) for name, which in failed.items()})
    assert scores.valid[names.index("empty")] < 10 and scores.phys[names.index("OH")] < 10


def test_rates_are_the_same_whatever_threshold_the_scores_were_made_with() -> None:
    picks = [
        next(s for s in SYSTEMS if s.adsorbate == "OH" and min_distance(s.lattice, s.frac) < 0.99),
        *SYSTEMS[:4],
    ]
    texts, targets = [write_cif(s) for s in picks], [s.target for s in picks]
    strict = PVCP().score(texts, targets)
    lenient = PVCP(thresholds={"near": 0.7}).score(texts, targets)
    faults = adsorbate_faults(picks)
    assert metrics.generation_rates(strict, faults) == metrics.generation_rates(lenient, faults)
    assert metrics.generation_rates(strict, faults)["PV"] == np.mean(strict.phys < 10)
    assert metrics.generation_rates(lenient, faults)["PV_0.7"] == np.mean(lenient.phys < 10) == 0
    assert metrics.generation_rates(lenient, faults)["AD"] == 0


def test_no_texts_have_no_rates() -> None:
    assert all(np.isnan(rate) for rate in metrics.generation_rates(PVCP().score([], []), []).values())


def test_hard_constraints(scored: tuple[Scores, list[str]]) -> None:
    scores, names = scored
    faults = faults_of(scores, names)
    assert {name for name, fine in zip(names, hard_constraints(scores, faults)) if fine} == {"good", "OH"}
    assert not hard_constraints(scores, ["broken"] * len(names)).any()


# --------------------------------------------------------------------------- design


def test_success_needs_a_feasible_judged_design_within_tolerance() -> None:
    energies = [-1.0, -1.25, -1.26, np.nan, -1.0]
    feasible = [True, True, True, True, False]
    success = metrics.design_success(feasible, energies, [-1.0] * 5)
    assert success.tolist() == [True, True, False, False, False]


def brute_shuffles(feasible: list[bool], energies: list[float], targets: list[float]) -> float:
    """Mean success over all derangements, one by one."""
    n = len(targets)
    rates = [
        metrics.design_success(feasible, energies, [targets[i] for i in order]).mean()
        for order in itertools.permutations(range(n))
        if all(i != j for i, j in enumerate(order))
    ]
    return float(np.mean(rates))


@given(vectors, st.randoms())
def test_shuffled_control_is_the_mean_over_all_derangements(targets: list[float], random: object) -> None:
    energies = [t + random.uniform(-0.4, 0.4) for t in targets]  # type: ignore[attr-defined]
    feasible = [random.random() < 0.8 for _ in targets]  # type: ignore[attr-defined]
    expected = brute_shuffles(feasible, energies, targets)
    assert metrics.shuffled_control(feasible, energies, targets) == pytest.approx(expected)


def test_shuffling_within_groups() -> None:
    energies, targets = [-1.0, -2.0, 1.0, 1.1, 7.0], [-1.0, -2.0, 1.0, 1.1, 7.0]
    groups = ["CO", "CO", "H", "H", "N"]
    # H hits, CO does not, N is alone
    assert metrics.shuffled_control([True] * 5, energies, targets, groups) == 0.5
    assert metrics.shuffled_control([True] * 5, energies, targets) == pytest.approx(2 / 20)
    assert np.isnan(metrics.shuffled_control([True], [0.0], [0.0]))
    with pytest.raises(ValueError, match="group labels"):
        metrics.shuffled_control([True] * 5, energies, targets, ["CO"])


def test_retrieval_control_is_what_drawing_converges_to() -> None:
    train, test = SYSTEMS[:2000], SYSTEMS[2000:2200]
    targets = np.array([s.energy for s in test])
    exact = metrics.retrieval_control(
        targets,
        [s.adsorbate for s in test],
        [float(s.energy or 0) for s in train],
        [s.adsorbate for s in train],
    )
    rng = np.random.default_rng(0)
    by_name = {
        name: np.array([s.energy for s in train if s.adsorbate == name])
        for name in {s.adsorbate for s in train}
    }
    drawn = [
        np.mean([abs(rng.choice(by_name[s.adsorbate]) - t) <= 0.25 for s, t in zip(test, targets)])
        for _ in range(60)
    ]
    assert exact == pytest.approx(np.mean(drawn), abs=4 * np.std(drawn) / np.sqrt(60))
    assert 0.1 < exact < 0.22
    assert metrics.retrieval_control([0.0], ["CO"], [0.0], ["H"]) == 0.0


def test_iterations_to_success() -> None:
    success = [[False, True, True], [True, False, True], [False, False, False]]
    found = metrics.iterations_to_success(success)
    assert found["share"] == pytest.approx(2 / 3)
    assert found["mean"] == 1.5
    assert found["mean_all"] == pytest.approx((2 + 1 + 4) / 3)
    assert found["curve"] == pytest.approx([1 / 3, 2 / 3, 2 / 3])
    assert np.isnan(metrics.iterations_to_success([[False]])["mean"])
    with pytest.raises(ValueError, match="tasks, iterations"):
        metrics.iterations_to_success([True])


# --------------------------------------------------------------------------- diversity


def disguised(system: System, seed: int) -> System:
    """The same structure: other origin and order of atoms, other cell vectors,
    rotated by its standard form."""
    rng = np.random.default_rng(seed)
    basis = np.array([[1, 0, 0], [int(rng.integers(-1, 2)), 1, 0], [0, 0, 1]])
    lattice = basis @ system.lattice
    order = rng.permutation(len(system))
    positions = system.positions[order] + rng.normal(size=3)
    positions = positions + rng.integers(-2, 3, size=(len(system), 3)) @ system.lattice
    return make_system(
        lattice, positions, system.numbers[order], system.tags[order], system.adsorbate, system.miller
    )


@pytest.mark.parametrize("seed", range(4))
def test_a_structure_is_the_same_in_any_disguise(seed: int) -> None:
    system = SYSTEMS[37 * seed]
    numbers, vector = metrics.distance_fingerprint(system)
    same_numbers, same = metrics.distance_fingerprint(disguised(system, seed))
    assert numbers == same_numbers
    np.testing.assert_allclose(vector, same, atol=1e-6)


def test_distances_are_those_of_pymatgen() -> None:
    system = SYSTEMS[5]
    structure = Structure(Lattice(system.lattice), system.symbols, system.frac)
    distances = np.sort(structure.distance_matrix[np.triu_indices(len(system), 1)])
    np.testing.assert_allclose(np.sort(metrics.distance_fingerprint(system)[1][1:]), distances, atol=1e-9)


def test_distinct_structures_are_those_of_pymatgens_matcher() -> None:
    names = [(s.adsorbate, s.slab_formula, s.miller) for s in SYSTEMS]
    (most, count), *_ = Counter(names).most_common(1)
    group = [s for s, name in zip(SYSTEMS, names) if name == most][:8]
    assert count >= 8
    mixed = [*group, *(disguised(s, i) for i, s in enumerate(group))]
    labels = metrics.distinct_structures(mixed)
    assert labels[: len(group)].tolist() == labels[len(group) :].tolist()
    matcher = StructureMatcher(primitive_cell=False, scale=False, stol=0.05, ltol=0.02, angle_tol=1)
    structures = [Structure(Lattice(s.lattice), s.symbols, s.frac) for s in group]
    for (i, a), (j, b) in itertools.combinations(enumerate(structures), 2):
        if labels[i] == labels[j]:
            assert matcher.fit(a, b)
    assert len(set(labels.tolist())) > 1


def test_a_moved_adsorbate_is_another_structure() -> None:
    system = SYSTEMS[0]
    moved = system.positions.copy()
    moved[-1] += [0.0, 0.0, 0.3]
    other = make_system(system.lattice, moved, system.numbers, system.tags, system.adsorbate, system.miller)
    nudged = make_system(
        system.lattice,
        system.positions + 0.01 * np.eye(len(system), 3),
        system.numbers,
        system.tags,
        "CH",
        (1, 1, 1),
    )
    assert metrics.distinct_structures([system, other, nudged]).tolist() == [0, 1, 0]
    assert metrics.diversity([system, other, nudged]) == {
        "n": 3,
        "distinct": 2,
        "share": pytest.approx(2 / 3),
    }
    assert np.isnan(metrics.diversity([])["share"])
