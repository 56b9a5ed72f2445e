"""A training step without its arithmetic: what it would allocate, compute and send, operator by operator.

Weights and activations are fake tensors (a shape, a dtype, no data); token ids, indices and other small facts
of a batch stay real, so that code which looks at them takes the way that it will take. What looks at a fake
value reads a finite float as 0, a truth as True: a mask that depends on activations keeps everything.
"""

from __future__ import annotations

import math
import os
import weakref
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry, register_flop_formula, sdpa_flop_count

import catmllm_kernels.escn.cpu as escn_cpu
import catmllm_kernels.linear_logprob.op as linear_logprob
import catmllm_kernels.varlen_attention.cpu as attention_cpu
import catmllm_kernels.varlen_attention.op as attention
from catmllm_kernels.launch import recorded
from catmllm_kernels.linear_logprob.arguments import Backward

aten = torch.ops.aten
COLLECTIVES = ("c10d", "fsdp", "_c10d_functional")


@register_flop_formula(aten._scaled_dot_product_flash_attention_for_cpu)
def _attention_flops(
    query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **options: Any
) -> int:
    """torch has these formulas for its CUDA attention alone; here plans and counts run on a CPU."""
    return sdpa_flop_count(query, key, value)


@register_flop_formula(aten._scaled_dot_product_flash_attention_for_cpu_backward)
def _attention_backward_flops(
    grad: Any, query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **options: Any
) -> int:
    """Five products of the size of forward's two: the scores again,
    and a gradient for each of four operands."""
    return sdpa_flop_count(query, key, value) * 5 // 2


def _samples_flops(
    query: Any,
    key: Any,
    value: Any,
    bounds: Any,
    bounds_k: Any,
    longest: int,
    longest_k: int,
    *args: Any,
    **more: Any,
) -> int:
    """Every sample as long as the longest: the lengths of a plan's samples are not known."""
    samples, heads, width = len(bounds) - 1, query.shape[1], query.shape[2]
    keys = (samples, heads, longest_k, width)
    return int(sdpa_flop_count((samples, heads, longest, width), keys, keys))


def _samples_backward_flops(
    grad: Any, query: Any, key: Any, value: Any, out: Any, lse: Any, *bounds: Any, **more: Any
) -> int:
    return _samples_flops(query, key, value, *bounds) * 5 // 2


def _edge_products(radial: Any, radial_weight: Any, conv1: Any, conv2: Any) -> int:
    """SO(2) products and the radial function's last layer over all edges;
    rotations are 2 % of it and left out."""
    macs = math.prod(radial_weight)
    for first, *others in (conv1, conv2):  # a complex matrix (r; s) is two real products
        macs += math.prod(first) + 2 * sum(math.prod(w) for w in others)
    return 2 * radial[0] * macs


@register_flop_formula(torch.ops.catmllm.edge_attention)
def _edge_flops(x: Any, radial: Any, radial_weight: Any, *rest: Any, out_shape: Any = None) -> int:
    return _edge_products(radial, radial_weight, rest[3], rest[7])


@register_flop_formula(torch.ops.catmllm.edge_attention_backward)
def _edge_backward_flops(
    grad: Any, kept: Any, x: Any, radial: Any, radial_weight: Any, *rest: Any, out_shape: Any = None
) -> int:
    """Two products for each of forward's, and the radial weights once more."""
    return 2 * _edge_products(radial, radial_weight, rest[3], rest[7]) + 2 * radial[0] * math.prod(
        radial_weight
    )


@dataclass
class Peak:
    """The moment of a phase at which most bytes are alive, and what they are."""

    total: int = 0
    parts: dict[str, int] = field(default_factory=dict)


