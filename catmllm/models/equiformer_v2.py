"""EquiformerV2 (Liao et al., arXiv 2306.12059): the encoder that turns an atomistic graph into node embeddings.

Parameters carry fairchem 1.x's names, so that OC20 checkpoints load key for key; the arithmetic is our own. A node is
x [N, (lmax+1)², C]. A message between two nodes is computed in the frame of its edge, where a rotation about the edge
mixes only +m with -m: there an equivariant linear map is one complex matrix per order m (eSCN, arXiv 2302.03655), and
few orders (|m| <= mmax) suffice. The rows of an edge are kept by m ("m-primary", see `so3`): a message is then a
tuple of `parts`, one matrix per m: [E, (lmax+1)·C] for m = 0 and [E, 2·(lmax+1-m)·C] = (+m, -m) for m > 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from catmllm.models.edge_ops import rotate_and_scale, rotate_back_and_sum, sphere_silu
from catmllm.models.fairchem_checkpoint import load_fairchem_checkpoint
from catmllm.models.so3 import SphereTables
from catmllm.models.spherical_layers import (
    NORMS,
    SphericalLayerNorm,
    SphericalLinear,
    SphericalRMSNorm,
    at_least_float32,
    layer_norm,
)

__all__ = ["EquiformerV2", "EquiformerV2Config", "load_fairchem_checkpoint"]


@dataclass(frozen=True)
class EquiformerV2Config:
    """Sizes and choices, named as in fairchem's configs. `EquiformerV2Config.preset("31M")` gives the OC20 ones."""

    num_layers: int = 2
    lmax: int = 2
    mmax: int = 2
    sphere_channels: int = 32
    attn_hidden_channels: int = 32
    num_heads: int = 4
    attn_alpha_channels: int = 16
    attn_value_channels: int = 8
    ffn_hidden_channels: int = 64
    edge_channels: int = 32
    num_distance_basis: int = 64  # fairchem's own key of this name is ignored there: it always has 600
    max_radius: float = 6.0  # Å, the end of the distance basis; the graph is made elsewhere
    max_num_elements: int = 90
    norm_type: Literal["layer_norm_sh", "rms_norm_sh"] = "layer_norm_sh"
    use_gate_act: bool = False  # gates instead of the separable S2 activation
    use_grid_mlp: bool = True  # feed-forward on the sphere grid; False: linear, activation, linear
    use_attn_renorm: bool = True
    grid_resolution: int | None = None  # points each way; None: 2(lmax+1) latitudes
    alpha_drop: float = 0.0
    drop_path_rate: float = 0.0
    avg_num_nodes: float = 77.81317  # of OC20 IS2RE 100k; divides the energy
    avg_degree: float = 23.395238876342773  # of the same; divides the edge-degree embedding
    energy_head: bool = False
    force_head: bool = False
    activation_checkpoint: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.mmax <= self.lmax or self.lmax < 1:
            raise ValueError(f"need lmax >= 1 and 0 <= mmax <= lmax, not lmax {self.lmax}, mmax {self.mmax}")
        if self.norm_type not in NORMS:
            raise ValueError(f"unknown norm_type {self.norm_type!r}; choose one of {', '.join(NORMS)}")

    @staticmethod
    def preset(name: str, **changes: object) -> EquiformerV2Config:
        """The configuration of a published OC20 checkpoint (`31M`, `153M`) with some fields changed."""
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}")
        return replace(PRESETS[name], **changes)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Geometry:
    """What every block reads of a batch: its edges, their frames, and the constant tables in the model's dtype."""

    source: Tensor  # [E] int64
    target: Tensor
    source_number: Tensor  # [E] atomic numbers
    target_number: Tensor
    basis: Tensor  # [E, num_distance_basis]
    wigner: Tensor  # [E, M, S] onto the edge frame
    wigner_back: Tensor  # [E, S, M] back, scaled for the orders that were cut
    batch: Tensor | None  # [N] int64 system of each node, for stochastic depth
    degree: Tensor  # [S] l of every node row
    node_grid: tuple[Tensor, Tensor]  # [P, S] and [S, P]
    edge_grid: tuple[Tensor, Tensor]  # [P', M] and [M, P']


