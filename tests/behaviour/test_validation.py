"""Validation: what it measures, that the best weights are kept, and when a stage stops early."""

import json

import numpy as np
import pytest
import torch

from catmllm.data.prompts import property_sample
from catmllm.stages import STAGES
from catmllm.stages.joint import Joint
from catmllm.stages.supervised import validation_error, validation_systems
from catmllm.train.loop import train
from tests.contexts import MakeContext, small


def rows(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_the_error_is_that_of_predictions(make_context: MakeContext) -> None:
    config = small()
    config.joint.validate_systems, config.joint.batch_size = 10, 4
    context = make_context(config)
    systems = validation_systems(context, config.joint)
    assert 8 <= len(systems) <= 10
    context.model.energy_mean.fill_(-1.0)
    context.model.energy_std.fill_(2.0)
    with torch.no_grad():
        found = validation_error(context, config.joint)
        predicted = context.model.predict(context.collate([property_sample(s) for s in systems]))
    wanted = np.abs(predicted.numpy() - np.array([s.known_energy for s in systems])).mean()
    assert found["val"] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("patience", [0, 2])
def test_the_best_weights_are_the_result(make_context: MakeContext, patience: int) -> None:
    config = small()
    o = config.joint
    o.steps, o.validate_every, o.patience, o.checkpoint_every = 10, 1, patience, 100
    context = make_context(config)
    values = iter([5.0, 3.0, 4.0, 3.5, 6.0, 7.0, 8.0, 9.0, 9.5, 9.9])
    weights = {}

    class Judged(Joint):
        def validate(self):
            value = next(values)
            weights[value] = context.model.llm.lm_head.weight.full_tensor().detach().clone()
            return {"val": value}

    state, _ = train(Judged, context)
    seen = [r["val"] for r in rows(context.folder)]
    assert len(seen) == (4 if patience else 10)
    assert torch.equal(state["llm.lm_head.weight"], weights[3.0])
    assert not torch.equal(weights[3.0], weights[3.5])
    assert (context.folder / "checkpoints" / "step-0000002").exists()


@pytest.mark.parametrize("stage", ["align", "instruct"])
def test_stages_validate_on_their_own_terms(make_context: MakeContext, stage: str) -> None:
    config = small()
    o = getattr(config, stage)
    o.validate_every, o.batch_size, o.validate_systems = 1, 4, 8
    context = make_context(config)
    train(STAGES[stage], context)
    found = [r["val"] for r in rows(context.folder)]
    assert len(found) == 2 and all(np.isfinite(found))
    if stage == "align":
        assert 0.5 < found[0] < 6  # of a random model about log(4)
