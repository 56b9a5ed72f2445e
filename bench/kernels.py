"""The encoder's kernels on a CPU beside fairchem 1.10 in eager mode: times in turn in one process, and what is kept for backward.

fairchem 1.10 is found in FAIRCHEM_1_10 (`pip install --no-deps --target DIR fairchem-core==1.10.0`); without it our own
numbers are printed alone. The graph is a Pt(111) slab, every atom with its 20 nearest neighbours; weights are fairchem's own at its usual
start, loaded into our model through the checkpoint reader. Both get the same frames, and outputs are compared before anything is timed. Medians of wall time.
At the end the bytes that the Triton kernels move per edge, counted in the interpreter (a process of its own), beside the figures counted by hand for
two fused kernels around plain products.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import types
import warnings
from collections.abc import Callable
from datetime import date
from typing import Any

import numpy as np
import torch
from ase.build import fcc111
from ase.neighborlist import neighbor_list
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from catmllm.models.equiformer_v2 import EquiformerV2, EquiformerV2Config, load_fairchem_checkpoint
from catmllm_kernels.escn import cpu

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
    """numbers [N], edge_index [2, 20·N] (sorted by target), edge_vec [20·N, 3] of a rattled Pt(111) slab with one layer of Cu."""
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
    """The module of fairchem's EquiformerV2, or None. torch_scatter, which it imports but does not call here, is stubbed."""
    folder = os.environ.get("FAIRCHEM_1_10")
    if not folder or not os.path.isdir(folder):
        return None
    for name in ("torch_scatter", "torch_sparse"):
        if importlib.util.find_spec(name) is None:
            stub = types.ModuleType(name)
            vars(stub).update(dict.fromkeys(("scatter", "segment_coo", "segment_csr", "SparseTensor")))
            sys.modules[name] = stub
    sys.path.insert(0, folder)
    return importlib.import_module("fairchem.core.models.equiformer_v2.equiformer_v2_deprecated")


class Pair:
    """Our model and fairchem's with the same weights, on one graph."""

    def __init__(self, module: Any, config: EquiformerV2Config, n_atoms: int) -> None:
        torch.manual_seed(0)
        self.module, self.config = module, config
        self.numbers, self.edge_index, self.edge_vec = slab(n_atoms)
        self.ours = EquiformerV2(config).eval()
        self.x = torch.randn(n_atoms, (config.lmax + 1) ** 2, config.sphere_channels)
        self.theirs, self.frames = None, None
        if module is not None:
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


