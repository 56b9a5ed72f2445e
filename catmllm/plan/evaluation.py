"""What is measured after a stage, beside its training: the passes of `evaluate_property`, of the shares and
calibrations that a stage ends with, and of sampled CIFs. Designs and their judge are not in it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from catmllm.config import Config
from catmllm.data.batches import Collator
from catmllm.data.open import texts_only
from catmllm.design.predict import question
from catmllm.models.catalytic_mllm import CatalyticMLLM
from catmllm.plan.ledger import Ledger
from catmllm.stages.supervised import WEIGHED
from catmllm.structure.system import System

WRITTEN = 16  # tokens of an energy in words
CALIBRATED = 1000  # validation systems by which a stage's energies are calibrated, relaxed and as they began


def reading(
    model: CatalyticMLLM, collate: Collator, systems: Sequence[System], ledger: Ledger
) -> dict[str, float]:
    """FLOPs a system of each way to read one, counted on these systems within a ledger: by the `encoder`
    alone, from `both`, and from the `text` (then the LLM alone); and of a `token` that it writes."""
    with torch.no_grad():

        def count(run: str) -> float:
            before = ledger.flops["forward"]
            if run == "encoder":
                graph = collate.graphs(systems)
                assert graph is not None
                model(CatalyticMLLM.graph_energy, graph)
            else:
                batch = collate([question(s, "both" if run == "both" else "text") for s in systems])
                model(CatalyticMLLM.predict, batch)
            return (ledger.flops["forward"] - before) / len(systems)

        shown = not texts_only(systems) and collate.shows_structures
        found = {"encoder": count("encoder") if shown else 0.0, "text": count("text")}
        found["both"] = count("both") if shown else found["text"]
    # of its matrices alone: the scores of so few tokens are next to nothing
    found["token"] = 2.0 * sum(p.numel() for layer in model.text.layers for p in layer.parameters())
    return found


def energies(each: dict[str, float], config: Config, stage: str) -> float:
    """FLOPs of all ranks for the energies of test systems that have starts: by the encoder from both
    structures; and after all stages but `encoder` from structure and text, from either alone, from the start
    with its text, and written."""
    one = 2 * each["encoder"]
    if stage != "encoder":
        one += 3 * each["both"] + each["encoder"] + each["text"] + WRITTEN * each["token"]
    return config.evaluate.property_systems * one


def refit(each: dict[str, float], config: Config, stage: str) -> float:
    """FLOPs of all ranks for what follows from validation systems: the shares by which parts of the energy
    head count, each read twice, and the calibration. The closed forms are fitted on the host."""
    found = 0.0
    if stage == "encoder":
        found += 2 * 2 * config.encoder.validate_systems * each["encoder"]
    if stage in ("joint", "instruct"):
        found += 2 * WEIGHED * (each["text"] + each["both"])
    if stage not in ("encoder", "align"):
        found += 2 * CALIBRATED * each["both"]
    return found
