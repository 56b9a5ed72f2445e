"""Where rows lie, as numbers of compile time: the functions of layout.py for kernels,
which may call only one another.

Rows of an edge are tuples of tiles that are indexed at compile time, so a block-diagonal rotation or a
Legendre transform is a few multiplications in registers, and no zero is ever multiplied.
"""

# mypy: disable-error-code="assignment, misc"
# (tuples of tiles grow in kernels)

from __future__ import annotations

import triton

from catmllm_kernels.escn import layout

n_rows = triton.constexpr_function(layout.n_rows)
n_half = triton.constexpr_function(layout.n_half)
row_of = triton.constexpr_function(layout.row_of)
half_of = triton.constexpr_function(layout.half_of)
wave_of = triton.constexpr_function(layout.wave_of)
wigner_offset = triton.constexpr_function(layout.wigner_offset)
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
def at_least(a: int, b: int) -> int:
    return max(a, b)


@triton.constexpr_function
def weight_offset(m: int, lmax: int, c_in: int, c_out: int, extra: int) -> int:
    """Where the matrix of order m begins in `packed_weights`."""
    if m == 0:
        return 0
    first = (lmax + 1) * c_in * (extra + (lmax + 1) * c_out)
    return first + sum(2 * (lmax + 1 - k) ** 2 * c_in * c_out for k in range(1, m))
