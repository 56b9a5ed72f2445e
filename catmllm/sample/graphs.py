"""Passes that a GPU runs again by itself: CUDA graphs, one for each shape.

A pass that changes memory in place, whose shapes are its key's, and that asks the device nothing, starts the
same kernels on the same addresses each time. The host of a GPU needs 6 to 10 µs for each of some 1,500
operators a token; to start a graph is one call.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch

MOST = 64  # graphs kept: each holds its intermediate results


class Graphs:
    """Runs passes: by hand on a CPU; on a GPU, where `record`, each from its second time on as a graph."""

    def __init__(self, device: torch.device, record: bool) -> None:
        self.record = record and device.type == "cuda"
        self._found: dict[Hashable, torch.cuda.CUDAGraph | None] = {}
        self._pool: Any = None

    def run(self, key: Hashable, work: Callable[[], None]) -> None:
        """`work`, or what it did when it had this key before."""
        if not self.record or (key not in self._found and len(self._found) == MOST):
            return work()
        if key not in self._found:  # by hand: libraries take their workspaces
            self._found[key] = None
            return work()
        graph = self._found[key]
        if graph is None:
            graph = self._found[key] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                work()
            self._pool = graph.pool()
        graph.replay()
        return None
