"""SchNet (Schütt et al., J. Chem. Phys. 148, 241722, 2018): an encoder that sees distances alone.

A node is h [N, C]. In each block a neighbour's values are multiplied, channel by channel, by filters that a
small network makes of the distance (a continuous-filter convolution), summed, and added to the node. A cosine
takes the filters to 0 at the cutoff. Nothing of it turns with the crystal, so it is an encoder of degree 0
for the projector. It reads the same periodic graphs as EquiformerV2: an edge has its own vector, so that
images of an atom are neighbours like others.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from catmllm.config import section
from catmllm.models.spherical_layers import at_least_float32
from catmllm_kernels.so3_pool_project import so3_pool


@section
class SchNetConfig:
    """Sizes by the keys that EquiformerV2 has for the like."""

    num_layers: int = 6  # interaction blocks
    sphere_channels: int = 128  # of a node, all of degree 0
    edge_channels: int = 128  # filters
    num_distance_basis: int = 50  # Gaussians
    max_radius: float = 10.0  # Å, where filters end; the graph is made elsewhere
    max_num_elements: int = 100
    lmax: Literal[0] = 0


def shifted_softplus(x: Tensor) -> Tensor:
    """ln(eˣ/2 + 1/2), which is 0 at 0 and smooth everywhere."""
    return F.softplus(x) - math.log(2.0)


class Interaction(nn.Module):
    """What a block adds to the nodes: a convolution with filters of the distance, then a layer per node."""

    def __init__(self, config: SchNetConfig) -> None:
        super().__init__()
        channels, filters = config.sphere_channels, config.edge_channels
        self.filter_1 = nn.Linear(config.num_distance_basis, filters)
        self.filter_2 = nn.Linear(filters, filters)
        self.lin_in = nn.Linear(channels, filters, bias=False)
        self.lin_out = nn.Linear(filters, channels)
        self.lin = nn.Linear(channels, channels)

    def forward(self, h: Tensor, edge_index: Tensor, basis: Tensor, fade: Tensor) -> Tensor:
        """Nodes [N, C] -> [N, C], in at least float32 as they came. basis [E, num_distance_basis]; fade [E]
        what the cutoff leaves of a filter."""
        source, target = edge_index
        filters = self.filter_2(shifted_softplus(self.filter_1(basis))) * fade[:, None]
        message = self.lin_in(h.to(basis.dtype)).index_select(0, source) * filters
        total = h.new_zeros(len(h), filters.shape[1]).index_add(0, target, message.to(h.dtype))
        y = shifted_softplus(self.lin_out(total.to(basis.dtype)))
        return h + self.lin(y)


class SchNet(nn.Module):
    """Atomic numbers and edges -> node embeddings, or features by system or atom.

    Sums over edges and nodes stay in at least float32; the products are in the dtype of the weights. In
    float16 a node's values must stay below 65504: no norm stands before them.
    """

    def __init__(self, config: SchNetConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.max_num_elements, config.sphere_channels)
        self.blocks = nn.ModuleList(Interaction(config) for _ in range(config.num_layers))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Xavier's uniform weights and no biases, as published."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    module.bias.zero_()
        self.embedding.weight.normal_()

    def forward(
        self,
        numbers: Tensor,
        edge_index: Tensor,
        edge_vec: Tensor,
        batch: Tensor | None = None,
        n_systems: int | None = None,
        pool: str | None = None,
    ) -> Tensor:
        """Node embedding [N, C], or with `pool` its features by system or atom (`so3_pool`).

        numbers [N] int64 atomic numbers below max_num_elements; edge_index [2, E] int64 (source, target);
        edge_vec [E, 3] float32 or float64 Å; batch [N] int64, system of each atom, which pooling reads.
        """
        dtype = self.embedding.weight.dtype
        distance = torch.linalg.vector_norm(edge_vec.double(), dim=1)
        basis, fade = self.distance_basis(distance).to(dtype), self.fade(distance).to(dtype)
        h = at_least_float32(self.embedding(numbers))
        for block in self.blocks:
            h = block(h, edge_index, basis, fade)
        h = h.to(dtype)
        if pool is None:
            return h
        batch = torch.zeros_like(numbers) if batch is None else batch
        return so3_pool(h[:, None], batch, 1 if n_systems is None else n_systems, pool)

    def distance_basis(self, distance: Tensor) -> Tensor:
        """Gaussians on [0, max_radius], as wide as their spacing: [E] -> [E, num_distance_basis]."""
        n, end = self.config.num_distance_basis, self.config.max_radius
        centres = torch.linspace(0, end, n, dtype=distance.dtype, device=distance.device)
        return torch.exp(-0.5 * ((distance[:, None] - centres) * ((n - 1) / end)).square())

    def fade(self, distance: Tensor) -> Tensor:
        """Half a cosine from 1 at 0 to 0 at max_radius: [E] -> [E]."""
        return 0.5 * (torch.cos(distance * (math.pi / self.config.max_radius)) + 1.0)


class NoEncoder(nn.Module):
    """In the place of an encoder in a model that reads texts alone. It has no weights and reads nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SchNetConfig(num_layers=1, sphere_channels=1)
        self.blocks = nn.ModuleList()

    def forward(self, *graph: Any, pool: str | None = None) -> Tensor:
        """Raises ValueError: nothing may ask."""
        raise ValueError("a model of `model.encoder.kind: none` reads texts alone and has no graph token")
