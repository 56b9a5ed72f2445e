"""The joined model: what reaches what, that it is Qwen's own text tower,
and that what is saved is what is loaded."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from catmllm.config import Config, ConfigError, load_config
from catmllm.data.batches import Batch, Collator
from catmllm.data.prompts import (
    END,
    ENERGY,
    GRAPH,
    PAD,
    START,
    Sample,
    cif_sample,
    design_sample,
    property_sample,
)
from catmllm.data.tokenizer import tiny_tokenizer
from catmllm.models.build import build_encoder, build_model, collator
from catmllm.models.catalytic_mllm import CatalyticMLLM, segment_mean
from catmllm.models.energy_head import EnergyHead
from catmllm.models.state import load_model, save_model
from catmllm.structure.cif import write_cif
from catmllm.structure.system import System

Model = tuple[CatalyticMLLM, Collator]


@pytest.fixture
def samples(train_systems: list[System]) -> list[Sample]:
    a, b = train_systems[0], train_systems[800]
    return [property_sample(a), cif_sample(b), design_sample(b, a), property_sample(b, "text")]


@torch.no_grad()
def logits_and_energy(model: CatalyticMLLM, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """[T, V] and [S]."""
    hidden, energy = model.read(batch)
    return hidden @ model.llm.lm_head.weight.T, energy


def rectangle(batch: Batch, values: torch.Tensor, fill: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Values [T, ...] of samples end to end as transformers has them: rows padded on the right,
    and the mask."""
    parts = values.split(batch.cu_seqlens.diff().tolist())
    mask = torch.arange(batch.max_length) < batch.cu_seqlens.diff()[:, None]
    return torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True, padding_value=fill), mask


def test_another_graph_changes_logits_and_energy(small_model: Model, train_systems: list[System]) -> None:
    """Text alone being equal. Another structure of the same words, another crystal,
    the same crystal moved a little."""
    model, collate = small_model
    sample = property_sample(train_systems[0])
    others = [train_systems[800], replace(train_systems[0], frac=train_systems[0].frac * [1, 1, 0.98])]
    here = logits_and_energy(model, collate([sample]))
    again = logits_and_energy(model, collate([sample]))
    assert torch.equal(here[0], again[0]) and torch.equal(here[1], again[1])
    for other in others:
        there = logits_and_energy(model, collate([replace(sample, graph=other)]))
        assert (there[0] - here[0]).abs().max() > 1e-2
        assert (there[1] - here[1]).abs().max() > 1e-4


def test_the_graph_changes_an_answers_likelihood(small_model: Model, train_systems: list[System]) -> None:
    """Another exemplar changes what the design prompt is answered with."""
    model, collate = small_model
    system = train_systems[800]
    with torch.no_grad():
        a, b = (
            model(CatalyticMLLM.answer, collate([design_sample(system, e)])).logprob
            for e in (train_systems[0], train_systems[5])
        )
    assert a.shape == b.shape and (a - b).abs().max() > 1e-3


