"""The decode loop as a GPU runs it, here on a CPU: batches of few sizes, passes that may be recorded and run
again, and no question to the device between them. And the loop as it is on a CPU, held to its record."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.record import processor
from catmllm.config import SamplingConfig, load_config
from catmllm.data.prompts import Sample, cif_prompt
from catmllm.models.build import new_model
from catmllm.plan.decoding import NARROW, counted, per_token
from catmllm.plan.made_up import synthetic_systems
from catmllm.sample import engine, rows
from catmllm.sample.engine import LOOK, RolloutEngine
from catmllm.sample.nucleus import TRIES, sample_nucleus, steady_nucleus
from catmllm.sample.tower import Tower
from tests.sample.recorded import CASES, answers, model_and_prompts, recorded, tensors


@pytest.fixture(scope="module")
def made() -> Any:
    return model_and_prompts()


@pytest.mark.parametrize("case", CASES)
def test_answers_are_those_that_were_recorded(made: Any, case: str) -> None:
    """Bit for bit on the processor of the record; on others a sum may be rounded otherwise."""
    found = tensors(case, answers(case, made))
    known, kind = recorded()
    if kind == processor()["kind"]:
        assert all(torch.equal(v, known[k]) for k, v in found.items())
    elif CASES[case][2] == torch.float32:
        assert torch.equal(found[f"{case}.ids"], known[f"{case}.ids"])
        torch.testing.assert_close(found[f"{case}.logprob"], known[f"{case}.logprob"], rtol=0, atol=1e-4)


class Recorded(TorchDispatchMode):
    """Writes down the operators of a pass with the very tensors that they had."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        """The same operators on the same memory: as a CUDA graph, it knows of nothing that has changed on the
        host since."""
        for func, args, kwargs, out in self.calls:
            for ours, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(ours, torch.Tensor) and ours.data_ptr() != new.data_ptr():
                    ours.copy_(new)


class Replays:
    """Stands in for `Graphs`: records a pass at its second time, and from then on only runs the record."""

    runs = 0

    def __init__(self, device: torch.device, record: bool) -> None:
        self.found: dict[Hashable, Recorded | None] = {}

    def run(self, key: Hashable, work: Callable[[], None]) -> None:
        if key not in self.found:
            self.found[key] = None
            return work()
        kept = self.found[key]
        if kept is None:
            # What a graph records at first it does not do: here it is done, so that there are results.
            with Recorded() as kept:
                work()
            self.found[key] = kept
            return None
        Replays.runs += 1
        return kept.replay()


@pytest.mark.parametrize("case", [pytest.param("long", marks=pytest.mark.slow), "ending", "grammar"])
def test_a_steady_batch_and_its_recorded_passes_give_the_same_answers(
    made: Any, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """Idle rows, padded runs and slots change no token; recorded passes run again no bit."""
    plain = tensors(case, answers(case, made))
    steady = tensors(case, answers(case, made, steady=True))
    assert torch.equal(steady[f"{case}.ids"], plain[f"{case}.ids"])
    torch.testing.assert_close(steady[f"{case}.logprob"], plain[f"{case}.logprob"], rtol=0, atol=1e-4)
    torch.testing.assert_close(steady[f"{case}.hidden"], plain[f"{case}.hidden"], rtol=0, atol=2e-2)
    monkeypatch.setattr(Replays, "runs", 0)
    for module in (engine, rows):
        monkeypatch.setattr(module, "Graphs", Replays)
    again = tensors(case, answers(case, made, steady=True))
    assert all(torch.equal(v, steady[k]) for k, v in again.items())
    assert Replays.runs > 30


def test_a_nucleus_that_nobody_looks_at_is_the_nucleus() -> None:
    """The draws of `sample_nucleus` where it keeps one of four, and its distribution where it does not."""
    torch.manual_seed(0)
    mass = torch.randn(4, 150).mul(2).exp()
    noise = torch.rand(5_000, TRIES)
    for top_p in (0.3, 0.55, 0.95, 1.0):
        for row in mass:
            many = row.expand(len(noise), -1)
            ours, theirs = steady_nucleus(many, top_p, noise), sample_nucleus(many, top_p, noise[:, :5])
            ranked = row.sort(descending=True)
            inside = ranked.indices[ranked.values.cumsum(0) - ranked.values < top_p * row.sum()]
            assert torch.isin(ours, inside).all()
            assert float((ours != theirs).float().mean()) <= 1.1 * (1 - top_p) ** 4 * (0.5 <= top_p < 1)
            exact = torch.zeros_like(row).index_copy_(0, inside, row[inside] / row[inside].sum())
            shares = torch.bincount(ours, minlength=len(row)) / len(noise)
            # 6 standard deviations of the largest share
            assert float((shares - exact).abs().max()) < 6 * 0.5 / len(noise) ** 0.5


def test_the_host_hardly_waits_for_the_device(made: Any) -> None:
    """Free answers: a look in 16 tokens, and two copies where some have ended. Under the grammar, whose next
    sets follow from what was drawn, one wait a pass. Nothing has a size that the device must tell."""
    model, collate, prompts, patterns = made
    params = replace(CASES["long"][3], max_new_tokens=48)
    free = counted(RolloutEngine(model, collate, steady=True), prompts, params, [0])
    assert free.tokens == 48 and free.waits["sizes"] == 0
    assert free.waits["values"] <= 48 // LOOK + 2  # all answers end at once
    walk = counted(RolloutEngine(model, collate, steady=True), prompts, params, [0], patterns=patterns)
    assert walk.tokens == 48 and walk.waits["sizes"] == 0
    assert walk.waits["values"] <= walk.passes + 1 + 2 * len(prompts) < 48
    # what admits prompts, once, and what their answers begin with
    assert free.waits["copies to the device"] <= 2
    assert walk.waits["copies to the device"] <= 2 + len(prompts)


class Started(TorchDispatchMode):
    """Counts the operators of torch and of ours that do more than look at memory otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        made = func._opname.startswith(("empty", "new_empty")) or func._opname in ("detach", "_unsafe_view")
        self.count += not (func.is_view or made)
        return func(*args, **(kwargs or {}))


