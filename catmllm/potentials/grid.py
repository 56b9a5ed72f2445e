"""What DIEP sees of bonds and of triplets: densities times potentials on a plane of 11 x 11 points, 1 Å apart
(Tawfik et al., Digital Discovery 2024; the `diep` package has the network that was trained on them).

    f(p) = (1/π) Σ_i exp(-|p - x_i|²) · Σ_i √Z_i / √(|p - x_i|² + 1/4)

The atoms of a bond lie on the x axis, its middle at the origin. Those of a triplet have their longest edge
along x, the end nearer to the third atom first, the third atom at y >= 0, and their centroid at the origin.
Both depend on distances alone. A triplet is the same seen from either of its two bonds, so it is computed
once; `diep` computes it twice.

The loops run without the GIL, in the dtype of their arrays. `forward` functions fill features, `backward`
functions turn gradients of features into gradients of bond vectors.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

WIDTH = 11  # grid points along an axis, from -5 to 5 Å
POINTS = WIDTH * WIDTH  # of a triplet, y before x
ROWS = 6  # a bond is its own mirror image in y: the rows y = 0, 1 ... 5 are enough
HALF = 5.0
SOFT = 0.25  # Å^2, keeps 1/r finite
TIE = 1e-6  # Å, lengths that differ by less are equal, and atomic numbers decide
_JIT: dict[str, Any] = {"cache": True, "nogil": True, "fastmath": {"contract", "arcp", "nsz", "reassoc"}}


@njit(**_JIT)
def _envelope(distance, cutoff):
    """The polynomial that ends smoothly at the cutoff (arXiv:2003.03123, exponent 3), and its slope."""
    if distance > cutoff:
        return 0.0, 0.0
    x = distance / cutoff
    return 1 - 10 * x**3 + 15 * x**4 - 6 * x**5, (-30 * x**2 + 60 * x**3 - 30 * x**4) / cutoff


@njit(**_JIT)
def bonds_forward(vectors, roots, ends, cutoff, features):
    """features [E, ROWS · WIDTH] of bonds: vectors [E, 3] (Å), roots [N] = √Z, ends [2, E]. Ended smoothly
    at the cutoff (Å)."""
    one = features.dtype.type(1.0)
    scale = one / features.dtype.type(np.pi)
    for e in range(len(vectors)):
        x, y, z = vectors[e, 0], vectors[e, 1], vectors[e, 2]
        distance = np.sqrt(x * x + y * y + z * z)
        fade = features.dtype.type(_envelope(distance, cutoff)[0]) * scale
        middle = features.dtype.type(distance / 2)
        first, second = roots[ends[0, e]], roots[ends[1, e]]
        for row in range(ROWS):
            height = features.dtype.type(row * row)
            for column in range(WIDTH):
                point = features.dtype.type(column - HALF)
                a, b = (point + middle) ** 2 + height, (point - middle) ** 2 + height
                density = np.exp(-a) + np.exp(-b)
                soft = features.dtype.type(SOFT)
                potential = first / np.sqrt(a + soft) + second / np.sqrt(b + soft)
                features[e, row * WIDTH + column] = fade * density * potential


@njit(**_JIT)
def bonds_backward(vectors, roots, ends, cutoff, gradients, out):
    """Adds to out [E, 3] what the gradients [E, ROWS · WIDTH] of `bonds_forward` are for the vectors."""
    dtype = gradients.dtype.type
    scale = dtype(1.0) / dtype(np.pi)
    for e in range(len(vectors)):
        x, y, z = vectors[e, 0], vectors[e, 1], vectors[e, 2]
        distance = np.sqrt(x * x + y * y + z * z)
        if distance > cutoff:
            continue
        fade, slope = _envelope(distance, cutoff)
        middle = dtype(distance / 2)
        first, second = roots[ends[0, e]], roots[ends[1, e]]
        value, change = dtype(0.0), dtype(0.0)  # of gradient · feature, by the envelope and by the middle
        for row in range(ROWS):
            height = dtype(row * row)
            for column in range(WIDTH):
                left, right = dtype(column - HALF) + middle, dtype(column - HALF) - middle
                a, b = left**2 + height, right**2 + height
                density_a, density_b = np.exp(-a), np.exp(-b)
                inverse_a, inverse_b = dtype(1.0) / (a + dtype(SOFT)), dtype(1.0) / (b + dtype(SOFT))
                pull_a, pull_b = first * np.sqrt(inverse_a), second * np.sqrt(inverse_b)
                density, potential = density_a + density_b, pull_a + pull_b
                gradient = gradients[e, row * WIDTH + column] * scale
                value += gradient * density * potential
                change += gradient * (
                    dtype(2.0) * (right * density_b - left * density_a) * potential
                    + density * (right * inverse_b * pull_b - left * inverse_a * pull_a)
                )
        force = (value * slope + change * fade / 2) / distance
        out[e, 0] += force * x
        out[e, 1] += force * y
        out[e, 2] += force * z


@njit(**_JIT)
def triplets_of(starts, near):
    """Offsets [N + 1]: how many triplets come before those of each atom, which has the first near [N] of its
    bonds, from starts [N] on, within reach; any two of them are a triplet."""
    offsets = np.zeros(len(near) + 1, np.int64)
    for i in range(len(near)):
        offsets[i + 1] = offsets[i] + near[i] * (near[i] - 1) // 2
    return offsets


@njit(**_JIT)
def _triplet(vectors, p, q, z_p, z_q, z_c, corner, axes):
    """The plane of a triplet: bonds p and q from a centre c.

    Fills corner [3] with who is first, second and third (0: end of p, 1: centre, 2: end of q) and axes [2, 3]
    with e_x and e_y; returns the longest edge (Å) and where the third atom is from its middle, x and y.
    """
    px, py, pz = vectors[p, 0], vectors[p, 1], vectors[p, 2]
    qx, qy, qz = vectors[q, 0], vectors[q, 1], vectors[q, 2]
    length_p = np.sqrt(px * px + py * py + pz * pz)
    length_q = np.sqrt(qx * qx + qy * qy + qz * qz)
    length_r = np.sqrt((px - qx) ** 2 + (py - qy) ** 2 + (pz - qz) ** 2)
    # longest edge: p-c, c-q or p-q; of equal ones that of the higher numbers, then the first
    key_p, key_q, key_r = np.round(length_p / TIE), np.round(length_q / TIE), np.round(length_r / TIE)
    u, v, best = 0, 1, key_p
    high, low = max(z_p, z_c), min(z_p, z_c)
    if key_q > best or (key_q == best and (max(z_c, z_q), min(z_c, z_q)) > (high, low)):
        u, v, best, high, low = 1, 2, key_q, max(z_c, z_q), min(z_c, z_q)
    if key_r > best or (key_r == best and (max(z_p, z_q), min(z_p, z_q)) > (high, low)):
        u, v = 0, 2
    w = 3 - u - v
    # the end nearer to the third atom is first; of equally near ones that of the higher number
    if w == 2:
        length, leg_u, leg_v, z_u, z_v = length_p, length_r, length_q, z_p, z_c
    elif w == 0:
        length, leg_u, leg_v, z_u, z_v = length_q, length_p, length_r, z_c, z_q
    else:
        length, leg_u, leg_v, z_u, z_v = length_r, length_p, length_q, z_p, z_q
    if (z_v > z_u) if abs(leg_u - leg_v) <= TIE else leg_v < leg_u:
        u, v = v, u
    corner[0], corner[1], corner[2] = u, v, w
    middle, third = np.zeros(3), np.zeros(3)
    for k in range(3):
        a, b = vectors[p, k], vectors[q, k]
        at_u = a if u == 0 else (b if u == 2 else 0.0)
        at_v = a if v == 0 else (b if v == 2 else 0.0)
        axes[0, k] = (at_v - at_u) / length
        middle[k] = (at_u + at_v) / 2
        third[k] = a if w == 0 else (b if w == 2 else 0.0)
    along = 0.0
    for k in range(3):
        along += (third[k] - middle[k]) * axes[0, k]
    up = 0.0
    for k in range(3):
        axes[1, k] = third[k] - middle[k] - along * axes[0, k]
        up += axes[1, k] ** 2
    up = np.sqrt(up)
    for k in range(3):
        # three atoms in a line have no upper side: nothing pulls there
        axes[1, k] = axes[1, k] / up if up > TIE else 0.0
    return length, along, up


@njit(**_JIT)
def _clouds(vectors, numbers, roots, ends, p, q, corner, axes, x, y, root, density, potential):
    """The triplet of bonds p and q on the grid: sets all from corner on; returns what `_triplet` does."""
    centre, end_p, end_q = ends[0, p], ends[1, p], ends[1, q]
    z_p, z_q, z_c = numbers[end_p], numbers[end_q], numbers[centre]
    length, along, up = _triplet(vectors, p, q, z_p, z_q, z_c, corner, axes)
    # the corners, their centroid at the origin
    x[0], x[1], x[2] = -length / 2 - along / 3, length / 2 - along / 3, along * 2 / 3
    y[0], y[1], y[2] = -up / 3, -up / 3, up * 2 / 3
    density[:] = 0
    potential[:] = 0
    for k in range(3):
        root[k] = roots[end_p if corner[k] == 0 else (end_q if corner[k] == 2 else centre)]
        _cloud(x[k], y[k], root[k], density, potential)
    return length, along, up


@njit(**_JIT)
def triplets_forward(vectors, numbers, roots, ends, starts, near, offsets, cutoff, features):
    """features [T, POINTS] of triplets, times the envelopes of both bonds at the cutoff (Å).

    vectors [E, 3] from centre to neighbour, sorted by centre and then by length; numbers, roots [N] = Z, √Z;
    ends [2, E] (centre, neighbour); starts, near [N] and offsets [N + 1] as in `triplets_of`.
    """
    dtype = features.dtype.type
    corner, axes = np.zeros(3, np.int64), np.zeros((2, 3))
    x, y, root = np.zeros(3), np.zeros(3), np.zeros(3, features.dtype)
    density, potential = np.empty(POINTS, features.dtype), np.empty(POINTS, features.dtype)
    for centre in range(len(near)):
        at = offsets[centre]
        for i in range(near[centre]):
            p = starts[centre] + i
            fade_p = _envelope(_length(vectors, p), cutoff)[0]
            for j in range(i + 1, near[centre]):
                q = starts[centre] + j
                fade = dtype(fade_p * _envelope(_length(vectors, q), cutoff)[0] / np.pi)
                _clouds(vectors, numbers, roots, ends, p, q, corner, axes, x, y, root, density, potential)
                for point in range(POINTS):
                    features[at, point] = fade * density[point] * potential[point]
                at += 1


@njit(**_JIT)
def _length(vectors, e):
    return np.sqrt(vectors[e, 0] ** 2 + vectors[e, 1] ** 2 + vectors[e, 2] ** 2)


@njit(**_JIT)
def _cloud(x, y, root, density, potential):
    """Adds the density and the potential of one atom on the grid."""
    dtype = density.dtype.type
    one, soft = dtype(1.0), dtype(SOFT)
    for row in range(WIDTH):
        dy = dtype(row - HALF - y)
        height = dy * dy
        decay = np.exp(-height)
        for column in range(WIDTH):
            dx = dtype(column - HALF - x)
            at = row * WIDTH + column
            density[at] += decay * np.exp(-dx * dx)
            potential[at] += root * (one / np.sqrt(dx * dx + height + soft))


@njit(**_JIT)
def triplets_backward(vectors, numbers, roots, ends, starts, near, offsets, cutoff, free, gradients, out):
    """Adds to out [E, 3] what the gradients [T, POINTS] of `triplets_forward` are for the vectors, of those
    triplets that have a free [N] atom: on a rigid slab a tenth."""
    dtype = gradients.dtype.type
    corner, axes = np.zeros(3, np.int64), np.zeros((2, 3))
    x, y, gx, gy = np.zeros(3), np.zeros(3), np.zeros(3), np.zeros(3)
    root = np.zeros(3, gradients.dtype)
    density, potential = np.empty(POINTS, gradients.dtype), np.empty(POINTS, gradients.dtype)
    scale = dtype(1.0 / np.pi)
    for centre in range(len(near)):
        at = offsets[centre]
        for i in range(near[centre]):
            p = starts[centre] + i
            length_p = _length(vectors, p)
            fade_p, slope_p = _envelope(length_p, cutoff)
            for j in range(i + 1, near[centre]):
                q = starts[centre] + j
                if not (free[centre] or free[ends[1, p]] or free[ends[1, q]]):
                    at += 1
                    continue
                length_q = _length(vectors, q)
                fade_q, slope_q = _envelope(length_q, cutoff)
                length, along, up = _clouds(
                    vectors, numbers, roots, ends, p, q, corner, axes, x, y, root, density, potential
                )
                value = dtype(0.0)
                for point in range(POINTS):
                    gradient = gradients[at, point] * scale
                    value += gradient * density[point] * potential[point]
                    # what each of the two factors gets
                    density[point], potential[point] = gradient * potential[point], gradient * density[point]
                for k in range(3):
                    gx[k], gy[k] = _cloud_backward(x[k], y[k], root[k], density, potential)
                at += 1
                fade = fade_p * fade_q
                sum_x, sum_y = gx[0] + gx[1] + gx[2], gy[0] + gy[1] + gy[2]
                by_length = fade * (gx[1] - gx[0]) / 2
                by_along = fade * (gx[2] - sum_x / 3)
                by_up = fade * (gy[2] - sum_y / 3)
                for k in range(3):
                    e_x, e_y = axes[0, k], axes[1, k]
                    tilt = (by_along * up * e_y - by_up * along * e_y) / length
                    common = -(by_along * e_x + by_up * e_y) / 2
                    at_u = common - tilt - by_length * e_x
                    at_v = common + tilt + by_length * e_x
                    at_w = by_along * e_x + by_up * e_y
                    to_p = at_u if corner[0] == 0 else (at_v if corner[1] == 0 else at_w)
                    to_q = at_u if corner[0] == 2 else (at_v if corner[1] == 2 else at_w)
                    out[p, k] += to_p + value * slope_p * fade_q * vectors[p, k] / length_p
                    out[q, k] += to_q + value * slope_q * fade_p * vectors[q, k] / length_q


@njit(**_JIT)
def _cloud_backward(x, y, root, by_density, by_potential):
    """What the gradients of density and potential [POINTS] are for an atom's x and y."""
    dtype = by_density.dtype.type
    one, two, soft = dtype(1.0), dtype(2.0), dtype(SOFT)
    gx, gy = dtype(0.0), dtype(0.0)
    for row in range(WIDTH):
        dy = dtype(row - HALF - y)
        height = dy * dy
        decay = two * np.exp(-height)
        for column in range(WIDTH):
            dx = dtype(column - HALF - x)
            at = row * WIDTH + column
            inverse = one / (dx * dx + height + soft)
            pull = by_density[at] * decay * np.exp(-dx * dx) + by_potential[at] * root * inverse * np.sqrt(
                inverse
            )
            gx += pull * dx
            gy += pull * dy
    return gx, gy


