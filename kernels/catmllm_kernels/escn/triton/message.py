"""A whole message forward and backward: the kernels and torch's products in their order."""

from __future__ import annotations

import torch
from torch import Tensor

from catmllm_kernels.escn import layout
from catmllm_kernels.escn.layout import EdgeAttention
from catmllm_kernels.escn.triton.activation import activation_grad
from catmllm_kernels.escn.triton.gather import gather_rotate
from catmllm_kernels.escn.triton.product import (
    column_sum,
    product,
    product_and_activation,
    real_forms,
    slices,
    weight_grad,
)
from catmllm_kernels.escn.triton.scatter import (
    gather_rotate_nodes,
    rotate_back_sum_backward,
    rotate_back_sum_forward,
)
from catmllm_kernels.escn.triton.softmax import attention_grad, attention_weights


def edge_attention_forward(a: EdgeAttention, save: bool) -> tuple[Tensor, ...]:
    weights = torch.addmm(a.radial_bias, a.radial, a.radial_weight.T)
    rows, _ = gather_rotate(a, weights)
    del weights
    extra, hidden, active = product_and_activation(a, rows)
    del rows
    alpha = attention_weights(a, extra)
    values = product(rows_of(active, a), real_forms(a.conv2), a.conv2_bias, a.lmax, a.mmax)
    total = rotate_back_sum_forward(
        values, alpha if a.keep is None else alpha * a.keep, a.wigner, a.graph, len(a.x), a.lmax, a.mmax
    )
    return total, extra, hidden, active, alpha


def rows_of(flat: Tensor, a: EdgeAttention) -> Tensor:
    return flat.view(len(flat), layout.n_rows(a.lmax, a.mmax), a.hidden)


def edge_attention_backward(
    grad: Tensor, a: EdgeAttention, extra: Tensor, hidden: Tensor, active: Tensor, alpha: Tensor
) -> list[Tensor]:
    lmax, mmax = a.lmax, a.mmax
    # the consumer and the second product
    z = rows_of(active, a)
    forms = real_forms(a.conv2)
    values = product(z, forms, a.conv2_bias, lmax, mmax)
    weighted = alpha if a.keep is None else alpha * a.keep
    grad_values, grad_alpha = rotate_back_sum_backward(grad, values, weighted, a.wigner, a.graph, lmax, mmax)
    del values
    if a.keep is not None:
        grad_alpha *= a.keep
    grad_active = torch.empty_like(z)
    conv2 = []
    parts = zip(slices(grad_values, lmax, mmax), slices(z, lmax, mmax), slices(grad_active, lmax, mmax))
    for m, (g, part, into) in enumerate(parts):
        torch.mm(g, forms[m], out=into)
        conv2.append(g.T @ part if m == 0 else weight_grad(g, part))
    conv2_bias = column_sum(slices(grad_values, lmax, mmax)[0])
    del grad_values, forms

    # what comes out of the first product: extra and hidden rows, side by side
    out = extra.new_empty(len(extra), a.n_extra + hidden.shape[1])
    activation_grad(a, extra, hidden, grad_active, out)
    del grad_active
    attention = attention_grad(a, extra, alpha, grad_alpha, out)
    width = (lmax + 1) * a.hidden
    first = out[:, : a.n_extra + width]
    rest = [2 * (lmax + 1 - m) * a.hidden for m in range(1, mmax + 1)]
    grads = [first, *out[:, a.n_extra + width :].split(rest, dim=1)]
    channels = 2 * a.x.shape[2]
    grad_rows = a.x.new_empty(len(extra), layout.n_rows(lmax, mmax), channels)
    for g, form, into in zip(grads, real_forms(a.conv1), slices(grad_rows, lmax, mmax)):
        torch.mm(g, form, out=into)

    # the producer
    weights = torch.addmm(a.radial_bias, a.radial, a.radial_weight.T)
    rows, grad_weights = gather_rotate(a, weights, grad_rows)
    assert grad_weights is not None
    x = gather_rotate_nodes(a, weights, grad_rows)
    del weights, grad_rows
    conv1 = []
    for m, (g, part) in enumerate(zip(grads, slices(rows, lmax, mmax))):
        conv1.append(g.T @ part if m == 0 else weight_grad(g, part))
    return [
        x,
        grad_weights @ a.radial_weight,
        grad_weights.T @ a.radial,
        column_sum(grad_weights),
        *conv1,
        column_sum(first),
        *attention,
        *conv2,
        conv2_bias,
    ]
