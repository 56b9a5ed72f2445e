"""Whatever a CIF is wrapped in, the score is that of the CIF as strict mode scores it."""

import re
import warnings

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from pymatgen.core import Structure
from pymatgen.io.cif import CifParser

from rewards_fast import PVCP, extract_cif
from tests.oracles.cif_mutants import mutants
from tests.oracles.reward_agreement import SHARED, corpus
from tests.rewards_fast.answer_formats import DRAFT, FORMATS
from tests.rewards_fast.cif_texts import SLAB, TARGET, cell_cif

STRICT, FOUND = PVCP(threads=1, extract=False), PVCP(threads=1)


def same_scores(answers: list[str], cifs: list[str]) -> np.ndarray:
    """Which answers are scored as their CIFs are, every number of the row."""
    a, b = FOUND.score(answers, TARGET).rows, STRICT.score(cifs, TARGET).rows
    return np.all((a == b) | (np.isnan(a) & np.isnan(b)), axis=1)


@pytest.mark.parametrize("name", FORMATS)
def test_the_cif_is_found(name: str) -> None:
    assert STRICT.score([DRAFT], [TARGET]).total[0] < 5  # a draft that wins is seen
    assert FOUND.score([FORMATS[name](SLAB)], [TARGET]).total[0] == pytest.approx(10.0)


FIELD = SLAB.replace(
    "_cell_volume 392.954", "_x\n;\n<think>\n```\n</answer>\ndone <|im_end|> so far\n;\n_cell_volume 392.954"
)
ODD = {
    "text field with markup": FIELD,
    "quoted tags": SLAB.replace("_cell_volume 392.954", "_a '<think>'\n_b \"x </answer> y\"\n_c '```'"),
    "a tag as a value": SLAB.replace("_cell_volume 392.954", "_a <think>\n_b <0.001\n_c H<sub>2</sub>O"),
    "a formula without quotes": SLAB.replace("'Cu1 Pt3 C1 O1'", "Cu1 Pt3 C1 O1"),
    "no newline at the end": SLAB.rstrip(),
    "a value on the next line": SLAB.replace("_cell_volume 392.954", "_a\n'two words'\n_b\nvalue"),
    "a cell behind the sites": SLAB.replace("_cell_length_c 15.000\n", "") + "_cell_length_c 15.000\n",
    "two blocks": "data_global\n_journal_year 2026\n" + SLAB,
    "one site": cell_cif((4, 4, 4, 90, 90, 90), [("Pt", 0, 0, 0)]),
    "operations last": cell_cif((4, 5, 6, 90, 90, 90), [("Pt", 0.1, 0, 0)]).replace(
        "loop_\n_symmetry_equiv_pos_as_xyz\n'x, y, z'\n", ""
    )
    + "loop_\n_symmetry_equiv_pos_as_xyz\nx,y,z\n'-x, -y, -z'\n",
    "labels alone": SLAB.replace("_atom_site_type_symbol\n", "").replace("\nPt Pt", "\nPt")
    .replace("\nCu Cu", "\nCu").replace("\nC C", "\nC").replace("\nO O", "\nO"),
    "a row over two lines": SLAB.replace("Pt Pt3 1 0.500", "Pt Pt3 1\n0.500"),
    "comments": SLAB.replace("loop_\n_atom_site", "# sites\nloop_\n_atom_site")
    .replace("0.500 1\n", "0.500 1 # O\n"),
}  # fmt: skip


@pytest.mark.parametrize("odd", ODD)
def test_odd_cifs_in_every_format(odd: str) -> None:
    cif = ODD[odd]
    assert STRICT.score([cif], [TARGET]).reason == [None]
    lines = ("quotation", "indented", "fence indented by a tab")  # of the CIF, or of a draft before it
    names = [
        name
        for name in FORMATS
        if odd != "text field with markup" or name == "indented marks" or not any(x in name for x in lines)
    ]
    same = same_scores([FORMATS[name](cif) for name in names], [cif] * len(names))
    assert [name for name, equal in zip(names, same) if not equal] == []


def test_text_fields_in_indented_and_quoted_cifs() -> None:
    field = SLAB.replace("_cell_volume 392.954", "_x\n;\nprose of many words\n;\n_cell_volume 392.954")
    for name in ("quotation", "indented", "indented fence", "fence indented by a tab"):
        assert same_scores([FORMATS[name](field)], [field]).all(), name
        assert extract_cif(FORMATS[name](field)).strip() == field.strip()


