"""This process among all of a run, its device, and what a configuration leaves to the device."""

from __future__ import annotations

import os
import pickle
import signal
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from catmllm.config import Config

# By their names in a configuration; of tf32 only the products differ from float32.
DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
WORKERS = 4  # processes of a rank on a GPU that make batches


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

    def broadcast(self, tensors: Iterable[torch.Tensor], rank: int) -> None:
        """What a rank has in tensors goes into those of all others, which are as large."""
        for tensor in tensors if self.size > 1 else ():
            dist.broadcast(tensor, rank)

    def exchange(self, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """parts[r], of any number of rows, goes to rank r; returns what came from each rank. All are on one
        device and alike in dtype and the shape of a row."""
        sizes = self.gather([len(p) for p in parts])
        come = [row[self.rank] for row in sizes]
        whole = torch.cat(list(parts))
        out = whole.new_empty(sum(come), *whole.shape[1:])
        dist.all_to_all_single(out, whole, come, [len(p) for p in parts])
        return list(out.split(come))

    def trade(self, parts: Sequence[Any]) -> list[Any]:
        """The same of picklable values."""
        packed = [torch.frombuffer(bytearray(pickle.dumps(p)), dtype=torch.uint8) for p in parts]
        return [pickle.loads(p.numpy().tobytes()) for p in self.exchange(packed)]

    def mean(self, values: Mapping[str, float | torch.Tensor]) -> dict[str, float]:
        """The mean of each value over the ranks where it is not NaN; every rank must bring the same keys.

        What the device has calculated comes as a tensor of one number: all are read together, in one wait.
        """
        if not values:
            return {}
        keys = sorted(values)
        known = [0.0 if isinstance(v, torch.Tensor) else v for v in map(values.__getitem__, keys)]
        t = torch.tensor(known, dtype=torch.float64, device=self.device)
        for i, k in enumerate(keys):
            if isinstance(value := values[k], torch.Tensor):
                t[i] = value.detach()
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
    # A step that hangs is told of first, by `train.hang`; between stages a rank may wait for long.
    patience = timedelta(seconds=max(1800.0, config.hang_after + 300.0))
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _die_with_parent()
    if torch.cuda.is_available():
        device = torch.device("cuda", local := int(os.environ.get("LOCAL_RANK", "0")))
        if local >= (found := torch.cuda.device_count()):
            raise ValueError(
                f"a rank needs a GPU of its own: this machine shows {found}, so start at most {found} here "
                f"(torchrun --nproc-per-node {found})"
            )
        torch.cuda.set_device(device)
        set_products(settled(config, "cuda"))
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device, timeout=patience, **alone)
    else:
        device = torch.device("cpu")
        torch.set_num_threads(config.threads)
        dist.init_process_group("cpu:gloo", timeout=patience, **alone)
    return World(dist.get_rank(), dist.get_world_size(), device)


def settled(config: Config, device: str) -> Config:
    """The configuration with what it leaves open (null), and what a CPU is no good at, as it is on a
    `device`, "cuda" or "cpu".

    How many processes make batches stays open: it changes no batch, and may differ when a run goes on.
    """
    gpu = device == "cuda"
    precision, encoder, compiled = config.precision, config.encoder_precision, config.compile
    if precision == "bf16" and not gpu and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        precision = "fp32"  # five times as fast where a CPU has no products of bfloat16
    if encoder is None:
        encoder = "tf32" if gpu and precision != "fp32" else "fp32"
    if encoder == "tf32" and not gpu:
        encoder = "fp32"
    if compiled is None:  # which takes minutes at the start of every stage
        compiled = gpu and config.model.llm.pretrained is not None
    return replace(config, precision=precision, encoder_precision=encoder, compile=compiled)


def encoder_dtype(config: Config) -> torch.dtype:
    """What the encoder calculates in; what is left open is float32 on every device."""
    return DTYPES[config.encoder_precision or "fp32"]


def loader_workers(config: Config, device: str) -> int:
    """Processes that make this rank's batches."""
    if config.data.workers is not None:
        return config.data.workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(WORKERS, share - 1)) if device == "cuda" else 0


def set_products(config: Config) -> None:
    """How a GPU multiplies.

    A weight's gradient is a sum over all edges or tokens of a pass, 32,000 and more. cuBLAS cuts such a
    product into parts and by default may add these up in half precision: in float32 here. TF32 only where
    it is asked for.
    """
    matmul = torch.backends.cuda.matmul
    matmul.allow_fp16_reduced_precision_reduction = False
    matmul.allow_bf16_reduced_precision_reduction = False
    torch.set_float32_matmul_precision("high" if config.encoder_precision == "tf32" else "highest")


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
