"""The stages: what trains in each, and how a step becomes losses."""

from collections.abc import Callable

from catmllm.stages.align import Align
from catmllm.stages.encoder import Encoder
from catmllm.stages.ga_grpo import GAGRPO
from catmllm.stages.grpo import GRPO
from catmllm.stages.instruct import Instruct
from catmllm.stages.joint import Joint
from catmllm.train.stage import Context, Stage

STAGES: dict[str, Callable[[Context], Stage]] = {
    s.name: s for s in (Encoder, Align, Joint, Instruct, GRPO, GAGRPO)
}
