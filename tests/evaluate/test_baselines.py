"""The two baselines: against a solver that we did not write, and on the shipped split."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from catmllm.data.slabs import load_slabs, split
from catmllm.evaluate.baselines import AdsorbateMean, TextRidge, baselines, energies, text_features
from catmllm.structure.text import three_part_text

SYSTEMS = load_slabs()
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


def test_ridge_solves_its_least_squares_problem() -> None:
    train, val = PARTS["train"][:300], PARTS["val"][:50]
    fit = TextRidge.fit(train, val, strengths=[3.0])
    features = np.zeros((len(train), len(fit.vocabulary)))
    for row, system in enumerate(train):
        for feature, count in text_features(system).items():
            features[row, fit.vocabulary[feature]] = count
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
        s: np.abs(TextRidge.fit(train, val, [s]).predict(val) - energies(val)).mean() for s in strengths
    }
    assert TextRidge.fit(train, val, strengths).strength == min(errors, key=errors.__getitem__)
    assert TextRidge.fit(train, [], strengths).strength == 30.0


def test_shipped_systems_have_the_known_baselines() -> None:
    found = baselines(PARTS)
    # an independent trial on such splits gave 0.75 and 0.36 eV (R² 0.91)
    assert found["adsorbate_mean"]["mae"] == pytest.approx(0.758, abs=0.005)
    assert found["text_ridge"]["mae"] == pytest.approx(0.345, abs=0.005)
    assert found["text_ridge"]["r2"] == pytest.approx(0.928, abs=0.005)


def test_systems_need_energies() -> None:
    with pytest.raises(ValueError, match="has no energy"):
        energies([replace(SYSTEMS[0], energy=None)])
    with pytest.raises(ValueError, match="no training systems"):
        AdsorbateMean.fit([])
    with pytest.raises(ValueError, match="no training systems"):
        TextRidge.fit([], SYSTEMS[:2])
