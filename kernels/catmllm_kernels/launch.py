"""The one door through which Triton kernels start: they run,
or are written down for the ahead-of-time compiler.

`recorded()` collects what an op would launch. The arguments may then be meta tensors, so that the shapes of a
full model cost nothing and need no GPU.

Triton compiles a kernel anew for an integer that is 1, a multiple of 16 or neither. What changes from batch
to batch must not be one of these: `SIZES` names it, and every kernel is told by `do_not_specialize`. What is
left (strides, the vocabulary) is fixed in a model, so a kernel is compiled once for its constants.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

SIZES = ("n_edges", "n_nodes", "n_atoms", "n_tokens", "tiles", "orders")
_RECORD: list[Launch] | None = None
_ARCHITECTURE: int | None = None  # that launches are recorded for


@dataclass(frozen=True)
class Launch:
    """One start of a kernel, as given to `launch`."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2
    maxnreg: int | None = None  # registers a thread; None: as many as the compiler wants

    @property
    def options(self) -> dict[str, int]:
        """What the compiler is told beside the constants."""
        given = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return given if self.maxnreg is None else given | {"maxnreg": self.maxnreg}


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *arguments: Any,
    num_warps: int = 4,
    num_stages: int = 2,
    maxnreg: int | None = None,
    **constants: Any,
) -> None:
    """kernel[grid](*arguments, **constants); nothing for an empty grid.

    Arguments in the kernel's order: tensors and integers, then constexprs by name.
    """
    start = Launch(kernel, grid, arguments, constants, num_warps, num_stages, maxnreg)
    if _RECORD is not None:
        _RECORD.append(start)
    elif all(grid):
        run(start)


def run(start: Launch) -> None:
    """Start it for real."""
    start.kernel[start.grid](*start.arguments, **start.constants, **start.options)


@contextmanager
def recorded(for_architecture: int | None = None) -> Iterator[list[Launch]]:
    """Within, launches are collected and not run; their tiles are those of an architecture, 80 or 90."""
    global _RECORD, _ARCHITECTURE
    before, _RECORD, _ARCHITECTURE = (_RECORD, _ARCHITECTURE), [], for_architecture
    try:
        yield _RECORD
    finally:
        _RECORD, _ARCHITECTURE = before


def architecture() -> int:
    """80 for an A100, 90 for an H100: of what launches are recorded for, else of the device, else 80."""
    if _ARCHITECTURE is not None:
        return _ARCHITECTURE
    return device_architecture()


@cache
def device_architecture() -> int:
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (8, 0)
    return 10 * major + minor
