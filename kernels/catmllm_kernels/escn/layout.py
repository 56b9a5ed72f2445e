"""How an edge's numbers lie in memory: row orders, packed Wigner blocks, offsets.
Every backend reads this one page.

L = lmax, M = mmax (the largest order kept), S = (L+1)², n_m = L+1-m.

nodes    [N, S, C]    l-major: row l² + l + m, m = -l … l.
rows     [E, R, C]    an edge's rows, m-primary, R = n_0 + 2·Σ_{m≥1} n_m: first m = 0 (l = 0 … L), then
                      for every m = 1 … M all +m (l = m … L), then all -m.
                      The rows of one m are one slice of columns of [E, R·C].
radial   [E, H·C]     one weight per row m >= 0 and channel, H = Σ n_m, in the same order; +m and -m
                      share theirs.
wigner   [E, P]       the rows |m| <= M of every block D^l, block after block: row k = min(l, M) + m of
                      block l starts at offset(l) + k·(2l+1) and runs over the 2l+1 components of a node. P is
                      115 of the 475 entries of a dense [R, S] matrix at L4 M2, 315 of 1813 at L6 M3.
source, target [E]    int64, edges sorted by target; ptr [N+1]: the edges of node n are ptr[n] … ptr[n+1]-1.
source_order [E], source_ptr [N+1]: the same by source, for gradients without atomics.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor


class EdgeGraph(NamedTuple):
    """Who sends to whom, sorted both ways; see the top of this file."""

    source: Tensor
    target: Tensor
    ptr: Tensor
    source_order: Tensor
    source_ptr: Tensor


class Sphere(NamedTuple):
    """The S2 grid in two factors: a point's harmonic is latitude(l, |m|) · longitude(m).

    `to_lat`, `from_lat` [latitudes, H] by rows m >= 0 in radial order; `lon` [longitudes, 2M+1], columns 1,
    cos φ, sin φ, cos 2φ, sin 2φ, … of φ = 2πp/longitudes (`longitude`); float32, or float64 for float64
    inputs. The weights of the quadrature and the scale of cut rows are in `from_lat` and `to_lat`.
    """

    to_lat: Tensor
    from_lat: Tensor
    lon: Tensor


class EdgeAttention(NamedTuple):
    """The arguments of `edge_attention`, here and nowhere else. On one device; all of one dtype but for the
    geometry (wigner, sphere: at least float32), the norm and `alpha_dot`."""

    x: Tensor  # [N, S, C] nodes
    radial: Tensor  # [E, K] last hidden layer of the radial function
    radial_weight: Tensor  # [H·2C, K]
    radial_bias: Tensor  # [H·2C]
    wigner: Tensor  # [E, P] float32 (float64 with float64 nodes)
    graph: EdgeGraph
    conv1: list[Tensor]  # [extra + n_0·C', n_0·2C], then [2·n_m·C', n_m·2C] = (r; s) for m = 1 … mmax
    conv1_bias: Tensor  # [extra + n_0·C']
    alpha_norm: tuple[Tensor, Tensor] | None  # weight and bias [A] of the LayerNorm over the alpha channels
    alpha_dot: Tensor  # [heads, A]
    conv2: list[Tensor]  # [n_0·V, n_0·C'], then [2·n_m·V, n_m·C']
    conv2_bias: Tensor  # [n_0·V]
    sphere: Sphere | None  # None: gates
    lmax: int
    mmax: int
    keep: Tensor | None = None  # [E, heads] factors of alpha (dropout), in alpha's dtype; not differentiated

    @property
    def hidden(self) -> int:
        """C', channels between the two products."""
        return self.conv2[0].shape[1] // (self.lmax + 1)

    @property
    def n_extra(self) -> int:
        """Scalars beside the hidden rows: heads·A for the attention, then C' (S2) or lmax·C' (gates)
        of the activation."""
        return self.conv1[0].shape[0] - (self.lmax + 1) * self.hidden

    @property
    def width(self) -> int:
        """V, channels of a value."""
        return self.conv2_bias.shape[0] // (self.lmax + 1)


LEARNED = (  # what has a gradient, in the order in which an implementation returns them
    "x", "radial", "radial_weight", "radial_bias", "conv1", "conv1_bias", "alpha_norm", "alpha_dot", "conv2",
    "conv2_bias",
)  # fmt: skip


def gradients_of(a: EdgeAttention) -> list[Tensor]:
    """The inputs that have a gradient, in the order of `LEARNED`."""
    return [t for name in LEARNED for t in several(getattr(a, name))]


