"""Samples to tensors: tokens end to end, graphs of a batch joined into one, sorted by target atom.

The order of training is a function of the seed alone (`shuffled`):
all ranks read one endless sequence of epochs.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch

from catmllm.config import ConfigError, DataConfig
from catmllm.data.images import IMAGE_PAD, TOKENS, VISION_END, VISION_START, mrope_positions, render
from catmllm.data.prompts import ENERGY, GRAPH, Sample, without_structure
from catmllm.seeds import Key, generator
from catmllm.structure.cif import telling_spans
from catmllm.structure.descriptors import known, surroundings, told
from catmllm.structure.elements import SYMBOLS
from catmllm.structure.graph import neighbour_graphs
from catmllm.structure.system import System
from catmllm.structure.templates import NONE, Templates
from catmllm.structure.text import three_part_text
from catmllm_kernels.varlen_attention import Prefix, continued

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class GraphBatch:
    """Several periodic neighbour graphs side by side.

    numbers [N] int64, edge_index [2, E] int64 (source, target; sorted by target), edge_vec [E, 3] float32 Å,
    batch [N] int64 (system of each atom), n_systems. local [n_systems, SURROUNDINGS] float32: what is around
    the adsorbates, known [n_systems, 3] int64: what the call says (`structure/descriptors.py`), both for the
    energy; None in what only the encoder reads.
    """

    numbers: torch.Tensor
    edge_index: torch.Tensor
    edge_vec: torch.Tensor
    batch: torch.Tensor
    n_systems: int
    local: torch.Tensor | None = None
    known: torch.Tensor | None = None

    def to(self, device: torch.device) -> GraphBatch:
        return each_tensor(self, lambda t: t.to(device, non_blocking=True))


@dataclass(frozen=True)
class Batch:
    """What the model reads: T tokens of S samples laid end to end,
    every place that matters known by its index.

    input_ids [T]; position_ids [T], restarting in each sample; sample s is cu_seqlens[s]:cu_seqlens[s+1],
    cu_seqlens [S+1] int32, `max_length` the longest. answer_at [M]: places whose next token is an answer's,
    targets [M] those tokens, answer_sample [M] their samples, in order. energy_at [S]: each sample's
    `<energy>` token, -1 without one; energy [S] float32 the label in eV, NaN without one. graph_at [V]: the
    `<graph>` markers in order; graph: the structures in order of their markers. All int64 but cu_seqlens.
    Where samples show pictures: `pictures` uint8 [P, height, width, 3] in order, picture_at [P·tokens of one]
    the places of their tokens, mrope [3, T] every token's frame, row and column by Qwen2.5-VL's M-RoPE,
    restarting in each sample; None without any. `padded`: the LLM reads a rectangle, each sample padded to
    the longest, instead of the samples end to end; results are the same, speed is not.

    told_at [n]: the samples whose energy is asked for by text only; told [n, TOLD] float32 what their texts
    tell, told_known [n, 3] int64 what the call says (`structure/descriptors.py`); None without any.

    telling [M] bool: which of `targets` are of `structure.cif.telling_spans`; None where nobody asks
    (`Collator.marks`).

    With `prefix`, samples that continue a prompt share its tokens (`Collator.join_answers`);
    answer_sample then counts answers, not samples.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    answer_at: torch.Tensor
    targets: torch.Tensor
    answer_sample: torch.Tensor
    energy_at: torch.Tensor
    energy: torch.Tensor
    graph_at: torch.Tensor
    graph: GraphBatch | None
    max_length: int
    padded: bool = False
    pictures: torch.Tensor | None = None
    picture_at: torch.Tensor | None = None
    mrope: torch.Tensor | None = None
    prefix: Prefix | None = None
    told: torch.Tensor | None = None
    told_known: torch.Tensor | None = None
    told_at: torch.Tensor | None = None
    telling: torch.Tensor | None = None

    def __len__(self) -> int:
        """S, the number of samples."""
        return len(self.energy)

    @property
    def tokens(self) -> int:
        """T, padding not counted."""
        return len(self.input_ids)

    @property
    def sample(self) -> torch.Tensor:
        """The sample of each token [T] int64."""
        lengths = self.cu_seqlens.diff().long()
        index = torch.arange(len(self), device=lengths.device)
        return index.repeat_interleave(lengths, output_size=self.tokens)

    @property
    def labelled(self) -> torch.Tensor:
        """Whether a sample trains the energy head [S] bool: it has a label and asks for it."""
        return ~self.energy.isnan() & (self.energy_at >= 0)

    def to(self, device: torch.device) -> Batch:
        return each_tensor(self, lambda t: t.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        return each_tensor(self, lambda t: torch.as_tensor(t).pin_memory())


Holder = TypeVar("Holder", Batch, GraphBatch, Prefix)


def each_tensor(holder: Holder, change: Callable[[Any], Any]) -> Holder:
    """A copy in which every tensor (or array, on its way between processes), those of its parts too,
    has gone through `change`."""
    changed: dict[str, Any] = {}
    for name, value in vars(holder).items():
        if isinstance(value, torch.Tensor | np.ndarray):
            changed[name] = change(value)
        elif isinstance(value, GraphBatch):  # noqa: SIM114  a type checker wants them apart
            changed[name] = each_tensor(value, change)
        elif isinstance(value, Prefix):
            changed[name] = each_tensor(value, change)
    return replace(holder, **changed)


class Encoded(NamedTuple):
    """One sample in tokens: the answer's ids follow the prompt's. telling: which of the answer's tokens are
    of `structure.cif.telling_spans`, where that matters."""

    prompt: list[int]
    answer: list[int]
    energy: float | None = None
    graph: System | None = None
    told: System | None = None
    telling: np.ndarray | None = None

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.answer)


