"""A model by its configuration."""

from __future__ import annotations

from collections.abc import Sequence

from catmllm.config import Config
from catmllm.data.batches import Collator
from catmllm.data.prompts import cif_sample, design_sample, property_sample
from catmllm.data.tokenizer import tiny_tokenizer
from catmllm.models.catalytic_mllm import CatalyticMLLM, build_model, collator
from catmllm.structure.system import System


def new_model(config: Config, train_systems: Sequence[System]) -> tuple[CatalyticMLLM, Collator]:
    """A model by the configuration, with a tokenizer learned from the training texts where the LLM is random."""
    tokenizer = None
    if config.model.llm.pretrained is None:
        d = config.data.decimals
        samples = [
            sample
            for s in train_systems[:600]
            for sample in (
                property_sample(s),
                property_sample(s, "graph"),
                cif_sample(s, d),
                design_sample(s, None, d),
                design_sample(s, s, d),
            )
        ]
        tokenizer = tiny_tokenizer((s.prompt + s.answer for s in samples), decimals=d)
    model, tokenizer = build_model(config, tokenizer)
    return model, collator(model, tokenizer, config)
