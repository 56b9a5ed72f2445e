"""The loader: the same batches with any number of workers, from any point on,
and on another number of ranks."""

from __future__ import annotations

import gc
import itertools
import json
import multiprocessing
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import get_worker_info

from catmllm.data.batches import Batch, Collator
from catmllm.data.loader import Loader, Windows
from catmllm.data.prompts import Sample, cif_sample, property_sample
from catmllm.models.catalytic_mllm import CatalyticMLLM
from catmllm.structure.system import System

Model = tuple[CatalyticMLLM, Collator]
BUDGET = 600


@pytest.fixture(scope="module")
def windows(small_model: Model, train_systems: list[System]) -> Callable[..., Windows]:
    """Property and CIF samples in turn, each named by its energy: its position in the sequence."""

    def example(position: int) -> Sample:
        system = train_systems[position % len(train_systems)]
        sample = cif_sample(system) if position % 4 == 0 else property_sample(system)
        return Sample(sample.prompt, sample.answer, sample.graph, float(position))

    def make(**options: Any) -> Windows:
        return Windows(example, small_model[1], **options)

    return make


def positions(batch: Batch) -> list[int]:
    return [int(e) for e in batch.energy]


def take(loader: Loader, n: int) -> list[list[int]]:
    return [positions(b) for b in itertools.islice(loader, n)]


def test_without_a_budget_ranks_cut_one_sequence(windows: Callable[..., Windows]) -> None:
    """Batches of so many samples in order, each rank the next; passes cut a batch."""
    one = take(Loader(windows(batch_size=6)), 6)
    assert one == [list(range(6 * k, 6 * k + 6)) for k in range(6)]
    ranks = [take(Loader(windows(batch_size=6), rank, 2), 3) for rank in range(2)]
    assert [b for pair in zip(*ranks) for b in pair] == one
    passes = take(Loader(windows(batch_size=6, passes=4)), 8)
    assert [[*itertools.chain(*passes[k : k + 4])] for k in (0, 4)] == one[:2] and all(passes)


def test_packs_hold_every_sample_once_and_waste_little(windows: Callable[..., Windows]) -> None:
    w = windows(budget=BUDGET * 4)
    loader = Loader(w)
    batches = [next(loader)]
    while loader._place[0] == 0:
        batches.append(next(loader))
    assert sorted(p for b in batches for p in positions(b)) == list(range(w.size))
    assert all(b.tokens <= 4 * BUDGET for b in batches) and 50 < len(batches) < 80
    assert 1 - sum(b.tokens for b in batches) / (4 * BUDGET * len(batches)) <= 0.02
    assert loader.too_long == 0
    mixed = [sum(p % 4 == 0 for p in positions(b)) for b in batches]
    assert all(mixed)  # no pack of short samples alone


