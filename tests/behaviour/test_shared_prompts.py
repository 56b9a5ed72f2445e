"""Passes over answers that share their prompts: two ranks give the loss and the gradients of one, and of
prompts repeated for every answer; so they do where answers are dealt over ranks by their tokens."""

import os
import socket
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

import catmllm.stages.grpo as grpo
from catmllm.config import Config
from catmllm.data.open import open_data
from catmllm.models.build import new_model
from catmllm.sample.answers import Rollout
from catmllm.stages.ga_grpo import GAGRPO
from catmllm.train.setup import freeze
from catmllm.train.sharding import shard, whole
from catmllm.train.stage import Context, Step
from catmllm.world import World, start
from tests.contexts import MakeContext, small
from tests.ranks import two_ranks

LENGTHS = [[9, 1, 14], [5, 30, 2], [11, 3, 7], [8, 8, 20]]  # tokens of the answers to each prompt
# One group without a signal, and a hole in another: rank 1 keeps 2 answers where rank 0 keeps 5,
# and has one pass less.
INFORMATIVE = [[1, 1, 1], [1, 1, 0], [0, 0, 0], [1, 0, 1]]


def configured(ranks: int, budget: int | None = None) -> Config:
    config = small()
    config.grpo.batch_tokens = config.ga_grpo.batch_tokens = budget
    config.ga_grpo.tasks = config.ga_grpo.batch_size = len(LENGTHS)
    config.ga_grpo.batch_size //= ranks
    config.grpo.batch_size, config.grpo.micro_batch = len(LENGTHS) // ranks, 2
    config.grpo.beta, config.grpo.property_share, config.grpo.sampling.temperature = 0.5, 0.5, 0.8
    return config


def one_step(context: Context, shared: bool) -> dict[str, Any]:
    """All passes of this rank's part of the answers: the loss of the step, the gradients,
    the tokens that were read."""
    stage = grpo.GRPO(context)
    world, model = context.world, context.model
    freeze(model, stage, False)
    shard(model, context.config, world)
    stage.begin()
    with torch.no_grad():  # away from the reference, or there is no divergence from it
        for p in model.parameters():
            p.mul_(2.0)
    generator, rng = torch.Generator().manual_seed(0), np.random.default_rng(0)
    prompts = [stage.prompt(i, i, rng)[0] for i in range(len(LENGTHS))]
    rollouts = [
        Rollout(p, torch.randint(3, 60, (n,), generator=generator), torch.zeros(n), None, True, "")
        for p, lengths in enumerate(LENGTHS)
        for n in lengths
    ]
    advantages = rng.normal(size=len(rollouts))
    count = len(prompts) // world.size
    first = count * world.rank
    mine = [i for i, r in enumerate(rollouts) if first <= r.prompt < first + count]
    work = Step([], defaultdict(float))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo, "shares_prompts", lambda text: shared)
        stage.add_policy(
            work,
            prompts[first : first + count],
            [replace(rollouts[i], prompt=rollouts[i].prompt - first) for i in mine],
            advantages[mine],
            np.array(INFORMATIVE, dtype=bool).reshape(-1)[mine],
        )
    stage.add_replay(work, 0)
    return measured(work, context)


def head_step(context: Context) -> dict[str, Any]:
    """The same of GA-GRPO, from hidden states."""
    stage = GAGRPO(context)
    world, model = context.world, context.model
    freeze(model, stage, False)
    shard(model, context.config, world)
    stage.begin()
    generator, rng = torch.Generator().manual_seed(1), np.random.default_rng(1)
    width = model.text.config.hidden_size
    stage.reference_head += 0.1 * torch.randn(stage.reference_head.shape, generator=generator)
    rollouts = [
        Rollout(
            p,
            torch.randint(3, 60, (n,), generator=generator),
            torch.zeros(n),
            torch.randn(n, width, generator=generator),
            True,
            "",
        )
        for p, lengths in enumerate(LENGTHS)
        for n in lengths
    ]
    advantages = rng.normal(size=len(rollouts))
    count = len(LENGTHS) // world.size
    mine = [i for i, r in enumerate(rollouts) if r.prompt // count == world.rank]
    work = Step([], defaultdict(float))
    informative = np.array(INFORMATIVE, dtype=bool).reshape(-1)
    some = [replace(rollouts[i], prompt=rollouts[i].prompt % count) for i in mine]
    stage.add_policy(work, some, advantages[mine], informative[mine])
    return measured(work, context)


def measured(work: Step, context: Context) -> dict[str, Any]:
    """All passes of a step: losses, gradients, and what the passes read."""
    world, model = context.world, context.model
    loss = torch.zeros(())
    for k, part in enumerate(work.passes):
        model.set_requires_gradient_sync(k == len(work.passes) - 1)  # type: ignore[operator]
        value = part.loss()
        value.backward()  # type: ignore[no-untyped-call]
        loss += value.detach()
    gradients = {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}
    return {
        "each": world.gather([p.tokens for p in work.passes]),
        "loss": world.mean({"loss": float(loss)})["loss"],
        "gradients": gradients,
        "tokens": sum(p.tokens for p in work.passes),
        "passes": len(work.passes),
        "kl": world.mean({"kl": work.metrics["kl"]})["kl"],
    }


def rank_of_two(rank: int, port: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    world: World = start(configured(2))
    data = {k: v[:40] for k, v in open_data().items()}

    def save(name: str, budget: int | None, step: Callable[[Context], dict[str, Any]]) -> None:
        config = configured(2, budget)
        model, collate = new_model(config, data["train"])
        found = step(Context(config, model, collate, data, world, Path(folder)))
        if rank == 0:
            torch.save(found, Path(folder) / f"{name}.pt")

    save("shared", None, lambda c: one_step(c, True))
    save("apart", None, lambda c: one_step(c, False))
    save("dealt", 100, lambda c: one_step(c, True))
    save("few", 10**6, lambda c: one_step(c, True))
    save("heads", 24, head_step)
    dist.destroy_process_group()


def test_two_ranks_give_the_step_of_one(make_context: MakeContext, tmp_path: Path) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    expected = one_step(make_context(configured(1)), shared=True)
    apart = one_step(make_context(configured(1)), shared=False)
    heads = head_step(make_context(configured(1)))
    assert expected["tokens"] < apart["tokens"]
    assert expected["kl"] > 1e-3 and len(expected["gradients"]) > 20
    two_ranks(rank_of_two, port, str(tmp_path))
    found = {p.stem: torch.load(p, weights_only=True) for p in tmp_path.glob("*.pt")}
    same_step(apart, expected)
    same_step(found.pop("heads"), heads)
    assert len(found) == 4
    for one in found.values():
        same_step(one, expected)
    policy = np.array([passes[:-1] for passes in found["dealt"]["each"]])  # the last is the replay's
    assert policy.max() <= 100 and policy.shape[1] > 1
    # of one rank 5 answers have a signal, of the other 2
    before = max(sum(passes[:-1]) for passes in found["shared"]["each"])
    few = np.array(found["few"]["each"])
    assert few.shape == (2, 2) and few[:, 0].max() < 0.8 * before
    assert few[:, 0].max() < 1.2 * few[:, 0].mean()


def same_step(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert found["kl"] == pytest.approx(expected["kl"], rel=1e-4)
    assert found["gradients"].keys() == expected["gradients"].keys()
    for name, value in expected["gradients"].items():
        assert float((found["gradients"][name] - value).norm()) <= 1e-4 * float(value.norm()), name
