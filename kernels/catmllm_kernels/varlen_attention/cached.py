"""Attention of growing answers on a CPU: the newest tokens of every row see the keys of their prompt and of
their row, which lie in caches, in float32, by the library behind csrc/attention. No padding: a row may gain
one token or thirty.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._subclasses import FakeTensor

from catmllm_kernels import native
from catmllm_kernels.backend import has_kernel

Integers = NDArray[np.int64]


class _Call(ctypes.Structure):
    """`attention_cached_call` of csrc/attention/attention.h, member for member."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "prompts", "prompt_slots", "own_slots")),
        *((name, ctypes.c_int32) for name in ("threads", "heads", "kv_heads", "width")),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("group", "length", "bounds", "before", "query")),
        *((name, ctypes.c_void_p) for name in ("prompt_key", "prompt_value", "own_key", "own_value", "out")),
    ]


def fits(x: Tensor) -> bool:
    """Whether `cached_attention` is to run beside x: where `varlen_attention` runs csrc on a CPU."""
    return x.device.type == "cpu" and not isinstance(x, FakeTensor) and has_kernel("varlen_attention", x)


def cached_attention(
    query: Tensor,
    prompt: tuple[Tensor, Tensor],
    own: tuple[Tensor, Tensor],
    group: Integers,
    length: Integers,
    bounds: Integers,
    before: Integers,
) -> Tensor:
    """[queries, heads, D] float32 of query [queries, heads, D] to keys and values prompt [prompts, kv, P, D]
    and own [rows, kv, S, D], contiguous float32; those of a row see its prompt, and its own tokens up to
    themselves.

    group [prompts + 1]: the first row of each prompt, whose rows follow each other; length [prompts]: its
    tokens; bounds [rows + 1]: the first query of each row; before [rows]: its own tokens before that one.
    Caches may have more rows than these. Raises ValueError where numbers and shapes disagree, RuntimeError
    for what the library refuses.
    """
    query = query.float().contiguous()
    caches = (*prompt, *own)
    kv, width = prompt[0].shape[1], query.shape[2]
    if any(not c.is_contiguous() or c.dtype != torch.float32 for c in caches):
        raise ValueError("caches must be contiguous and float32")
    if any(c.shape[1] != kv or c.shape[3] != width for c in caches):
        raise ValueError(f"caches {[tuple(c.shape) for c in caches]} of queries {tuple(query.shape)}")
    if prompt[0].shape != prompt[1].shape or own[0].shape != own[1].shape:
        raise ValueError("keys and values of other shapes")
    rows, prompts = len(before), len(length)
    if len(group) != prompts + 1 or len(bounds) != rows + 1 or bounds[0] != 0 or bounds[-1] != len(query):
        raise ValueError(f"{len(query)} queries of {rows} rows of {prompts} prompts: bounds do not agree")
    if rows > len(own[0]) or prompts > len(prompt[0]):
        raise ValueError(f"{rows} rows of {prompts} prompts: the caches have {len(own[0])}, {len(prompt[0])}")
    arrays = [np.ascontiguousarray(x, dtype=np.int64) for x in (group, length, bounds, before)]
    out = torch.empty_like(query)
    call: Any = _Call(
        rows=rows,
        prompts=prompts,
        prompt_slots=prompt[0].shape[2],
        own_slots=own[0].shape[2],
        threads=torch.get_num_threads(),
        heads=query.shape[1],
        kv_heads=kv,
        width=width,
        scale=width**-0.5,
        **dict(zip(("group", "length", "bounds", "before"), (x.ctypes.data for x in arrays))),
        query=query.data_ptr(),
        out=out.data_ptr(),
        **dict(zip(("prompt_key", "prompt_value", "own_key", "own_value"), (c.data_ptr() for c in caches))),
    )
    native.function("attention", "cached")(ctypes.byref(call))
    return out
