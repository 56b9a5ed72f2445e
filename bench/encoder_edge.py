"""The encoder's edge path on a CPU compared with fairchem 1.10 in eager mode: times,
in turn in one process, and what is kept for backward.

    pip install --no-deps --target DIR fairchem-core==1.10.0
    FAIRCHEM_1_10=DIR python bench/encoder_edge.py [--part attention …] \\
        [--threads 1] [--quick] [--json] [--base COMMIT]

Parts: `attention` (one layer's, L4M2, L6M2 and L6M3), `model` (the whole 31M encoder), `memory` (bytes that a
layer keeps for backward), `traffic` (bytes that the Triton kernels move per edge, counted in the interpreter,
compared with two fused kernels and with eager code, both counted by hand). Only `traffic` runs without
fairchem.

The graph is a Pt(111) slab, every atom with its 20 nearest neighbours; weights are fairchem's own at its
usual start, loaded into our model through the checkpoint reader. Both get the same frames, and outputs are
compared before anything is timed. One thread counts processor time, which other work on the machine disturbs
least; several count wall time.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import time
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase.build import fcc111
from ase.neighborlist import neighbor_list
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench import record  # first: it decides whose packages are measured
from catmllm.models.equiformer_v2 import EquiformerV2, EquiformerV2Config, load_fairchem_checkpoint
from catmllm_kernels.escn import cpu

PARTS = ("attention", "model", "memory", "traffic")
INSTALL = "pip install --no-deps --target DIR fairchem-core==1.10.0, then FAIRCHEM_1_10=DIR"
NEIGHBOURS = 20
SLABS = {80: (4, 5, 4), 10: (1, 2, 5)}
CONFIGS = {
    "L4M2": EquiformerV2Config.preset("31M"),
    "L6M2": EquiformerV2Config.preset("31M", lmax=6),
    "L6M3": EquiformerV2Config.preset("153M"),
}
SHARED = [
    "num_layers",
    "sphere_channels",
    "attn_hidden_channels",
    "num_heads",
    "attn_alpha_channels",
    "attn_value_channels",
    "norm_type",
    "ffn_hidden_channels",
    "edge_channels",
    "max_radius",
    "grid_resolution",
    "use_gate_act",
    "use_grid_mlp",
    "use_attn_renorm",
]


def slab(n_atoms: int) -> tuple[Tensor, Tensor, Tensor]:
    """numbers [N], edge_index [2, 20·N] (sorted by target), edge_vec [20·N, 3] of a rattled Pt(111)
    slab with one layer of Cu."""
    atoms = fcc111("Pt", SLABS[n_atoms], vacuum=8)
    atoms.numbers[: n_atoms // 4] = 29
    atoms.rattle(0.05, seed=0)
    target, source, distance, vector = neighbor_list("ijdD", atoms, 8.0)
    order = np.lexsort((distance, target))
    rank = np.arange(len(order)) - np.searchsorted(target[order], target[order])
    kept = order[rank < NEIGHBOURS]
    edge_index = torch.from_numpy(np.stack([source[kept], target[kept]])).long()
    return torch.from_numpy(atoms.numbers).long(), edge_index, torch.from_numpy(vector[kept]).float()


def fairchem() -> Any:
    """The module of fairchem's EquiformerV2. torch_scatter, which it imports but does not call here,
    is stubbed."""
    folder = os.environ.get("FAIRCHEM_1_10")
    if not folder or not os.path.isdir(folder):
        record.skip(f"needs fairchem 1.10: {INSTALL}")
    for name in ("torch_scatter", "torch_sparse"):
        if importlib.util.find_spec(name) is None:
            stub = types.ModuleType(name)
            vars(stub).update(dict.fromkeys(("scatter", "segment_coo", "segment_csr", "SparseTensor")))
            sys.modules[name] = stub
    sys.path.append(folder)
    return importlib.import_module("fairchem.core.models.equiformer_v2.equiformer_v2_deprecated")


class Pair:
    """Our model and fairchem's with the same weights, on one graph."""

    def __init__(self, module: Any, config: EquiformerV2Config, n_atoms: int) -> None:
        torch.manual_seed(0)
        self.module, self.config = module, config
        self.numbers, self.edge_index, self.edge_vec = slab(n_atoms)
        self.ours = EquiformerV2(config).eval()
        self.x = torch.randn(n_atoms, (config.lmax + 1) ** 2, config.sphere_channels)
        self.theirs = module.EquiformerV2(
            lmax_list=[config.lmax], mmax_list=[config.mmax], weight_init="uniform", alpha_drop=0.0,
            drop_path_rate=0.0, **{name: getattr(config, name) for name in SHARED},
        ).eval()  # fmt: skip
        load_fairchem_checkpoint(self.theirs.state_dict(), self.ours)
        self.frames = module.init_edge_rot_mat(self.edge_vec)
        for rotation in self.theirs.SO3_rotation:
            rotation.set_wigner(self.frames)
        self.basis = self.theirs.distance_expansion(self.edge_vec.norm(dim=1))
        with torch.no_grad():
            self.geometry = self.ours.geometry(
                self.numbers, self.edge_index, self.edge_vec, edge_rot_mat=self.frames
            )

    def attention(self, x: Tensor) -> Tensor:
        return self.ours.blocks[0].ga(x, self.geometry)

    def embedding(self, x: Tensor) -> Any:
        so3 = importlib.import_module("fairchem.core.models.equiformer_v2.so3")
        embedding = so3.SO3_Embedding(0, [self.config.lmax], x.shape[-1], x.device, x.dtype)
        embedding.set_embedding(x)
        embedding.set_lmax_mmax([self.config.lmax], [self.config.lmax])
        return embedding

    def their_attention(self, x: Tensor) -> Tensor:
        edges = (self.numbers, self.basis, self.edge_index)
        return self.theirs.blocks[0].ga(self.embedding(x), *edges).embedding

    def their_layer(self, x: Tensor) -> Tensor:
        batch = torch.zeros_like(self.numbers)
        edges = (self.numbers, self.basis, self.edge_index)
        return self.theirs.blocks[0](self.embedding(x), *edges, batch=batch).embedding

    def encoder(self) -> Tensor:
        """From atoms and edges to energy and forces: frames, Wigner matrices, all blocks, both heads."""
        return self.ours.predict(self.numbers, self.edge_index, self.edge_vec, edge_rot_mat=self.frames)[
            "forces"
        ]

    def their_encoder(self) -> Tensor:
        base = importlib.import_module("fairchem.core.models.base")
        batch = torch.zeros_like(self.numbers)
        graph = base.GraphData(
            self.edge_index, self.edge_vec.norm(dim=1), self.edge_vec, None, None, None, batch, self.numbers
        )
        self.theirs.generate_graph = lambda *_, **__: graph
        self.theirs._init_edge_rot_mat = lambda *_: self.frames
        data = types.SimpleNamespace(
            natoms=torch.tensor([len(batch)]), pos=self.edge_vec.new_zeros(len(batch), 3),
            atomic_numbers=self.numbers, batch=batch,
        )  # fmt: skip
        return self.theirs(data)["forces"]