class RadialFunction(nn.Module):
    """Distance basis and the two elements of an edge -> MLP -> `c_out` weights.

    The first layer acts on (basis, source embedding, target embedding). It is linear, so that the embeddings go through it
    once per element, not once per edge.
    """

    def __init__(self, basis: int, channels: int, c_out: int) -> None:
        super().__init__()
        self.basis, self.channels = basis, channels
        self.net = nn.Sequential(
            nn.Linear(basis + 2 * channels, channels),
            nn.LayerNorm(channels),
            nn.SiLU(),
            nn.Linear(channels, channels),
            nn.LayerNorm(channels),
            nn.SiLU(),
            nn.Linear(channels, c_out),
        )

    def forward(self, geometry: Geometry, source: nn.Embedding, target: nn.Embedding) -> Tensor:
        net: Any = self.net
        first, norm_1, _, second, norm_2, _, last = net
        distance, of_source, of_target = first.weight.split([self.basis, self.channels, self.channels], dim=1)
        x = F.linear(geometry.basis, distance, first.bias)
        x = x + F.embedding(geometry.source_number, F.linear(source.weight, of_source))
        x = x + F.embedding(geometry.target_number, F.linear(target.weight, of_target))
        x = second(F.silu(layer_norm(x, norm_1)))
        return last(F.silu(layer_norm(x, norm_2)))


class EdgeDegreeEmbedding(nn.Module):
    """Start of the node rows l >= 0: the m = 0 rows of every incoming edge, rotated back, summed, / avg_degree."""

    def __init__(self, config: EquiformerV2Config) -> None:
        super().__init__()
        self.lmax, self.avg_degree = config.lmax, config.avg_degree
        self.source_embedding = nn.Embedding(config.max_num_elements, config.edge_channels)
        self.target_embedding = nn.Embedding(config.max_num_elements, config.edge_channels)
        width = (config.lmax + 1) * config.sphere_channels
        self.rad_func = RadialFunction(config.num_distance_basis, config.edge_channels, width)

    def forward(self, geometry: Geometry, n_nodes: int) -> Tensor:
        rows = self.rad_func(geometry, self.source_embedding, self.target_embedding)
        rows = rows.unflatten(1, (self.lmax + 1, -1)).to(geometry.wigner.dtype)
        x = at_least_float32(torch.bmm(geometry.wigner_back[:, :, : self.lmax + 1], rows))
        total = x.new_zeros(n_nodes, *x.shape[1:]).index_add(0, geometry.target, x)
        return (total / self.avg_degree).to(rows.dtype)


class SO2Linear(nn.Module):
    """The complex matrix of one order m > 0: y₊ + i·y₋ = (r + i·s)(x₊ + i·x₋), `fc.weight` = (r; s)."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width_in, 2 * width_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(x₊, x₋) [E, 2·in] -> (y₊, y₋) [E, 2·out], as one real product."""
        r, s = self.fc.weight.chunk(2)
        return F.linear(x, torch.cat([torch.cat([r, -s], dim=1), torch.cat([s, r], dim=1)]))