def test_dealt_batches_cost_the_same(windows: Callable[..., Windows]) -> None:
    """Every sample of a window once, equally many in each batch, atoms counted."""
    plain = windows(batch_size=8, atom_tokens=3.0)
    w = windows(batch_size=8, dealt=True, atom_tokens=3.0)

    def costs(one: Windows) -> np.ndarray:
        packs = [b for k in range(one.size and 512 // one.size) for b in one[k].packs]
        assert sorted(p for b in packs for p in positions(b)) == list(range(512))
        assert {len(b) for b in packs} == {8}
        atoms = [0 if b.graph is None else len(b.graph.numbers) for b in packs]
        return np.array([b.tokens + 3 * n for b, n in zip(packs, atoms)])

    before, after = costs(plain), costs(w)
    assert before.sum() == after.sum() and before.std() > 4 * after.std()
    assert after.max() < 1.03 * after.mean()


@pytest.mark.parametrize("options", [{"batch_size": 5}, {"budget": BUDGET}, {"batch_size": 2, "dealt": True}])
def test_workers_change_nothing(windows: Callable[..., Windows], options: dict[str, int]) -> None:
    w = windows(**options)
    none, *some = (list(itertools.islice(Loader(w, 1, 2, workers=k), 70)) for k in (0, 1, 2))
    for other in some:
        for a, b in zip(none, other, strict=True):
            assert a.max_length == b.max_length and a.padded == b.padded
            left, right = (
                [*vars(a).values(), *vars(a.graph).values()],
                [*vars(b).values(), *vars(b.graph).values()],
            )
            for x, y in zip(left, right):
                assert not isinstance(x, torch.Tensor) or torch.equal(x, y) or x.isnan().any()
            assert positions(a) == positions(b)


def resumed(loader: Loader, state: dict[str, Any]) -> Loader:
    loader.load_state(json.loads(json.dumps(state)))
    return loader


@pytest.mark.parametrize(("options", "n"), [({"batch_size": 3, "passes": 3}, 12), ({"budget": BUDGET}, 90)])
def test_it_goes_on_from_any_batch(windows: Callable[..., Windows], options: dict[str, int], n: int) -> None:
    w = windows(**options)
    unbroken = take(Loader(w, 1, 3), n)
    for seen in (1, n // 2, n - 1):
        first = Loader(w, 1, 3)
        assert take(first, seen) == unbroken[:seen]
        others = [[rank, 0, 0] for rank in (0, 2)]
        state = first.state(lambda place, o=others: [o[0], place, o[1]])
        assert take(resumed(Loader(w, 1, 3, workers=seen % 2), state), n - seen) == unbroken[seen:]


class Sequenced(Windows):
    """Windows of 1 to 4 packs that are only names: what they hold costs nothing."""

    def __getitem__(self, number: int) -> Any:
        from catmllm.data.loader import Window

        return Window([Named((number, k)) for k in range(1 + number * 7 % 4)], 0)  # type: ignore[misc]


class Named(Batch):
    def __init__(self, name: tuple[int, int]) -> None:
        object.__setattr__(self, "name", name)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(runs=st.lists(st.tuples(st.integers(1, 5), st.integers(0, 9)), min_size=1, max_size=4))
def test_any_changes_of_ranks_lose_and_repeat_nothing(
    monkeypatch: pytest.MonkeyPatch, runs: Sequence[tuple[int, int]]
) -> None:
    """Runs of (ranks, steps), each from the state of the one before:
    together they take the first packs once each."""
    monkeypatch.setattr("catmllm.data.loader.each_tensor", lambda batch, _: batch)
    windows = Sequenced(example=lambda _: Sample(""), collate=None, batch_size=1)  # type: ignore[arg-type]
    state: dict[str, Any] | None = None
    seen: list[tuple[int, int]] = []
    for ranks, steps in [*runs, (1, 250)]:  # the last long enough to catch up
        loaders = [Loader(windows, rank, ranks) for rank in range(ranks)]
        for loader in loaders:
            if state is not None:
                resumed(loader, state)
        seen += [next(loader).name for _ in range(steps) for loader in loaders]  # type: ignore[attr-defined]
        states = [loader.state(lambda _, ls=loaders: [[*l._place, 0] for l in ls]) for loader in loaders]
        assert all(s == states[0] for s in states)
        state = states[0]
    assert len(set(seen)) == len(seen)
    last = max(window for window, _ in seen)
    begun = {(w, k) for w in range(last) for k in range(1 + w * 7 % 4)}
    assert begun <= set(seen)


def test_samples_over_the_budget_are_counted(windows: Callable[..., Windows]) -> None:
    w = windows(budget=100)  # energies fit, CIFs do not
    loader = Loader(w)
    seen = [p for b in take(loader, 20) for p in b]
    assert seen and all(p % 4 for p in seen)
    assert loader.too_long == sum(p % 4 == 0 for p in range(w.size))
    after = Loader(w)
    after.load_state(loader.state())
    assert after.too_long == loader.too_long
    with pytest.raises(ValueError, match="none fits 10 tokens; raise `batch_tokens`"):
        next(Loader(windows(budget=10)))


@pytest.mark.parametrize("size", [3, 4, 12])
def test_another_batch_size_goes_on_from_the_same_sample(windows: Callable[..., Windows], size: int) -> None:
    loaders = [Loader(windows(batch_size=6), rank, 2) for rank in range(2)]
    for loader in loaders:
        take(loader, 2)
    state = loaders[0].state(lambda _: [[*l._place, 0] for l in loaders])
    for ranks in (1, 2, 3):
        others = [resumed(Loader(windows(batch_size=size), rank, ranks), state) for rank in range(ranks)]
        seen = sorted(p for _ in range(2) for o in others for b in take(o, 1) for p in b)
        assert seen == list(range(24, 24 + 2 * ranks * size))
        later = resumed(
            Loader(windows(batch_size=size)), others[0].state(lambda _, o=others: [[*l._place, 0] for l in o])
        )
        assert take(later, 1)[0][0] == 24 + 2 * ranks * size


def test_packs_of_another_budget_are_refused(windows: Callable[..., Windows]) -> None:
    loader = Loader(windows(budget=BUDGET))
    take(loader, 1)
    with pytest.raises(ValueError, match="`batch_tokens`, tokenizer or data have changed"):
        Loader(windows(budget=2 * BUDGET)).load_state(loader.state())


def test_workers_end_with_the_last_user(windows: Callable[..., Windows]) -> None:
    """At once, by counting: what waited for the collector would run beside the next stage,
    and be inherited by it."""
    gc.disable()
    try:
        loader = Loader(windows(batch_size=2), workers=1)
        next(loader)
        (worker,) = multiprocessing.active_children()
        del loader
        worker.join(timeout=20)
        assert not worker.is_alive()
    finally:
        gc.enable()


def test_a_fault_in_a_worker_names_its_cause(small_model: Model) -> None:
    def example(position: int) -> Sample:
        raise ValueError(f"sample {position} is bad")

    for workers in (0, 1):
        with pytest.raises(ValueError, match="sample 0 is bad"):
            next(Loader(Windows(example, small_model[1], batch_size=2), workers=workers))


def test_a_worker_ends_nothing_that_its_parent_made(windows: Callable[..., Windows], tmp_path: Path) -> None:
    """Garbage in circles, a process group with threads say, ends before the fork; what becomes garbage in the
    fork stays. Its destructor would wait for threads that a fork has not."""
    ended = tmp_path / "ended"

    class Group:
        def __init__(self) -> None:
            self.me = self

        def __del__(self) -> None:
            with ended.open("a") as file:
                file.write(f"{os.getpid()} ")

    made = windows(batch_size=3)
    held = [Group()]

    def example(position: int) -> Sample:
        if get_worker_info() is not None:
            held.clear()
            gc.collect()
        return made.example(position)

    gc.disable()
    try:
        Group()
        loader = Loader(replace(made, example=example), workers=1)
        assert take(loader, 3) == take(Loader(made), 3)
        assert ended.read_text().split() == [str(os.getpid())] and len(held) == 1
    finally:
        gc.enable()
