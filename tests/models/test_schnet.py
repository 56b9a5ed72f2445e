"""SchNet against torch_geometric's with the same weights, and as the encoder of a model."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from catmllm.cli.main import main
from catmllm.config import Config, ConfigError, load_config
from catmllm.data.batches import GraphBatch
from catmllm.data.open import open_data
from catmllm.data.slabs import load_slabs
from catmllm.models.build import new_model
from catmllm.models.encoder_graphs import EncoderGraphs
from catmllm.models.schnet import SchNet, SchNetConfig
from catmllm.models.state import load_model
from catmllm.plan.trace import trace
from catmllm.stages.align import Align
from catmllm.stages.encoder import Encoder
from catmllm.stages.ga_grpo import GAGRPO
from catmllm.stages.grpo import GRPO
from catmllm.stages.joint import Joint
from catmllm.structure.graph import neighbour_graphs
from catmllm.structure.system import System
from catmllm.train.loop import train
from tests.contexts import MakeContext, small
from tests.small_run import finish, run_config, small_folder  # noqa: F401

CUTOFF = 6.0
SMALL = SchNetConfig(
    num_layers=3, sphere_channels=12, edge_channels=10, num_distance_basis=16, max_radius=CUTOFF
)
SIZES = ["model.encoder.kind=schnet", "model.encoder.num_layers=2", "model.encoder.sphere_channels=16"]


def make_model(config: SchNetConfig = SMALL) -> SchNet:
    torch.manual_seed(0)
    model = SchNet(config).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zero as published, so that nothing would hang on them
                parameter.uniform_(-0.3, 0.3)
    return model


def theirs_of(model: SchNet, vectors: torch.Tensor, edge_index: torch.Tensor) -> Any:
    """torch_geometric's SchNet with our weights and a graph, and with constants that are not float32's."""
    from torch_geometric.nn.models import SchNet as Theirs

    c = model.config
    made = Theirs(
        c.sphere_channels, c.edge_channels, c.num_layers, c.num_distance_basis, c.max_radius,
        interaction_graph=lambda pos, batch: (edge_index, vectors.norm(dim=1)),
    ).double()  # fmt: skip
    centres = torch.linspace(0, c.max_radius, c.num_distance_basis, dtype=torch.float64)
    made.distance_expansion.offset = centres
    made.distance_expansion.coeff = -0.5 / float(centres[1] - centres[0]) ** 2
    for module in made.modules():
        if hasattr(module, "shift"):
            module.shift = math.log(2.0)
    with torch.no_grad():
        made.embedding.weight.copy_(model.embedding.weight)
        for ours, block in zip(model.blocks, made.interactions):
            for mine, their in pairs(ours, block):
                their.copy_(mine)
    return made


def pairs(ours: Any, theirs: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The parameters of a block of ours and of theirs."""
    layers = (
        (ours.filter_1, theirs.mlp[0]), (ours.filter_2, theirs.mlp[2]), (ours.lin_in, theirs.conv.lin1),
        (ours.lin_out, theirs.conv.lin2), (ours.lin, theirs.lin),
    )  # fmt: skip
    return [(p, q) for a, b in layers for p, q in zip(a.parameters(), b.parameters(), strict=True)]


def compare(numbers: torch.Tensor, edges: torch.Tensor, vectors: torch.Tensor, batch: torch.Tensor) -> None:
    """Outputs, and the gradients of weights and of edge vectors, in float64. Theirs sums edges in another
    order: a few dozen terms differ in the last of 16 digits."""
    model = make_model()
    mine, other = vectors.clone().requires_grad_(), vectors.clone().requires_grad_()
    theirs = theirs_of(model, other, edges)
    expected = theirs(numbers, torch.zeros(len(numbers), 3, dtype=torch.float64), batch)
    node = model(numbers, edges, mine, batch, len(expected))
    value = theirs.lin2(theirs.act(theirs.lin1(node)))
    found = value.new_zeros(len(expected), 1).index_add(0, batch, value)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert expected.std() > 1e-3
    weight = torch.randn(len(expected), 1, dtype=torch.float64)
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    assert mine.grad is not None and other.grad is not None and other.grad.abs().max() > 1e-6
    torch.testing.assert_close(mine.grad, other.grad, rtol=1e-9, atol=1e-13)
    known = [(model.embedding.weight, theirs.embedding.weight)]
    known += [p for ours, block in zip(model.blocks, theirs.interactions) for p in pairs(ours, block)]
    assert len(known) == len(list(model.parameters()))
    for a, b in known:
        assert a.grad is not None and a.grad.abs().max() > 0
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-13)


