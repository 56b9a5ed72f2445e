"""Two ranks of which one has no structure and no picture in its batch:
the sharded model must neither hang nor mix up its collectives."""

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


def pass_of_rank(rank: int, port: int, folder: str, pictures: bool) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    config = (
        seeing_config(Path(folder) / "qwen", "model.llm.train_images=true", "precision=fp32")
        if pictures
        else small()
    )
    world = start(config)
    train = open_data()["train"][:60]
    model, collate = new_model(config, train)
    watched = "llm.model.visual." if pictures else "encoder.blocks"
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


@pytest.mark.parametrize("pictures", [False, True])
def test_a_rank_without_structures_keeps_step(tmp_path: Path, pictures: bool) -> None:
    import socket

    if pictures:
        save_qwen(tmp_path / "qwen", load_slabs()[:20])

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    two_ranks(pass_of_rank, port, str(tmp_path), pictures)
    norms = torch.load(tmp_path / "norms.pt", weights_only=True)
    torch.testing.assert_close(norms["found"], norms["expected"], rtol=1e-4, atol=1e-6)
