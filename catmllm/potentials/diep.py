"""DIEP, a machine-learned potential for 89 elements, evaluated for many structures in one call.

The weights are those of the `diep` package (2.0.0, BSD-3: diep_fold1, trained on MatPES, so r2SCAN), read
from its wheel without importing it. The network is that of its authors; what is new here is only how it is
computed (`grid.py`): triplets once instead of twice, derivatives by hand, node parts of the message networks
by node instead of by bond, many structures in a call. What it says is not DFT.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import silu

from catmllm.potentials import grid
from catmllm.potentials.relax import PotentialMissing, Structure
from catmllm.structure.elements import atomic_number
from catmllm.structure.graph import all_neighbours

Tensor = torch.Tensor
INSTALL = "pip install --no-deps diep==2.0.0"  # its weights are all that is read of it


class Diep:
    """Energies and forces by DIEP. dtype: that of the network; energies are summed in float64.

    Raises `PotentialMissing` where the `diep` package is not installed.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        folder = _folder()
        said = json.loads((folder / "model.json").read_text(encoding="utf-8"))["kwargs"]
        self._set_up(said["model"]["init_args"])
        state = torch.load(folder / "state.pt", weights_only=True, map_location="cpu")
        self._scale, self._shift = float(state["data_std"]), float(state["data_mean"])
        self._reference = np.zeros(120)  # by atomic number, eV
        self._kind = np.full(120, -1)
        for kind, symbol in enumerate(said["model"]["init_args"]["element_types"]):
            number = atomic_number(symbol)
            self._kind[number] = kind
            self._reference[number] = float(state["element_refs.property_offset"][kind])
        self.elements = frozenset(np.flatnonzero(self._kind >= 0).tolist())
        self.dtype = dtype
        self._weights = _fused(state, self.blocks, dtype)

    def _set_up(self, arguments: dict[str, Any]) -> None:
        self.cutoff, self.near = float(arguments["cutoff"]), float(arguments["threebody_cutoff"])
        self.blocks = int(arguments["nblocks"])
        plane = (arguments["grid_half_length"], arguments["base_spacing"], arguments["gaussian_sigma"])
        if plane != (grid.HALF, 1.0, 1.0) or arguments["softening_epsilon"] ** 2 != grid.SOFT:
            raise ValueError(f"a DIEP model of another grid: {plane}")

    def __call__(
        self, structures: Sequence[Structure]
    ) -> tuple[NDArray[np.float64], list[NDArray[np.float64]]]:
        """Energies [B] (eV) and forces, [N, 3] each (eV/Å), right for the free atoms. Raises ValueError for
        an element it does not know and for a cell without room."""
        first = np.cumsum([0, *(len(s.numbers) for s in structures)])
        numbers = np.concatenate([s.numbers for s in structures]).astype(np.int64)
        kinds = self._kind[numbers]
        if (kinds < 0).any():
            raise ValueError(f"DIEP does not know the element of number {numbers[kinds < 0][0]}")
        lattices = np.stack([s.lattice for s in structures])
        points = np.concatenate([s.positions for s in structures])
        neighbour, centre, vectors, degree = all_neighbours(lattices, points, first, self.cutoff)
        free = np.concatenate(
            [np.ones(len(s.numbers), bool) if s.free is None else s.free for s in structures]
        )
        edges = _Edges(np.stack([centre, neighbour]), vectors, numbers, degree, free, self, self.dtype)
        force_of_bond, atomic = self._network(torch.from_numpy(kinds), edges)
        forces = np.zeros((len(numbers), 3))
        # The energy falls where a bond's end goes against its gradient: the end feels -g, the centre +g.
        for axis in range(3):
            pull = force_of_bond[:, axis]
            forces[:, axis] = np.bincount(centre, pull, len(numbers)) - np.bincount(
                neighbour, pull, len(numbers)
            )
        by_atom = self._scale * atomic + self._reference[numbers]
        energies = np.add.reduceat(by_atom, first[:-1]) + self._shift
        return energies, [forces[a:b] for a, b in pairwise(first)]

    def _network(self, kinds: Tensor, edges: _Edges) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """dE/d(bond vector) [E, 3] and the network's number of each atom [N] (before scale and reference)."""
        w = self._weights
        bonds = _bond_features(edges).requires_grad_()
        triplets = _triplet_features(edges).requires_grad_()
        centre, neighbour = edges.ends_t
        node = w["elements"][kinds]
        with torch.enable_grad():
            edge = silu(torch.addmm(w["bonds.bias"], bonds, w["bonds"]))
            for b in range(self.blocks):
                gates = torch.sigmoid(torch.addmm(w[f"{b}.gate.bias"], node, w[f"{b}.gate"]))
                summed = _Sum.apply(triplets, gates, edges)
                value, gate = (summed @ w[f"{b}.triplets"]).split(64, 1)
                edge = edge + silu(value) * torch.sigmoid(gate)
                for target in ("edge", "node"):
                    name = f"{b}.{target}"
                    hidden = torch.addmm(w[f"{name}.bias"], edge, w[f"{name}.edges"])
                    hidden = hidden + (node @ w[f"{name}.centres"]).index_select(0, centre)
                    hidden = silu(hidden + (node @ w[f"{name}.neighbours"]).index_select(0, neighbour))
                    message = _gated(hidden, w, name) * (bonds @ w[f"{name}.bonds"])
                    if target == "edge":
                        edge = edge + message
                    else:
                        node = node + torch.zeros_like(node).index_add(0, neighbour, message)
            hidden = silu(torch.addmm(w["last.bias"], node, w["last"]))
            value, gate = hidden.split(64, 1)
            for k in (2, 4):
                value = silu(torch.addmm(w[f"last.layers.{k}.bias"], value, w[f"last.layers.{k}"]))
                gate = silu(torch.addmm(w[f"last.gates.{k}.bias"], gate, w[f"last.gates.{k}"]))
            value = torch.addmm(w["last.layers.6.bias"], value, w["last.layers.6"])
            gate = torch.addmm(w["last.gates.6.bias"], gate, w["last.gates.6"])
            atomic = (value * torch.sigmoid(gate)).squeeze(1)
            by_bonds, by_triplets = torch.autograd.grad(atomic.sum(), (bonds, triplets))
        pull = np.zeros((len(edges.vectors), 3))
        grid.bonds_backward(
            edges.vectors, edges.roots, edges.ends, self.cutoff, np.ascontiguousarray(by_bonds.numpy()), pull
        )
        grid.triplets_backward(
            edges.vectors, edges.numbers, edges.roots, edges.ends, *edges.near, self.near, edges.free,
            np.ascontiguousarray(by_triplets.numpy()), pull,
        )  # fmt: skip
        return self._scale * pull, atomic.detach().numpy().astype(np.float64)


