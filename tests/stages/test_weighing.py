"""What a stage's network adds to the closed form of energies counts only as far as it helps."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from catmllm.data.prompts import property_sample
from catmllm.models.catalytic_mllm import CatalyticMLLM
from catmllm.models.energy_head import SURROUNDINGS
from catmllm.models.state import load_model, save_model
from catmllm.stages import supervised
from catmllm.stages.encoder import Encoder
from catmllm.stages.grpo import GRPO
from catmllm.stages.joint import Joint
from catmllm.train.loop import train
from catmllm.train.stage import Context
from tests.contexts import MakeContext, small


@pytest.fixture
def context(make_context: MakeContext) -> Context:
    made = make_context(small())
    made.data["val"] = made.data["val"][:12]
    return made


def spoiled(stage: type, number: float) -> type:
    """The stage, whose read-outs of energies are this number in every place after training."""

    class Spoiled(stage):  # type: ignore[misc]
        @torch.no_grad()
        def finish(self) -> str:
            head = self.context.model.energy_head
            others = (head.graph[-1],) if stage is Encoder else ()
            for last in (*others, head.correction, head.text):
                for p in last.parameters():
                    p.fill_(number)
            self.said = super().finish()
            return str(self.said)

    return Spoiled


def test_networks_of_nonsense_do_not_count(context: Context) -> None:
    state, stage = train(spoiled(Encoder, 1e6), context)
    assert state["energy_head.graph.4.weight"].abs().sum() == 0
    assert (state["energy_head.text.weight"] == 1e6).all()  # the LLM is not this stage's
    assert "graph part of the energy head: counts by 0," in stage.said  # type: ignore[attr-defined]


@pytest.mark.parametrize("of", [Joint, GRPO])
def test_read_outs_of_the_llm_are_weighed_each_by_its_own_prompts(context: Context, of: type) -> None:
    context.config.grpo.property_share = 0.5
    state, stage = train(spoiled(of, 1e6), context)
    for part in ("text", "correction"):
        assert state[f"energy_head.{part}.weight"].abs().sum() == 0
        assert f"{part} part of the energy head: counts by 0," in stage.said  # type: ignore[attr-defined]


def test_what_helps_by_chance_does_not_count() -> None:
    rng = np.random.default_rng(0)
    error = rng.normal(0, 0.3, 300)
    shares = supervised.SHARES[:, None]
    noise = rng.normal(0, 0.1, 300)
    alone = np.arange(300)
    assert supervised.least_share(np.abs(error - shares * noise), alone) == 0
    # what explains the error is taken, up to where more is no gain
    chosen = supervised.least_share(np.abs(error - shares * (error + noise)), alone)
    means = np.abs(error - shares * (error + noise)).mean(1)
    assert 0.5 < supervised.SHARES[chosen] <= supervised.SHARES[means.argmin()]
    assert supervised.least_share(np.abs(error - shares * error), alone) == 20
    assert supervised.least_share(np.ones((21, 5)), np.arange(5)) == 0
    # a shift of one surface that is right there by chance
    assert supervised.least_share(np.abs(error - shares * error), np.zeros(300)) == 0
    moved = np.abs(np.where(alone < 290, error, error - 0.5 * shares * np.sign(error)))
    assert supervised.least_share(moved, np.minimum(alone // 29, 10)) < 20


def test_what_is_noted_is_what_is_left(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is noted are the errors of the model without the part, with it, and with the share that stays."""
    found: dict[str, float] = {}
    weigh = supervised.weigh

    def measured(context, part, last, samples, systems, batch_size, energies):
        def error() -> float:
            batch = context.collate(samples)
            energy = context.model(CatalyticMLLM.graph_energy, batch.graph)[0]
            return float(
                (energy * context.model.energy_std + context.model.energy_mean - batch.energy).abs().mean()
            )

        context.model.eval()
        whole = [p.detach().clone() for p in last.parameters()]
        found["whole"] = error()
        said = weigh(context, part, last, samples, systems, batch_size, energies)
        context.model.eval()
        found["best"] = error()
        found["share"] = float((last.weight.full_tensor() / whole[0].full_tensor()).mean())
        found["samples"] = len(samples)
        return said

    monkeypatch.setattr("catmllm.stages.encoder.weigh", measured)
    _, stage = train(spoiled(Encoder, 0.02), context)
    said = stage.said  # type: ignore[attr-defined]
    assert f"({found['best']:.4g} eV; best " in said and f", whole {found['whole']:.4g}," in said
    best = float(re.search(r"best ([\d.e+-]+),", said)[1])  # type: ignore[index]
    assert best <= found["best"] * (1 + 1e-3) and best <= found["whole"] * (1 + 1e-3)  # of four digits
    assert found["samples"] == 24
    assert any(found["share"] == pytest.approx(s, abs=1e-6) for s in np.linspace(0, 1, 21))


def test_without_validation_systems_nothing_is_weighed(context: Context) -> None:
    context.data["val"] = []
    state, stage = train(spoiled(Encoder, 1.0), context)
    assert stage.said == "" and (state["energy_head.graph.4.weight"] == 1).all()  # type: ignore[attr-defined]


@pytest.mark.parametrize("of", [Encoder, Joint])
def test_without_closed_forms_networks_alone_say_energies(
    make_context: MakeContext, of: type, tmp_path: Path
) -> None:
    """They count whole, whatever validation says, and see no surroundings."""
    config = small()
    config.model.closed_form = False
    context = make_context(config)
    state, stage = train(spoiled(of, 1e3), context)
    assert stage.said == "" and (state["energy_head.correction.weight"] == 1e3).all()  # type: ignore[attr-defined]
    save_model(tmp_path, context.model, state, config, context.collate)
    model = load_model(tmp_path)[0].eval()
    assert not len(model.prior.landmarks) and not len(model.text_prior.landmarks)
    systems = context.data["val"][:4]
    batch = context.collate([property_sample(s) for s in systems])
    graph = batch.graph
    assert graph is not None
    (energy,) = model.graph_energy(graph)
    (other,) = model.graph_energy(replace(graph, local=graph.local + 7.0))
    assert torch.equal(energy, other) and bool(energy.isfinite().all())
    features = model.features(graph)
    blank = torch.zeros(len(systems), SURROUNDINGS)
    read = torch.cat([features, blank], 1).to(model.energy_head.text.weight.dtype)
    torch.testing.assert_close(energy, model.energy_head.graph(read).sum(1).float())
    assert not model.expected_errors(batch).any()
