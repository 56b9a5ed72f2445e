"""Weights for vLLM's process: which are sent, and how its own weight transfer finds them.

The first time all of the text tower goes there, afterwards only what trains: with adapters these alone, in
GA-GRPO the LM head. A decoder layer goes at a time. On a GPU vLLM reads the trainer's memory (CUDA IPC); on a
CPU the layer lies once in a file in memory that both processes have. Nothing is written to a disk or to
/dev/shm.
"""

from __future__ import annotations

import json
import mmap
import os
import pickle
import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import nn
from torch.multiprocessing.reductions import reduce_tensor

from catmllm.models.catalytic_mllm import CatalyticMLLM
from catmllm.models.lora import LINEARS, NAME

NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
TOWER = "model.language_model."  # the text tower's name in a VL model
HEAD = "lm_head.weight"
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # of adapters, that vLLM has room for
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # where its settings are
ADAPTERS = "adapters"  # folder of the adapters' description


class Part(NamedTuple):
    """Tensors that lie in the buffer: what the message says of them, and its blocks of bytes."""

    says: dict[str, Any]
    blocks: list[bytes]


class Weights:
    """The text tower's weights as vLLM takes them, with the temperature divided into the LM head.

    Parameters must be whole where they are read. `fd`: the file in memory; `moved`: bytes handed over so far.
    """

    def __init__(self, model: CatalyticMLLM, dtype: torch.dtype, temperature: float) -> None:
        self.model, self.dtype, self.temperature = model, dtype, temperature
        self.fd = os.memfd_create("catmllm-weights")
        self.moved = 0

    @property
    def on_gpu(self) -> bool:
        return self.model.text.embed_tokens.weight.is_cuda

    def linears(self) -> dict[str, Any]:
        """The adapted linears, by name."""
        return {n: m for n, m in self.model.text.named_modules() if NAME in getattr(m, "lora_A", ())}

    def rank(self) -> int | None:
        """The rank that vLLM keeps for adapters; None without any."""
        found = [m.lora_A[NAME].weight.shape[0] for m in self.linears().values()]
        return next(r for r in RANKS if r >= max(found)) if found else None

    def all_train(self) -> bool:
        """Whether every weight that is sent is another one after an update."""
        return all(p.requires_grad for _, p in self._parameters())

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, p in self.model.text.named_parameters():
            if ".lora_" not in name:
                yield TOWER + name.replace(".base_layer.", "."), p
        yield HEAD, self.model.llm.lm_head.weight

    def _layers(self, trained: bool) -> list[list[tuple[str, nn.Parameter]]]:
        """What is sent, by decoder layer; what is in none by itself."""

        def layer(named: tuple[str, nn.Parameter]) -> str:
            found = re.match(r".*\.layers\.\d+\.", named[0])
            return found[0] if found else named[0]

        wanted = ((n, p) for n, p in self._parameters() if p.requires_grad or not trained)
        return [list(group) for _, group in groupby(wanted, layer)]

    def sizes(self, trained: bool) -> list[list[int]]:
        """Bytes of the tensors of each part; what the longest part has is held for an update."""
        return [[p.numel() * self.dtype.itemsize for _, p in group] for group in self._layers(trained)]

    def parts(self, trained: bool) -> Iterator[Part]:
        """All weights but adapters, or those of them that train, a decoder layer at a time. Each lies in the
        one buffer until the next is asked for; vLLM must have answered by then."""
        sizes = self.sizes(trained)
        buffer, blocks = self._buffer(max(map(sum, sizes), default=0))
        for group, size in zip(self._layers(trained), sizes):
            for part, (name, p) in zip(buffer[: sum(size)].split(size), group):
                part.copy_(self._sent(name, p.detach()).flatten().view(torch.uint8))
            if buffer.is_cuda:  # the other process reads on a stream of its own
                torch.cuda.current_stream(buffer.device).synchronize()
            self.moved += sum(size)
            shapes = [list(p.shape) for _, p in group]
            says = {"names": [n for n, _ in group], "shapes": shapes, "tensor_sizes": size}
            yield Part(says | {"dtype_names": [NAMES[self.dtype]] * len(group)}, blocks)

    def _sent(self, name: str, value: torch.Tensor) -> torch.Tensor:
        if name == HEAD and self.temperature != 1.0:
            value = value.float() / self.temperature
        return value.to(self.dtype).contiguous()

    def _buffer(self, size: int) -> tuple[torch.Tensor, list[bytes]]:
        """Bytes [size] that vLLM's process reads too: of a GPU's memory, with a handle as its transfer by
        CUDA IPC takes it, or of the file."""
        device = self.model.text.embed_tokens.weight.device
        if self.on_gpu:
            buffer = plain_memory(size, device)
            card = str(torch.cuda.get_device_properties(device).uuid)
            return buffer, [pickle.dumps({card: reduce_tensor(buffer)[1]})]
        os.ftruncate(self.fd, size)
        return torch.frombuffer(mmap.mmap(self.fd, size), dtype=torch.uint8), []

    def let_go(self) -> None:
        """Free the buffer, once vLLM has closed its side."""
        if self.on_gpu:
            torch.cuda.ipc_collect()

    def write_adapters(self, folder: Path) -> None:
        """The adapters of this moment, in peft's layout: a description in `folder`, and in place of the
        weights a link to the file in memory."""
        linears = self.linears()
        one = next(iter(linears.values()))
        tensors = {}
        for name, linear in linears.items():
            for side in ("lora_A", "lora_B"):
                value = getattr(linear, side)[NAME].weight.detach()
                tensors[f"base_model.model.{TOWER}{name}.{side}.weight"] = value.to("cpu", self.dtype)
        os.ftruncate(self.fd, 0)
        with open(self.fd, "wb", closefd=False) as file:
            file.seek(0)
            file.write(save({k: v.contiguous() for k, v in tensors.items()}))
        self.moved += sum(t.nbytes for t in tensors.values())
        link = folder / ADAPTERS / "adapter_model.safetensors"
        if not link.is_symlink():
            link.parent.mkdir()
            link.symlink_to(f"/proc/self/fd/{self.fd}")
            rank = one.lora_A[NAME].weight.shape[0]
            says = {"peft_type": "LORA", "r": rank, "lora_alpha": one.scaling[NAME] * rank}
            says |= {"target_modules": list(LINEARS)}
            (link.parent / "adapter_config.json").write_text(json.dumps(says))

    def close(self) -> None:
        os.close(self.fd)


def plain_memory(size: int, device: torch.device) -> torch.Tensor:
    """Bytes [size] outside of expandable segments, which a trainer has: those another process may open only
    with the rights of a debugger."""
    grows = any("expandable_segments:True" in os.environ.get(name, "") for name in ALLOCATOR)
    setting = torch._C._accelerator_setAllocatorSettings
    if not grows:
        return torch.empty(size, dtype=torch.uint8, device=device)
    setting("expandable_segments:False")
    try:
        return torch.empty(size, dtype=torch.uint8, device=device)
    finally:
        setting("expandable_segments:True")