def test_the_gradient_of_the_energy_reaches_the_encoder(
    small_model: Model, train_systems: list[System]
) -> None:
    model, collate = copy.deepcopy(small_model[0]), small_model[1]
    batch = collate([property_sample(s, "graph") for s in train_systems[:3]])
    model.predict(batch).sum().backward()
    without = [n for n, p in model.encoder.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # what feeds only rows that the last block or the pooling never uses may stay zero, most may not
    assert len(without) < 0.2 * len(list(model.encoder.parameters())), without
    head = model.energy_head
    for p in (model.projector.linear.weight, head.correction.weight, *head.graph.parameters()):
        assert p.grad is not None and p.grad.abs().sum() > 0
    assert model.llm.lm_head.weight.grad is None


def test_the_gradient_of_the_answer_reaches_the_encoder(small_model: Model, samples: list[Sample]) -> None:
    model, collate = copy.deepcopy(small_model[0]), small_model[1]
    model(CatalyticMLLM.answer, collate(samples[2:3])).logprob.sum().backward()
    grads = [p.grad for p in model.encoder.parameters() if p.grad is not None]
    assert sum(float(g.abs().sum()) for g in grads) > 0
    assert all(p.grad is None for p in model.llm.model.visual.parameters())


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("attention", ["varlen", "eager", "sdpa"])
def test_samples_do_not_see_each_other(
    small_model: Model, samples: list[Sample], padded: bool, attention: str
) -> None:
    """Each sample alone gives what it gives among others, however they are laid out."""
    model, collate = copy.deepcopy(small_model[0]), small_model[1]
    own = [logits_and_energy(model, collate([s])) for s in samples]
    with torch.no_grad():
        own_logprob = [model(CatalyticMLLM.answer, collate([s])).logprob for s in samples]
    model.text.set_attn_implementation(attention)
    batch = replace(collate(samples), padded=padded)
    logits, energy = logits_and_energy(model, batch)
    with torch.no_grad():
        logprob = model(CatalyticMLLM.answer, batch).logprob
    torch.testing.assert_close(logits, torch.cat([o[0] for o in own]), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(energy, torch.cat([o[1] for o in own]), equal_nan=True, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logprob, torch.cat(own_logprob), rtol=1e-3, atol=1e-3)


def test_packed_gradients_are_those_of_transformers_on_padded_rows(
    small_model: Model, samples: list[Sample]
) -> None:
    """Loss of answers and energies, every parameter's gradient: ours end to end, transformers' forward with
    eager attention, rows padded on the right and a padding mask. Weights are float64, Qwen's norms and
    softmax float32."""
    collate = small_model[1]
    ours, theirs = (copy.deepcopy(small_model[0]).double() for _ in range(2))
    with (
        torch.no_grad()
    ):  # coordinates' rows, as long as the others: what float32 rounds off grows with a logit
        for head in (ours.llm.lm_head, theirs.llm.lm_head):
            head.weight.copy_(4 * torch.nn.functional.normalize(head.weight))
    theirs.text.set_attn_implementation("eager")
    batch = collate(samples)

    def losses(model: CatalyticMLLM, hidden: torch.Tensor) -> torch.Tensor:
        """The first sample has structure and text, the last its text only."""
        shown, text = hidden[batch.energy_at[batch.energy_at >= 0]]
        head = model.energy_head
        seen = head.of_structures(model.features(batch.graph)[:1], batch.graph.local[:1])
        first = head.correction(shown) + seen
        return (first - 0.3).abs().sum() + (head.text(text) - 0.3).abs().sum()

    out = ours(CatalyticMLLM.answer, batch)
    labelled = ~out.energy.isnan()
    (-out.logprob.mean() + (out.energy.double()[labelled] - 0.3).abs().sum()).backward()

    x, mask = rectangle(batch, theirs.embed(batch))
    wide = theirs.llm(inputs_embeds=x, attention_mask=mask.long(), output_hidden_states=True)
    flat = wide.hidden_states[-1][mask]
    table = wide.logits[mask].log_softmax(-1)
    expected = -table[batch.answer_at, batch.targets].mean() + losses(theirs, flat)
    expected.backward()
    torch.testing.assert_close(
        -table[batch.answer_at, batch.targets], -out.logprob.detach(), rtol=0, atol=2e-5
    )
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters()):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None and b.grad is not None:
            error = (a.grad - b.grad).abs().max() / b.grad.abs().max().clamp_min(1e-3)
            assert error < 3e-5, f"{name}: {error:.1e}"


def test_what_follows_does_not_change_what_came_before(small_model: Model, samples: list[Sample]) -> None:
    """Causality: the energy is read before the answer is written."""
    model, collate = small_model
    with_answer = logits_and_energy(model, collate(samples[:1]))[1]
    without = logits_and_energy(model, collate([replace(samples[0], answer="")]))[1]
    torch.testing.assert_close(with_answer, without, rtol=1e-5, atol=1e-5)


def test_the_text_tower_is_transformers_own_forward(small_model: Model, samples: list[Sample]) -> None:
    """Qwen2_5_VLForConditionalGeneration on the same embeddings, left to find masks and positions itself."""
    model, collate = small_model
    theirs = copy.deepcopy(model.llm)
    theirs.model.language_model.set_attn_implementation("eager")
    for some in ([samples[0]], samples):
        batch = collate(some)
        with torch.no_grad():
            embeds, mask = rectangle(batch, model.embed(batch))
            expected = theirs(inputs_embeds=embeds, attention_mask=mask.long()).logits[mask]
            with_varlen = model.llm(inputs_embeds=embeds, attention_mask=mask.long()).logits[mask]
        torch.testing.assert_close(logits_and_energy(model, batch)[0], expected, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(with_varlen, expected, rtol=1e-3, atol=1e-3)


def test_text_alone_equals_transformers_on_token_ids(small_model: Model, samples: list[Sample]) -> None:
    model, collate = small_model
    batch = collate(samples[1:2])
    with torch.no_grad():
        labels = torch.full_like(batch.input_ids, -100)
        labels[batch.answer_at + 1] = batch.targets
        out = model.llm(input_ids=batch.input_ids[None], labels=labels[None])
        ours = model(CatalyticMLLM.answer, batch).logprob
    assert float(-ours.mean()) == pytest.approx(float(out.loss), rel=1e-5)
    torch.testing.assert_close(logits_and_energy(model, batch)[0], out.logits[0], rtol=1e-4, atol=1e-4)


def test_log_probabilities_are_those_of_the_labels(small_model: Model, samples: list[Sample]) -> None:
    model, collate = small_model
    batch = collate(samples)
    logits, energy = logits_and_energy(model, batch)
    for temperature in (1.0, 0.7):
        with torch.no_grad():
            out = model(CatalyticMLLM.answer, batch, temperature=temperature)
        table = (logits.double() / temperature).log_softmax(-1)
        expected = [table[at, token] for at, token in zip(batch.answer_at.tolist(), batch.targets.tolist())]
        torch.testing.assert_close(out.logprob.double(), torch.stack(expected), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(out.energy, energy, equal_nan=True)


def test_energies_come_from_the_query_token(small_model: Model, samples: list[Sample]) -> None:
    model, collate = small_model
    batch = collate(samples)
    with torch.no_grad():
        hidden, energy = model.read(batch)
        eV = model.predict(batch)
        assert energy.isnan().tolist() == [False, True, True, False]
        first, last = (i for i, token in enumerate(batch.input_ids.tolist()) if token == collate.energy_id)
        assert batch.graph is not None
        head, features = model.energy_head, model.features(batch.graph)
        # with a structure its features and the correction, from text only a read-out of its own
        assert batch.graph.local is not None
        seen = head.of_structures(features[:1], batch.graph.local[:1])
        expected = [seen + head.correction(hidden[first]), head.text(hidden[last])]
    torch.testing.assert_close(energy[[0, 3]], torch.cat(expected), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(eV[[0, 3]], torch.cat(expected) * 1.5 - 1.25, rtol=1e-4, atol=1e-4)


def test_the_encoder_speaks_for_itself(small_model: Model, train_systems: list[System]) -> None:
    """What encoder and head say without the LLM is what a model without correction says with it,
    in every mode that shows the structure."""
    model, collate = copy.deepcopy(small_model[0]), small_model[1]
    systems = train_systems[:4]
    graph = collate.graphs(systems)
    assert graph is not None
    with torch.no_grad():
        (alone,) = model(CatalyticMLLM.graph_energy, graph)
        model.energy_head.correction.weight.zero_()
        model.energy_head.correction.bias.zero_()
        for mode in ("both", "graph"):
            energy = model(CatalyticMLLM.answer, collate([property_sample(s, mode) for s in systems])).energy
            torch.testing.assert_close(energy, alone, rtol=1e-5, atol=1e-5)


def test_a_graph_token_counts_for_its_own_sample(small_model: Model, train_systems: list[System]) -> None:
    """Structures in some samples only, an exemplar among them:
    energies as of each sample in a batch of its own."""
    model, collate = small_model
    a, b, c = train_systems[:3]
    some = [property_sample(a, "text"), property_sample(b), design_sample(c, a), property_sample(c, "graph")]
    with torch.no_grad():
        together = model.predict(collate(some))
        alone = torch.cat([model.predict(collate([s])) for s in some])
    torch.testing.assert_close(together, alone, equal_nan=True, rtol=1e-4, atol=1e-4)


def test_a_head_of_one_read_out_is_still_read(
    small_config: Config, small_model: Model, samples: list[Sample], tmp_path: Path
) -> None:
    """Exports from before the head read graph tokens predict as they did."""
    model, collate = small_model
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("energy_head.")}
    weight, bias = model.energy_head.text.weight.detach(), model.energy_head.text.bias.detach()
    old = state | {"energy_head.weight": weight.clone(), "energy_head.bias": bias.clone()}
    save_model(tmp_path, model, old, small_config, collate)
    loaded, its_collate, _ = load_model(tmp_path)
    batch = its_collate(samples)
    with torch.no_grad():
        hidden, energy = loaded.read(batch)
        expected = (hidden[batch.energy_at.clamp_min(0)] @ weight.T + bias)[:, 0]
    torch.testing.assert_close(energy[[0, 3]], expected[[0, 3]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("markers", [0, 2])
def test_a_wrong_number_of_markers_is_an_error(
    small_model: Model, train_systems: list[System], markers: int
) -> None:
    model, collate = small_model
    batch = collate([property_sample(train_systems[0])])
    wrong = replace(batch, graph_at=torch.arange(markers))
    with pytest.raises(ValueError, match=f"{markers} graph markers in the text, 1 vectors"):
        model.hidden(wrong)
    with pytest.raises(ValueError, match="1 graph markers in the text, 0 vectors"):
        model.hidden(replace(batch, graph=None))


def test_markers_take_their_vectors_in_order(small_model: Model, train_systems: list[System]) -> None:
    model, collate = small_model
    systems = [train_systems[i] for i in (0, 300, 900)]
    batch = collate([property_sample(systems[0]), cif_sample(systems[1]), *map(property_sample, systems[1:])])
    assert batch.graph is not None
    with torch.no_grad():
        x = model.embed(batch)
        vectors = model.graph_tokens(batch.graph)
        plain = model.text.embed_tokens(batch.input_ids)
    marks = batch.input_ids == collate.graph_id
    assert batch.sample[marks].tolist() == [0, 2, 3]
    torch.testing.assert_close(x[marks], vectors)
    torch.testing.assert_close(x[~marks], plain[~marks], rtol=0, atol=0)


def test_a_systems_vector_does_not_depend_on_the_batch(
    small_model: Model, train_systems: list[System]
) -> None:
    model, collate = small_model
    systems = [train_systems[i] for i in (0, 300, 900)]
    with torch.no_grad():
        together = model.graph_tokens(collate.graphs(systems))  # type: ignore[arg-type]
        alone = [model.graph_tokens(collate.graphs([s]))[0] for s in systems]  # type: ignore[arg-type]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-4, atol=1e-5)


def test_contrast_pools_the_frozen_text(small_model: Model, train_systems: list[System]) -> None:
    model, collate = small_model
    texts = ["CO</s>Pd (1 1 1)</s>[]", "OH</s>Pd (1 1 1)</s>[O Pd atop [Pd Pd Pd O]]"]
    batch = collate([Sample(t, "", s) for t, s in zip(texts, train_systems)])
    out = model(CatalyticMLLM.contrast, batch)
    assert out.graph.requires_grad and not out.text.requires_grad
    for row, text in enumerate(texts):
        ids = torch.tensor([collate.encode(text)])
        with torch.no_grad():
            hidden = model.llm.model(input_ids=ids).last_hidden_state[0]
        torch.testing.assert_close(out.text[row], hidden.mean(0), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="structure for every sample"):
        model(CatalyticMLLM.contrast, replace(batch, graph=None))


def test_segment_mean() -> None:
    x, batch = torch.randn(5, 3), torch.tensor([0, 0, 2, 2, 2])
    mean = segment_mean(x, batch, 3)
    torch.testing.assert_close(mean, torch.stack([x[:2].mean(0), torch.zeros(3), x[2:].mean(0)]))


# ---------------------------------------------------------------------------- saving and loading


@pytest.mark.parametrize("projector", ["max", "invariant", "atoms"])
def test_what_is_saved_is_what_is_loaded(
    small_config: Config, small_model: Model, samples: list[Sample], tmp_path: Path, projector: Any
) -> None:
    tokenizer = small_model[1].tokenizer
    config = replace(small_config, model=replace(small_config.model, projector=projector), seed=3)
    model, _ = build_model(config, tokenizer)
    model.energy_mean.fill_(-0.5)
    model.energy_std.fill_(2.0)
    model.eval()
    collate = collator(model, tokenizer, config)
    save_model(tmp_path / "stage", model, model.state_dict(), config, collate)
    loaded, its_collate, its_config = load_model(tmp_path / "stage")
    assert its_config == config and not loaded.training
    a, b = collate(samples), its_collate(samples)
    assert torch.equal(a.input_ids, b.input_ids)
    for ours, again in zip(logits_and_energy(model, a), logits_and_energy(loaded, b)):
        torch.testing.assert_close(ours, again, rtol=0, atol=0, equal_nan=True)
    with torch.no_grad():
        torch.testing.assert_close(model.predict(a), loaded.predict(b), rtol=0, atol=0, equal_nan=True)
    assert sorted(p.name for p in (tmp_path / "stage").iterdir() if p.suffix == ".tmp") == []


def test_an_unfinished_or_torn_export_is_an_error(
    small_config: Config, small_model: Model, tmp_path: Path
) -> None:
    model, collate = small_model
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        load_model(tmp_path)
    state = model.state_dict()
    missing = {k: v for k, v in state.items() if k != "energy_head.text.weight"}
    save_model(tmp_path / "a", model, missing, small_config, collate)
    with pytest.raises(RuntimeError, match=r"Missing key.*energy_head\.text\.weight"):
        load_model(tmp_path / "a")
    other = state | {"projector.linear.weight": torch.zeros(3, 3)}
    save_model(tmp_path / "b", model, other, small_config, collate)
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_model(tmp_path / "b")
    catmllm = tmp_path / "b" / "catmllm.json"
    catmllm.write_text(json.dumps(json.loads(catmllm.read_text()) | {"sede": 1}))
    with pytest.raises(ConfigError, match="did you mean `seed`"):
        load_model(tmp_path / "b")


def test_the_same_seed_makes_the_same_model(small_config: Config, small_model: Model) -> None:
    tokenizer = small_model[1].tokenizer
    a, b = (build_model(small_config, tokenizer)[0].state_dict() for _ in range(2))
    c = build_model(replace(small_config, seed=1), tokenizer)[0].state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["llm.lm_head.weight"], c["llm.lm_head.weight"])
    with pytest.raises(ValueError, match="needs a tokenizer"):
        build_model(small_config)


def test_the_default_model_has_at_most_five_million_parameters(small_model: Model) -> None:
    model, _ = build_model(Config(), small_model[1].tokenizer)
    assert sum(p.numel() for p in model.parameters()) <= 5_000_000
    assert not any(a is b for a in [model.llm.lm_head.weight] for b in [model.text.embed_tokens.weight])


# ---------------------------------------------------------------------------- encoder checkpoints


def test_an_encoder_checkpoint_is_loaded(small_config: Config, tmp_path: Path) -> None:
    encoder = build_encoder(small_config.model.encoder, 5.0)
    with torch.no_grad():
        for p in encoder.parameters():
            p.add_(1.0)
    torch.save({"state_dict": encoder.state_dict()}, tmp_path / "encoder.pt")
    config = replace(small_config.model.encoder, checkpoint=str(tmp_path / "encoder.pt"))
    loaded = build_encoder(config, 5.0)
    for k, v in encoder.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[k], v, rtol=0, atol=0)


def test_a_checkpoint_that_does_not_load_is_an_error(
    small_config: Config, small_model: Model, tmp_path: Path
) -> None:
    """Never a warning and random weights, as the published code has it."""

    def build(path: Path, **sizes: int) -> None:
        encoder = replace(small_config.model.encoder, checkpoint=str(path), **sizes)  # type: ignore[arg-type]
        model = replace(small_config.model, encoder=encoder)
        build_model(replace(small_config, model=model), small_model[1].tokenizer)

    with pytest.raises(FileNotFoundError):
        build(tmp_path / "absent.pt")
    state = build_encoder(small_config.model.encoder, 5.0).state_dict()
    torch.save(state, tmp_path / "good.pt")
    build(tmp_path / "good.pt")
    with pytest.raises(ValueError, match="does not fit"):
        build(tmp_path / "good.pt", sphere_channels=24)
    with pytest.raises(ValueError, match="missing"):
        build(tmp_path / "good.pt", num_layers=2)
    key = next(iter(state))
    torch.save({k: v for k, v in state.items() if k != key}, tmp_path / "less.pt")
    with pytest.raises(ValueError, match="missing"):
        build(tmp_path / "less.pt")
    torch.save(state | {"surplus.weight": torch.zeros(2)}, tmp_path / "more.pt")
    with pytest.raises(ValueError, match="unexpected"):
        build(tmp_path / "more.pt")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    with pytest.raises(Exception, match=r".+"):
        build(tmp_path / "text.pt")


# ---------------------------------------------------------------------------- pretrained language models


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with Qwen's special tokens, as a hub folder would bring."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=PAD, eos_token=END)
    tokenizer.add_special_tokens({"additional_special_tokens": [START]})
    return tokenizer


def save_pretrained_qwen(folder: Path, tied: bool, spare_rows: int) -> Qwen2_5_VLForConditionalGeneration:
    """A tiny random Qwen2.5-VL in the hub's layout; its embedding may have more rows than tokens,
    as Qwen's has."""
    tokenizer = qwen_tokenizer()
    text: dict[str, Any] = {
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "vocab_size": len(tokenizer) + spare_rows,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 2, 2]},
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": tied,
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 1,
        "out_hidden_size": 48,
        "fullatt_block_indexes": [0],
    }
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied)
    llm = Qwen2_5_VLForConditionalGeneration(config)
    llm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return llm


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("spare_rows", [0, 5000])
def test_a_pretrained_llm_is_extended_and_untied(
    tmp_path: Path, train_systems: list[System], tied: bool, spare_rows: int
) -> None:
    original = save_pretrained_qwen(tmp_path / "qwen", tied, spare_rows)
    config = load_config(None, [f"model.llm.pretrained={tmp_path / 'qwen'}", "model.encoder.num_layers=1"])
    model, tokenizer = build_model(config)
    before = qwen_tokenizer()
    n = len(before)
    assert len(tokenizer) > n + 1000 and len(tokenizer) <= model.text.embed_tokens.num_embeddings
    embedding, head = model.text.embed_tokens.weight, model.llm.lm_head.weight
    assert embedding.shape == head.shape and embedding.data_ptr() != head.data_ptr()
    old = {"embedding": original.get_input_embeddings().weight, "head": original.lm_head.weight}
    for ours, theirs in ((embedding, old["embedding"]), (head, old["head"])):
        torch.testing.assert_close(ours[:n], theirs[:n], rtol=0, atol=0)
        for text in (" 0.123", "Pd Pd", "12 1", "_cell_length_a 5.", GRAPH, ENERGY):
            (new, *_) = tokenizer.encode(text, add_special_tokens=False)
            token = tokenizer.decode([new])
            pieces = before.encode(token, add_special_tokens=False)
            if new < n:
                continue
            torch.testing.assert_close(ours[new], theirs[pieces].mean(0))
    assert len(tokenizer.encode(" 0.123", add_special_tokens=False)) == 1
    # plain text is read as before
    ids = before.encode("Please predict it", add_special_tokens=False)
    assert tokenizer.encode("Please predict it", add_special_tokens=False) == ids
    with torch.no_grad():
        ours = model.llm(input_ids=torch.tensor([ids])).logits[..., :n]
        theirs = original(input_ids=torch.tensor([ids])).logits[..., :n]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    # trained apart: a step on the head leaves the embedding alone, also after saving and loading
    with torch.no_grad():
        head.add_(1.0)
    assert not torch.equal(head, embedding)
    save_model(tmp_path / "out", model, model.state_dict(), config, collator(model, tokenizer, config))
    loaded, collate, _ = load_model(tmp_path / "out")
    torch.testing.assert_close(loaded.llm.lm_head.weight, head, rtol=0, atol=0)
    torch.testing.assert_close(loaded.text.embed_tokens.weight, embedding, rtol=0, atol=0)
    text = write_cif(train_systems[0])
    assert collate.encode(text) == tokenizer.encode(text, add_special_tokens=False)
    batch = collate([property_sample(train_systems[0]), design_sample(train_systems[1], train_systems[2])])
    with torch.no_grad():
        a = logits_and_energy(model.eval(), batch)
    b = logits_and_energy(loaded, batch)
    torch.testing.assert_close(a[0], b[0], rtol=0, atol=0)


def test_a_pretrained_llm_that_is_absent_is_an_error(tmp_path: Path) -> None:
    config = load_config(None, [f"model.llm.pretrained={tmp_path / 'absent'}", "model.encoder.num_layers=1"])
    with pytest.raises((OSError, ValueError)):
        build_model(config)


def test_the_default_tokenizer_and_model_fit(train_systems: list[System], small_config: Config) -> None:
    tokenizer = tiny_tokenizer([], merges=0)
    model, _ = build_model(small_config, tokenizer)
    assert model.text.embed_tokens.num_embeddings == len(tokenizer)
    assert isinstance(model.energy_head, EnergyHead)
    with torch.no_grad():
        energies = model.predict(
            collator(model, tokenizer, small_config)([property_sample(train_systems[0])])
        )
    assert energies.isfinite().all()
