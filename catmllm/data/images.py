"""A picture of a system for Qwen2.5-VL's image path: rendered, cut into patches, placed among the tokens.

The paper's property prompts begin with an image that its published code never makes; here it is a choice. A picture
shows the slab from above and from the side. Its size is a multiple of 28 pixels, so that nothing is resized and the
pixels are exactly what transformers' own image processor (which wants torchvision) would hand to the model.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from catmllm.structure.system import System

PATCH, MERGE, FRAMES = (
    14,
    2,
    2,
)  # pixels of a patch; patches of a token along an edge; frames that a patch spans
SIZE = (224, 448)  # height, width: 128 tokens
# CLIP's mean and standard deviation by channel, which Qwen's vision tower was trained with
_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
_STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)

VISION_START, IMAGE_PAD, VISION_END = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"
IMAGE = VISION_START + IMAGE_PAD + VISION_END  # one picture in a prompt, before `expand_images`


def render(system: System, size: tuple[int, int] = SIZE) -> NDArray[np.uint8]:
    """The system from above and from the side by ASE and matplotlib: uint8 [height, width, 3], 2x2 cells, no axes.

    Raises ValueError for a size that is no multiple of 28 pixels.
    """
    from ase.visualize.plot import plot_atoms
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    height, width = _checked(size)
    figure = Figure(figsize=(width / 100, height / 100), dpi=100)
    canvas = FigureCanvasAgg(figure)
    atoms = system.as_ase()
    atoms.wrap()
    atoms = atoms.repeat((2, 2, 1))
    for place, rotation in ((0.0, "0x,0y,0z"), (0.5, "-90x,0y,0z")):
        axes = figure.add_axes((place, 0.0, 0.5, 1.0))
        plot_atoms(atoms, axes, rotation=rotation, show_unit_cell=0)
        axes.set_axis_off()
    canvas.draw()
    return np.array(canvas.buffer_rgba())[:, :, :3].copy()


def patches(pictures: Sequence[NDArray[np.uint8]]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """What Qwen2.5-VL calls pixel_values and image_grid_thw: float32 [patches of all, 3 x 2 x 14 x 14] and int64
    [pictures, 3], frames (1), rows and columns of patches.

    Normalised by channel; the patches of one token (2 x 2) stand together; a still picture fills both frames.
    """
    values = [np.empty((0, 3 * FRAMES * PATCH * PATCH), np.float32)]
    grids = []
    for picture in pictures:
        height, width = _checked(picture.shape[:2])
        rows, columns = height // PATCH, width // PATCH
        scaled = (picture.astype(np.float32) / np.float32(255.0) - _MEAN) / _STD
        cut = scaled.transpose(2, 0, 1).reshape(
            3, rows // MERGE, MERGE, PATCH, columns // MERGE, MERGE, PATCH
        )
        cut = cut.transpose(1, 4, 2, 5, 0, 3, 6)[:, :, :, :, :, None]
        values.append(np.repeat(cut, FRAMES, axis=5).reshape(rows * columns, -1))
        grids.append((1, rows, columns))
    return np.concatenate(values), np.array(grids, dtype=np.int64).reshape(-1, 3)


def expand_images(ids: Sequence[int], pad_id: int, grids: NDArray[np.int64]) -> list[int]:
    """The ids with the one pad token of every picture repeated for each of its tokens. Raises ValueError where there
    are more or fewer pads than pictures."""
    counts = iter((grids.prod(axis=1) // MERGE**2).tolist())
    if sum(i == pad_id for i in ids) != len(grids):
        raise ValueError(
            f"{sum(i == pad_id for i in ids)} places for pictures in the text, {len(grids)} pictures"
        )
    return [j for i in ids for j in ([i] * next(counts) if i == pad_id else [i])]


def mrope_positions(ids: Sequence[int], pad_id: int, grids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Positions int64 [3, T] (frame, row, column) of one sample's expanded ids, by Qwen2.5-VL's M-RoPE.

    Text counts on in all three; the tokens of a picture share the frame and are told apart by row and column; text after
    it goes on from the largest of them. Without pictures all three are 0 ... T-1.
    """
    grid = iter((grids // [1, MERGE, MERGE]).tolist())
    parts: list[NDArray[np.int64]] = []
    position = k = 0
    while k < len(ids):
        if ids[k] == pad_id:
            _, rows, columns = next(grid)
            row, column = np.divmod(np.arange(rows * columns), columns)
            parts.append(np.stack([np.zeros_like(row), row, column]) + position)
            position, k = position + max(rows, columns), k + rows * columns
        else:
            parts.append(np.full((3, 1), position))
            position, k = position + 1, k + 1
    return np.concatenate([np.empty((3, 0), np.int64), *parts], axis=1)


def _checked(size: Sequence[int]) -> tuple[int, int]:
    height, width = size
    if height < 1 or width < 1 or height % (PATCH * MERGE) or width % (PATCH * MERGE):
        raise ValueError(
            f"a picture is a multiple of {PATCH * MERGE} pixels high and wide, not {height} x {width}"
        )
    return height, width
