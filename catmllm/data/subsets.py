"""Parts of the training systems, for studies: nested shares, and which systems are asked for what.

The order is that of a hash, so a part depends neither on how systems are stored nor on the machine, and of
two shares the smaller is inside the larger.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal, overload

import numpy as np

from catmllm.config import DataConfig
from catmllm.data.shards import Shards
from catmllm.data.slabs import pair
from catmllm.seeds import Stream, generator
from catmllm.structure.system import System


def part(
    systems: Sequence[System],
    ends: tuple[float, float],
    seed: int,
    unit: Literal["system", "pair"],
    name: str = "part",
) -> Sequence[System]:
    """The systems between two shares of all, in the order of a hash of seed and sid, or of seed and (bulk,
    Miller index) pair; they keep their own order.

    Adjoining parts share nothing and lose nothing: a unit is where the middle of its systems is. Raises
    ValueError, naming the key `name`, where no system is between the ends.
    """
    low, high = ends
    if (low, high) == (0.0, 1.0):
        return systems
    used, of_system, counts = np.unique(_units(systems, unit), return_inverse=True, return_counts=True)
    order = sorted(range(len(used)), key=lambda k: hashlib.sha256(f"part {seed} {used[k]}".encode()).digest())
    middle = np.empty(len(used))
    middle[order] = (np.cumsum(counts[order]) - counts[order] / 2) / len(systems)
    rows = np.flatnonzero(((low <= middle) & (middle < high))[of_system])
    if not len(rows):
        raise ValueError(f"`{name}`: none of {len(systems)} training systems is between {low:g} and {high:g}")
    return systems[rows] if isinstance(systems, Shards) else [systems[int(i)] for i in rows]


def _units(systems: Sequence[System], unit: str) -> list[str]:
    if isinstance(systems, Shards):
        if unit == "pair":
            names = systems.pair_names
            return [names[p] for p in systems.pairs]
        return [systems.sid(i) for i in range(len(systems))]
    return [s.sid if unit == "system" else pair(s) for s in systems]


def pairs(systems: Sequence[System]) -> frozenset[str]:
    """The (bulk, Miller index) pairs of some systems, named as by `slabs.pair`."""
    if isinstance(systems, Shards):
        names = systems.pair_names
        return frozenset(names[p] for p in np.unique(systems.pairs).tolist())
    return frozenset(map(pair, systems))


def of_property(train: Sequence[System], config: DataConfig) -> Sequence[System]:
    """The training systems whose energies are learned: `data.property` of all."""
    return part(train, config.property, config.split_seed, config.unit, "data.property")


def learned(data: Mapping[str, Sequence[System]], config: DataConfig) -> dict[str, Sequence[System]]:
    """The parts of a data set, of the training systems those whose energies are learned."""
    return {**data, "train": of_property(data["train"], config)}


def of_generation(train: Sequence[System], config: DataConfig) -> Sequence[System]:
    """The training systems whose CIFs are learned and asked for: `data.generation` of all."""
    found = part(train, config.generation, config.split_seed, config.unit, "data.generation")
    return Permuted(found, config.split_seed) if config.permute else found


class Permuted(Sequence[System]):
    """Systems whose energies have changed places within each adsorbate: what a CIF says of an energy is
    gone, all else is there."""

    def __init__(self, systems: Sequence[System], seed: int) -> None:
        self.systems = systems
        self.energies = np.array([s.known_energy for s in systems])
        names = np.array([s.adsorbate for s in systems])
        rng = generator(Stream.PERMUTED_ENERGIES.key(seed))
        for name in sorted({*names.tolist()}):
            rows = np.flatnonzero(names == name)
            self.energies[rows] = self.energies[rng.permutation(rows)]

    def __len__(self) -> int:
        return len(self.systems)

    @overload
    def __getitem__(self, index: int) -> System: ...
    @overload
    def __getitem__(self, index: slice) -> list[System]: ...
    def __getitem__(self, index: int | slice) -> System | list[System]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return replace(self.systems[index], energy=float(self.energies[index]))
