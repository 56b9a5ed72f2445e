"""A bfloat16 LLM beside a float16 encoder, as the H100 configurations pair them: a step is float32's to
rounding, and the loss scale that float16 wants does to the other half no harm."""

from __future__ import annotations

import dataclasses
import math
import statistics
from typing import Any

import pytest
import torch
from torch import Tensor

from catmllm.config import Config
from catmllm.stages.joint import Joint
from catmllm.train.setup import Ready, clip, freeze, prepare, update
from catmllm.train.stage import Context
from catmllm_kernels.rounding import MARGIN, Disturbed
from tests.contexts import MakeContext, small

LLM, GRAPH = 2.0**-8, 2.0**-11  # unit roundoffs of bfloat16 and float16


def paired(projector: str = "max") -> Config:
    config = small()
    config.model.projector = projector
    config.joint.batch_size = 2
    config.joint.property_share, config.joint.drop_graph = 1.0, 0.0  # both samples show a structure
    return dataclasses.replace(config, precision="bf16", encoder_precision="fp16")


@pytest.fixture
def definitions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CATMLLM_KERNELS", "reference")


def speaking(context: Context) -> Context:
    """Read-outs of energies are zero in a new model, and through zeros no gradient goes back."""
    torch.manual_seed(1)
    head = context.model.energy_head
    with torch.no_grad():
        for last in (head.graph[-1], head.correction, head.text):
            last.weight.normal_(std=last.in_features**-0.5)
    return context


def first_loss(context: Context) -> Tensor:
    torch.manual_seed(0)
    return Joint(context).step(0).passes[0].loss()


def trained(model: torch.nn.Module) -> dict[str, Tensor]:
    """Gradients by name."""
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {n: g.full_tensor() if hasattr(g, "full_tensor") else g.clone() for n, g in found.items()}


def exact_and_bounds(context: Context) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Loss, features and gradients in float64, and by how much of their largest value each may be off where
    the LLM rounds as bfloat16 does and what reads structures as float16: an error is drawn in every
    operation (`catmllm_kernels.rounding`)."""
    model: Any = context.model.double()
    freeze(model, Joint(context), False)
    noise = Disturbed(LLM, 0)
    seen: dict[str, Tensor] = {}

    def unit(size: float) -> Any:
        return lambda *_: setattr(noise, "unit", size)

    def features(_: Any, __: Any, out: Tensor) -> None:
        seen["features"] = out.detach().clone()
        out.register_hook(unit(GRAPH))  # what comes after in the backward pass is the encoder's
        noise.unit = LLM

    model.encoder.register_forward_pre_hook(unit(GRAPH))
    model.encoder.register_forward_hook(features)
    for prior in (model.prior, model.text_prior):  # closed forms are float32 in every precision
        prior.register_forward_pre_hook(unit(2.0**-24))
        prior.register_forward_hook(unit(LLM))

    def calculate() -> dict[str, Tensor]:
        noise.unit = LLM
        model.zero_grad()
        loss = first_loss(context)
        loss.backward()
        return {"loss": loss.detach(), **seen, **trained(model)}

    exact = calculate()
    worst = dict.fromkeys(exact, 0.0)
    for seed in range(2):
        noise.generator.manual_seed(seed)
        with noise:
            found = calculate()
        worst = {n: max(worst[n], relative(found[n], exact[n])) for n in exact}
    return exact, {n: MARGIN * error for n, error in worst.items()}


def relative(a: Tensor, b: Tensor) -> float:
    size, off = float(b.abs().max()), float((a.double() - b).abs().max())
    return off / size if size else math.inf if off else 0.0


@pytest.mark.parametrize("projector", ["max", "atoms"])
def test_a_step_is_float32s_to_rounding(make_context: MakeContext, definitions: None, projector: str) -> None:
    exact, bounds = exact_and_bounds(speaking(make_context(paired(projector))))
    context = speaking(make_context(paired(projector)))
    seen: dict[str, Any] = {}
    context.model.encoder.register_forward_hook(lambda _, __, out: seen.update(features=out.detach()))
    ready = prepare(Joint(context), context)
    loss = first_loss(context)
    ready.scaler.scale(loss).backward()
    clip(ready, 1e9)  # which also takes the loss scale out
    found = {"loss": loss, **seen, **trained(context.model)}
    assert found.keys() == exact.keys()
    shares = {n: relative(found[n].detach(), exact[n]) / bounds[n] for n in exact if bounds[n]}
    assert max(shares.values()) < 1, max(shares.items(), key=lambda kv: kv[1])
    assert min(shares.values()) > 0
    # It could fail. Rounding changes which atom has the largest component, and then the gradients that go
    # through a pooling are another atom's: the encoder's are held where every atom is a token.
    sharp = [bound for name, bound in bounds.items() if projector != "max" or not name.startswith("encoder.")]
    assert statistics.median(sharp) < 0.25


def weights(context: Context) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in context.model.named_parameters()}


def one_step(context: Context, ready: Ready) -> tuple[float, set[str]]:
    """The norm of the gradients, and which weights moved."""
    before = weights(context)
    ready.scaler.scale(first_loss(context)).backward()
    norm = clip(ready, 1.0)
    update(ready)
    after = weights(context)
    return float(norm), {n for n in before if not torch.equal(before[n], after[n])}


def test_where_the_encoder_overflows_no_part_moves(make_context: MakeContext) -> None:
    context = make_context(paired())
    ready = prepare(Joint(context), context)
    assert ready.scaler.is_enabled()
    ready.scaler._init_scale = 2.0**24  # bfloat16 holds it, float16 does not
    norm, moved = one_step(context, ready)
    assert not norm < float("inf") and not moved
    assert ready.scaler.get_scale() == 2.0**23
    for _ in range(16):
        if moved:
            break
        norm, moved = one_step(context, ready)
    scale = ready.scaler.get_scale()
    assert norm < float("inf") and 2.0**8 <= scale < 2.0**23
    parts = {n.split(".")[0] for n in moved}
    assert parts >= {"llm", "encoder", "projector", "energy_head"}