@dataclass
class Collator:
    """Turns samples into a `Batch` with one tokenizer and one definition of the neighbour graph."""

    tokenizer: PreTrainedTokenizerBase
    data: DataConfig
    tokens_per_atom: bool = False  # projector `atoms`: one marker an atom
    max_elements: int = len(SYMBOLS)  # the encoder knows the elements below this atomic number
    templates: Templates = NONE  # what slabs of CIFs that a model writes have to be
    shows_structures: bool = True  # False: the model reads texts alone, and samples lose their graphs
    marks: bool = False  # batches say which tokens of answers are of `telling_spans`

    def __post_init__(self) -> None:
        vocabulary = self.tokenizer.get_vocab()
        self.graph_id, self.energy_id = vocabulary[GRAPH], vocabulary[ENERGY]
        self.pad_id = self.tokenizer.pad_token_id
        self.end_id = self.tokenizer.eos_token_id
        self.picture: list[int] = []  # the tokens of a picture in a prompt
        self.image_id = -1
        if self.data.images:
            if missing := [t for t in (VISION_START, IMAGE_PAD, VISION_END) if t not in vocabulary]:
                raise ConfigError(
                    f"`data.images`: the tokenizer has no {missing[0]}; `model.llm.pretrained` must be a "
                    "Qwen2.5-VL"
                )
            start, self.image_id, end = (vocabulary[t] for t in (VISION_START, IMAGE_PAD, VISION_END))
            self.picture = [start, *[self.image_id] * TOKENS, end]

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def prompt_ids(self, sample: Sample) -> list[int]:
        """The prompt's ids, the graph marker repeated where every atom is a token; with `data.images` a
        picture stands before the structure of a question for its energy."""
        sample = self.shown(sample)
        ids = self.encode(sample.prompt)
        if self.graph_id in ids:
            if sample.graph is None:
                raise ValueError("the prompt has a graph marker but the sample carries no structure")
            at = ids.index(self.graph_id)
            picture = self.picture if self.energy_id in ids else []
            count = len(sample.graph.numbers) if self.tokens_per_atom else 1
            ids = ids[:at] + picture + [self.graph_id] * count + ids[at + 1 :]
        return ids

    def shown(self, sample: Sample) -> Sample:
        """A sample as the model sees it; see `prompts.without_structure`."""
        return sample if self.shows_structures else without_structure(sample)

    def encoded(self, sample: Sample) -> Encoded:
        sample = self.shown(sample)
        answer, telling = self.answer_ids(sample.answer) if sample.answer else ([], None)
        return Encoded(self.prompt_ids(sample), answer, sample.energy, sample.graph, sample.told, telling)

    def answer_ids(self, text: str) -> tuple[list[int], np.ndarray | None]:
        """The ids of an answer, and which of them tell something; None where nobody asks."""
        if not self.marks:
            return self.encode(text), None
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ends = np.array(found["offset_mapping"]).reshape(-1, 2)
        inside = np.zeros(len(text) + 1, dtype=int)
        for first, last in telling_spans(text, self.data.rows == "layers"):
            inside[first + 1 : last + 1] = 1
        before = inside.cumsum()
        return list(found["input_ids"]), before[ends[:, 1]] - before[ends[:, 0]] == ends[:, 1] - ends[:, 0]

    def graphs(self, systems: Sequence[System], held_out: Sequence[bool] | None = None) -> GraphBatch | None:
        """The neighbour graphs of some systems as one, or None for none. held_out: of each system whether, in
        training, only closed-form fits without its pair may speak of it; None: of none.

        Raises ValueError for a cell too small to search and for an element that the encoder does not know.
        """
        if not systems:
            return None
        numbers = np.concatenate([s.numbers for s in systems])
        if (heaviest := int(numbers.max())) >= self.max_elements:
            raise ValueError(
                f"the encoder knows no {SYMBOLS[heaviest]} (Z = {heaviest}); its table ends at "
                f"{self.max_elements - 1}"
            )
        d = self.data
        graph, _ = neighbour_graphs(systems, d.cutoff, d.max_neighbours, strict=d.strict_neighbours)
        return GraphBatch(
            torch.from_numpy(numbers.astype(np.int64)),
            torch.from_numpy(graph.edge_index),
            torch.from_numpy(graph.edge_vec.astype(np.float32)),
            torch.from_numpy(np.repeat(np.arange(len(systems)), [len(s.numbers) for s in systems])),
            len(systems),
            torch.from_numpy(np.array([surroundings(s) for s in systems], dtype=np.float32)),
            torch.from_numpy(known(systems, held_out)),
        )

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """Prompt and answer of each sample, end to end."""
        return self.join([self.encoded(s) for s in samples])

    def join(self, rows: Sequence[Encoded]) -> Batch:
        """Samples end to end, in the order given; raises ValueError for an empty one."""
        lengths = np.array([r.length for r in rows])
        if not lengths.all():
            raise ValueError("a sample of no tokens cannot be packed")
        cu_seqlens = np.concatenate([[0], lengths.cumsum()])
        begins, answers = cu_seqlens[:-1], np.array([len(r.answer) for r in rows])
        ids = np.fromiter(
            itertools.chain.from_iterable(itertools.chain(r.prompt, r.answer) for r in rows),
            np.int64,
            cu_seqlens[-1],
        )
        # The places before those of the answers; an answer without any
        # prompt has no place for its first token.
        counts = np.where(answers == lengths, answers - 1, answers)
        answer_sample = np.repeat(np.arange(len(rows)), counts)
        ends = np.repeat(cu_seqlens[1:] - counts, counts) - 1
        answer_at = ends + np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
        queries = np.flatnonzero(ids == self.energy_id)
        energy_at = np.full(len(rows), -1)
        owner = np.searchsorted(begins, queries, side="right") - 1
        energy_at[owner[::-1]] = queries[::-1]  # a sample's first query counts
        position_ids = np.arange(len(ids)) - np.repeat(begins, lengths)
        picture_at = np.flatnonzero(ids == self.image_id)
        pictures: dict[str, Any] = {}
        if len(picture_at):
            shown = np.unique(np.searchsorted(begins, picture_at, side="right") - 1)
            mrope = np.tile(position_ids, (3, 1))
            for s in shown:
                part = slice(begins[s], cu_seqlens[s + 1])
                mrope[:, part] = mrope_positions(ids[part], self.image_id)
            drawn = np.stack([render(g) for s in shown if (g := rows[s].graph) is not None])
            made = {"pictures": drawn, "picture_at": picture_at, "mrope": mrope}
            pictures = {k: torch.from_numpy(v) for k, v in made.items()}
        return Batch(
            torch.from_numpy(ids),
            torch.from_numpy(position_ids),
            torch.from_numpy(cu_seqlens.astype(np.int32)),
            torch.from_numpy(answer_at),
            torch.from_numpy(ids[answer_at + 1]),
            torch.from_numpy(answer_sample),
            torch.from_numpy(energy_at),
            torch.tensor([np.nan if r.energy is None else r.energy for r in rows], dtype=torch.float32),
            torch.from_numpy(np.flatnonzero(ids == self.graph_id)),
            self.graphs(
                [r.graph for r in rows if r.graph is not None],
                [r.energy is not None for r in rows if r.graph is not None],
            ),
            int(lengths.max()),
            padded=not self.data.packed,
            telling=_telling(rows, counts),
            **pictures,
            **_told(rows),
        )

    def join_answers(self, prompts: Sequence[Encoded], answers: Sequence[Sequence[list[int]]]) -> Batch:
        """Prompts, each there once for all its answers, end to end: the samples are a prompt, its answers,
        the next prompt, and so on. An answer's tokens see the prompt's before their own and stand at the
        places after it.

        Log-probabilities and gradients are those of `join` with every prompt repeated;
        answers count in the order given.
        """
        rows: list[Encoded] = []
        owner: list[int] = []
        for prompt, group in zip(prompts, answers, strict=True):
            owner += [-1, *[len(rows)] * len(group)]
            rows += [prompt._replace(answer=[]), *(Encoded([], a) for a in group)]
        batch = self.join(rows)
        bounds, owners = batch.cu_seqlens.long(), torch.tensor(owner)
        place = owners.clamp_min(0)
        lengths = bounds.diff()
        before = torch.where(owners >= 0, lengths[place], 0)
        answer = owners >= 0
        # The place before each token of an answer: of its first one, the prompt's last.
        sample = batch.sample
        targets = answer[sample].nonzero()[:, 0]
        first = batch.position_ids[targets] == 0
        at = torch.where(first, bounds[place + 1][sample[targets]] - 1, targets - 1)
        mrope = batch.mrope
        if mrope is not None:  # no token has a higher position than the last of a prompt, which is text
            mrope = mrope + torch.where(answer, mrope[0, bounds[place + 1] - 1] + 1, 0)[sample]
        return replace(
            batch,
            position_ids=batch.position_ids + before[sample],
            mrope=mrope,
            answer_at=at,
            targets=batch.input_ids[targets],
            answer_sample=(answer.cumsum(0) - 1)[sample[targets]],
            prefix=continued(batch.cu_seqlens, owners),
        )