def medians(calls: dict[str, Callable[[], Any]], turns: int) -> dict[str, float]:
    """Milliseconds of each call, all in turn, after one that does not count."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(turns + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn:
                samples[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in samples.items()}


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
    """Bytes that are still there after a forward pass because its backward pass will need them, with its output."""
    with Alive() as alive:
        out = call()
    gc.collect()
    kept = alive.kept()
    del out
    return kept


def memory(pair: Pair) -> dict[str, float]:
    """KiB an edge that a layer keeps, its nodes' included: ours in float16 and float32, fairchem's in float32."""
    n_edges, out = pair.edge_index.shape[1], {}
    for dtype in (torch.float16, torch.float32):
        model = EquiformerV2(pair.config).to(dtype)
        geometry = model.geometry(pair.numbers, pair.edge_index, pair.edge_vec)
        x, block = pair.x.to(dtype).requires_grad_(), model.blocks[0]
        name = str(dtype).removeprefix("torch.")
        out[f"attention, ours, {name}"] = kept_bytes(lambda b=block, x=x, g=geometry: b.ga(x, g))
        out[f"layer, ours, {name}"] = kept_bytes(lambda b=block, x=x, g=geometry: b(x, g))
    if pair.theirs is not None:
        x = pair.x.clone().requires_grad_()
        out["attention, fairchem, float32"] = kept_bytes(lambda: pair.their_attention(x))
        out["layer, fairchem, float32"] = kept_bytes(lambda: pair.their_layer(x))
    return {name: n / n_edges / 1024 for name, n in out.items()}


def counted_bytes() -> dict[str, Any]:
    """What `catmllm_kernels.traffic` counts; Triton must be imported with its interpreter switched on, hence elsewhere."""
    done = subprocess.run(
        [sys.executable, "-m", "catmllm_kernels.traffic", "--json"],
        capture_output=True, text=True, check=True, env=os.environ | {"TRITON_INTERPRET": "1"},
    )  # fmt: skip
    return json.loads(done.stdout)


def measure(quick: bool) -> dict[str, Any]:
    module = fairchem()
    result: dict[str, Any] = {"times": [], "saved": {}}
    turns = 2 if quick else 5
    for name, config in CONFIGS.items():
        pair = Pair(module, EquiformerV2Config(**{**vars(config), "num_layers": 1}), 80)
        result["saved"][name] = memory(pair)
        x = pair.x
        inference: dict[str, Callable[[], Any]] = {"ours": without_gradient(pair.attention, x)}
        training: dict[str, Callable[[], Any]] = {"ours": lambda p=pair, x=x: train(p.attention, x)}
        error = None
        if module is not None:
            inference["fairchem"] = without_gradient(pair.their_attention, x)
            training["fairchem"] = lambda p=pair, x=x: train(p.their_attention, x)
            error = compare(inference["ours"], inference["fairchem"])
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for what, calls in (("attention, inference", inference), ("attention, training", training)):
                row = {"what": what, "model": name, "atoms": 80, "threads": threads, "difference": error}
                result["times"].append({**row, **medians(calls, turns)})
    for n_atoms in (80, 10):
        config = EquiformerV2Config.preset("31M", energy_head=True, force_head=True)
        pair = Pair(module, config, n_atoms)
        calls: dict[str, Callable[[], Any]] = {"ours": without_gradient(pair.encoder)}
        error = None
        if module is not None:
            calls["fairchem"] = without_gradient(pair.their_encoder)
            error = compare(calls["ours"], calls["fairchem"])
        for threads in (1, 2):
            torch.set_num_threads(threads)
            row = {"what": "31M model, inference", "model": "L4M2", "atoms": n_atoms, "threads": threads}
            result["times"].append(
                {**row, "difference": error, **medians(calls, turns if n_atoms == 10 else min(turns, 3))}
            )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    parser.add_argument("--quick", action="store_true", help="2 turns instead of 5")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    result = measure(arguments.quick) | {"traffic": counted_bytes()}
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    about = {
        "date": str(date.today()), "commit": commit, "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1),
        "machine": machine(), "torch": torch.__version__, "kernels": cpu.instruction_set(), "edges": f"{NEIGHBOURS} an atom",
    }  # fmt: skip
    if arguments.json:
        print(json.dumps({"about": about, **result}))
        return
    print(about)
    print(
        f"\n{'':<22}{'model':>6}{'atoms':>7}{'threads':>9}{'fairchem':>12}{'ours':>11}{'ratio':>8}{'difference':>13}"
    )
    for row in result["times"]:
        theirs = row.get("fairchem")
        ratio = (
            f"{theirs:9.1f} ms{row['ours']:8.1f} ms{theirs / row['ours']:8.2f}{row['difference']:13.1e}"
            if theirs
            else f"{'-':>12}{row['ours']:8.1f} ms"
        )
        print(f"{row['what']:<22}{row['model']:>6}{row['atoms']:>7}{row['threads']:>9}{ratio}")
    print("\nKept for backward, KiB an edge, what belongs to nodes included")
    for name, row in result["saved"].items():
        print(f"  {name}: " + "; ".join(f"{what} {value:.2f}" for what, value in row.items()))
    print("\nMoved by the Triton kernels, forward, float16, KiB an edge (counted, not timed)")
    for name, row in result["traffic"].items():
        steps = "; ".join(f"{step} {kib:.1f}" for step, kib in row["steps"].items())
        ratio = row["KiB an edge"] / row["two kernels"]
        print(
            f"  {name}: {row['KiB an edge']:.1f}, two fused kernels {row['two kernels']} ({ratio:.2f}), eager {row['eager']}: {steps}"
        )
    if not os.environ.get("FAIRCHEM_1_10"):
        print("\nfairchem 1.10 was not found: see --help")


def machine() -> str:
    """The processor's name, where the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
