"""The whole encoder against fairchem 1.10's, weights loaded through `load_fairchem_checkpoint`, in float64.

fairchem 2 has no EquiformerV2 and 1.10 pins an old torch, so it is installed beside the environment:

    pip install --no-deps --target DIR fairchem-core==1.10.0 && FAIRCHEM_1_10=DIR pytest tests/oracles

(it also imports e3nn, ase, lmdb and torch_geometric). torch_scatter,
which it imports but EquiformerV2 does not call, is stubbed.
"""

import copy
import gc
import gzip
import importlib
import json
import os
import subprocess
import sys
import types
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from catmllm.models.equiformer_v2 import EquiformerV2, EquiformerV2Config, load_fairchem_checkpoint
from catmllm.structure.graph import neighbour_graph

pytestmark = pytest.mark.filterwarnings("ignore")

_WHY = (
    "fairchem 1.10 not importable from FAIRCHEM_1_10: pip install --no-deps --target DIR "
    "fairchem-core==1.10.0, then set FAIRCHEM_1_10=DIR (needs e3nn, ase, lmdb, torch_geometric)"
)


@pytest.fixture(scope="module")
def fairchem():
    """The module of fairchem's monolithic EquiformerV2; its path and the stub are taken back afterwards."""
    folder = os.environ.get("FAIRCHEM_1_10")
    if not folder or not os.path.isdir(folder):
        pytest.skip(_WHY)
    before = set(sys.modules)
    for name in ("torch_scatter", "torch_sparse"):
        if importlib.util.find_spec(name) is None:
            stub = types.ModuleType(name)
            vars(stub).update(dict.fromkeys(("scatter", "segment_coo", "segment_csr", "SparseTensor")))
            sys.modules[name] = stub
    sys.path.insert(0, folder)
    try:
        pytest.importorskip("e3nn.o3", reason=_WHY)
        module = importlib.import_module("fairchem.core.models.equiformer_v2.equiformer_v2_deprecated")
        yield module
    except ImportError as error:
        pytest.skip(f"{_WHY}: {error}")
    finally:
        sys.path.remove(folder)
        for name in set(sys.modules) - before:
            if name.split(".")[0] in ("fairchem", "torch_scatter", "torch_sparse"):
                del sys.modules[name]


CONFIGS = {
    "L4M2 S2 grid MLP, as OC20's 31M": EquiformerV2Config(lmax=4, mmax=2, grid_resolution=18),
    "L6M3 S2 grid MLP, as OC20's 153M": EquiformerV2Config(num_layers=1, lmax=6, mmax=3, grid_resolution=18),
    "L2M2 gates, linear, RMS": EquiformerV2Config(
        use_gate_act=True, use_grid_mlp=False, norm_type="rms_norm_sh"
    ),
    "L3M1 S2, least grid": EquiformerV2Config(lmax=3, mmax=1, use_grid_mlp=False, use_attn_renorm=False),
    "L5M0 gates, grid MLP": EquiformerV2Config(num_layers=1, lmax=5, mmax=0, use_gate_act=True),
}
SIZES: dict[str, Any] = {
    "sphere_channels": 16,
    "attn_hidden_channels": 8,
    "num_heads": 2,
    "attn_alpha_channels": 8,
    "attn_value_channels": 4,
    "ffn_hidden_channels": 12,
    "edge_channels": 16,
    "num_distance_basis": 600,
    "max_radius": 12.0,
    "energy_head": True,
    "force_head": True,
}


@contextmanager
def same_weights(module, config):
    """(fairchem's model, ours with its weights), all weights random, in float64,
    which is the default inside."""
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    same = (
        "num_layers sphere_channels attn_hidden_channels num_heads attn_alpha_channels attn_value_channels "
        "norm_type ffn_hidden_channels edge_channels max_radius grid_resolution use_gate_act use_grid_mlp "
        "use_attn_renorm"
    )
    try:
        theirs = module.EquiformerV2(
            lmax_list=[config.lmax],
            mmax_list=[config.mmax],
            weight_init="uniform",
            alpha_drop=0.0,
            drop_path_rate=0.0,
            **{name: getattr(config, name) for name in same.split()},
        )
        for parameter in theirs.parameters():
            scale = 0.3 if parameter.dim() < 2 else parameter.shape[-1] ** -0.5
            torch.nn.init.normal_(parameter, std=scale)
        ours = EquiformerV2(config).double()
        load_fairchem_checkpoint(theirs.state_dict(), ours)
        yield theirs, ours
    finally:
        torch.set_default_dtype(default)


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, fairchem):
    with same_weights(fairchem, replace(CONFIGS[request.param], **SIZES)) as models:
        yield models


