"""Where rows lie: the functions of layout.py for kernels, which may call only one another.

Tiles in registers are tuples that are indexed at compile time, so a block-diagonal rotation or a Legendre
transform is a few multiplications, and no zero is ever multiplied. Rows in memory may be those of a loop: a
rotation unrolled over the components of a node, which are in registers, and over the rows of an edge too
would be 200 KiB of instructions at L6 M3, each for one use. `row_at`, `half_at` and `order_of` are for such
loops.
"""

# mypy: disable-error-code="assignment, misc"
# (tuples of tiles grow in kernels)

from __future__ import annotations

import triton
import triton.language as tl

from catmllm_kernels.escn import layout

n_rows = triton.constexpr_function(layout.n_rows)
n_half = triton.constexpr_function(layout.n_half)
row_of = triton.constexpr_function(layout.row_of)
half_of = triton.constexpr_function(layout.half_of)
wave_of = triton.constexpr_function(layout.wave_of)
wigner_offset = triton.constexpr_function(layout.wigner_offset)
longitude = triton.constexpr_function(layout.longitude)
lost_order_scale = triton.constexpr_function(layout.lost_order_scale)


@triton.constexpr_function
def first_row(lmax: int, m: int) -> int:
    """The first row of order +m."""
    return row_of(m, m, lmax)


@triton.constexpr_function
def highest(l: int, mmax: int) -> int:
    """The largest order of degree l that is kept."""
    return min(l, mmax)


@triton.constexpr_function
def wave_order(i: int) -> int:
    """The order m of column i of `Sphere.lon`."""
    return (i + 1) // 2 if i % 2 else -(i // 2)


@triton.constexpr_function
def abs_order(i: int) -> int:
    return (i + 1) // 2


@triton.constexpr_function
def blocks_of(n: int) -> int:
    """Columns of a tile for n rows, in blocks of channels: a power of two."""
    return 1 << max(n - 1, 0).bit_length()


@triton.constexpr_function
def at_least(a: int, b: int) -> int:
    return max(a, b)


@triton.constexpr_function
def weight_offset(m: int, lmax: int, c_in: int, c_out: int, extra: int) -> int:
    """Where the matrix of order m begins in `packed_weights`."""
    if m == 0:
        return 0
    first = (lmax + 1) * c_in * (extra + (lmax + 1) * c_out)
    return first + sum(2 * (lmax + 1 - k) ** 2 * c_in * c_out for k in range(1, m))


@triton.jit
def order_of(i):
    """The order m of the i-th row of a degree, in the turn 0, 1, -1, 2, -2, …"""
    return tl.where(i % 2 == 1, (i + 1) // 2, -(i // 2))


@triton.jit
def row_at(l, m, L: tl.constexpr):
    """`row_of` of an order m of a loop."""
    k = tl.abs(m)
    first = 2 * k * (L + 1) - k * (k - 1) - tl.where(k > 0, L + 1, 0)
    return first + tl.where(m < 0, L + 1 - k, 0) + l - k


@triton.jit
def half_at(l, m, L: tl.constexpr):
    """`half_of` of an order m of a loop."""
    k = tl.abs(m)
    return k * (L + 1) - k * (k - 1) // 2 + l - k
