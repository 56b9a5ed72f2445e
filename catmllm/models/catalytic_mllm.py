"""CatalyticMLLM: an encoder, a projector and a Qwen with an energy head (paper Fig. 3, §6.7, §7).

A structure enters as the vector(s) that replace the embedding of its `<graph>` marker; the energy is read
from the final hidden state of the `<energy>` query token; text comes from the LM head, which is never tied to
the embedding (stage 3 trains it alone).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import torch
from torch import nn

from catmllm.data.batches import Batch, GraphBatch
from catmllm.data.images import MERGE, PATCH, patches
from catmllm.models.attention import has_sections, no_mask, shares_prompts
from catmllm.models.encoder_graphs import EncoderGraphs
from catmllm.models.energy_head import EnergyHead
from catmllm.models.equiformer_v2 import EquiformerV2
from catmllm.models.kernel_prior import KernelPrior
from catmllm.models.projector import Projector
from catmllm.models.schnet import NoEncoder, SchNet
from catmllm.structure.descriptors import SIZE, SURROUNDINGS, TOLD
from catmllm_kernels.linear_logprob import Allowed, LogProbs, allowed_logprobs, linear_logprobs

Encoder = EquiformerV2 | SchNet | NoEncoder
P = ParamSpec("P")
R = TypeVar("R")


# Which of a batch's answer tokens [M] are read, [F] int64, and the words that each may be
Chosen = tuple[torch.Tensor, Allowed]


# of the squared distance over the number of descriptors, of surroundings and of what a text tells
RATE, TEXT_RATE = 0.04, 0.1


class Answer(NamedTuple):
    """Of a batch with M answer tokens, or F of them that were choices, and S samples."""

    logprob: torch.Tensor  # [M] or [F]
    energy: torch.Tensor  # [S] standardised, NaN without query
    entropy: torch.Tensor | None  # as logprob, where it was asked for; without gradient


class Head(NamedTuple):
    """Log-probabilities [M], or [F] of choices, by the LM head and by a frozen one."""

    logprob: torch.Tensor
    reference: torch.Tensor


class Contrast(NamedTuple):
    """Two views [S, H] of each system; the text's carries no gradient."""

    graph: torch.Tensor
    text: torch.Tensor