def with_learned(a: EdgeAttention, tensors: Iterable[Tensor]) -> EdgeAttention:
    """`tensors` in the places of `gradients_of(a)`."""
    taken = iter(tensors)

    def of(part: Any) -> Any:
        return next(taken) if isinstance(part, Tensor) else part and type(part)(next(taken) for _ in part)

    return a._replace(**{name: of(getattr(a, name)) for name in LEARNED})


def several(part: Tensor | Sequence[Tensor] | None) -> list[Tensor]:
    """The tensors of one argument."""
    return [part] if isinstance(part, Tensor) else list(part or ())


def n_rows(lmax: int, mmax: int) -> int:
    """R, the rows of an edge."""
    return 2 * sum(lmax + 1 - m for m in range(mmax + 1)) - (lmax + 1)


def n_half(lmax: int, mmax: int) -> int:
    """H, the rows with m >= 0."""
    return sum(lmax + 1 - m for m in range(mmax + 1))


def row_of(l: int, m: int, lmax: int) -> int:
    """Row (l, m) of an edge, m of either sign."""
    k = abs(m)
    first = 2 * sum(lmax + 1 - j for j in range(k)) - (lmax + 1 if k else 0)
    return first + (lmax + 1 - k if m < 0 else 0) + l - k


def first_row(lmax: int, m: int) -> int:
    """The first row of order +m."""
    return row_of(m, m, lmax)


def half_of(l: int, m: int, lmax: int) -> int:
    """Row (l, |m|) of the radial weights."""
    return sum(lmax + 1 - j for j in range(abs(m))) + l - abs(m)


def wave_of(k: int, negative: int) -> int:
    """The column of `Sphere.lon` of order +k or -k."""
    return 2 * k - 1 + negative if k else 0


def longitude(i: int, p: int, n: int) -> float:
    """Entry [p, i] of `Sphere.lon` of n longitudes, in float64."""
    angle = 2 * math.pi * ((i + 1) // 2 * p % n) / n
    return math.cos(angle) if i % 2 or i == 0 else math.sin(angle)


def kept(lmax: int, mmax: int) -> list[tuple[int, int]]:
    """(l, m) of the rows |m| <= mmax of a node in their order, which is that of the packed Wigner blocks."""
    return [(l, m) for l in range(lmax + 1) for m in range(-min(l, mmax), min(l, mmax) + 1)]


@lru_cache
def rows_of(lmax: int, mmax: int) -> tuple[tuple[int, int], ...]:
    """(l, m) of every row of an edge."""
    return tuple(sorted(kept(lmax, mmax), key=lambda row: row_of(row[0], row[1], lmax)))


@lru_cache
def half_rows_of(lmax: int, mmax: int) -> tuple[tuple[int, int], ...]:
    """(l, m) of every row of the radial weights, m >= 0."""
    return tuple((l, m) for m in range(mmax + 1) for l in range(m, lmax + 1))


def wigner_offset(l: int, mmax: int) -> int:
    """Where block l begins in the packed matrices; of l = L+1 their length P."""
    return sum((2 * min(k, mmax) + 1) * (2 * k + 1) for k in range(l))


def lost_order_scale(l: int, mmax: int) -> float:
    """√((2l+1)/(2M+1)) for l > M, else 1: on the way back, for the rows that were cut."""
    return ((2 * l + 1) / (2 * mmax + 1)) ** 0.5 if l > mmax else 1.0


@lru_cache
def packed_entries(lmax: int, mmax: int) -> tuple[tuple[int, int, int], ...]:
    """(l, m, column 0 … 2l of the block) of every packed Wigner entry."""
    return tuple((l, m, k) for l, m in kept(lmax, mmax) for k in range(2 * l + 1))


def unpack_wigner(wigner: Tensor, lmax: int, mmax: int) -> Tensor:
    """[E, P] -> dense [E, R, S], for tests and pictures."""
    dense = wigner.new_zeros(len(wigner), n_rows(lmax, mmax), (lmax + 1) ** 2)
    places = [(row_of(l, m, lmax), l * l + k) for l, m, k in packed_entries(lmax, mmax)]
    rows, columns = zip(*places, strict=True)
    dense[:, list(rows), list(columns)] = wigner
    return dense


def edge_graph(edge_index: Tensor, n_nodes: int) -> EdgeGraph:
    """The graph of `edge_index` [2, E] int64 (source, target), which must be sorted by target.

    >>> edge_graph(torch.tensor([[1, 0, 2], [0, 1, 1]]), n_nodes=3).ptr
    tensor([0, 1, 3, 3])
    """
    source, target = edge_index.unbind(0)
    ends = torch.arange(n_nodes + 1, device=target.device)
    order = torch.argsort(source, stable=True)
    return EdgeGraph(
        source.contiguous(),
        target.contiguous(),
        torch.searchsorted(target.contiguous(), ends),
        order,
        torch.searchsorted(source.index_select(0, order), ends),
    )
