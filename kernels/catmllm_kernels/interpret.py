"""Triton's interpreter made strict: memory poisoned, programs in any order, bytes counted.

Needs TRITON_INTERPRET=1 before Python starts. Everything here is a context manager over the interpreter's own
entry points; a kernel sees no difference.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import TensorHandle, interpreter_builder

from catmllm_kernels import launch as launching

# Before 3.9 Triton's interpreter calculates with bfloat16's bits in more places than `strict` mends: errors
# of 1e2 with 3.7.1.
INTERPRETS_BFLOAT16 = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 9)


@contextmanager
def strict(seed: int | None = None) -> Iterator[None]:
    """What is allocated and never written is NaN; bfloat16 is arithmetic;
    programs run in shuffled order if seed is given."""
    memory: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = True
    options = interpreter_builder.options
    # It works out whether integers overflow, and drops the verdict unless it debugs: a third of its time.
    interpreter_builder.options = replace(options, sanitize_overflow=options.debug)
    interpreter_builder.set_grid_idx = _visitor(seed)
    interpreter_builder.create_dot = _dot
    interpreter_builder.create_fneg = _negative
    try:
        yield
    finally:
        for name in ("create_dot", "create_fneg", "set_grid_idx"):
            delattr(interpreter_builder, name)
        interpreter_builder.options = options
        torch.use_deterministic_algorithms(before[0])
        memory.fill_uninitialized_memory = before[1]


def _visitor(seed: int | None) -> Any:
    """`set_grid_idx` that maps the interpreter's order to another one."""

    def visit(x: int, y: int, z: int) -> None:
        nx, ny, nz = interpreter_builder.grid_dim
        programs = list(itertools.product(range(nx), range(ny), range(nz)))
        if seed is not None:
            random.Random(seed).shuffle(programs)
        interpreter_builder.grid_idx = programs[(x * ny + y) * nz + z]

    return visit


# The interpreter keeps bfloat16 as raw 16-bit integers and would calculate with those. Kernels calculate in
# float32, but for two operations on what they loaded.


def _dot(a: Any, b: Any, *rest: Any) -> Any:
    def float32(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    return type(interpreter_builder).create_dot(interpreter_builder, float32(a), float32(b), *rest)


def _negative(x: Any) -> Any:
    if x.dtype.scalar == tl.bfloat16:
        return TensorHandle(x.data ^ np.uint16(0x8000), tl.bfloat16)
    return type(interpreter_builder).create_fneg(interpreter_builder, x)


@dataclass
class Traffic:
    """Bytes of one launch by name of the tensor argument.

    `asked`: every lane that is not masked off. `moved`: of every load and store the different addresses.
    `touched`: of the launch the different addresses.
    """

    kernel: str
    asked: dict[str, int] = field(default_factory=dict)
    moved: dict[str, int] = field(default_factory=dict)
    touched: dict[str, int] = field(default_factory=dict)


@contextmanager
def counted() -> Iterator[list[Traffic]]:
    """Within, every launch adds a `Traffic`."""
    builder = type(interpreter_builder)
    found: list[Traffic] = []
    plain = launching.run

    def run(start: launching.Launch) -> None:
        names = start.kernel.arg_names
        given = [(n, t) for n, t in zip(names, start.arguments) if isinstance(t, torch.Tensor) and t.numel()]
        spans = [(n, t.data_ptr(), t.data_ptr() + _extent(t)) for n, t in given]
        asked: dict[str, int] = dict.fromkeys((n for n, _ in given), 0)
        moved = dict(asked)
        seen: dict[str, list[np.ndarray]] = {n: [] for n, _ in given}
        size = {n: t.element_size() for n, t in given}

        def note(pointers: Any, mask: Any) -> None:
            lanes = np.broadcast_to(pointers.data, mask.data.shape)[mask.data]
            if not lanes.size:
                return
            addresses = np.unique(lanes)
            # views of one tensor overlap: the narrowest argument that holds all addresses
            name = min(
                (s for s in spans if s[1] <= addresses[0] and addresses[-1] < s[2]), key=lambda s: s[2] - s[1]
            )[0]
            asked[name] += lanes.size * size[name]
            moved[name] += addresses.size * size[name]
            seen[name].append(addresses)

        def load(pointers: Any, mask: Any, *rest: Any) -> Any:
            note(pointers, mask)
            return builder.create_masked_load(interpreter_builder, pointers, mask, *rest)

        def store(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            note(pointers, mask)
            return builder.create_masked_store(interpreter_builder, pointers, value, mask, *rest)

        interpreter_builder.create_masked_load, interpreter_builder.create_masked_store = load, store
        try:
            plain(start)
        finally:
            del interpreter_builder.create_masked_load, interpreter_builder.create_masked_store
        touched = {n: len(np.unique(np.concatenate(a))) * size[n] if a else 0 for n, a in seen.items()}
        found.append(Traffic(start.kernel.__name__, asked, moved, touched))

    launching.run = run
    try:
        yield found
    finally:
        launching.run = plain


def _extent(t: torch.Tensor) -> int:
    """Bytes from the first to the end of the last element."""
    last = sum((n - 1) * s for n, s in zip(t.shape, t.stride()))
    return (last + 1) * t.element_size()