@lru_cache(maxsize=2)
def diep(dtype: torch.dtype = torch.float32) -> Diep:
    """The potential of this process."""
    return Diep(dtype)


def _folder() -> Path:
    found = importlib.util.find_spec("diep")
    for place in (found.submodule_search_locations or ()) if found else ():
        folder = Path(place) / "pretrained_models" / "diep_fold1"
        if folder.is_dir():
            return folder
    raise PotentialMissing(f"DIEP's weights come with its package, which is not installed: {INSTALL}")


class _Edges:
    """The bonds of a batch, sorted by centre and then by length, and where its triplets are."""

    def __init__(
        self,
        ends: NDArray[np.int64],
        vectors: NDArray[np.float64],
        numbers: NDArray[np.int64],
        degree: NDArray[np.int64],
        free: NDArray[np.bool_],
        potential: Diep,
        dtype: torch.dtype,
    ) -> None:
        self.ends, self.vectors, self.numbers, self.free = ends, vectors, numbers, free
        self.potential, self.dtype = potential, dtype
        self.ends_t = torch.from_numpy(ends)
        self.roots = np.sqrt(numbers).astype(np.float32 if dtype == torch.float32 else np.float64)
        starts = np.cumsum(degree) - degree
        within = (vectors**2).sum(1) <= potential.near**2
        near = np.bincount(ends[0], within, len(numbers)).astype(np.int64)
        self.near = starts, near, grid.triplets_of(starts, near)


def _bond_features(edges: _Edges) -> Tensor:
    out = torch.empty(len(edges.vectors), grid.ROWS * grid.WIDTH, dtype=edges.dtype)
    grid.bonds_forward(edges.vectors, edges.roots, edges.ends, edges.potential.cutoff, out.numpy())
    return out


def _triplet_features(edges: _Edges) -> Tensor:
    starts, near, offsets = edges.near
    out = torch.empty(int(offsets[-1]), grid.POINTS, dtype=edges.dtype)
    grid.triplets_forward(
        edges.vectors, edges.numbers, edges.roots, edges.ends, starts, near, offsets, edges.potential.near,
        out.numpy(),
    )  # fmt: skip
    return out


