"""Constant tables of the rotation group: real spherical harmonics, Wigner matrices and sphere grids.

The conventions are e3nn's, which fairchem's checkpoints rely on: real harmonics with **y** as the polar axis,
rows of a degree l ordered m = -l … l, so that degree 1 is the vector (x, y, z) itself and D¹(R) = R.
"l-primary" rows run over l, then m; an edge's rows are "m-primary", in the order of
`catmllm_kernels.escn.layout`. Everything is computed in float64 with NumPy; no e3nn at run time.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from catmllm_kernels.escn import layout

_POLE = 1e-18  # sin(polar angle) below which an edge counts as parallel to the y axis


def degrees_and_orders(lmax: int) -> tuple[np.ndarray, np.ndarray]:
    """Degree l and order m of each of the (lmax+1)² l-primary rows, int64."""
    l = np.concatenate([np.full(2 * l + 1, l) for l in range(lmax + 1)])
    m = np.concatenate([np.arange(-l, l + 1) for l in range(lmax + 1)])
    return l, m


def real_spherical_harmonics(lmax: int, directions: np.ndarray) -> np.ndarray:
    """Harmonics that are orthonormal on the sphere: unit vectors [..., 3] -> [..., (lmax+1)²]."""
    x, y, z = np.moveaxis(np.asarray(directions, dtype=np.float64), -1, 0)
    sine, azimuth = np.hypot(x, z), np.arctan2(x, z)
    harmonics = np.empty((*y.shape, (lmax + 1) ** 2))
    for m in range(lmax + 1):
        # associated Legendre polynomials of order m without the Condon-Shortley sign, upwards in l
        below, legendre = np.zeros_like(y), math.prod(range(1, 2 * m, 2)) * sine**m
        for l in range(m, lmax + 1):
            norm = math.sqrt((2 * l + 1) / (4 * math.pi) * math.factorial(l - m) / math.factorial(l + m))
            if m == 0:
                harmonics[..., l * l + l] = norm * legendre
            else:
                harmonics[..., l * l + l + m] = math.sqrt(2) * norm * legendre * np.cos(m * azimuth)
                harmonics[..., l * l + l - m] = math.sqrt(2) * norm * legendre * np.sin(m * azimuth)
            below, legendre = legendre, ((2 * l + 1) * y * legendre - (l + m) * below) / (l + 1 - m)
    return harmonics


@lru_cache
def axis_swap(lmax: int) -> np.ndarray:
    """J [(lmax+1)², (lmax+1)²]: the half turn about x + y, which exchanges the x and y axes; J² = 1.

    It turns a rotation about y, which is sparse in this basis, into one about x: D(R_x(β)) = J·X(β)·J. From
    its definition Y(Pv) = J·Y(v) and the orthonormality of Y, by a quadrature that is exact for these
    degrees.
    """
    nodes, weights = np.polynomial.legendre.leggauss(lmax + 1)
    azimuth = 2 * np.pi * np.arange(2 * lmax + 1) / (2 * lmax + 1)
    y, phi = np.meshgrid(nodes, azimuth, indexing="ij")
    sine = np.sqrt(1 - y**2)
    v = np.stack([sine * np.sin(phi), y, sine * np.cos(phi)], axis=-1).reshape(-1, 3)
    w = np.repeat(weights, len(azimuth)) * 2 * np.pi / len(azimuth)
    swapped = v[:, [1, 0, 2]] * np.array([1, 1, -1])
    J = real_spherical_harmonics(lmax, swapped).T @ (w[:, None] * real_spherical_harmonics(lmax, v))
    l, _ = degrees_and_orders(lmax)
    return np.where(l[:, None] == l[None, :], J, 0.0)


def packed_entries(lmax: int, mmax: int) -> np.ndarray:
    """l, m and column of every entry of an edge's packed matrices, int64 [3, P],
    in the order that the kernels read."""
    return np.array(layout.packed_entries(lmax, mmax)).T


@lru_cache
def wigner_table(lmax: int, mmax: int) -> np.ndarray:
    """The packed entries of D(R_x(β)·R_y(γ)) = J·X(β)·J·X(γ) as a table [(2·lmax+1)², P].

    They are bilinear in (1, cos β … cos lmax·β, sin β … sin lmax·β) and the same of γ;
    the table's first axis runs over those products, γ fastest.
    """
    l, m = degrees_and_orders(lmax)
    J, mirror = axis_swap(lmax), l * l + l - m
    turns = []  # X(θ) = Σ_k cos(kθ)·[|m| = k] + sin(kθ)·[row m, column -m: -sign(m)]
    for k in range(lmax + 1):
        turns.append(np.diag((np.abs(m) == k).astype(np.float64)))
    for k in range(1, lmax + 1):
        X = np.zeros_like(J)
        X[np.arange(len(m)), mirror] = np.where(np.abs(m) == k, -np.sign(m), 0)
        turns.append(X)
    entry_l, entry_m, column = packed_entries(lmax, mmax)
    row, column = entry_l * entry_l + entry_l + entry_m, entry_l * entry_l + column
    return np.stack([((J @ X_beta @ J) @ X_gamma)[row, column] for X_beta in turns for X_gamma in turns])


@lru_cache
def sphere_grid(lmax: int, mmax: int, resolution: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Matrices to and from a latitude × longitude grid, both [points, (lmax+1)²], latitude slowest.

    `resolution` points each way (even); None takes fairchem's least grid, 2(lmax+1) latitudes. Component
    normalisation as e3nn's ToS2Grid/FromS2Grid; quadrature of Driscoll and Healy. Scaled for l > mmax.
    """
    n_lat = resolution or 2 * (lmax + 1)
    n_lon = resolution or (2 * mmax + 3 if lmax == mmax else 2 * mmax + 1)
    if n_lat % 2 or n_lat < 2 * (lmax + 1):
        raise ValueError(
            f"grid_resolution must be even and at least {2 * (lmax + 1)} for lmax {lmax}, not {resolution}"
        )
    polar = np.pi * (np.arange(n_lat) + 0.5) / n_lat
    azimuth = 2 * np.pi * np.arange(n_lon) / n_lon
    odd = np.arange(1, n_lat, 2)
    weights = 4 / n_lat * np.sin(polar) * (np.sin(odd * polar[:, None]) / odd).sum(1) * 2 * np.pi / n_lon
    beta, alpha = np.meshgrid(polar, azimuth, indexing="ij")
    points = np.stack([np.sin(beta) * np.sin(alpha), np.cos(beta), np.sin(beta) * np.cos(alpha)], axis=-1)
    Y = real_spherical_harmonics(lmax, points.reshape(-1, 3))
    l, _ = degrees_and_orders(lmax)
    component = np.sqrt(4 * np.pi / ((2 * l + 1) * (lmax + 1)))
    scale = np.array([layout.lost_order_scale(degree, mmax) for degree in l])
    return Y * component * scale, Y * np.repeat(weights, n_lon)[:, None] / component * scale


