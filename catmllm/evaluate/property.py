"""How well a model predicts energies, in the three inference modes of the paper's Table 1."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from catmllm.config import SamplingConfig
from catmllm.data.batches import Collator
from catmllm.data.open import texts_only
from catmllm.data.prompts import Sample, read_energy
from catmllm.design.predict import (
    MODES,
    encoder_energies,
    energies_and_errors,
    predict_energies,
    question,
)
from catmllm.evaluate.ensemble import Ensemble
from catmllm.evaluate.metrics import mae, r2
from catmllm.models.catalytic_mllm import CatalyticMLLM
from catmllm.sample.engine import RolloutEngine
from catmllm.structure.system import System
from catmllm.world import World


def written_energies(
    model: CatalyticMLLM, collate: Collator, samples: Sequence[Sample], dtype: torch.dtype = torch.float32
) -> np.ndarray:
    """Energies [n] in eV as the model writes them, greedily; NaN where its answer names none."""
    engine = RolloutEngine(model, collate, dtype)
    greedy = SamplingConfig(temperature=1.0, top_p=1e-6, max_new_tokens=48)
    answers = engine.generate(samples, greedy, [0])
    found = [read_energy(a.text) for a in answers]
    return np.array([np.nan if e is None else e for e in found])


def validation_energies(
    model: CatalyticMLLM, collate: Collator, systems: Sequence[System], world: World
) -> tuple[np.ndarray, np.ndarray]:
    """Energies [n] in eV from text and graph and the errors that the model expects of them, by which the
    error of a prediction is calibrated; ranks share the work."""
    gathered = world.gather(
        energies_and_errors(model, collate, [question(s) for s in systems[world.rank :: world.size]])
    )
    merged = np.empty((2, len(systems)))
    for rank, part in enumerate(gathered):
        merged[:, rank :: world.size] = part
    return merged[0], merged[1]


def evaluate_property(
    model: CatalyticMLLM,
    collate: Collator,
    systems: Sequence[System],
    world: World,
    llm: bool = True,
    dtype: torch.dtype = torch.float32,
    ensemble: Ensemble | None = None,
    subset: Callable[[System], bool] | None = None,
) -> dict[str, Any]:
    """MAE and R² on labelled systems; ranks share the work. `dtype`: what the LLM calculates in. Where there
    is a `subset`, also on its systems alone, as `subset` of every way.

    By the head in every mode (`both`, `graph`, `text`), by the `encoder` only, by the written answer
    (`generated`), and, where every system has a start, from unrelaxed structures (`start`, `encoder_start`);
    without `llm` by the encoder only. Of texts without structures, or by a model that reads texts alone, by
    `text`, `generated`, and with an `ensemble` by that. No outlier is dropped; a written answer without a
    number is counted in `unread`, and left out of its MAE only. Any other NaN makes its MAE NaN.
    """
    mine = list(systems[world.rank :: world.size])
    texts = texts_only(systems) or not collate.shows_structures
    modes = MODES[-1:] if texts else MODES
    starts = [s.frame(0.0) for s in mine] if all(s.start is not None for s in systems) else []
    values: dict[str, np.ndarray] = {} if texts else {"encoder": encoder_energies(model, collate, mine)}
    if starts and not texts:
        values["encoder_start"] = encoder_energies(model, collate, starts)
    if llm:
        samples = {mode: [question(s, mode) for s in mine] for mode in modes}
        values |= {mode: predict_energies(model, collate, samples[mode]) for mode in modes}
        values["generated"] = written_energies(model, collate, samples[modes[0]], dtype)
        if ensemble is not None:
            values["ensemble"] = ensemble.mean(mine, values["text"])
        if starts:
            values["start"] = predict_energies(model, collate, [question(s) for s in starts])
    gathered = world.gather(values)
    truth = np.array([s.known_energy for s in systems])
    out: dict[str, Any] = {}
    others: dict[str, list[float]] = {}  # of the ways that the parity plot does not show
    inside = None if subset is None else np.array([subset(s) for s in systems], dtype=bool)
    for name in values:
        merged = np.empty(len(systems))
        for rank, part in enumerate(gathered):
            merged[rank :: world.size] = part[name]
        read = ~np.isnan(merged) if name == "generated" else np.ones(len(merged), dtype=bool)
        out[name] = errors_of(merged[read], truth[read])
        if inside is not None:
            out[name]["subset"] = errors_of(merged[read & inside], truth[read & inside])
        if name == "generated":
            out[name]["unread"] = int((~read).sum())
        if name == ("encoder" if not llm else "ensemble" if ensemble is not None else modes[0]):
            out["parity"] = {
                "energy": truth.round(4).tolist(),
                "predicted": merged.round(4).tolist(),
                "adsorbate": [s.adsorbate for s in systems],
            }
        else:
            others[name] = merged.round(4).tolist()
    out["parity"]["others"] = others
    return out


def errors_of(predicted: np.ndarray, truth: np.ndarray) -> dict[str, Any]:
    """MAE (eV), R² and number of energies [n]."""
    return {"mae": mae(predicted, truth), "r2": r2(predicted, truth), "n": len(truth)}


def agreement(predicted: np.ndarray, truth: Sequence[float], adsorbates: Sequence[str]) -> str:
    """How energies [n] agree with others, in words: MAE and r; and within an adsorbate, whose mean is taken
    off both, so that another zero or functional does not count. An adsorbate with one structure is its own
    mean, so it is left out there."""
    true = np.array(truth, dtype=np.float64)
    mine = np.array(predicted, dtype=np.float64)
    names = np.array(adsorbates)
    counts = Counter(adsorbates)
    several = [name for name, n in counts.items() if n > 1]
    groups = [np.flatnonzero(names == name) for name in several]
    within = [[x[rows] - x[rows].mean() for rows in groups] for x in (mine, true)]

    def r(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.corrcoef(a, b)[0, 1]) if a.std() > 0 and b.std() > 0 else float("nan")

    whole = f"n {len(true)}, MAE {mae(mine, true):.3f} eV, r {r(mine, true):.3f}"
    alone = f"left out for a single structure: {len(counts) - len(several)}"
    if not groups:
        return f"{whole}; within an adsorbate (0; {alone}): nothing to compare"
    a, b = (np.concatenate(parts) for parts in within)
    return (
        f"{whole}; within an adsorbate ({len(several)}{f'; {alone}' if len(several) < len(counts) else ''}): "
        f"r {r(a, b):.3f}, MAE {mae(a, b):.3f} eV after one offset each, "
        f"{float(np.abs(b).mean()):.3f} eV by the mean of the adsorbate"
    )
