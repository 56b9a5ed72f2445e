"""Which implementation of an op runs: Triton on CUDA, csrc on a CPU where it exists, else the reference.

A kernel that should be there and is not is said once, as a warning. CATMLLM_KERNELS=triton|cpu|reference forces one for every op,
for tests and timing. Triton on CPU tensors needs TRITON_INTERPRET=1 in the environment before Python starts.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

NAMES = ("triton", "cpu", "reference")


def implementation(op: str, x: Tensor) -> ModuleType:
    """The module `catmllm_kernels.<op>.<triton|cpu|reference>` for tensors like `x`.

    Raises ValueError for a forced name that does not exist, RuntimeError where it cannot run these tensors.
    """
    forced = os.environ.get("CATMLLM_KERNELS", "")
    if forced:
        if forced not in NAMES:
            raise ValueError(f"CATMLLM_KERNELS={forced!r}; choose one of {', '.join(NAMES)}")
        module = _module(op, forced)
        if module is None:
            raise RuntimeError(f"CATMLLM_KERNELS={forced}, but {op} has no such implementation")
        why = _unfit(forced, module, x)
        if why:
            raise RuntimeError(f"CATMLLM_KERNELS={forced} cannot run {op}: {why}")
        return module
    name = {"cuda": "triton", "cpu": "cpu"}.get(x.device.type, "reference")
    module = _module(op, name)
    why = "" if module is None else _unfit(name, module, x)
    if why:
        warn_once(op, why)
    if module is None or why:
        module = _module(op, "reference")
    assert module is not None
    return module


@cache
def warn_once(op: str, why: str) -> None:
    """Say that an op runs by its plain definition where a kernel should be, and why."""
    warnings.warn(f"{op} runs by its plain definition, several times slower: {why}", stacklevel=3)


@cache
def _module(op: str, name: str) -> ModuleType | None:
    path = f"catmllm_kernels.{op}.{name}"
    return importlib.import_module(path) if importlib.util.find_spec(path) else None


def _unfit(name: str, module: ModuleType, x: Tensor) -> str:
    """Why an implementation cannot take x, or nothing."""
    if name == "triton":
        if x.dtype == torch.float64:
            return "float64 is for the reference"
        if x.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            return (
                f"the tensors are on {x.device.type}; set TRITON_INTERPRET=1 to interpret the kernels there"
            )
    elif name == "cpu":
        if x.device.type != "cpu":
            return f"the tensors are on {x.device.type}"
        return str(module.unfit(x))
    return ""


@contextmanager
def autograd_again() -> Iterator[None]:
    """Inside a custom op, whose body torch runs beneath autograd: record again, to differentiate a reference."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.AutogradOther):
        excluded = excluded.remove(key)
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield
