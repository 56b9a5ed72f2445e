"""A picture in a prompt, through a Qwen2.5-VL that was read from a folder: everything against transformers'
own forward pass, its image processor and its `generate`, given the same picture."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from catmllm.config import ConfigError, SamplingConfig, load_config
from catmllm.data.batches import Batch, Collator
from catmllm.data.images import IMAGE_PAD, TOKENS, VISION_END, VISION_START, render
from catmllm.data.prompts import Sample, cif_sample, design_sample, property_sample
from catmllm.data.tokenizer import tiny_tokenizer
from catmllm.design.predict import predict_energies, question
from catmllm.models.build import new_model
from catmllm.models.catalytic_mllm import CatalyticMLLM
from catmllm.models.export import export
from catmllm.models.state import load_model, save_model
from catmllm.sample.answers import Rollout
from catmllm.sample.engine import RolloutEngine
from catmllm.sample.packed import rollout_batch
from catmllm.structure.system import System
from tests.seeing import save_qwen, seeing_config

Model = tuple[CatalyticMLLM, Collator]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, train_systems: list[System]) -> Path:
    path = tmp_path_factory.mktemp("qwen")
    save_qwen(path, train_systems[::100])
    return path


@pytest.fixture(scope="module")
def seeing(folder: Path, train_systems: list[System]) -> Model:
    model, collate = new_model(seeing_config(folder), train_systems)
    return model.eval(), collate


@pytest.fixture
def samples(train_systems: list[System]) -> list[Sample]:
    """Two with a picture, and others between them."""
    a, b = train_systems[0], train_systems[800]
    graph_only = property_sample(b, "graph")
    return [cif_sample(b), property_sample(a), design_sample(b, a), graph_only, property_sample(b, "text")]


@contextmanager
def structures(model: CatalyticMLLM, collate: Collator, batch: Batch) -> Iterator[Any]:
    """transformers' own model, whose embedding gives the graph vectors
    for their markers in the order of reading."""
    theirs = copy.deepcopy(model.llm)
    theirs.set_attn_implementation({"text_config": "eager", "vision_config": "eager"})
    vectors = None if batch.graph is None else model.graph_tokens(batch.graph)

    def place(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
        marks = args[0] == collate.graph_id
        return (
            out
            if vectors is None or not marks.any()
            else out.index_put(marks.nonzero(as_tuple=True), vectors)
        )

    handle = theirs.get_input_embeddings().register_forward_hook(place)
    yield theirs
    handle.remove()


def inputs(
    collate: Collator, rows: list[list[int]], shown: list[System], left: bool
) -> dict[str, torch.Tensor]:
    """Token ids and pictures as transformers takes them, the pictures through its own image processor."""
    width = max(map(len, rows))
    ids, mask = (
        torch.full((len(rows), width), collate.pad_id),
        torch.zeros(len(rows), width, dtype=torch.int64),
    )
    for k, row in enumerate(rows):
        part = slice(width - len(row), width) if left else slice(0, len(row))
        ids[k, part], mask[k, part] = torch.tensor(row), 1
    seen = Qwen2VLImageProcessorPil()([render(s) for s in shown], return_tensors="pt")
    assert len(shown) * TOKENS == int((ids == collate.image_id).sum())
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "mm_token_type_ids": (ids == collate.image_id).int(),
        "pixel_values": seen["pixel_values"],
        "image_grid_thw": seen["image_grid_thw"],
    }


def in_rows(batch: Batch) -> list[list[int]]:
    bounds = batch.cu_seqlens.tolist()
    return [batch.input_ids[a:b].tolist() for a, b in itertools.pairwise(bounds)]


@pytest.mark.parametrize("attention", ["varlen", "eager", "sdpa"])
@pytest.mark.parametrize("packed", [True, False])
def test_logits_are_those_of_transformers(
    seeing: Model, samples: list[Sample], packed: bool, attention: str
) -> None:
    model, collate = copy.deepcopy(seeing[0]), seeing[1]
    model.text.set_attn_implementation(attention)
    batch = replace(collate(samples), padded=not packed)
    shown = [samples[i].graph for i in (1, 3)]
    with torch.no_grad(), structures(model, collate, batch) as theirs:
        given = inputs(collate, in_rows(batch), shown, left=False)  # type: ignore[arg-type]
        expected = theirs(**given).logits[given["attention_mask"].bool()]
        ours = model.hidden(batch) @ model.llm.lm_head.weight.T
    assert float(expected.std()) > 0.1
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)


def test_only_questions_for_an_energy_show_a_picture(seeing: Model, samples: list[Sample]) -> None:
    collate = seeing[1]
    batch = collate(samples)
    assert batch.pictures is not None and batch.picture_at is not None and batch.mrope is not None
    assert batch.sample[batch.picture_at].tolist() == [1] * TOKENS + [3] * TOKENS
    assert (batch.pictures[1].numpy() == render(samples[3].graph)).all()  # type: ignore[arg-type]
    other = [
        cif_sample(samples[1].graph),  # type: ignore[arg-type]
        design_sample(samples[1].graph, samples[1].graph),  # type: ignore[arg-type]
    ]
    assert collate(other).pictures is None
    prompt = collate.tokenizer.decode(collate.prompt_ids(samples[1]))
    assert prompt.startswith(
        f"<|im_start|>user\n{VISION_START}{IMAGE_PAD * TOKENS}{VISION_END}<graph>\nThat’s some information"
    )


def test_the_picture_matters(seeing: Model, train_systems: list[System]) -> None:
    """Other pixels alone change the energy, in training's batch and by `predict`;
    what is asked stays the same."""
    model, collate = copy.deepcopy(seeing[0]), seeing[1]
    sample = property_sample(train_systems[0])
    batch = collate([sample])
    assert batch.pictures is not None
    with torch.no_grad():
        # the LLM's part of the energy, which is zero in a new model
        model.energy_head.correction.weight.uniform_(-0.5, 0.5)
        energy = model.predict(batch)
        other = model.predict(replace(batch, pictures=255 - batch.pictures))
    assert abs(float(energy - other)) > 1e-3
    found = predict_energies(model, collate, [question(train_systems[0], "both")])
    assert found[0] == pytest.approx(float(energy), abs=1e-5)


def test_gradients_are_those_of_transformers(seeing: Model, samples: list[Sample]) -> None:
    """Of a packed batch, in every parameter of both towers, the image tower's included."""
    model, collate = copy.deepcopy(seeing[0]), seeing[1]
    batch = collate(samples)
    with structures(model, collate, batch) as theirs:
        given = inputs(
            collate,
            in_rows(batch),
            [samples[i].graph for i in (1, 3)],  # type: ignore[misc]
            left=False,
        )
        logits = theirs(**given).logits[given["attention_mask"].bool()]
        (-logits.log_softmax(-1)[batch.answer_at, batch.targets].mean()).backward()
    (-model(CatalyticMLLM.answer, batch).logprob.mean()).backward()
    seen = 0
    for (name, a), b in zip(model.llm.named_parameters(), theirs.parameters()):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None and b.grad is not None:
            seen += name.startswith("model.visual.")
            error = (a.grad - b.grad).abs().max() / b.grad.abs().max().clamp_min(1e-4)
            assert error < 1e-3, f"{name}: {error:.1e}"
    assert seen > 20