@pytest.mark.skipif(not SHARED.exists(), reason="no shared corpus here")
def test_real_cifs_in_every_format() -> None:
    texts = [text for text in corpus()[::30] if STRICT.score([text], [TARGET]).reason == [None]]
    wrong = {}
    for name, wrap in FORMATS.items():
        same = same_scores([wrap(text) for text in texts], texts)
        if not same.all():
            wrong[name] = int((~same).sum())
    assert wrong == {}


def test_a_damaged_row_is_not_repaired() -> None:
    rows = {
        "too short": SLAB.replace("Pt Pt3 1 0.500 0.500 0.300 1", "Pt Pt3 1 0.500 0.500 0.300"),
        "too long": SLAB.replace("Pt Pt3 1 0.500 0.500 0.300 1", "Pt Pt3 1 0.500 0.500 0.300 1 7"),
        "a garbled number": SLAB.replace("Pt Pt3 1 0.500 0.500", "Pt Pt3 1 0.2.500 0.500"),
        "garbled and last": SLAB.replace("O O5 1 0.000 0.000 0.500 1", "O O5 1 zero 0.000 0.500 1"),
        "last too short": SLAB.replace("O O5 1 0.000 0.000 0.500 1", "O O5 1 0.000 0.000"),
        "last cut off": SLAB.replace("O O5 1 0.000 0.000 0.500 1\n", "O"),
        "last too long": SLAB.replace("O O5 1 0.000 0.000 0.500 1", "O O5 1 0.000 0.000 0.500 1 1"),
    }
    for name, broken in rows.items():
        assert STRICT.score([broken], [TARGET]).total[0] == -15, name
        for wrap in ("bare", "fence", "think, answer", "chatml", "json", "same line"):
            assert FOUND.score([FORMATS[wrap](broken)], [TARGET]).total[0] == -15, (name, wrap)
    for wrap in ("Done.", "bullets", "Chinese", "digits in prose"):
        assert FOUND.score([FORMATS[wrap](rows["too short"])], [TARGET]).total[0] == -15, wrap


# Rows of which pymatgen passes over the site, or refuses the text: {place} is their four numbers.
DAMAGED = [
    "78 1 1 {place}", "? 5 1 {place}", "8 O5 1 {place}", "8 O5 1 ? ? ? 1", "xx xx5 1 {place}",
    "Xx Xx5 1 ? ? ? 1", "78 3 1 0.x 0.5 0.5 1", "8 O5 1 zero 0.0 0.5 1", "2 a 1 ? . 2 1", "2 ) 1 2 ? ? x",
]  # fmt: skip
UNLIKE = ["...", "(two more)", "# C\n...", "Pt 3 1 {place} x"]  # behind a whole CIF they are prose
FIRST, MIDDLE, LAST = (SLAB.splitlines()[i] for i in (-6, -3, -1))
PARAGRAPHS = {
    "one": lambda cif: cif,
    "a line each": lambda cif: cif.replace("\n", "\n\n"),
}


def pymatgen_reads(text: str) -> Structure | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return CifParser.from_str(text).parse_structures(primitive=False)[0]
        except ValueError:
            return None


@pytest.mark.parametrize(
    ("of", "row"),
    [(of, row) for of in (FIRST, MIDDLE, LAST) for row in DAMAGED]
    + [(of, row) for of in (FIRST, MIDDLE) for row in UNLIKE],
)
def test_no_row_is_cut_together_with_those_after_it(of: str, row: str) -> None:
    """What is scored is what pymatgen reads of the CIF as it stands."""
    cif = SLAB.replace(of, row.format(place=of.split(" ", 3)[3]))
    expected = pymatgen_reads(cif)
    assert (expected is None) == (STRICT.score([cif], [TARGET]).reason != [None])
    for split in PARAGRAPHS.values() if row in DAMAGED else [PARAGRAPHS["one"]]:
        for wrap in ("bare", "Done.", "fence", "chatml"):
            answer = FORMATS[wrap](split(cif))
            assert same_scores([answer], [cif]).all(), (wrap, extract_cif(answer))
            assert pymatgen_reads(extract_cif(answer)) == expected


def test_a_row_quoted_in_prose_is_no_part_of_the_cif() -> None:
    for prose in (
        "\nThe adsorbate is\nO O5 1 0.000 0.000 0.500 1\n",
        "Done.\n\nO O5 1 0.000 0.000 0.500 1\n",
    ):
        assert FOUND.score([SLAB + prose], [TARGET]).total[0] == pytest.approx(10.0)


