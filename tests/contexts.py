"""A small model in a process group of one, for stages that run inside the test's own process."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from catmllm.config import Config
from catmllm.data.open import open_data
from catmllm.models.build import new_model
from catmllm.train.stage import Context
from catmllm.world import World, start

MakeContext = Callable[[Config], Context]


def small() -> Config:
    config = Config(tensorboard=False, precision="fp32")
    config.model.llm = dataclasses.replace(
        config.model.llm, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96
    )
    for stage in (config.encoder, config.align, config.joint, config.instruct, config.grpo, config.ga_grpo):
        stage.steps, stage.warmup, stage.log_every = 2, 1, 1
    for rl in (config.grpo, config.ga_grpo):
        rl.batch_size, rl.group_size, rl.micro_batch = 3, 3, 4
        rl.sampling.max_new_tokens, rl.sampling.grammar = 12, False
        rl.validate_every = 0
    config.joint.train_encoder = True  # every part of the model trains
    config.grpo.property_share = 0.0
    config.ga_grpo.tasks, config.ga_grpo.iterations, config.ga_grpo.initial = 3, 2, 2
    return config


@pytest.fixture
def make_context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeContext]:
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(key, raising=False)
    data = {k: v[:40] for k, v in open_data().items()}

    def make(config: Config) -> Context:
        if not dist.is_initialized():
            start(config)
        world = World(0, 1, torch.device("cpu"))
        model, collate = new_model(config, data["train"])
        folder = tmp_path / config.precision
        folder.mkdir(exist_ok=True)
        return Context(config, model, collate, data, world, folder)

    yield make
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture
def context(make_context: MakeContext) -> Context:
    return make_context(small())
