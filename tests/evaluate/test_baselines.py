"""The baselines: against a solver that we did not write, and on the shipped split."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.spatial.distance import cdist
from sklearn.metrics import mean_absolute_error

from catmllm.data.slabs import SHIPPED_SEVENNET, load_slabs, split
from catmllm.evaluate.baselines import (
    FRAMES,
    RIDGES,
    SHARED,
    AdsorbateMean,
    KernelRidge,
    TextRidge,
    baselines,
    energies,
    evenly_spaced,
    for_baselines,
    text_features,
)
from catmllm.structure.descriptors import local_descriptor
from catmllm.structure.system import System
from catmllm.structure.text import three_part_text

SYSTEMS = load_slabs(SHIPPED_SEVENNET)
PARTS = split(SYSTEMS, 0)


def test_features_are_words_pairs_and_elements() -> None:
    system = next(s for s in SYSTEMS if three_part_text(s).count("[") == 2)
    features = text_features(system)
    text = three_part_text(system)
    assert features["["] == text.count("[") and features["</s>"] == 2
    assert features[(system.adsorbate, "</s>")] == 1
    assert features[("[", "[")] == text.count("[[")
    assert {k[1]: n for k, n in features.items() if isinstance(k, tuple) and k[0] == "atoms"} == system.target
    words = text.replace("</s>", " </s> ").replace("[", " [ ").replace("]", " ] ").split()
    assert sum(n for k, n in features.items() if isinstance(k, str)) == len(words)


def test_mean_of_the_adsorbate() -> None:
    train = PARTS["train"]
    fit = AdsorbateMean.fit(train)
    group = energies([s for s in train if s.adsorbate == "OH"])
    (predicted,) = fit.predict([s for s in SYSTEMS if s.adsorbate == "OH"][:1])
    assert predicted == pytest.approx(np.mean(group))
    unknown = replace(SYSTEMS[0], adsorbate="CHCH2OH")
    assert fit.predict([unknown])[0] == pytest.approx(energies(train).mean())


@pytest.mark.parametrize("roots", [False, True])
@pytest.mark.parametrize("n", [60, 600])
def test_ridge_solves_its_least_squares_problem(n: int, roots: bool) -> None:
    """With fewer systems than features, where the smaller matrix is that of the systems, and with more."""
    train, val = PARTS["train"][:n], PARTS["val"][:50]
    fit = TextRidge.fit(train, val, strengths=[3.0], roots=[roots])
    assert (len(train) < len(fit.vocabulary)) == (n == 60)
    features = np.zeros((len(train), len(fit.vocabulary)))
    for row, system in enumerate(train):
        for feature, count in text_features(system).items():
            features[row, fit.vocabulary[feature]] = count**0.5 if roots else count
    # the intercept as a column that is not shrunk, the shrinking as rows: solved by LAPACK's least squares
    width = features.shape[1]
    rows = np.block(
        [[features, np.ones((len(train), 1))], [np.sqrt(3.0) * np.eye(width), np.zeros((width, 1))]]
    )
    solution = np.linalg.lstsq(rows, np.concatenate([energies(train), np.zeros(width)]), rcond=None)[0]
    np.testing.assert_allclose(fit.weights, solution[:-1], atol=1e-7)
    assert fit.intercept == pytest.approx(solution[-1], abs=1e-7)
    np.testing.assert_allclose(fit.predict(train), features @ solution[:-1] + solution[-1], atol=1e-7)


def test_the_strength_is_chosen_on_validation() -> None:
    train, val = PARTS["train"][:400], PARTS["val"]
    strengths = (1e-2, 1.0, 30.0, 1e4)
    errors = {
        (s, r): np.abs(TextRidge.fit(train, val, [s], [r]).predict(val) - energies(val)).mean()
        for s in strengths
        for r in (False, True)
    }
    fit = TextRidge.fit(train, val, strengths)
    assert (fit.strength, fit.roots) == min(errors, key=errors.__getitem__)
    assert TextRidge.fit(train, [], strengths).strength == 30.0


def test_a_ridge_chosen_on_a_part_is_fitted_to_all(monkeypatch: pytest.MonkeyPatch) -> None:
    train, val = PARTS["train"][:300], PARTS["val"][:60]
    monkeypatch.setattr("catmllm.evaluate.baselines._SEARCHED", 100)
    fit, part = TextRidge.fit(train, val), TextRidge.fit(train[::3], val)
    assert (fit.strength, fit.roots) == (part.strength, part.roots)
    whole = TextRidge.fit(train, val, [fit.strength], [fit.roots])
    np.testing.assert_allclose(fit.predict(val), whole.predict(val), atol=1e-9)


def test_shipped_systems_have_the_known_baselines() -> None:
    found = baselines(PARTS)
    # an independent trial on such splits gave 0.75 and 0.36 eV (R² 0.91)
    assert found["adsorbate_mean"]["mae"] == pytest.approx(0.758, abs=0.005)
    assert found["text_ridge"]["mae"] == pytest.approx(0.327, abs=0.005)
    assert found["text_ridge"]["r2"] == pytest.approx(0.935, abs=0.005)
    # another kernel ridge on other descriptors gave 0.126
    assert found["kernel_ridge"]["mae"] == pytest.approx(0.124, abs=0.006)
    # with relaxed, middle and start frames 0.208 and 0.329
    assert found["kernel_ridge_frames"]["mae"] == pytest.approx(0.188, abs=0.01)
    assert found["kernel_ridge_frames"]["start"]["mae"] == pytest.approx(0.317, abs=0.015)


def test_a_subset_has_errors_of_its_own() -> None:
    some = {name: systems[::6] for name, systems in PARTS.items()}
    found = baselines(some, lambda s: s.adsorbate == "O")
    assert {k: v["mae"] for k, v in found.items()} == {k: v["mae"] for k, v in baselines(some).items()}
    of_o = [s for s in some["test"] if s.adsorbate == "O"]
    predicted = KernelRidge.fit(some["train"], some["val"], FRAMES).predict([s.frame(0.0) for s in of_o])
    part = found["kernel_ridge_frames"]["start"]["subset"]
    assert part["mae"] == pytest.approx(mean_absolute_error(energies(of_o), predicted), abs=1e-9)


def test_kernel_ridge_is_that_of_scipy_and_lapack() -> None:
    """Matérn 3/2 by SciPy's distances, the system solved by LU instead of Cholesky."""
    train, val = PARTS["train"][:200], PARTS["val"][:60]
    fit = KernelRidge.fit(train, [])
    x = (np.array([local_descriptor(s) for s in train]) - fit.centre) / fit.scale
    y = (np.array([local_descriptor(s) for s in val]) - fit.centre) / fit.scale

    def kernel(a: np.ndarray, b: np.ndarray, first: list[System], second: list[System]) -> np.ndarray:
        reach = cdist(a, b) * np.sqrt(6 * fit.rate / a.shape[1])
        same = np.array([[1.0 if s.adsorbate == t.adsorbate else SHARED for t in second] for s in first])
        return (1 + reach) * np.exp(-reach) * same

    rest = energies(train) - AdsorbateMean.fit(train).predict(train)
    weights = np.linalg.solve(kernel(x, x, train, train) + RIDGES[1] * np.eye(len(x)), rest)
    expected = kernel(y, x, val, train) @ weights + AdsorbateMean.fit(train).predict(val)
    np.testing.assert_allclose(fit.predict(val), expected, atol=1e-6)


