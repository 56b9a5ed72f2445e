"""The definition of the three ways in which node embeddings become features for the projection.

`max` is the paper's: flatten every atom's [(L+1)^2, C] and take the maximum over the atoms of a system. For l
> 0 the components turn with the crystal, so the result is not invariant. `invariant` takes the l = 0 channels
and the norm of each degree first. `atoms` keeps every atom, by its l = 0 channels. The encoder's final norm
may be part of it. Ties: the gradient of a maximum that several atoms share goes to the first of them, so that
it is the same every time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from catmllm_kernels.backend import autograd_again


def so3_pool(
    x: Tensor, batch: Tensor, n_systems: int, mode: str, norm: tuple[Tensor, Tensor, bool] | None = None
) -> Tensor:
    """See `op.so3_pool`."""
    y = x if norm is None else normalised(x, *norm)
    if mode == "atoms":
        return y[:, 0]
    features = degree_norms(y).flatten(1) if mode == "invariant" else y.flatten(1)
    counts = torch.bincount(batch, minlength=n_systems)
    if bool((counts == 0).any()):
        raise ValueError("a system without atoms cannot be pooled")
    return _segment_max(features, batch, n_systems)


def normalised(x: Tensor, scale: Tensor, bias: Tensor, joint: bool) -> Tensor:
    """The encoder's norms: [N, S, C] -> the same. scale [L+1, C] by degree, bias [C] of l = 0.

    l = 0 is centred. `joint`: one RMS over all rows, every degree with equal weight (rms_norm_sh); else l = 0
    has a deviation of its own and the RMS is over l > 0 (layer_norm_sh).
    """
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    lmax = int(x.shape[1] ** 0.5) - 1
    degree = degrees(lmax, x.device)
    first = y[:, :1] - y[:, :1].mean(2, keepdim=True)
    share = 1 / (2 * degree + 1).to(y.dtype)
    if joint:
        power = torch.cat([first, y[:, 1:]], 1).square().mean(2) @ (share / (lmax + 1))
        r0 = r = torch.rsqrt(power + EPS)
    else:
        r0 = torch.rsqrt(first.square().mean((1, 2)) + EPS)
        r = torch.rsqrt(y[:, 1:].square().mean(2) @ (share[1:] / max(lmax, 1)) + EPS)
    wide = scale.to(y.dtype)
    rest = y[:, 1:] * r[:, None, None] * wide.index_select(0, degree[1:])
    return torch.cat([first * r0[:, None, None] * wide[0] + bias.to(y.dtype), rest], 1).to(x.dtype)


EPS = 1e-5


def degrees(lmax: int, device: torch.device) -> Tensor:
    """l of each of the (lmax+1)² rows."""
    return torch.repeat_interleave(
        torch.arange(lmax + 1, device=device), 2 * torch.arange(lmax + 1, device=device) + 1
    )


def degree_norms(x: Tensor) -> Tensor:
    """[N, (L+1)^2, C] to [N, L+1, C]: the l = 0 channels as they are,
    for l > 0 the root mean square over m."""
    lmax = int(x.shape[1] ** 0.5) - 1
    parts = [x[:, 0]]
    for l in range(1, lmax + 1):
        rows = x[:, l * l : (l + 1) ** 2].to(torch.promote_types(x.dtype, torch.float32))
        parts.append((rows.square().mean(1) + 1e-12).sqrt().to(x.dtype))
    return torch.stack(parts, 1)


def _segment_max(features: Tensor, batch: Tensor, n_systems: int) -> Tensor:
    """Maximum over the rows of each segment; the gradient follows the first row that attains it."""
    with torch.no_grad():
        index = batch[:, None].expand_as(features)
        top = features.new_full((n_systems, features.shape[1]), -torch.inf)
        top = top.scatter_reduce(0, index, features, "amax", include_self=True)
        rows = torch.arange(len(features), device=features.device)[:, None].expand_as(features)
        # A NaN is its segment's maximum and equals nothing: the first one is taken, so that it stays a NaN.
        candidates = torch.where((features == top[batch]) | features.isnan(), rows, len(features))
        first = torch.full_like(top, len(features), dtype=torch.int64)
        first = first.scatter_reduce(0, index, candidates, "amin", include_self=True)
    return features.gather(0, first)


# ------------------------------------------------------------------------------------------
# as an implementation


def pool_forward(
    x: Tensor, batch: Tensor, n_systems: int, mode: str, norm: tuple[Tensor, Tensor, bool] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(features, zeros, zeros): the backward pass below needs neither, the op promises their shapes."""
    with torch.no_grad():
        features = so3_pool(x, batch, n_systems, mode, norm)
    kept = (0,) if mode == "atoms" else features.shape
    return (
        features,
        x.new_zeros(kept, dtype=torch.int32),
        x.new_zeros(0 if mode == "atoms" else len(x), 3, dtype=torch.float32),
    )


def pool_backward(
    grad: Tensor, x: Tensor, batch: Tensor, n_systems: int, mode: str,
    norm: tuple[Tensor, Tensor, bool] | None, features: Tensor, arg: Tensor, stats: Tensor,
) -> list[Tensor]:  # fmt: skip
    """By autograd through the definition, run once more."""
    leaves = [t.detach().requires_grad_() for t in (x, *(norm or ())[:2])]
    again = None if norm is None else (leaves[1], leaves[2], norm[2])
    with autograd_again():
        out = so3_pool(leaves[0], batch, n_systems, mode, again)
        return list(torch.autograd.grad(out, leaves, grad))