@pytest.fixture(scope="module")
def graph():
    """numbers, edge_index, edge_vec, batch of two random clusters;
    every target has another number of edges."""
    generator = torch.Generator().manual_seed(1)
    numbers = torch.randint(1, 80, (11,), generator=generator)
    position = 3 * torch.randn(11, 3, generator=generator, dtype=torch.float64)
    batch = torch.tensor([0] * 6 + [1] * 5)
    pairs = [
        (i, j)
        for j in range(11)
        for i in range(11)
        if i != j and batch[i] == batch[j] and (i + 2 * j) % 4 != 0
    ]
    edge_index = torch.tensor(pairs).T.contiguous()
    return numbers, edge_index, position[edge_index[0]] - position[edge_index[1]], batch


def run_fairchem(model, fairchem, graph, monkeypatch):
    """Energy, forces, and the frames that fairchem drew."""
    base = importlib.import_module("fairchem.core.models.base")
    numbers, edge_index, edge_vec, batch = graph
    frames = fairchem.init_edge_rot_mat(edge_vec)
    data = types.SimpleNamespace(
        natoms=torch.bincount(batch),
        pos=edge_vec.new_zeros(len(numbers), 3),
        atomic_numbers=numbers,
        batch=batch,
    )
    made = base.GraphData(edge_index, edge_vec.norm(dim=1), edge_vec, None, None, None, batch, numbers)
    monkeypatch.setattr(model, "generate_graph", lambda *_, **__: made)
    monkeypatch.setattr(model, "_init_edge_rot_mat", lambda *_: frames)
    embedding = []
    hook = model.norm.register_forward_hook(lambda _, __, out: embedding.append(out))
    out = model(data)
    hook.remove()
    return embedding[0], out, frames


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-300))


def test_embedding_heads_and_every_gradient(pair, fairchem, graph, monkeypatch):
    theirs, ours = pair
    expected, heads, frames = run_fairchem(theirs, fairchem, graph, monkeypatch)
    ours_embedding = ours(*graph, 2, edge_rot_mat=frames)
    assert relative(ours_embedding, expected) < 1e-10
    predicted = ours.predict(*graph, 2, edge_rot_mat=frames)
    assert relative(predicted["energy"], heads["energy"]) < 1e-10
    assert relative(predicted["forces"], heads["forces"]) < 1e-10

    cotangent = torch.randn_like(heads["forces"])
    for out in (heads, predicted):
        (out["energy"].sum() + (out["forces"] * cotangent).sum()).backward()
    their_gradients = {name: p.grad for name, p in theirs.named_parameters()}
    assert set(their_gradients) == {name for name, _ in ours.named_parameters()}
    for name, parameter in ours.named_parameters():
        expected = their_gradients[name]
        if expected is None:
            assert parameter.grad is None or not parameter.grad.any(), name
        else:
            assert relative(parameter.grad, expected) < 1e-9, name
        parameter.grad = None
    theirs.zero_grad()


def test_our_own_frames_change_only_what_the_grid_cannot_hold(pair, fairchem, graph, monkeypatch):
    theirs, ours = pair
    with torch.no_grad():
        expected, _, _ = run_fairchem(theirs, fairchem, graph, monkeypatch)
        tolerance = 1e-10 if ours.config.use_gate_act else 1e-3 if ours.config.grid_resolution else 0.1
        assert relative(ours(*graph, 2), expected) < tolerance


