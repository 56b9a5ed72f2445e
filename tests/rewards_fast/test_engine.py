"""The engine against the pymatgen reference, on texts of our own and on broken copies of them,
and against misuse."""

import asyncio
import itertools
import math
import multiprocessing
import os
import pickle
import platform
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards_fast import PVCP, CIFError, _core, min_distance, parse_cif, reference
from tests.oracles.cif_mutants import KINDS, mutants, of_kind
from tests.oracles.reward_agreement import Verdicts, compare
from tests.rewards_fast.cif_texts import SLAB, TARGET, cell_cif

CUBE = (4.0, 4.0, 4.0, 90, 90, 90)
PT = [("Pt", 0.1, 0.2, 0.3)]


def with_symmetry(lines: str, sites: str = "Pt Pt0 0.1 0.2 0.3\nO O1 0.6 0.7 0.8\n") -> str:
    return (
        "data_x\n_cell_length_a 4\n_cell_length_b 4\n_cell_length_c 4\n_cell_angle_alpha 90\n"
        "_cell_angle_beta 90\n"
        f"_cell_angle_gamma 90\n{lines}\nloop_\n_atom_site_type_symbol\n_atom_site_label\n"
        "_atom_site_fract_x\n"
        f"_atom_site_fract_y\n_atom_site_fract_z\n{sites}"
    )


PAULING = with_symmetry("", "").replace("_atom_site_fract_z\n", "_atom_site_fract_z\n_atom_site_occupancy\n")

