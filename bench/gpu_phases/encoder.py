"""The whole 31M encoder on 16 systems of 80 atoms and on one, inference and training, in bfloat16 and
float32, beside fairchem 1.10 under autocast; one system also as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.gpu_phases import peers
from bench.gpu_phases.measure import Bench
from catmllm.models.equiformer_v2 import EquiformerV2, EquiformerV2Config

NEIGHBOURS = 20


def prepare(bench: Bench) -> tuple[EquiformerV2, Any]:
    smaller = {"num_layers": 1, "sphere_channels": 8, "attn_hidden_channels": 4, "ffn_hidden_channels": 8}
    model = EquiformerV2(EquiformerV2Config.preset("31M", **(smaller if bench.tiny else {})))
    theirs = None
    with bench.guard("fairchem 1.10"):
        theirs = peers.fairchem_encoder(bench, model.config)
    return model, theirs


def run(bench: Bench, prepared: tuple[EquiformerV2, Any]) -> None:
    model, theirs = prepared
    for dtype in (torch.float32,) if bench.tiny else (torch.bfloat16, torch.float32):
        model.to(bench.device, dtype)
        for systems, atoms in ((2, 4),) if bench.tiny else ((16, 80), (1, 80)):
            for training in (False, True):
                what = (
                    f"{systems} x {atoms} atoms, {'training' if training else 'inference'}, {str(dtype)[6:]}"
                )
                with bench.guard(what):
                    timed(bench, what, model, theirs, random_graph(systems, atoms, bench.device), training)
    if bench.gpu:
        with bench.guard("one system as a CUDA graph"):
            as_graph(bench, model.to(torch.bfloat16))


def timed(
    bench: Bench, what: str, model: EquiformerV2, theirs: Any, graph: tuple[Tensor, ...], training: bool
) -> None:
    systems = int(graph[3][-1]) + 1
    learned = [p for p in model.parameters() if p.requires_grad]
    ways = {"ours": call(lambda: model(*graph, systems, pool="max"), learned, training)}
    if (theirs is not None and model.sphere_embedding.weight.dtype != torch.float32) or (
        bench.tiny and theirs
    ):
        with bench.guard(what, "fairchem 1.10"):
            ways["fairchem 1.10"] = call(theirs(*graph), theirs.parameters, training)
    edges = graph[1].shape[1] * model.config.num_layers
    bench.turns(what, ways, 2.0, lambda _, s: {"ns_edge_layer": 1e9 * s / edges})
    bench.host_row(what, ways["ours"], kernels=10 if training and systems > 1 else 0)


def call(function: Callable[[], Tensor], learned: list[Any], training: bool) -> Callable[[], Any]:
    def infer() -> Any:
        with torch.no_grad():
            return function()

    def train() -> Any:
        return torch.autograd.grad(function().float().sum(), learned, allow_unused=True)

    return train if training else infer


def random_graph(systems: int, atoms: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """numbers [N], edge_index [2, 20·N], edge_vec [20·N, 3] in Å, batch [N]: neighbours at random, of the
    sizes of OC20's batches."""
    draw = torch.Generator().manual_seed(0)
    n = systems * atoms
    target = torch.arange(n).repeat_interleave(NEIGHBOURS)
    source = torch.randint(0, atoms, (n * NEIGHBOURS,), generator=draw) + target // atoms * atoms
    way = torch.nn.functional.normalize(torch.randn(n * NEIGHBOURS, 3, generator=draw), dim=1)
    vectors = way * (2 + 8 * torch.rand(n * NEIGHBOURS, 1, generator=draw))
    numbers = torch.randint(1, 80, (n,), generator=draw)
    batch = torch.arange(systems).repeat_interleave(atoms)
    made = (numbers, torch.stack([source, target]), vectors, batch)
    return tuple(t.to(device) for t in made)  # type: ignore[return-value]


def as_graph(bench: Bench, model: EquiformerV2) -> None:
    """What is left of a call's time when the host starts nothing."""
    graph = random_graph(1, 80, bench.device)
    with torch.no_grad():
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(3):
                model(*graph, 1, pool="max")
        torch.cuda.current_stream().wait_stream(side)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            model(*graph, 1, pool="max")
        eager = lambda: model(*graph, 1, pool="max")  # noqa: E731
        bench.turns(
            "1 x 80 atoms, inference, as a CUDA graph", {"ours": captured.replay, "without": eager}, 1.0
        )