def test_prose_between_a_loop_and_a_key_stands_inside() -> None:
    inside = SLAB.replace("_cell_length_c 15.000\n", "") + "Now the third length:\n_cell_length_c 15.000\n"
    assert FOUND.score([inside, "Sure:\n" + inside], TARGET).total.tolist() == [-15, -15]


def test_the_last_whole_cif_counts() -> None:
    half = SLAB[: SLAB.index("Pt Pt2")] + "Pt Pt2 1 0.0\n"
    for answer in (f"{DRAFT}\nBetter:\n{SLAB}", f"{SLAB}\nOnce more:\n{half}",
                   f"```\n{SLAB}```\nor\n```\n{half}```", f"```\n{DRAFT}```\nor\n{SLAB}",
                   f"{half}\nNo.\n{SLAB}", f"{half}{SLAB}",
                   f"{SLAB}data_ is the begin of it.\n"):  # fmt: skip
        assert FOUND.score([answer], [TARGET]).total[0] == pytest.approx(10.0)


def test_reasoning_alone_is_no_answer() -> None:
    for answer in (f"<think>{SLAB}</think>", f"<think>{SLAB}", f"<reasoning>\n{SLAB}\n</reasoning>\nDone.",
                   f"{SLAB}</think>", f"<THINK>\n{SLAB}", f"[THINK]{SLAB}[/THINK]"):  # fmt: skip
        assert FOUND.score([answer], [TARGET]).reason == ["no_block"]


# What may stand around a CIF: anything that is no CIF, opens no reasoning and is no chat.
# Words and marks that matter to the finder come often.
PIECES = st.one_of(
    st.text(max_size=40),
    st.sampled_from(
        ["Sure!", "Done.", "END", "---", "***", "**x**", "- a", "1. b", "> q", "I hope", "6 atoms",
         "5.5 5.5 15.0", "it's", "'q", '"', "```", "```cif", "~~~", "<answer>", "</answer>", "<cif>",
         "</cif>", "[CIF]", "[/CIF]", "<pre>", "</s>", "<|im_end|>", "<|endoftext|>", "<pad>", "{", "}",
         '{"cif": ', "_Note_", "_x", "#", "\u8be5\u7ed3\u6784", "\u042d\u0442\u043e", "\\n", "<b>", "<0.1",
         "<", "[", "|---|", "\t", "\r", "\xa0", "data", "loop"]
    ),
)  # fmt: skip
SURROUNDINGS = st.lists(st.tuples(PIECES, st.sampled_from([" ", "\n", "\n\n", "\n    "])), max_size=8).map(
    lambda pieces: "".join(a + b for a, b in pieces)
)


CIF_LINE = re.compile(r"(^|\n)(\s*(_[a-z]+[_.]|loop_)|;)")  # what is before such a line is a part of the CIF
ROW = re.compile(r"\s*[A-Z][a-z]?[-+\d]*(\s|$)")
LABEL = re.compile(r"\s*(?=\S*[a-zA-Z])(?=\S*\d)\S+(\s|$)")  # names an atom where labels alone do: `0A`


@settings(deadline=None, max_examples=150)
@given(before=SURROUNDINGS, after=SURROUNDINGS, odd=st.sampled_from(["", *ODD]))
@example(before="'\n", after="\n;\n", odd="")
@example(before="", after="0 ", odd="labels alone")
@example(before="", after="1.5 2", odd="labels alone")
@example(before="", after="1 2 3 4 5 6 7", odd="")
@example(before="", after="2 ) 1 2 ? ? x", odd="")
@example(before="", after="2 a 1 ? . 2 1 2", odd="")
def test_whatever_surrounds_a_cif(before: str, after: str, odd: str) -> None:
    cif = ODD.get(odd, SLAB)
    assume(not ROW.match(after))  # the begin of a further row: the CIF is cut off
    assume(odd != "labels alone" or not LABEL.match(after))
    assume(not CIF_LINE.search(after) and "data_" not in before + after)
    # nothing behind these is the answer
    before = before.replace("<|im_end|>", "").replace("<|endoftext|>", "")
    answer = f"{before}\n{cif}\n{after}"
    assert same_scores([answer], [cif]).all(), extract_cif(answer)


def test_a_batch_extracts_as_extract_cif_does() -> None:
    texts = list(mutants([wrap(SLAB) for wrap in FORMATS.values()], 4000, seed=20261128))
    together = FOUND.score(texts, TARGET)
    apart = STRICT.score([extract_cif(text) for text in texts], TARGET)
    assert together.reason == apart.reason
    np.testing.assert_array_equal(together.total, apart.total)