def test_it_is_torch_geometrics_on_molecules() -> None:
    pytest.importorskip("torch_geometric")
    rng = np.random.default_rng(0)
    batch = torch.tensor([0] * 7 + [1] * 5)
    position = torch.from_numpy(rng.uniform(-3, 3, (12, 3)))
    near = (torch.cdist(position, position) < CUTOFF) & (batch[:, None] == batch) & ~torch.eye(12).bool()
    edges = near.nonzero().T.contiguous()
    numbers = torch.from_numpy(rng.integers(1, 80, 12))
    compare(numbers, edges, position[edges[0]] - position[edges[1]], batch)


def test_it_is_torch_geometrics_on_periodic_slabs() -> None:
    """On our graphs, of slabs that neighbour their own images, whose edges are ASE's within the cutoff."""
    pytest.importorskip("torch_geometric")
    from ase.neighborlist import neighbor_list

    some = load_slabs()[:2]
    graph, _ = neighbour_graphs(some, CUTOFF, 500)
    batch = torch.tensor([0] * len(some[0]) + [1] * len(some[1]))
    i, j, vector = neighbor_list("ijD", some[0].as_ase(), CUTOFF)  # D points from i to j
    first = (graph.edge_index[1] < len(some[0])).nonzero()[0]
    assert len(first) == len(i) and bool((i == j).any())  # images of an atom itself

    def rows(source: Any, target: Any, vectors: Any) -> np.ndarray:
        found = np.column_stack([source, target, vectors])
        return found[np.lexsort(np.round(found, 5).T)]

    ours = rows(*graph.edge_index[:, first], graph.edge_vec[first])
    np.testing.assert_allclose(ours, rows(j, i, vector), atol=1e-6)
    edges, vectors = torch.from_numpy(graph.edge_index), torch.from_numpy(graph.edge_vec)
    compare(torch.from_numpy(np.concatenate([s.numbers for s in some])), edges, vectors.double(), batch)


@settings(max_examples=20)
@given(st.integers(0, 10**6))
def test_neither_turning_nor_renaming_atoms_changes_it(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 9))
    model, position = make_model(), torch.from_numpy(rng.uniform(-3, 3, (n, 3)))
    edges = (~torch.eye(n).bool()).nonzero().T
    numbers = torch.from_numpy(rng.integers(1, 80, n))
    turn = torch.from_numpy(Rotation.random(rng=rng).as_matrix())
    vectors = position[edges[0]] - position[edges[1]]
    there = torch.from_numpy(rng.permutation(n))
    back = torch.argsort(there)
    with torch.no_grad():
        before = model(numbers, edges, vectors)
        torch.testing.assert_close(model(numbers, edges, vectors @ turn.T), before, rtol=1e-10, atol=1e-10)
        after = model(numbers[there], back[edges], vectors)
        torch.testing.assert_close(after, before[there], rtol=1e-10, atol=1e-10)


def test_pooled_features_are_the_maxima_and_the_atoms() -> None:
    model = make_model()
    rng = np.random.default_rng(0)
    position, batch = torch.from_numpy(rng.uniform(-3, 3, (6, 3))), torch.tensor([0, 0, 0, 0, 1, 1])
    edges = ((batch[:, None] == batch) & ~torch.eye(6).bool()).nonzero().T
    graph = torch.arange(1, 7), edges, position[edges[0]] - position[edges[1]], batch, 2
    with torch.no_grad():
        node = model(*graph)
        top = torch.stack([node[:4].amax(0), node[4:].amax(0)])
        assert torch.equal(model(*graph, pool="max"), top)
        assert torch.equal(model(*graph, pool="invariant"), top)  # of degree 0 there is nothing else
        assert torch.equal(model(*graph, pool="atoms"), node)
        reader = EncoderGraphs(model)
        whole = GraphBatch(*graph)
        torch.testing.assert_close(reader(whole, "max"), top, rtol=1e-12, atol=1e-12)  # padded


