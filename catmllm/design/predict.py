"""Energies of structures by the model's own head: for the search,
the evaluation and `catmllm predict` alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import torch

from catmllm.config import Config
from catmllm.data.batches import Batch, Collator
from catmllm.data.prompts import Sample, property_sample
from catmllm.models.catalytic_mllm import CatalyticMLLM
from catmllm.models.half_precision import rounded
from catmllm.models.state import load_model, stage_folder
from catmllm.structure.system import System
from catmllm.world import DTYPES, encoder_dtype, settled

Predictor = tuple[CatalyticMLLM, Collator]
Mode = Literal["both", "graph", "text"]  # what the model is shown of a system
MODES: tuple[Mode, ...] = ("both", "graph", "text")


def question(system: System, mode: Mode = "both") -> Sample:
    """The property prompt of a system without its answer."""
    sample = property_sample(system, mode)
    return Sample(sample.prompt, "", sample.graph, told=sample.told)


def predictor_of(config: Config, device: torch.device) -> Predictor | None:
    """The model of `ga_grpo.predictor`, whole, in the precision that its training would have on `device`;
    None where the model that searches predicts for itself. Raises FileNotFoundError and ValueError for what
    cannot predict."""
    if config.ga_grpo.predictor is None:
        return None
    folder = stage_folder(config.ga_grpo.predictor)
    if folder.name in ("encoder", "align"):
        raise ValueError(f"`ga_grpo.predictor: {folder}`: this stage comes before those that train energies")
    model, collate, trained = load_model(folder)
    trained = settled(trained, device.type)
    return rounded(model, DTYPES[trained.precision], encoder_dtype(trained)).to(device), collate


@torch.no_grad()
def encoder_energies(
    model: CatalyticMLLM, collate: Collator, systems: Sequence[System], batch_size: int = 64
) -> np.ndarray:
    """Adsorption energies [n] in eV by encoder, projector and the head's graph part only."""
    parts = []
    for i in range(0, len(systems), batch_size):
        graph = collate.graphs(systems[i : i + batch_size])
        assert graph is not None
        (value,) = model.graph_energy(graph.to(model.energy_mean.device))
        parts.append((value * model.energy_std + model.energy_mean).float().cpu().numpy())
    return np.concatenate(parts) if parts else np.zeros(0)


@torch.no_grad()
def predict_energies(
    model: CatalyticMLLM, collate: Collator, questions: Sequence[Sample], batch_size: int = 64
) -> np.ndarray:
    """Adsorption energies [n] in eV that answer property prompts."""
    parts = [model.predict(batch) for batch in _batches(model, collate, questions, batch_size)]
    return torch.cat(parts).float().cpu().numpy() if parts else np.zeros(0)


@torch.no_grad()
def energies_and_errors(
    model: CatalyticMLLM, collate: Collator, questions: Sequence[Sample], batch_size: int = 64
) -> tuple[np.ndarray, np.ndarray]:
    """The same, and how far each is expected to be off [n] in eV."""
    parts = [
        torch.stack([model.predict(batch).float(), model.expected_errors(batch)])
        for batch in _batches(model, collate, questions, batch_size)
    ]
    energies, errors = torch.cat(parts, 1).cpu().numpy() if parts else np.zeros((2, 0))
    return energies, errors


def _batches(
    model: CatalyticMLLM, collate: Collator, questions: Sequence[Sample], batch_size: int
) -> Iterator[Batch]:
    for i in range(0, len(questions), batch_size):
        yield collate(questions[i : i + batch_size]).to(model.energy_mean.device)
