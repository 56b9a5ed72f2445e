"""The encoder against float64 runs of fairchem 1.10, e3nn's tables, its own symmetries and plain definitions.

`tests/fixtures/ref_L2M2_s2_layer_norm_sh.npz` is one of fairchem's runs; CATMLLM_ESCN_REFERENCES (default
../shared/reference/escn) is a folder with more. The whole model is compared in
tests/oracles/test_fairchem_encoder.py.
"""

import os
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from catmllm.models.equiformer_v2 import EquiformerV2, EquiformerV2Config, load_fairchem_checkpoint
from catmllm.models.so3 import SphereTables, real_spherical_harmonics, sphere_grid
from catmllm_kernels.escn.layout import lost_order_scale, rows_of, unpack_wigner
from catmllm_kernels.escn.reference import index_of
from catmllm_kernels.so3_pool_project import so3_pool
from tests.ranks import two_ranks

ROOT = Path(__file__).parents[2]
REFERENCES = Path(os.environ.get("CATMLLM_ESCN_REFERENCES", ROOT.parent / "shared" / "reference" / "escn"))
FILES = {
    path.stem: path
    for path in [*REFERENCES.glob("ref_L*.npz"), *(ROOT / "tests/fixtures").glob("ref_L*.npz")]
}

SMALL = EquiformerV2Config(sphere_channels=8, attn_hidden_channels=8, num_heads=2, ffn_hidden_channels=12)
GATES = replace(SMALL, use_gate_act=True, use_grid_mlp=False)


def node_rows(lmax: int, mmax: int) -> list[int]:
    """The row of a node, l² + l + m, that each of an edge's rows comes from."""
    return [l * l + l + m for l, m in rows_of(lmax, mmax)]


def make_model(config, dtype=torch.float64, seed=0):
    """A model whose every weight is random: at the usual start,
    biases and element embeddings would hide errors."""
    torch.manual_seed(seed)
    model = EquiformerV2(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3 if parameter.dim() < 2 else parameter.shape[-1] ** -0.5)
    return model.to(dtype)