class Ledger(TorchDispatchMode):
    """Within it, floating tensors are made fake and everything is written down; see the module.

    `flops` by kind (forward, backward, recomputed, optimizer), `sent` bytes a rank sends by collective on a
    ring, `moved` bytes that operators read and write when each runs alone, `launches` an operator each, of an
    op of ours the operators and kernels in it. `cuda`: ops go the way that they go on a GPU.
    """

    def __init__(self, cuda: bool) -> None:
        super().__init__()
        self.cuda = cuda
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.flops: dict[str, int] = defaultdict(int)
        self.wide_flops = 0  # of them, in float32
        self.attention_flops = 0  # of them, in fused attention over tokens
        self.launches = 0  # kernels that a GPU would be given, at least
        self.sent: dict[str, float] = defaultdict(float)
        self.moved = 0
        self.role = "other"  # of what is made now, in a forward pass
        self.label: dict[int, str] = {}  # by serial number of a storage
        self.events: list[tuple[int, int]] = []  # (serial number, change in bytes)
        self.phases: list[tuple[str, int]] = []  # (name, first event)
        self._alive: dict[int, tuple[int, int]] = {}  # address of a storage -> (serial number, bytes)
        self._optimizing = False
        self._silent = False
        self._inside = False

    def __enter__(self) -> Ledger:
        if self._inside:
            return super().__enter__()
        plain = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            # FSDP2 frees gathered weights by giving their storage no bytes.
            out = plain(storage, size)
            self._note(storage, "gathered weights")
            return out

        def unrecorded(*args: Any) -> Any:
            # DTensor learns the shape of a result by running the operator on fake tensors of the whole,
            # unsharded size. Counted, they make an optimizer's step as large as the whole model on every
            # rank.
            self._silent = True
            try:
                return propagate(*args)
            finally:
                self._silent = False

        propagate = ShardingPropagator._propagate_tensor_meta_non_cached
        ShardingPropagator._propagate_tensor_meta_non_cached = unrecorded  # type: ignore[method-assign, assignment]
        # `Module.to` swaps the insides of fake parameters,
        # after which views of them have storages of their own.
        self._plain = plain, torch.nn.Module._apply, propagate, attention.flash
        if self.cuda:
            attention.flash = lambda query: query.dtype in (torch.float16, torch.bfloat16)
        torch.nn.Module._apply = _convert  # type: ignore[method-assign]
        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign, assignment]
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        if self._inside:
            return super().__exit__(*exception)
        resize, apply, propagate, attention.flash = self._plain
        torch.UntypedStorage.resize_, torch.nn.Module._apply = resize, apply  # type: ignore[method-assign]
        ShardingPropagator._propagate_tensor_meta_non_cached = propagate  # type: ignore[method-assign]
        super().__exit__(*exception)

    def phase(self, name: str) -> None:
        """What follows belongs to the phase `name`."""
        self.phases.append((name, len(self.events)))

    @contextmanager
    def making(self, role: str) -> Iterator[None]:
        """What a forward pass makes within is labelled `role`."""
        before, self.role = self.role, role
        try:
            yield
        finally:
            self.role = before

    @contextmanager
    def optimizing(self) -> Iterator[None]:
        self._optimizing = True
        try:
            yield
        finally:
            self._optimizing = False

    def mark(self, tensors: Any, label: str) -> None:
        """Say what these tensors are, whatever made them."""
        for t in tree_iter(tensors):
            if isinstance(t, torch.Tensor):
                t = t.to_local() if isinstance(t, DTensor) else t
                if (known := self._alive.get(t.untyped_storage()._cdata)) is not None:
                    self.label[known[0]] = label

    def peaks(self, elsewhere: tuple[str, ...] = ()) -> dict[str, Peak]:
        """The peak of each phase, over all its stretches, without what is labelled as one of `elsewhere`."""
        alive: dict[str, int] = defaultdict(int)
        total, out = 0, {name: Peak() for name, _ in self.phases}
        starts = {first: name for name, first in self.phases}
        name = None
        for i, (serial, change) in enumerate(self.events):
            name = starts.get(i, name)
            if self.label[serial] in elsewhere:
                continue
            alive[self.label[serial]] += change
            total += change
            if name is not None and total > out[name].total:
                out[name] = Peak(total, {k: v for k, v in alive.items() if v})
        return out

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._silent:
            return func(*args, **kwargs)
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # it comes back with its local tensors
        tensors = [t for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)]
        if func.namespace == "catmllm" and not self.cuda and not _fused(func):
            # What is made of torch's operators on the way counts too;
            # a kernel keeps it in registers or its own scratch.
            self._inside = True
            # (Of the log-probability the chunks, which are torch's
            # products: its definition holds all logits.)
            role, way = ("logits", "cpu") if "linear_logprob" in func.name() else (self.role, "reference")
            with self, backend_forced(way), self.making(role):
                out = OPDEFS[func._name.partition(".")[0]]._init_fn(*args, **kwargs)
            self._inside = False
        elif func is aten._local_scalar_dense.default and isinstance(tensors[0], FakeTensor):
            return _read(tensors[0])
        else:
            out = _faked(self.fake, func, args, kwargs, tensors)
        self._record(func, args, kwargs, tensors, out)
        return out

    def _record(self, func: Any, args: Any, kwargs: Any, tensors: list[torch.Tensor], out: Any) -> None:
        made = [t for t in tree_iter(out) if isinstance(t, torch.Tensor) and t.device.type != "meta"]
        if not self._inside:
            ours = self.cuda and func.namespace == "catmllm"
            self.launches += self._launched(func, args, kwargs) if ours else starts(func)
        inside_backward = torch._C._current_graph_task_id() != -1
        namespace = func.namespace
        label = self.role
        if namespace in COLLECTIVES:
            label = "gathered weights"
            self._send(func, args)
        elif "linear_logprob" in func.name():
            label = "logits"
            if self.cuda:
                self._workspace(func, args)
        elif self._optimizing:
            label = "optimizer step"
        elif inside_backward and label != "logits":
            label = "backward pass"
        for t in made:
            self._note(t.untyped_storage(), label)
        if namespace in COLLECTIVES:  # buffers that FSDP made by plain operators, now that their use is known
            for t in tensors:
                known = self._alive.get(t.untyped_storage()._cdata)
                if known and self.label[known[0]] in ("other", "backward pass", self.role):
                    self.label[known[0]] = "gathered gradients" if inside_backward else "gathered weights"
        packet = func._overloadpacket
        formula: Any = flop_registry.get(packet) or _FORMULAS.get(func.name())
        if formula and not self._inside:
            count = formula(*args, **kwargs, out_val=out)
            if min((t.itemsize for t in tensors if t.dtype.is_floating_point), default=0) >= 4:
                self.wide_flops += count
            if any(part in func.name() for part in ATTENTION):
                self.attention_flops += count
            # Recomputed: forward operators inside of backward. Gradients are off in backward itself,
            # and in our ops.
            ours_forward = namespace in ("catmllm", "torch_attn") and "backward" not in func.name()
            again = inside_backward and (torch.is_grad_enabled() or ours_forward)
            kind = "recomputed" if again else "backward" if inside_backward else "forward"
            if packet is torch.ops.catmllm.linear_logprob_backward and (head := Backward(*args)).kept is None:
                logits = linear_logprob.forward_flops(head.hidden, head.weight, head.targets)
                self.flops["recomputed"] += logits
                count -= logits
            self.flops["optimizer" if self._optimizing else kind] += count
        if not func.is_view:
            self.moved += sum(t.nbytes for t in (*tensors, *made))

    def _launched(self, func: Any, args: Any, kwargs: Any) -> int:
        """Kernels that an op of ours starts on a GPU: its body runs once more, writing down what it would
        start."""
        with recorded() as kernels, backend_forced("triton"), _Starts(self.fake) as operators:
            OPDEFS[func._name.partition(".")[0]]._init_fn(*args, **kwargs)
        return len(kernels) + operators.count

    def _note(self, storage: torch.UntypedStorage, label: str) -> None:
        address, size = storage._cdata, storage.nbytes()
        if (known := self._alive.get(address)) is None:
            serial = len(self.label)
            self.label[serial] = label
            weakref.finalize(storage, self._freed, address, serial)
            before = 0
        else:
            serial, before = known
        self._alive[address] = (serial, size)
        if size != before:
            self.events.append((serial, size - before))

    def _freed(self, address: int, serial: int) -> None:
        known = self._alive.get(address)
        if known is not None and known[0] == serial:
            del self._alive[address]
            self.events.append((serial, -known[1]))

    def _workspace(self, func: Any, args: Any) -> None:
        back = "backward" in func.name()
        hidden, weight = args[2:4] if back else args[:2]
        size = linear_logprob.workspace(
            len(hidden), hidden.shape[1], len(weight), hidden.element_size(), back
        )
        serial = len(self.label)
        self.label[serial] = "logits"
        self.events += [(serial, size), (serial, -size)]

    def _send(self, func: Any, args: Any) -> None:
        """A ring moves (n-1)/n of what is gathered or scattered through every rank,
        twice for an all-reduce."""
        name = func._opname
        if name == "_allgather_base_":
            whole, part = args[0].nbytes, args[1].nbytes
            self.sent["all-gather"] += whole - part
        elif name == "_reduce_scatter_base_":
            part, whole = args[0].nbytes, args[1].nbytes
            self.sent["reduce-scatter"] += whole - part
        elif name == "allgather_":
            self.sent["all-gather"] += sum(t.nbytes for t in args[0][0][1:])
        elif name == "allreduce_":
            n = dist.ProcessGroup.unbox(args[1]).size()
            self.sent["all-reduce"] += 2 * (n - 1) / n * sum(t.nbytes for t in args[0])


