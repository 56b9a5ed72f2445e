"""Loads fairchem's EquiformerV2 checkpoints (1.x, and the `backbone`/`output_heads` layout of 2.x)
key for key.

fairchem saves its constant tables with the weights. They are not loaded but checked where they decide the
result and no weight's shape would show a difference: the distance basis (cutoff) and the sphere grid
(resolution).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from catmllm.models.equiformer_v2 import EquiformerV2

_WRAPPERS = re.compile(r"^(module\.)*(backbone\.|output_heads\.\w+\.(?=(energy|force)_block\.))?")
_CONSTANTS = re.compile(
    r"(^|\.)((SO3_grid|SO3_rotation|mappingReduced)\.|"
    r"(expand_index|balance_degree_weight|distance_expansion\.offset)$)"
)
_HEADS = ("energy_block", "force_block")


def load_fairchem_checkpoint(source: str | Path | Mapping[str, Any], model: EquiformerV2) -> None:
    """Copy a checkpoint's weights into `model`, all of them or none.

    `source` is a file (read with weights_only=True), the dict inside one, or a state dict. Weights of a head
    that `model` was built without are left out. Raises ValueError that names every key that is missing,
    unexpected or of another shape, and every constant that disagrees with the model's configuration.
    """
    state = {without_wrapper(key): value for key, value in _state_dict(source).items()}
    own = model.state_dict()
    absent = tuple(f"{head}." for head in _HEADS if getattr(model, head) is None)
    weights = {k: v for k, v in state.items() if not _CONSTANTS.search(k) and not k.startswith(absent)}
    problems = [f"missing: {k} {list(v.shape)}" for k, v in own.items() if k not in weights]
    problems += [f"unexpected: {k} {list(v.shape)}" for k, v in weights.items() if k not in own]
    problems += [
        f"shape: {k} is {list(v.shape)}, the model needs {list(own[k].shape)}"
        for k, v in weights.items()
        if k in own and v.shape != own[k].shape
    ]
    problems += _constants(state, model)
    if problems:
        name = f"{source}: " if isinstance(source, str | Path) else ""
        raise ValueError(
            f"{name}the checkpoint does not fit the encoder's configuration\n  " + "\n  ".join(problems)
        )
    model.load_state_dict(weights, strict=True)


def without_wrapper(key: str) -> str:
    """The encoder's own name of a saved tensor: without what DDP, backbones and heads put before it."""
    return _WRAPPERS.sub("", key)


def _state_dict(source: str | Path | Mapping[str, Any]) -> Mapping[str, Tensor]:
    """The tensors of a file or of the dict that a file holds."""
    if isinstance(source, str | Path):
        source = torch.load(source, map_location="cpu", weights_only=True)
    if not isinstance(source, Mapping):
        raise ValueError(f"expected a checkpoint's dict, not {type(source).__name__}")
    state = source.get("state_dict", source)
    strange = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if strange:
        raise ValueError(f"not a state dict: {', '.join(map(str, strange))} hold no tensors")
    return state


def _constants(state: Mapping[str, Tensor], model: EquiformerV2) -> list[str]:
    """What fairchem's saved tables say against the configuration of `model`."""
    c, problems = model.config, []
    offset = state.get("distance_expansion.offset")
    if offset is not None:
        found, wanted = (len(offset), float(offset[-1])), (c.num_distance_basis, c.max_radius)
        if found[0] != wanted[0] or abs(found[1] - wanted[1]) > 1e-4:
            problems.append(
                f"distance basis: {found[0]} Gaussians up to {found[1]:g} Å, the model has {wanted[0]} to "
                f"{wanted[1]:g}"
            )
    grid = state.get(f"SO3_grid.{c.lmax}.{c.mmax}.to_grid_mat")
    if grid is not None:
        points = model.tables.edge_to_lat.shape[0] * model.tables.edge_lon.shape[0]
        if grid.shape[0] * grid.shape[1] != points:
            problems.append(f"sphere grid: {grid.shape[0]} x {grid.shape[1]} points, the model has {points}")
    return problems
