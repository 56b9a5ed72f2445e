"""Stage 1a, graph-text alignment (paper §7.2): projector, and encoder if asked,
learn the frozen LLM's view of the text."""

from __future__ import annotations

import torch

from catmllm.config import AlignConfig
from catmllm.data.batches import Batch, shuffled
from catmllm.data.prompts import Sample
from catmllm.data.subsets import of_property
from catmllm.models.catalytic_mllm import CatalyticMLLM
from catmllm.models.losses import info_nce
from catmllm.seeds import Stream
from catmllm.stages.supervised import FromLoader, validation_systems
from catmllm.structure.text import three_part_text
from catmllm.train.stage import Context, Metrics, MicroBatch, Step
from catmllm.train.stop import TrainingError


class Align(FromLoader):
    """InfoNCE between the graph token and the mean-pooled encoding of the three-part text."""

    name = "align"
    config: AlignConfig

    def __init__(self, context: Context) -> None:
        self.context, self.config = context, context.config.align
        systems = of_property(context.data["train"], context.config.data)
        order = Stream.ALIGN_ORDER.key(context.config.seed)

        def example(position: int) -> Sample:
            system = systems[shuffled(position, len(systems), order)]
            return Sample(three_part_text(system), "", system)

        self.load(example, self.config)

    def trains(self, parameter: str) -> bool:
        encoder = self.config.train_encoder and parameter.startswith("encoder.")
        return encoder or parameter.startswith("projector.")

    def step(self, step: int) -> Step:
        batch = self.batches(1)[0].to(self.context.world.device)
        work = Step([])
        work.passes.append(
            MicroBatch(lambda: self._loss(batch, work.metrics), batch.tokens, len(batch), batch)
        )
        return work

    def _loss(self, batch: Batch, metrics: Metrics) -> torch.Tensor:
        out = self.context.model(CatalyticMLLM.contrast, batch)
        key = text_keys(batch)
        loss = info_nce(out.graph, out.text, self.config.temperature, key)
        with torch.no_grad():
            g, t = (torch.nn.functional.normalize(x.float(), dim=1) for x in out)
            metrics["retrieval"] = (key[(g @ t.T).argmax(1)] == key).float().mean()
        return loss

    def validate(self) -> dict[str, float]:
        """The same loss on validation systems, in batches of all ranks as in training;
        "val" is what is minimised."""
        world = self.context.world
        systems = validation_systems(self.context, self.config)
        size = min(self.config.batch_size, len(systems) // world.size)
        if not size:
            raise TrainingError(
                f"align: {len(systems)} validation systems are too few for {world.size} ranks"
            )
        found: list[dict[str, float]] = []
        for start in range(0, len(systems) - size * world.size + 1, size * world.size):
            some = systems[start + world.rank * size :][:size]
            batch = self.context.collate([Sample(three_part_text(s), "", s) for s in some]).to(world.device)
            metrics: Metrics = {}
            metrics["loss"] = self._loss(batch, metrics)
            found.append({name: float(value) for name, value in metrics.items()})
        mean = {k: sum(m[k] for m in found) / len(found) for k in found[0]}
        return {"val": mean["loss"], "val_retrieval": mean["retrieval"]}


def text_keys(batch: Batch) -> torch.Tensor:
    """A number [S] int64 of each sample's text, equal for equal ones: the sum of what its tokens and their
    places are mixed to (by constants of splitmix64)."""
    x = (batch.input_ids + 1) * -7046029254386353131 + batch.position_ids * -4658895280553007687
    x = (x ^ (x >> 31)) * -7723592293110705685
    return torch.zeros_like(x[: len(batch)]).index_add(0, batch.sample, x ^ (x >> 29))
