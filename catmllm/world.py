"""This process among all of a run, and the dtypes by their names in a configuration."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from catmllm.config import Config

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
        """The mean of each value over the ranks where it is not NaN; every rank must bring the same keys."""
        if not values:
            return {}
        keys = sorted(values)
        t = torch.tensor([values[k] for k in keys], dtype=torch.float64, device=self.device)
        t = torch.stack([t.nan_to_num(0.0, torch.inf, -torch.inf), (~t.isnan()).double()])
        dist.all_reduce(t)
        return dict(zip(keys, (t[0] / t[1]).tolist()))

    def maximum(self, value: int) -> int:
        t = torch.tensor(value, device=self.device)
        dist.all_reduce(t, dist.ReduceOp.MAX)
        return int(t)


def start(config: Config) -> World:
    """Join the process group that torchrun describes; without torchrun, a group of one process."""
    # Alone, a store in memory: no address, no port, nothing left in the
    # environment of processes started from here.
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

    torchrun gives its workers sessions of their own: after a `kill -9` of torchrun they would stay, hold
    their memory, and write into the folder that the next run resumes from.
    """
    if sys.platform != "linux":
        return
    import ctypes

    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