class _Sum(torch.autograd.Function):
    """`grid.sum_forward` with its gradient."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, gates: Tensor, edges: _Edges) -> Tensor:
        ctx.save_for_backward(features, gates)
        ctx.edges = edges
        out = torch.zeros(len(edges.vectors), grid.POINTS, dtype=features.dtype)
        grid.sum_forward(
            features.detach().numpy(), gates.detach().numpy(), edges.ends, *edges.near, out.numpy()
        )
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        features, gates = (t.detach() for t in ctx.saved_tensors)
        by_features, by_gates = torch.empty_like(features), torch.zeros_like(gates)
        grid.sum_backward(
            features.numpy(), gates.numpy(), ctx.edges.ends, *ctx.edges.near, gradient.contiguous().numpy(),
            by_features.numpy(), by_gates.numpy(),
        )  # fmt: skip
        return by_features, by_gates, None


def _gated(hidden: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    """The rest of a gated network after its first layer [E, 128]: values and gates, two layers each."""
    value, gate = hidden.split(64, 1)
    value = silu(torch.addmm(w[f"{name}.layers.2.bias"], value, w[f"{name}.layers.2"]))
    gate = silu(torch.addmm(w[f"{name}.gates.2.bias"], gate, w[f"{name}.gates.2"]))
    value = silu(torch.addmm(w[f"{name}.layers.4.bias"], value, w[f"{name}.layers.4"]))
    return value * torch.sigmoid(torch.addmm(w[f"{name}.gates.4.bias"], gate, w[f"{name}.gates.4"]))


def _fused(state: dict[str, Tensor], blocks: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights as the network above reads them: transposed, and those of one input side by side."""

    def linear(name: str) -> tuple[Tensor, Tensor]:
        weight = state[f"{name}.weight"].to(dtype)
        bias = state.get(f"{name}.bias")
        return weight.T, torch.zeros(len(weight), dtype=dtype) if bias is None else bias.to(dtype)

    found: dict[str, Tensor] = {"elements": state["model.embedding.layer_node_embedding.weight"].to(dtype)}
    embedding, found["bonds.bias"] = linear("model.embedding.layer_edge_embedding.layers.0")
    found["bonds"] = _folded(embedding)
    for b in range(blocks):
        conv, three = f"model.graph_layers.{b}.conv", f"model.three_body_interactions.{b}"
        found[f"{b}.gate"], found[f"{b}.gate.bias"] = linear(f"{three}.update_network_atom.layers.0")
        bond = f"{three}.update_network_bond"
        found[f"{b}.triplets"] = torch.cat([linear(f"{bond}.{k}.0")[0] for k in ("layers", "gates")], 1)
        for target in ("edge", "node"):
            found[f"{b}.{target}.bonds"] = _folded(linear(f"{conv}.{target}_weight_func")[0])
            name = f"{conv}.{target}_update_func"
            (layers, layers_bias), (gates, gates_bias) = (
                linear(f"{name}.{k}.0") for k in ("layers", "gates")
            )
            both = torch.cat([layers, gates], 1)
            for at, part in ((0, "centres"), (64, "neighbours"), (128, "edges")):
                found[f"{b}.{target}.{part}"] = both[at : at + 64]
            found[f"{b}.{target}.bias"] = torch.cat([layers_bias, gates_bias])
            for k in ("layers.2", "gates.2", "layers.4", "gates.4"):
                found[f"{b}.{target}.{k}"], found[f"{b}.{target}.{k}.bias"] = linear(f"{name}.{k}")
    last = "model.final_layer.gated"
    pair = [linear(f"{last}.{k}.0") for k in ("layers", "gates")]
    found["last"] = torch.cat([weight for weight, _ in pair], 1)
    found["last.bias"] = torch.cat([bias for _, bias in pair])
    for k in ("layers.2", "layers.4", "layers.6", "gates.2", "gates.4", "gates.6"):
        found[f"last.{k}"], found[f"last.{k}.bias"] = linear(f"{last}.{k}")
    return {name: weight.contiguous() for name, weight in found.items()}


def _folded(weights: Tensor) -> Tensor:
    """Rows y and -y of the grid added: what they see of a bond is the same."""
    plane = weights.view(grid.WIDTH, grid.WIDTH, -1)
    upper, lower = plane[grid.ROWS - 1 :].clone(), plane[: grid.ROWS - 1].flip(0)
    upper[1:] += lower
    return upper.reshape(grid.ROWS * grid.WIDTH, -1)