class SO2Convolution(nn.Module):
    """A linear map of `parts` that commutes with rotations about the edge. m = 0 also gives `extra` scalars."""

    def __init__(self, lmax: int, mmax: int, c_in: int, c_out: int, extra: int = 0) -> None:
        super().__init__()
        degrees = [lmax + 1 - m for m in range(mmax + 1)]
        self.widths = [n * c_in for n in degrees]
        self.extra = extra
        self.fc_m0 = nn.Linear(degrees[0] * c_in, extra + degrees[0] * c_out)
        self.so2_m_conv = nn.ModuleList(SO2Linear(n * c_in, n * c_out) for n in degrees[1:])

    def forward(self, parts: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Parts -> (extra [E, extra], parts of c_out channels)."""
        scalars = self.fc_m0(parts[0])
        extra, scalars = scalars.split([self.extra, scalars.shape[1] - self.extra], dim=1)
        return extra, [scalars, *(conv(x) for conv, x in zip(self.so2_m_conv, parts[1:], strict=True))]


class RadialSO2Convolution(SO2Convolution):
    """The first convolution of a message, whose input is scaled by a function of the edge's length and elements."""

    def __init__(self, config: EquiformerV2Config, c_in: int, c_out: int, extra: int) -> None:
        super().__init__(config.lmax, config.mmax, c_in, c_out, extra)
        self.rad_func = RadialFunction(config.num_distance_basis, config.edge_channels, sum(self.widths))


class GraphAttention(nn.Module):
    """Messages by two SO(2) convolutions with a nonlinearity between, weighted by attention over each target."""

    def __init__(self, config: EquiformerV2Config, c_out: int) -> None:
        super().__init__()
        c = self.config = config
        self.source_embedding = nn.Embedding(c.max_num_elements, c.edge_channels)
        self.target_embedding = nn.Embedding(c.max_num_elements, c.edge_channels)
        self.alpha_width = c.num_heads * c.attn_alpha_channels
        gates = c.attn_hidden_channels * (c.lmax if c.use_gate_act else 1)
        hidden, value = c.attn_hidden_channels, c.num_heads * c.attn_value_channels
        self.so2_conv_1 = RadialSO2Convolution(c, 2 * c.sphere_channels, hidden, self.alpha_width + gates)
        self.alpha_norm = nn.LayerNorm(c.attn_alpha_channels) if c.use_attn_renorm else None
        self.alpha_dot = nn.Parameter(torch.empty(c.num_heads, c.attn_alpha_channels))
        self.so2_conv_2 = SO2Convolution(c.lmax, c.mmax, hidden, value)
        self.proj = SphericalLinear(c.lmax, value, c_out)

    def forward(self, x: Tensor, geometry: Geometry) -> Tensor:
        """Nodes [N, S, C] -> [N, S, c_out]."""
        g, conv = geometry, self.so2_conv_1
        radial = conv.rad_func(g, self.source_embedding, self.target_embedding)
        x = x.to(radial.dtype)
        parts = rotate_and_scale(x, radial, g.wigner, g.source, g.target, conv.widths)
        extra, parts = conv(parts)
        alpha, gates = extra.split([self.alpha_width, extra.shape[1] - self.alpha_width], dim=1)
        _, parts = self.so2_conv_2(self.activation(gates, parts, g))
        alpha = self.attention(alpha, g.target, len(x)).to(parts[0].dtype)
        total = rotate_back_and_sum(parts, alpha, g.wigner_back, g.target, len(x))
        return self.proj(total.transpose(0, 1), g.degree).transpose(0, 1)

    def attention(self, alpha: Tensor, target: Tensor, n_nodes: int) -> Tensor:
        """Softmax over the edges of each target: [E, heads·alpha] -> [E, heads], in at least float32."""
        x = at_least_float32(alpha).unflatten(1, self.alpha_dot.shape)
        if self.alpha_norm is not None:
            x = layer_norm(x, self.alpha_norm)
        x = 0.2 * x + 0.8 * F.silu(x)  # fairchem's SmoothLeakyReLU, multiplied out
        x = (x * self.alpha_dot).sum(2)
        index = target[:, None].expand_as(x)
        top = x.new_zeros(n_nodes, x.shape[1]).scatter_reduce(
            0, index, x.detach(), "amax", include_self=False
        )
        weight = torch.exp(x - top.index_select(0, target))
        total = weight.new_zeros(n_nodes, x.shape[1]).index_add(0, target, weight)
        return F.dropout(weight / total.index_select(0, target), self.config.alpha_drop, self.training)

    def activation(self, gates: Tensor, parts: list[Tensor], geometry: Geometry) -> list[Tensor]:
        """Nonlinearity of the hidden parts: gates per degree, or SiLU on the sphere with l = 0 apart."""
        hidden = self.config.attn_hidden_channels
        if self.config.use_gate_act:
            # SiLU(x) = x·σ(x), so that the l = 0 row is its own gate
            gate = torch.sigmoid(torch.cat([parts[0][:, :hidden], gates], dim=1))
            rows = [gate] + [gate[:, m * hidden :] for m in range(1, len(parts))]
            return [(p.unflatten(1, (-1, r.shape[1])) * r[:, None]).flatten(1) for p, r in zip(parts, rows)]
        return sphere_silu(gates, parts, *geometry.edge_grid)


class FeedForward(nn.Module):
    """Per node: linear, nonlinearity, linear. On the sphere grid an MLP, else gates or the S2 activation."""

    def __init__(self, config: EquiformerV2Config, c_out: int) -> None:
        super().__init__()
        c, hidden = config, config.ffn_hidden_channels
        self.config = config
        self.so3_linear_1 = SphericalLinear(c.lmax, c.sphere_channels, hidden)
        if c.use_grid_mlp:
            self.scalar_mlp = nn.Sequential(nn.Linear(c.sphere_channels, hidden), nn.SiLU())
            linears = [nn.Linear(hidden, hidden, bias=False) for _ in range(3)]
            self.grid_mlp = nn.Sequential(linears[0], nn.SiLU(), linears[1], nn.SiLU(), linears[2])
        else:
            self.gating_linear = nn.Linear(c.sphere_channels, hidden * (c.lmax if c.use_gate_act else 1))
        self.so3_linear_2 = SphericalLinear(c.lmax, hidden, c_out)

    def forward(self, x: Tensor, geometry: Geometry) -> Tensor:
        """Nodes [N, S, C] -> [N, S, c_out]. Inside, rows come first, so that the grid is one product for all nodes."""
        c, degree = self.config, geometry.degree
        y = self.so3_linear_1(x.transpose(0, 1), degree)
        if not c.use_grid_mlp and c.use_gate_act:
            gates = self.gating_linear(x[:, 0]).unflatten(1, (c.lmax, -1)).transpose(0, 1)
            y = y * torch.sigmoid(torch.cat([y[:1], gates])).index_select(0, degree)
        else:
            to_grid, from_grid = geometry.node_grid
            grid = (to_grid @ y.flatten(1)).unflatten(1, y.shape[1:])
            grid = self.grid_mlp(grid) if c.use_grid_mlp else F.silu(grid)
            scalar = self.scalar_mlp(x[:, 0]) if c.use_grid_mlp else F.silu(self.gating_linear(x[:, 0]))
            rest = (from_grid[1:] @ grid.flatten(1)).unflatten(1, y.shape[1:])
            y = torch.cat([scalar[None], rest])
        return self.so3_linear_2(y, degree).transpose(0, 1)


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, config: EquiformerV2Config) -> None:
        super().__init__()
        norm = NORMS[config.norm_type]
        self.norm_1 = norm(config.lmax, config.sphere_channels)
        self.ga = GraphAttention(config, config.sphere_channels)
        self.norm_2 = norm(config.lmax, config.sphere_channels)
        self.ffn = FeedForward(config, config.sphere_channels)
        self.drop_path_rate, self.checkpoint = config.drop_path_rate, config.activation_checkpoint

    def forward(self, x: Tensor, geometry: Geometry) -> Tensor:
        """Nodes [N, S, C] -> [N, S, C]; keeps only its input for the backward pass where asked to."""
        if self.checkpoint and torch.is_grad_enabled():
            return checkpoint(self._layers, x, geometry, use_reentrant=False)
        return self._layers(x, geometry)

    def _layers(self, x: Tensor, geometry: Geometry) -> Tensor:
        x = x + self.drop_path(self.ga(self.norm_1(x, geometry.degree), geometry), geometry.batch)
        return x + self.drop_path(self.ffn(self.norm_2(x, geometry.degree), geometry), geometry.batch)

    def drop_path(self, x: Tensor, batch: Tensor | None) -> Tensor:
        """Stochastic depth, one draw per system."""
        if not self.training or self.drop_path_rate == 0:
            return x
        batch = torch.zeros(len(x), dtype=torch.int64, device=x.device) if batch is None else batch
        kept = torch.rand(len(x), device=x.device).index_select(0, batch) >= self.drop_path_rate
        return x * (kept.to(x.dtype) / (1 - self.drop_path_rate))[:, None, None]


