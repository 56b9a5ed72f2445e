"""Two ranks of which one has no structure and no picture in its batch:
the sharded model must neither hang nor mix up its collectives; whatever the LLM is."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from catmllm.data.open import open_data
from catmllm.data.prompts import cif_sample, property_sample
from catmllm.data.slabs import load_slabs
from catmllm.models.build import new_model
from catmllm.models.catalytic_mllm import CatalyticMLLM
from catmllm.train.sharding import shard, whole
from catmllm.world import start
from tests.contexts import small
from tests.ranks import two_ranks
from tests.seeing import save_qwen, seeing_config
from tests.towers import save_tower, tower_config


def pass_of_rank(rank: int, port: int, folder: str, shown: str) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    own, pictures = Path(folder) / "qwen", shown == "pictures"
    config = seeing_config(own, "model.llm.train_images=true", "precision=fp32") if pictures else small()
    if shown == "qwen3":
        config = tower_config(own)
    world = start(config)
    train = open_data()["train"][:60]
    model, collate = new_model(config, train)
    watched = {"none": "encoder.blocks", "pictures": "llm.model.visual.", "qwen3": "llm.model.layers."}[shown]
    batches = [collate([property_sample(s) for s in train[:3]]), collate([cif_sample(s) for s in train[3:6]])]
    expected = torch.zeros(())
    if rank == 0:  # one process, both batches, their gradients averaged as FSDP averages those of ranks
        losses = [-model(CatalyticMLLM.answer, b).logprob.mean() for b in batches]
        torch.stack(losses).mean().backward()
        expected = torch.stack([p.grad.norm() for n, p in model.named_parameters() if n.startswith(watched)])
        model.zero_grad()
    shard(model, config, world)
    for _ in range(2):
        model.zero_grad()
        (-model(CatalyticMLLM.answer, batches[rank]).logprob.mean()).backward()
    found = torch.stack([whole(p.grad).norm() for n, p in model.named_parameters() if n.startswith(watched)])
    if rank == 0:
        torch.save({"expected": expected, "found": found}, Path(folder) / "norms.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("shown", ["none", "pictures", pytest.param("qwen3", marks=pytest.mark.slow)])
def test_a_rank_without_structures_keeps_step(tmp_path: Path, shown: str) -> None:
    import socket

    if shown == "pictures":
        save_qwen(tmp_path / "qwen", load_slabs()[:20])
    if shown == "qwen3":
        save_tower(tmp_path / "qwen", "qwen3")

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    two_ranks(pass_of_rank, port, str(tmp_path), shown)
    norms = torch.load(tmp_path / "norms.pt", weights_only=True)
    torch.testing.assert_close(norms["found"], norms["expected"], rtol=1e-4, atol=1e-6)
