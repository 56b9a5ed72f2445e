"""Indicative CIFs (paper, App. C.1): what the model writes where a system has no structure.

Adsorbate, composition and Miller index do not say where the adsorbate stands. So the CIFs that the model
writes for them are not taken for structures. They are hints of what may be around the adsorbate: their bonds
become the third part of the text, by which the model then predicts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from catmllm.config import SamplingConfig
from catmllm.data.batches import Collator
from catmllm.data.prompts import Sample, cif_prompt
from catmllm.models.catalytic_mllm import CatalyticMLLM
from catmllm.sample.answers import answer_limits
from catmllm.sample.engine import RolloutEngine
from catmllm.sample.grammar import answer_pattern
from catmllm.seeds import Key
from catmllm.structure.cif import read_cif
from catmllm.structure.formula import SEPARATOR, parse_identity
from catmllm.structure.system import System
from catmllm.structure.text import configuration, worded
from rewards_fast import extract_cif

CHARACTERS = 400  # of a string of bonds beyond scale 1: whole ones are ten times as long as other prompts


def indicative_systems(
    model: CatalyticMLLM,
    collate: Collator,
    asked: Sequence[tuple[str, Mapping[str, int]]],
    candidates: int,
    sampling: SamplingConfig,
    seed: Key,
    dtype: torch.dtype = torch.float32,
) -> list[list[System | None]]:
    """For each identity line with the counts of its whole cell so many systems of CIFs that the model writes,
    unrelaxed as all that it writes; None where no system with this adsorbate can be read. `model` must be
    whole on this rank."""
    patterns = None
    if sampling.grammar:
        patterns = [
            answer_pattern(line, target, False, collate.data, collate.templates) for line, target in asked
        ]
    rollouts = RolloutEngine(model, collate, dtype).generate(
        [Sample(cif_prompt(line)) for line, _ in asked],
        sampling,
        seed,
        candidates,
        patterns=patterns,
        limits=answer_limits(collate, sampling, asked),
    )
    found: list[list[System | None]] = [[] for _ in asked]
    for rollout in rollouts:
        found[rollout.prompt].append(_read(rollout.text, asked[rollout.prompt][0]))
    return found


def _read(text: str, identity: str) -> System | None:
    named = parse_identity(identity)
    try:
        system = read_cif(extract_cif(text), named.adsorbate, named.miller)
        configuration(system)  # a cell too small to search has none
    except ValueError:
        return None
    return replace(system, relaxed=False)


def indicated(known: str, of: System, scale: float = 1.0, max_characters: int | None = None) -> System:
    """What is read where the first two parts `known` are given and the bonds are those of another structure,
    such as an indicative CIF."""
    return worded(of, SEPARATOR.join((known, configuration(of, scale, max_characters))))
