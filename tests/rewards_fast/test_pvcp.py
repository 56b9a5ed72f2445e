"""The PVCP formulas on texts whose score follows from the paper's equations by hand."""

import math
import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pymatgen.core import Structure

from rewards_fast import PVCP, CIFError, Crystal, Scores, Thresholds, parse_cif, parse_target
from rewards_fast.reference import composition_score
from tests.rewards_fast.cif_texts import SLAB, TARGET, cell_cif

CUBE = (4.0, 4.0, 4.0, 90, 90, 90)


def score(text: str, target: object = "", **options: object) -> Scores:
    return PVCP(**options).score([text], [target])  # type: ignore[arg-type, list-item]


def test_a_perfect_text_gets_ten() -> None:
    result = score(SLAB, TARGET)
    assert result.total[0] == pytest.approx(10.0)
    assert result.reason == [None]
    assert result.n_sites[0] == 6
    assert result.volume[0] == pytest.approx(5.5 * 5.5 * 15 * math.sqrt(3) / 2)
    assert result.min_distance[0] == pytest.approx(0.077 * 15)
    assert result.fields["lattice"][0] and result.fields["space_group"][0] and result.fields["site_loop"][0]
    assert not result.fields["duplicate_labels"][0]


def test_crystal_keeps_the_order_of_the_file() -> None:
    crystal = parse_cif(SLAB)
    assert crystal.numbers.tolist() == [78, 29, 78, 78, 6, 8]
    assert crystal.numbers.dtype == np.int64 and crystal.frac.dtype == np.float64
    np.testing.assert_allclose(crystal.frac[1], [0.5, 0, 0.3])
    assert crystal.composition == {"Pt": 3, "Cu": 1, "C": 1, "O": 1}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no crystal here",
        "data_x\n",
        "data_x\nloop_\n_a\n_b\n1 2 3\n",
        SLAB.replace("_cell_length_a 5.500\n", ""),
    ],
)
def test_what_does_not_parse_has_every_floor(text: str) -> None:
    result = score(text, TARGET)
    assert (result.comp[0], result.parse[0], result.valid[0], result.phys[0]) == (-15, -20, -10, -10)
    assert result.total[0] == -15
    assert isinstance(result.reason[0], str)
    assert result.crystals == [None]
    with pytest.raises(CIFError) as caught:
        parse_cif(text)
    assert caught.value.reason == result.reason[0]


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ({"Pt": 20}, 10),
        ({"Pt": 20.0009}, 10),
        ({"Pt": 20.9}, 8),
        ({"Pt": 21}, 5),
        ({"Pt": 22}, 2),
        ({"Pt": 24}, -2),
        ({"Pt": 26}, -5),
        ({"Pt": 30}, -10),
        ({"Pt": 20, "O": 1}, -7),
        ({"Pt": 20, "O": 1, "C": 2, "Xx": 1}, -11),
        ({"Pt": 20, "O": 0.0009}, 10),
        ({"O": 20}, -10),
        ({f"{c}x": 1 for c in "ABCDEFGH"} | {"Pt": 20}, -15),
    ],
)
def test_composition_score(counts: dict[str, float], expected: float) -> None:
    assert composition_score(counts, {"Pt": 20})[0] == expected


def test_missing_elements_count_before_extra_ones() -> None:
    assert composition_score({"Cu": 1}, {"Pt": 1, "O": 2, "C": 1}) == (
        -14.0,
        3,
        1,
        pytest.approx(math.nan, nan_ok=True),
    )
    assert composition_score({"Cu": 1}, {"Pt": 1, "O": 2, "C": 1, "N": 1})[0] == -15.0


def test_an_empty_target_leaves_the_composition_out() -> None:
    for target in ("", None, {}):
        result = score(SLAB, target)
        assert result.comp[0] == 0.0
        assert result.total[0] == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("CHCH2OH</s>Ca8Ga16 (1 0 0)", {"C": 2, "H": 4, "O": 1, "Ca": 8, "Ga": 16}),
        ("CCH</s>Sb48 (2 -1 2)</s>[C Sb atop [Sb C]]", {"C": 2, "H": 1, "Sb": 48}),
        ("*CO</s>Pt9Cu3 (1 1 1)", {"C": 1, "O": 1, "Pt": 9, "Cu": 3}),
        ("CO</s>C2Pt9 (1 1 1) is the basic identification. Generate.", {"C": 3, "O": 1, "Pt": 9}),
        ("Ca(OH)2", {"Ca": 1, "O": 2, "H": 2}),
        ("D2O", {"H": 2, "O": 1}),
        ({"T": 1, "H": 2, "O": 0}, {"H": 3}),
        ({"Pt": 1.5}, {"Pt": 1.5}),
        (None, {}),
        ("", {}),
    ],
)
def test_parse_target(target: object, expected: dict[str, float]) -> None:
    assert parse_target(target) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "target", ["Pt9Xx3", "pt", "CO</s>", "Ca(OH", {"Pt": -1}, {"Q": 1}, {"Pt": math.nan}]
)
def test_a_wrong_target_is_an_error(target: object) -> None:
    with pytest.raises(ValueError):
        parse_target(target)  # type: ignore[arg-type]


