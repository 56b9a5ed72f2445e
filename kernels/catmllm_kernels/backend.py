"""Which implementation of an op runs: Triton on CUDA, csrc on a CPU where it exists, else the reference.

An op's folder has `op.py` (what callers import), `reference.py` and, where they exist, `triton` and `cpu.py`.
CATMLLM_KERNELS=triton|cpu|reference asks for one in every op, for tests and timing; an op that has no such
implementation runs its reference. Triton on CPU tensors needs TRITON_INTERPRET=1 in the environment before
Python starts.

An implementation names the dtypes that it takes in `DTYPES`, and may say in `unfit(x)` why it cannot run at
all. Other dtypes are the reference's by design. A kernel that should run and cannot is said once, as a
warning.
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


def forced() -> str:
    """The implementation that CATMLLM_KERNELS asks for, or nothing.
    Raises ValueError for a name that does not exist."""
    name = os.environ.get("CATMLLM_KERNELS", "")
    if name not in ("", *NAMES):
        raise ValueError(f"CATMLLM_KERNELS={name!r}; choose one of {', '.join(NAMES)}")
    return name


def implementation(op: str, x: Tensor) -> ModuleType:
    """The module `catmllm_kernels.<op>.<triton|cpu|reference>` for tensors like `x`.

    Raises ValueError for a forced name that does not exist, RuntimeError where it cannot run these tensors.
    """
    module, why = _choice(op, x)
    if why and forced():
        raise RuntimeError(f"CATMLLM_KERNELS={forced()} cannot run {op}: {why}")
    reference = _module(op, "reference")
    assert reference is not None
    return reference if module is None or why else module


def has_kernel(op: str, x: Tensor) -> bool:
    """Whether something faster than the reference runs tensors like `x`.
    Raises ValueError for a forced name that does not exist."""
    module, why = _choice(op, x)
    return module is not None and not why and module is not _module(op, "reference")


def _choice(op: str, x: Tensor) -> tuple[ModuleType | None, str]:
    """What should run x, if there is such a module, and why it cannot, or nothing."""
    name = forced() or {"cuda": "triton", "cpu": "cpu"}.get(x.device.type, "reference")
    module = _module(op, name)
    if module is None or name == "reference":
        return module, ""
    if x.dtype not in module.DTYPES:
        return module, f"{x.dtype} is for the reference"
    why = _unfit(name, module, x)
    if why and not forced():
        warn_once(op, why)
    return module, why


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
    if name == "cpu":
        return f"the tensors are on {x.device.type}" if x.device.type != "cpu" else str(module.unfit(x))
    if x.device.type == "meta" or isinstance(x, torch._subclasses.FakeTensor):
        return ""  # no data: nothing runs, its starts are counted or written down
    if x.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensors are on {x.device.type}; set TRITON_INTERPRET=1 to interpret the kernels there"
    return ""


@contextmanager
def autograd_again() -> Iterator[None]:
    """Inside a custom op, whose body torch runs beneath autograd: record again,
    to differentiate a reference."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.AutogradOther):
        excluded = excluded.remove(key)
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield
