"""Pictures against ASE's and transformers' own: the drawing, the pixels by the image processor,
positions by Qwen2.5-VL."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from catmllm.data.images import SIZE, TOKENS, mrope_positions, patches, render
from catmllm.data.slabs import load_slabs
from catmllm.structure.system import System

SYSTEMS = load_slabs()[::900]
PAD, START, END = 90, 91, 92


def drawn_by_ase(system: System) -> np.ndarray:
    """The same picture by `plot_atoms` and matplotlib."""
    from ase.visualize.plot import plot_atoms
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(SIZE[1] / 100, SIZE[0] / 100), dpi=100)
    canvas = FigureCanvasAgg(figure)
    atoms = system.as_ase()
    atoms.wrap(pbc=[True, True, False])
    atoms = atoms.repeat((2, 2, 1))
    for place, rotation in ((0.0, "0x,0y,0z"), (0.5, "-90x,0y,0z")):
        axes = figure.add_axes((place, 0.0, 0.5, 1.0))
        plot_atoms(atoms, axes, rotation=rotation, show_unit_cell=0)
        axes.set_axis_off()
    canvas.draw()
    return np.array(canvas.buffer_rgba())[:, :, :3].copy()


def test_a_picture_is_what_ase_draws() -> None:
    seen = set()
    for system in SYSTEMS:
        ours, theirs = render(system), drawn_by_ase(system)
        assert ours.shape == (*SIZE, 3) and ours.dtype == np.uint8
        difference = np.abs(ours.astype(int) - theirs).max(axis=2)
        # Edges are rounded otherwise, and of atoms at one height either may lie over the other.
        assert difference.mean() < 1.5 and (difference > 40).mean() < 0.004, system.sid
        seen.add(ours.tobytes())
    assert len(seen) == len(SYSTEMS)


def test_a_picture_does_not_depend_on_where_the_cell_begins() -> None:
    """A slab cut by the border of the cell, and atoms in other cells, are drawn with the vacuum on top."""
    for system in SYSTEMS:
        moved = system.frac + [3.0, -2.0, 1.0]
        across = np.round(system.frac - [0, 0, np.median(system.frac[:, 2])], 12) % 1.0
        assert (render(replace(system, frac=moved)) == render(system)).mean() > 0.999
        assert np.ptp(across[:, 2]) > 0.5
        assert (render(replace(system, frac=across)) == render(system)).mean() > 0.999


@pytest.fixture(scope="module")
def qwen() -> Qwen2_5_VLForConditionalGeneration:
    """A tiny Qwen2.5-VL, for its positions."""
    text = {
        "vocab_size": 100,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
    }
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32}
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=PAD, vision_start_token_id=START
    )
    return Qwen2_5_VLForConditionalGeneration._from_config(config).eval()


@pytest.mark.parametrize("size", [(28, 28), (56, 84), (224, 448)])
def test_pixels_are_those_of_transformers(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(sum(size))
    pictures = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for _ in range(2)]
    limits = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 1280}
    theirs = Qwen2VLImageProcessorPil(size=limits)(pictures, return_tensors="np")
    values, grids = patches(torch.from_numpy(np.stack(pictures)))
    np.testing.assert_array_equal(grids, theirs["image_grid_thw"])
    assert values.dtype == torch.float32
    np.testing.assert_allclose(values, theirs["pixel_values"], atol=2e-6, rtol=0)


def test_sizes_that_qwen_would_resize_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 28"):
        render(SYSTEMS[0], (224, 450))
    with pytest.raises(ValueError, match="multiple of 28"):
        patches(torch.zeros(1, 28, 14, 3, dtype=torch.uint8))


@pytest.mark.parametrize("size", [(28, 28), (56, 112), (112, 56), SIZE])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_positions_are_those_of_qwen(
    qwen: Qwen2_5_VLForConditionalGeneration, size: tuple[int, int], count: int
) -> None:
    tokens = size[0] * size[1] // 28**2
    assert tokens == TOKENS or size != SIZE
    ids = np.array([1, 2, 3, *[START, *[PAD] * tokens, END, 7] * count, 10, 11, 12])
    grids = torch.tensor([[1, size[0] // 14, size[1] // 14]] * count).reshape(-1, 3)
    row = torch.from_numpy(ids)[None]
    theirs, _ = qwen.model.get_rope_index(row, (row == PAD).int(), grids)
    np.testing.assert_array_equal(mrope_positions(ids, PAD, size), theirs[:, 0].numpy())
