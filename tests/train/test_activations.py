"""Checkpointing and compilation change what is kept and how fast it is, never what is learned."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from catmllm.stages.joint import Joint
from catmllm.train.activations import prepare_blocks
from catmllm.train.loop import train
from tests.contexts import MakeContext, small

STEPS = 6


def losses(make_context: MakeContext, folder: Path, attention: str = "varlen", **options: Any) -> list[float]:
    """The loss of every step of a short joint training, where everything trains."""
    config = dataclasses.replace(small(), **options)
    config.model.llm.attention = attention  # type: ignore[assignment]
    config.joint = dataclasses.replace(config.joint, steps=STEPS, batch_size=6)
    context = make_context(config)
    context.folder = folder
    folder.mkdir()
    torch.manual_seed(0)
    train(Joint, context)
    return [json.loads(r)["loss"] for r in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("attention", ["varlen", "eager", "sdpa"])
def test_checkpointing_repeats_the_loss_curve(
    make_context: MakeContext, tmp_path: Path, attention: str
) -> None:
    """Recomputed values are the kept ones: the same operators on the same inputs,
    so the curves agree to the bit."""
    plain, *others = (
        losses(make_context, tmp_path / mode, attention, checkpointing=mode)
        for mode in ("none", "selective", "full")
    )
    assert len(plain) == STEPS and plain[0] != plain[-1]
    assert others == [plain, plain]


def test_shards_in_the_hosts_memory_train_the_same(make_context: MakeContext, tmp_path: Path) -> None:
    plain = losses(make_context, tmp_path / "device")
    assert losses(make_context, tmp_path / "host", cpu_offload=True) == plain


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["none", "selective"])
def test_compiled_blocks_follow_the_eager_ones(
    make_context: MakeContext, tmp_path: Path, checkpointing: str
) -> None:
    """Compiled kernels sum in another order: a relative 1e-4 after some steps of float32."""
    eager = losses(make_context, tmp_path / "eager", compile=False, checkpointing=checkpointing)
    compiled = losses(make_context, tmp_path / "compiled", compile=True, checkpointing=checkpointing)
    assert compiled == pytest.approx(eager, rel=1e-4)


class Products(TorchDispatchMode):
    """Counts matrix products that run."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in ("mm", "addmm", "_linear_pointwise")
        return func(*args, **(kwargs or {}))


def test_what_is_kept_and_what_is_done_again(make_context: MakeContext) -> None:
    """Kept bytes fall from none to selective to full; selective repeats no matrix product,
    full repeats them."""
    kept, products = {}, {}
    for mode in ("none", "selective", "full"):
        config = dataclasses.replace(small(), checkpointing=mode)
        context = make_context(config)
        prepare_blocks(context.model, config)
        batch = Joint(context).step(0)
        sizes: dict[int, int] = {}

        def pack(t: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = batch.passes[0].loss()
        weights = {p.untyped_storage().data_ptr() for p in context.model.parameters()}
        kept[mode] = sum(v for k, v in sizes.items() if k not in weights)
        with Products() as counted:
            loss.backward()
        products[mode] = counted.count
    assert kept["full"] < 0.5 * kept["none"]
    assert products["selective"] == products["none"] < products["full"]
