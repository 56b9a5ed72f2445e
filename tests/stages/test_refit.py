"""The refitted energy head: exact where features are linear, never worse on validation, and what it may touch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from catmllm.data.batches import Collator
from catmllm.data.prompts import Sample
from catmllm.design.predict import MODES, predict_energies, question
from catmllm.models.catalytic_mllm import CatalyticMLLM
from catmllm.stages import refit
from catmllm.stages.refit import query_states, refit_energy_head
from catmllm.structure.system import System
from catmllm.world import World

Model = tuple[CatalyticMLLM, Collator]


@pytest.fixture
def world() -> Iterator[World]:
    """A group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield World(0, 1, torch.device("cpu"))
    dist.destroy_process_group()


@pytest.fixture
def model(small_model: Model) -> CatalyticMLLM:
    return copy.deepcopy(small_model[0])


def mean_absolute_error(model: CatalyticMLLM, collate: Collator, systems: list[System]) -> float:
    truth = np.array([s.known_energy for s in systems])
    errors = [
        np.abs(predict_energies(model, collate, [question(s, m) for s in systems]) - truth) for m in MODES
    ]
    return float(np.mean(errors))


def test_query_states_are_what_the_head_reads(
    model: CatalyticMLLM, small_model: Model, train_systems: list[System]
) -> None:
    collate = small_model[1]
    samples = [question(s, m) for s in train_systems[:70:7] for m in MODES]
    states = query_states(model, collate, samples)
    assert states.shape == (len(samples), 64) and states.dtype == np.float64
    head = model.energy_head
    energies = states @ head.weight.detach().double().numpy()[0] + float(head.bias.detach()[0])
    expected = predict_energies(model, collate, samples)
    np.testing.assert_allclose(energies * 1.5 - 1.25, expected, rtol=1e-4, atol=1e-4)
    assert query_states(model, collate, []).shape == (0, 64)


def test_it_lowers_the_error_on_validation_and_touches_the_head_alone(
    model: CatalyticMLLM, small_model: Model, train_systems: list[System], world: World
) -> None:
    collate = small_model[1]
    train, val = train_systems[0:160:2], train_systems[1:60:2]
    before_state = {k: v.clone() for k, v in model.state_dict().items()}
    before = mean_absolute_error(model, collate, val)
    out = refit_energy_head(model, collate, train, val, world)
    after = mean_absolute_error(model, collate, val)
    assert out["val_mae_before"] == pytest.approx(before, rel=1e-4)
    assert out["val_mae_after"] == pytest.approx(after, rel=1e-3)
    assert after < before  # the head was random: the mean energy alone is better
    assert out["strength"] in refit.STRENGTHS
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before_state[k])}
    assert changed == {"energy_head.weight", "energy_head.bias"}


Refit = Callable[[list[System]], dict[str, float]]


@pytest.fixture
def refitted(model: CatalyticMLLM, small_model: Model, world: World) -> Refit:
    """The head of `model` refitted on systems, which validate it too."""
    return lambda systems: refit_energy_head(model, small_model[1], systems, systems, world)


def synthetic(
    monkeypatch: pytest.MonkeyPatch,
    systems: list[System],
    model: CatalyticMLLM,
    noise: float,
    bias: float = 0.4,
) -> tuple[np.ndarray, float]:
    """Put features in the model's place in which the energies are linear, but for noise; returns weight and bias."""
    rng = np.random.default_rng(0)
    width = model.energy_head.in_features
    weight = rng.normal(size=width)
    mean, std = float(model.energy_mean), float(model.energy_std)

    def states(_: Any, __: Any, samples: list[Sample]) -> np.ndarray:
        out = rng.normal(size=(len(samples), width))
        for k in range(len(samples)):  # all systems in one mode, then in the next
            wanted = (systems[k % len(systems)].known_energy - mean) / std - bias
            out[k] += weight * (wanted - out[k] @ weight) / (weight @ weight)
        return out + noise * rng.normal(size=out.shape)

    monkeypatch.setattr(refit, "query_states", states)
    return weight, bias


def test_it_is_exact_on_linear_features(
    monkeypatch: pytest.MonkeyPatch, model: CatalyticMLLM, train_systems: list[System], refitted: Refit
) -> None:
    systems = train_systems[:200]
    weight, bias = synthetic(monkeypatch, systems, model, noise=0.0)
    out = refitted(systems)
    assert out["val_mae_after"] < 0.02 < out["val_mae_before"]
    found = model.energy_head.weight.detach().double().numpy()[0]
    np.testing.assert_allclose(found, weight, atol=0.02 * np.abs(weight).max())
    assert float(model.energy_head.bias.detach()[0]) == pytest.approx(bias, abs=0.02)


def test_a_head_that_is_right_already_stays(
    monkeypatch: pytest.MonkeyPatch, model: CatalyticMLLM, train_systems: list[System], refitted: Refit
) -> None:
    """No correction is among the candidates: the error on validation cannot rise."""
    systems = train_systems[:200]
    weight, bias = synthetic(monkeypatch, systems, model, noise=0.0)
    with torch.no_grad():
        model.energy_head.weight.copy_(torch.as_tensor(weight)[None])
        model.energy_head.bias.fill_(bias)
    out = refitted(systems)
    assert out["val_mae_after"] <= out["val_mae_before"] < 1e-4


@pytest.mark.parametrize("noise", [0.3, 3.0])
def test_noisy_features_do_not_make_it_worse(
    monkeypatch: pytest.MonkeyPatch,
    model: CatalyticMLLM,
    train_systems: list[System],
    refitted: Refit,
    noise: float,
) -> None:
    systems = train_systems[:40]  # fewer systems than features
    synthetic(monkeypatch, systems, model, noise)
    out = refitted(systems)
    assert out["val_mae_after"] <= out["val_mae_before"]


def test_no_validation_systems_leave_the_head_as_it_is(
    model: CatalyticMLLM, small_model: Model, train_systems: list[System], world: World
) -> None:
    """A small data set's split may have none."""
    before = model.energy_head.weight.detach().clone()
    out = refit_energy_head(model, small_model[1], train_systems[:6], [], world)
    assert torch.equal(model.energy_head.weight, before) and out["strength"] == float("inf")