def test_greedy_answers_are_those_of_generate(seeing: Model, train_systems: list[System]) -> None:
    model, collate = seeing
    a, b, c = (train_systems[i] for i in (0, 800, 1500))
    prompts = [question(a, "both"), Sample(cif_sample(b).prompt), question(b, "graph"), question(c, "text")]
    rows = [collate.prompt_ids(p) for p in prompts]
    graphs = collate(prompts)
    params = SamplingConfig(temperature=1.0, top_p=1e-6, max_new_tokens=16)
    ours = RolloutEngine(model, collate).generate(prompts, params, [0])
    with torch.no_grad(), structures(model, collate, graphs) as theirs:
        new = theirs.generate(
            **inputs(collate, rows, [a, b], left=True),
            do_sample=False,
            max_new_tokens=16,
            eos_token_id=collate.end_id,
            pad_token_id=collate.pad_id,
            suppress_tokens=[collate.graph_id, collate.energy_id],
        )[:, max(map(len, rows)) :].tolist()
    for r, expected in zip(ours, new):
        if collate.end_id in expected:
            expected = expected[: expected.index(collate.end_id) + 1]
        assert r.ids.tolist() == expected
    # the log-probabilities of sampled tokens are those that training computes
    again = RolloutEngine(model, collate).generate(
        prompts[:1], replace(params, top_p=1.0, temperature=0.7), [1], 2
    )
    for r in again:
        encoded = collate.encoded(prompts[0])._replace(answer=r.ids.tolist())
        with torch.no_grad():
            logprob = model(CatalyticMLLM.answer, collate.join([encoded]), temperature=0.7).logprob
        torch.testing.assert_close(r.logprob, logprob, rtol=1e-3, atol=1e-3)


