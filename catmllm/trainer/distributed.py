"""Processes and shards: the process group, FSDP2 units, and a whole copy of the weights where one is needed."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from catmllm.config import Config
from catmllm.models.catalytic_mllm import CatalyticMLLM

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class World:
    """This process among all of them."""

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        dist.barrier()

    def gather(self, value: Any) -> list[Any]:
        """The picklable values of every rank, in rank order, on every rank."""
        out: list[Any] = [None] * self.size
        dist.all_gather_object(out, value)
        return out

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        """The mean over ranks of each value; every rank must bring the same keys."""
        if not values:
            return {}
        keys = sorted(values)
        t = torch.tensor([values[k] for k in keys], dtype=torch.float64, device=self.device)
        dist.all_reduce(t)
        return dict(zip(keys, (t / self.size).tolist()))

    def maximum(self, value: int) -> int:
        t = torch.tensor(value, device=self.device)
        dist.all_reduce(t, dist.ReduceOp.MAX)
        return int(t)


def start(config: Config) -> World:
    """Join the process group that torchrun describes; without torchrun, a group of one process."""
    # Alone, a store in memory: no address, no port, nothing left in the environment of processes started from here.
    alone: dict[str, Any] = (
        {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    )
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _die_with_parent()
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device, **alone)
    else:
        device = torch.device("cpu")
        torch.set_num_threads(config.threads)
        dist.init_process_group("cpu:gloo", **alone)
    return World(dist.get_rank(), dist.get_world_size(), device)


def _die_with_parent() -> None:
    """Have the kernel end this process when torchrun is gone (Linux).

    torchrun gives its workers sessions of their own: after a `kill -9` of torchrun they would stay, hold their memory,
    and write into the folder that the next run resumes from.
    """
    if sys.platform != "linux":
        return
    import ctypes

    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)


def shard(model: CatalyticMLLM, config: Config, world: World) -> CatalyticMLLM:
    """Shard in place: a unit per block of encoder and LLM, one for the rest of the encoder, the projector and the energy
    head each, one for what remains.

    Compute runs in `precision` (the encoder, whose coordinates and norms want it, in `encoder_precision`), gradients
    are reduced and the optimizer works in float32.
    """
    mesh = init_device_mesh(world.device.type, (world.size,))
    llm = MixedPrecisionPolicy(DTYPES[config.precision], torch.float32, cast_forward_inputs=False)
    graph = MixedPrecisionPolicy(DTYPES[config.encoder_precision], torch.float32, cast_forward_inputs=False)
    for block in model.encoder.blocks:
        fully_shard(block, mesh=mesh, mp_policy=graph)
    fully_shard(model.encoder, mesh=mesh, mp_policy=graph)
    fully_shard(model.projector, mesh=mesh, mp_policy=graph)
    # A unit of its own: passes that train no energy leave its gradient out, and gradients accumulated over passes
    # must be of one dtype within a unit.
    fully_shard(model.energy_head, mesh=mesh, mp_policy=replace(graph, cast_forward_inputs=True))
    for layer in model.text.layers:
        fully_shard(layer, mesh=mesh, mp_policy=llm)
    fully_shard(model, mesh=mesh, mp_policy=llm)
    model.lockstep = world.size > 1
    # Sampling may run the encoder before the first training pass has run the model; FSDP2 would then take the encoder
    # for a root of its own. There is no public call that settles who is root.
    model._get_fsdp_state()._lazy_init()  # type: ignore[operator]
    return model


@contextmanager
def unsharded(model: CatalyticMLLM) -> Iterator[None]:
    """Every parameter whole on every rank, so that ranks may run forward passes at their own pace.

    No collective happens inside. For sampling and prediction; gradients do not belong here.
    """
    units = [m for m in model.modules() if isinstance(m, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        with torch.no_grad():
            yield
    finally:
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(unit is not model, recurse=False)


def whole(t: torch.Tensor) -> torch.Tensor:
    """A parameter or buffer gathered from its shards, detached, on the CPU."""
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach().cpu()


def full_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The whole state dict on every rank, float32 as trained."""
    return {k: whole(v) for k, v in model.state_dict().items()}
