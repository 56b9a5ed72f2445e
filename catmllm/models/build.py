"""A model by its configuration: of pretrained parts, random, or without storage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from catmllm.config import Config, EncoderConfig, EncoderSizes
from catmllm.data.batches import Collator
from catmllm.data.images import IMAGE_PAD, VISION_END, VISION_START
from catmllm.data.open import texts_only
from catmllm.data.prompts import ENERGY, GRAPH, cif_sample, design_sample, property_sample
from catmllm.data.tokenizer import tiny_tokenizer
from catmllm.models.catalytic_mllm import CatalyticMLLM, Encoder
from catmllm.models.equiformer_v2 import EquiformerV2, EquiformerV2Config
from catmllm.models.fairchem_checkpoint import load_fairchem_checkpoint
from catmllm.models.projector import Projector
from catmllm.models.qwen import outline_llm, pretrained_llm, random_llm, sees
from catmllm.models.schnet import NoEncoder, SchNet, SchNetConfig
from catmllm.seeds import Stream, hash_seed
from catmllm.structure.system import System
from catmllm.structure.templates import NONE, Templates

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def new_model(config: Config, train_systems: Sequence[System]) -> tuple[CatalyticMLLM, Collator]:
    """A model by the configuration, with a tokenizer learned from the
    training texts where the LLM is random."""
    tokenizer = None
    if config.model.llm.pretrained is None:
        d = config.data.decimals
        samples = [property_sample(s) for s in train_systems[:600]]
        if not texts_only(train_systems):
            samples += [
                sample
                for s in train_systems[:600]
                for sample in (
                    property_sample(s, "graph"),
                    cif_sample(s, d),
                    design_sample(s, None, d),
                    design_sample(s, s, d),
                )
            ]
        tokenizer = tiny_tokenizer((s.prompt + s.answer for s in samples), decimals=d)
    model, tokenizer = build_model(config, tokenizer)
    return model, collator(model, tokenizer, config)


def build_model(
    config: Config, tokenizer: PreTrainedTokenizerBase | None = None
) -> tuple[CatalyticMLLM, PreTrainedTokenizerBase]:
    """A model by its configuration: pretrained parts where they are named, seeded random weights elsewhere.

    A pretrained LLM brings its own tokenizer, extended here; the given one serves the random LLM. A
    checkpoint that does not fit is an error, never a warning.
    """
    torch.manual_seed(hash_seed(Stream.WEIGHTS.key(config.seed)))
    encoder = build_encoder(config.model.encoder, config.data.cutoff)
    if config.model.llm.pretrained:
        llm, tokenizer = pretrained_llm(config.model.llm, config.data)
    elif tokenizer is None:
        raise ValueError("a random LLM needs a tokenizer")
    else:
        llm = random_llm(config.model.llm, tokenizer)
    return assemble(llm, encoder, config, tokenizer), tokenizer


def outline_model(config: Config, tokenizer: PreTrainedTokenizerBase) -> tuple[CatalyticMLLM, Collator]:
    """The shapes of a pretrained LLM and of an encoder, without reading any file of weights. To be made where
    tensors have no storage; `tokenizer` cuts CIFs as the LLM's own would."""
    encoder = build_encoder(replace(config.model.encoder, checkpoint=None), config.data.cutoff)
    if config.data.images:
        tokenizer.add_tokens([VISION_START, IMAGE_PAD, VISION_END])
    llm = outline_llm(config.model.llm, tokenizer, config.data.images)
    model = assemble(llm, encoder, config, tokenizer)
    return model, collator(model, tokenizer, config)


def assemble(llm: Any, encoder: Encoder, config: Config, tokenizer: PreTrainedTokenizerBase) -> CatalyticMLLM:
    """The whole model of its parts, with a projector and an energy head of random weights."""
    from catmllm.models.decoder import fuse  # imports transformers' model

    e, width = encoder.config, llm.config.get_text_config().hidden_size
    projector = Projector(config.model.projector, e.lmax, e.sphere_channels, width)
    vocabulary = tokenizer.get_vocab()
    model = CatalyticMLLM(llm, encoder, projector, vocabulary[GRAPH], vocabulary[ENERGY])
    fuse(model.text)
    return model


def build_encoder(config: EncoderConfig, cutoff: float) -> Encoder:
    """What `config.kind` names. EquiformerV2 by preset or by sizes; loads a fairchem checkpoint where one is
    named."""
    if config.kind == "none":
        return NoEncoder()
    if config.kind == "schnet":
        sizes = {f.name: getattr(config, f.name) for f in fields(SchNetConfig) if hasattr(config, f.name)}
        return SchNet(SchNetConfig(**sizes | {"max_radius": cutoff, "lmax": 0}))
    if config.preset:
        encoder = EquiformerV2(EquiformerV2Config.preset(config.preset))
    else:
        sizes = {f.name: getattr(config, f.name) for f in fields(EncoderSizes)}
        encoder = EquiformerV2(EquiformerV2Config(max_radius=cutoff, **sizes))
    if config.checkpoint:
        load_fairchem_checkpoint(config.checkpoint, encoder)
    return encoder


def collator(
    model: CatalyticMLLM,
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
    templates: Templates = NONE,
) -> Collator:
    """What makes batches of samples for a model. Raises ConfigError for pictures that its LLM cannot see."""
    sees(model.llm.config, config.data)
    return Collator(
        tokenizer,
        config.data,
        tokens_per_atom=model.projector.mode == "atoms",
        max_elements=model.encoder.config.max_num_elements,
        shows_structures=not isinstance(model.encoder, NoEncoder),
        templates=templates,
    )


@contextmanager
def on_meta() -> Iterator[None]:
    """Modules made inside have parameters without storage, to be replaced by loaded ones;
    buffers are as ever.

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