def test_what_is_saved_and_exported_sees_the_same(
    seeing: Model, folder: Path, samples: list[Sample], tmp_path: Path
) -> None:
    model, collate = seeing
    batch = collate(samples)
    with torch.no_grad():
        expected = model.hidden(batch)
    save_model(tmp_path / "stage", model, model.state_dict(), seeing_config(folder), collate)
    loaded, its_collate, _ = load_model(tmp_path / "stage")
    with torch.no_grad():
        torch.testing.assert_close(loaded.hidden(its_collate(samples)), expected, rtol=0, atol=0)
    out = export(tmp_path / "stage", "hf", tmp_path / "hf", "fp32")
    theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(out)
    for name, value in model.llm.model.visual.state_dict().items():
        assert torch.equal(value, theirs.model.visual.state_dict()[name]), name
    again, _ = new_model(seeing_config(out), [])
    assert torch.equal(again.llm.lm_head.weight, model.llm.lm_head.weight)
    text = export(tmp_path / "stage", "text", tmp_path / "text", "fp32")
    assert Qwen2ForCausalLM.from_pretrained(text).num_parameters() < theirs.num_parameters()
    # the text tower alone: a clear refusal instead of an image tower of random weights
    with pytest.raises(ConfigError, match=r"tower of a pretrained Qwen2\.5-VL; this LLM is a qwen2"):
        new_model(seeing_config(text), [])


def test_what_cannot_see_is_refused(folder: Path, tmp_path: Path, train_systems: list[System]) -> None:
    with pytest.raises(ConfigError, match=r"`data\.images` needs the image tower of a pretrained"):
        load_config(None, ["data.images=true"])
    with pytest.raises(ConfigError, match=r"trains nothing without `data\.images`"):
        load_config(None, ["model.llm.train_images=true"])
    Qwen2Config().save_pretrained(tmp_path / "text")
    with pytest.raises(ConfigError, match=r"tower of a pretrained Qwen2\.5-VL; this LLM is a qwen2"):
        new_model(seeing_config(tmp_path / "text"), train_systems[:2])
    # a Qwen2.5-VL with a tokenizer that knows no pictures
    (tmp_path / "mute").mkdir()
    for file in ("config.json", "model.safetensors", "generation_config.json"):
        (tmp_path / "mute" / file).symlink_to(folder / file)
    tiny_tokenizer([]).save_pretrained(tmp_path / "mute")
    with pytest.raises(ConfigError, match=r"the tokenizer has no <\|vision_start\|>"):
        new_model(seeing_config(tmp_path / "mute"), train_systems[:2])


def test_answers_that_share_a_prompt_with_a_picture(seeing: Model, train_systems: list[System]) -> None:
    """Their positions follow the prompt's last, which is lower than its length."""
    model, collate = seeing
    prompts = [question(train_systems[0], "both"), cif_sample(train_systems[800])]
    rollouts = [
        Rollout(p, torch.arange(5, 5 + n), torch.zeros(n), None, True, "")
        for p, n in ((0, 4), (0, 9), (1, 3))
    ]
    shared, apart = (rollout_batch(collate, prompts, rollouts, s) for s in (True, False))
    assert shared.mrope is not None and apart.mrope is not None
    assert torch.equal(shared.mrope[:, shared.answer_at], apart.mrope[:, apart.answer_at])
    with torch.no_grad():
        found, expected = (model(CatalyticMLLM.answer, b).logprob for b in (shared, apart))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
