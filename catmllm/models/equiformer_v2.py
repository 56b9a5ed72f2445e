"""EquiformerV2 (Liao et al., arXiv 2306.12059): the encoder
that turns an atomistic graph into node embeddings.

Parameters carry fairchem 1.x's names, so that OC20 checkpoints load key for key; the arithmetic is our own. A
node is x [N, (lmax+1)², C]. A message between two nodes is computed in the frame of its edge, where a
rotation about the edge mixes only +m with -m: there an equivariant linear map is one complex matrix per order
m (eSCN, arXiv 2302.03655), and few orders (|m| <= mmax) suffice. What happens along an edge is one fused
operation, `catmllm_kernels.escn`, whose reference.py is its definition; here are the weights and everything
that happens on nodes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from catmllm.config import PRESET_CUTOFF, PRESETS, EncoderSizes, Preset, section
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
from catmllm_kernels.escn import (
    EdgeAttention,
    EdgeGraph,
    Sphere,
    edge_attention,
    edge_graph,
    rotate_back_sum,
)
from catmllm_kernels.so3_pool_project import so3_pool

__all__ = ["EquiformerV2", "EquiformerV2Config", "load_fairchem_checkpoint"]


@section
class EquiformerV2Config(EncoderSizes):
    """Sizes and choices, named as in fairchem's configs.
    `EquiformerV2Config.preset("31M")` gives the OC20 ones."""

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

    @staticmethod
    def preset(name: Preset, **changes: Any) -> EquiformerV2Config:
        """The configuration of a published OC20 checkpoint with some fields changed."""
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}")
        sizes = PRESETS[name] | {"max_radius": PRESET_CUTOFF, "grid_resolution": 18}
        return EquiformerV2Config(**sizes | changes)


@dataclass(frozen=True)
class Geometry:
    """What every block reads of a batch: its edges, their frames,
    and the constant tables in the model's dtype."""

    graph: EdgeGraph  # edges sorted by target
    source_number: Tensor  # [E] atomic numbers
    target_number: Tensor
    basis: Tensor  # [E, num_distance_basis]
    wigner: Tensor  # [E, P] packed blocks onto the edge frame, in at least float32
    sphere: Sphere  # grid of the edges, in at least float32
    batch: Tensor | None  # [N] int64 system of each node, for stochastic depth
    degree: Tensor  # [S] l of every node row
    node_grid: tuple[Tensor, Tensor]  # [P', S] and [S, P']