# torch 2.11 has no formulas for its own operator over samples of any length; later ones count fake samples
# as these do.
_FORMULAS = {
    "torch_attn::_varlen_attn": _samples_flops,
    "torch_attn::_varlen_attn_backward": _samples_backward_flops,
}
ATTENTION = ("varlen_att", "scaled_dot_product", "flash_att")
_STARTING = ("aten", "catmllm", "torch_attn", *COLLECTIVES)  # namespaces; the others ask or mark
_STARTS_NOTHING = frozenset(
    ["detach", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"]
    + ["resize_", "scalar_tensor", "set_", "_unsafe_view"]
)


def starts(func: Any) -> int:
    """Kernels of a plain operator, at least."""
    idle = func.is_view or func.namespace not in _STARTING or func._opname in _STARTS_NOTHING
    return int(not idle)


class _Starts(TorchDispatchMode):
    """Counts the operators that start something."""

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self.fake, self.count = fake, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += starts(func)
        tensors = [t for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)]
        if func is aten._local_scalar_dense.default and isinstance(tensors[0], FakeTensor):
            return _read(tensors[0])
        return _faked(self.fake, func, args, kwargs or {}, tensors)


def _faked(fake: FakeTensorMode, func: Any, args: Any, kwargs: Any, tensors: list[torch.Tensor]) -> Any:
    """What an operator makes: fake of what is fake and of new floats, real of what is real."""
    if any(isinstance(t, FakeTensor) for t in tensors):
        if func is aten.index.Tensor:
            args = (args[0], _positions(args[1]))
    elif tensors or not _makes_floats(func, kwargs):
        return func(*args, **kwargs)
    with fake:
        return func(*args, **kwargs)


