"""Coordinates' tokens begin as the harmonics of their values."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from catmllm.config import load_config
from catmllm.data.slabs import load_slabs
from catmllm.models.build import new_model
from catmllm.models.qwen import HARMONICS, NORM


@pytest.mark.parametrize("hidden", [192, 64])
def test_how_alike_two_coordinates_are_follows_from_their_distance(hidden: int) -> None:
    """Around the cell: the mean cosine of its harmonics; what else a vector has is small and random."""
    model, collate = new_model(
        load_config(None, [f"model.llm.hidden_size={hidden}", "model.llm.num_attention_heads=4"]),
        load_slabs()[:8],
    )
    words = collate.tokenizer.get_vocab()
    ids = [words[f" 0.{i:03d}"] for i in range(1000)]
    waves = min(HARMONICS, hidden // 8)
    for weight in (model.llm.get_input_embeddings().weight, model.llm.lm_head.weight):
        vectors = weight[ids].double().detach()
        known, rest = vectors[:, : 2 * waves], vectors[:, 2 * waves :]
        apart = np.subtract.outer(np.arange(1000), np.arange(1000)) / 1000
        alike = np.mean([np.cos(2 * np.pi * k * apart) for k in range(1, waves + 1)], axis=0)
        torch.testing.assert_close(known @ known.T, NORM**2 * torch.from_numpy(alike), atol=1e-5, rtol=0)
        assert 0.015 < float(rest.std()) < 0.025  # initializer_range
        others = torch.ones(len(weight), dtype=torch.bool)
        others[ids] = False
        assert float(weight[others, : 2 * waves].detach().std()) < 0.025
