"""A picture of a system for Qwen2.5-VL's image path: drawn, cut into patches, placed among the tokens.

The paper's property prompts begin with an image that its published code never makes; here it is a choice. A
picture shows the slab from above and from the side, as ASE's `plot_atoms` does (2x2 cells, jmol colours,
covalent radii, no axes): drawn here, because matplotlib takes 1.3 s for 70 atoms. Its size is a multiple of
28 pixels, so that nothing is resized and the pixels are exactly what transformers' own image processor (which
wants torchvision) would hand to the model.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray

from catmllm.structure.elements import COVALENT_RADIUS
from catmllm.structure.system import System
from catmllm.structure.tags import heights

PATCH, MERGE, FRAMES = (
    14,
    2,
    2,
)  # pixels of a patch; patches of a token along an edge; frames that a patch spans
SIZE = (224, 448)  # height, width
TOKENS = SIZE[0] * SIZE[1] // (PATCH * MERGE) ** 2
MARGIN = 1.05  # of the drawing, around it
OUTLINE = 100 / 72  # pixels: matplotlib's line of one point at 100 dots an inch
# CLIP's mean and standard deviation by channel, which Qwen's vision tower was trained with
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

VISION_START, IMAGE_PAD, VISION_END = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"


def render(system: System, size: tuple[int, int] = SIZE) -> NDArray[np.uint8]:
    """The system from above and from the side, uint8 [height, width, 3]: 2x2 cells, the vacuum on top.

    Raises ValueError for a size that is no multiple of 28 pixels.
    """
    height, width = _checked(size)
    normal = np.cross(system.lattice[0], system.lattice[1])
    spacing = abs(np.linalg.det(system.lattice)) / np.linalg.norm(normal)
    # what lies on the border, but for rounding, stays there
    frac = system.frac - np.floor(system.frac + 1e-7)
    frac[:, 2] = heights(system.lattice, system.frac) / spacing
    cells = np.array([[i, j, 0] for i in range(2) for j in range(2)])
    points = (frac[None] + cells[:, None]).reshape(-1, 3) @ system.lattice
    numbers = np.tile(system.numbers, len(cells))
    radii, colours = COVALENT_RADIUS[numbers], _colours()[np.minimum(numbers, len(_colours()) - 1)]
    picture = np.full((height, width, 3), 255, dtype=np.uint8)
    half = width // 2
    views = (
        (points[:, [0, 1]], points[:, 2]),
        (points[:, [0, 2]], -points[:, 1]),
    )  # place, height towards us
    for k, (place, towards) in enumerate(views):
        low, high = (place - radii[:, None]).min(0), (place + radii[:, None]).max(0)
        scale = (np.array([half, height]) / (high - low)).min() / MARGIN
        x, y = ((place - (low + high) / 2) * scale * [1, -1] + [half / 2, height / 2]).T
        order = np.argsort(towards, kind="stable")
        _draw(picture[:, k * half :][:, :half], x[order], y[order], radii[order] * scale, colours[order])
    return picture


@njit(cache=True, nogil=True)
def _draw(
    picture: NDArray[np.uint8],
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    radii: NDArray[np.float64],
    colours: NDArray[np.uint8],
) -> None:
    """Discs with black outlines onto picture [height, width, 3], in order;
    edges are blended by what they cover."""
    for k in range(len(x)):
        r = radii[k]
        inner, outer = max(0.0, r - OUTLINE / 2 - 0.5), r + OUTLINE / 2 + 0.5
        for i in range(max(0, int(y[k] - outer)), min(picture.shape[0], int(y[k] + outer) + 1)):
            for j in range(max(0, int(x[k] - outer)), min(picture.shape[1], int(x[k] + outer) + 1)):
                square = (i + 0.5 - y[k]) ** 2 + (j + 0.5 - x[k]) ** 2
                if square <= inner * inner:
                    for c in range(3):
                        picture[i, j, c] = colours[k, c]
                elif square < outer * outer:
                    d = np.sqrt(square)
                    disc = min(1.0, max(0.0, r - d + 0.5))
                    line = min(1.0, max(0.0, OUTLINE / 2 - abs(d - r) + 0.5))
                    for c in range(3):
                        behind = picture[i, j, c] * (1.0 - disc) + colours[k, c] * disc
                        picture[i, j, c] = np.uint8(behind * (1.0 - line) + 0.5)


@functools.cache
def _colours() -> NDArray[np.uint8]:
    """jmol's colour of each element by atomic number [n, 3]; 0 is no element."""
    from ase.data.colors import jmol_colors

    return np.rint(np.asarray(jmol_colors) * 255).astype(np.uint8)


def patches(pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What Qwen2.5-VL calls pixel_values and image_grid_thw, of uint8 [P, height, width, 3]: float32 [patches
    of all, 3 x 2 x 14 x 14] and int64 [P, 3], frames (1), rows and columns of patches, on the same device.

    Normalised by channel; the patches of one token (2 x 2) stand together; a still picture fills both frames.
    """
    n, (height, width) = len(pictures), _checked(pictures.shape[1:3])
    rows, columns = height // PATCH, width // PATCH
    mean, std = (pictures.new_tensor(v, dtype=torch.float32) for v in (_MEAN, _STD))
    scaled = (pictures.float() / 255.0 - mean) / std
    cut = scaled.permute(0, 3, 1, 2).reshape(
        n, 3, rows // MERGE, MERGE, PATCH, columns // MERGE, MERGE, PATCH
    )
    # picture, token row and column, patch row and column, channel, frame, pixel row and column
    cut = cut.permute(0, 2, 5, 3, 6, 1, 4, 7)[..., None, :, :].expand(*(-1,) * 6, FRAMES, -1, -1)
    grid = torch.tensor([[1, rows, columns]], device=pictures.device).expand(n, 3)
    return cut.reshape(n * rows * columns, -1), grid


def mrope_positions(ids: NDArray[np.int64], pad_id: int, size: tuple[int, int] = SIZE) -> NDArray[np.int64]:
    """Positions int64 [3, T] (frame, row, column) of one sample's ids, in which each picture is as many pads
    as it has tokens, by Qwen2.5-VL's M-RoPE.

    Text counts on in all three; the tokens of a picture share the frame and are told apart by row and column;
    text after it goes on from the largest of them. Without pictures all three are 0 ... T-1.
    """
    rows, columns = (n // (PATCH * MERGE) for n in size)
    place = np.stack([np.zeros(rows * columns, np.int64), *np.divmod(np.arange(rows * columns), columns)])
    seen = ids == pad_id
    # A picture of many tokens advances the text by its longer side alone: by so much at its first token.
    first = np.flatnonzero(seen)[:: rows * columns]
    advance = np.where(seen, 0, 1)
    advance[first] = max(rows, columns)
    out = np.tile(advance.cumsum() - advance, (3, 1))
    for k in first:
        out[:, k : k + rows * columns] = out[:, k : k + 1] + place
    return out


def _checked(size: Sequence[int]) -> tuple[int, int]:
    height, width = size
    if height < 1 or width < 1 or height % (PATCH * MERGE) or width % (PATCH * MERGE):
        raise ValueError(
            f"a picture is a multiple of {PATCH * MERGE} pixels high and wide, not {height} x {width}"
        )
    return height, width
