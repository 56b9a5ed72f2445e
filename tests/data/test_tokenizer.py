"""The tokenizer: lossless on all shipped CIFs and on any text, one token for what repeats,
and rules of extension."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from catmllm.data.prompts import END, ENERGY, GRAPH, PAD, START, cif_sample, design_sample, property_sample
from catmllm.data.slabs import load_slabs
from catmllm.data.tokenizer import ANGLES, HEADER, KEYS, cif_tokens, decode, extend_tokenizer, tiny_tokenizer
from catmllm.structure.cif import element_line, write_cif
from catmllm.structure.elements import SYMBOLS
from catmllm.structure.system import System


@pytest.fixture(scope="module")
def tokenizer(train_systems: list[System]) -> PreTrainedTokenizerBase:
    some = train_systems[::25]
    samples = [f(s) for s in some for f in (property_sample, cif_sample, lambda s: design_sample(s, s))]
    return tiny_tokenizer(s.prompt + s.answer for s in samples)


@pytest.fixture
def qwen_like() -> PreTrainedTokenizerBase:
    """A byte-level BPE with Qwen's pre-tokenizer (single digits), trained on a little English."""
    backend = Tokenizer(models.BPE())
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
        r"\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    english = (
        "The Pd and Co atoms of the crystal cell; loop_ and data_ are words of CIF files. Please predict it."
    )
    backend.train_from_iterator([english] * 50, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=PAD, eos_token=END)
    tokenizer.add_special_tokens({"additional_special_tokens": [START]})
    return tokenizer


def ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def test_every_shipped_cif_comes_back_in_150_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    texts = [write_cif(s) for s in load_slabs()]
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert tokenizer.batch_decode(encoded) == texts
    lengths = [len(e) for e in encoded]
    assert sum(lengths) / len(lengths) <= 143
    assert max(lengths) <= 200
    characters = sum(map(len, texts)) / len(texts)
    assert characters / (sum(lengths) / len(lengths)) > 7  # characters a token


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert tokenizer.decode(ids(tokenizer, text), skip_special_tokens=False) == text
    if not any(marker in text for marker in (START, END, PAD, GRAPH, ENERGY)):
        assert decode(tokenizer, ids(tokenizer, text)) == text


@given(
    pieces=st.lists(
        st.sampled_from(
            [*cif_tokens()[:60], ".123", " 0.07", "C", "Co", "Cs Cs", "1 1", " 1\n", "é", "\n\n", "  "]
        ),
        max_size=12,
    )
)
def test_tokens_put_side_by_side_come_back(tokenizer: PreTrainedTokenizerBase, pieces: list[str]) -> None:
    """Boundaries that no CIF has: one token may begin inside another."""
    text = "".join(pieces)
    assert decode(tokenizer, ids(tokenizer, text)) == text


def test_what_repeats_is_one_token(tokenizer: PreTrainedTokenizerBase) -> None:
    symbols = SYMBOLS[1:104]
    single = [
        *(f" 0.{i:03d}" for i in range(1000)),
        *symbols,
        *(f" {s}" for s in symbols),
        *(f"{s} {s}" for s in symbols),
        *(element_line(s) + "\n" for s in symbols),
        *(f"{i} 1" for i in range(256)),
        *HEADER,
        *KEYS,
        *ANGLES,
        " 1\n",
        GRAPH,
        ENERGY,
        START,
        END,
        PAD,
    ]
    wrong = {t: len(i) for t in single if len(i := ids(tokenizer, t)) != 1}
    assert not wrong
    assert len({ids(tokenizer, t)[0] for t in single}) == len(set(single))


def test_numbers_of_the_cell_are_digits(tokenizer: PreTrainedTokenizerBase) -> None:
    """The token behind 5 is a point, whatever the length is."""
    cell = (
        "_symmetry_space_group_name_H-M P1\n_cell_length_a 5.416\n_cell_length_b 5.416\n_cell_length_c 13.9"
    )
    words = [tokenizer.decode([i]) for i in ids(tokenizer, cell)]
    assert words == [HEADER[1], *"5.416", KEYS[1], *"5.416", KEYS[2], *"13.9"]


def test_angles_are_words(tokenizer: PreTrainedTokenizerBase) -> None:
    for gamma in ANGLES:
        words = [tokenizer.decode([i]) for i in ids(tokenizer, f"{KEYS[0]}{gamma}{HEADER[2]}")]
        assert words == [KEYS[0], gamma, HEADER[2]]


