"""The others that ours is timed beside, where they are installed; one row says which is missing and how to
get it."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.gpu_phases.measure import Bench
from catmllm.models.equiformer_v2 import EquiformerV2Config
from catmllm_kernels.escn.cases import Size
from catmllm_kernels.escn.layout import EdgeAttention

FAIRCHEM = (
    "pip install --no-deps --target DIR fairchem-core==1.10.0 ase lmdb orjson submitit hydra-core omegaconf"
)
SAME = (
    "num_layers", "sphere_channels", "attn_hidden_channels", "num_heads", "attn_alpha_channels",
    "attn_value_channels", "norm_type", "ffn_hidden_channels", "edge_channels", "max_radius",
    "grid_resolution", "use_gate_act", "use_grid_mlp", "use_attn_renorm",
)  # fmt: skip


def missing(bench: Bench, peer: str, install: str, why: Exception | None = None) -> None:
    """The one line about a peer that is not there."""
    bench.row(f"without {peer}", install=install, **({"because": f"{why!r}"[:200]} if why else {}))


def fairchem(bench: Bench, module: str) -> Any:
    """A module of fairchem 1.10's EquiformerV2, or None. torch_scatter, which it imports and does not call
    here, is stubbed."""
    folder = os.environ.get("FAIRCHEM_1_10", "")
    if not os.path.isdir(folder):
        missing(bench, "fairchem 1.10", f"{FAIRCHEM}; FAIRCHEM_1_10=DIR")
        return None
    for name in ("torch_scatter", "torch_sparse"):
        stub = types.ModuleType(name)
        vars(stub).update(dict.fromkeys(("scatter", "segment_coo", "segment_csr", "SparseTensor")))
        sys.modules.setdefault(name, stub)
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        return importlib.import_module(f"fairchem.core.models.equiformer_v2.{module}")
    except Exception as error:
        missing(bench, "fairchem 1.10", FAIRCHEM, error)
        return None


def fairchem_edges(bench: Bench, s: Size) -> Any:
    """fairchem's attention layer of these sizes: `of(arguments, dtype)` gives a call on the same graph and
    nodes, under autocast; None where fairchem is not there. Frames are random, as fairchem makes them."""
    block = fairchem(bench, "transformer_block")
    if block is None:
        return None
    so3, lists, frames = (fairchem(bench, m) for m in ("so3", "module_list", "edge_rot_mat"))
    rotation = so3.SO3_Rotation(s.lmax)
    grid = lists.ModuleListInfo("grid")
    for l in range(s.lmax + 1):
        grids = [so3.SO3_Grid(l, m, resolution=18, normalization="component") for m in range(s.lmax + 1)]
        grid.append(torch.nn.ModuleList(grids))
    layer = block.SO2EquivariantGraphAttention(
        s.channels, s.hidden, s.heads, s.alpha, s.value, s.channels, [s.lmax], [s.mmax],
        torch.nn.ModuleList([rotation]), so3.CoefficientMappingModule([s.lmax], [s.mmax]), grid, 90,
        [600, 128, 128], True, False, "silu", False, True, s.act == "gate", s.act == "s2", 0.0,
    )  # fmt: skip

    def of(a: EdgeAttention, dtype: torch.dtype) -> Callable[..., Tensor]:
        device = a.x.device
        layer.to(device)
        rotation.set_wigner(frames.init_edge_rot_mat(torch.randn(len(a.radial), 3, device=device)))
        numbers = torch.full((len(a.x),), 29, device=device)
        basis = torch.rand(len(a.radial), 600, device=device)
        edge_index = torch.stack([a.graph.source, a.graph.target])

        def call(nodes: Tensor, *_: Tensor) -> Tensor:
            embedding = so3.SO3_Embedding(0, [s.lmax], s.channels, device, torch.float32)
            embedding.set_embedding(nodes)
            embedding.set_lmax_mmax([s.lmax], [s.lmax])
            with torch.autocast(device.type, dtype):
                return layer(embedding, numbers, basis, edge_index).embedding

        call.leaves = [a.x.detach().float().requires_grad_(), *layer.parameters()]  # type: ignore[attr-defined]
        return call

    return of


def fairchem_encoder(bench: Bench, config: EquiformerV2Config) -> Callable[..., Callable[[], Tensor]] | None:
    """fairchem's whole model of these sizes: `of(numbers, edge_index, edge_vec, batch)` gives a call that
    returns energies, under autocast to bfloat16; `of.parameters`. None where fairchem is not there."""
    module = fairchem(bench, "equiformer_v2_deprecated")
    if module is None:
        return None
    base = importlib.import_module("fairchem.core.models.base")
    model = module.EquiformerV2(
        lmax_list=[config.lmax], mmax_list=[config.mmax], weight_init="uniform", alpha_drop=0.0,
        drop_path_rate=0.0, regress_forces=False, **{name: getattr(config, name) for name in SAME},
    )  # fmt: skip

    def of(numbers: Tensor, edge_index: Tensor, edge_vec: Tensor, batch: Tensor) -> Callable[[], Tensor]:
        device = numbers.device
        model.to(device)
        model.device = str(device)
        data = types.SimpleNamespace(natoms=torch.bincount(batch), pos=edge_vec.new_zeros(len(numbers), 3),
                                     atomic_numbers=numbers, batch=batch)  # fmt: skip

        def graph(*_: Any, **__: Any) -> Any:  # anew for every call: the forward pass writes into it
            return base.GraphData(
                edge_index, edge_vec.norm(dim=1), edge_vec, None, None, None, batch, numbers
            )

        def call() -> Tensor:
            model.generate_graph = graph
            with torch.autocast(device.type, torch.bfloat16):
                return model(data)["energy"]

        return call

    of.parameters = list(model.parameters())  # type: ignore[attr-defined]
    return of


def liger(bench: Bench) -> Any:
    """Liger-Kernel's fused linear cross-entropy, or None."""
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
    except Exception as error:
        missing(bench, "Liger-Kernel", "pip install --no-deps liger-kernel==0.8.5", error)
        return None
    if not bench.gpu:
        missing(bench, "Liger-Kernel", "it runs on GPUs only")
        return None
    return LigerFusedLinearCrossEntropyFunction


def vllm(bench: Bench) -> str | None:
    """The Python of an environment with vLLM, or None."""
    python = os.environ.get("VLLM_PYTHON")
    if python is None or shutil.which(python) is None:
        missing(bench, "vLLM", "VLLM_PYTHON=…/bin/python of an environment with vllm")
        return None
    return python