def recomputed(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """`function(*inputs)`, of which autograd keeps the inputs alone;
    for what is cheap beside an edge's products.

    The norms, the radial function and the feed-forward network are 17 % of a layer's arithmetic and would be
    three quarters of what it keeps for the backward pass.
    """
    if not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


class RadialFunction(nn.Module):
    """Distance basis and the two elements of an edge -> MLP -> `c_out` weights.

    The first layer acts on (basis, source embedding, target embedding). It is linear, so that the embeddings
    go through it once per element, not once per edge.
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
        """[E, c_out], from the elements' embeddings at both ends."""
        last: Any = self.net[6]
        return last(self.hidden(geometry, source, target))

    def hidden(self, geometry: Geometry, source: nn.Embedding, target: nn.Embedding) -> Tensor:
        """What the last layer `net[6]` reads: [E, channels]. The edge attention applies that layer itself."""
        return recomputed(self._hidden, geometry, source, target)

    def _hidden(self, geometry: Geometry, source: nn.Embedding, target: nn.Embedding) -> Tensor:
        net: Any = self.net
        first, norm_1, _, second, norm_2, _, _ = net
        distance, of_source, of_target = first.weight.split([self.basis, self.channels, self.channels], dim=1)
        x = F.linear(geometry.basis, distance, first.bias)
        x = x + F.embedding(geometry.source_number, F.linear(source.weight, of_source))
        x = x + F.embedding(geometry.target_number, F.linear(target.weight, of_target))
        x = second(F.silu(layer_norm(x, norm_1)))
        return F.silu(layer_norm(x, norm_2))


class EdgeDegreeEmbedding(nn.Module):
    """Start of the node rows l >= 0: the m = 0 rows of every incoming edge, rotated back, summed,
    / avg_degree."""

    def __init__(self, config: EquiformerV2Config) -> None:
        super().__init__()
        self.lmax, self.mmax, self.avg_degree = config.lmax, config.mmax, config.avg_degree
        self.source_embedding = nn.Embedding(config.max_num_elements, config.edge_channels)
        self.target_embedding = nn.Embedding(config.max_num_elements, config.edge_channels)
        width = (config.lmax + 1) * config.sphere_channels
        self.rad_func = RadialFunction(config.num_distance_basis, config.edge_channels, width)

    def forward(self, geometry: Geometry, n_nodes: int) -> Tensor:
        g = geometry
        rows = self.rad_func(g, self.source_embedding, self.target_embedding).unflatten(
            1, (self.lmax + 1, -1)
        )
        weight = at_least_float32(rows.new_ones(1)).expand(len(rows), 1) / self.avg_degree
        return rotate_back_sum(rows, weight, g.wigner, g.graph, n_nodes, self.lmax, self.mmax)


class SO2Linear(nn.Module):
    """The complex matrix r + i·s of one order m > 0: `fc.weight` = (r; s)."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width_in, 2 * width_out, bias=False)


class SO2Convolution(nn.Module):
    """The weights of a linear map of an edge's rows that commutes with rotations about it.
    m = 0 also gives `extra` scalars."""

    def __init__(self, lmax: int, mmax: int, c_in: int, c_out: int, extra: int = 0) -> None:
        super().__init__()
        degrees = [lmax + 1 - m for m in range(mmax + 1)]
        self.fc_m0 = nn.Linear(degrees[0] * c_in, extra + degrees[0] * c_out)
        self.so2_m_conv = nn.ModuleList(SO2Linear(n * c_in, n * c_out) for n in degrees[1:])

    def weights(self) -> list[Tensor]:
        """One matrix per m."""
        convs: Any = self.so2_m_conv
        return [self.fc_m0.weight, *(conv.fc.weight for conv in convs)]


class RadialSO2Convolution(SO2Convolution):
    """The first convolution of a message, whose input is scaled by a
    function of the edge's length and elements."""

    def __init__(self, config: EquiformerV2Config, c_in: int, c_out: int, extra: int) -> None:
        super().__init__(config.lmax, config.mmax, c_in, c_out, extra)
        width = sum(config.lmax + 1 - m for m in range(config.mmax + 1)) * c_in
        self.rad_func = RadialFunction(config.num_distance_basis, config.edge_channels, width)


class GraphAttention(nn.Module):
    """Messages by two SO(2) convolutions with a nonlinearity between,
    weighted by attention over each target."""

    def __init__(self, config: EquiformerV2Config, c_out: int) -> None:
        super().__init__()
        c = self.config = config
        self.source_embedding = nn.Embedding(c.max_num_elements, c.edge_channels)
        self.target_embedding = nn.Embedding(c.max_num_elements, c.edge_channels)
        alpha_width = c.num_heads * c.attn_alpha_channels
        gates = c.attn_hidden_channels * (c.lmax if c.use_gate_act else 1)
        hidden, value = c.attn_hidden_channels, c.num_heads * c.attn_value_channels
        self.so2_conv_1 = RadialSO2Convolution(c, 2 * c.sphere_channels, hidden, alpha_width + gates)
        self.alpha_norm = nn.LayerNorm(c.attn_alpha_channels) if c.use_attn_renorm else None
        self.alpha_dot = nn.Parameter(torch.empty(c.num_heads, c.attn_alpha_channels))
        self.so2_conv_2 = SO2Convolution(c.lmax, c.mmax, hidden, value)
        self.proj = SphericalLinear(c.lmax, value, c_out)

    def forward(self, x: Tensor, geometry: Geometry) -> Tensor:
        """Nodes [N, S, C] -> [N, S, c_out]."""
        c, g, conv1, conv2 = self.config, geometry, self.so2_conv_1, self.so2_conv_2
        radial = conv1.rad_func.hidden(g, self.source_embedding, self.target_embedding)
        last: Any = conv1.rad_func.net[6]
        norm = None if self.alpha_norm is None else (self.alpha_norm.weight, self.alpha_norm.bias)
        keep = None
        if self.training and c.alpha_drop:
            ones = torch.ones(len(radial), c.num_heads, device=x.device)
            keep = F.dropout(ones.to(g.wigner.dtype), c.alpha_drop)
        message = EdgeAttention(
            x=x.to(radial.dtype),
            radial=radial,
            radial_weight=last.weight,
            radial_bias=last.bias,
            wigner=g.wigner,
            graph=g.graph,
            conv1=conv1.weights(),
            conv1_bias=conv1.fc_m0.bias,
            alpha_norm=norm,
            alpha_dot=self.alpha_dot,
            conv2=conv2.weights(),
            conv2_bias=conv2.fc_m0.bias,
            sphere=None if c.use_gate_act else g.sphere,
            lmax=c.lmax,
            mmax=c.mmax,
            keep=keep,
        )
        total = edge_attention(message)
        # its matrices, gathered by row, would weigh as much as 256 values an edge at 80 atoms
        return recomputed(self.proj, total.transpose(0, 1), g.degree).transpose(0, 1)


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
        """Nodes [N, S, C] -> [N, S, c_out]. Inside, rows come first,
        so that the grid is one product for all nodes."""
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
        normed = recomputed(self.norm_1, x, geometry.degree)
        x = x + self.drop_path(self.ga(normed, geometry), geometry.batch)
        return x + self.drop_path(recomputed(self._feed_forward, x, geometry), geometry.batch)

    def _feed_forward(self, x: Tensor, geometry: Geometry) -> Tensor:
        return self.ffn(self.norm_2(x, geometry.degree), geometry)

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
        pool: str | None = None,
    ) -> Tensor:
        """Node embedding [N, (lmax+1)², C] after the final norm,
        or with `pool` its features by system or atom (`so3_pool`).

        numbers [N] int64 atomic numbers below max_num_elements; edge_index [2, E] int64 (source, target);
        edge_vec [E, 3] float32 or float64 Å, source minus target; batch [N] int64, system of each atom
        (stochastic depth and pooling read it); edge_rot_mat [E, 3, 3] fixes the edge frames, for comparison
        with fairchem, whose frames are random.
        """
        geometry = self.geometry(numbers, edge_index, edge_vec, batch, edge_rot_mat)
        x = self._embed(numbers, geometry)
        if pool is None:
            return self.norm(x, geometry.degree)
        batch = torch.zeros_like(numbers) if batch is None else batch
        return so3_pool(x, batch, 1 if n_systems is None else n_systems, pool, self.norm.for_pooling())

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

        In the units that the heads were trained in (fairchem's are normalised). Under FSDP2, register this
        name with `register_fsdp_forward_method`.
        """
        geometry = self.geometry(numbers, edge_index, edge_vec, batch, edge_rot_mat)
        x = self.norm(self._embed(numbers, geometry), geometry.degree)
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
        """Before the final norm."""
        x = self.edge_degree_embedding(geometry, len(numbers))
        scalars = self.sphere_embedding(numbers)
        x = torch.cat([x[:, :1] + scalars[:, None], x[:, 1:]], dim=1)
        for block in self.blocks:
            x = block(x, geometry)
        return x

    def geometry(
        self,
        numbers: Tensor,
        edge_index: Tensor,
        edge_vec: Tensor,
        batch: Tensor | None = None,
        edge_rot_mat: Tensor | None = None,
    ) -> Geometry:
        """Everything that depends on positions, once per forward pass; calculated in float64,
        whose cost is not seen here."""
        if edge_vec.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"edge_vec is {edge_vec.dtype}: distances need float32 or float64. "
                "Under FSDP2 set MixedPrecisionPolicy(cast_forward_inputs=False) on the root"
            )
        device, t = edge_vec.device, self.tables
        dtype = self.sphere_embedding.weight.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        order = torch.argsort(edge_index[1], stable=True)
        edge_index, edge_vec = edge_index.index_select(1, order), edge_vec.index_select(0, order)
        if edge_rot_mat is not None:
            edge_rot_mat = edge_rot_mat.index_select(0, order)
        with torch.autocast(device.type, enabled=False):
            wigner = t.rotation(edge_vec, edge_rot_mat)
            basis = self.distance_basis(torch.linalg.vector_norm(edge_vec.double(), dim=1), edge_vec.dtype)
        graph = edge_graph(edge_index, len(numbers))
        wide = torch.promote_types(dtype, torch.float32)
        return Geometry(
            graph,
            numbers.index_select(0, graph.source),
            numbers.index_select(0, graph.target),
            basis.to(dtype),
            wigner.to(wide),
            Sphere(t.edge_to_lat.to(wide), t.edge_from_lat.to(wide), t.edge_lon.to(wide)),
            batch,
            t.degree,
            (t.node_to_grid.to(dtype), t.node_from_grid.to(dtype)),
        )

    def distance_basis(self, distance: Tensor, dtype: torch.dtype) -> Tensor:
        """Gaussians on [0, max_radius], two spacings wide: [E] float64 -> [E, num_distance_basis] in `dtype`.

        The exponent is float64: of 600 Gaussians the float32 centres alone move a value by 1.7e-5.
        """
        n, end = self.config.num_distance_basis, self.config.max_radius
        centres = torch.linspace(0, end, n, dtype=distance.dtype, device=distance.device)
        scale = (n - 1) / (2 * end)
        exponent = -0.5 * ((distance[:, None] - centres) * scale).square()
        # below, float32 is subnormal: 5 times slower on a CPU
        return torch.exp(exponent.to(dtype).clamp_min(-80))
