"""Shards: FSDP2 units, and a whole copy of the weights where one is needed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from catmllm.config import Config
from catmllm.models.catalytic_mllm import CatalyticMLLM
from catmllm.models.half_precision import keep_large_values
from catmllm.world import DTYPES, World, encoder_dtype


def mesh_of(config: Config, world: World) -> DeviceMesh:
    """All ranks in one line; with `replicate` > 1 in two dimensions: copies (outer, over nodes)
    and shards (inner)."""
    copies, rest = config.replicate, world.size % config.replicate
    if rest or copies > world.size:
        raise ValueError(
            f"`replicate: {copies}` does not divide {world.size} ranks; give the number of nodes, or 1 for "
            "one copy"
        )
    if copies == 1:
        return init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
    return init_device_mesh(
        world.device.type, (copies, world.size // copies), mesh_dim_names=("replicate", "shard")
    )


def shard(
    model: CatalyticMLLM,
    config: Config,
    world: World,
    reshard: str = "trained",
    like: CatalyticMLLM | None = None,
) -> CatalyticMLLM:
    """Shard in place: a unit per block of encoder and LLM, one for the rest of the encoder, the projector and
    the energy head each, one for what remains. The image tower is cut likewise where it trains; where it does
    not, it is left out in the dtype of its files, whole on every rank if `data.images` and else, since it
    never runs, on the CPU.

    Compute runs in `precision` (the encoder, whose coordinates and norms want it, in `encoder_precision`),
    gradients are reduced and the optimizer works in float32. A model on the CPU moves to the device a unit at
    a time: no device ever holds it whole. `reshard` names the parts whose gathered weights are freed after a
    forward pass (see `OptimConfig`); set `requires_grad` before. `like`: a model of the same make, sharded
    already, whose shards are copied into this one, which has no weights of its own (parameters on the meta
    device).
    """
    mesh = mesh_of(config, world)
    llm = MixedPrecisionPolicy(DTYPES[config.precision], torch.float32, cast_forward_inputs=False)
    graph = MixedPrecisionPolicy(encoder_dtype(config), torch.float32, cast_forward_inputs=False)
    offload = CPUOffloadPolicy(pin_memory=world.device.type == "cuda") if config.cpu_offload else None
    keep_large_values(model, DTYPES[config.precision], encoder_dtype(config))
    unit = partial(_unit, mesh, reshard, offload or OffloadPolicy())
    blocks = [unit(block, graph) for block in model.encoder.blocks]
    unit(model.encoder, graph)
    unit(model.projector, graph)
    # A unit of its own: passes that train no energy leave its gradient out, and gradients accumulated over
    # passes must be of one dtype within a unit.
    unit(model.energy_head, graph)
    layers = [unit(layer, llm) for layer in model.text.layers]
    visual: Any = model.visual
    whole = set()
    if any(p.requires_grad for p in visual.parameters()):
        # float16 ends below what image towers reach; bfloat16 runs at its speed
        seeing = replace(llm, param_dtype=DTYPES["fp32" if config.precision == "fp32" else "bf16"])
        eyes = [unit(block, seeing) for block in visual.blocks]
        unit(visual, seeing)
        model.picture_lockstep = world.size > 1
    else:
        eyes, whole = [], set(visual.to(world.device if config.data.images else "cpu").parameters())
    unit(model, llm, whole)
    # its backward pass comes next
    model.set_reshard_after_forward(False, recurse=False)  # type: ignore[operator]
    model.frees = False  # type: ignore[assignment]
    for tower in (blocks, layers, eyes):
        for this, following in itertools.pairwise(tower):
            this.set_modules_to_forward_prefetch([following])
            if following.trained:
                following.set_modules_to_backward_prefetch([this])
    model.lockstep = world.size > 1
    if like is not None:
        home = torch.device("cpu") if config.cpu_offload else world.device
        # Weights alone: buffers are no shards, and stay where passes read them.
        model._apply(lambda t: torch.empty_like(t, device=home) if t.device.type == "meta" else t)
        _copy_shards(like, model)
    # Sampling may run the encoder before the first training pass has run the model; FSDP2 would then take the
    # encoder for a root of its own. There is no public call that settles who is root.
    model._get_fsdp_state()._lazy_init()  # type: ignore[operator]
    return model


def _unit(
    mesh: DeviceMesh,
    reshard: str,
    offload: OffloadPolicy,
    module: Any,
    policy: MixedPrecisionPolicy,
    ignored: set[torch.nn.Parameter] | None = None,
) -> Any:
    """One FSDP unit of what `module` holds that is in no unit yet, but for `ignored`."""
    trained = any(p.requires_grad for p in module.parameters())
    frees = {"trained": trained, "all": True, "none": False}[reshard]
    for p in module.parameters():  # the master weights; of a unit at a time, since files may hold bf16
        if not isinstance(p, DTensor) and p.dtype != torch.float32 and p not in (ignored or ()):
            p.data = p.data.float()
    fully_shard(
        module,
        mesh=mesh,
        mp_policy=policy,
        reshard_after_forward=frees,
        ignored_params=ignored,
        offload_policy=offload,
    )
    module.frees, module.trained = frees, trained
    return module


def _copy_shards(source: torch.nn.Module, target: torch.nn.Module) -> None:
    """Parameters and buffers of a model of the same make, shard by shard."""
    theirs = dict((*source.named_parameters(), *source.named_buffers()))
    with torch.no_grad():
        for name, mine in (*target.named_parameters(), *target.named_buffers()):
            _local(mine).copy_(_local(theirs[name]))


def _local(t: torch.Tensor) -> torch.Tensor:
    return t.to_local() if isinstance(t, DTensor) else t


@contextmanager
def unsharded(model: CatalyticMLLM) -> Iterator[None]:
    """Every parameter whole on every rank, so that ranks may run forward passes at their own pace.

    No collective happens inside. For sampling and prediction; gradients do not belong here.
    Frozen parts that are never freed stay whole.
    """
    units: list[Any] = [m for m in model.modules() if isinstance(m, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        with torch.no_grad():
            yield
    finally:
        for unit in units:
            if unit.trained or unit.frees:
                unit.reshard()
            unit.set_reshard_after_forward(unit.frees, recurse=False)


def whole(t: torch.Tensor) -> torch.Tensor:
    """A parameter or buffer gathered from its shards, detached, on the CPU."""
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach().cpu()


def full_state(model: torch.nn.Module, world: World) -> dict[str, torch.Tensor]:
    """The whole state dict, float32 as trained, on the CPU of the main rank; empty on the others."""
    state = {}
    for name, value in model.state_dict().items():
        gathered = whole(value)
        if world.main:
            state[name] = gathered
    return state