# One text or more for each rule of pymatgen's reader; what the answer is, the reference says.
RULES = {
    "slab": SLAB,
    "no block": "Data_x\n",
    "block in prose": "words\n  data_" + SLAB[5:],
    "byte order mark": "\ufeff" + SLAB,
    "two blocks, the first broken": "data_a\n_cell_length_a 3\n" + SLAB,
    "two blocks of one name": SLAB + SLAB.replace("0.423", "0.433"),
    "powder block": "data_x powder_pattern\nloop_\n_a\n" + SLAB,
    "comment eats the rest of a carriage-return text": SLAB.replace("_cell_length_a", "# c\r_cell_length_a"),
    "comment in a quote": SLAB.replace("'x, y, z'", "'x, y, z' # 'c'"),
    "non-ASCII goes": SLAB.replace("5.500", "5.5\u22120\u00e5").replace(
        "_cell_length_b 5", "_cell_length_b\u20095"
    ),
    "text field": SLAB.replace("_cell_length_c 15.000", "_cell_length_c\n;15.000\n\n;"),
    "text field never closed": SLAB.replace("loop_\n_symmetry", ";\nloop_\n_symmetry"),
    "quote never closed": SLAB.replace("'x, y, z'", "'x, y, z"),
    "unquoted operation": SLAB.replace("1 'x, y, z'", "1 x,y,z"),
    "key takes the next word": SLAB.replace("_symmetry_Int_Tables_number 1", "_symmetry_Int_Tables_number"),
    "empty loop": SLAB + "loop_\n_a\n",
    "loop too short": SLAB + "loop_\n_a\n_b\n1\n",
    "end word": SLAB.replace("loop_\n_atom_site_type", "_eof\nloop_\n_atom_site_type"),
    "attached hydrogens": SLAB + "_atom_site_attached_hydrogens ?\n",
    "uncertainties": SLAB.replace("15.000", "15.000(3)"),
    "uncertainty cut": cell_cif(("4.(", 4, 4, 90, 90, 90), PT),  # type: ignore[arg-type]
    "Python's floats": cell_cif(("1_0", "4e0", ".4E1", "+90", 90.0, "9_0.0"), PT),  # type: ignore[arg-type]
    "thirds": cell_cif(CUBE, [("Pt", 0.3333, 0.6667, 0.33334)], ("x,y,z", "-y,x-y,z", "-x+y,-x,z")),
    "cell without thickness": cell_cif((4, 4, 0.009, 90, 90, 90), PT),
    "impossible angles": cell_cif((4, 4, 4, 30, 30, 120), PT),
    "negative length": cell_cif((-4, 4, 4, 90, 90, 90), PT),
    "nan length": cell_cif(("nan", 4, 4, 90, 90, 90), PT * 1 + [("O", 0, 0, 0)]),  # type: ignore[arg-type]
    "crystal system": "data_x\n_symmetry_cell_setting Cubic\n_cell_length_a 4\nloop_\n_atom_site_label\n"
    "_atom_site_fract_x\n_atom_site_fract_y\n_atom_site_fract_z\nPt 0 0 0\n",
    "crystal system, too little given": "data_x\n_symmetry_cell_setting tetragonal\n_cell_length_a 4\n",
    "a lattice attribute as the system": "data_x\n_symmetry_cell_setting volume\n_cell_length_a 4\n",
    "group by name": with_symmetry("_symmetry_space_group_name_H-M 'F m -3 m'"),
    "group by Hall key": with_symmetry("_space_group_name_Hall P6_3/mmc"),
    "group by number": with_symmetry("_space_group_IT_number 225"),
    "number out of range": with_symmetry("_space_group_IT_number 231"),
    "infinite number": with_symmetry("_space_group_IT_number 1e400"),
    "division by zero": with_symmetry("_symmetry_equiv_pos_as_xyz 'x+1/0,y,z'"),
    "fourth component": with_symmetry("_symmetry_equiv_pos_as_xyz 'x,y,z,1'"),
    "two points": with_symmetry("_symmetry_equiv_pos_as_xyz 'x+1.2.3,y,z'\n_space_group_IT_number 2"),
    "no operation at all": with_symmetry("_symmetry_equiv_pos_as_xyz foo"),
    "odd operations": with_symmetry(
        "loop_\n_symmetry_equiv_pos_as_xyz\n'2x+1/2y, 1/2/3+y, z-12'\n'x+12y,y,z'\n'x,y,z'"
    ),
    "water": with_symmetry("", "Wat W1 0.1 0.2 0.3\nO-H O1 0.6 0.7 0.8\nOH X 0 0 0\n"),
    "symbols": with_symmetry(
        "", "CO C1 0 0 0\nfe2+ F1 0.5 0 0\nXx D1 0 0.5 0\nQ Q1 0 0 0.5\n? ? 0.1 0 0\nD D 0.2 0 0\n"
    ),
    "oxidation states": with_symmetry(
        "loop_\n_atom_type_symbol\n_atom_type_oxidation_number\nPt2+ 2\nO2- -2\n",
        "Pt2+ P 0 0 0\nO O 0.5 0 0\nPt Q 0 0.5 0\n",
    ),
    "oxidation states unreadable": with_symmetry(
        "loop_\n_atom_type_symbol\n_atom_type_oxidation_number\nPt ?\n"
    ),
    "repeated row": cell_cif(CUBE, PT * 2),
    "partial rows": cell_cif(CUBE, [("Fe", 0, 0, 0), ("Ni", 1.0, 0, 0)], occupancies=(0.5, 0.5)),
    "occupancies": cell_cif(
        CUBE, [("Fe", 0, 0, 0), ("Ni", 0.5, 0, 0), ("Cu", 0, 0.5, 0)], occupancies=("?", ".", "0.5(1)")
    ),
    "image on a row": cell_cif(CUBE, [("Pt", 0.1, 0, 0), ("Pt", 0.9, 0, 0)], ("x,y,z", "-x,-y,-z")),
    "nearly the same place": cell_cif(
        CUBE, [("Pt", 0.1234, 0, 0), ("Pt", 0.1235, 0, 0), ("Pt", 0.12359, 0, 0)]
    ),
    "everything onto the origin": with_symmetry("_symmetry_equiv_pos_as_xyz 0,0,0"),
    "infinite coordinate": cell_cif(CUBE, [("Pt", "inf", 0, 0)]),  # type: ignore[list-item]
    "coordinate nan": cell_cif(CUBE, [("Pt", 0, "nan", 0)]),  # type: ignore[list-item]
    "many species on two places": cell_cif(
        CUBE,
        [(f"Q{'abcdefghijk'[i * 7 % 11]}", 0.1 + 0.5 * (i % 2), 0, 0) for i in range(40)] + PT,
        occupancies=[f"0.0{i % 9 + 1}" for i in range(40)] + [1],
    ),
    "isotopes of hydrogen on one place": cell_cif(
        CUBE, [(s, 0.5, 0.5, 0) for s in ("O", "H", "D", "H", "O", "T", "D")] + PT, occupancies=["0.01"] * 8
    ),
    "a Pauling row with a name again": PAULING + "'0.5Nb + 0.2Zr<sup> + 0.1Nb' Nb 0 0 0 1\n",
    "Pauling row": with_symmetry("", "").replace(
        "_atom_site_fract_z\n", "_atom_site_fract_z\n_atom_site_occupancy\n"
    )
    + "'0.8Nb(1) + 0.2Zr(1)' Nb,Zr 0 0 0 1\nO O 0.5 0 0 1\n",
    **{
        f"magnetic group, {name}": with_symmetry(lines, "Mn Mn0 0.1 0.2 0.25\nO O1 0 0 0.5\n")
        for name, lines in {
            "by name": "_space_group_magn.name_BNS \"P n' m a'\"",
            "by number": "_space_group_magn.number_BNS 62.448\n"
            "_space_group_magn.transform_BNS_Pp_abc 'a,b,c;0,0,0'",
            "hexagonal, centred": "_space_group_magn_number_BNS 166.97",
            "with an antitranslation": "_space_group_magn.name_BNS R_I-3c",
            "in another setting": "_space_group_magn.number_BNS 62.448\n"
            "_space_group_magn.transform_BNS_Pp_abc 'c,a,b;1/4,0,1/2'",
            "rhombohedral setting": "_space_group_magn.number_BNS 166.97\n"
            "_space_group_magn.transform_BNS_Pp_abc "
            "'2/3a+1/3b+1/3c,-1/3a+1/3b+1/3c,-1/3a-2/3b+1/3c;0,0,0'",
            "brackets": "_space_group_magn.number_BNS 14.79\n"
            "_space_group_magn.transform_BNS_Pp_abc '(a+b)/2,(b-a)/2,2c;0.25,0,0'",
            "unknown name": "_space_group_magn.name_BNS foo",
            "unknown number": "_space_group_magn.number_BNS 62.999",
            "number without a point": "_space_group_magn.number_BNS 62",
            "no number": "_space_group_magn.number_BNS a.b",
            "no setting": "_space_group_magn.number_BNS 62.448\n"
            "_space_group_magn.transform_BNS_Pp_abc 'a,b;0,0,0'",
            "flat setting": "_space_group_magn.number_BNS 62.448\n"
            "_space_group_magn.transform_BNS_Pp_abc 'a,a,c;0,0,0'",
            "two settings": "_space_group_magn.number_BNS 62.448\n"
            "_space_group_magn.transform_BNS_Pp_abc 'a,b,c;0,0,0'\n"
            "_space_group_magn.transform_BNS_Pp 'a,b,c;0,0,0'",
        }.items()
    },
    "a first occupancy of 1e-9": cell_cif(
        (5, 5, 5, 90, 90, 90),
        [("H", 0.1, 0.1, 0.1), ("C", 0.5, 0.5, 0.5), ("O", 0.3, 0.3, 0.3), ("Pt", 0.7, 0.7, 0.7)],
        occupancies=["1e-9", 1, 1, 1],
    ),
    "it hides an occupancy of 5": cell_cif(
        (5, 5, 5, 90, 90, 90), [("H", 0.1, 0.1, 0.1), ("C", 0.5, 0.5, 0.5)], occupancies=["1e-9", 5]
    ),
    "occupancies of 1e-9 alone": cell_cif(
        (5, 5, 5, 90, 90, 90),
        [("Fe", 0, 0, 0), ("Co", 0.5, 0.5, 0.5), ("O", 0.2, 0.2, 0.2)],
        occupancies=["1e-9"] * 3,
    ),
    "an occupancy of 1e-9 of a dummy, before an element without electronegativity": cell_cif(
        (6, 7, 8, 90, 90, 90), [("X", 0.1, 0.1, 0.1), ("Og", 0.5, 0.5, 0.5)], occupancies=["1e-9", 1]
    ),
    "the same with oxidation numbers": cell_cif(
        (6, 7, 8, 90, 90, 90), [("X", 0.1, 0.1, 0.1), ("Og", 0.5, 0.5, 0.5)], occupancies=["1e-9", 1]
    )
    + "loop_\n_atom_type_symbol\n_atom_type_oxidation_number\nFe3+ 3\n",
    "occupancies within the tolerance": cell_cif(
        (5, 5, 5, 90, 90, 90),
        [("Fe", 0, 0, 0), ("Fe", 0.5, 0.5, 0.5), ("Co", 0.3, 0, 0)],
        occupancies=["0.50000001", "0.5", "2e-8"],
    ),
    "rhombohedral, four digits": cell_cif(
        (5.951, 5.951, 28.875, 90, 90, 120),
        [("O", 0.5026, 1.0053, 0.125)],
        ("x,y,z", "2/3-y,1/3+x-y,1/3+z", "2/3-y,1/3-x,1/3+z"),
    ),
    "magnetic operations": with_symmetry(
        "loop_\n_space_group_symop_magn_operation.xyz\nx,y,z,+1\n-x,-y,-z,-1\nloop_\n"
        "_space_group_symop_magn_centering.xyz\n"
        "x,y,z,+1\nx+1/2,y,z,-1"
    ),
    "repeated column": with_symmetry("loop_\n_cell_length_q\n_cell_length_q\n1 2\n"),
    "scalars as sites": "data_x\n_symmetry_cell_setting cubic\n_cell_length_a 4\n_atom_site_label Pt\n"
    "_atom_site_fract_x 01\n"
    "_atom_site_fract_y 02\n_atom_site_fract_z 03\n",
}