def edge_sphere(lmax: int, mmax: int, resolution: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`sphere_grid` of an edge's rows in two factors: a harmonic is latitude(l, |m|) · longitude(m).

    To and from the latitudes, both [latitudes, H] by m-primary rows m >= 0,
    and [longitudes, 2·mmax+1] by 1, cos φ, sin φ, cos 2φ, ….
    """
    to_grid, from_grid = sphere_grid(lmax, mmax, resolution)
    n_lat = resolution or 2 * (lmax + 1)
    n_lon = len(to_grid) // n_lat
    half = [l * l + l + m for l, m in layout.half_rows_of(lmax, mmax)]
    azimuth = 2 * np.pi * np.arange(n_lon) / n_lon
    lon = np.stack(
        [np.ones(n_lon)] + [f(m * azimuth) for m in range(1, mmax + 1) for f in (np.cos, np.sin)], 1
    )
    # at φ = 0 the harmonics of m >= 0 are their latitude factors
    return to_grid[::n_lon, half], from_grid[::n_lon, half], lon


def harmonics(cosine: Tensor, sine: Tensor, n: int) -> Tensor:
    """(1, cos θ … cos nθ, sin θ … sin nθ) [E, 2n+1] from cos θ and sin θ [E]."""
    cosines, sines = [torch.ones_like(cosine)], [torch.zeros_like(sine)]
    for _ in range(n):
        c, s = cosines[-1], sines[-1]
        cosines.append(c * cosine - s * sine)
        sines.append(s * cosine + c * sine)
    return torch.stack(cosines + sines[1:], dim=1)


class SphereTables(nn.Module):
    """The tables above as non-persistent float64 buffers that stay exact.

    `.half()`, `.to(device)` and `to_empty` of the model move them but never round or lose them: they are
    filled again from NumPy. What runs in a lower precision is cast once per forward pass.
    """

    degree: Tensor  # [S] l of every l-primary row
    entry_order: Tensor  # [P] |m| of every packed Wigner entry
    entry_sign: Tensor  # [P] -sign(m)
    entry_mirror: Tensor  # [P] the entry of the same l and column with -m
    wigner: Tensor  # [(2·lmax+1)², P] `wigner_table`
    node_to_grid: Tensor  # [P', S] all orders
    node_from_grid: Tensor  # [S, P']
    edge_to_lat: Tensor  # [latitudes, H] rows m >= 0 up to mmax, m-primary
    edge_from_lat: Tensor  # [latitudes, H]
    edge_lon: Tensor  # [longitudes, 2·mmax+1] 1, cos φ, sin φ, cos 2φ, …

    def __init__(self, lmax: int, mmax: int, resolution: int | None) -> None:
        super().__init__()
        self.lmax, self.mmax, self.resolution = lmax, mmax, resolution
        self.fill(torch.device("cpu"))

    def fill(self, device: torch.device) -> None:
        """(Re)compute every buffer on `device`."""
        degree, _ = degrees_and_orders(self.lmax)
        l, m, _ = packed_entries(self.lmax, self.mmax)
        node_to, node_from = sphere_grid(self.lmax, self.lmax, self.resolution)
        to_lat, from_lat, lon = edge_sphere(self.lmax, self.mmax, self.resolution)
        tables = {
            "degree": degree,
            "entry_order": np.abs(m),
            "entry_sign": -np.sign(m).astype(np.float64),
            "entry_mirror": np.arange(len(m)) - 2 * m * (2 * l + 1),
            "wigner": wigner_table(self.lmax, self.mmax),
            "node_to_grid": node_to,
            "node_from_grid": node_from.T,
            "edge_to_lat": to_lat,
            "edge_from_lat": from_lat,
            "edge_lon": lon,
        }
        for name, table in tables.items():
            self.register_buffer(
                name, torch.tensor(np.ascontiguousarray(table), device=device), persistent=False
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.fill(self.degree.device)
        return self

    @torch.no_grad()
    def rotation(self, edge_vec: Tensor, edge_rot_mat: Tensor | None = None) -> Tensor:
        """Packed Wigner matrices [E, P] float64 that turn every edge onto +y.

        Float64 whatever `edge_vec` is: in float32 they err by 6e-7 at l = 6, and a layer's gradients by
        2.9e-6 for it; calculated once a forward pass, they cost nothing that could be measured.

        `edge_vec` [E, 3] needs no length. The remaining angle about the edge is free; it is 0 here, so that
        equal edges have equal frames, unless `edge_rot_mat` [E, 3, 3] fixes the whole frame (its second row
        is then the edge). Detached, as fairchem's are. An edge of length 0 gets the identity's frame.
        """
        if edge_rot_mat is not None:
            edge_rot_mat = edge_rot_mat.double()
        direction = edge_vec.double() if edge_rot_mat is None else edge_rot_mat[:, 1]
        length = torch.linalg.vector_norm(direction, dim=1)
        x, y, z = (direction / torch.where(length > 0, length, 1)[:, None]).unbind(1)
        y = torch.where(length > 0, y, 1)
        sine = torch.hypot(x, z)
        pole = sine < _POLE
        divisor = torch.where(pole, 1, sine)
        cos_gamma, sin_gamma = torch.where(pole, 1, -z / divisor), torch.where(pole, 0, x / divisor)
        return self._from_angles((y, sine), (cos_gamma, sin_gamma), edge_rot_mat)

    def _from_angles(
        self, beta: tuple[Tensor, Tensor], gamma: tuple[Tensor, Tensor], edge_rot_mat: Tensor | None
    ) -> Tensor:
        """X(α)·D(R_x(β))·X(γ) from (cos, sin) of β and γ; α from what `edge_rot_mat` has beyond them."""
        of_beta, of_gamma = (harmonics(*angle, self.lmax) for angle in (beta, gamma))
        products = (of_beta[:, :, None] * of_gamma[:, None, :]).flatten(1)
        wigner = products @ self.wigner.to(products.dtype)
        if edge_rot_mat is None:
            return wigner
        # R·R₀ᵀ = R_y(α); the first row of R₀ = R_x(β)·R_y(γ) is (cos γ, 0, sin γ)
        cos_alpha = edge_rot_mat[:, 0, 0] * gamma[0] + edge_rot_mat[:, 0, 2] * gamma[1]
        sin_alpha = -(edge_rot_mat[:, 2, 0] * gamma[0] + edge_rot_mat[:, 2, 2] * gamma[1])
        cosines, sines = harmonics(cos_alpha, sin_alpha, self.lmax).split([self.lmax + 1, self.lmax], dim=1)
        sines = F.pad(sines, (1, 0))[:, self.entry_order] * self.entry_sign.to(sines.dtype)
        return wigner * cosines[:, self.entry_order] + wigner[:, self.entry_mirror] * sines
