"""Training that begins from files: a sharded Qwen2.5-VL folder in bf16 and a fairchem encoder,
by configuration alone."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

from catmllm.models.export import export
from catmllm.models.state import save_model
from catmllm.stages.joint import Joint
from catmllm.train.loop import train
from tests.contexts import MakeContext, small


def test_a_stage_starts_from_published_files(make_context: MakeContext, tmp_path: Path) -> None:
    config = small()
    context = make_context(config)
    weights = context.model.state_dict()
    save_model(tmp_path / "first", context.model, weights, config, context.collate)
    export(tmp_path / "first", "hf", tmp_path / "qwen", "bf16", shard="200KB")
    export(tmp_path / "first", "fairchem", tmp_path / "encoder.pt")
    assert len(list((tmp_path / "qwen").glob("model-*-of-*.safetensors"))) > 1
    losses = []
    for pretrained in (False, True):
        config = small()
        if pretrained:
            llm = dataclasses.replace(config.model.llm, pretrained=str(tmp_path / "qwen"))
            encoder = dataclasses.replace(config.model.encoder, checkpoint=str(tmp_path / "encoder.pt"))
            config.model = dataclasses.replace(config.model, llm=llm, encoder=encoder)
        context = make_context(config)
        context.folder = tmp_path / str(pretrained)
        context.folder.mkdir()
        if pretrained:
            assert context.model.llm.dtype == torch.bfloat16
            read = context.model.encoder.state_dict()
            assert all(torch.equal(v, weights[f"encoder.{k}"]) for k, v in read.items())
            # projector and energy head are in neither file
            for part in ("projector", "energy_head"):
                own = {k.removeprefix(f"{part}."): v for k, v in weights.items() if k.startswith(f"{part}.")}
                getattr(context.model, part).load_state_dict(own)
        state, _ = train(Joint, context)
        rows = [json.loads(line) for line in (context.folder / "log.jsonl").read_text().splitlines()]
        losses.append([r["loss"] for r in rows])
        assert all(
            p.dtype == torch.float32 and isinstance(p, DTensor)
            for n, p in context.model.named_parameters()
            if not n.startswith("llm.model.visual.")
        )
        assert state["llm.lm_head.weight"].dtype == torch.float32
    assert losses[1] == pytest.approx(losses[0], rel=0.02)  # bf16 files
