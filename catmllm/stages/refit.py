"""The energy head refitted on the backbone that GRPO has moved, before stage 3 freezes both.

A linear head on frozen features needs no gradient steps: the correction to its weights that ridge regression finds is
exact, and no correction at all is among the candidates.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from catmllm.data.batches import Collator
from catmllm.data.prompts import Sample
from catmllm.design.predict import MODES, question
from catmllm.models.catalytic_mllm import CatalyticMLLM
from catmllm.structure.system import System
from catmllm.world import World

STRENGTHS = tuple(10.0**k for k in range(-3, 6))


@torch.no_grad()
def query_states(model: CatalyticMLLM, collate: Collator, samples: Sequence[Sample]) -> np.ndarray:
    """Final hidden states [n, H] float64 at the `<energy>` token."""
    out = [np.zeros((0, model.energy_head.in_features))]  # a rank may have no sample
    device = model.energy_mean.device
    for i in range(0, len(samples), 64):
        batch = collate(samples[i : i + 64]).to(device)
        out.append(model.query_states(model.hidden(batch), batch).double().cpu().numpy())
    return np.concatenate(out)


def refit_energy_head(
    model: CatalyticMLLM,
    collate: Collator,
    train: Sequence[System],
    val: Sequence[System],
    world: World,
) -> dict[str, float]:
    """Correct the head's weights by ridge regression on the training systems, the strength chosen on `val`.

    All three inference modes count alike. Changes the model in place; returns the validation MAE (eV, mean over modes)
    before and after and the strength (inf: no correction was better, or there is nothing to validate on).
    """

    def features(systems: Sequence[System]) -> tuple[np.ndarray, np.ndarray]:
        mine = list(systems[world.rank :: world.size])
        x = query_states(model, collate, [question(s, mode) for mode in MODES for s in mine])
        y = np.array([s.energy for _ in MODES for s in mine], dtype=np.float64)
        parts = world.gather((x, y))
        return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])

    mean, std = float(model.energy_mean), float(model.energy_std)
    weight = model.energy_head.weight.detach().double().cpu().numpy()[0]
    bias = float(model.energy_head.bias.detach()[0])
    (x, y), (vx, vy) = features(train), features(val)
    residual, centre = (y - mean) / std - x @ weight - bias, x.mean(0)
    xc, rc = x - centre, residual - residual.mean()
    values, vectors = np.linalg.eigh(xc.T @ xc / len(x))
    projected = vectors.T @ (xc.T @ rc / len(x))

    def error(w: np.ndarray, b: float) -> float:
        return float(np.abs((vx @ w + b) * std + mean - vy).mean()) if len(vy) else np.nan

    before = error(weight, bias)
    best = (before, np.inf, weight, bias)
    for strength in STRENGTHS:
        change = vectors @ (projected / (values + strength * values.mean() * 1e-3))
        w, b = weight + change, bias + residual.mean() - centre @ change
        if (e := error(w, b)) < best[0]:
            best = (e, strength, w, b)
    with torch.no_grad():
        model.energy_head.weight.copy_(torch.as_tensor(best[2])[None])
        model.energy_head.bias.fill_(best[3])
    return {"val_mae_before": before, "val_mae_after": best[0], "strength": best[1]}
