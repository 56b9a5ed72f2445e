"""The edge path on a CPU, by the library behind csrc/so2 (AVX-512, AVX2 or portable, chosen at run time).

float32 and float64 run as they are; float16 and bfloat16 run in float32 and are rounded at the end. As many
threads as torch has; results do not depend on their number. CATMLLM_ISA=avx2|portable limits the instruction
set.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from catmllm_kernels import native
from catmllm_kernels.escn.layout import EdgeAttention, EdgeGraph, gradients_of, n_rows

instruction_set = native.instruction_set  # benches ask here, of older commits too
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_MOST_LMAX = 8
_ORDERS = ctypes.c_void_p * (_MOST_LMAX + 1)


def _fields(kind: Any, names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


class _Message(ctypes.Structure):
    """`so2_message` of csrc/so2/so2.h, member for member."""

    _fields_ = [
        *_fields(ctypes.c_int64, "nodes edges"),
        *_fields(ctypes.c_int32, "dtype threads lmax mmax channels hidden heads alpha value radial"),
        *_fields(ctypes.c_int32, "gate latitudes longitudes"),
        *_fields(ctypes.c_double, "eps"),
        *_fields(ctypes.c_void_p, "x edge source target first source_order source_first"),
        *_fields(ctypes.c_void_p, "wigner keep to_lat from_lat lon"),
        *_fields(ctypes.c_void_p, "radial_weight radial_bias norm_weight norm_bias alpha_dot"),
        *_fields(_ORDERS, "conv1"),
        *_fields(ctypes.c_void_p, "conv1_bias"),
        *_fields(_ORDERS, "conv2"),
        *_fields(
            ctypes.c_void_p, "conv2_bias total extra before after attention grad_total grad_x grad_edge"
        ),
        *_fields(ctypes.c_void_p, "grad_radial_weight grad_radial_bias grad_norm_weight grad_norm_bias"),
        *_fields(ctypes.c_void_p, "grad_alpha_dot"),
        *_fields(_ORDERS, "grad_conv1"),
        *_fields(ctypes.c_void_p, "grad_conv1_bias"),
        *_fields(_ORDERS, "grad_conv2"),
        *_fields(ctypes.c_void_p, "grad_conv2_bias"),
    ]


class _Sum(ctypes.Structure):
    """`so2_sum` of csrc/so2/so2.h."""

    _fields_ = [
        *_fields(ctypes.c_int64, "nodes edges"),
        *_fields(ctypes.c_int32, "dtype threads lmax mmax rows heads value"),
        *_fields(ctypes.c_void_p, "target first wigner values attention total grad_total"),
        *_fields(ctypes.c_void_p, "grad_values grad_attention"),
    ]


def unfit(x: Tensor) -> str:
    """Why these nodes cannot be handled here, or nothing."""
    return native.unfit("so2")


def edge_attention_forward(a: EdgeAttention, save: bool) -> tuple[Tensor, ...]:
    dtype, wide = a.x.dtype, _wide(a.x)
    total = torch.empty(len(a.x), a.x.shape[1], a.width, dtype=wide)
    kept: list[Tensor] = []
    if save:
        n_edges, hidden = len(a.radial), n_rows(a.lmax, a.mmax) * a.hidden
        kept = [torch.empty(n_edges, n, dtype=wide) for n in (a.n_extra, hidden, hidden, len(a.alpha_dot))]
    message, _alive = _message(a)
    message.total = total.data_ptr()
    if save:
        message.extra, message.before, message.after, message.attention = (t.data_ptr() for t in kept)
    _call("forward", message)
    if not save:
        return (total.to(dtype),) + (total,) * 4
    return (*(t.to(dtype) for t in (total, *kept[:3])), kept[3])


def edge_attention_backward(
    grad: Tensor, a: EdgeAttention, extra: Tensor, hidden: Tensor, active: Tensor, alpha: Tensor
) -> list[Tensor]:
    wide = _wide(a.x)
    message, _alive = _message(a)
    saved = [t.to(wide).contiguous() for t in (extra, hidden, active, alpha, grad)]
    message.extra, message.before, message.after, message.attention, message.grad_total = (
        t.data_ptr() for t in saved
    )
    gradients = [
        torch.empty_like(t, dtype=wide, memory_format=torch.contiguous_format) for t in gradients_of(a)
    ]
    pointers = iter([g.data_ptr() for g in gradients])
    for name in ("grad_x", "grad_edge", "grad_radial_weight", "grad_radial_bias"):
        setattr(message, name, next(pointers))
    message.grad_conv1 = _ORDERS(*(next(pointers) for _ in a.conv1))
    message.grad_conv1_bias = next(pointers)
    if a.alpha_norm is not None:
        message.grad_norm_weight, message.grad_norm_bias = next(pointers), next(pointers)
    message.grad_alpha_dot = next(pointers)
    message.grad_conv2 = _ORDERS(*(next(pointers) for _ in a.conv2))
    message.grad_conv2_bias = next(pointers)
    _call("backward", message)
    return [g.to(t.dtype) for g, t in zip(gradients, gradients_of(a), strict=True)]


def rotate_back_sum_forward(
    values: Tensor, alpha: Tensor, wigner: Tensor, graph: EdgeGraph, n_nodes: int, lmax: int, mmax: int
) -> Tensor:
    out = torch.empty(n_nodes, (lmax + 1) ** 2, values.shape[2], dtype=_wide(values))
    message, _alive = _sum(values, alpha, wigner, graph, n_nodes, lmax, mmax)
    message.total = out.data_ptr()
    _call("sum_forward", message)
    return out.to(values.dtype)


def rotate_back_sum_backward(
    grad: Tensor, values: Tensor, alpha: Tensor, wigner: Tensor, graph: EdgeGraph, lmax: int, mmax: int
) -> tuple[Tensor, Tensor]:
    wide = _wide(values)
    grad = grad.to(wide).contiguous()
    grad_values, grad_alpha = (torch.empty(t.shape, dtype=wide) for t in (values, alpha))
    message, _alive = _sum(values, alpha, wigner, graph, len(grad), lmax, mmax)
    message.grad_total = grad.data_ptr()
    message.grad_values, message.grad_attention = grad_values.data_ptr(), grad_alpha.data_ptr()
    _call("sum_backward", message)
    return grad_values.to(values.dtype), grad_alpha.to(alpha.dtype)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _message(a: EdgeAttention) -> tuple[_Message, list[Tensor]]:
    """The inputs as the library reads them, and the tensors that must outlive the call."""
    if not 1 <= a.lmax <= _MOST_LMAX:
        raise ValueError(
            f"the CPU kernels know lmax 1 to {_MOST_LMAX}, not {a.lmax}; CATMLLM_KERNELS=reference"
        )
    wide, nodes = _wide(a.x), len(a.x)
    if len(a.radial):
        low, high = (int(t) for t in a.graph.source.aminmax())
        if low < 0 or high >= nodes or int(a.graph.ptr[-1]) != len(a.radial):
            raise IndexError(
                f"an edge begins or ends outside the {nodes} nodes (sources are {low} to {high})"
            )
    alive: list[Tensor] = []

    def pointer(t: Tensor, dtype: torch.dtype = wide) -> int:
        alive.append(t.to(dtype).contiguous())
        return alive[-1].data_ptr()

    message = _Message(
        nodes=nodes,
        edges=len(a.radial),
        dtype=wide.itemsize,
        threads=torch.get_num_threads(),
        lmax=a.lmax,
        mmax=a.mmax,
        channels=a.x.shape[2],
        hidden=a.hidden,
        heads=a.alpha_dot.shape[0],
        alpha=a.alpha_dot.shape[1],
        value=a.width // a.alpha_dot.shape[0],
        radial=a.radial.shape[1],
        gate=a.sphere is None,
        eps=1e-5,
        x=pointer(a.x),
        edge=pointer(a.radial),
        source=pointer(a.graph.source, torch.int64),
        target=pointer(a.graph.target, torch.int64),
        first=pointer(a.graph.ptr, torch.int64),
        source_order=pointer(a.graph.source_order, torch.int64),
        source_first=pointer(a.graph.source_ptr, torch.int64),
        wigner=pointer(a.wigner),
        radial_weight=pointer(a.radial_weight),
        radial_bias=pointer(a.radial_bias),
        alpha_dot=pointer(a.alpha_dot),
        conv1=_ORDERS(*map(pointer, a.conv1)),
        conv1_bias=pointer(a.conv1_bias),
        conv2=_ORDERS(*map(pointer, a.conv2)),
        conv2_bias=pointer(a.conv2_bias),
    )
    if a.keep is not None:
        message.keep = pointer(a.keep)
    if a.alpha_norm is not None:
        message.norm_weight, message.norm_bias = map(pointer, a.alpha_norm)
    if a.sphere is not None:
        message.latitudes, message.longitudes = len(a.sphere.to_lat), len(a.sphere.lon)
        message.to_lat, message.from_lat, message.lon = map(pointer, a.sphere)
    return message, alive


def _sum(
    values: Tensor, alpha: Tensor, wigner: Tensor, graph: EdgeGraph, n_nodes: int, lmax: int, mmax: int
) -> tuple[_Sum, list[Tensor]]:
    wide = _wide(values)
    tensors = [t.to(wide).contiguous() for t in (wigner, values, alpha)] + [graph.target, graph.ptr]
    message = _Sum(
        nodes=n_nodes,
        edges=len(values),
        dtype=wide.itemsize,
        threads=torch.get_num_threads(),
        lmax=lmax,
        mmax=mmax,
        rows=values.shape[1],
        heads=alpha.shape[1],
        value=values.shape[2] // alpha.shape[1],
        **{
            name: t.data_ptr()
            for name, t in zip(("wigner", "values", "attention", "target", "first"), tensors)
        },
    )
    return message, tensors


def _call(name: str, arguments: ctypes.Structure) -> None:
    native.function("so2", name)(ctypes.byref(arguments))
