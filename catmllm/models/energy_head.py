"""h_reg: the energy of a system from what the LLM read,
and from the features that its graph token is made of.

A linear read-out of the LLM loses what an encoder trained on energies knows. So where a structure is shown,
its features speak first and the LLM corrects them; from text only the LLM has a read-out of its own, which
the other's training does not touch.
"""

from __future__ import annotations

import torch
from torch import nn

WIDTH = 128  # between the two layers that read the features


class EnergyHead(nn.Module):
    """Standardised energies. `text`: linear on the `<energy>` query's final hidden state, of prompts without
    a structure. `graph`: two layers on a structure's features. `correction`: linear on the query where there
    is a structure, zero at first, added to `graph`."""

    def __init__(self, width: int, features: int) -> None:
        super().__init__()
        self.text = nn.Linear(width, 1)
        self.graph = nn.Sequential(nn.Linear(features, WIDTH), nn.SiLU(), nn.Linear(WIDTH, 1))
        self.correction = nn.Linear(width, 1)
        nn.init.zeros_(self.correction.weight)
        nn.init.zeros_(self.correction.bias)

    def forward(
        self, features: torch.Tensor, query: torch.Tensor | None = None, sample: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Energies float32: [n] of features [n, F] only; [S] of queries [S, H],
        `sample` [n] saying whose features each row holds."""
        seen = self.graph(features).sum(1)  # of one column; a view would make FSDP warn
        if query is None or sample is None:
            return seen.float()
        shown = torch.zeros(len(query), dtype=torch.bool, device=query.device)
        shown[sample] = True
        corrected = self.correction(query).squeeze(1).index_add(0, sample, seen)
        return torch.where(shown, corrected, self.text(query).squeeze(1)).float()
