"""Layers on nodes x [N, S, C] whose S = (lmax+1)² rows are grouped by degree l: norms and linear maps.

Names of parameters are fairchem's. `degree` [S] is the l of every row.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """`norm(x)` in at least float32, rounded once at the end."""
    if x.dtype == norm.weight.dtype:
        return norm(x)  # torch does just that, and keeps x for backward instead of a float32 copy
    y, weight, bias = at_least_float32(x), at_least_float32(norm.weight), at_least_float32(norm.bias)
    return F.layer_norm(y, norm.normalized_shape, weight.to(y.dtype), bias.to(y.dtype), norm.eps).to(x.dtype)


class SphericalLayerNorm(nn.Module):
    """LayerNorm on l = 0; one RMS over all rows l > 0, every degree with equal weight. x [N, S, C]."""

    def __init__(self, lmax: int, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.norm_l0 = nn.LayerNorm(channels, eps=eps)
        self.affine_weight = nn.Parameter(torch.ones(lmax, channels))
        self.lmax, self.eps = lmax, eps

    def forward(self, x: Tensor, degree: Tensor) -> Tensor:
        y, l = at_least_float32(x[:, 1:]), degree[1:]
        power = y.square().mean(2) @ (1 / (self.lmax * (2 * l + 1).to(y.dtype)))
        scale = torch.rsqrt(power + self.eps)[:, None, None] * self.affine_weight.index_select(0, l - 1)
        return torch.cat([layer_norm(x[:, :1], self.norm_l0), (y * scale).to(x.dtype)], dim=1)

    def for_pooling(self) -> tuple[Tensor, Tensor, bool]:
        """Its parameters as `so3_pool` takes them: scale by degree, bias of l = 0, one RMS for all rows."""
        scale = torch.cat([self.norm_l0.weight[None], self.affine_weight])
        return scale, self.norm_l0.bias, False


class SphericalRMSNorm(nn.Module):
    """One RMS over all rows, every degree with equal weight; l = 0 is centred first. x [N, S, C]."""

    def __init__(self, lmax: int, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.affine_weight = nn.Parameter(torch.ones(lmax + 1, channels))
        self.affine_bias = nn.Parameter(torch.zeros(channels))
        self.lmax, self.eps = lmax, eps

    def forward(self, x: Tensor, degree: Tensor) -> Tensor:
        y = at_least_float32(x)
        y = torch.cat([y[:, :1] - y[:, :1].mean(2, keepdim=True), y[:, 1:]], dim=1)
        power = y.square().mean(2) @ (1 / ((self.lmax + 1) * (2 * degree + 1).to(y.dtype)))
        scale = torch.rsqrt(power + self.eps)[:, None, None] * self.affine_weight.index_select(0, degree)
        return (y * scale + first_row(self.affine_bias, len(degree))).to(x.dtype)

    def for_pooling(self) -> tuple[Tensor, Tensor, bool]:
        """See SphericalLayerNorm."""
        return self.affine_weight, self.affine_bias, True


NORMS: dict[str, type[SphericalLayerNorm | SphericalRMSNorm]] = {
    "layer_norm_sh": SphericalLayerNorm,
    "rms_norm_sh": SphericalRMSNorm,
}


def first_row(x: Tensor, n: int) -> Tensor:
    """[C] -> [n, C], x in the first row and zeros below."""
    return F.pad(x[None], (0, 0, 0, n - 1))


class SphericalLinear(nn.Module):
    """One matrix per degree, bias on l = 0. Rows come first here: [S, N, in] -> [S, N, out],
    one batched product."""

    def __init__(self, lmax: int, c_in: int, c_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(lmax + 1, c_out, c_in))
        self.bias = nn.Parameter(torch.empty(c_out))

    def forward(self, x: Tensor, degree: Tensor) -> Tensor:
        weight = self.weight.index_select(0, degree).transpose(1, 2)
        return torch.baddbmm(first_row(self.bias, len(degree))[:, None], x, weight)
