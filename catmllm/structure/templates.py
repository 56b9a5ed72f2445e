"""How the slabs and molecules that a model has seen are built, where all of a kind are built alike.

Slabs of one facet and number of atoms often follow one recipe: cell and sites are linear in the composition,
and every layer has the same share of each element. `Templates.fit` finds out, with the residuals that nearly
all systems keep as tolerance, and `slab` tells what one of an asked composition has to be. Slabs that follow
no recipe, as those of OC20, have no template. Of molecules it is the distances between their atoms, and how
much one stands above another, that the systems tell.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from catmllm.structure.elements import NUMBER
from catmllm.structure.formula import Miller, pieces
from catmllm.structure.system import ADSORBATE, System, lattice_parameters
from catmllm.structure.tags import LAYER_HEIGHT, heights

Floats = NDArray[np.float64]

FILE = "templates.json"
LEAST = 5  # slabs of a kind for each of its elements, from which it can have a recipe
KEPT = 0.95  # share of the slabs that keep a tolerance
EDGE, ANGLE, SITE = 0.02, 2.0, 0.6  # of an edge, degrees, Å: tolerances up to which slabs are built alike
MOLECULES = 20  # systems from which an adsorbate's shape is known
MARGIN = 0.02  # Å beyond what 98 % of a molecule's distances and heights are


@dataclass(frozen=True)
class Template:
    """A slab of one composition. cell [6, 2]: least and greatest lengths (Å) and angles (degrees); sites [n,
    3]: fractional coordinates of its rows in order, off [n, 3]: how far they may be from these; layers: atoms
    of each element layer by layer, in the order of rows, empty where they are shared out in any way."""

    cell: Floats
    sites: Floats
    off: Floats
    layers: tuple[dict[str, int], ...]


@dataclass(frozen=True)
class Recipe:
    """Slabs of a kind. The six parameters of the cell and the coordinates of the rows, [6 + 3n] in all, are
    `centre` + shares of `elements` @ `weights` [elements, 6 + 3n], within `tolerance` [6 + 3n]. layers: how
    many rows each layer has, where each has every element by its share; else empty."""

    elements: list[str]
    centre: list[float]
    weights: list[list[float]]
    tolerance: list[float]
    layers: list[int]


# By the element of an atom and that of one which is written before it: the least and the greatest distance
# between them, and how much the first stands above the second at least and at most; Å.
Shape = Mapping[tuple[str, str], tuple[float, float, float, float]]


@dataclass(frozen=True)
class Templates:
    """The recipes by kind, such as `(1 1 1) 12`: facet and atoms of the slab; the shapes by adsorbate, their
    pairs of elements as `C O`."""

    recipes: Mapping[str, Recipe]
    shapes: Mapping[str, Mapping[str, Sequence[float]]]

    @classmethod
    def fit(cls, systems: Sequence[System]) -> Templates:
        """The recipes of the systems' slabs, where there are any, and the shapes of their adsorbates."""
        kinds: dict[str, list[System]] = defaultdict(list)
        molecules: dict[str, list[System]] = defaultdict(list)
        for system in systems:
            kinds[_kind(system.miller, int((system.tags != ADSORBATE).sum()))].append(system)
            molecules[system.adsorbate].append(system)
        recipes = {kind: _recipe(some) for kind, some in sorted(kinds.items())}
        shapes = {name: _shape(some) for name, some in sorted(molecules.items())}
        return cls(
            {kind: recipe for kind, recipe in recipes.items() if recipe is not None},
            {name: shape for name, shape in shapes.items() if shape},
        )

    def shape(self, adsorbate: str) -> Shape:
        """What is known of the distances inside a molecule; empty where nothing is."""
        pairs = self.shapes.get(adsorbate, {})
        return {tuple(pair.split()): tuple(limits) for pair, limits in pairs.items()}  # type: ignore[misc]

    def slab(self, slab: Mapping[str, int], miller: Miller | None, decimals: int) -> Template | None:
        """What a slab of these atoms has to be when it is written with so many decimals; None where its kind
        has no recipe, or not with these elements."""
        recipe = self.recipes.get(_kind(miller, sum(slab.values())))
        if recipe is None or not slab.keys() <= set(recipe.elements):
            return None
        atoms = sum(slab.values())
        shares = np.array([slab.get(e, 0) / atoms for e in recipe.elements])
        values = np.array(recipe.centre) + shares @ np.array(recipe.weights)
        off = np.array(recipe.tolerance)
        return Template(
            np.stack([values[:6] - off[:6], values[:6] + off[:6]], axis=1),
            values[6:].reshape(-1, 3),
            off[6:].reshape(-1, 3) + 0.51 * 10.0**-decimals,
            _shared_out(slab, recipe.layers),
        )

    def save(self, folder: Path) -> None:
        (folder / FILE).write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Templates:
        """Those that were left in a folder; none where it has none."""
        path = folder / FILE
        if not path.is_file():
            return NONE
        known = json.loads(path.read_text(encoding="utf-8"))
        return cls({kind: Recipe(**recipe) for kind, recipe in known["recipes"].items()}, known["shapes"])


