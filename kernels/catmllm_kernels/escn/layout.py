"""How an edge's numbers lie in memory: row orders, packed Wigner blocks, offsets. Every backend reads this one page.

L = lmax, M = mmax (the largest order kept), S = (L+1)², n_m = L+1-m.

nodes    [N, S, C]    l-major: row l² + l + m, m = -l … l.
rows     [E, R, C]    an edge's rows, m-primary, R = n_0 + 2·Σ_{m≥1} n_m: first m = 0 (l = 0 … L), then for every
                      m = 1 … M all +m (l = m … L), then all -m. The rows of one m are one slice of columns of [E, R·C].
radial   [E, H·C]     one weight per row m >= 0 and channel, H = Σ n_m, in the same order; +m and -m share theirs.
wigner   [E, P]       the rows |m| <= M of every block D^l, block after block: row k = min(l, M) + m of block l starts
                      at offset(l) + k·(2l+1) and runs over the 2l+1 components of a node. P is 115 of the 475 entries
                      of a dense [R, S] matrix at L4 M2, 315 of 1813 at L6 M3.
source, target [E]    int64, edges sorted by target; ptr [N+1]: the edges of node n are ptr[n] … ptr[n+1]-1.
source_order [E], source_ptr [N+1]: the same by source, for gradients without atomics.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

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

    `to_lat`, `from_lat` [latitudes, H] by rows m >= 0 in radial order; `lon` [longitudes, 2M+1], columns 1, cos φ, sin φ, cos 2φ,
    sin 2φ, …; float32, or float64 for float64 inputs. The weights of the quadrature and the scale of cut rows
    are in `from_lat` and `to_lat`.
    """

    to_lat: Tensor
    from_lat: Tensor
    lon: Tensor


class EdgeAttention(NamedTuple):
    """The arguments of `edge_attention`, as implementations get them. All contiguous, on one device."""

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
    keep: Tensor | None  # [E, heads] factors of alpha (dropout), in alpha's dtype; not differentiated

    @property
    def hidden(self) -> int:
        """C', channels between the two products."""
        return self.conv2[0].shape[1] // (self.lmax + 1)

    @property
    def n_extra(self) -> int:
        """Scalars beside the hidden rows: heads·A for the attention, then C' (S2) or lmax·C' (gates) of the activation."""
        return self.conv1[0].shape[0] - (self.lmax + 1) * self.hidden

    @property
    def width(self) -> int:
        """V, channels of a value."""
        return self.conv2_bias.shape[0] // (self.lmax + 1)


def gradients_of(a: EdgeAttention) -> list[Tensor]:
    """The inputs that have a gradient, in the order in which an implementation returns those."""
    learned = [a.x, a.radial, a.radial_weight, a.radial_bias, *a.conv1, a.conv1_bias]
    return [*learned, *(a.alpha_norm or ()), a.alpha_dot, *a.conv2, a.conv2_bias]


def n_rows(lmax: int, mmax: int) -> int:
    """R, the rows of an edge."""
    return 2 * sum(lmax + 1 - m for m in range(mmax + 1)) - (lmax + 1)


def n_half(lmax: int, mmax: int) -> int:
    """H, the rows with m >= 0."""
    return sum(lmax + 1 - m for m in range(mmax + 1))


def first_row(lmax: int, m: int) -> int:
    """The first row of order +m."""
    return 0 if m == 0 else 2 * sum(lmax + 1 - k for k in range(m)) - (lmax + 1)


@lru_cache
def rows_of(lmax: int, mmax: int) -> tuple[tuple[int, int], ...]:
    """(l, m) of every row of an edge."""
    rows = [(l, 0) for l in range(lmax + 1)]
    for m in range(1, mmax + 1):
        rows += [(l, m) for l in range(m, lmax + 1)] + [(l, -m) for l in range(m, lmax + 1)]
    return tuple(rows)


def wigner_offset(l: int, mmax: int) -> int:
    """Where block l begins in the packed matrices; of l = L+1 their length P."""
    return sum((2 * min(k, mmax) + 1) * (2 * k + 1) for k in range(l))


def lost_order_scale(l: int, mmax: int) -> float:
    """√((2l+1)/(2M+1)) for l > M, else 1: on the way back, for the rows that were cut."""
    return ((2 * l + 1) / (2 * mmax + 1)) ** 0.5 if l > mmax else 1.0


@lru_cache
def packed_entries(lmax: int, mmax: int) -> tuple[tuple[int, int], ...]:
    """(row of the edge, row of the node) of every packed Wigner entry."""
    row = {lm: i for i, lm in enumerate(rows_of(lmax, mmax))}
    return tuple(
        (row[l, m], l * l + k)
        for l in range(lmax + 1)
        for m in range(-min(l, mmax), min(l, mmax) + 1)
        for k in range(2 * l + 1)
    )


def unpack_wigner(wigner: Tensor, lmax: int, mmax: int) -> Tensor:
    """[E, P] -> dense [E, R, S], for tests and pictures."""
    dense = wigner.new_zeros(len(wigner), n_rows(lmax, mmax), (lmax + 1) ** 2)
    rows, columns = zip(*packed_entries(lmax, mmax), strict=True)
    dense[:, list(rows), list(columns)] = wigner
    return dense


def edge_graph(edge_index: Tensor, n_nodes: int) -> EdgeGraph:
    """The graph of `edge_index` [2, E] int64 (source, target), which must be sorted by target."""
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
