"""The encoder on padded batches against the encoder itself, and what is captured when."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from catmllm.data.batches import GraphBatch
from catmllm.models import encoder_graphs
from catmllm.models.encoder_graphs import SIZES, EncoderGraphs, bucket, padded
from tests.models.test_equiformer_v2 import SMALL, make_graph, make_model


def graph(n: int, seed: int = 0) -> GraphBatch:
    numbers, positions, edges, batch = make_graph(n, seed)
    edges = edges.reshape(2, -1).long()
    vectors = positions[edges[0]] - positions[edges[1]] if edges.numel() else torch.zeros(0, 3).double()
    return GraphBatch(numbers, edges, vectors, batch, int(batch.max()) + 1)


@given(st.integers(1, 10**7))
def test_a_size_is_seldom_much_too_large(n: int) -> None:
    assert n <= bucket(n) <= n * (1 + 1 / SIZES) and bucket(bucket(n)) == bucket(n)


def test_sizes_are_few() -> None:
    assert len({bucket(n) for n in range(1, 4097)}) <= 2 * SIZES + 8 * SIZES


@pytest.mark.parametrize("pool", ["max", "invariant", "atoms"])
def test_padding_changes_no_result(pool: str) -> None:
    model = make_model(SMALL)
    reader = EncoderGraphs(model)
    for n in (1, 2, 9, 17):
        g = graph(n, seed=n)
        whole = padded(g)
        assert len(whole.numbers) > n and whole.n_systems > g.n_systems
        with torch.no_grad():
            found, exact = reader(g, pool), reader.read(g, pool)
        assert found.shape == exact.shape
        torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)


def rerun(self: EncoderGraphs, work: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
    """A graph as a CPU can have it: the work again, into the tensor of the first time."""
    out = work()

    def replay() -> None:
        out.copy_(work())

    return replay, out


def test_a_size_is_captured_at_its_second_time_and_reads_new_batches_and_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(EncoderGraphs, "record", rerun)
    monkeypatch.setattr(encoder_graphs, "MOST", 2)
    model = make_model(SMALL)
    reader = EncoderGraphs(model)
    some, others = graph(9, seed=1), graph(9, seed=2)
    with torch.no_grad():
        for g in (some, others, some):
            torch.testing.assert_close(reader(g, "max"), reader.read(g, "max"), rtol=1e-12, atol=1e-12)
        assert len(reader.graphs) == 1
        (one,) = reader.graphs.values()
        next(model.parameters()).mul_(2.0)  # in place, as an optimizer does
        torch.testing.assert_close(reader(others, "max"), reader.read(others, "max"), rtol=1e-12, atol=1e-12)
        assert list(reader.graphs.values()) == [one]
        for n in (30, 30, 40, 40):
            reader(graph(n), "max")
        assert len(reader.graphs) == 2
        model.load_state_dict({k: v + 0.1 for k, v in model.state_dict().items()}, assign=True)
        torch.testing.assert_close(reader(some, "max"), reader.read(some, "max"), rtol=1e-12, atol=1e-12)
        assert one not in reader.graphs.values()
    copied = copy.deepcopy(reader)
    assert copied.encoder is not model and not copied.graphs


def test_only_cuda_without_gradients_is_read_so() -> None:
    reader = EncoderGraphs(make_model(SMALL).eval())
    with torch.no_grad():
        assert not reader.fits(graph(3))
