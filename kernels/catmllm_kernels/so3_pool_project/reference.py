"""The definition of the three ways in which node embeddings become features for the projection.

`max` is the paper's: flatten every atom's [(L+1)^2, C] and take the maximum over the atoms of a system. For l > 0 the
components turn with the crystal, so the result is not invariant. `invariant` takes the l = 0 channels and the norm of
each degree first. `atoms` keeps every atom, by its l = 0 channels.
Ties: the gradient of a maximum that several atoms share goes to the first of them, so that it is the same every time.
"""

import torch


def so3_pool(x: torch.Tensor, batch: torch.Tensor, n_systems: int, mode: str) -> torch.Tensor:
    """Features of systems or atoms from node embeddings.

    x [N, (L+1)^2, C] floating, batch [N] int64 (sorted, the system of each atom), n_systems the number of systems;
    every system needs at least one atom. Returns [n_systems, (L+1)^2*C] (`max`), [n_systems, (L+1)*C] (`invariant`)
    or [N, C] (`atoms`). Raises ValueError for an unknown mode or an empty system.
    """
    if mode == "atoms":
        return x[:, 0]
    if mode == "invariant":
        features = degree_norms(x).flatten(1)
    elif mode == "max":
        features = x.flatten(1)
    else:
        raise ValueError(f"unknown pooling {mode!r}; choose max, invariant or atoms")
    counts = torch.bincount(batch, minlength=n_systems)
    if bool((counts == 0).any()):
        raise ValueError("a system without atoms cannot be pooled")
    return _segment_max(features, batch, n_systems)


def degree_norms(x: torch.Tensor) -> torch.Tensor:
    """[N, (L+1)^2, C] to [N, L+1, C]: the l = 0 channels as they are, for l > 0 the root mean square over m."""
    lmax = int(x.shape[1] ** 0.5) - 1
    parts = [x[:, 0]]
    for l in range(1, lmax + 1):
        rows = x[:, l * l : (l + 1) ** 2].to(torch.promote_types(x.dtype, torch.float32))
        parts.append((rows.square().mean(1) + 1e-12).sqrt().to(x.dtype))
    return torch.stack(parts, 1)


def _segment_max(features: torch.Tensor, batch: torch.Tensor, n_systems: int) -> torch.Tensor:
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