def test_coordinates_are_tested_as_written() -> None:
    text = cell_cif(
        CUBE, [("Pt", 1.2, 0, 0), ("Pt", 0.5, -0.11, 0), ("Pt", 0.5, 0.5, 1.1), ("Pt", 0, 0.5, -0.1)]
    )
    result = score(text)
    assert result.terms["bad_coords"][0] == 2
    assert result.valid[0] == pytest.approx(9.0)
    assert np.all((result.crystals[0].frac >= 0) & (result.crystals[0].frac < 1))  # type: ignore[union-attr]


def test_coordinate_penalty_is_capped() -> None:
    sites = [("Pt", 1.2 + 0.1 * i, 0, 0.1 * i) for i in range(8)]
    result = score(cell_cif((30, 30, 30, 90, 90, 90), sites))
    assert result.terms["coord_penalty"][0] == 3.0


@pytest.mark.parametrize(("distance", "penalty"), [(0.3, 8), (0.6, 3), (0.98, 3), (1.2, 0)])
def test_distance_penalty(distance: float, penalty: float) -> None:
    text = cell_cif((10, 10, 10, 90, 90, 90), [("O", 0, 0, 0), ("H", distance / 10, 0, 0)])
    assert score(text).terms["distance_penalty"][0] == penalty
    if distance == 0.98:
        assert score(text, thresholds={"near": 0.7}).terms["distance_penalty"][0] == 0
        assert score(text, thresholds=Thresholds(near=0.7)).phys[0] == 8.0  # 500 Å^3 an atom


def test_one_site_has_no_pair() -> None:
    result = score(cell_cif((0.6, 0.6, 20, 90, 90, 90), [("Pt", 0, 0, 0)]))
    assert math.isinf(result.min_distance[0])
    assert result.terms["distance_penalty"][0] == 0


def test_volume_density_and_volume_per_atom() -> None:
    tiny = score(cell_cif((0.9, 0.9, 0.9, 90, 90, 90), [("Pt", 0, 0, 0)]))
    assert tiny.terms["volume_penalty"][0] == 3 and tiny.terms["density_penalty"][0] == 2
    assert tiny.terms["volume_per_atom_penalty"][0] == 4
    huge = score(cell_cif((50, 50, 50, 90, 90, 90), [("H", 0, 0, 0)]))
    assert huge.terms["volume_penalty"][0] == 3 and huge.terms["density_penalty"][0] == 2
    assert huge.terms["volume_per_atom_penalty"][0] == 2