@njit(**_JIT)
def sum_forward(features, gates, ends, starts, near, offsets, out):
    """Adds to out [E, POINTS], for each bond of a triplet, its features times the gates [N, POINTS] of the
    atom at the end of the other bond."""
    for centre in range(len(near)):
        at = offsets[centre]
        for i in range(near[centre]):
            p = starts[centre] + i
            for j in range(i + 1, near[centre]):
                q = starts[centre] + j
                end_p, end_q = ends[1, p], ends[1, q]
                for k in range(POINTS):
                    out[p, k] += features[at, k] * gates[end_q, k]
                    out[q, k] += features[at, k] * gates[end_p, k]
                at += 1


@njit(**_JIT)
def sum_backward(features, gates, ends, starts, near, offsets, gradients, by_features, by_gates):
    """What the gradients [E, POINTS] of `sum_forward` are for features (set) and gates (added)."""
    for centre in range(len(near)):
        at = offsets[centre]
        for i in range(near[centre]):
            p = starts[centre] + i
            for j in range(i + 1, near[centre]):
                q = starts[centre] + j
                end_p, end_q = ends[1, p], ends[1, q]
                for k in range(POINTS):
                    a, b, f = gradients[p, k], gradients[q, k], features[at, k]
                    by_features[at, k] = a * gates[end_q, k] + b * gates[end_p, k]
                    by_gates[end_q, k] += a * f
                    by_gates[end_p, k] += b * f
                at += 1
