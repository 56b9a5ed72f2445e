"""Pictures against transformers: pixels by its own image processor, places and positions through Qwen2.5-VL itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from catmllm.data.images import expand_images, mrope_positions, patches, render
from catmllm.data.slabs import load_slabs

SYSTEMS = load_slabs()[::900]
PAD, START, END = 90, 91, 92


@pytest.fixture(scope="module")
def qwen() -> Qwen2_5_VLForConditionalGeneration:
    """A tiny Qwen2.5-VL with random weights, large enough for a picture to matter."""
    torch.manual_seed(0)
    text = {
        "vocab_size": 100,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": 32,
        "fullatt_block_indexes": [1],
        "window_size": 56,
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=PAD,
        video_token_id=93,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=False,
    )
    model = Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    return model


@pytest.mark.parametrize("size", [(28, 28), (56, 84), (224, 448)])
def test_pixels_are_those_of_transformers(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(sum(size))
    pictures = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for _ in range(2)]
    limits = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 1280}
    theirs = Qwen2VLImageProcessorPil(size=limits)(pictures, return_tensors="np")
    values, grids = patches(pictures)
    np.testing.assert_array_equal(grids, theirs["image_grid_thw"])
    assert values.dtype == np.float32
    np.testing.assert_allclose(values, theirs["pixel_values"], atol=2e-6, rtol=0)


def test_a_rendered_system_shows_its_elements_and_where_its_atoms_are() -> None:
    from ase.data.colors import jmol_colors

    seen = {}
    for system in SYSTEMS:
        picture = render(system)
        assert picture.shape == (224, 448, 3) and picture.dtype == np.uint8
        assert (picture == render(system)).all()
        for z in set(system.numbers.tolist()) - {1}:  # hydrogen is white, as the paper
            colour = np.round(jmol_colors[z] * 255)
            near = (np.abs(picture.astype(int) - colour).max(axis=2) <= 2).sum()
            assert near > 20, (system.sid, z)
        for half in (picture[:, :224], picture[:, 224:]):
            assert 0.05 < (half < 250).any(axis=2).mean() < 0.95
        seen[picture.tobytes()] = system.sid
    assert len(seen) == len(SYSTEMS)


def test_sizes_that_qwen_would_resize_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 28"):
        render(SYSTEMS[0], (224, 450))
    with pytest.raises(ValueError, match="multiple of 28"):
        patches([np.zeros((28, 14, 3), np.uint8)])


def _sample(grids: np.ndarray, before: int = 3, after: int = 4) -> list[int]:
    ids = list(range(1, before + 1))
    for _ in grids:
        ids += [START, PAD, END, 7]
    return expand_images([*ids, *range(10, 10 + after)], PAD, grids)


@pytest.mark.parametrize("shapes", [[], [(28, 28)], [(56, 112)], [(112, 56), (84, 84)]])
def test_positions_are_those_of_qwen(
    qwen: Qwen2_5_VLForConditionalGeneration, shapes: list[tuple[int, int]]
) -> None:
    _, grids = patches([np.zeros((*s, 3), np.uint8) for s in shapes])
    ids = _sample(grids)
    tokens = torch.tensor([ids])
    theirs, _ = qwen.model.get_rope_index(tokens, (tokens == PAD).int(), torch.from_numpy(grids))
    np.testing.assert_array_equal(mrope_positions(ids, PAD, grids), theirs[:, 0].numpy())


def test_a_picture_goes_through_qwen(qwen: Qwen2_5_VLForConditionalGeneration) -> None:
    """Our pixels, ids and positions into the two towers give the logits of its own forward pass; the picture matters."""
    pictures = [render(system, (56, 112)) for system in SYSTEMS[:2]]
    logits = []
    for picture in pictures:
        values, grids = patches([picture])
        ids = torch.tensor([_sample(grids)])
        pixels, grid = torch.from_numpy(values), torch.from_numpy(grids)
        with torch.no_grad():
            expected = qwen(
                input_ids=ids, pixel_values=pixels, image_grid_thw=grid, mm_token_type_ids=(ids == PAD).int()
            ).logits
            x = qwen.get_input_embeddings()(ids)
            seen = torch.cat(list(qwen.model.get_image_features(pixels, grid).pooler_output))
            x = x.masked_scatter((ids == PAD)[..., None], seen)
            positions = torch.from_numpy(mrope_positions(ids[0].tolist(), PAD, grids))[:, None]
            hidden = qwen.model.language_model(inputs_embeds=x, position_ids=positions).last_hidden_state
            ours = qwen.lm_head(hidden)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
        logits.append(ours)
    assert (logits[0] - logits[1]).abs().max() > 0.01


def test_pictures_and_places_must_agree() -> None:
    _, grids = patches([np.zeros((28, 28, 3), np.uint8)])
    with pytest.raises(ValueError, match="0 places for pictures"):
        expand_images([1, 2], PAD, grids)