def _convert(module: torch.nn.Module, change: Any, recurse: bool = True) -> torch.nn.Module:
    """`Module._apply`, new parameters for old ones."""
    for child in module.children() if recurse else ():
        _convert(child, change)
    for name, p in module._parameters.items():
        if p is not None and (new := change(p)) is not p:
            module._parameters[name] = torch.nn.Parameter(new, p.requires_grad)
    for name, b in module._buffers.items():
        if b is not None:
            module._buffers[name] = change(b)
    return module


def _fused(func: Any) -> bool:
    """Whether an op of ours is one call on a CPU: torch's allocator sees its inputs and results alone."""
    name, none = func.name(), torch.empty(0)
    if "varlen_attention" in name:
        return not attention_cpu.unfit(none)
    if name.removesuffix("_backward").endswith(("::rms_norm", "::rotate", "::swiglu")):
        return True  # they run where their library takes them, else not at all
    return "edge_" in name and not escn_cpu.unfit(none)


@contextmanager
def backend_forced(name: str) -> Iterator[None]:
    before = os.environ.get("CATMLLM_KERNELS")
    os.environ["CATMLLM_KERNELS"] = name
    try:
        yield
    finally:
        os.environ.pop("CATMLLM_KERNELS")
        if before is not None:
            os.environ["CATMLLM_KERNELS"] = before


def _read(t: torch.Tensor) -> Any:
    return True if t.dtype == torch.bool else 0.0 if t.dtype.is_floating_point else 1


def _positions(indices: Any) -> list[Any]:
    """Boolean masks as positions, so that a result's size is known;
    a mask of unknown values keeps everything."""
    out: list[Any] = []
    for i in indices:
        if i is not None and i.dtype == torch.bool:
            known = torch.ones(i.shape, dtype=torch.bool) if isinstance(i, FakeTensor) else i
            out += known.nonzero().unbind(1)
        else:
            out.append(i)
    return out


_FLOAT_FACTORIES = frozenset(
    ["empty", "empty_strided", "zeros", "ones", "full", "rand", "randn", "linspace", "normal"]
)


def _makes_floats(func: Any, kwargs: Any) -> bool:
    dtype = kwargs.get("dtype")
    if dtype is None:
        return func._opname in _FLOAT_FACTORIES
    return dtype.is_floating_point