def _telling(rows: Sequence[Encoded], counts: np.ndarray) -> torch.Tensor | None:
    """Which of the targets of samples, `counts` each, tell something."""
    if all(r.telling is None for r in rows):
        return None
    parts = [
        np.zeros(n, dtype=bool) if r.telling is None else r.telling[len(r.answer) - n :]
        for r, n in zip(rows, counts)
    ]
    return torch.from_numpy(np.concatenate(parts))


def _told(rows: Sequence[Encoded]) -> dict[str, Any]:
    """What the texts of samples without a structure tell."""
    at = [k for k, r in enumerate(rows) if r.told is not None]
    if not at:
        return {}
    systems = [s for r in rows if (s := r.told) is not None]
    return {
        "told": torch.from_numpy(np.array([told(three_part_text(s)) for s in systems], dtype=np.float32)),
        "told_known": torch.from_numpy(known(systems, [rows[k].energy is not None for k in at])),
        "told_at": torch.tensor(at),
    }


@functools.lru_cache(maxsize=4)
def _epoch(n: int, order: Key, epoch: int) -> np.ndarray:
    return generator((*order, epoch)).permutation(n)


def shuffled(position: int, n: int, order: Key) -> int:
    """Which of n samples stands at a position of an endless sequence,
    whose every n are a permutation of their own."""
    epoch, place = divmod(position, n)
    return int(_epoch(n, order, epoch)[place])


def draw(n: int, count: int, order: Key, step: int, rank: int, world: int) -> np.ndarray:
    """Indices of this rank's samples at a step: shuffled epochs without repetition inside an epoch.

    Every rank cuts the same endless sequence of permutations,
    so that no two ranks share a sample of an epoch.
    """
    start = (step * world + rank) * count
    return np.array([shuffled(p, n, order) for p in range(start, start + count)])
