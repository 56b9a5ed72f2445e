"""Stage 1b, joint multimodal training (paper §7.3): everything trains,
energy and answer joined by the MMTG loss."""

from __future__ import annotations

import torch

from catmllm.config import JointConfig
from catmllm.data.open import texts_only
from catmllm.models.losses import mmtg_loss
from catmllm.seeds import Stream
from catmllm.stages.supervised import (
    VISUAL,
    Mixed,
    supervised_step,
)
from catmllm.train.setup import READS_ENERGY, READS_GRAPHS
from catmllm.train.stage import Context, Step


class Joint(Mixed):
    """Property samples under MMTG(|energy error|, cross-entropy);
    CIF and design samples under cross-entropy."""

    name = "joint"
    config: JointConfig

    def __init__(self, context: Context) -> None:
        self.context, self.config = context, context.config.joint
        self.mix(Stream.JOINT_ORDER, Stream.JOINT_SAMPLES, self.config.position_noise)

    def trains(self, parameter: str) -> bool:
        if parameter.startswith(VISUAL):
            return self.context.config.model.llm.train_images
        sees = self.context.collate.shows_structures and not texts_only(self.context.data["train"])
        if not sees and parameter.startswith(READS_GRAPHS):
            return False  # without a gradient there would be no state of it in a checkpoint
        if parameter.startswith("llm.") and not self.config.train_llm:
            return False
        return self.config.train_encoder or not parameter.startswith(READS_ENERGY)

    def step(self, step: int) -> Step:
        o = self.config

        def loss(ce: torch.Tensor, mae: torch.Tensor, labelled: torch.Tensor) -> torch.Tensor:
            return torch.where(labelled, mmtg_loss(mae, ce, o.mmtg_lambda, o.mmtg_sign), ce)

        return supervised_step(self, o, loss, self.config.row_weight)
