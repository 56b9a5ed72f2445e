"""Stage 1c, instruction tuning (paper §7.4): the LLM alone, three tasks, modalities dropped at random.

Property samples keep training the energy head (MAE beside their cross-entropy): with the backbone moving underneath,
the head would drift otherwise.
"""

from __future__ import annotations

from catmllm.stages.supervised import Mixture, property_with_dropout, supervised_step, validation_error
from catmllm.trainer.loop import Context, Stateless, Step


class Instruct(Stateless):
    """Cross-entropy of the answers, plus the energy head's MAE on property samples."""

    name = "instruct"

    def __init__(self, context: Context) -> None:
        self.context, self.config = context, context.config.instruct
        self.mixture = Mixture(context, seed=2)

    def trains(self, parameter: str) -> bool:
        return parameter.startswith(("llm.", "energy_head."))

    def step(self, step: int) -> Step:
        o, d = self.config, self.context.config.data
        batches = self.mixture.draw(
            step,
            o,
            o.property_share,
            lambda s, rng: property_with_dropout(s, rng, o.drop_text, o.drop_graph, 0.0, d.phrasings),
            design_share=o.design_share / max(1e-9, 1 - o.property_share),
            noise=o.exemplar_noise,
        )
        return supervised_step(self.context.model, batches, lambda ce, mae, labelled: ce + mae)

    def validate(self) -> dict[str, float]:
        return validation_error(self.context, self.config)