def assert_like_the_reference(text: str) -> None:
    from tests.oracles.reward_agreement import TARGET as ANY
    from tests.oracles.reward_agreement import differences, judge

    scores = PVCP(extract=False).score([text], ANY)
    assert differences(text, judge(text), scores, 0) == []


@pytest.mark.parametrize("name", RULES)
def test_rules_of_pymatgen(name: str) -> None:
    pytest.importorskip("pymatgen.core")
    assert_like_the_reference(RULES[name])


def test_broken_copies_are_judged_as_by_the_reference() -> None:
    pytest.importorskip("pymatgen.core")
    for text in mutants([t for t in RULES.values() if t.count("\n") > 5], 400, seed=11):
        assert_like_the_reference(text)


@pytest.mark.parametrize("kind", KINDS)
def test_mutants_of_a_kind_are_judged_as_by_the_reference(kind: str) -> None:
    texts = [text for text in of_kind(kind, 40, seed=3) if not ("X A" in text and "e-9" in text)]
    found = [(text, what) for text, what in compare(texts, Verdicts())]
    assert found == []


def test_the_rhombohedral_text_has_three_sites() -> None:
    assert PVCP(extract=False).score([RULES["rhombohedral, four digits"]]).n_sites[0] == 3


ORDER_OF_SUMS = """
import sys, warnings
import numpy as np
from rewards_fast import PVCP
from tests.oracles.cif_mutants import of_kind
from tests.oracles.reward_agreement import judge
warnings.simplefilter("ignore")
texts = [text for text in of_kind("rhombohedral", 60, seed=5) if "_as_xyz" in text]
ours = PVCP(extract=False).score(texts).n_sites
theirs = [(judge(text) or {}).get("n_sites", np.nan) for text in texts]
print(sum(a != b and not (np.isnan(a) and np.isnan(b)) for a, b in zip(ours, theirs)), len(texts))
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="kernels of x86-64")
@pytest.mark.parametrize("kernels", ["Haswell", "SkylakeX", "Zen"])
def test_the_order_of_sums_is_that_of_openblas_with_avx2(kernels: str) -> None:
    """Images on the tolerance depend on the last digit of a sum,
    and so pymatgen's answer on the BLAS that NumPy carries."""
    environment = {**os.environ, "OPENBLAS_CORETYPE": kernels, "OPENBLAS_NUM_THREADS": "1"}
    environment.pop("OPENBLAS_L2_SIZE", None)
    run = [sys.executable, "-c", ORDER_OF_SUMS]
    printed = subprocess.run(run, env=environment, capture_output=True, text=True, check=True).stdout.split()
    wrong, texts = int(printed[-2]), int(printed[-1])
    assert texts > 20
    assert wrong == 0


