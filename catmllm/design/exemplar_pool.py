"""The exemplar pool of GA-GRPO: the best different structures found for one task so far.

Hard constraints come first: as soon as one candidate meets them, those that do not are dropped. Until then
the pool holds the best that at least parse, and says so.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from catmllm.structure.adsorbed import Fault


@dataclass(frozen=True)
class Candidate:
    """One scored text. reward: of the closed loop; predicted: eV or NaN; fault: why its adsorbate is none,
    or None; feasible: meets the hard constraints; error: how far the prediction is expected to be off, eV."""

    text: str
    reward: float
    predicted: float
    pvcp: float
    fault: Fault | None
    feasible: bool
    key: str  # equal keys are equal structures
    iteration: int  # 0: drawn from the text alone
    error: float = np.nan

    def to_json(self) -> dict[str, Any]:
        return dict(self.__dict__)


@dataclass
class ExemplarPool:
    """At most `size` candidates, best first."""

    size: int
    members: list[Candidate] = field(default_factory=list)

    def add(self, candidates: list[Candidate]) -> None:
        """Keep the best `size` of members and candidates, each structure once; earlier ones win ties."""
        pool = [*self.members, *candidates]
        if any(c.feasible for c in pool):
            pool = [c for c in pool if c.feasible]
        best: dict[str, Candidate] = {}
        for c in pool:
            if c.key not in best or c.reward > best[c.key].reward:
                best[c.key] = c
        self.members = sorted(best.values(), key=lambda c: (-c.reward, c.iteration, c.key))[: self.size]

    @property
    def feasible(self) -> bool:
        """Whether the members meet the hard constraints (all do, or none does)."""
        return bool(self.members) and self.members[0].feasible

    @property
    def best(self) -> Candidate | None:
        return self.members[0] if self.members else None

    def draw(self, rng: np.random.Generator) -> Candidate | None:
        """One member, uniformly; None from an empty pool."""
        return self.members[rng.integers(len(self.members))] if self.members else None