def test_kernel_ridge_learns_unrelaxed_frames() -> None:
    train, val = PARTS["train"][::4], PARTS["val"]
    wanted, starts = energies(val), [s.frame(0.0) for s in val]
    relaxed_only, with_starts = (KernelRidge.fit(train, val, frames) for frames in ((), (0.0,)))
    errors = [np.abs(fit.predict(starts) - wanted).mean() for fit in (relaxed_only, with_starts)]
    assert errors[1] < 0.85 * errors[0]


def test_the_descriptor_does_not_change_with_the_frame() -> None:
    """Shifted along a and b, other rows first: the same numbers."""
    rng = np.random.default_rng(0)
    for system in SYSTEMS[::500]:
        frac = system.frac + [0.3, -0.4, 0.0]
        order = rng.permutation(len(frac))
        moved = replace(
            system,
            frac=(frac - np.floor(frac))[order],
            numbers=system.numbers[order],
            tags=system.tags[order],
        )
        np.testing.assert_allclose(local_descriptor(moved), local_descriptor(system), atol=1e-9)


def test_systems_need_energies() -> None:
    with pytest.raises(ValueError, match="has no energy"):
        energies([replace(SYSTEMS[0], energy=None)])
    with pytest.raises(ValueError, match="no training systems"):
        AdsorbateMean.fit([])
    with pytest.raises(ValueError, match="no training systems"):
        TextRidge.fit([], SYSTEMS[:2])


def test_baselines_are_measured_where_the_model_is() -> None:
    """Not on a part of their own choice: the caps of what they are fitted to are others."""
    parts = {"train": [PARTS["train"][0]] * 4001, "val": PARTS["val"], "test": PARTS["test"]}
    cut = for_baselines(parts, 50)
    assert list(cut["test"]) == list(evenly_spaced(parts["test"], 50)) and 40 < len(cut["test"]) <= 50
    assert (len(cut["train"]), list(cut["val"])) == (2001, list(parts["val"]))
    many = {**parts, "test": [PARTS["test"][0]] * 4050}
    assert len(for_baselines(many, 4096)["test"]) == 4050
