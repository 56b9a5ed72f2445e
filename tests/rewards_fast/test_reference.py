"""The reference against pymatgen's own objects and, for distances, brute force."""

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards_fast import CIFError, min_distance, parse_cif
from rewards_fast.reference import measure
from tests.rewards_fast.cif_texts import SLAB, cell_cif

pymatgen_core = pytest.importorskip("pymatgen.core")
SHARED = Path(os.environ.get("CATMLLM_SHARED", Path(__file__).parents[3] / "shared"))


def brute_force(lattice: np.ndarray, frac: np.ndarray, reach: int) -> float:
    span = np.arange(-reach, reach + 1)
    images = np.stack(np.meshgrid(span, span, span, indexing="ij"), -1).reshape(-1, 3)
    best = np.inf
    for i in range(len(frac)):
        for j in range(i):
            vectors = (frac[i] - frac[j] + images) @ lattice
            best = min(best, float(np.sqrt((vectors**2).sum(1).min())))
    return best


coordinate = st.floats(0, 0.999)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.tuples(*[st.floats(2, 9)] * 3),
    skew=st.tuples(*[st.floats(-1.5, 1.5)] * 3),
    frac=st.lists(st.tuples(coordinate, coordinate, coordinate), min_size=2, max_size=5),
)
def test_min_distance_is_exact_in_skewed_cells(
    lengths: tuple[float, ...], skew: tuple[float, ...], frac: list[tuple[float, ...]]
) -> None:
    lattice = np.diag(lengths)
    lattice[1, 0], lattice[2, 0], lattice[2, 1] = (s * lengths[0] for s in skew)
    expected = brute_force(lattice, np.array(frac), 7)
    assert min_distance(lattice, np.array(frac)) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_min_distance_of_extremes() -> None:
    pair = np.array([[0, 0, 0], [0.5, 0.5, 0.5]])
    assert min_distance(np.eye(3) * 0.01, pair) == pytest.approx(0.01 * 0.75**0.5)
    assert min_distance(np.eye(3) * 1e-200, pair) == pytest.approx(1e-200 * 0.75**0.5)
    assert min_distance(np.diag([0.01, 10, 10]), pair) == pytest.approx((0.005**2 + 50) ** 0.5)
    assert min_distance(np.eye(3), pair[:1]) == np.inf
    assert np.isnan(min_distance(np.eye(3) * np.nan, pair))


@pytest.mark.parametrize(
    "text",
    [
        SLAB,
        cell_cif(
            (4, 5, 6, 80, 95, 110),
            [("Na", 0.1, 0.2, 0.3), ("Cl", 0.6, 0.7, 0.8)],
            ("x,y,z", "-x,-y,-z", "x+1/2,y,z"),
        ),
        cell_cif((4, 4, 4, 90, 90, 90), [("Fe", 0, 0, 0), ("Ni", 0, 0, 0)], occupancies=(0.5, 0.5)),
    ],
)
def test_measurements_are_pymatgens(text: str) -> None:
    structure = pymatgen_core.Structure.from_str(text, fmt="cif")
    measured = measure(text)
    assert measured.n_sites == len(structure)
    assert measured.volume == pytest.approx(structure.volume, rel=1e-12)
    assert measured.density == pytest.approx(structure.density, rel=1e-12)
    assert measured.composition == pytest.approx(structure.composition.get_el_amt_dict())
    np.testing.assert_allclose(measured.crystal.lattice, structure.lattice.matrix)
    if len(structure) > 1:
        distances = structure.distance_matrix[np.triu_indices(len(structure), 1)]
        assert measured.min_distance == pytest.approx(distances.min(), rel=1e-9)
    ours = {(n, *np.round(f, 6)) for n, f in zip(measured.crystal.numbers, measured.crystal.frac)}
    assert len(ours) == len(structure)


def test_no_text_raises_anything_but_cif_error() -> None:
    for text in (SLAB[:n] for n in range(0, len(SLAB), 37)):
        try:
            parse_cif(text)
        except CIFError as error:
            assert error.reason


@pytest.mark.skipif(not (SHARED / "data/cif_corpus.jsonl.gz").exists(), reason="needs the shared corpus")
def test_acceptance_on_real_files_is_pymatgens() -> None:
    with gzip.open(SHARED / "data/cif_corpus.jsonl.gz", "rt") as lines:
        texts = [json.loads(line)["text"] for line in lines][::60]
    for text in texts:
        try:
            expected = len(pymatgen_core.Structure.from_str(text, fmt="cif"))
        except Exception:
            expected = None
        try:
            found = len(parse_cif(text).numbers)
        except CIFError:
            found = None
        assert found == expected
