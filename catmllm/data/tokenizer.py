"""Tokens for CIFs: what repeats in every file is one token, and so is every coordinate.

A 14-atom CIF is about 1,150 characters. Qwen reads a digit a token; here a site row is six tokens (`Pd Pd`,
`0 1`, three coordinates, ` 1` with its line end) and the whole fixed header three. Numbers of the cell stay
digits: the token behind a 5 is a point, whichever slab it is, where one of a thousand fractions would have to
win against anything else. Its angles are words, as few slabs have others. Everything is lossless: what no
added token covers falls back to bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from catmllm.data import prompts
from catmllm.structure.cif import element_line
from catmllm.structure.elements import SYMBOLS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HEADER = (
    "loop_\n_atom_type_symbol\n_atom_type_electronegativity\n_atom_type_radius\n_atom_type_ionic_radius\n",
    "_symmetry_space_group_name_H-M P1\n_cell_length_a ",
    "\n_symmetry_Int_Tables_number 1\n_chemical_formula_structural ",
    "\n_cell_formula_units_Z 1\nloop_\n_symmetry_equiv_pos_site_id\n_symmetry_equiv_pos_as_xyz\n1 'x, y, z'\n"
    "loop_\n_atom_site_type_symbol\n_atom_site_label\n_atom_site_symmetry_multiplicity\n_atom_site_fract_x\n"
    "_atom_site_fract_y\n_atom_site_fract_z\n_atom_site_occupancy\n",
)
KEYS = (
    "\n_cell_angle_alpha 90.000\n_cell_angle_beta 90.000\n_cell_angle_gamma ",
    "\n_cell_length_b ",
    "\n_cell_length_c ",
    "\n_cell_angle_alpha ",
    "\n_cell_angle_beta ",
    "\n_cell_angle_gamma ",
    "\n_chemical_formula_sum '",
    "'\n_cell_volume ",
)
ANGLES = ("60.000", "90.000", "120.000")
MAX_SITES = 256


def cif_tokens(decimals: int = 3, elements: bool = True) -> list[str]:
    """Every string that becomes one token; `elements` adds the bare symbols, with and without a space before
    (they would cut words of a language model's own text, ` P|lease`, so that a pretrained tokenizer may do
    without)."""
    lines = [line + "\n" for block in HEADER for line in block.split("\n")[:-1] if line]
    symbols = SYMBOLS[1:104]
    tokens = [
        *HEADER,
        *KEYS,
        *ANGLES,
        *lines,
        *(element_line(s, decimals) + "\n" for s in symbols),
        *(f" 0.{i:03d}" for i in range(1000)),
        *(f"{s} {s}" for s in symbols),
        *(f"{i} 1" for i in range(MAX_SITES)),
        " 1\n",
        "data_",
        "</s>",
    ]
    if elements:
        tokens += [*symbols, *(f" {s}" for s in symbols)]
    return list(dict.fromkeys(tokens))


def extend_tokenizer(
    tokenizer: PreTrainedTokenizerBase, decimals: int = 3, elements: bool = True
) -> dict[int, list[int]]:
    """Add the CIF tokens and the markers to any Hugging Face tokenizer, in place.

    Returns new id -> the ids by which the tokenizer wrote that text before: what a pretrained model's new
    embedding rows are the mean of. Tokens that the tokenizer already has are left alone.
    """
    from tokenizers import AddedToken

    vocabulary = tokenizer.get_vocab()
    new = [t for t in cif_tokens(decimals, elements) if t not in vocabulary]
    before = {t: tokenizer.encode(t, add_special_tokens=False) for t in new}
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in new])
    frame = (prompts.START, prompts.END)  # of a chat: every Qwen has them
    markers = [t for t in (*frame, prompts.GRAPH, prompts.ENERGY) if t not in vocabulary]
    before |= {t: tokenizer.encode(t, add_special_tokens=False) for t in markers}
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=True) for t in markers])
    vocabulary = tokenizer.get_vocab()
    return {vocabulary[t]: ids for t, ids in before.items()}


def tiny_tokenizer(texts: Iterable[str], merges: int = 512, decimals: int = 3) -> PreTrainedTokenizerBase:
    """A small byte-level tokenizer for models trained from random weights.

    Its merges are learned from `texts` (prompts and answers) cut at the CIF tokens, without word boundaries:
    a phrase that every prompt repeats ends as one or two tokens.
    """
    import re

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = [prompts.PAD, prompts.START, prompts.END]
    fixed = [*cif_tokens(decimals), *special, prompts.GRAPH, prompts.ENERGY]
    cut = re.compile("|".join(re.escape(t) for t in sorted(fixed, key=len, reverse=True)))
    backend = Tokenizer(models.BPE(unk_token=None))
    # Digits stay alone: a count must look the same in the prompt, the formulas and before any punctuation.
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + merges,
        min_frequency=20,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pieces = (p for text in texts for p in cut.split(text) if len(p) > 1)
    backend.train_from_iterator(pieces, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=prompts.PAD,
        eos_token=prompts.END,
        additional_special_tokens=[prompts.START],
        clean_up_tokenization_spaces=False,
        model_max_length=1 << 20,
    )
    extend_tokenizer(tokenizer, decimals)
    return tokenizer


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The text of generated ids, byte for byte, special tokens left out."""
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
