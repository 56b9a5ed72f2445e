"""csrc/rows: the log-softmax of logits, RMSNorm, rotary embedding and SwiGLU on a CPU,
each one pass over memory.

AVX-512, AVX2 or portable, chosen at run time; float32 and bfloat16, which is computed in float32 and rounded
once, where torch's separate operators round after each. Results do not depend on the number of threads. What
takes gradients of these is in `linear_logprob` and `decoder`.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from catmllm_kernels import native

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_WHOLE, _LONG, _REAL, _ARRAY = ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
# What follows dtype and threads in each function of csrc/rows/rows.h.
_ARGUMENTS: dict[str, list[Any]] = {
    "log_softmax": [_LONG, _LONG, _REAL, _ARRAY, _ARRAY, _WHOLE, *[_ARRAY] * 3],
    "log_softmax_gradient": [_LONG, _LONG, _LONG, _REAL, *[_ARRAY] * 6],
    "rms_norm": [_LONG, _LONG, _REAL, *[_ARRAY] * 4],
    "rms_norm_gradient": [_LONG, _LONG, *[_ARRAY] * 6],
    "rotate": [_LONG, _LONG, _LONG, *[_ARRAY] * 3, _WHOLE, _ARRAY],
    "swiglu": [_LONG, *[_ARRAY] * 3],
    "swiglu_gradient": [_LONG, *[_ARRAY] * 5],
}


@cache
def _function(name: str) -> Any:
    function = native.function("rows", name)
    function.argtypes = [_WHOLE, _WHOLE, *_ARGUMENTS[name]]
    return function


def unfit(x: Tensor) -> str:
    """Why these tensors cannot be handled here, or nothing."""
    if x.device.type != "cpu":
        return f"the tensors are on {x.device.type}"
    if x.dtype not in _DTYPES:
        return f"{x.dtype} is for torch's own operators"
    return native.unfit("rows")


def call(name: str, dtype: torch.dtype, *arguments: Tensor | float | None) -> None:
    """Run `rows_<name>`: contiguous tensors by their address, numbers as they are.
    Raises RuntimeError by its message.

    Nothing is done where tensors are fake, as in plans: no values, and no memory beside the arguments.
    """
    if any(isinstance(x, FakeTensor) for x in arguments):
        return
    plain = [x.data_ptr() if isinstance(x, Tensor) else x for x in arguments]
    _function(name)(_DTYPES[dtype], torch.get_num_threads(), *plain)