@settings(max_examples=200)
@given(
    lengths=st.tuples(*[st.floats(0.3, 12)] * 3),
    skew=st.tuples(*[st.floats(-3, 3)] * 3),
    frac=st.lists(st.tuples(*[st.floats(-1, 2)] * 3), min_size=2, max_size=40),
)
def test_min_distance_is_the_references(
    lengths: tuple[float, ...], skew: tuple[float, ...], frac: list[tuple[float, ...]]
) -> None:
    lattice = np.diag(lengths)
    lattice[1, 0], lattice[2, 0], lattice[2, 1] = (s * lengths[0] for s in skew)
    expected = reference.min_distance(lattice, np.array(frac))
    assert min_distance(lattice, np.array(frac)) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_products_and_sums_of_a_distance_are_not_fused() -> None:
    """In the unit cube a distance is x * x + y * y + z * z as NumPy rounds it,
    whatever the instruction set."""
    for pair in np.random.default_rng(2).uniform(0, 0.28, (300, 2, 3)):
        x, y, z = pair[1] - pair[0]
        assert min_distance(np.eye(3), pair) == np.sqrt(x * x + y * y + z * z)


@pytest.mark.parametrize("n", [50, 129, 700, 3000, 5000])
@pytest.mark.parametrize("shape", ["cube", "needle", "plate", "cluster", "rows"])
def test_min_distance_of_many_sites(n: int, shape: str) -> None:
    """Against a k-d tree over the 27 nearest copies of a cell that is nearly orthogonal."""
    spatial = pytest.importorskip("scipy.spatial")
    generator = np.random.default_rng(n)
    lengths = {"needle": (1.0, 1.5, 400.0), "plate": (90.0, 80.0, 1.2)}.get(shape, (30.0, 28.0, 33.0))
    lattice = np.diag(lengths)
    lattice[1, 0] = 0.3 * lengths[0]
    frac = generator.random((n, 3))
    if shape == "cluster":
        frac = 0.4 + 0.01 * frac
    if shape == "rows":
        frac[:, :2] = np.round(frac[:, :2] * 3) / 3
    shifts = np.stack(np.meshgrid(*[np.arange(-2, 3)] * 3, indexing="ij"), -1).reshape(-1, 3)
    wrapped = frac - np.floor(frac)
    best = np.inf
    tree = spatial.cKDTree(wrapped @ lattice)
    for shift in shifts:  # copies of all sites, a site's own copy left out
        distances, index = tree.query((wrapped + shift) @ lattice, k=2, distance_upper_bound=best)
        other = np.where(index == np.arange(n)[:, None], np.inf, distances)
        best = min(best, float(other.min()))
    assert min_distance(lattice, frac) == pytest.approx(best, rel=1e-9)


