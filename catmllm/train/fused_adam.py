"""apex's FusedAdam on FSDP2's shards, for those who have apex; the default, torch's fused AdamW,
needs nothing.

FSDP2's parameters, gradients and moments are DTensors, which own no memory: apex's kernel reads addresses,
and is given the shards inside of them. Its arithmetic is that of AdamW, element by element, so that shards
are updated as the whole is.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from catmllm.config.needs import APEX
from catmllm.train.stop import TrainingError


def fused_adam() -> type[Optimizer]:
    """`apex.optimizers.FusedAdam`; raises TrainingError with what to do where apex is not installed."""
    try:
        from apex.optimizers import FusedAdam
    except ImportError as error:
        raise TrainingError(f"`optimizer: apex` needs NVIDIA's apex ({error}): {APEX}") from error
    return FusedAdam


def over_shards(groups: list[dict[str, Any]], lr: float, betas: tuple[float, float]) -> Optimizer:
    """AdamW by apex over parameters that `fully_shard` has cut. Its step is the group's, where torch counts a
    parameter's; checkpoints of the two do not fit each other.

    Raises TrainingError where apex is missing or cannot run (no CUDA, or built without its extensions).
    """
    base: Any = fused_adam()

    class OverShards(base):
        # apex's own takes no argument; torch's checkpoints call it with one.
        zero_grad = Optimizer.zero_grad

    try:
        optimizer: Any = OverShards(groups, lr=lr, betas=betas, adam_w_mode=True)
    except (ImportError, RuntimeError, TypeError) as error:
        raise TrainingError(
            f"`optimizer: apex` cannot run here ({error}): it needs a GPU, and apex built with "
            "APEX_CUDA_EXT=1; or leave the default, `optimizer: torch`"
        ) from error
    kernel = optimizer.multi_tensor_adam

    def on_shards(chunk: int, overflow: Tensor, lists: list[list[Tensor]], *rest: Any) -> None:
        shards = [[t.to_local() if isinstance(t, DTensor) else t for t in tensors] for tensors in lists]
        # Fewer rows than ranks leave some of them an empty shard. Where the last of a list is empty, apex
        # never launches the kernel for what is still waiting before it.
        filled = [i for i, t in enumerate(shards[0]) if t.numel()]
        if filled:
            kernel(chunk, overflow, [[tensors[i] for i in filled] for tensors in shards], *rest)

    optimizer.multi_tensor_adam = on_shards
    return optimizer
