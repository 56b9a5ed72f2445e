"""Systems and a tokenizer for plans where neither data nor a model's files are there:
their shapes are as real ones'."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from catmllm.config import Config
from catmllm.data.open import open_data
from catmllm.data.prompts import cif_sample, design_sample, property_sample
from catmllm.data.tokenizer import tiny_tokenizer
from catmllm.structure.system import ADSORBATE, SURFACE, System, make_system

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# Atoms of 30 relaxed structures of OC20
OC20_ATOMS = (33, 37, 38, 40, 41, 47, 49, 51, 52, 55, 57, 62, 66, 66, 68, 70, 73, 74, 77, 86, 97, 99, 99, 100,
              101, 101, 104, 160, 166, 185)  # fmt: skip


def is_made_up(config: Config) -> bool:
    """Whether a plan of this configuration has made-up systems: `data.path` is not there yet, or the shipped
    ones would not be what a pretrained LLM is trained on."""
    path, pretrained = config.data.path, config.model.llm.pretrained is not None
    return not Path(path).exists() if path is not None else pretrained


def of_oc20s_sizes(atoms: int) -> list[System]:
    """Made-up systems of as different sizes as OC20's, `atoms` on average."""
    mean = sum(OC20_ATOMS) / len(OC20_ATOMS)
    return [synthetic_systems(max(6, round(n * atoms / mean)), 1)[0] for n in OC20_ATOMS]


def planned_systems(config: Config, atoms: int) -> dict[str, Sequence[System]]:
    """The systems that a run would open, or made-up ones of `atoms` atoms."""
    if not is_made_up(config):
        return open_data(config.data)
    # ten facets by name, so that there are parts of the pairs of bulk and facet
    systems = [replace(s, miller=(1, 0, i % 10)) for i, s in enumerate(synthetic_systems(atoms))]
    return {"train": systems, "val": systems[:8], "test": systems[:8]}


def synthetic_systems(atoms: int, count: int = 512) -> list[System]:
    """CO on fcc slabs of Pt and Ni with `atoms` atoms each (OC20's mean is 78): shapes for plans,
    not chemistry."""
    rng = np.random.default_rng(0)
    slab = atoms - 2
    side = max(1, round((slab / 4) ** 0.5))
    lattice = np.diag([2.8 * side, 2.8 * side, 2.0 * (slab // side**2 + 1) + 16.0])
    grid = np.array([(i % side, i // side % side, i // side**2) for i in range(slab)], dtype=float)
    positions = grid * [2.8, 2.8, 2.0] + (grid[:, 2:] % 2) * [1.4, 1.4, 0.0]
    top = positions[:, 2].max()
    positions = np.vstack([positions, [[0.0, 0.0, top + 1.9], [0.0, 0.0, top + 3.05]]])
    tags = np.full(atoms, SURFACE)
    tags[-2:] = ADSORBATE
    out = []
    for i in range(count):
        numbers = np.append(rng.permutation([78] * (slab // 2) + [28] * (slab - slab // 2)), [6, 8])
        shaken = positions + rng.normal(0, 0.05, positions.shape)
        out.append(
            make_system(
                lattice, shaken, numbers, tags, "CO", (1, 0, 0), float(rng.normal()), f"synthetic-{i}"
            )
        )
    return out


def qwen_like_tokenizer(systems: Sequence[System], decimals: int) -> PreTrainedTokenizerBase:
    """One that cuts CIFs as the extended Qwen tokenizer does: a token for the decimals of a number,
    fixed lines whole."""
    texts = (
        sample.prompt + sample.answer
        for s in systems[:40]
        for sample in (
            property_sample(s),
            property_sample(s, "graph"),
            cif_sample(s, decimals),
            design_sample(s, s),
        )
    )
    # No merges: 591 tokens for a CIF of 80 atoms, where the extended Qwen tokenizer makes 558.
    return tiny_tokenizer(texts, merges=0, decimals=decimals)
