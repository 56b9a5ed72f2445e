"""Stage 1b, joint multimodal training (paper §7.3): everything trains, energy and answer joined by the MMTG loss."""

from __future__ import annotations

import torch

from catmllm.data.batches import Batch
from catmllm.models.losses import mmtg_loss
from catmllm.stages.supervised import Mixture, property_with_dropout, sample_losses
from catmllm.trainer.loop import Context, MicroBatch, Stateless, Step


class Joint(Stateless):
    """Property samples under MMTG(|energy error|, cross-entropy); CIF and design samples under cross-entropy."""

    name = "joint"

    def __init__(self, context: Context) -> None:
        self.context, self.config = context, context.config.joint
        self.mixture = Mixture(context, seed=1)
        energies = torch.tensor([s.known_energy for s in context.data["train"]])
        context.model.energy_mean.copy_(energies.mean())
        context.model.energy_std.copy_(energies.std())

    def trains(self, parameter: str) -> bool:
        return True

    def step(self, step: int) -> Step:
        o = self.config
        batch = self.mixture.draw(
            step,
            o.batch_size,
            o.property_share,
            lambda s, rng: property_with_dropout(s, rng, o.drop_text, o.drop_graph, o.position_noise),
            design_share=0.5,
            noise=o.exemplar_noise,
        )
        work = Step([])
        work.passes.append(
            MicroBatch(lambda: self._loss(batch, work.metrics), int(batch.attention_mask.sum()))
        )
        return work

    def _loss(self, batch: Batch, metrics: dict[str, float]) -> torch.Tensor:
        ce, mae, labelled = sample_losses(self.context.model, batch)
        joined = mmtg_loss(mae, ce, self.config.mmtg_lambda, self.config.mmtg_sign)
        metrics |= {"cross_entropy": float(ce.detach().mean())}
        if bool(labelled.any()):
            std = float(self.context.model.energy_std)
            metrics["energy_mae"] = float(mae[labelled].detach().mean()) * std
        return torch.where(labelled, joined, ce).mean()