@pytest.mark.slow
def test_a_layer_adds_the_operators_that_a_real_decode_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a decode on a CPU, without the reading of its prompts, with the norm as one operator, as CUDA has
    it. What the host calculates for itself is there with any number of layers."""

    def fused(x: torch.Tensor, shape: Any, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return torch.ops.aten._fused_rms_norm(x, shape, weight, eps)[0]

    prefill = Tower.prefill

    def unseen(self: Tower, *given: Any) -> Any:
        with torch._C._DisableTorchDispatch():
            return prefill(self, *given)

    monkeypatch.setattr(torch.nn.functional, "rms_norm", fused)
    monkeypatch.setattr(Tower, "prefill", unseen)
    systems = synthetic_systems(14, 4)
    prompts = [Sample(cif_prompt(s.identity)) for s in systems]
    params = SamplingConfig(temperature=1.0, top_p=0.95, max_new_tokens=17)
    counts = []
    for layers in (1, 3):
        made = new_model(load_config(None, [*NARROW, f"model.llm.num_hidden_layers={layers}"]), systems)
        one = RolloutEngine(made[0].eval(), made[1], torch.bfloat16, steady=True)
        with Started() as started:
            longest = max(len(r.ids) for r in one.generate(prompts, params, [0], 4))
        counts.append(started.count / longest)
    layer = (counts[1] - counts[0]) / 2
    # but for what is moved where an answer ends: numbers on the way to a draw differ in their last bits
    assert layer > 20 and per_token(False, tokens=17).layer == pytest.approx(layer, rel=0.01)