def make_graph(n=9, seed=0):
    """numbers, positions, edge_index (sorted by target, unequal degrees), batch of two systems."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(1, 80, (n,), generator=generator)
    positions = 2 * torch.randn(n, 3, generator=generator, dtype=torch.float64)
    batch = (torch.arange(n) >= n // 2 + 1).long()
    pairs = [
        (i, j) for j in range(n) for i in range(n) if i != j and batch[i] == batch[j] and (i + 2 * j) % 4
    ]
    return numbers, positions, torch.tensor(pairs).T.contiguous(), batch


def run(model, numbers, positions, edge_index, batch, **options):
    return model(
        numbers, edge_index, positions[edge_index[0]] - positions[edge_index[1]], batch, 2, **options
    )


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max())


def dense_grid(sphere, lmax, mmax):
    """[points, R] to and [R, points] from the grid, of its factors."""
    radial, order = (index_of(name, lmax, mmax, sphere.lon.device) for name in ("radial", "order"))
    to, back = (
        (lat[:, radial][:, None] * sphere.lon[:, order]).flatten(0, 1)
        for lat in (sphere.to_lat, sphere.from_lat)
    )
    return to, back.T


# ------------------------------------------------------------------------------------ fairchem's float64 runs


@pytest.fixture(params=sorted(FILES), scope="module")
def reference(request):
    """(arrays of one run, our model with its weights, the geometry of its edges)."""
    arrays = {k: torch.from_numpy(v) for k, v in np.load(FILES[request.param]).items()}
    lmax, mmax = int(request.param[5]), int(request.param[7])
    gate = "gate" in request.param
    config = EquiformerV2Config(
        num_layers=1,
        lmax=lmax,
        mmax=mmax,
        sphere_channels=16,
        attn_hidden_channels=8,
        num_heads=2,
        attn_alpha_channels=8,
        attn_value_channels=4,
        ffn_hidden_channels=32,
        edge_channels=16,
        num_distance_basis=32,
        max_radius=12.0,
        norm_type="rms_norm_sh" if "rms" in request.param else "layer_norm_sh",
        use_gate_act=gate,
        use_grid_mlp=not gate,
        grid_resolution=18,
        avg_degree=23.4,
    )
    model = make_model(config)
    weights = {
        k[2:].replace("block.", "blocks.0.", 1): v for k, v in arrays.items() if k.startswith("w/block.")
    }
    weights |= {k[2:]: v for k, v in arrays.items() if k.startswith("w/edge_degree_embedding.")}
    load_fairchem_checkpoint(model.state_dict() | weights, model)
    vectors, frames = arrays["edge_vec"], arrays["edge_rot_mat"]
    geometry = model.geometry(arrays["Z"], arrays["edge_index"], vectors, edge_rot_mat=frames)
    return arrays, model, replace(geometry, basis=arrays["edge_rbf"])  # the run had a basis of its own


def test_constants_equal_fairchem(reference):
    arrays, model, geometry = reference
    rows = torch.tensor(node_rows(model.config.lmax, model.config.mmax))
    reduced = rows.sort().values  # fairchem cuts orders but keeps l-primary order
    order = torch.searchsorted(reduced, rows)
    torch.testing.assert_close(arrays["to_m"].argmax(1), order)
    lmax, mmax = model.config.lmax, model.config.mmax
    dense = unpack_wigner(geometry.wigner, lmax, mmax)
    torch.testing.assert_close(dense, arrays["wigner"][:, rows], rtol=0, atol=1e-13)
    scale = torch.tensor([lost_order_scale(l, mmax) for l, _ in rows_of(lmax, mmax)], dtype=torch.float64)
    back = (arrays["wigner"].transpose(1, 2)[:, :, reduced] * arrays["rotate_inv_rescale"])[:, :, order]
    torch.testing.assert_close(dense.transpose(1, 2) * scale, back, rtol=0, atol=1e-13)
    to_grid, from_grid = dense_grid(geometry.sphere, lmax, mmax)
    torch.testing.assert_close(to_grid, arrays["to_grid"].flatten(0, 1)[:, order], rtol=0, atol=1e-13)
    torch.testing.assert_close(from_grid.T, arrays["from_grid"].flatten(0, 1)[:, order], rtol=0, atol=1e-13)


def test_attention_equals_fairchem_with_gradients(reference):
    arrays, model, geometry = reference
    attention = model.blocks[0].ga
    x = arrays["x"].clone().requires_grad_()
    out = attention(x, geometry)
    torch.testing.assert_close(out, arrays["ga_out"], rtol=0, atol=1e-10)

    names, parameters = zip(*attention.named_parameters(), strict=True)
    gradients = torch.autograd.grad(out, [x, *parameters], arrays["ga_cotangent"])
    torch.testing.assert_close(gradients[0], arrays["ga_grad_x"], rtol=0, atol=1e-10)
    assert {f"ga_grad_w/{name}" for name in names} == {k for k in arrays if k.startswith("ga_grad_w/")}
    for name, gradient in zip(names, gradients[1:], strict=True):
        torch.testing.assert_close(gradient, arrays[f"ga_grad_w/{name}"], rtol=0, atol=1e-10, msg=name)


def test_block_and_edge_degree_embedding_equal_fairchem(reference):
    arrays, model, geometry = reference
    torch.testing.assert_close(
        model.blocks[0](arrays["x"], geometry), arrays["block_out"], rtol=0, atol=1e-10
    )
    embedding = model.edge_degree_embedding(geometry, len(arrays["x"]))
    torch.testing.assert_close(embedding, arrays["edge_degree_out"], rtol=0, atol=1e-10)


def test_float32_equals_fairchem_too(reference):
    """Relative to the largest element of each tensor, as everywhere."""
    arrays, exact, _ = reference
    model = deepcopy(exact).float()
    vectors, frames = arrays["edge_vec"].float(), arrays["edge_rot_mat"]
    geometry = model.geometry(arrays["Z"], arrays["edge_index"], vectors, edge_rot_mat=frames)
    geometry = replace(geometry, basis=arrays["edge_rbf"].float())
    attention = model.blocks[0].ga
    x = arrays["x"].float().requires_grad_()
    out = attention(x, geometry)
    names, parameters = zip(*attention.named_parameters(), strict=True)
    gradients = torch.autograd.grad(out, [x, *parameters], arrays["ga_cotangent"].float())
    expected = [arrays["ga_grad_x"], *(arrays[f"ga_grad_w/{name}"] for name in names)]
    found = {n: relative(a, b) for n, a, b in zip(("x", *names), gradients, expected, strict=True)}
    found["out"] = relative(out.detach(), arrays["ga_out"])
    found["block"] = relative(model.blocks[0](arrays["x"].float(), geometry).detach(), arrays["block_out"])
    embedding = model.edge_degree_embedding(geometry, len(x)).detach()
    found["edge degree"] = relative(embedding, arrays["edge_degree_out"])
    assert max(found.values()) < 2e-6, found


def test_float32_geometry_is_float64_rounded_once():
    """600 Gaussians: their centres in float32 alone would move a value by 1.7e-5."""
    config = replace(SMALL, lmax=6, mmax=6, num_distance_basis=600)
    numbers, edge_index, vectors = graph_vectors()
    exact = make_model(config).geometry(numbers, edge_index, vectors.float().double())
    narrow = make_model(config, torch.float32).geometry(numbers, edge_index, vectors.float())
    assert narrow.basis.dtype == narrow.wigner.dtype == torch.float32
    assert relative(narrow.basis, exact.basis) < 2e-7
    assert torch.equal(narrow.wigner, exact.wigner.float())


# --------------------------------------------------------------------------------------- tables, against e3nn


def test_harmonics_equal_e3nn():
    o3 = pytest.importorskip("e3nn.o3")
    v = F.normalize(
        torch.randn(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), dim=1
    )
    expected = o3.spherical_harmonics(list(range(7)), v, normalize=True, normalization="integral")
    np.testing.assert_allclose(real_spherical_harmonics(6, v.numpy()), expected.numpy(), atol=1e-13)


@pytest.mark.parametrize("lmax", [2, 6])
@pytest.mark.parametrize("resolution", [None, 18])
def test_grid_equals_e3nn(lmax, resolution):
    o3 = pytest.importorskip("e3nn.o3")
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        size = (resolution or 2 * lmax + 2, resolution or 2 * lmax + 3)
        to, back = o3.ToS2Grid(lmax, size, "component"), o3.FromS2Grid(size, lmax, "component")
        expected = torch.einsum("mbi,am->bai", to.shb, to.sha).flatten(0, 1)
        expected_back = torch.einsum("am,mbi->bai", back.sha, back.shb).flatten(0, 1)
    finally:
        torch.set_default_dtype(default)
    to_grid, from_grid = sphere_grid(lmax, lmax, resolution)
    np.testing.assert_allclose(to_grid, expected.numpy(), atol=1e-12)
    np.testing.assert_allclose(from_grid, expected_back.numpy(), atol=1e-12)
    np.testing.assert_allclose(from_grid.T @ to_grid, np.eye((lmax + 1) ** 2), atol=1e-12)


def test_grid_too_coarse_is_an_error():
    with pytest.raises(ValueError, match="even and at least 10 for lmax 4, not 8"):
        sphere_grid(4, 2, 8)


def special_directions():
    """Along every axis, in every coordinate plane, nearly along y, and at random; other lengths than 1."""
    signs = [[a, b, c] for a in (-1, 0, 1) for b in (-1, 0, 1) for c in (-1, 0, 1) if (a, b, c) != (0, 0, 0)]
    near = [[tiny, sign, -tiny / 3] for tiny in (1e-3, 1e-8, 1e-16, 1e-30) for sign in (1, -1)]
    v = torch.tensor([*signs, *near], dtype=torch.float64)
    return (
        torch.cat([v, torch.randn(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))])
        * 2.7
    )


@pytest.mark.parametrize("lmax", [2, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_frames_turn_every_edge_onto_y(lmax, dtype):
    v = special_directions().to(dtype)
    tables = SphereTables(lmax, lmax, None)
    wigner = unpack_wigner(tables.rotation(v), lmax, lmax)
    rows = node_rows(lmax, lmax)
    identity = torch.eye(len(rows), dtype=torch.float64).expand(len(v), -1, -1)
    torch.testing.assert_close(wigner @ wigner.transpose(1, 2), identity, rtol=0, atol=1e-13)
    harmonics = torch.from_numpy(real_spherical_harmonics(lmax, F.normalize(v.double(), dim=1).numpy()))
    on_y = torch.from_numpy(real_spherical_harmonics(lmax, np.array([0.0, 1, 0])))[rows]
    turned = (wigner @ harmonics[..., None]).squeeze(2)
    torch.testing.assert_close(turned, on_y.expand_as(turned), rtol=0, atol=1e-13)


def test_given_frames_equal_e3nn():
    o3 = pytest.importorskip("e3nn.o3")
    matrices = o3.rand_matrix(30, dtype=torch.float64)
    wigner = unpack_wigner(SphereTables(3, 2, None).rotation(matrices[:, 1], matrices), 3, 2)
    irreps = o3.Irreps("0e+1e+2e+3e")
    expected = irreps.D_from_matrix(matrices)[:, node_rows(3, 2)]
    torch.testing.assert_close(wigner, expected, rtol=0, atol=1e-5)  # e3nn's generators are float32


def test_frames_carry_no_gradient_but_distances_do():
    model = make_model(GATES)
    numbers, positions, edge_index, _ = make_graph()
    positions.requires_grad_()
    vectors = positions[edge_index[0]] - positions[edge_index[1]]
    geometry = model.geometry(numbers, edge_index, vectors)
    assert not geometry.wigner.requires_grad and geometry.basis.requires_grad
    model(numbers, edge_index, vectors).sum().backward()
    assert positions.grad.abs().max() > 0


# ------------------------------------------------------------------------------------------ symmetries


def rotation_of_nodes(lmax, matrix):
    """D(R) in l-primary rows, from the definition Y(Rv) = D·Y(v)."""
    v = np.random.default_rng(0).normal(size=(200, 3))
    v /= np.linalg.norm(v, axis=1, keepdims=True)
    turned = real_spherical_harmonics(lmax, v @ matrix.T)
    return torch.from_numpy(np.linalg.lstsq(real_spherical_harmonics(lmax, v), turned, rcond=None)[0].T)


@pytest.mark.parametrize(
    ("config", "tolerance"),
    [
        (GATES, 1e-12),
        (replace(GATES, lmax=4, mmax=1, norm_type="rms_norm_sh"), 1e-12),
        (replace(SMALL, grid_resolution=18), 1e-6),  # the grid holds only a part of SiLU's degrees
        (replace(SMALL, lmax=3, grid_resolution=40), 1e-9),
    ],
)
def test_rotation_permutation_translation(config, tolerance):
    config = replace(config, energy_head=True, force_head=True)
    model = make_model(config)
    numbers, positions, edge_index, batch = make_graph()
    with torch.no_grad():
        x = run(model, numbers, positions, edge_index, batch)
        vectors = positions[edge_index[0]] - positions[edge_index[1]]
        out = model.predict(numbers, edge_index, vectors, batch, 2)

        matrix = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0]
        matrix *= np.sign(np.linalg.det(matrix))
        turn = torch.from_numpy(matrix)
        expected = rotation_of_nodes(config.lmax, matrix) @ x
        assert relative(run(model, numbers, positions @ turn.T, edge_index, batch), expected) < tolerance
        turned = model.predict(numbers, edge_index, vectors @ turn.T, batch, 2)
        assert relative(turned["energy"], out["energy"]) < tolerance
        assert relative(turned["forces"], out["forces"] @ turn.T) < tolerance

        order = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(2))
        place = order.argsort()
        permuted = run(model, numbers[order], positions[order], place[edge_index], batch[order])
        assert relative(permuted, x[order]) < 1e-12
        shuffled = edge_index[:, torch.randperm(edge_index.shape[1])]
        assert relative(run(model, numbers, positions, shuffled, batch), x) < 1e-12
        assert relative(run(model, numbers, positions + 5, edge_index, batch), x) < 1e-12


@pytest.mark.parametrize("norm", ["layer_norm_sh", "rms_norm_sh"])
@pytest.mark.parametrize("mode", ["max", "invariant", "atoms"])
def test_pooling_includes_the_final_norm(norm, mode):
    model = make_model(replace(SMALL, norm_type=norm))
    graph = make_graph()
    pooled = run(model, *graph, pool=mode)
    expected = so3_pool(run(model, *graph), graph[3], 2, mode)
    torch.testing.assert_close(pooled, expected, rtol=0, atol=1e-12)
    weights = torch.randn_like(pooled)
    wanted = [model.norm.affine_weight, model.sphere_embedding.weight]
    for a, b in zip(
        torch.autograd.grad(pooled, wanted, weights, allow_unused=True),
        torch.autograd.grad(expected, wanted, weights, allow_unused=True),
    ):
        if b is None or not b.any():
            assert a is None or not a.any()
        else:
            assert relative(a, b) < 1e-10


def test_systems_of_a_batch_do_not_see_each_other():
    model = make_model(replace(SMALL, energy_head=True))
    numbers, positions, edge_index, batch = make_graph()
    vectors = positions[edge_index[0]] - positions[edge_index[1]]
    together = model.predict(numbers, edge_index, vectors, batch, 3)["energy"]
    assert together.shape == (3,) and together[2] == 0
    for system in range(2):
        atoms, edges = batch == system, batch[edge_index[0]] == system
        first = int(atoms.nonzero()[0])
        alone = model.predict(numbers[atoms], edge_index[:, edges] - first, vectors[edges])["energy"]
        torch.testing.assert_close(alone, together[system : system + 1])


def graph_vectors(seed=0):
    numbers, positions, edge_index, _ = make_graph(seed=seed)
    return numbers, edge_index, positions[edge_index[0]] - positions[edge_index[1]]


# ----------------------------------------------------------------------------------------- edges of the input


@pytest.mark.parametrize("config", [SMALL, GATES])
@pytest.mark.parametrize("n_atoms", [1, 3])
def test_no_edges(config, n_atoms):
    model = make_model(replace(config, energy_head=True, force_head=True))
    numbers, edge_index = torch.full((n_atoms,), 29), torch.zeros(2, 0, dtype=torch.int64)
    x = model(numbers, edge_index, torch.zeros(0, 3, dtype=torch.float64))
    assert x.shape == (n_atoms, 9, 8) and torch.isfinite(x).all()
    out = model.predict(numbers, edge_index, torch.zeros(0, 3, dtype=torch.float64))
    (out["energy"].sum() + out["forces"].sum()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_atoms_in_one_place_stay_finite():
    model = make_model(SMALL)
    numbers, positions, edge_index, batch = make_graph()
    positions[1] = positions[0]
    x = run(model, numbers, positions, edge_index, batch)
    x.square().sum().backward()
    assert torch.isfinite(x).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_errors_say_what_to_do():
    with pytest.raises(ValueError, match="`mmax` must be at most `lmax`"):
        EquiformerV2Config(lmax=2, mmax=3)
    with pytest.raises(ValueError, match="one of layer_norm_sh, rms_norm_sh"):
        EquiformerV2Config(norm_type="layer_norm")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="choose one of 31M, 153M"):
        EquiformerV2Config.preset("31m")
    numbers, edge_index, vectors = graph_vectors()
    with pytest.raises(TypeError, match="cast_forward_inputs=False"):
        make_model(SMALL)(numbers, edge_index, vectors.bfloat16())


# ------------------------------------------------------------------------------------ precision and placement


@pytest.mark.parametrize("config", [SMALL, GATES, replace(SMALL, norm_type="rms_norm_sh")])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1), (torch.float16, 0.02)]
)
def test_lower_precision(config, dtype, tolerance):
    exact = make_model(config)
    numbers, edge_index, vectors = graph_vectors()
    expected = exact(numbers, edge_index, vectors).detach()
    model = make_model(config).to(dtype)
    x = model(numbers, edge_index, vectors.float())
    assert x.dtype == dtype
    assert float((x.detach() - expected).norm() / expected.norm()) < tolerance
    x.float().square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("config", [SMALL, GATES])
def test_autocast(config):
    model = make_model(config, torch.float32)
    numbers, edge_index, vectors = graph_vectors()
    expected = model(numbers, edge_index, vectors.float()).detach()
    with torch.autocast("cpu", torch.bfloat16):
        x = model(numbers, edge_index, vectors.float())
    assert float((x.detach() - expected).norm() / expected.norm()) < 0.1
    x.square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_tables_stay_exact_when_the_model_is_cast_or_made_on_meta():
    model = EquiformerV2(SMALL)
    expected = {name: table.clone() for name, table in model.tables.named_buffers()}
    with torch.device("meta"):
        empty = EquiformerV2(SMALL)
    assert all(p.is_meta for p in empty.parameters())
    empty.to_empty(device="cpu")
    empty.reset_parameters()
    for other in (model.half(), model.bfloat16().float(), empty):
        for name, table in other.tables.named_buffers():
            assert torch.equal(table, expected[name]), name
    assert not any("tables" in key for key in model.state_dict())
    assert torch.isfinite(empty(*graph_vectors())).all()


def test_checkpointed_blocks_give_the_same_gradients():
    plain = make_model(SMALL)
    saving = make_model(replace(SMALL, activation_checkpoint=True))
    for model in (plain, saving):
        model(*graph_vectors()).square().sum().backward()
    for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)
    with torch.no_grad():
        assert torch.equal(plain(*graph_vectors()), saving(*graph_vectors()))


def test_stochastic_depth_and_attention_dropout_only_in_training():
    model = make_model(replace(SMALL, drop_path_rate=0.5, alpha_drop=0.3))
    numbers, edge_index, vectors = graph_vectors()
    *_, batch = make_graph()
    expected = make_model(SMALL)(numbers, edge_index, vectors, batch)
    assert torch.equal(model.eval()(numbers, edge_index, vectors, batch), expected)
    model.train()
    assert not torch.equal(model(numbers, edge_index, vectors, batch), expected)
    torch.manual_seed(0)
    kept = torch.stack([model.blocks[0].drop_path(torch.ones(9, 1, 1).double(), batch) for _ in range(400)])
    assert set(kept.unique().tolist()) == {0.0, 2.0}  # dropped, or scaled by 1/(1 - rate)
    assert all(len(set(draw[batch == system].flatten().tolist())) == 1 for draw in kept for system in (0, 1))
    assert abs(float(kept.mean()) - 1) < 0.15


@pytest.mark.parametrize("checkpointing", [False, True])
def test_fully_sharded_blocks(tmp_path, checkpointing):
    """FSDP2 on every block and the root, one rank: same embedding, same gradients."""
    import torch.distributed as dist
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    assert not dist.is_initialized(), "an earlier test left its process group behind"
    plain = make_model(SMALL, torch.float32)
    sharded = make_model(replace(SMALL, activation_checkpoint=checkpointing), torch.float32)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        policy = MixedPrecisionPolicy(cast_forward_inputs=False)
        for block in sharded.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(sharded, mesh=mesh, mp_policy=policy)
        numbers, edge_index, vectors = graph_vectors()
        outs = [model(numbers, edge_index, vectors.float()) for model in (plain, sharded)]
        torch.testing.assert_close(outs[0], outs[1])
        for out in outs:
            out.square().sum().backward()
        for (name, a), b in zip(plain.named_parameters(), sharded.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad.full_tensor(), msg=name)
    finally:
        dist.destroy_process_group()


def sharded_rank(rank, folder):
    """What `test_two_ranks` runs in each process: its own graph through the sharded model, kept by rank 0."""
    import torch.distributed as dist
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        model = make_model(SMALL, torch.float32)
        mesh = dist.init_device_mesh("cpu", (2,))
        policy = MixedPrecisionPolicy(cast_forward_inputs=False)
        for part in (*model.blocks, model):
            fully_shard(part, mesh=mesh, mp_policy=policy)
        numbers, edge_index, vectors = graph_vectors(seed=rank)
        out = model(numbers, edge_index, vectors.float())
        out.square().sum().backward()
        gradients = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
        outs = [torch.empty_like(out) for _ in range(2)] if rank == 0 else None
        dist.gather(out.detach(), outs)
        if rank == 0:
            torch.save({"outs": outs, "gradients": gradients}, f"{folder}/sharded.pt")
    finally:
        dist.destroy_process_group()


def test_two_ranks(tmp_path):
    """FSDP2 on every block and the root, two ranks with graphs of their own:
    the embeddings of one process, and the mean of its two gradients."""
    two_ranks(sharded_rank, str(tmp_path))
    found = torch.load(tmp_path / "sharded.pt", weights_only=True)
    model = make_model(SMALL, torch.float32)
    for rank in range(2):
        numbers, edge_index, vectors = graph_vectors(seed=rank)
        out = model(numbers, edge_index, vectors.float())
        torch.testing.assert_close(found["outs"][rank], out)
        (out.square().sum() / 2).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found["gradients"][name], parameter.grad, rtol=1e-4, atol=1e-4, msg=name)


# -------------------------------------------------------------------------------------- sizes and checkpoints


@pytest.mark.parametrize(("name", "millions"), [("31M", 31.059), ("153M", 153.603)])
def test_published_sizes(name, millions):
    with torch.device("meta"):
        model = EquiformerV2(EquiformerV2Config.preset(name, energy_head=True, force_head=True))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 3) == millions


def fairchem_constants(config):
    """The tables that fairchem saves beside the weights, at some of the places where it repeats them."""
    resolution = config.grid_resolution
    to_grid, _ = sphere_grid(config.lmax, config.mmax, resolution)
    grid = torch.from_numpy(to_grid.reshape(resolution, resolution, -1))
    ones = torch.ones(3)
    return {
        "distance_expansion.offset": torch.linspace(0, config.max_radius, config.num_distance_basis),
        f"SO3_grid.{config.lmax}.{config.mmax}.to_grid_mat": grid,
        f"blocks.0.ga.SO3_grid.{config.lmax}.{config.mmax}.to_grid_mat": grid,
        "SO3_rotation.0.mapping.to_m": ones,
        "mappingReduced.to_m": ones,
        "blocks.0.ga.so2_conv_1.mappingReduced.m_size": ones,
        "blocks.0.ga.proj.expand_index": ones,
        "blocks.0.norm_1.balance_degree_weight": ones,
    }


@pytest.fixture
def checkpoint():
    """(configuration, weights by name, what a fairchem checkpoint of them holds)."""
    config = replace(SMALL, grid_resolution=18, energy_head=True, force_head=True)
    weights = dict(make_model(config, torch.float32, seed=3).state_dict())
    return config, weights, weights | fairchem_constants(config)


@pytest.mark.parametrize("prefix", ["", "module.", "module.module."])
def test_load_from_file_with_wrappers(checkpoint, prefix, tmp_path):
    config, weights, saved = checkpoint
    path = tmp_path / "eqV2.pt"
    torch.save(
        {"state_dict": {prefix + k: v for k, v in saved.items()}, "config": {"model": "x"}, "step": 3}, path
    )
    model = EquiformerV2(config)
    load_fairchem_checkpoint(path, model)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


def test_heads_that_the_model_lacks_are_left_out(checkpoint):
    config, weights, saved = checkpoint
    model = EquiformerV2(replace(config, energy_head=False, force_head=False))
    load_fairchem_checkpoint(saved, model)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    bare = {k: v for k, v in saved.items() if not k.startswith(("energy_block", "force_block"))}
    with pytest.raises(ValueError, match=r"missing: energy_block\.so3_linear_1\.weight"):
        load_fairchem_checkpoint(bare, EquiformerV2(config))


def test_every_key_that_does_not_fit_is_named(checkpoint):
    config, _, saved = checkpoint
    model = EquiformerV2(config)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    del saved["norm.affine_weight"]
    saved["blocks.7.ga.alpha_dot"] = torch.zeros(2, 2)
    saved["blocks.0.ga.alpha_dot"] = torch.zeros(2, 5)
    with pytest.raises(ValueError) as error:
        load_fairchem_checkpoint(saved, model)
    for line in (
        "missing: norm.affine_weight [2, 8]",
        "unexpected: blocks.7.ga.alpha_dot [2, 2]",
        "shape: blocks.0.ga.alpha_dot is [2, 5], the model needs [2, 16]",
    ):
        assert line in str(error.value)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_cutoff_or_grid_that_no_weight_shows_is_an_error(checkpoint):
    config, _, saved = checkpoint
    with pytest.raises(ValueError, match="64 Gaussians up to 6 Å, the model has 64 to 5"):
        load_fairchem_checkpoint(saved, EquiformerV2(replace(config, max_radius=5.0)))
    with pytest.raises(ValueError, match="18 x 18 points, the model has 42"):
        load_fairchem_checkpoint(saved, EquiformerV2(replace(config, grid_resolution=None)))


def test_a_file_with_code_in_it_is_refused(tmp_path):
    import pickle

    torch.save({"state_dict": {"a": Path("x")}}, tmp_path / "code.pt")
    with pytest.raises(pickle.UnpicklingError):
        load_fairchem_checkpoint(tmp_path / "code.pt", EquiformerV2(SMALL))
    with pytest.raises(ValueError, match="epoch hold no tensors"):
        load_fairchem_checkpoint({"epoch": 3}, EquiformerV2(SMALL))