NONE = Templates({}, {})


def _kind(miller: Miller | None, atoms: int) -> str:
    return f"({' '.join(map(str, miller or ()))}) {atoms}"


def _recipe(systems: Sequence[System]) -> Recipe | None:
    """What the slabs of these systems, equally many atoms each, have in common; None where they are not built
    alike, or too few to say so."""
    elements = sorted({e for s in systems for e in s.slab_counts}, key=NUMBER.__getitem__)
    n = sum(systems[0].slab_counts.values())
    if len(systems) < LEAST * len(elements) or any((s.tags[:n] == ADSORBATE).any() for s in systems):
        return None
    shares = np.array([[s.slab_counts.get(e, 0) / n for e in elements] for s in systems])
    cells = np.array([lattice_parameters(s.lattice) for s in systems])
    frac = np.array([s.frac[:n].ravel() for s in systems])
    # The middle of coordinates that go round the cell; the rest of them is small where slabs are alike.
    centre = np.angle(np.exp(2j * np.pi * frac).mean(0)) / (2 * np.pi)
    values = np.hstack([cells, (frac - centre + 0.5) % 1.0 - 0.5])
    weights = np.linalg.lstsq(shares, values, rcond=None)[0]
    tolerance = np.quantile(np.abs(values - shares @ weights), KEPT, axis=0)
    edges = cells[:, :3].mean(0)
    sites = tolerance[6:].reshape(n, 3) * edges
    if (tolerance[:3] > EDGE * edges).any() or tolerance[3:6].max() > ANGLE or sites.max() > SITE:
        return None
    return Recipe(
        elements,
        [*[0.0] * 6, *centre.round(6).tolist()],
        weights.round(6).tolist(),
        tolerance.round(6).tolist(),
        _layers(systems, n),
    )


def _layers(systems: Sequence[System], n: int) -> list[int]:
    """How many rows each layer of the slabs has; empty where a row's layer differs from slab to slab, or a
    layer has not its share of an element."""
    height = np.mean([heights(s.lattice, s.frac[:n]) for s in systems], axis=0)
    ends = np.flatnonzero(np.abs(np.diff(height)) > LAYER_HEIGHT) + 1
    sizes = np.diff([0, *ends, n]).tolist()
    for system in systems:
        rows = np.split(np.array(system.symbols[:n]), ends)
        if tuple(Counter(row.tolist()) for row in rows) != _shared_out(system.slab_counts, sizes):
            return []
    return sizes


def _shared_out(slab: Mapping[str, int], sizes: Sequence[int]) -> tuple[dict[str, int], ...]:
    """The atoms of each element in layers of these sizes, each with its share; none where that is no whole
    number."""
    atoms = sum(slab.values())
    if any(k * size % atoms for k in slab.values() for size in sizes):
        return ()
    return tuple({e: k * size // atoms for e, k in slab.items()} for size in sizes)


def _shape(systems: Sequence[System]) -> dict[str, list[float]]:
    """Distances and differences in height inside the adsorbate of these systems, by the elements of an atom
    and of one before it; none of too few systems, and of several molecules."""
    if len(systems) < MOLECULES or pieces(systems[0].adsorbate) > 1:
        return {}
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for system in systems:
        atoms = np.flatnonzero(system.tags == ADSORBATE)
        height = heights(system.lattice, system.frac)
        for j, i in itertools.combinations(atoms.tolist(), 2):
            apart = system.frac[i] - system.frac[j]
            length = float(np.linalg.norm((apart - np.round(apart)) @ system.lattice))
            found[f"{system.symbols[i]} {system.symbols[j]}"].append((length, float(height[i] - height[j])))
    limits = {pair: np.quantile(values, [0.01, 0.99], axis=0) for pair, values in sorted(found.items())}
    return {
        pair: [round(float(x), 4) for x in (l[0] - MARGIN, l[1] + MARGIN, h[0] - MARGIN, h[1] + MARGIN)]
        for pair, (l, h) in ((pair, limit.T) for pair, limit in limits.items())
    }