def test_an_empty_batch_and_one_site() -> None:
    assert len(PVCP().score([])) == 0
    assert math.isinf(min_distance(np.eye(3), np.zeros((1, 3)))) and math.isinf(
        min_distance(np.eye(3), np.zeros((0, 3)))
    )
    assert math.isnan(min_distance(np.zeros((3, 3)), np.zeros((2, 3))))


def test_threads_do_not_matter() -> None:
    texts = list(mutants(list(RULES.values()), 600, seed=3))
    one, four = (PVCP(threads=t).score(texts, TARGET) for t in (1, 4))
    np.testing.assert_array_equal(one.total, four.total)
    np.testing.assert_array_equal(one.min_distance, four.min_distance)
    assert one.reason == four.reason
    for a, b in zip(one.crystals, four.crystals):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            np.testing.assert_array_equal(a.frac, b.frac)
            assert a.composition == b.composition


def test_many_python_threads_share_one_scorer() -> None:
    scorer = PVCP(threads=2)
    texts = [SLAB, "junk", SLAB.replace("Cu", "Ni")] * 40
    expected = scorer.score(texts, TARGET).total
    with ThreadPoolExecutor(8) as pool:
        for scores in pool.map(lambda _: scorer.score(texts, TARGET), range(24)):
            np.testing.assert_array_equal(scores.total, expected)


