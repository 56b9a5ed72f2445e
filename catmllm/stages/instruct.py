"""Stage 1c, instruction tuning (paper §7.4): the LLM alone, three tasks, modalities dropped at random.

Property samples keep training the energy head (MAE beside their cross-entropy): with the backbone moving
underneath, the head would drift otherwise.
"""

from __future__ import annotations

from catmllm.config import InstructConfig
from catmllm.seeds import Stream
from catmllm.stages.supervised import VISUAL, Mixed, supervised_step
from catmllm.train.setup import READS_GRAPHS
from catmllm.train.stage import Context, Step


class Instruct(Mixed):
    """Cross-entropy of the answers, plus the energy head's MAE on property samples."""

    name = "instruct"
    config: InstructConfig

    def __init__(self, context: Context) -> None:
        self.context, self.config = context, context.config.instruct
        self.mix(Stream.INSTRUCT_ORDER, Stream.INSTRUCT_SAMPLES)

    def trains(self, parameter: str) -> bool:
        if parameter.startswith(VISUAL):
            return self.context.config.model.llm.train_images
        return parameter.startswith(("llm.", "energy_head.")) and not parameter.startswith(READS_GRAPHS)

    def step(self, step: int) -> Step:
        return supervised_step(self, self.config, lambda ce, mae, labelled: ce + mae, self.config.row_weight)