def test_layout_of_fairchem_2(pair):
    theirs, ours = pair
    heads = {"energy_block": "output_heads.energy.", "force_block": "output_heads.forces."}
    state = {
        "module." + heads.get(key.split(".")[0], "backbone.") + key: value
        for key, value in theirs.state_dict().items()
    }
    other = EquiformerV2(ours.config).double()
    load_fairchem_checkpoint({"state_dict": state}, other)
    for (name, a), (_, b) in zip(other.named_parameters(), ours.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_an_export_loads_strictly_into_fairchem(pair, tmp_path):
    """fairchem's file, other weights trained, written back: every key is there,
    and the model answers with ours."""
    from catmllm.models.export import export_encoder

    theirs, ours = pair
    torch.save(
        {"state_dict": {f"module.{k}": v for k, v in theirs.state_dict().items()}}, tmp_path / "from.pt"
    )
    changed = copy.deepcopy(ours)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.mul_(1.5)
    saved = torch.load(export_encoder(changed, tmp_path / "to.pt", tmp_path / "from.pt"), weights_only=True)
    state = {k.removeprefix("module."): v for k, v in saved["state_dict"].items()}
    again = copy.deepcopy(theirs)
    again.load_state_dict(state, strict=True)
    back = EquiformerV2(changed.config).double()
    load_fairchem_checkpoint(again.state_dict(), back)
    assert all(torch.equal(v, back.state_dict()[k]) for k, v in changed.state_dict().items())


# ------------------------------------------------------------------------------------------
# the published sizes, real slabs


def real_slab(shared, neighbours):
    """numbers, edge_index, edge_vec, batch of a relaxed CH on IrPd (111),
    with its nearest neighbours within 12 Å."""
    with gzip.open(shared / "data" / "fcc_slabs_7net.jsonl.gz", "rt", encoding="utf-8") as lines:
        system = json.loads(next(lines))
    from ase.data import atomic_numbers

    numbers = torch.tensor([atomic_numbers[symbol] for symbol in system["symbols"]])
    edges = neighbour_graph(system["cell"], system["pos_start"], 12.0, neighbours, strict=True)
    return (
        numbers,
        torch.from_numpy(edges.edge_index),
        torch.from_numpy(edges.edge_vec),
        torch.zeros_like(numbers),
    )


@pytest.mark.slow
# 8: 5 GB, not 8, of activations and weights
@pytest.mark.parametrize(("name", "neighbours"), [("31M", 20), ("153M", 8)])
def test_published_sizes_on_a_real_slab(name, neighbours, fairchem, shared, monkeypatch):
    graph = real_slab(shared, neighbours)
    config = EquiformerV2Config.preset(name, energy_head=True, force_head=True)
    with same_weights(fairchem, config) as (theirs, ours):
        embedding, heads, frames = run_fairchem(theirs, fairchem, graph, monkeypatch)
        cotangent = torch.randn_like(heads["forces"])
        (heads["energy"].sum() + (heads["forces"] * cotangent).sum()).backward()
        expected = {key: p.grad for key, p in theirs.named_parameters()}
        energy, forces, embedding = (t.detach() for t in (heads["energy"], heads["forces"], embedding))
        del theirs, heads
        gc.collect()
        with torch.no_grad():
            assert relative(ours(*graph, 1, edge_rot_mat=frames), embedding) < 1e-10
        predicted = ours.predict(*graph, 1, edge_rot_mat=frames)
        assert relative(predicted["energy"], energy) < 1e-10
        assert relative(predicted["forces"], forces) < 1e-10
        (predicted["energy"].sum() + (predicted["forces"] * cotangent).sum()).backward()
        for key, parameter in ours.named_parameters():
            if expected[key] is None:
                assert parameter.grad is None or not parameter.grad.any(), key
            else:
                assert relative(parameter.grad, expected[key]) < 1e-9, key


@pytest.mark.slow
def test_installed_into_a_folder_of_its_own(tmp_path):
    """Where no FAIRCHEM_1_10 is given: fetch it and run everything above."""
    if os.environ.get("FAIRCHEM_1_10"):
        pytest.skip("FAIRCHEM_1_10 is set: the tests above have run")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path)]
    installed = subprocess.run([*pip, "fairchem-core==1.10.0"], capture_output=True, text=True, check=False)
    if installed.returncode:
        pytest.skip(f"no fairchem from the package index: {installed.stderr[-500:]}")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header", __file__],
        env=os.environ | {"FAIRCHEM_1_10": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "passed" in done.stdout and "no tests ran" not in done.stdout
