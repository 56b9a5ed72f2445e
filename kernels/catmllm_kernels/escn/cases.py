"""Cases of the edge path: odd little graphs for the tests,
the two OC20 models for the compiler and the benches."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from catmllm_kernels.escn import op, reference
from catmllm_kernels.escn.layout import EdgeAttention, Sphere, edge_graph, gradients_of, n_half, wigner_offset
from catmllm_kernels.registry import Case


@dataclass(frozen=True)
class Size:
    """Channels and graph of a case; `degrees` are the edges of each target in turn."""

    lmax: int
    mmax: int
    act: str  # "s2" or "gate"
    degrees: tuple[int, ...]
    channels: int = 4
    hidden: int = 8
    heads: int = 2
    alpha: int = 8
    value: int = 4  # channels a head
    radial: int = 8
    resolution: tuple[int, int] = (8, 7)  # latitudes, longitudes
    norm: bool = True
    keep: bool = False


def inputs(size: Size, dtype: torch.dtype, device: torch.device, seed: int = 0) -> EdgeAttention:
    """Random arguments. Wigner blocks are random rows, not rotations:
    every op here is linear in them all the same."""
    s = size
    generator = torch.Generator().manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float32)

    def random(*shape: int, scale: float = 1.0, of: torch.dtype = dtype) -> Tensor:
        x = (
            torch.randn(shape, generator=generator, dtype=torch.float64) * scale
            if device.type != "meta"
            else torch.empty(shape)
        )
        return x.to(device=device, dtype=of)

    n_nodes, n_edges = len(s.degrees), sum(s.degrees)
    target = torch.repeat_interleave(torch.arange(n_nodes), torch.tensor(s.degrees, dtype=torch.int64))
    source = torch.randint(0, n_nodes, (n_edges,), generator=generator)
    graph = edge_graph(torch.stack([source, target]), n_nodes)
    n0, half = s.lmax + 1, n_half(s.lmax, s.mmax)
    width = s.heads * s.value
    extra = s.heads * s.alpha + s.hidden * (1 if s.act == "s2" else s.lmax)

    def conv(c_in: int, c_out: int, extra: int) -> list[Tensor]:
        rows = [n0 - m for m in range(s.mmax + 1)]
        sizes = [(extra + n0 * c_out, n0 * c_in)] + [(2 * n * c_out, n * c_in) for n in rows[1:]]
        return [random(o, i, scale=(i * (1 + (m > 0))) ** -0.5) for m, (o, i) in enumerate(sizes)]

    lat, lon = s.resolution
    phi = 2 * math.pi * torch.arange(lon, dtype=torch.float64) / lon
    waves = [torch.ones(lon, dtype=torch.float64)]
    for m in range(1, s.mmax + 1):
        waves += [torch.cos(m * phi), torch.sin(m * phi)]
    sphere = Sphere(
        random(lat, half, of=wide),
        random(lat, half, scale=1 / (lat * lon), of=wide),
        torch.stack(waves, 1).to(device=device, dtype=wide),
    )
    return EdgeAttention(
        x=random(n_nodes, n0 * n0, s.channels),
        radial=random(n_edges, s.radial),
        radial_weight=random(half * 2 * s.channels, s.radial, scale=s.radial**-0.5),
        radial_bias=random(half * 2 * s.channels),
        wigner=random(n_edges, wigner_offset(n0, s.mmax), scale=(2 * s.lmax + 1) ** -0.5, of=wide),
        graph=type(graph)(*(t.to(device) for t in graph)),
        conv1=conv(2 * s.channels, s.hidden, extra),
        conv1_bias=random(extra + n0 * s.hidden),
        alpha_norm=(1 + random(s.alpha, scale=0.1), random(s.alpha, scale=0.1)) if s.norm else None,
        alpha_dot=random(s.heads, s.alpha, scale=s.alpha**-0.5),
        conv2=conv(s.hidden, width, 0),
        conv2_bias=random(n0 * width),
        sphere=sphere if s.act == "s2" else None,
        lmax=s.lmax,
        mmax=s.mmax,
        keep=(random(n_edges, s.heads, of=wide) > 0).to(wide) * 2 if s.keep else None,
    )


def arguments(size: Size, dtype: torch.dtype, device: torch.device, seed: int = 0) -> tuple[EdgeAttention]:
    """`inputs`, ready for the op and the definition, with gradients wanted."""
    a = inputs(size, dtype, device, seed)
    for t in gradients_of(a):
        t.requires_grad_()
    return (a,)


def definition(a: EdgeAttention) -> Tensor:
    return reference.edge_attention(a)[0]


def compile_case(size: Size, dtype: torch.dtype) -> None:
    """Every launch of a forward and a backward pass, on meta tensors."""
    from catmllm_kernels.escn import triton

    a = inputs(size, dtype, torch.device("meta"))
    total, *kept = triton.edge_attention_forward(a, True)
    triton.edge_attention_forward(a, False)
    triton.edge_attention_backward(torch.empty_like(total), a, *kept)
    # the edge-degree embedding: m = 0 alone, one head
    values = a.x.new_empty(len(a.radial), size.lmax + 1, size.channels)
    alpha = a.wigner.new_empty(len(a.radial), 1)
    rest = (a.wigner, a.graph)
    triton.rotate_back_sum_forward(values, alpha, *rest, len(a.x), size.lmax, size.mmax)
    triton.rotate_back_sum_backward(torch.empty_like(a.x), values, alpha, *rest, size.lmax, size.mmax)


# Half precision: the longest chain stores twelve times (radial weights, rows, hidden, active, values, sum;
# gradients of values, active, hidden, rows, radial weights and the result), each time with an error of at
# most half a unit in the last place.
TOLERANCE = {torch.float16: 12 * 2.0**-11, torch.bfloat16: 12 * 2.0**-8}
UNEQUAL = (3, 0, 1, 5)  # a lone atom among the others
SIZES = {
    "L2M2 s2": Size(2, 2, "s2", UNEQUAL, resolution=(6, 5)),
    "L3M1 gate": Size(3, 1, "gate", UNEQUAL, norm=False, keep=True),
    "L1M0 s2, odd sizes": Size(1, 0, "s2", (2, 19), 3, 5, 3, 9, 3, 7, (4, 3)),  # more edges than a tile has
    "L2M1 s2, whole tiles": Size(
        2, 1, "s2", (3, 0, 8, 5), 16, 16, 2, 8, 8, 16, (6, 5)
    ),  # as models: no masks
    "L2M2 gate, whole tiles": Size(2, 2, "gate", (16, 0), 16, 32, 2, 8, 8, 16),
    "one atom, no edges": Size(2, 1, "s2", (0,)),
    "no edges, gate": Size(1, 1, "gate", (0, 0, 0)),
}
SLOW = {
    f"L{l}M{m} {act}": Size(l, m, act, (2, 0, 18), 4, 18, 2, 8, 4, 8, (2 * l + 2, 2 * m + 3))
    for l, m in ((2, 0), (3, 3), (4, 2), (5, 4), (6, 2), (6, 3), (6, 6))
    for act in ("s2", "gate")
}
SLOW["as the 31M model, 16 edges"] = Size(4, 2, "s2", (10, 6), 128, 64, 8, 64, 16, 128, (10, 5))
MODELS = {
    "L4M2 s2 31M": Size(4, 2, "s2", (20,) * 63 + (19,), 128, 64, 8, 64, 16, 128, (18, 18)),
    "L6M3 s2 153M": Size(6, 3, "s2", (20,) * 63 + (19,), 128, 64, 8, 64, 16, 128, (18, 18)),
}
MODELS["L4M2 gate"] = replace(MODELS["L4M2 s2 31M"], act="gate")


def case(name: str, size: Size, kind: Literal["test", "slow", "model"]) -> Case:
    return Case(
        op="escn",
        name=name,
        size=kind,
        arguments=lambda dtype, device, seed: arguments(size, dtype, device, seed),
        function=op.edge_attention,
        reference=definition,
        tolerance=TOLERANCE,
        compile=lambda dtype: compile_case(size, dtype),
    )


CASES = [case(name, size, "test") for name, size in SIZES.items()]
CASES += [case(name, size, "slow") for name, size in SLOW.items()]
CASES += [case(name, size, "model") for name, size in MODELS.items()]
