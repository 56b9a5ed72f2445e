"""Attention on a CPU by the library behind csrc/attention (AVX-512, AVX2 or portable, chosen at run time), in
float32 whatever the inputs' dtype: for 16 samples of 54-173 tokens and 6 heads of 32 in bf16, forward and
backward take a fifth of the time of torch's products sample by sample. Results do not depend on the number of
threads.
"""

from __future__ import annotations

import ctypes
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from catmllm_kernels import native
from catmllm_kernels.varlen_attention.layout import Attention, samples

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class _Call(ctypes.Structure):
    """`attention_call` of csrc/attention/attention.h, member for member."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("samples", "groups")),
        *((name, ctypes.c_int32) for name in ("threads", "heads", "kv_heads", "width")),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("bounds", "group", "owned", "query", "key", "value", "out")),
        *((name, ctypes.c_void_p) for name in ("grad_out", "grad_query", "grad_key", "grad_value")),
    ]


def unfit(x: Tensor) -> str:
    """Why these tensors cannot be handled here, or nothing."""
    return native.unfit("attention")


def forward(a: Attention) -> Tensor:
    """[T, H, D] in the dtype of the query."""
    tensors = _floats(a.query, a.key, a.value)
    out = torch.empty_like(tensors[0])
    _run("forward", a, tensors, out)
    return out.to(a.query.dtype)


def backward(grad: Tensor, out: Tensor, a: Attention) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value; `out` is what `forward` returned."""
    *tensors, wide_out, wide_grad = _floats(a.query, a.key, a.value, out, grad)
    gradients = [torch.empty_like(t) for t in tensors]
    _run("backward", a, tensors, wide_out, wide_grad, *gradients)
    of_query, of_key, of_value = (g.to(a.query.dtype) for g in gradients)
    return of_query, of_key, of_value


def _floats(*tensors: Tensor) -> list[Tensor]:
    return [t.float().contiguous() for t in tensors]


def _run(name: str, a: Attention, tensors: list[Tensor], *rest: Tensor) -> None:
    """Call the library; `rest`: out, and for backward its gradient and those of query, key and value."""
    query, key = tensors[:2]
    lengths, owners = samples(a)
    first = [i for i, owner in enumerate(owners) if owner < 0]
    owned = [end - begin > 1 for begin, end in zip(first, [*first[1:], len(owners)])]

    def integers(values: Any) -> Any:
        listed = list(values)
        return (ctypes.c_int64 * len(listed))(*listed)

    arrays = [integers(accumulate(lengths, initial=0)), integers([*first, len(owners)]), integers(owned)]
    names = ("out", "grad_out", "grad_query", "grad_key", "grad_value")
    call: Any = _Call(
        samples=len(lengths),
        groups=len(first),
        threads=torch.get_num_threads(),
        heads=query.shape[1],
        kv_heads=key.shape[1],
        width=query.shape[2],
        scale=a.scale,
        **dict(zip(("query", "key", "value"), (t.data_ptr() for t in tensors))),
        **dict(zip(names, (t.data_ptr() for t in rest))),
    )
    call.bounds, call.group, call.owned = (ctypes.cast(array, ctypes.c_void_p) for array in arrays)
    native.function("attention", name)(ctypes.byref(call))