def test_halves_keep_sums_wide() -> None:
    """A weight and a product of float16 are off by 2^-11 each; a block has five layers of them."""
    model = make_model().float()
    exact = copy.deepcopy(model).double()
    half = copy.deepcopy(model).half()
    rng = np.random.default_rng(0)
    position = torch.from_numpy(rng.uniform(-3, 3, (30, 3))).float()
    edges = (~torch.eye(30).bool()).nonzero().T
    graph = torch.from_numpy(rng.integers(1, 80, 30)), edges, position[edges[0]] - position[edges[1]]
    expected, found = exact(*graph), half(*graph)
    assert found.dtype == torch.float16 and expected.abs().max() > 1
    off = (found.double() - expected).abs().max() / expected.abs().max()
    assert off < len(model.blocks) * 5 * 2**-10
    found.float().square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in half.parameters())


def schnet() -> Config:
    config = small()
    config.model.encoder = load_config(overrides=SIZES).model.encoder
    return config


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_the_stages_train_it_whatever_is_kept(make_context: MakeContext, checkpointing: Any) -> None:
    """Sharded, saved and loaded; recomputing changes no loss by more than rounding."""
    losses = []
    for kept in ("none", checkpointing):
        config = schnet()
        config.checkpointing = kept
        context = make_context(config)
        context.folder = context.folder / kept
        context.folder.mkdir(exist_ok=True)
        before = copy.deepcopy(context.model.encoder.state_dict())
        state, _ = train(Encoder, context)
        assert all(not torch.equal(state[f"encoder.{k}"], v) for k, v in before.items())
        rows = [json.loads(line) for line in (context.folder / "log.jsonl").read_text().splitlines()]
        losses.append([row["loss"] for row in rows])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("of", [Align, Joint])
def test_a_graph_token_of_it_trains(make_context: MakeContext, of: type, tmp_path: Path) -> None:
    from catmllm.models.export import export
    from catmllm.models.state import save_model

    context = make_context(schnet())
    before = context.model.projector.linear.weight.detach().clone()
    state, _ = train(of, context)
    assert not torch.equal(state["projector.linear.weight"], before)
    save_model(tmp_path / "saved", context.model, state, context.config, context.collate)
    some = context.data["val"][:3]
    answers = []
    for place in (tmp_path / "saved", export(tmp_path / "saved", "hf", tmp_path / "hf", "fp32")):
        model, collate, config = load_model(place)
        assert config.model.encoder.kind == "schnet" and isinstance(model.encoder, SchNet)
        with torch.no_grad():
            answers.append(model.graph_energy(collate.graphs(some))[0])
    assert torch.equal(*answers)
    with pytest.raises(ValueError, match="fairchem's files are of EquiformerV2"):
        export(tmp_path / "saved", "fairchem", tmp_path / "encoder.pt")


def test_a_plan_counts_it() -> None:
    """Parameters and products by hand: per edge the filters, per node three layers, backward twice."""
    config = load_config(
        overrides=["stages=[encoder]", "encoder.batch_size=2", "model.encoder.kind=schnet",
                   "model.encoder.sphere_channels=48", "model.encoder.edge_channels=40"]
    )  # fmt: skip
    data = {k: v[:40] for k, v in open_data(config.data).items()}
    few = trace(config, "encoder", 1, data=data, steps=1)
    config.model.encoder.num_layers += 1
    more = trace(config, "encoder", 1, data=data, steps=1)
    c, f, basis = 48, 40, config.model.encoder.num_distance_basis
    extra = (basis + 1) * f + (f + 1) * f + c * f + (f + 1) * c + (c + 1) * c
    assert (more.parts["parameters"] - few.parts["parameters"]) * 2**30 == pytest.approx(4 * extra, rel=0.01)
    flops = more.flops["forward"] - few.flops["forward"]
    context_batch = 2 * 14  # systems of at most 14 atoms, 12 neighbours each
    nodes = 2 * (2 * c * f + c * c)
    per_edge = 2 * (basis * f + f * f)
    assert context_batch * 0.9 * (nodes + 10 * per_edge) < flops < context_batch * (nodes + 13 * per_edge)
    # twice forward's, but for the distances, which nobody asks for a gradient of
    assert 1.3 * flops < more.flops["backward"] - few.flops["backward"] < 2 * flops


# Texts alone

NONE = [
    "model.encoder.kind=none", "joint.drop_text=0", "instruct.drop_text=0", "stages=[joint,instruct,ga_grpo]",
]  # fmt: skip


