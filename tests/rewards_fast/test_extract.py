"""What `extract_cif` takes out of answers, and what it must leave alone."""

import numpy as np
import pytest

from rewards_fast import PVCP, extract_cif
from tests.oracles.cif_mutants import mutants
from tests.rewards_fast.cif_texts import SLAB, TARGET

ANSWERS = {
    "bare": SLAB,
    "preamble": "Ok, the CIF file I generated is as follows:\n" + SLAB,
    "fence": "Here it is:\n```cif\n" + SLAB + "```\nThe slab has three Pt atoms and one Cu.\n",
    "open fence": "```\n" + SLAB,
    "two fences": "```python\nprint('data')\n```\nthen\n```cif\n" + SLAB + "```",
    "tilde fence": "~~~~cif\n" + SLAB + "~~~~\n",
    "think": "<think>data_wrong\n_cell_length_a 1\nmaybe not</think>\n\n" + SLAB,
    "think opened in the prompt": "data_draft\nnot this\n</think>\n" + SLAB,
    "chat": "<|im_start|>user\nplease<|im_end|>\n<|im_start|>assistant\n"
    + SLAB
    + "<|im_end|>\n<|endoftext|>",
    "end of sequence": SLAB + "</s>",
    "epilogue": SLAB + "\nThis structure has the CO molecule on top of a platinum atom.\nEnjoy!\n",
    "epilogue with a number": SLAB + "\nI hope this helps with the 6 atoms you need in 2026.",
    "same line": "The answer is: " + SLAB,
    "all at once": "<think>\nhm\n</think>Sure!\n\n```cif\n"
    + SLAB
    + "```\n\nLet me know if you need more.<|im_end|>",
    "windows lines": "Here you go:\r\n" + SLAB.replace("\n", "\r\n"),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_the_cif_is_found(name: str) -> None:
    assert PVCP().score([ANSWERS[name]], [TARGET]).total[0] == pytest.approx(10.0)


def test_strict_mode_scores_the_text_as_it_stands() -> None:
    strict = PVCP(extract=False)
    assert strict.score([SLAB], [TARGET]).total[0] == pytest.approx(10.0)
    assert strict.score([ANSWERS["epilogue"]], [TARGET]).total[0] == -15
    assert strict.score([ANSWERS["fence"]], [TARGET]).total[0] == -15


def test_a_broken_row_is_not_repaired() -> None:
    broken = SLAB.replace("Pt Pt3 1 0.500 0.500 0.300 1", "Pt Pt3 1 0.500 0.500 0.300")
    for text in (broken, "Sure:\n```\n" + broken + "```"):
        assert PVCP().score([text], [TARGET]).total[0] == -15
    assert extract_cif(broken) == broken


def test_an_unfinished_thought_is_no_answer() -> None:
    assert "data_" not in extract_cif("<think>Let me write\n" + SLAB)


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
    ):
        extract_cif(text)


def test_a_batch_extracts_as_extract_cif_does() -> None:
    texts = list(mutants([*ANSWERS.values()], 3000, seed=2))
    together = PVCP(threads=1).score(texts, TARGET)
    apart = PVCP(threads=1, extract=False).score([extract_cif(text) for text in texts], TARGET)
    assert together.reason == apart.reason
    np.testing.assert_array_equal(together.total, apart.total)
