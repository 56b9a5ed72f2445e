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
from typing import Any

SIZES = ("n_edges", "n_nodes", "n_atoms", "n_tokens", "tiles")  # arguments that differ between batches
_RECORD: list[Launch] | None = None


@dataclass(frozen=True)
class Launch:
    """One start of a kernel, as given to `launch`."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *arguments: Any,
    num_warps: int = 4,
    num_stages: int = 2,
    **constants: Any,
) -> None:
    """kernel[grid](*arguments, **constants); nothing for an empty grid.

    Arguments in the kernel's order: tensors and integers, then constexprs by name.
    """
    start = Launch(kernel, grid, arguments, constants, num_warps, num_stages)
    if _RECORD is not None:
        _RECORD.append(start)
    elif all(grid):
        run(start)


def run(start: Launch) -> None:
    """Start it for real."""
    options = {"num_warps": start.num_warps, "num_stages": start.num_stages}
    start.kernel[start.grid](*start.arguments, **start.constants, **options)


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Within, launches are collected and not run."""
    global _RECORD
    before, _RECORD = _RECORD, []
    try:
        yield _RECORD
    finally:
        _RECORD = before
