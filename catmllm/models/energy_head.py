"""h_reg: the energy of a system from what the LLM read,
from the features that its graph token is made of, and from what is around its adsorbate.

A linear read-out of the LLM loses what an encoder trained on energies knows. So where a structure is shown,
its features speak first and the LLM corrects them; from text only the LLM has a read-out of its own, which
the other's training does not touch. The encoder's features are pooled over a whole system and have to learn
what a site is; the local descriptor, by which kernel ridge regression beat the encoder alone, says it.
"""

from __future__ import annotations

import torch
from torch import nn

from catmllm.structure.descriptors import SURROUNDINGS

WIDTH = 256  # of the two layers that read a structure
LIMIT = 5.0  # deviations; what no training system comes near counts as this far


class EnergyHead(nn.Module):
    """Standardised energies. `text`: linear on the `<energy>` query's final hidden state, of prompts without
    a structure. `graph`: layers on a structure's features and surroundings. `correction`: linear on the query
    where there is a structure, zero at first, added to `graph`."""

    centre: torch.Tensor
    deviation: torch.Tensor

    def __init__(self, width: int, features: int) -> None:
        super().__init__()
        self.text = nn.Linear(width, 1)
        self.graph = nn.Sequential(
            nn.Linear(features + SURROUNDINGS, WIDTH),
            nn.SiLU(),
            nn.Linear(WIDTH, WIDTH),
            nn.SiLU(),
            nn.Linear(WIDTH, 1),
        )
        self.correction = nn.Linear(width, 1)
        self.register_buffer("centre", torch.zeros(SURROUNDINGS))
        self.register_buffer("deviation", torch.ones(SURROUNDINGS))
        self.clear()

    def clear(self) -> None:
        """Nothing is added to what the closed forms say, and surroundings have no scale yet."""
        for last in (self.graph[-1], self.correction, self.text):
            nn.init.zeros_(last.weight)  # type: ignore[arg-type]
            nn.init.zeros_(last.bias)  # type: ignore[arg-type]
        nn.init.zeros_(self.centre)
        nn.init.ones_(self.deviation)

    def of_structures(self, features: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
        """Energies [n] of features [n, F] and surroundings [n, SURROUNDINGS] (`GraphBatch.local`; float32,
        since half of a surrounding is too coarse before its centre is taken away)."""
        local = ((local - self.centre) / self.deviation).clamp(-LIMIT, LIMIT)
        dtype = self.correction.weight.dtype
        read = torch.cat([features.to(dtype), local.to(dtype)], 1)
        return self.graph(read).sum(1)  # of one column; a view would make FSDP warn

    def forward(
        self,
        features: torch.Tensor,
        local: torch.Tensor,
        query: torch.Tensor | None = None,
        sample: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Energies float32: [n] of structures only; [S] of queries [S, H],
        `sample` [n] saying whose structure each row is."""
        seen = self.of_structures(features, local)
        if query is None or sample is None:
            return seen.float()
        query = query.to(seen.dtype)
        shown = torch.zeros(len(query), dtype=torch.bool, device=query.device)
        shown[sample] = True
        corrected = self.correction(query).squeeze(1).index_add(0, sample, seen)
        return torch.where(shown, corrected, self.text(query).squeeze(1)).float()