def test_more_than_a_thousand_sites() -> None:
    sites = [("Pt", (i % 11) / 11, (i // 11 % 10) / 10, (i // 110) / 10) for i in range(1001)]
    assert score(cell_cif((33, 33, 33, 90, 90, 90), sites)).terms["sites_penalty"][0] == 2


def test_undefined_numbers_take_the_penalty_and_rewards_stay_finite() -> None:
    dummy = score(cell_cif(CUBE, [("Xx", 0, 0, 0), ("Pt", 0.5, 0.5, 0.5)]), "Pt")
    assert math.isnan(dummy.density[0]) and dummy.terms["density_penalty"][0] == 2
    assert dummy.comp[0] == -7 and dummy.crystals[0].numbers.tolist() == [0, 78]  # type: ignore[union-attr]
    for cell in (
        ("nan", 4, 4, 90, 90, 90),
        ("inf", 4, 4, 90, 90, 90),
        (4, 4, 4, "nan", 90, 90),
        (1e200, 1e200, 1e200, 90, 90, 90),
    ):
        result = score(
            cell_cif(cell, [("Pt", 0, 0, 0), ("Pt", 0.5, 0.5, 0.5)]),  # type: ignore[arg-type]
            "Pt2",
        )
        assert np.isfinite(result.total[0])


def test_species_rules() -> None:
    heavy_water = cell_cif((5, 5, 5, 90, 90, 90), [("D", 0, 0, 0), ("T", 0.5, 0, 0), ("O", 0.5, 0.5, 0)])
    assert score(heavy_water, "H2O").comp[0] == 10
    charged = cell_cif(CUBE, [("Na1+", 0, 0, 0), ("Cl1-", 0.5, 0.5, 0.5)])
    assert score(charged, "NaCl").comp[0] == 10
    half = cell_cif(CUBE, [("Fe", 0, 0, 0), ("Ni", 0, 0, 0)], occupancies=(0.5, 0.25))
    result = score(half, {"Fe": 0.5, "Ni": 0.25})
    assert result.comp[0] == 10 and result.n_sites[0] == 1


def test_symmetry_images_follow_their_row() -> None:
    crystal = parse_cif(
        cell_cif(CUBE, [("Pt", 0.1, 0, 0), ("O", 0.3, 0, 0)], symmetry=("x, y, z", "-x, -y, -z"))
    )
    assert crystal.numbers.tolist() == [78, 78, 8, 8]
    np.testing.assert_allclose(crystal.frac[:, 0], [0.1, 0.9, 0.3, 0.7])


def test_duplicate_labels_are_reported() -> None:
    assert score(SLAB.replace("Pt Pt2", "Pt Pt0")).fields["duplicate_labels"][0]


def test_weights_and_argument_checks() -> None:
    assert score(SLAB, TARGET, weights=(1, 0, 0, 0)).total[0] == 10
    assert score("", TARGET, weights={"comp": 0.0}).total[0] == pytest.approx(-6)
    with pytest.raises(ValueError, match="targets"):
        PVCP().score([SLAB], ["Pt", "Cu"])
    with pytest.raises(TypeError):
        PVCP().score(SLAB, "Pt")
    with pytest.raises(TypeError):
        PVCP().score([b"data_x"], "Pt")  # type: ignore[list-item]
    with pytest.raises(ValueError):
        PVCP(threads=0)
    with pytest.raises(TypeError):
        PVCP(thresholds={"nearest": 1.0})
    assert len(PVCP().score([], [])) == 0


def test_errors_and_results_survive_pickle() -> None:
    error = pickle.loads(pickle.dumps(CIFError("loop", "a row too short")))
    assert error.reason == "loop" and str(error) == "a row too short"
    crystal = pickle.loads(pickle.dumps(parse_cif(SLAB)))
    assert isinstance(crystal, Crystal) and len(crystal.numbers) == 6
    assert pickle.loads(pickle.dumps(PVCP())).score([SLAB], [TARGET]).total[0] == pytest.approx(10)


def test_import_is_light() -> None:
    code = (
        "import sys, rewards_fast; print(sorted({'pymatgen', 'torch', 'catmllm', 'ase'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_scores_are_views_of_their_rows() -> None:
    from rewards_fast import _core
    from rewards_fast.pvcp import SCORE_NAMES, TERM_NAMES

    assert (*SCORE_NAMES, *TERM_NAMES) == _core.SCORE_COLUMNS
    scores = PVCP().score([SLAB, "x"], TARGET)
    arrays = [getattr(scores, name) for name in SCORE_NAMES] + list(scores.terms.values())
    np.testing.assert_array_equal(np.stack(arrays, 1), scores.rows)
    assert not hasattr(scores, "missing") and "total=array" in repr(scores)
    again = pickle.loads(pickle.dumps(scores))
    np.testing.assert_array_equal(again.total, scores.total)
    assert again.fields["lattice"].tolist() == [True, False]


NEEDLE = cell_cif((0.6, 0.6, 166, 90, 90, 90), [("Pt", 0, 0, 0), ("Pt", 0, 0, 0.02)])


def test_own_images_of_a_needle() -> None:
    assert PVCP().score([NEEDLE], {"Pt": 2}).total[0] == pytest.approx(10)  # Eq. 41: different sites alone
    seen = PVCP(thresholds={"own_images": True}).score([NEEDLE], {"Pt": 2})
    assert seen.min_distance[0] == pytest.approx(0.6) and seen.phys[0] == 7
    one = cell_cif((0.4, 5, 30, 90, 90, 90), [("Pt", 0, 0, 0)])
    assert PVCP().score([one]).phys[0] == 10
    assert PVCP(thresholds={"own_images": True}).score([one]).phys[0] == 2


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0.3, 12), min_size=3, max_size=3), st.lists(st.floats(35, 145), min_size=3, max_size=3)
)
def test_own_images_are_pymatgens_neighbours(lengths: list[float], angles: list[float]) -> None:
    """Against pymatgen's list of all images within reach, a site's own among them."""
    text = cell_cif((*lengths, *angles), [("Pt", 0.1, 0.2, 0.3), ("O", 0.55, 0.7, 0.9)])
    seen = PVCP(thresholds={"own_images": True}).score([text])
    assume(seen.reason == [None])
    structure = Structure.from_str(text, fmt="cif")
    reach = float(min(structure.lattice.abc)) * 1.0001
    assume(structure.volume > 0.05 and reach**3 / structure.volume < 1e4)
    distances = structure.get_neighbor_list(reach)[3]
    assert seen.min_distance[0] == pytest.approx(distances[distances > 1e-8].min(), rel=1e-9)