def train(step: Callable[[Tensor], Tensor], x: Tensor) -> None:
    step(x.clone().requires_grad_()).square().sum().backward()


def without_gradient(call: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    def run() -> Any:
        with torch.no_grad():
            return call(*arguments)

    return run


def compare(ours: Callable[[], Tensor], theirs: Callable[[], Tensor]) -> float:
    with torch.no_grad():
        a, b = ours(), theirs()
    return float((a - b).abs().max() / b.abs().max())


class Alive(TorchDispatchMode):
    """Every storage that an operation makes inside the context, by a weak reference."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return out

    def kept(self) -> int:
        return sum(n for reference, n in self.made.values() if not reference.expired())


def kept_bytes(call: Callable[[], Tensor]) -> int:
    """Bytes that are still there after a forward pass because its backward pass will need them,
    with its output."""
    with Alive() as alive:
        out = call()
    gc.collect()
    kept = alive.kept()
    del out
    return kept


def memory(pair: Pair) -> dict[str, float]:
    """KiB per edge that a layer keeps, its nodes' included: ours in float16 and float32,
    fairchem's in float32."""
    n_edges, out = pair.edge_index.shape[1], {}
    for dtype in (torch.float16, torch.float32):
        model = EquiformerV2(pair.config).to(dtype)
        geometry = model.geometry(pair.numbers, pair.edge_index, pair.edge_vec)
        x, block = pair.x.to(dtype).requires_grad_(), model.blocks[0]
        name = str(dtype).removeprefix("torch.")
        out[f"attention, ours, {name}"] = kept_bytes(lambda b=block, x=x, g=geometry: b.ga(x, g))
        out[f"layer, ours, {name}"] = kept_bytes(lambda b=block, x=x, g=geometry: b(x, g))
    x = pair.x.clone().requires_grad_()
    out["attention, fairchem, float32"] = kept_bytes(lambda: pair.their_attention(x))
    out["layer, fairchem, float32"] = kept_bytes(lambda: pair.their_layer(x))
    return {name: n / n_edges / 1024 for name, n in out.items()}


def counted_bytes() -> dict[str, Any]:
    """What `catmllm_kernels.traffic` counts; Triton must be imported with its interpreter switched on,
    hence elsewhere."""
    done = subprocess.run(
        [sys.executable, "-m", "catmllm_kernels.traffic", "--json"],
        capture_output=True, text=True, check=True, env=os.environ | {"TRITON_INTERPRET": "1"},
    )  # fmt: skip
    return json.loads(done.stdout)


def attention(module: Any, threads: list[int], turns: int) -> list[dict[str, Any]]:
    cases, differences = {}, {}
    for name, config in CONFIGS.items():
        pair = Pair(module, EquiformerV2Config(**{**vars(config), "num_layers": 1}), 80)
        x = pair.x
        modes: dict[str, dict[str, Callable[[], Any]]] = {
            "inference": {
                "ours": without_gradient(pair.attention, x),
                "fairchem": without_gradient(pair.their_attention, x),
            },
            "training": {
                "ours": lambda p=pair, x=x: train(p.attention, x),
                "fairchem": lambda p=pair, x=x: train(p.their_attention, x),
            },
        }
        differences[name] = compare(*modes["inference"].values())
        for n in threads:
            torch.set_num_threads(n)
            for mode, calls in modes.items():
                cases[f"{name}, {mode}, {n} thread{'s'[: n > 1]}"] = record.in_turn(
                    calls, turns, clock(n), 1e3
                )
    says = "EquiformerV2's attention layer, 80 atoms, 1,600 edges, float32"
    return [
        record.claim("encoder_attention", says, "ms", cases, conditions(turns) | {"difference": differences})
    ]


def model(module: Any, threads: list[int], turns: int) -> list[dict[str, Any]]:
    cases, differences = {}, {}
    for n_atoms in (80, 10):
        pair = Pair(module, EquiformerV2Config.preset("31M", energy_head=True, force_head=True), n_atoms)
        calls = {
            "ours": without_gradient(pair.encoder),
            "fairchem": without_gradient(pair.their_encoder),
        }
        differences[f"{n_atoms} atoms"] = compare(*calls.values())
        for n in threads:
            torch.set_num_threads(n)
            cases[f"{n_atoms} atoms, {n} thread{'s'[: n > 1]}"] = record.in_turn(calls, turns, clock(n), 1e3)
    says = "whole 31M encoder (L4M2), energy and forces, inference, float32"
    return [record.claim("encoder_model", says, "ms", cases, conditions(turns) | {"difference": differences})]


def kept(module: Any) -> list[dict[str, Any]]:
    cases = {}
    for name, config in CONFIGS.items():
        found = memory(Pair(module, EquiformerV2Config(**{**vars(config), "num_layers": 1}), 80))
        for part in ("attention", "layer"):
            for dtype in ("float16", "float32"):
                cases[f"{name}, {part}, {dtype}"] = {
                    "ours": [found[f"{part}, ours, {dtype}"]],
                    "fairchem, float32": [found[f"{part}, fairchem, float32"]],
                }
    says = "kept for backward per edge and layer, nodes' arrays included, 20 edges per atom"
    return [record.claim("encoder_kept", says, "KiB", cases, {"counted": "storages alive after forward"})]


def traffic() -> list[dict[str, Any]]:
    cases, steps = {}, {}
    for name, row in counted_bytes().items():
        cases[name] = {
            "ours": [row["KiB an edge"]],
            "two fused kernels": [row["two kernels"]],
            "eager": [row["eager"]],
        }
        steps[name] = row["steps"]
    says = "moved per edge by the Triton kernels, forward, float16; peers counted by hand"
    return [
        record.claim("encoder_traffic", says, "KiB", cases, {"counted": "in the interpreter", "steps": steps})
    ]


def clock(threads: int) -> Callable[[], float]:
    return time.process_time if threads == 1 else time.perf_counter


def conditions(turns: int) -> dict[str, Any]:
    return {
        "turns": turns,
        "kernels": cpu.instruction_set(),
        "edges": f"{NEIGHBOURS} per atom",
        "clock": "1 thread: processor time; more: wall time",
    }


def main() -> None:
    parser = record.arguments(__doc__)
    parser.add_argument("--part", action="append", choices=PARTS, help="only this part; may be given again")
    parser.add_argument(
        "--threads", action="append", type=int, help="of attention and model; may be given again (1, 2)"
    )
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    parts, threads = args.part or list(PARTS), args.threads or [1, 2]
    turns = 2 if args.quick else 7
    module = fairchem() if parts != ["traffic"] else None
    found: list[dict[str, Any]] = []
    if "attention" in parts:
        found += attention(module, threads, turns)
    if "model" in parts:
        found += model(module, threads, min(turns, 3))
    if "memory" in parts:
        found += kept(module)
    if "traffic" in parts:
        found += traffic()
    record.finish(args, found)


if __name__ == "__main__":
    main()