class EquiformerV2(nn.Module):
    """Atomic numbers and edges -> node embeddings after the final norm; energy and forces by `predict`."""

    def __init__(self, config: EquiformerV2Config) -> None:
        super().__init__()
        self.config = config
        self.sphere_embedding = nn.Embedding(config.max_num_elements, config.sphere_channels)
        self.tables = SphereTables(config.lmax, config.mmax, config.grid_resolution)
        self.edge_degree_embedding = EdgeDegreeEmbedding(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = NORMS[config.norm_type](config.lmax, config.sphere_channels)
        self.energy_block = FeedForward(config, 1) if config.energy_head else None
        self.force_block = GraphAttention(config, 1) if config.force_head else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """fairchem's `weight_init: uniform`, the one of the OC20 configs. Also for a model made on `meta`."""
        for module in self.modules():
            if isinstance(module, nn.Linear | SphericalLinear):
                bound = 1 / math.sqrt(module.weight.shape[-1])
                module.weight.uniform_(-bound, bound)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, SphericalLayerNorm | SphericalRMSNorm):
                module.affine_weight.fill_(1)
                if isinstance(module, SphericalRMSNorm):
                    module.affine_bias.zero_()
            elif isinstance(module, nn.Embedding):
                module.weight.uniform_(-0.001, 0.001)
            elif isinstance(module, GraphAttention):
                bound = 1 / math.sqrt(module.alpha_dot.shape[1])
                module.alpha_dot.uniform_(-bound, bound)
        for module in self.modules():
            if isinstance(module, SO2Linear):
                module.fc.weight.mul_(1 / math.sqrt(2))
        self.sphere_embedding.weight.normal_()

    def forward(
        self,
        numbers: Tensor,
        edge_index: Tensor,
        edge_vec: Tensor,
        batch: Tensor | None = None,
        n_systems: int | None = None,
        edge_rot_mat: Tensor | None = None,
    ) -> Tensor:
        """Node embedding [N, (lmax+1)², C] after the final norm.

        numbers [N] int64 atomic numbers below max_num_elements; edge_index [2, E] int64 (source, target); edge_vec
        [E, 3] float32 or float64 Å, source minus target; batch [N] int64, system of each atom (stochastic depth reads it);
        edge_rot_mat [E, 3, 3] fixes the edge frames, for comparison with fairchem, whose frames are random.
        """
        geometry = self.geometry(numbers, edge_index, edge_vec, batch, edge_rot_mat)
        return self._embed(numbers, geometry)

    def predict(
        self,
        numbers: Tensor,
        edge_index: Tensor,
        edge_vec: Tensor,
        batch: Tensor | None = None,
        n_systems: int | None = None,
        edge_rot_mat: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """`forward`'s embedding through the heads that exist: {"energy" [n_systems], "forces" [N, 3]}.

        In the units that the heads were trained in (fairchem's are normalised). Under FSDP2, register this name with
        `register_fsdp_forward_method`.
        """
        geometry = self.geometry(numbers, edge_index, edge_vec, batch, edge_rot_mat)
        x = self._embed(numbers, geometry)
        out = {}
        if self.energy_block is not None:
            per_atom = at_least_float32(self.energy_block(x, geometry)[:, 0, 0])
            if batch is None:
                batch, n_systems = torch.zeros_like(numbers), 1
            n = int(batch.max()) + 1 if n_systems is None else n_systems
            out["energy"] = per_atom.new_zeros(n).index_add(0, batch, per_atom) / self.config.avg_num_nodes
        if self.force_block is not None:
            out["forces"] = self.force_block(x, geometry)[:, 1:4, 0]
        return out

    def _embed(self, numbers: Tensor, geometry: Geometry) -> Tensor:
        x = self.edge_degree_embedding(geometry, len(numbers))
        scalars = self.sphere_embedding(numbers)
        x = torch.cat([x[:, :1] + scalars[:, None], x[:, 1:]], dim=1)
        for block in self.blocks:
            x = block(x, geometry)
        return self.norm(x, geometry.degree)

    def geometry(
        self,
        numbers: Tensor,
        edge_index: Tensor,
        edge_vec: Tensor,
        batch: Tensor | None = None,
        edge_rot_mat: Tensor | None = None,
    ) -> Geometry:
        """Everything that depends on positions, once per forward pass; computed in the dtype of `edge_vec`."""
        if edge_vec.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"edge_vec is {edge_vec.dtype}: distances need float32 or float64. "
                "Under FSDP2 set MixedPrecisionPolicy(cast_forward_inputs=False) on the root"
            )
        device, t = edge_vec.device, self.tables
        dtype = self.sphere_embedding.weight.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        with torch.autocast(device.type, enabled=False):
            wigner = t.rotation(edge_vec, edge_rot_mat)
            back = wigner * t.row_scale.to(wigner.dtype)[:, None]
            basis = self.distance_basis(torch.linalg.vector_norm(edge_vec, dim=1))
        source, target = edge_index.unbind(0)
        return Geometry(
            source,
            target,
            numbers.index_select(0, source),
            numbers.index_select(0, target),
            basis.to(dtype),
            wigner.to(dtype),
            back.to(dtype).transpose(1, 2),
            batch,
            t.degree,
            (t.node_to_grid.to(dtype), t.node_from_grid.to(dtype)),
            (t.edge_to_grid.to(dtype), t.edge_from_grid.to(dtype)),
        )

    def distance_basis(self, distance: Tensor) -> Tensor:
        """Gaussians on [0, max_radius], two spacings wide: [E] -> [E, num_distance_basis]."""
        n, end = self.config.num_distance_basis, self.config.max_radius
        centres = torch.linspace(0, end, n, dtype=distance.dtype, device=distance.device)
        scale = (n - 1) / (2 * end)
        exponent = -0.5 * ((distance[:, None] - centres) * scale).square()
        return torch.exp(exponent.clamp_min(-80))  # below, float32 is subnormal: 5 times slower on a CPU


_OC20 = EquiformerV2Config(
    num_layers=8,
    lmax=4,
    mmax=2,
    sphere_channels=128,
    attn_hidden_channels=64,
    num_heads=8,
    attn_alpha_channels=64,
    attn_value_channels=16,
    ffn_hidden_channels=128,
    edge_channels=128,
    num_distance_basis=600,
    max_radius=12.0,
    grid_resolution=18,
)
PRESETS = {"31M": _OC20, "153M": replace(_OC20, num_layers=20, lmax=6, mmax=3)}
