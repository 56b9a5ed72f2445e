"""What `extract_cif` takes out of answers, and what it must leave alone."""

import pytest

from rewards_fast import PVCP, extract_cif
from tests.rewards_fast.cif_texts import SLAB, TARGET


def test_strict_mode_scores_the_text_as_it_stands() -> None:
    strict = PVCP(extract=False)
    assert strict.score([SLAB], [TARGET]).total[0] == pytest.approx(10.0)
    assert strict.score([SLAB + "\nI hope this helps.\n"], [TARGET]).total[0] == -15
    assert strict.score(["```cif\n" + SLAB + "```\n"], [TARGET]).total[0] == -15


def test_a_broken_row_is_not_repaired() -> None:
    broken = SLAB.replace("Pt Pt3 1 0.500 0.500 0.300 1", "Pt Pt3 1 0.500 0.500 0.300")
    for text in (broken, "Sure:\n```\n" + broken + "```"):
        assert PVCP().score([text], [TARGET]).total[0] == -15
    assert extract_cif(broken) == broken


@pytest.mark.parametrize(
    "text", ["", "no cif", "<think>", "```", "~~~\n```", "data_", "\ndata_x", "</think>", "<|im_end|>"]
)
def test_odd_answers_do_not_raise(text: str) -> None:
    assert isinstance(extract_cif(text), str)
    assert extract_cif(extract_cif(text)) == extract_cif(text)


def test_a_long_run_of_marks_takes_linear_time() -> None:
    for text in (
        "<think>" * 50_000,
        "```\n" * 50_000,
        "data_" * 50_000,
        " " * 300_000,
        "<" * 300_000,
        "\n" * 300_000,
        "> data_\n" * 30_000,
        " data_ _x" * 30_000,
        '"data_\\n\\n' * 30_000,
        "[A]<b>" * 50_000,
        "data_\n" + "' " * 100_000,
        "data_x <|im_end|>" * 20_000,
        "``` data_ " * 30_000,
    ):
        extract_cif(text)
