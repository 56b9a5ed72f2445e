"""The supervised stages in one process: precisions agree, both signs of MMTG run, and what a step draws is a function."""

import json
import math

import numpy as np
import pytest
import torch

from catmllm.stages.joint import Joint
from catmllm.stages.supervised import Mixture, is_property, property_with_dropout, relatives, task_sample
from catmllm.trainer.distributed import World
from catmllm.trainer.loop import train
from tests.stages.conftest import MakeContext, small


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_follows_float32(make_context: MakeContext, precision: str) -> None:
    losses = {}
    for p in ("fp32", precision):
        config = small()
        config.precision = p  # type: ignore[assignment]
        config.joint.steps, config.joint.lr = 4, 5e-4
        context = make_context(config)
        train(Joint, context)
        rows = [json.loads(line) for line in (context.folder / "log.jsonl").read_text().splitlines()]
        assert ("loss_scale" in rows[0]) == (p == "fp16")
        losses[p] = [r["loss"] for r in rows]
    assert all(math.isfinite(x) for x in losses[precision])
    np.testing.assert_allclose(losses[precision], losses["fp32"], rtol=0.03)


def test_minus_sign_of_mmtg_is_a_choice(make_context: MakeContext) -> None:
    config = small()
    config.joint.mmtg_sign = "-"
    state, _ = train(Joint, make_context(config))
    assert all(torch.isfinite(v).all() for v in state.values() if v.is_floating_point())


def test_a_step_draws_the_same_batch_again_and_other_steps_others(make_context: MakeContext) -> None:
    context = make_context(small())
    config = context.config.joint
    config.batch_size = 6

    def batch(step: int):
        return Mixture(context, 1).draw(step, config, 0.5, lambda s, rng: _property(s), 0.5, 0.05)[0]

    def _property(system):
        from catmllm.data.prompts import property_sample

        return property_sample(system)

    first, again, other = batch(3), batch(3), batch(4)
    assert torch.equal(first.input_ids, again.input_ids)
    assert torch.equal(first.graph.edge_vec, again.graph.edge_vec)
    assert first.input_ids.shape != other.input_ids.shape or not torch.equal(first.input_ids, other.input_ids)


def test_relatives_share_identity_and_leave_out_the_system_itself(make_context: MakeContext) -> None:
    from catmllm.data.slabs import load_slabs

    systems = load_slabs()[:300]
    for i, kin in enumerate(relatives(systems)):
        assert i not in kin
        assert all(systems[j].identity == systems[i].identity for j in kin)
    assert any(relatives(systems))


def test_ranks_and_passes_share_one_batch(make_context: MakeContext) -> None:
    """The samples of a step do not depend on how many ranks and passes they are spread over."""
    from catmllm.data.prompts import property_sample

    context = make_context(small())
    config = context.config.joint

    def tokens(ranks: int, accumulate: int) -> list[list[int]]:
        config.batch_size, config.accumulate = 12 // ranks, accumulate
        rows = []
        for rank in range(ranks):
            context.world = World(rank, ranks, torch.device("cpu"))
            batches = Mixture(context, 1).draw(5, config, 0.4, lambda s, _: property_sample(s), 0.5, 0.05)
            assert len(batches) == accumulate
            rows += [r.tolist() for b in batches for r in b.input_ids.split(b.cu_seqlens.diff().tolist())]
        return rows

    one = tokens(1, 1)
    assert len(one) == 12 and one == tokens(2, 1) == tokens(3, 2) == tokens(1, 4)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.7, 1.0])
def test_property_samples_are_spread_evenly(share: float) -> None:
    marks = [is_property(i, share) for i in range(400)]
    assert sum(marks) == round(400 * share)
    assert all(abs(sum(marks[i : i + 20]) - 20 * share) <= 1 for i in range(380))


def test_varied_phrasings_reach_the_batches_of_every_task(make_context: MakeContext) -> None:
    config = small()
    config.joint.batch_size = 24
    tokens = {}
    for choice in ("paper", "varied"):
        config.data.phrasings = choice  # type: ignore[assignment]
        context = make_context(config)
        d, o = context.config.data, context.config.joint
        rng = [np.random.default_rng([7, k]) for k in range(60)]
        system = context.data["train"][0]
        samples = [property_with_dropout(system, r, 0.3, 0.0, 0.0, d.phrasings) for r in rng[:30]]
        samples += [task_sample(system, [], r, 0.5, 0.05, 3, d.phrasings) for r in rng[30:]]
        tokens[choice] = len({s.prompt for s in samples})
        Mixture(context, 1).draw(
            0, o, 0.5, lambda s, r: property_with_dropout(s, r, 0, 0, 0, "varied"), 0.5, 0.05
        )
    assert tokens["paper"] <= 5 < 15 < tokens["varied"]
