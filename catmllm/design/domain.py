"""What a trained model has seen, and how far its energies are off: written beside its weights, read by
`catmllm predict` and `design`, so that a prediction outside of the training data is never told as one inside.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from catmllm.structure.elements import COVALENT_RADIUS
from catmllm.structure.formula import pieces
from catmllm.structure.graph import neighbour_graph
from catmllm.structure.system import ADSORBATE, System

FILE = "domain.json"
SAMPLE = 20_000  # systems at most that are looked at, evenly spaced
MARGIN = 0.05  # of a distance or an area, beyond what training had
REACH = 4.0  # Å; pairs farther apart do not count as near
LEAST = 20  # systems of an adsorbate from which it has an error of its own


@dataclass
class Domain:
    """Ranges of the training systems. contact: nearest adsorbate-slab distance, between: nearest slab-slab
    distance, both in sums of covalent radii; area: Å² of surface for one adsorbate; all None where training
    had texts alone; energy: eV. reference:
    the zero of the labels; labels: who made them. error: half widths that hold 68 and 95 % of the errors on
    relaxed validation systems, of all and by adsorbate, start_error: on their starts; in eV, or where
    `relative` in what the model expects each error to be. validation: MAE (eV) and number."""

    elements: list[str]
    adsorbates: list[str]
    contact: tuple[float, float] | None
    between: tuple[float, float] | None
    area: tuple[float, float] | None
    energy: tuple[float, float]
    energies: dict[str, tuple[float, float]]  # by adsorbate
    labels: str = ""
    reference: str | None = None
    error: dict[str, tuple[float, float]] = field(default_factory=dict)
    start_error: dict[str, tuple[float, float]] = field(default_factory=dict)
    relative: bool = False
    validation: dict[str, float] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        temporary = folder / f".{FILE}"
        temporary.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")
        temporary.rename(folder / FILE)

    def outside(self, system: System) -> list[str]:
        """What of a system no training system had, in words; empty where it lies inside."""
        found = []
        if unseen := sorted(set(system.slab_counts) - set(self.elements)):
            found.append(f"{', '.join(unseen)} in no training slab")
        if system.adsorbate not in self.adsorbates:
            found.append(f"adsorbate {system.adsorbate} not in training")
        if system.text is not None or not (self.contact and self.between and self.area):
            return found
        contact, between, area = shape(system)
        for name, value, (low, high) in (
            ("adsorbate-slab distance", contact, self.contact),
            ("slab-slab distance", between, self.between),
        ):
            if not low * (1 - MARGIN) <= value <= high * (1 + MARGIN):
                found.append(f"{name} of {value:.2f} radii, training {low:.2f} to {high:.2f}")
        if area < self.area[0] * (1 - MARGIN):
            found.append(f"one adsorbate on {area:.1f} Å², training from {self.area[0]:.1f} Å²")
        return found

    def half_width(self, adsorbate: str, relaxed: bool = True, expected: float = np.nan) -> float | None:
        """The half width (eV) that holds 68 % of the errors on validation systems, with the error that the
        model expects of this structure (eV); None: not known."""
        errors = self.error if relaxed else self.start_error
        known = errors.get(adsorbate, errors.get(""))
        if known is None or (self.relative and np.isnan(expected)):
            return None
        return known[0] * (expected if self.relative else 1.0)


def load_domain(folder: Path) -> Domain | None:
    """The domain of a stage's folder; None where it was trained before there were any."""
    path = folder / FILE
    return Domain(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def shape(system: System) -> tuple[float, float, float]:
    """Nearest adsorbate-slab and slab-slab distance in sums of covalent radii (inf where none is within 4 Å),
    and the surface (Å²) for one adsorbate."""
    edges = neighbour_graph(system.lattice, system.positions, REACH, 8)
    source, target = edges.edge_index
    radii = COVALENT_RADIUS[system.numbers]
    scaled = np.linalg.norm(edges.edge_vec, axis=1) / (radii[source] + radii[target])
    adsorbate = system.tags == ADSORBATE
    across = adsorbate[source] != adsorbate[target]
    inside = ~(adsorbate[source] | adsorbate[target])
    area = float(np.linalg.norm(np.cross(system.lattice[0], system.lattice[1])))
    return (
        float(scaled[across].min(initial=np.inf)),
        float(scaled[inside].min(initial=np.inf)),
        area / pieces(system.adsorbate),
    )


def domain_of(systems: Sequence[System], labels: str, reference: str | None) -> Domain:
    """The domain of training systems. Raises ValueError for none."""
    if not len(systems):
        raise ValueError("no training system, so no domain")
    some = [systems[int(i)] for i in np.unique(np.linspace(0, len(systems) - 1, SAMPLE).astype(np.int64))]
    ranges: list[tuple[float, float] | None] = [None, None, None]
    if some[0].text is None:
        shapes = np.array([shape(s) for s in some])
        shapes[~np.isfinite(shapes)] = REACH
        ranges = [(float(a), float(b)) for a, b in np.quantile(shapes, [0.001, 0.999], axis=0).T]
    by_adsorbate: dict[str, list[float]] = {}
    for s in some:
        by_adsorbate.setdefault(s.adsorbate, []).append(s.known_energy)
    energies = {a: (min(e), max(e)) for a, e in sorted(by_adsorbate.items())}
    return Domain(
        elements=sorted(Counter(e for s in some for e in s.slab_counts)),
        adsorbates=sorted(by_adsorbate),
        contact=ranges[0],
        between=ranges[1],
        area=ranges[2],
        energy=(min(e for e, _ in energies.values()), max(e for _, e in energies.values())),
        energies=energies,
        labels=labels,
        reference=reference,
    )


def calibrate(
    domain: Domain,
    predicted: NDArray[np.float64],
    truth: NDArray[np.float64],
    adsorbates: Sequence[str],
    expected: NDArray[np.float64] | None = None,
    relaxed: bool = True,
) -> None:
    """Put the errors on validation systems [n], relaxed or at their starts, into the domain: the quantiles of
    split conformal prediction (Vovk et al. 2005), ceil((n + 1) q)-th smallest, of all and by adsorbate where
    there are 20. Where the model has `expected` errors [n], of the ratios to these (Lei et al. 2018)."""
    wrong = np.abs(np.asarray(predicted, dtype=np.float64) - truth)
    if relaxed and len(wrong):
        domain.validation = {"mae": float(wrong.mean()), "n": float(len(wrong))}
    domain.relative = expected is not None and bool((expected > 0).all())
    if domain.relative:
        wrong = wrong / expected
    groups: Mapping[str, Any] = {"": np.ones(len(wrong), dtype=np.bool_)} | {
        name: np.array([a == name for a in adsorbates]) for name in set(adsorbates)
    }
    for name, rows in groups.items():
        mine = np.sort(wrong[rows])
        if len(mine) >= (LEAST if name else 1):
            at = [min(len(mine), int(np.ceil((len(mine) + 1) * q))) - 1 for q in (0.68, 0.95)]
            errors = domain.error if relaxed else domain.start_error
            errors[name] = (float(mine[at[0]]), float(mine[at[1]]))
