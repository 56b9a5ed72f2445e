"""The encoder without gradients as CUDA graphs: one start instead of a hundred a layer.

By count, one system of 80 atoms is 60 µs of work a layer for a GPU and ten times that for the host that
starts it. A graph is of one size, so that a batch is padded to the next of few sizes: with atoms of a system
of their own, between which the edges are that are too many. No sum of a real atom has a part of them. What a
graph reads are the weights where they lie, so that a step of an optimizer needs no new one. No graph was run
on a GPU yet: what is tested is that padding changes nothing, and what is captured when.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

from catmllm.data.batches import GraphBatch
from catmllm.models.equiformer_v2 import EquiformerV2
from catmllm.models.schnet import NoEncoder, SchNet

SIZES = 8  # to each doubling: at most an eighth of a batch is padding
MOST = 64  # graphs kept
Size = tuple[str, int, int, int]  # pooling; atoms, edges, systems


def bucket(n: int) -> int:
    """The least size that holds n: 1 … 16, then eight to each doubling.

    >>> [bucket(n) for n in (1, 16, 17, 33, 1600)]
    [1, 16, 18, 36, 1664]
    """
    step = max(1, 1 << max(n - 1, 0).bit_length() - 4) if n > 2 * SIZES else 1
    return -(-n // step) * step


def padded(graph: GraphBatch) -> GraphBatch:
    """The batch with atoms, edges and systems to the next size: at least one system more, of so many atoms
    that none has much more than 32 edges."""
    n, e = len(graph.numbers), len(graph.edge_vec)
    new_e, new_systems = bucket(max(e, 1)), bucket(graph.n_systems + 1)
    new_n = bucket(n + 1 + (new_e - e) // 32)
    at = n + torch.arange(new_e - e, device=graph.numbers.device) % (new_n - n)
    extra = graph.edge_vec.new_zeros(new_e - e, 3)
    extra[:, 1] = 1.0
    pad = torch.nn.functional.pad
    return GraphBatch(
        pad(graph.numbers, (0, new_n - n), value=1),
        torch.cat([graph.edge_index, at.expand(2, -1)], 1),
        torch.cat([graph.edge_vec, extra]),
        pad(graph.batch, (0, new_n - n), value=new_systems - 1),
        new_systems,
    )


class EncoderGraphs:
    """Pooled features of batches, as the encoder's `forward` with `pool` gives them.

    A size that comes for the first time runs as it is, at its second time it is captured. Weights that have
    moved make all graphs void.
    """

    def __init__(self, encoder: EquiformerV2 | SchNet | NoEncoder) -> None:
        self.encoder = encoder
        self.seen: Counter[Size] = Counter()
        self.graphs: dict[Size, Callable[[GraphBatch], torch.Tensor]] = {}
        self.place: list[int] = []
        self.memory: Any = None

    def __deepcopy__(self, memo: dict[int, Any]) -> EncoderGraphs:
        """Of another encoder: without graphs, which read this one's weights."""
        return EncoderGraphs(copy.deepcopy(self.encoder, memo))

    def fits(self, graph: GraphBatch) -> bool:
        """Whether a batch may be read so: on CUDA, without gradient, dropout, autocast or shards."""
        e = self.encoder
        return (
            graph.numbers.is_cuda
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cuda")
            and not (e.training or isinstance(e, FSDPModule))
        )

    def __call__(self, graph: GraphBatch, pool: str) -> torch.Tensor:
        """[n_systems, F], or [N, F] of atoms."""
        rows = len(graph.numbers) if pool == "atoms" else graph.n_systems
        whole = padded(graph)
        size = (pool, len(whole.numbers), len(whole.edge_vec), whole.n_systems)
        place = [t.data_ptr() for t in (*self.encoder.parameters(), *self.encoder.buffers())]
        if place != self.place:
            self.place, self.memory = place, None
            self.graphs.clear()
        self.seen[size] += 1
        if size not in self.graphs and self.seen[size] > 1:
            if len(self.graphs) == MOST:
                del self.graphs[next(iter(self.graphs))]
            self.graphs[size] = self.captured(whole, pool)
        made = self.graphs.get(size)
        return (self.read(whole, pool) if made is None else made(whole))[:rows]

    def read(self, graph: GraphBatch, pool: str) -> torch.Tensor:
        g = graph
        return self.encoder(g.numbers, g.edge_index, g.edge_vec, g.batch, g.n_systems, pool=pool)

    def captured(self, graph: GraphBatch, pool: str) -> Callable[[GraphBatch], torch.Tensor]:
        """A function that reads batches of this one's size by one graph, from tensors of its own."""
        names = ("numbers", "edge_index", "edge_vec", "batch")
        own = replace(graph, **{name: getattr(graph, name).clone() for name in names})
        start, out = self.record(lambda: self.read(own, pool))

        def replay(other: GraphBatch) -> torch.Tensor:
            for name in names:
                getattr(own, name).copy_(getattr(other, name))
            start()
            return out.clone()

        return replay

    def record(self, work: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        """What starts a CUDA graph of `work`, and the tensor that it writes."""
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):  # compiles and tunes what a capture may not
            work()
        torch.cuda.current_stream().wait_stream(beside)
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded, pool=self.memory):
            out = work()
        self.memory = recorded.pool()
        return recorded.replay, out
