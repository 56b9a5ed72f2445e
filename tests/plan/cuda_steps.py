"""A training step of every stage as a GPU takes it, on fake tensors.

    TRITON_INTERPRET=0 python -m tests.plan.cuda_steps OUT.json

In a process of its own, without Triton's interpreter: pytest's has it switched on, by which a plan that needs
it would go unnoticed. Every op of ours hands its Triton implementation the step's own arguments, on the meta
device, so that the code that starts kernels runs at these shapes and what it starts is written down.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_map

import catmllm.plan.trace as plan
from bench.gpu_phases import prefill
from catmllm.config import STAGES, load_config
from catmllm.data.open import open_data
from catmllm.plan.ledger import Ledger
from catmllm_kernels.launch import recorded

aten = torch.ops.aten
ASKING = {
    aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.bincount, aten.equal, aten._unique,
    aten._unique2, aten.unique_dim, aten.unique_consecutive, aten.item, aten.is_nonzero,
}  # fmt: skip

FEW = ("grpo.batch_size=2", "grpo.micro_batch=4", "ga_grpo.tasks=4", "ga_grpo.batch_size=2")
HALF = ("encoder_precision=fp16", "precision=fp16")


class Starting(Ledger):
    """The ledger, and every start of a Triton kernel: name -> keys by which it is compiled."""

    starts: ClassVar[dict[str, set[str]]] = {}
    arch: ClassVar[int] = 80  # whose tiles they take
    waits: ClassVar[list[str]] = []  # where a pass or an update would wait for the device
    passing = False

    def phase(self, name: str) -> None:
        super().phase(name)
        self.passing = name == "training step"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        body = OPDEFS.get(func._name.partition(".")[0])
        if body is not None and has_triton(body._init_fn.__module__) and not self._silent:
            with recorded(self.arch) as found:
                body._init_fn(*tree_map(_on_meta, args), **tree_map(_on_meta, kwargs or {}))
            for start in found:
                self.starts.setdefault(start.kernel.__name__, set()).add(prefill.key_of(start))
        if self.passing and not self._silent and waits(func, args, kwargs or {}):
            ours = [
                f
                for f in traceback.extract_stack()
                if "/catmllm" in f.filename and "/plan/" not in f.filename
            ]
            self.waits.append(f"{func} in {ours[-1].filename}:{ours[-1].lineno}" if ours else str(func))
        return super().__torch_dispatch__(func, types, args, kwargs)


def waits(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether an operator asks the device for a number, for itself or for the size of its result."""
    if func.overloadpacket is aten.repeat_interleave:
        return kwargs.get("output_size") is None
    if func.overloadpacket in (aten.index, aten.index_put, aten.index_put_):
        return any(i is not None and i.dtype == torch.bool for i in args[1])
    return func.overloadpacket in ASKING


@functools.cache
def has_triton(module: str) -> bool:
    """Whether the op that this module defines is one of ours with Triton kernels."""
    package, _, name = module.rpartition(".")
    return name == "op" and importlib.util.find_spec(f"{package}.triton") is not None


def _on_meta(t: Any) -> Any:
    """Without data, but with the same strides and the same place in its storage."""
    if not isinstance(t, torch.Tensor):
        return t
    if not isinstance(t, FakeTensor) and t.dtype == torch.int64:
        return t.to("meta")
    size = t.untyped_storage().nbytes() // t.element_size()
    whole = torch.empty(size, dtype=t.dtype, device="meta")
    return whole.as_strided(t.shape, t.stride(), t.storage_offset())


def main(out: Path) -> None:
    assert os.environ["TRITON_INTERPRET"] == "0", "start it with Triton's interpreter off"
    plan.Ledger = Starting  # type: ignore[misc]
    data = {k: v[:48] for k, v in open_data().items()}
    found: dict[str, Any] = {}
    compiled = set(map(prefill.key_of, prefill.different(prefill.of_models("tiny"), Starting.arch)))
    for stage in STAGES:
        Starting.starts, Starting.waits, began = {}, [], time.process_time()
        made = plan.trace(load_config(None, [*FEW, *HALF]), stage, 2, data=data, steps=1)
        found[stage] = {
            "tokens": made.tokens,
            "flops": made.flops,
            "phases": made.phases,
            "parts": made.parts,
            "useful": made.useful,
            "step": made.step,
            "balance": made.balance,
            "evaluation": made.evaluation,
            "evaluation_share": made.evaluation_share,
            "decoding": made.decoding,
            "starts": {k: sorted(v) for k, v in Starting.starts.items()},
            "not compiled beforehand": sorted(set().union(*Starting.starts.values()) - compiled),
            "waits": Starting.waits,
            "seconds": time.process_time() - began,
        }
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