def test_a_site_row_is_six_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    row = ids(tokenizer, "Pd Pd12 1 0.123 0.045 0.999 1\n")
    assert [tokenizer.decode([i]) for i in row] == ["Pd Pd", "12 1", " 0.123", " 0.045", " 0.999", " 1\n"]


def test_the_fixed_lines_of_a_cif_are_the_headers(train_systems: list[System]) -> None:
    """The token strings and the CIF writer are two places: what one writes the other must hold."""
    for system in train_systems[::200]:
        text = write_cif(system)
        for block in (*HEADER, *KEYS):
            assert text.count(block) == 1, block


def test_a_phrase_of_every_prompt_is_few_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(ids(tokenizer, cif_sample(load_slabs()[0]).prompt)) < 60


@pytest.mark.parametrize("decimals", [2, 4])
def test_other_decimals_are_lossless_too(train_systems: list[System], decimals: int) -> None:
    tokenizer = tiny_tokenizer([], merges=0, decimals=decimals)
    for system in train_systems[::300]:
        text = write_cif(system, decimals)
        assert decode(tokenizer, ids(tokenizer, text)) == text


def test_special_tokens_are_left_out_of_answers(tokenizer: PreTrainedTokenizerBase) -> None:
    assert decode(tokenizer, ids(tokenizer, f"Pd 1\n{END}{PAD}")) == "Pd 1\n"


def test_a_saved_tokenizer_encodes_alike(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, train_systems: list[System]
) -> None:
    tokenizer.save_pretrained(tmp_path)
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for system in train_systems[::300]:
        text = property_sample(system).prompt + cif_sample(system).answer
        assert ids(again, text) == ids(tokenizer, text)
        assert decode(again, ids(again, text)) == decode(tokenizer, ids(tokenizer, text))
    assert (again.pad_token, again.eos_token, len(again)) == (PAD, END, len(tokenizer))


def test_training_twice_gives_the_same_tokenizer(train_systems: list[System]) -> None:
    texts = [cif_sample(s).prompt for s in train_systems[:60]]
    assert tiny_tokenizer(texts).get_vocab() == tiny_tokenizer(texts).get_vocab()


def test_extension_maps_new_tokens_to_what_they_replace(qwen_like: PreTrainedTokenizerBase) -> None:
    before = copy.deepcopy(qwen_like)
    added = extend_tokenizer(qwen_like, elements=False)
    assert set(added) == set(range(len(before), len(qwen_like)))
    for new, old in added.items():
        text = str(qwen_like.decode([new]))
        assert ids(qwen_like, text) == [new]
        assert old == ids(before, text) and before.decode(old) == text
        assert all(i < len(before) for i in old)
    words = [before.decode([i]) for i in added[ids(qwen_like, " 0.123")[0]]]
    assert "".join(words) == " 0.123" and words[-4:] == [".", "1", "2", "3"]


def test_extension_leaves_the_language_alone(
    qwen_like: PreTrainedTokenizerBase, train_systems: list[System]
) -> None:
    before = copy.deepcopy(qwen_like)
    extend_tokenizer(qwen_like, elements=False)
    english = (
        "The crystal of the words; Please predict it. I see Pd: In 3 of 17 files (Co), No other! As before."
    )
    assert ids(qwen_like, english) == ids(before, english)
    for system in train_systems[::300]:
        text = write_cif(system)
        assert decode(qwen_like, ids(qwen_like, text)) == text
        assert len(ids(qwen_like, text)) * 2.5 < len(ids(before, text))


def test_extending_twice_adds_nothing(qwen_like: PreTrainedTokenizerBase) -> None:
    extend_tokenizer(qwen_like)
    size = len(qwen_like)
    assert extend_tokenizer(qwen_like) == {}
    assert len(qwen_like) == size


def test_markers_are_special_and_whole(qwen_like: PreTrainedTokenizerBase) -> None:
    extend_tokenizer(qwen_like, elements=False)
    text = f"a{GRAPH}b{ENERGY}"
    tokens = ids(qwen_like, text)
    vocabulary = qwen_like.get_vocab()
    assert tokens.count(vocabulary[GRAPH]) == tokens.count(vocabulary[ENERGY]) == 1
    assert decode(qwen_like, tokens) == "ab"
