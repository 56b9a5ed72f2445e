"""Stage 0: the encoder and the graph part of the energy head learn energies; the LLM does not run.

The paper starts from an encoder that was trained on OC20's energies. Where no such checkpoint is given, this
stage takes its place. Some of the structures stand between the start of their relaxation and its end: a
design shows the predictor nothing else. What it leaves is a predictor by itself, "encoder only" in every
report.
"""

from __future__ import annotations

import torch

from catmllm.config import EncoderStageConfig
from catmllm.data.augment import symmetric_copy
from catmllm.data.batches import Batch, shuffled
from catmllm.data.prompts import GRAPH, Sample, jitter
from catmllm.data.subsets import of_property
from catmllm.models.catalytic_mllm import CatalyticMLLM
from catmllm.seeds import Stream, generator
from catmllm.stages.supervised import (
    FromLoader,
    over_ranks,
    some_frame,
    standardise,
    validation_systems,
    weigh,
)
from catmllm.structure.system import System
from catmllm.train.setup import READS_ENERGY
from catmllm.train.stage import Context, MicroBatch, Step


class Encoder(FromLoader):
    """L1 of the standardised energy, from what the projector reads too."""

    name = "encoder"
    config: EncoderStageConfig

    def __init__(self, context: Context) -> None:
        self.context, self.config = context, context.config.encoder
        o, c = self.config, context.config
        systems = of_property(context.data["train"], c.data)
        order, samples = Stream.ENCODER_ORDER.key(c.seed), Stream.ENCODER_SAMPLES.key(c.seed)
        standardise(context)

        def example(position: int) -> Sample:
            rng = generator((*samples, position))
            system = systems[shuffled(position, len(systems), order)]
            if c.data.augment:
                system = symmetric_copy(system, rng)
            return _shown(jitter(some_frame(system, rng, o.frames), o.position_noise, rng))

        self.load(example, o)

    def trains(self, parameter: str) -> bool:
        return parameter.startswith(READS_ENERGY)

    def step(self, step: int) -> Step:
        o, work = self.config, Step([], {"energy_mae": 0.0})
        batches = [b.to(self.context.world.device) for b in self.batches(o.accumulate)]
        total = sum(len(b) for b in batches)

        def loss(batch: Batch) -> torch.Tensor:
            value = self._errors(batch).sum() / total
            work.metrics["energy_mae"] += value.detach() * self.context.model.energy_std
            return value

        for b in batches:  # no token: the LLM does not run
            work.passes.append(MicroBatch(lambda b=b: loss(b), 0, len(b), b))  # type: ignore[misc]
        return work

    def _errors(self, batch: Batch) -> torch.Tensor:
        """|error| [S] of the standardised energies."""
        model = self.context.model
        assert batch.graph is not None
        (energy,) = model(CatalyticMLLM.graph_energy, batch.graph)
        return (energy - (batch.energy - model.energy_mean) / model.energy_std).abs()

    def validate(self) -> dict[str, float]:
        """MAE (eV) on validation systems, from relaxed structures and from starts;
        their mean is what is minimised."""
        o, std = self.config, float(self.context.model.energy_std)
        systems = validation_systems(self.context, o)

        def mae(shown: list[System]) -> float:
            return std * over_ranks(
                self.context, shown, o.batch_size, lambda part: self._errors(self._batch(part))
            )

        found = {"val_relaxed": mae(systems)}
        if starts := [s.frame(0.0) for s in systems if s.start is not None]:
            found["val_start"] = mae(starts)
        return {"val": sum(found.values()) / len(found), **found}

    def finish(self) -> str:
        if not len(self.context.data["val"]) or not self.context.config.model.closed_form:
            return ""
        systems = validation_systems(self.context, self.config)
        systems = [*systems, *(s.frame(0.0) for s in systems if s.start is not None)]
        shown = [_shown(s) for s in systems]

        def energies(batch: Batch) -> torch.Tensor:
            assert batch.graph is not None
            (energy,) = self.context.model(CatalyticMLLM.graph_energy, batch.graph)
            return energy

        head = self.context.model.energy_head
        return weigh(self.context, "graph", head.graph[-1], shown, systems, self.config.batch_size, energies)

    def _batch(self, systems: list[System]) -> Batch:
        return self.context.collate([_shown(s) for s in systems]).to(self.context.world.device)


def _shown(system: System) -> Sample:
    return Sample(GRAPH, "", system, system.known_energy)
