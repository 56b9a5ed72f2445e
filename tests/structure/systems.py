"""Structures that the tests of catmllm.structure share: generated ones, and ways to move them."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from catmllm.structure.system import System, make_system

ADSORBATES = {"CO": (6, 8), "OH": (8, 1), "N": (7,), "CH2": (6, 1, 1)}


@st.composite
def lattices(draw: st.DrawFn, smallest: float = 1.5, largest: float = 8.0) -> np.ndarray:
    """Right-handed cells [3, 3], skewed up to several edges, in any orientation."""
    edges = [draw(st.floats(smallest, largest)) for _ in range(3)]
    below = [draw(st.floats(-1.5, 1.5)) for _ in range(3)]
    lattice = np.diag(edges)
    lattice[1, 0], lattice[2, 0], lattice[2, 1] = (
        below[0] * edges[0],
        below[1] * edges[0],
        below[2] * edges[1],
    )
    return lattice @ draw(rotations())


@st.composite
def rotations(draw: st.DrawFn) -> np.ndarray:
    """Proper rotation matrices [3, 3], from a quaternion."""
    q = np.array([draw(st.floats(-1, 1)) for _ in range(4)]) + [1e-3, 0, 0, 0]
    w, x, y, z = q / np.linalg.norm(q)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )


@st.composite
def cells(draw: st.DrawFn, max_atoms: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """A lattice [3, 3] and positions [N, 3], inside and outside of the cell."""
    lattice = draw(lattices())
    n = draw(st.integers(1, max_atoms))
    seed = draw(st.integers(0, 2**32 - 1))
    return lattice, np.random.default_rng(seed).uniform(-1, 2, (n, 3)) @ lattice


def read_back(frac: np.ndarray, decimals: int) -> np.ndarray:
    """The fractional coordinates [N, 3] that pymatgen reads of a CIF which holds them with so many decimals:
    rounded, in [0, 1), and a third or two thirds where the number is that to one part in 10,000 (`CifParser`,
    `frac_tolerance`), so that 0.66660 to 0.66673 are all 2/3."""
    steps = 10**decimals
    written = np.rint((frac - np.floor(frac)) * steps) % steps / steps
    for third in (1 / 3, 2 / 3):
        written[np.abs(written / third - 1) <= 1e-4] = third
    return written


@st.composite
def slabs(draw: st.DrawFn) -> System:
    """An adsorbate over a jittered slab of two elements, under at least 6 Å of vacuum."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    nx, ny, layers = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(2, 3))
    name = draw(st.sampled_from(sorted(ADSORBATES)))
    metals = draw(st.lists(st.sampled_from([13, 28, 29, 31, 46, 77, 78]), min_size=1, max_size=2))
    spacing = draw(st.floats(2.3, 3.0))
    height = 2.0 * (layers - 1)
    lattice = np.array(
        [[nx * spacing, 0, 0], [draw(st.floats(-1, 1)), ny * spacing, 0], [0, 0, height + 10.0]]
    )
    grid = [
        (i * spacing, j * spacing, 2.0 * layer)
        for layer in range(layers)
        for i in range(nx)
        for j in range(ny)
    ]
    slab = np.array(grid) + rng.uniform(-0.2, 0.2, (len(grid), 3))
    molecule = np.array([[0.3 * k, 0.6 * k, height + 1.6 + 0.7 * k] for k in range(len(ADSORBATES[name]))])
    molecule += rng.uniform(-0.1, 0.1, molecule.shape)
    numbers = [*rng.choice(metals, len(slab)), *ADSORBATES[name]]
    tags = [0] * (len(slab) - nx * ny) + [1] * (nx * ny) + [2] * len(molecule)
    miller = (draw(st.integers(-2, 2)), draw(st.integers(-2, 2)), 1)
    return make_system(
        lattice, np.vstack((slab, molecule)) + [0, 0, 2.0], numbers, tags, name, miller, sid="made"
    )