class CatalyticMLLM(nn.Module):
    """The whole model. Parameters: `encoder`, `projector`,
    `llm` (transformers' class, see `models.qwen`), `energy_head`."""

    energy_mean: torch.Tensor
    energy_std: torch.Tensor
    llm: Any  # transformers' class, whose submodules a type checker cannot name

    def __init__(
        self, llm: Any, encoder: Encoder, projector: Projector, graph_id: int, energy_id: int
    ) -> None:
        super().__init__()
        self.llm, self.encoder, self.projector = llm, encoder, projector
        self.energy_head = EnergyHead(llm.config.get_text_config().hidden_size, projector.linear.in_features)
        self.prior, self.text_prior = KernelPrior(SIZE, RATE), KernelPrior(TOLD, TEXT_RATE)
        self._graphs = EncoderGraphs(encoder)
        self.graph_id, self.energy_id = graph_id, energy_id
        # Set when sharded: ranks then run every unit in every pass,
        # or one would gather what another does not.
        self.lockstep = False
        self.picture_lockstep = False  # the same of the image tower, which is sharded where it trains
        self.register_buffer("energy_mean", torch.zeros(()))
        self.register_buffer("energy_std", torch.ones(()))

    @torch.no_grad()
    def forget_energies(self) -> None:
        """Scale, closed forms and read-outs of energies as in a new model: other labels have others. What
        encoder and LLM have learned of structures stays."""
        for prior in (self.prior, self.text_prior):
            prior.clear()
        self.energy_mean.zero_()
        self.energy_std.fill_(1.0)
        self.energy_head.clear()

    @property
    def text(self) -> Any:
        """The text tower without its LM head."""
        return getattr(self.llm.model, "language_model", self.llm.model)

    @property
    def visual(self) -> nn.Module:
        """The image tower; an empty module where the LLM reads text alone."""
        return getattr(self.llm.model, "visual", None) or nn.Module()

    def features(self, graph: GraphBatch) -> torch.Tensor:
        """What the encoder pools for the projector: [n_systems, F], or [N, F] with the `atoms` projector."""
        read = self._graphs if self._graphs.fits(graph) else self._graphs.read
        return read(graph, self.projector.mode)

    def graph_tokens(self, graph: GraphBatch) -> torch.Tensor:
        """Vectors that stand for structures: [n_systems, H], or [N, H] with the `atoms` projector."""
        return self.projector(self.features(graph))

    def vectors(self, batch: Batch) -> torch.Tensor | None:
        """The graph tokens of a batch's structures, None where it has none."""
        return None if batch.graph is None else self.graph_tokens(batch.graph)

    def embed(self, batch: Batch) -> torch.Tensor:
        """Token embeddings [T, H] with structures and pictures in their places."""
        return self.insert(self.text.embed_tokens(batch.input_ids), batch, self.vectors(batch))

    def insert(self, x: torch.Tensor, batch: Batch, vectors: torch.Tensor | None) -> torch.Tensor:
        """Embeddings x [T, H] of the batch's tokens with its graph tokens, `vectors`, in the places of their
        markers, in order, and pictures in theirs."""
        x = self._place(x, batch.graph_at, vectors)
        if batch.pictures is not None and batch.picture_at is not None:
            return x.index_copy(0, batch.picture_at, self.picture_tokens(batch.pictures).to(x.dtype))
        if self.picture_lockstep:
            # the smallest picture there is, for its collectives' sake
            blank = torch.zeros(1, MERGE * PATCH, MERGE * PATCH, 3, dtype=torch.uint8, device=x.device)
            x = x + 0.0 * self.picture_tokens(blank).sum().to(x.dtype)
        return x

    def picture_tokens(self, pictures: torch.Tensor) -> torch.Tensor:
        """Vectors [P·tokens of one, H] of pictures uint8 [P, height, width, 3],
        by Qwen2.5-VL's image tower."""
        pixels, grid = patches(pictures)
        return self.llm.model.visual(pixels, grid_thw=grid).pooler_output

    def _place(self, x: torch.Tensor, at: torch.Tensor, vectors: torch.Tensor | None) -> torch.Tensor:
        """x [T, H] with the rows `at` [V] replaced by the V vectors of the structures."""
        if len(at) != (0 if vectors is None else len(vectors)):
            raise ValueError(
                f"{len(at)} graph markers in the text, {0 if vectors is None else len(vectors)} vectors"
            )
        if vectors is None:
            reads = self.lockstep and not isinstance(self.encoder, NoEncoder)
            return x + 0.0 * self._lone_atom().to(x.dtype) if reads else x
        return x.index_copy(0, at, vectors.to(x.dtype))

    def _lone_atom(self) -> torch.Tensor:
        """The sum of one atom's graph token: a pass through encoder
        and projector for its collectives' sake."""
        device = self.energy_mean.device
        numbers, batch = (
            torch.ones(1, dtype=torch.int64, device=device),
            torch.zeros(1, dtype=torch.int64, device=device),
        )
        edges = torch.zeros(2, 0, dtype=torch.int64, device=device)
        return self.graph_tokens(GraphBatch(numbers, edges, torch.zeros(0, 3, device=device), batch, 1)).sum()

    def hidden(self, batch: Batch) -> torch.Tensor:
        """Final hidden states [T, H] of samples end to end; `batch.padded` changes the speed,
        not the result."""
        return self._tower(self.embed(batch), batch)

    def read(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Final hidden states [T, H] and standardised energies [S]; the encoder runs once for both."""
        features = None if batch.graph is None else self.features(batch.graph)
        vectors = None if features is None else self.projector(features)
        x = self.insert(self.text.embed_tokens(batch.input_ids), batch, vectors)
        hidden = self._tower(x, batch)
        return hidden, self.energy(hidden, batch, features)

    def query_states(self, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
        """What the energy head reads [S, H]; a row without `<energy>`
        token holds that of some other place."""
        return hidden[batch.energy_at.clamp_min(0)]

    def energy(self, hidden: torch.Tensor, batch: Batch, features: torch.Tensor | None) -> torch.Tensor:
        """Standardised energies [S] float32 of the samples' `<energy>` tokens: what the closed form says of
        their structures, and what head and features add; NaN for a sample without `<energy>`."""
        head = self.energy_head
        query = self.query_states(hidden, batch).to(head.text.weight.dtype)
        if features is None or batch.graph is None:
            read, sample = query.new_zeros(0, self.projector.linear.in_features), batch.sample.new_zeros(0)
            local = query.new_zeros(0, SURROUNDINGS)
        else:
            read, sample = self._by_system(features, batch.graph), self._samples(batch, batch.graph)
            local, _ = said_of(batch.graph)
        value = head(read.to(query.dtype), local, query, sample) + self._closed_forms(batch)
        return torch.where(batch.energy_at >= 0, value, torch.nan)

    def _closed_forms(self, batch: Batch) -> torch.Tensor:
        """Standardised energies [S] float32 by the closed form of what a sample is shown, 0 where there is
        none."""
        value = torch.zeros(len(batch), device=self.energy_mean.device)
        if batch.graph is not None:
            of_structures = self._closed_form(self.prior, *said_of(batch.graph))
            value = value.index_add(0, self._samples(batch, batch.graph), of_structures)
        if batch.told is not None and batch.told_known is not None and batch.told_at is not None:
            of_texts = self._closed_form(self.text_prior, batch.told, batch.told_known)
            value = value.index_add(0, batch.told_at, of_texts)
        return value

    def expected_errors(self, batch: Batch) -> torch.Tensor:
        """Expected |error| (eV) [S] float32 of the energies by the closed form of what a sample is shown, its
        structure or else its text; NaN where there is none."""
        found = torch.full((len(batch),), torch.nan, device=self.energy_mean.device)
        if batch.told is not None and batch.told_known is not None and batch.told_at is not None:
            found[batch.told_at] = self.text_prior.doubt(batch.told, batch.told_known)
        if batch.graph is not None:
            found[self._samples(batch, batch.graph)] = self.prior.doubt(*said_of(batch.graph))
        return found

    def _samples(self, batch: Batch, graph: GraphBatch) -> torch.Tensor:
        """Whose each structure of a batch is [n_systems]."""
        sample = batch.sample[batch.graph_at]
        if self.projector.mode != "atoms":
            return sample
        first = torch.arange(graph.n_systems, device=sample.device)
        return sample[torch.searchsorted(graph.batch, first)]

    def _closed_form(
        self, prior: KernelPrior, descriptors: torch.Tensor, known: torch.Tensor
    ) -> torch.Tensor:
        """Standardised energies [n] float32 of a closed form; 0 where it has not been fitted."""
        if not len(prior.landmarks):
            return torch.zeros(len(descriptors), device=descriptors.device)
        return ((prior(descriptors, known) - self.energy_mean) / self.energy_std).float()

    def _by_system(self, rows: torch.Tensor, graph: GraphBatch) -> torch.Tensor:
        """One row [n_systems, F] per structure of what is per atom with the `atoms` projector."""
        return segment_mean(rows, graph.batch, graph.n_systems) if self.projector.mode == "atoms" else rows

    def forward(
        self, task: Callable[Concatenate[CatalyticMLLM, P], R], *args: P.args, **options: P.kwargs
    ) -> R:
        """The one entry of training, so that sharding hooks see every use of a parameter: `model(task, ...)`
        runs `task(model, ...)`, one of `CatalyticMLLM.answer`, `.contrast` and `.head`.

        A task returns a tuple of tensors, in which FSDP finds those that have gradients.
        """
        return task(self, *args, **options)

    if TYPE_CHECKING:
        # torch says Callable[..., Any]; a call has the types of its task.
        def __call__(
            self, task: Callable[Concatenate[CatalyticMLLM, P], R], *args: P.args, **options: P.kwargs
        ) -> R: ...

    def answer(
        self,
        batch: Batch,
        temperature: float = 1.0,
        entropy: bool = False,
        chosen: Chosen | None = None,
    ) -> Answer:
        """Log-probabilities of `batch.targets`, and the energies of the property prompts; `entropy` adds that
        of the distributions that those tokens were drawn from. With `chosen` only of the answer tokens that
        were choices, among the words that were allowed."""
        hidden, energy = self.read(batch)
        found = self._logprobs(hidden[batch.answer_at], batch.targets, temperature, entropy, chosen)
        spread = None if found.entropy is None else found.entropy.detach()
        return Answer(found.logprob, energy, spread)

    def _logprobs(
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        temperature: float,
        entropy: bool,
        chosen: Chosen | None,
        reference: torch.Tensor | None = None,
    ) -> LogProbs:
        weight = self.llm.lm_head.weight
        if chosen is None:
            return linear_logprobs(hidden, weight, targets, temperature, entropy, reference)
        at, allowed = chosen
        return allowed_logprobs(hidden[at], weight, targets[at], allowed, temperature, entropy, reference)

    def graph_energy(self, graph: GraphBatch) -> tuple[torch.Tensor]:
        """Standardised energies [n_systems] by the closed form, the encoder and the head's graph part;
        the LLM does not run."""
        features = self._by_system(self.features(graph), graph)
        local, known = said_of(graph)
        seen = self.energy_head(features.to(self.energy_head.text.weight.dtype), local)
        return (seen + self._closed_form(self.prior, local, known),)

    def head(
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        temperature: float,
        reference: torch.Tensor,
        chosen: Chosen | None = None,
    ) -> Head:
        """Log-probabilities of targets [M], or of those `chosen`, from kept hidden states [M, H]: the LM head
        alone, and in the same pass a frozen one, `reference` [V, H]."""
        dtype = self.llm.lm_head.weight.dtype
        found = self._logprobs(hidden.to(dtype), targets, temperature, False, chosen, reference.to(dtype))
        assert found.reference is not None
        return Head(found.logprob, found.reference)

    def contrast(self, batch: Batch) -> Contrast:
        """Graph tokens, and the mean-pooled encodings of the texts."""
        if batch.graph is None:
            raise ValueError("contrastive batches need a structure for every sample")
        vectors = self._by_system(self.graph_tokens(batch.graph), batch.graph)
        with torch.no_grad():
            x = self._tower(self.text.embed_tokens(batch.input_ids), batch)
            text = segment_mean(x.float(), batch.sample, len(batch)).to(x.dtype)
        return Contrast(vectors, text)

    def predict(self, batch: Batch) -> torch.Tensor:
        """Energies [S] in eV of property prompts. Networks whose read-outs count by 0 do not run."""
        if self._networks_are_silent(batch):
            value = torch.where(batch.energy_at >= 0, self._closed_forms(batch), torch.nan)
        else:
            value = self.read(batch)[1]
        return value * self.energy_std + self.energy_mean

    def _networks_are_silent(self, batch: Batch) -> bool:
        """Whether every read-out of energies that a batch has a use for is 0 everywhere."""
        if self.lockstep:
            return False
        head, shown = self.energy_head, 0 if batch.graph is None else batch.graph.n_systems
        parts = [head.graph[-1], head.correction] if shown else []
        parts += [head.text] if shown < len(batch) else []
        return not any(bool(p.any()) for part in parts for p in part.parameters())

    def _tower(self, x: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Embeddings [T, H] to final hidden states [T, H], each sample for itself."""
        if batch.padded:
            # What stands after a sample's end is what follows in x: causal attention never looks there.
            column = torch.arange(batch.max_length, device=x.device)
            place = (batch.cu_seqlens[:-1, None] + column).clamp_max(len(x) - 1)
            positions = column.expand(len(batch), -1)
            if has_sections(self.text):
                positions = positions.expand(3, -1, -1) if batch.mrope is None else batch.mrope[:, place]
            wide = self.text(
                inputs_embeds=x[place], position_ids=positions, use_cache=False
            ).last_hidden_state
            return wide.flatten(0, 1)[batch.sample * batch.max_length + batch.position_ids]
        bounds: dict[str, Any] = {"cu_seq_lens_q": batch.cu_seqlens, "cu_seq_lens_k": batch.cu_seqlens}
        longest = {"max_length_q": batch.max_length, "max_length_k": batch.max_length}
        if batch.prefix is not None:
            if not shares_prompts(self.text):
                raise ValueError("answers can share their prompt's tokens with `attention: varlen` alone")
            bounds["prefix"] = batch.prefix
        return self.text(
            inputs_embeds=x[None],
            attention_mask=no_mask(self.text),
            position_ids=self._positions(batch),
            use_cache=False,
            **bounds,
            **longest,
        ).last_hidden_state[0]

    def _positions(self, batch: Batch) -> torch.Tensor:
        """Positions of samples end to end by transformers' convention: the text's [1, T]; with M-RoPE its
        three [3, 1, T], all equal where there is no picture, behind the text's if a mask is made of these."""
        own = batch.position_ids[None]
        if not has_sections(self.text):
            return own
        mrope = own.expand(3, -1) if batch.mrope is None else batch.mrope
        return (mrope if shares_prompts(self.text) else torch.cat([own, mrope]))[:, None]


def said_of(graph: GraphBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """What is around the adsorbates of a batch and what is known of the calls, of which energies are made."""
    if graph.local is None or graph.known is None:
        raise ValueError("these structures were made for the encoder alone; energies need `Collator.graphs`")
    return graph.local, graph.known


def segment_mean(x: torch.Tensor, batch: torch.Tensor, n: int) -> torch.Tensor:
    """Mean over the rows of each segment: x [N, H], batch [N] -> [n, H]."""
    total = x.new_zeros(n, x.shape[1]).index_add(0, batch, x)
    return total / counts(batch, n)[:, None].clamp_min(1)


def counts(index: torch.Tensor, n: int) -> torch.Tensor:
    """How often each of 0 … n-1 is in `index` [N]: [n] int64. `torch.bincount` asks the device for the
    largest, and waits."""
    return index.new_zeros(n).index_add(0, index, torch.ones_like(index))
