"""CatalyticMLLM: EquiformerV2, a projector and Qwen2.5-VL with an energy head (paper Fig. 3, §6.7, §7).

A structure enters as the vector(s) that replace the embedding of its `<graph>` marker; the energy is read from the
final hidden state of the `<energy>` query token; text comes from the LM head, which is never tied to the embedding
(stage 3 trains it alone).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from catmllm.config import Config, ConfigError, EncoderConfig, LLMConfig, from_dict, to_dict
from catmllm.data.batches import Batch, Collator, GraphBatch
from catmllm.data.images import MERGE, PATCH, patches
from catmllm.data.prompts import ENERGY, GRAPH
from catmllm.data.tokenizer import extend_tokenizer
from catmllm.models.attention import by_part, no_mask, shares_prompts
from catmllm.models.equiformer_v2 import EquiformerV2, EquiformerV2Config
from catmllm.models.fairchem_checkpoint import load_fairchem_checkpoint
from catmllm.models.projector import Projector
from catmllm_kernels.linear_logprob import linear_logprobs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class CatalyticMLLM(nn.Module):
    """The whole model. Parameters: `encoder`, `projector`, `llm` (transformers' Qwen2.5-VL), `energy_head`."""

    energy_mean: torch.Tensor
    energy_std: torch.Tensor
    llm: Any  # transformers' class, whose submodules a type checker cannot name

    def __init__(
        self, llm: Any, encoder: EquiformerV2, projector: Projector, graph_id: int, energy_id: int
    ) -> None:
        super().__init__()
        self.llm, self.encoder, self.projector = llm, encoder, projector
        self.energy_head = nn.Linear(llm.config.get_text_config().hidden_size, 1)
        self.graph_id, self.energy_id = graph_id, energy_id
        # Set when sharded: ranks then run every unit in every pass, or one would gather what another does not.
        self.lockstep = False
        self.picture_lockstep = False  # the same of the image tower, which is sharded where it trains
        self.register_buffer("energy_mean", torch.zeros(()))
        self.register_buffer("energy_std", torch.ones(()))

    @property
    def text(self) -> Any:
        """The text tower without its LM head."""
        return self.llm.model.language_model

    def graph_tokens(self, graph: GraphBatch) -> torch.Tensor:
        """Vectors that stand for structures: [n_systems, H], or [N, H] with the `atoms` projector."""
        g = graph
        features = self.encoder(
            g.numbers, g.edge_index, g.edge_vec, g.batch, g.n_systems, pool=self.projector.mode
        )
        return self.projector(features)

    def embed(self, batch: Batch) -> torch.Tensor:
        """Token embeddings [T, H] with structures and pictures in their places."""
        return self.insert(self.text.embed_tokens(batch.input_ids), batch)

    def insert(self, x: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Embeddings x [T, H] of the batch's tokens with the graph vectors in the places of their markers, in order, and
        pictures in theirs."""
        x = self._place(x, batch.graph_at, batch.graph)
        if batch.pictures is not None and batch.picture_at is not None:
            return x.index_copy(0, batch.picture_at, self.picture_tokens(batch.pictures).to(x.dtype))
        if self.picture_lockstep:
            # the smallest picture there is, for its collectives' sake
            blank = torch.zeros(1, MERGE * PATCH, MERGE * PATCH, 3, dtype=torch.uint8, device=x.device)
            x = x + 0.0 * self.picture_tokens(blank).sum().to(x.dtype)
        return x

    def picture_tokens(self, pictures: torch.Tensor) -> torch.Tensor:
        """Vectors [P·tokens of one, H] of pictures uint8 [P, height, width, 3], by Qwen2.5-VL's image tower."""
        pixels, grid = patches(pictures)
        return self.llm.model.visual(pixels, grid_thw=grid).pooler_output

    def _place(self, x: torch.Tensor, at: torch.Tensor, graph: GraphBatch | None) -> torch.Tensor:
        """x [T, H] with the rows `at` [V] replaced by the V vectors of the structures."""
        vectors = None if graph is None else self.graph_tokens(graph)
        if len(at) != (0 if vectors is None else len(vectors)):
            raise ValueError(
                f"{len(at)} graph markers in the text, {0 if vectors is None else len(vectors)} vectors"
            )
        if vectors is None:
            return x + 0.0 * self._lone_atom().to(x.dtype) if self.lockstep else x
        return x.index_copy(0, at, vectors.to(x.dtype))

    def _lone_atom(self) -> torch.Tensor:
        """The sum of one atom's graph token: a pass through encoder and projector for its collectives' sake."""
        device = self.energy_mean.device
        numbers, batch = (
            torch.ones(1, dtype=torch.int64, device=device),
            torch.zeros(1, dtype=torch.int64, device=device),
        )
        edges = torch.zeros(2, 0, dtype=torch.int64, device=device)
        return self.graph_tokens(GraphBatch(numbers, edges, torch.zeros(0, 3, device=device), batch, 1)).sum()

    def hidden(self, batch: Batch) -> torch.Tensor:
        """Final hidden states [T, H] of samples end to end; `batch.padded` changes the speed, not the result."""
        return self._tower(self.embed(batch), batch)

    def query_states(self, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
        """What the energy head reads [S, H]; a row without `<energy>` token holds that of some other place."""
        return hidden[batch.energy_at.clamp_min(0)]

    def energy(self, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Standardised energies [S] float32 at each sample's `<energy>` token; NaN for a sample without one."""
        query = self.query_states(hidden, batch)
        value = self.energy_head(query.to(self.energy_head.weight.dtype)).squeeze(1).float()
        return torch.where(batch.energy_at >= 0, value, torch.nan)

    def forward(self, task: str, *args: Any, **options: Any) -> dict[str, torch.Tensor]:
        """The one entry of training, so that sharding hooks see every use of a parameter.

        Runs `task_answer`, `task_contrast` or `task_head` by name.
        """
        return getattr(self, f"task_{task}")(*args, **options)

    def task_answer(
        self, batch: Batch, temperature: float = 1.0, entropy: bool = False
    ) -> dict[str, torch.Tensor]:
        """{"logprob" [M] of `batch.targets`, "energy" [S] standardised, NaN without query}.

        `entropy` adds "entropy" [M], of the distributions that those tokens were drawn from, without gradient.
        """
        hidden = self.hidden(batch)
        found = linear_logprobs(
            hidden[batch.answer_at], self.llm.lm_head.weight, batch.targets, temperature, entropy
        )
        out = {"logprob": found.logprob, "energy": self.energy(hidden, batch)}
        return out | {"entropy": found.entropy.detach()} if found.entropy is not None else out

    def task_head(
        self, hidden: torch.Tensor, targets: torch.Tensor, temperature: float, reference: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """{"logprob", "reference"} [M] of targets [M] from kept hidden states [M, H]: the LM head alone, and in the
        same pass a frozen one, `reference` [V, H]."""
        weight = self.llm.lm_head.weight
        found = linear_logprobs(
            hidden.to(weight.dtype), weight, targets, temperature, reference=reference.to(weight.dtype)
        )
        assert found.reference is not None
        return {"logprob": found.logprob, "reference": found.reference}

    def task_contrast(self, batch: Batch) -> dict[str, torch.Tensor]:
        """{"graph" [S, H], "text" [S, H]}; the text side carries no gradient."""
        if batch.graph is None:
            raise ValueError("contrastive batches need a structure for every sample")
        vectors = self.graph_tokens(batch.graph)
        if self.projector.mode == "atoms":
            vectors = segment_mean(vectors, batch.graph.batch, batch.graph.n_systems)
        with torch.no_grad():
            x = self._tower(self.text.embed_tokens(batch.input_ids), batch)
            text = segment_mean(x.float(), batch.sample, len(batch)).to(x.dtype)
        return {"graph": vectors, "text": text}

    def predict(self, batch: Batch) -> torch.Tensor:
        """Energies [S] in eV of property prompts."""
        return self.energy(self.hidden(batch), batch) * self.energy_std + self.energy_mean

    def _tower(self, x: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Embeddings [T, H] to final hidden states [T, H], each sample for itself."""
        if batch.padded:
            # What stands after a sample's end is what follows in x: causal attention never looks there.
            column = torch.arange(batch.max_length, device=x.device)
            place = (batch.cu_seqlens[:-1, None] + column).clamp_max(len(x) - 1)
            positions = column.expand(3, len(batch), -1) if batch.mrope is None else batch.mrope[:, place]
            wide = self.text(
                inputs_embeds=x[place], position_ids=positions, use_cache=False
            ).last_hidden_state
            return wide.flatten(0, 1)[batch.sample * batch.max_length + batch.position_ids]
        # transformers' convention for samples without padding: the text's positions before the three of M-RoPE (all
        # equal where there is no image), and the bounds of the samples for attention.
        positions = batch.position_ids.expand(4, -1)
        if batch.mrope is not None:
            positions = torch.cat([positions[:1], batch.mrope])
        bounds: dict[str, Any] = {"cu_seq_lens_q": batch.cu_seqlens, "cu_seq_lens_k": batch.cu_seqlens}
        longest = {"max_length_q": batch.max_length, "max_length_k": batch.max_length}
        if batch.prefix is not None:
            if not shares_prompts(self.text):
                raise ValueError("answers can share their prompt's tokens with `attention: varlen` alone")
            bounds["prefix"] = batch.prefix
        return self.text(
            inputs_embeds=x[None],
            attention_mask=no_mask(self.text),
            position_ids=positions[:, None],
            use_cache=False,
            **bounds,
            **longest,
        ).last_hidden_state[0]


def segment_mean(x: torch.Tensor, batch: torch.Tensor, n: int) -> torch.Tensor:
    """Mean over the rows of each segment: x [N, H], batch [N] -> [n, H]."""
    total = x.new_zeros(n, x.shape[1]).index_add(0, batch, x)
    return total / torch.bincount(batch, minlength=n)[:, None].clamp_min(1)


def build_model(
    config: Config, tokenizer: PreTrainedTokenizerBase | None = None
) -> tuple[CatalyticMLLM, PreTrainedTokenizerBase]:
    """A model by its configuration: pretrained parts where they are named, seeded random weights elsewhere.

    A pretrained LLM brings its own tokenizer, extended here; the given one serves the random LLM. A checkpoint that
    does not fit is an error, never a warning.
    """
    torch.manual_seed(config.seed)
    encoder = build_encoder(config.model.encoder, config.data.cutoff)
    if config.model.llm.pretrained:
        llm, tokenizer = _pretrained_llm(config.model.llm, config.data.decimals)
    elif tokenizer is None:
        raise ValueError("a random LLM needs a tokenizer")
    else:
        llm = _random_llm(config.model.llm, tokenizer)
    return _assemble(llm, encoder, config, tokenizer), tokenizer


def _assemble(
    llm: Any, encoder: EquiformerV2, config: Config, tokenizer: PreTrainedTokenizerBase
) -> CatalyticMLLM:
    from catmllm.models.decoder import fuse  # imports transformers' model

    e, width = encoder.config, llm.config.get_text_config().hidden_size
    projector = Projector(config.model.projector, e.lmax, e.sphere_channels, width)
    vocabulary = tokenizer.get_vocab()
    fuse(llm.model.language_model)
    return CatalyticMLLM(llm, encoder, projector, vocabulary[GRAPH], vocabulary[ENERGY])


def build_encoder(config: EncoderConfig, cutoff: float) -> EquiformerV2:
    """EquiformerV2 by preset or by sizes; loads a fairchem checkpoint where one is named."""
    if config.preset:
        encoder = EquiformerV2(EquiformerV2Config.preset(config.preset))
    else:
        sizes = {k: v for k, v in asdict(config).items() if k not in ("checkpoint", "preset")}
        encoder = EquiformerV2(EquiformerV2Config(max_radius=cutoff, **sizes))
    if config.checkpoint:
        load_fairchem_checkpoint(config.checkpoint, encoder)
    return encoder


def _random_llm(config: LLMConfig, tokenizer: PreTrainedTokenizerBase) -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    head = config.hidden_size // config.num_attention_heads
    section = [head // 2 - 2 * (head // 6), head // 6, head // 6]
    text: dict[str, Any] = asdict(config)
    for key in ("pretrained", "attention", "train_images"):
        del text[key]
    qwen = Qwen2_5_VLConfig(
        text_config=text
        | {
            "vocab_size": len(tokenizer),
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": section},
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "tie_word_embeddings": False,
        },
        # The image tower comes with the architecture; of random weights it is no use, so that it is as small as can be.
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 1,
            "out_hidden_size": config.hidden_size,
            "fullatt_block_indexes": [0],
        },
        tie_word_embeddings=False,
    )
    return Qwen2_5_VLForConditionalGeneration._from_config(
        qwen, attn_implementation=by_part(config.attention)
    )


def _pretrained_llm(config: LLMConfig, decimals: int) -> tuple[Any, PreTrainedTokenizerBase]:
    from transformers import (
        AutoConfig,
        AutoTokenizer,
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
    )

    name = str(config.pretrained)
    kind = AutoConfig.from_pretrained(name).model_type
    if kind != Qwen2_5_VLConfig.model_type:
        raise ConfigError(f"`model.llm.pretrained: {name}` is a {kind}, not a Qwen2.5-VL")
    tokenizer = AutoTokenizer.from_pretrained(name)
    # In the dtype of the files, read through the page cache: sharding makes float32 of it, a block at a time.
    llm: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        name, attn_implementation=by_part(config.attention), dtype="auto"
    )
    added = extend_tokenizer(tokenizer, decimals, elements=False)
    untie(llm)
    if len(tokenizer) > llm.get_input_embeddings().num_embeddings:
        llm.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():  # a new token starts as the mean of those that it replaces
        for weight in (llm.get_input_embeddings().weight, llm.lm_head.weight):
            for new, old in added.items():
                if old:
                    weight[new] = weight[old].mean(0)
    return llm, tokenizer


def untie(llm: Any) -> None:
    """Give the LM head weights of its own, equal to the embedding's, where the two were one."""
    if llm.lm_head.weight is llm.get_input_embeddings().weight:
        llm.lm_head.weight = nn.Parameter(llm.lm_head.weight.detach().clone())
    llm.config.tie_word_embeddings = llm.config.get_text_config().tie_word_embeddings = False


@contextmanager
def on_meta() -> Iterator[None]:
    """Modules made inside have parameters without storage, to be replaced by loaded ones; buffers are as ever.

    A 7B model is then made in a second, and no memory is filled with random numbers that nobody reads.
    """
    register = nn.Module.register_parameter

    def empty(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = empty  # type: ignore
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def save_model(
    folder: Path,
    model: CatalyticMLLM,
    state: dict[str, torch.Tensor],
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """An export that `load_model` reads: model.safetensors, catmllm.json, tokenizer, and Qwen's own config in llm/.

    `state` is the whole state dict of `model`, gathered from its shards; the weights file appears last, at once.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    model.llm.config.save_pretrained(folder / "llm")
    (folder / "catmllm.json").write_text(json.dumps(to_dict(config), indent=1))
    temporary = folder / "model.safetensors.tmp"
    save_file({k: v.contiguous() for k, v in state.items()}, temporary)
    temporary.rename(folder / "model.safetensors")


def load_model(folder: str | Path, attention: str | None = None) -> tuple[CatalyticMLLM, Collator, Config]:
    """Read an export: the model in float32, what makes its batches, and the configuration it was trained with.

    `attention`: how this one computes it (`model.llm.attention`); None: as when it was trained.
    """
    from safetensors.torch import load_file
    from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    folder = Path(folder)
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(f"{folder}: no model.safetensors; give the folder of a finished stage")
    config = from_dict(json.loads((folder / "catmllm.json").read_text()), str(folder / "catmllm.json"))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    qwen = Qwen2_5_VLConfig.from_pretrained(folder / "llm")
    attention = attention or config.model.llm.attention
    with on_meta():
        llm = Qwen2_5_VLForConditionalGeneration._from_config(qwen, attn_implementation=by_part(attention))
        encoder = build_encoder(replace(config.model.encoder, checkpoint=None), config.data.cutoff)
        model = _assemble(llm, encoder, config, tokenizer)
    # The file's own pages become the weights: ranks of one machine share them until they are sharded.
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=True, assign=True)
    return model.eval(), collator(model, tokenizer, config), config


def collator(model: CatalyticMLLM, tokenizer: PreTrainedTokenizerBase, config: Config) -> Collator:
    return Collator(
        tokenizer,
        config.data,
        tokens_per_atom=model.projector.mode == "atoms",
        max_elements=model.encoder.config.max_num_elements,
    )
