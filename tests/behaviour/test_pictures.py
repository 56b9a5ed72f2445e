"""Stages with pictures in their prompts: what moves, what stays,
and that the loader's workers change nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from catmllm.data.slabs import load_slabs
from catmllm.stages.grpo import GRPO
from catmllm.stages.instruct import Instruct
from catmllm.train.loop import train
from tests.contexts import MakeContext
from tests.seeing import save_qwen, seeing_config

SETTINGS = (
    "instruct.steps=3",
    "instruct.batch_size=6",
    "instruct.lr=1e-3",
    "instruct.warmup=1",
    "instruct.property_share=0.7",
    "instruct.log_every=1",
    "tensorboard=false",
)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("trained", [False, True])
def test_instruct_moves_what_it_should(
    make_context: MakeContext, tmp_path: Path, trained: bool, precision: str
) -> None:
    save_qwen(tmp_path / "qwen", load_slabs()[:60])
    choice = f"model.llm.train_images={str(trained).lower()}"
    context = make_context(seeing_config(tmp_path / "qwen", *SETTINGS, choice, f"precision={precision}"))
    before = {k: v.detach().float().clone() for k, v in context.model.state_dict().items()}
    state, _ = train(Instruct, context)
    moved = {k for k, v in state.items() if v.is_floating_point() and not torch.equal(v.float(), before[k])}
    weights = {k for k, _ in context.model.named_parameters()}
    seen = {k for k in weights if k.startswith("llm.model.visual.")}
    frozen = {k for k in weights if k.startswith(("encoder.", "projector."))}
    assert not moved & frozen
    assert not moved & seen if not trained else len(moved & seen) == len(seen)
    assert {k for k in weights if k.startswith("llm.")} - seen <= moved
    losses = [json.loads(r)["loss"] for r in (context.folder / "log.jsonl").read_text().splitlines()]
    assert len(losses) == 3 and all(0 < x < 100 for x in losses)


def test_workers_draw_the_same_pictures(make_context: MakeContext, tmp_path: Path) -> None:
    save_qwen(tmp_path / "qwen", load_slabs()[:60])
    batches = []
    for workers in (0, 1):
        config = seeing_config(
            tmp_path / "qwen", *SETTINGS, f"data.workers={workers}", "instruct.batch_tokens=1024"
        )
        stage = Instruct(make_context(config))
        (batch,) = stage.batches(1)
        assert batch.tokens <= 1024 and batch.pictures is not None
        batches.append(batch)
    a, b = batches
    assert torch.equal(a.pictures, b.pictures) and torch.equal(a.mrope, b.mrope)
    assert torch.equal(a.input_ids, b.input_ids)


def test_grpo_replays_pictures_and_leaves_the_tower(make_context: MakeContext, tmp_path: Path) -> None:
    save_qwen(tmp_path / "qwen", load_slabs()[:60])
    settings = ("steps=1", "warmup=1", "batch_size=2", "group_size=2", "micro_batch=4", "property_share=1.0")
    settings = (*settings, "sampling.max_new_tokens=4", "lr=1e-3")
    config = seeing_config(tmp_path / "qwen", *(f"grpo.{s}" for s in settings), "tensorboard=false")
    context = make_context(config)
    before = {k: v.clone() for k, v in context.model.state_dict().items() if "visual" in k}
    seen = []
    tokens = context.model.picture_tokens
    context.model.picture_tokens = lambda p: (  # type: ignore[method-assign]
        seen.append(len(p)) or tokens(p)  # type: ignore[func-returns-value]
    )
    state, _ = train(GRPO, context)
    assert sum(seen) > 0
    assert all(torch.equal(state[k], v) for k, v in before.items())
