"""The projector: what turns with the crystal and what does not, shapes, and the ways in which it is used."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from catmllm.data.batches import Collator, GraphBatch
from catmllm.models.catalytic_mllm import CatalyticMLLM
from catmllm.models.projector import Projector
from catmllm.structure.system import System
from catmllm_kernels.so3_pool_project import so3_pool

LMAX, CHANNELS, WIDTH = 2, 16, 24


def projector(mode: str, dtype: torch.dtype = torch.float32) -> Projector:
    torch.manual_seed(0)
    return Projector(mode, LMAX, CHANNELS, WIDTH).to(dtype)


def project(p: Projector, x: torch.Tensor, batch: torch.Tensor, n: int) -> torch.Tensor:
    return p(so3_pool(x, batch, n, p.mode))


def embeddings(n: int = 7, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, (LMAX + 1) ** 2, CHANNELS, generator=generator)
    return x, torch.tensor([0, 0, 0, 1, 2, 2, 2])[:n]


@pytest.mark.parametrize(("mode", "rows"), [("max", 3), ("invariant", 3), ("atoms", 7)])
def test_shapes(mode: str, rows: int) -> None:
    x, batch = embeddings()
    assert project(projector(mode), x, batch, 3).shape == (rows, WIDTH)


def test_an_unknown_mode_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="max, invariant, atoms"):
        Projector("mean", LMAX, CHANNELS, WIDTH)


def test_features_take_the_dtype_of_the_weights() -> None:
    x, batch = embeddings()
    out = project(projector("max", torch.bfloat16), x, batch, 3)
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize("mode", ["max", "invariant"])
def test_the_order_of_a_systems_atoms_does_not_matter(mode: str) -> None:
    x, batch = embeddings()
    turned = torch.tensor([2, 0, 1, 3, 6, 5, 4])
    p = projector(mode)
    torch.testing.assert_close(project(p, x[turned], batch, 3), project(p, x, batch, 3), rtol=0, atol=0)


def rotated_tokens(
    small_model: tuple[CatalyticMLLM, Collator], system: System, mode: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Graph vectors of a system as it stands and turned, by the encoder in float64."""
    model, collate = small_model
    graph = collate.graphs([system])
    assert graph is not None
    turn = torch.tensor(Rotation.random(rng=np.random.default_rng(3)).as_matrix())
    encoder = model.encoder
    c = encoder.config
    p = Projector(mode, c.lmax, c.sphere_channels, WIDTH)
    out = []
    for vectors in (graph.edge_vec, (graph.edge_vec.double() @ turn.T).float()):
        g = GraphBatch(graph.numbers, graph.edge_index, vectors, graph.batch, 1)
        with torch.no_grad():
            out.append(p(encoder(g.numbers, g.edge_index, g.edge_vec, g.batch, 1, pool=mode)))
    return out[0], out[1]


@pytest.mark.parametrize("mode", ["invariant", "atoms"])
def test_invariant_and_atoms_do_not_turn_with_the_crystal(
    small_model: tuple[CatalyticMLLM, Collator], train_systems: list[System], mode: str
) -> None:
    here, turned = rotated_tokens(small_model, train_systems[11], mode)
    torch.testing.assert_close(turned, here, rtol=1e-3, atol=1e-3)


def test_the_papers_max_does_turn(
    small_model: tuple[CatalyticMLLM, Collator], train_systems: list[System]
) -> None:
    here, turned = rotated_tokens(small_model, train_systems[11], "max")
    assert (here - turned).abs().max() > 0.05 * here.abs().max()