def test_a_model_of_texts_alone_sees_no_structure(train_systems: list[System]) -> None:
    from catmllm.data.prompts import design_sample, property_sample
    from catmllm.design.predict import predict_energies, question

    config = load_config(overrides=[*NONE, "model.llm.num_hidden_layers=1"])
    model, collate = new_model(config, train_systems[:20])
    with torch.no_grad():
        model.energy_head.text.weight.normal_()
    a, b = train_systems[0], train_systems[1]
    for sample in (property_sample(a), design_sample(a, b)):
        batch = collate([sample])
        assert batch.graph is None and not len(batch.graph_at)
        assert batch.input_ids.tolist() == collate([
            property_sample(a, "text") if sample.graph is a else design_sample(a, None)
        ]).input_ids.tolist()  # fmt: skip
    both, text = (predict_energies(model, collate, [question(a, mode)]) for mode in ("both", "text"))
    assert np.array_equal(both, text) and np.isfinite(text).all()
    with pytest.raises(ValueError, match="sees no structure"):
        collate([question(a, "graph")])


@pytest.mark.parametrize("of", [GRPO, GAGRPO])
def test_the_rl_stages_train_a_model_of_texts_alone(make_context: MakeContext, of: type) -> None:
    """Exemplars and replayed questions lose their structures too. A random policy's answers of GA-GRPO are
    all alike, so that nothing moves there."""
    config = small()
    config.grpo.property_share = 0.5
    config.joint.drop_text = config.instruct.drop_text = 0.0
    config.stages = ("joint", "grpo", "ga_grpo")
    config.model.encoder = load_config(overrides=NONE).model.encoder
    context = make_context(config)
    assert not context.collate.shows_structures
    before = context.model.llm.lm_head.weight.detach().clone()
    state, _ = train(of, context)
    after = state["llm.lm_head.weight"]
    assert torch.isfinite(after).all() and (of is GAGRPO or not torch.equal(after, before))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["stages=[encoder,joint]"], "`stages`: encoder train on structures"),
        (["joint.drop_text=0.1"], "`joint.drop_text` must be 0"),
        (["data.images=true", "model.llm.pretrained=Qwen/Qwen2.5-VL-3B-Instruct"], "`data.images` shows"),
        (["model.encoder.preset=31M", "data.cutoff=12", "data.max_neighbours=20"], "is of EquiformerV2"),
    ],
)
def test_what_a_kind_does_not_have_is_told(more: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(overrides=[*NONE, *more])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["schnet", "none"])
def test_whole_runs_on_two_ranks(
    run_config: Path,  # noqa: F811
    tmp_path: Path,
    kind: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """All stages, their evaluation and the search; then `predict`, and an export with its card."""
    import yaml

    tree = yaml.safe_load(run_config.read_text())
    tree["model"]["encoder"] = {"kind": kind, "num_layers": 2, "sphere_channels": 16}
    if kind == "none":
        tree["stages"] = ["joint", "instruct", "grpo", "ga_grpo"]
        tree["joint"]["drop_text"] = tree["instruct"]["drop_text"] = 0
    (path := tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    out = tmp_path / "run"
    finish(path, out)
    metrics = json.loads((out / "metrics.json").read_text())
    found = metrics["property"]["ga_grpo"]
    modes = {"both", "graph", "text", "start", "encoder"} if kind == "schnet" else {"text", "start"}
    assert modes <= set(found) and ("encoder" in found) == (kind == "schnet")
    assert metrics["design"]["n"] == 4 and (metrics["parameters"]["encoder"] > 0) == (kind == "schnet")
    system = open_data(load_config(str(path)).data)["test"][0]
    from catmllm.structure.cif import write_cif

    (tmp_path / "slab.cif").write_text(write_cif(system, 8))
    assert main(["predict", str(tmp_path / "slab.cif"), "--model", str(out), "--json"]) == 0
    assert np.isfinite(json.loads(capsys.readouterr().out.splitlines()[0])["energy"])
    assert main(["export", "hf", str(tmp_path / "hf"), "--model", str(out / "ga_grpo")]) == 0
    card = (tmp_path / "hf" / "README.md").read_text()
    assert ("The encoder (SchNet) began from random weights." in card) == (kind == "schnet")
