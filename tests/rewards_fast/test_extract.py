"""What `extract_cif` takes out of answers, and what it must leave alone."""

import json
import random
import time

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


def test_numbers_that_name_no_atom_are_no_row() -> None:
    """As many words as the loop has columns, and numbers where it has coordinates."""
    for line in ("2 ) 2 ? ? \x00 é", "1 2 3 4 5 6 7", "- 7 1 0.5 0.5 0.5 1"):
        assert extract_cif(SLAB + line + "\n") == SLAB
        assert PVCP().score([SLAB + line], [TARGET]).total[0] == pytest.approx(10.0)
    for line in ("7 Pt9 1 0.5 0.5 0.5 1", "Xq Xq9 1 0.5 0.5 0.5 1", "pt pt9 1 0.5 0.5 0.5 1 0"):
        assert extract_cif(SLAB + line + "\n") == SLAB + line + "\n"


def quoted(text: str) -> str:
    return "".join("> " + line for line in text.splitlines(keepends=True))


def test_a_refused_quotation_as_long_as_the_next() -> None:
    """Both are read from the same memory."""
    broken = SLAB.replace("O O5 1 0.000 0.000", "O O5 1 0.000_0.000")
    assert len(broken) == len(SLAB) and PVCP().score([broken], [TARGET]).total[0] == -15
    for text in (quoted(SLAB) + "Not:\n" + quoted(broken), quoted(broken) + "Better:\n" + quoted(SLAB)):
        assert PVCP().score([text], [TARGET]).total[0] == pytest.approx(10.0)
        assert extract_cif(text) == SLAB


@pytest.mark.parametrize(
    "begin",
    [
        "<think>\nLet me see. <reflection>hm</reflection>\n",
        "<thinking><think>hm</think>",
        "<|begin_of_thought|>hm</think>",
        "<|channel|>analysis<|message|>",
        "<|start|>assistant<|channel|>analysis<|message|>I say <eos>. ",
        "<|channel|> analysis to=python code<|message|>",
    ],
)
def test_reasoning_lasts_up_to_its_own_end(begin: str) -> None:
    """A draft in a thought that is not finished earns nothing, and neither does one in a JSON string."""
    for draft in (SLAB, json.dumps({"cif": SLAB}), quoted(SLAB)):
        assert PVCP().score([begin + draft], [TARGET]).total[0] == -15
        assert PVCP().score([f"<think>{draft}</think>I have no idea."], [TARGET]).total[0] == -15


def test_two_blocks_without_a_word_between_are_one_file() -> None:
    """Its first whole block counts, as in strict mode."""
    other = SLAB.replace("Cu Cu1", "Ni Ni1").replace("data_CO", "data_other")
    for gap, last in (("", 0), ("\n\n", 0), ("\nBetter:\n", 1)):
        found = PVCP().score([SLAB + gap + other, other + gap + SLAB], TARGET).total
        assert (found > 9.99).tolist() == [last == 0, last == 1]


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
        "  data_x\n  ;\n" * 20_000,
        '\'data_\\n\\n"data_\\n\\n" data_\\n\\n' * 10_000,
        "<|channel|>analysis<|end|>" * 20_000,
    ):
        extract_cif(text)


@pytest.mark.parametrize(
    "piece",
    [
        "x data_ _a 1\n",
        "x data_ _a 1\n;\n",
        "x data_ _a 1\n_k v\n",
        "  data_x\nprose\n",
        " data_x\nprose\n  data_x\n",
        "> data_x\n>> data_x\n",
        "data_x\nprose\n",
    ],
)
def test_many_begins_of_a_cif_take_linear_time(piece: str) -> None:
    """Four times as much takes four times as long; it was up to sixteen times, and 20 s."""
    short, long = (
        min(seconds(piece * (size // len(piece))) for _ in range(3)) for size in (250_000, 1_000_000)
    )
    assert long < 8 * short + 0.05


def seconds(text: str) -> float:
    begin = time.process_time()
    extract_cif(text)
    return time.process_time() - begin


STRAYS = (
    "Done.", "END", "---", "Here is more:", "loop_", " loop_", "\tloop_", "> loop_", "_key",
    " _cell_note", "text", "_cell_note 5", "_note 'a", "# c", "'x'", "'", "Pt Pt1", "  Pt  Pt3  1",
    "1 2 3", "_x 1 _y", "x _y", "loop_ _a _b", "_loop_x 3", "_a\tb", "p", "Stop_ here", "1 'x, y, z'",
    "",
)  # fmt: skip


def test_the_end_of_a_cif_does_not_depend_on_where_reading_begins() -> None:
    """Only the last loop is read line by line, unless a `;` stands anywhere: here in the block's name."""
    r = random.Random(3)
    shorter = 0
    for _ in range(3000):
        lines = SLAB.replace("data_CO</s>Pt3Cu (1 1 1)", "data_x").splitlines(keepends=True)
        for _ in range(r.randint(1, 3)):
            at = r.randrange(1, len(lines) + 1)
            if r.random() < 0.7:
                lines.insert(at, r.choice(STRAYS) + "\n")
            elif at < len(lines):
                del lines[at]
        text = "".join(lines)[: r.randrange(300, 1200)]
        found = extract_cif(text)
        assert extract_cif(text.replace("data_x", "data_x;y", 1)) == found.replace("data_x", "data_x;y", 1)
        shorter += len(found) < len(text)
    assert 300 < shorter < 2700
