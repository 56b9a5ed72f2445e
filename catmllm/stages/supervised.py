"""What `joint` and `instruct` share: a seeded mixture of the three tasks, and the losses of a batch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import numpy as np
import torch

from catmllm.config import SupervisedConfig
from catmllm.data.augment import symmetric_copy
from catmllm.data.batches import Batch, draw
from catmllm.data.prompts import Sample, cif_sample, design_sample, draw_words, jitter, property_sample
from catmllm.models.catalytic_mllm import CatalyticMLLM
from catmllm.structure.system import System
from catmllm.trainer.loop import Context, MicroBatch, Step
from catmllm.trainer.stop import TrainingError


def relatives(systems: Sequence[System]) -> list[list[int]]:
    """For each system, the others of the same composition and adsorbate (same identity)."""
    groups: dict[str, list[int]] = {}
    mine = [groups.setdefault(s.identity, []) for s in systems]
    for i, group in enumerate(mine):
        group.append(i)
    return [[j for j in group if j != i] for i, group in enumerate(mine)]


def property_with_dropout(
    system: System,
    rng: np.random.Generator,
    drop_text: float,
    drop_graph: float,
    noise: float,
    phrasings: str = "paper",
) -> Sample:
    """A property sample, sometimes without its text or without its graph, never without both."""
    u = rng.random()
    mode: Literal["both", "graph", "text"] = (
        "graph" if u < drop_text else "text" if u < drop_text + drop_graph else "both"
    )
    shown = None if mode == "text" else jitter(system, noise, rng)
    return property_sample(system, mode, shown, draw_words(rng, phrasings))


def chosen(
    n: int, batch: int, seed: int, step: int, rank: int, world: int
) -> list[tuple[int, np.random.Generator]]:
    """This rank's systems at a step, each with its own generator.

    A generator is a function of seed, step and place in the batch of all ranks: two ranks together draw what one with
    twice the batch does.
    """
    indices = draw(n, batch, seed, step, rank, world)
    return [(int(i), np.random.default_rng([seed, step, rank * batch + k])) for k, i in enumerate(indices)]


def task_sample(
    system: System,
    kin: list[System],
    rng: np.random.Generator,
    design_share: float,
    noise: float,
    decimals: int,
    phrasings: str = "paper",
) -> Sample:
    """A design sample with the chance `design_share`, else a CIF sample.

    Half of the design samples show an exemplar: a relative (same composition and adsorbate), else the own structure
    with noise.
    """
    if rng.random() >= design_share:
        return cif_sample(system, decimals, draw_words(rng, phrasings))
    exemplar = None
    if rng.random() < 0.5:
        exemplar = kin[rng.integers(len(kin))] if kin else jitter(system, noise, rng)
    return design_sample(system, exemplar, decimals, draw_words(rng, phrasings))


def is_property(place: int, share: float) -> bool:
    """Whether the sample at this place in the batch of all ranks is a property sample: evenly spread, `share` of all."""
    return int((place + 1) * share + 1e-9) > int(place * share + 1e-9)


class Mixture:
    """The samples of a supervised step: property samples evenly among CIF and design samples."""

    def __init__(self, context: Context, seed: int) -> None:
        self.context, self.seed = context, context.config.seed + seed
        self.systems = context.data["train"]
        self.kin = relatives(self.systems)

    def draw(
        self,
        step: int,
        config: SupervisedConfig,
        property_share: float,
        property_of: Callable[[System, np.random.Generator], Sample],
        design_share: float,
        noise: float,
    ) -> list[Batch]:
        """This rank's passes of a step; `property_of` makes a property sample, `design_share` is of the rest."""
        c, size = self.context, config.batch_size
        samples = []
        picks = chosen(len(self.systems), size, self.seed, step, c.world.rank, c.world.size)
        for k, (i, rng) in enumerate(picks):
            system = self.systems[i]
            if c.config.data.augment:
                system = symmetric_copy(system, rng)
            if is_property(c.world.rank * size + k, property_share):
                samples.append(property_of(system, rng))
            else:
                kin = [self.systems[j] for j in self.kin[i]]
                d = c.config.data
                samples.append(task_sample(system, kin, rng, design_share, noise, d.decimals, d.phrasings))
        cuts = [len(samples) * k // config.accumulate for k in range(config.accumulate + 1)]
        parts = [samples[a:b] for a, b in itertools.pairwise(cuts)]
        return [c.collate(part).to(c.world.device) for part in parts if part]


def supervised_step(
    model: CatalyticMLLM,
    batches: list[Batch],
    loss_of: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
) -> Step:
    """The passes over this rank's batches; `loss_of` (cross-entropy, |energy error|, labelled), all [S], gives [S].

    A pass counts by its samples, so that how a batch is cut changes nothing. Logs both losses, the energy's in eV.
    """
    total = sum(len(b) for b in batches)
    n_labelled = sum(int(b.labelled.sum()) for b in batches)
    metrics = {"cross_entropy": 0.0, "energy_mae": 0.0 if n_labelled else float("nan")}

    def loss(batch: Batch) -> torch.Tensor:
        ce, mae, labelled = sample_losses(model, batch)
        metrics["cross_entropy"] += float(ce.detach().sum()) / total
        if n_labelled:
            in_ev = float(mae.detach().sum()) * float(model.energy_std)
            metrics["energy_mae"] += in_ev / n_labelled
        return loss_of(ce, mae, labelled).sum() / total

    passes = [MicroBatch(partial(loss, b), b.tokens, len(b.energy), b) for b in batches]
    return Step(passes, metrics)


def validation_systems(context: Context, config: SupervisedConfig) -> list[System]:
    """Evenly spaced systems of the validation split, the same on every rank."""
    val = context.data["val"]
    if not len(val):
        raise TrainingError("`validate_every` is set, but the validation split has no system")
    return [val[i] for i in range(0, len(val), -(-len(val) // config.validate_systems))]


def validation_error(context: Context, config: SupervisedConfig) -> dict[str, float]:
    """Mean absolute error of the energy head (eV) and cross-entropy on validation systems, structure and text given.

    Every rank makes equally many passes, since the sharded model's are collective. "val" is what is minimised.
    """
    world, model = context.world, context.model
    systems = validation_systems(context, config)
    size = min(config.batch_size, -(-len(systems) // world.size))
    sums = dict.fromkeys(("error", "ce", "n"), 0.0)
    for start in range(0, len(systems), size * world.size):
        mine = systems[start : start + size * world.size][world.rank :: world.size]
        batch = context.collate([property_sample(s) for s in mine or systems[:1]]).to(world.device)
        ce, mae, _ = sample_losses(model, batch)
        if mine:
            sums["error"] += float(mae.sum()) * float(model.energy_std)
            sums["ce"] += float(ce.sum())
            sums["n"] += len(mine)
    total = world.mean(sums)
    return {"val": total["error"] / total["n"], "val_cross_entropy": total["ce"] / total["n"]}


def sample_losses(model: CatalyticMLLM, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per sample: cross-entropy of the answer (mean over its tokens), |error| of the standardised energy (0 where
    there is no label), and whether there is one. All [S]."""
    out = model("answer", batch)
    count = torch.bincount(batch.answer_sample, minlength=len(batch)).clamp_min(1)
    ce = out["logprob"].new_zeros(len(batch)).index_add(0, batch.answer_sample, -out["logprob"]) / count
    labelled = batch.labelled
    target = (batch.energy - model.energy_mean) / model.energy_std
    # `where` before the subtraction: a NaN times zero would still be a NaN gradient.
    error = torch.where(labelled, out["energy"], 0.0) - torch.where(labelled, target, 0.0)
    return ce, error.abs(), labelled
