"""An op's arguments written once: the fields of a NamedTuple
become the schema that torch.library registers."""

from __future__ import annotations

from typing import Any, get_type_hints

from torch import Tensor

KINDS: dict[Any, str] = {Tensor: "Tensor", Tensor | None: "Tensor?", int: "SymInt", float: "float",
                         bool: "bool"}  # fmt: skip


def arguments_of(bundle: type[tuple[Any, ...]]) -> str:
    """`Tensor x, SymInt lmax, …` of the fields in their order; a field of any other type is a list of
    tensors. Without defaults: torch's tracer drops an argument that equals its default, and then misses its
    gradient.

    >>> from typing import NamedTuple
    >>> class Scaled(NamedTuple):
    ...     x: Tensor
    ...     by: float
    ...     rest: tuple[Tensor, ...]
    ...     bias: Tensor | None = None
    >>> arguments_of(Scaled)
    'Tensor x, float by, Tensor[] rest, Tensor? bias'
    """
    return ", ".join(f"{KINDS.get(kind, 'Tensor[]')} {name}" for name, kind in get_type_hints(bundle).items())
