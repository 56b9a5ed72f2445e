"""Samples to tensors: tokens padded to a rectangle, graphs of a batch joined into one, sorted by target atom.

The order of training is a pure function of (seed, step, rank), so that a run resumed at step s sees just what an
unbroken one sees: no state of a loader has to be saved.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from catmllm.data.prompts import ENERGY, GRAPH, Sample
from catmllm.structure.elements import SYMBOLS
from catmllm.structure.graph import Graph, neighbour_graph
from catmllm.structure.system import System

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from catmllm.config import DataConfig


@dataclass(frozen=True)
class GraphBatch:
    """Several periodic neighbour graphs side by side.

    numbers [N] int64, edge_index [2, E] int64 (source, target; sorted by target), edge_vec [E, 3] float32 Å,
    batch [N] int64 (system of each atom), n_systems.
    """

    numbers: torch.Tensor
    edge_index: torch.Tensor
    edge_vec: torch.Tensor
    batch: torch.Tensor
    n_systems: int

    def to(self, device: torch.device) -> GraphBatch:
        return GraphBatch(
            self.numbers.to(device),
            self.edge_index.to(device),
            self.edge_vec.to(device),
            self.batch.to(device),
            self.n_systems,
        )


@dataclass(frozen=True)
class Batch:
    """What the model reads.

    input_ids, labels [B, T] int64 (labels -100 where nothing is to be predicted), attention_mask [B, T] bool,
    energy [B] float32 with NaN where there is no label, graph: the structures in order of their `<graph>` markers.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    energy: torch.Tensor
    graph: GraphBatch | None

    def to(self, device: torch.device) -> Batch:
        return Batch(
            self.input_ids.to(device),
            self.attention_mask.to(device),
            self.labels.to(device),
            self.energy.to(device),
            None if self.graph is None else self.graph.to(device),
        )


@dataclass
class Collator:
    """Turns samples into a `Batch` with one tokenizer and one definition of the neighbour graph."""

    tokenizer: PreTrainedTokenizerBase
    data: DataConfig
    tokens_per_atom: bool = False  # projector `atoms`: one marker an atom
    max_elements: int = len(SYMBOLS)  # the encoder knows the elements below this atomic number
    _prompts: dict[str, list[int]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        vocabulary = self.tokenizer.get_vocab()
        self.graph_id, self.energy_id = vocabulary[GRAPH], vocabulary[ENERGY]
        self.pad_id = self.tokenizer.pad_token_id
        self.end_id = self.tokenizer.eos_token_id
        self._graph = functools.lru_cache(maxsize=8192)(self._make_graph)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, kept, since training reads the same texts again and again."""
        ids = self._prompts.get(text)
        if ids is None:
            ids = self.tokenizer.encode(text, add_special_tokens=False)
            if len(self._prompts) < 50_000:
                self._prompts[text] = ids
        return ids

    def prompt_ids(self, sample: Sample) -> list[int]:
        """The prompt's ids, the graph marker repeated where every atom is a token."""
        ids = self.encode(sample.prompt)
        if self.graph_id in ids:
            if sample.graph is None:
                raise ValueError("the prompt has a graph marker but the sample carries no structure")
            if self.tokens_per_atom:
                at = ids.index(self.graph_id)
                ids = ids[:at] + [self.graph_id] * len(sample.graph.numbers) + ids[at + 1 :]
        return ids

    def graphs(self, systems: Sequence[System]) -> GraphBatch | None:
        """The neighbour graphs of some systems as one, or None for none.

        Raises ValueError for a cell too small to search and for an element that the encoder does not know.
        """
        if not systems:
            return None
        return join_graphs([s.numbers for s in systems], [self._graph(s) for s in systems])

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """Prompt and answer of each sample, padded on the right; labels on the answer alone."""
        rows = [(self.prompt_ids(s), self.encode(s.answer) if s.answer else []) for s in samples]
        width = max(len(p) + len(a) for p, a in rows)
        ids = torch.full((len(rows), width), self.pad_id, dtype=torch.int64)
        labels = torch.full_like(ids, -100)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        for row, (prompt, answer) in enumerate(rows):
            n = len(prompt) + len(answer)
            ids[row, :n] = torch.tensor(prompt + answer)
            labels[row, len(prompt) : n] = torch.tensor(answer, dtype=torch.int64)
            mask[row, :n] = True
        energy = torch.tensor([np.nan if s.energy is None else s.energy for s in samples])
        graph = self.graphs([s.graph for s in samples if s.graph is not None])
        return Batch(ids, mask, labels, energy.float(), graph)

    def _make_graph(self, system: System) -> Graph:
        d, heaviest = self.data, int(system.numbers.max())
        if heaviest >= self.max_elements:
            raise ValueError(
                f"the encoder knows no {SYMBOLS[heaviest]} (Z = {heaviest}); its table ends at {self.max_elements - 1}"
            )
        return neighbour_graph(
            system.lattice, system.positions, d.cutoff, d.max_neighbours, strict=d.strict_neighbours
        )


def join_graphs(numbers: Sequence[np.ndarray], graphs: Sequence[Graph]) -> GraphBatch:
    """Put graphs side by side, the atoms of each following those of the last."""
    counts = np.array([len(n) for n in numbers])
    offsets = np.concatenate([[0], np.cumsum(counts)[:-1]])
    return GraphBatch(
        torch.from_numpy(np.concatenate(numbers).astype(np.int64)),
        torch.from_numpy(np.concatenate([g.edge_index + o for g, o in zip(graphs, offsets)], axis=1)),
        torch.from_numpy(np.concatenate([g.edge_vec for g in graphs]).astype(np.float32)),
        torch.from_numpy(np.repeat(np.arange(len(graphs)), counts)),
        len(graphs),
    )


def draw(n: int, count: int, seed: int, step: int, rank: int, world: int) -> np.ndarray:
    """Indices of this rank's samples at a step: shuffled epochs without repetition inside an epoch.

    Every rank cuts the same endless sequence of permutations, so that no two ranks share a sample of an epoch.
    """
    start = (step * world + rank) * count
    positions = np.arange(start, start + count)
    epochs = np.unique(positions // n)
    order = {e: np.random.default_rng([seed, 7, int(e)]).permutation(n) for e in epochs}
    return np.array([order[p // n][p % n] for p in positions])
