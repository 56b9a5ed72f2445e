"""The public op: final norm and pooling in one pass over the node embeddings, with no second [N, (L+1)²,
C] in memory.

Registered with torch.library (`catmllm::so3_pool`). For backward the Triton implementation keeps which atom
attained each maximum and three numbers an atom. `so3_pool_project` adds the linear layer, whose input is
[systems, features].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from catmllm_kernels.backend import implementation

OP = "so3_pool_project"
MODES = ("max", "invariant", "atoms")


def so3_pool(
    x: Tensor, batch: Tensor, n_systems: int, mode: str, norm: tuple[Tensor, Tensor, bool] | None = None
) -> Tensor:
    """Features of systems or atoms from node embeddings.

    x [N, (L+1)^2, C] floating, batch [N] int64 (sorted, the system of each atom), n_systems the number of
    systems; every system needs at least one atom. norm: (scale [L+1, C], bias [C], joint) of the encoder's
    final norm, see `reference.normalised`; None where x is normalised already. Returns [n_systems, (L+1)^2*C]
    (`max`), [n_systems, (L+1)*C] (`invariant`) or [N, C] (`atoms`) in the dtype of x; norms and roots are
    taken in float32 or wider. Raises ValueError for an unknown mode, and for a system without atoms (on CUDA,
    where looking would stall the queue, such a system's features are -inf).

    Two atoms of one system and one of another, lmax 0, two channels:

    >>> x = torch.tensor([[[1.0, 5.0]], [[2.0, 3.0]], [[4.0, 0.0]]])
    >>> so3_pool(x, torch.tensor([0, 0, 1]), n_systems=2, mode="max")
    tensor([[2., 5.],
            [4., 0.]])
    """
    if mode not in MODES:
        raise ValueError(f"unknown pooling {mode!r}; choose {', '.join(MODES[:-1])} or {MODES[-1]}")
    parts, joint = ([], False) if norm is None else ([norm[0].contiguous(), norm[1].contiguous()], norm[2])
    with torch.autocast(x.device.type, enabled=False):
        return _pool(x.contiguous(), batch.contiguous(), parts, n_systems, mode, joint)[0]


def so3_pool_project(
    x: Tensor,
    batch: Tensor,
    n_systems: int,
    mode: str,
    weight: Tensor,
    bias: Tensor | None = None,
    norm: tuple[Tensor, Tensor, bool] | None = None,
) -> Tensor:
    """`so3_pool`, then a linear layer: [n_systems or N, width].
    The features take the dtype of `weight` [width, features].

    >>> x = torch.tensor([[[1.0, 5.0]], [[2.0, 3.0]]])
    >>> so3_pool_project(x, torch.tensor([0, 0]), n_systems=1, mode="max", weight=torch.tensor([[1.0, 10.0]]))
    tensor([[52.]])
    """
    return F.linear(so3_pool(x, batch, n_systems, mode, norm).to(weight.dtype), weight, bias)


def _norm(parts: Sequence[Tensor], joint: bool) -> tuple[Tensor, Tensor, bool] | None:
    return (parts[0], parts[1], joint) if parts else None


def _module(x: Tensor, mode: str) -> Any:
    """`atoms` reads one row of each atom: the definition is as good as a kernel."""
    if mode == "atoms":
        from catmllm_kernels.so3_pool_project import reference

        return reference
    return implementation(OP, x)


@torch.library.custom_op("catmllm::so3_pool", mutates_args=())
def _pool(
    x: Tensor, batch: Tensor, norm: Sequence[Tensor], n_systems: int, mode: str, joint: bool
) -> tuple[Tensor, Tensor, Tensor]:
    features, arg, stats = _module(x, mode).pool_forward(x, batch, n_systems, mode, _norm(norm, joint))
    return features.clone() if mode == "atoms" else features.contiguous(), arg, stats


@_pool.register_fake
def _(
    x: Tensor, batch: Tensor, norm: Sequence[Tensor], n_systems: int, mode: str, joint: bool
) -> tuple[Tensor, Tensor, Tensor]:
    lmax = int(x.shape[1] ** 0.5) - 1
    units = lmax + 1 if mode == "invariant" else x.shape[1]
    if mode == "atoms":
        return (
            x.new_empty(x.shape[0], x.shape[2]),
            x.new_empty(0, dtype=torch.int32),
            x.new_empty(0, 3, dtype=torch.float32),
        )
    features = x.new_empty(n_systems, units * x.shape[2])
    return (
        features,
        x.new_empty(features.shape, dtype=torch.int32),
        x.new_empty(x.shape[0], 3, dtype=torch.float32),
    )


@torch.library.custom_op("catmllm::so3_pool_backward", mutates_args=())
def _pool_backward(
    grad: Tensor,
    features: Tensor,
    arg: Tensor,
    stats: Tensor,
    x: Tensor,
    batch: Tensor,
    norm: Sequence[Tensor],
    n_systems: int,
    mode: str,
    joint: bool,
) -> list[Tensor]:
    return _module(x, mode).pool_backward(
        grad.contiguous(), x, batch, n_systems, mode, _norm(norm, joint), features, arg, stats
    )


@_pool_backward.register_fake
def _(*inputs: Any) -> list[Tensor]:
    *_, x, _batch, norm, _systems, _mode, _joint = inputs
    return [torch.empty_like(t) for t in (x, *norm)]


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, batch, norm, *ctx.rest = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output, x, batch, *norm)


def _gradient(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    features, arg, stats, x, batch, *norm = ctx.saved_tensors
    if grad is None:
        return None, None, [None] * len(norm), None, None, None
    grads = _pool_backward(grad, features, arg, stats, x, batch, norm, *ctx.rest)
    return grads[0], None, grads[1:], None, None, None


_pool.register_autograd(_gradient, setup_context=_context)