def _score_in_child(queue: "multiprocessing.Queue[float]") -> None:
    queue.put(float(PVCP(threads=2).score([SLAB] * 64, TARGET).total.sum()))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_after_fork() -> None:
    PVCP(threads=2).score([SLAB] * 64, TARGET)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_score_in_child, args=(queue,))
    child.start()
    assert queue.get(timeout=30) == pytest.approx(640.0)
    child.join(30)
    assert child.exitcode == 0


def test_asyncio_and_pickle() -> None:
    async def both() -> list[float]:
        calls = [asyncio.to_thread(PVCP().score, [SLAB], TARGET) for _ in range(4)]
        return [float(s.total[0]) for s in await asyncio.gather(*calls)]

    assert asyncio.run(both()) == pytest.approx([10.0] * 4)
    scores = pickle.loads(pickle.dumps(PVCP().score([SLAB, "x"], TARGET)))
    assert scores.reason == [None, "no_block"] and scores.crystals[1] is None
    assert scores.crystals[0].numbers.tolist() == [78, 29, 78, 78, 6, 8]


ENORMOUS = {
    "100 MB of words": lambda: "data_x\n" + "word " * 20_000_000,
    "a million rows": lambda: cell_cif(CUBE, []) + "Pt Pt 0.1 0.2 0.3 1\n" * 800_000,
    "many different rows": lambda: cell_cif(
        CUBE, [("Pt", i % 97 / 97, i // 97 % 89 / 89, i / 90_000) for i in range(90_000)]
    ),
    "a million images": lambda: cell_cif(
        CUBE, [("Pt", i / 1500, 0.1, 0.2) for i in range(1500)], [f"x+0.{i:04d},y,z" for i in range(900)]
    ),
    "tiny cell": lambda: cell_cif((1e-300, 1e-300, 1e-300, 90, 90, 90), PT),
    "NULs": lambda: "data_\x00\n_cell_length_a \x00\n" + "\x00" * 100_000,
    "quotes": lambda: "data_x\n" + "'a" * 1_000_000,
    "blocks": lambda: "data_x\n" * 500_000,
    "columns": lambda: "data_x\nloop_\n" + "_atom_site_label\n" * 300_000 + "x " * 300_000,
    "operation of digits": lambda: with_symmetry("_symmetry_equiv_pos_as_xyz '" + "1" * 2_000_000 + "x,y,z'"),
    "one place": lambda: cell_cif(
        (900, 900, 900, 90, 90, 90),
        [("Pt", 0.5 + i % 40 / 5e3, i // 40 % 40 / 5e3, i // 1600 / 5e3) for i in range(40_000)],
    ),
    "white space": lambda: "data_x\n" + " \n" * 2_000_000 + SLAB,
    "dummies": lambda: cell_cif(
        CUBE,
        [
            ("X" + chr(97 + i % 26) + chr(97 + i // 26 % 26) + "q" * (i // 676), i / 5e4, 0, 0)
            for i in range(20_000)
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ENORMOUS)
def test_enormous_texts_end_soon(name: str) -> None:
    text = ENORMOUS[name]()
    start = time.perf_counter()
    scores = PVCP(extract=False).score([text], TARGET)
    assert time.perf_counter() - start < 30
    assert math.isfinite(scores.total[0])
    assert scores.reason[0] is not None or scores.n_sites[0] > 0


ROWS = {
    "species of one place": lambda n: [f"Q{a}{b} 0 0 0 .0001" for a in LETTERS for b in LETTERS] * (n // 60),
    "species of two places": lambda n: (
        [f"Q{a}{b} 0 0 .{z} .0001" for a in LETTERS for b in LETTERS for z in (1, 6)] * (n // 120)
    ),
    "one place": lambda n: ["Pt 0 0 0 .00001"] * (10 * n),
    "places far nearer than the tolerance": lambda n: [f"Pt 0 0 {i}e-15 .00001" for i in range(10 * n)],
    "two places": lambda n: ["Pt 0 0 0 .00001", "Pt 0 0 .5 .00001"] * (5 * n),
}
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def score_seconds(text: str) -> float:
    begin = time.process_time()
    PVCP(threads=1, extract=False).score([text], "")
    return time.process_time() - begin


@pytest.mark.parametrize("name", ROWS)
def test_rows_on_one_place_take_linear_time(name: str) -> None:
    """They are added up species by species. It took 10 s, or the square of the number of rows."""
    head = cell_cif(CUBE, []).replace("_atom_site_type_symbol\n", "")
    short, long = (
        min(score_seconds(head + "\n".join(ROWS[name](n)) + "\n") for _ in range(3)) for n in (1000, 4000)
    )
    assert long < min(8 * short + 0.05, 2)


def test_a_symbol_of_many_elements_takes_linear_time() -> None:
    names = ["".join(letters) for letters in itertools.product(LETTERS, repeat=4)]
    short, long = (
        min(
            score_seconds(PAULING + f"'{' + '.join('0.1' + name for name in names[:n])}' Pt 0 0 0 1\n")
            for _ in range(3)
        )
        for n in (10_000, 40_000)
    )
    assert long < 8 * short + 0.05


def test_reasons_name_what_is_wrong() -> None:
    for text, reason in (
        ("hello", "no_block"),
        (SLAB + "loop_\n_a\n_b\n1\n", "loop"),
        (SLAB.replace("_cell_length_a 5.500\n", ""), "cell"),
        (cell_cif(CUBE, PT * 2), "occupancy"),
        (cell_cif(CUBE, [("Pt", "?", 0, 0)]), "number"),  # type: ignore[list-item]
        (cell_cif(CUBE, [("?", 0, 0, 0)]), "sites"),
        (with_symmetry("_symmetry_equiv_pos_as_xyz 'x+1/0,y,z'"), "symmetry"),
        ("data_x\n" + "x " * 9_000_000, "limit"),
    ):
        with pytest.raises(CIFError) as caught:
            parse_cif(text)
        assert caught.value.reason == reason


def test_the_page_has_the_reasons_of_the_engine() -> None:
    """One table, csrc/cif/reasons.h: the page and the messages of errors say the same."""
    page = (Path(__file__).parents[2] / "docs" / "rewards" / "reasons.md").read_text(encoding="utf-8")
    table = page.partition("| reason |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.*) \| (.*) \|$", table, re.MULTILINE)
    assert rows == [(code, *texts) for code, texts in _core.REASONS.items()]
    assert all(f"'{code}'\n```" in page for code in _core.REASONS), "each has an example, which is run"
    with pytest.raises(CIFError, match=re.escape(_core.REASONS["no_block"][0])):
        parse_cif("no CIF at all")
