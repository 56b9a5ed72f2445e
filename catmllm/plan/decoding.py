"""What our own decoding would give a GPU to do, and where the host would wait for it: operators and waits a
token, counted on a GPU that is not there.

Tensors say that they are on another device and calculate on the CPU, so that torch's code and ours take the
ways that they take there. Every operator on them is counted, and whatever needs their values on the host.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from catmllm.config import SamplingConfig, load_config
from catmllm.data.prompts import Sample, cif_prompt
from catmllm.models.build import new_model
from catmllm.plan.ledger import starts
from catmllm.plan.made_up import synthetic_systems
from catmllm.sample.engine import RolloutEngine
from catmllm.sample.grammar import answer_pattern
from catmllm.sample.graphs import Graphs
from catmllm.sample.rows import Rows
from catmllm.sample.tower import Layer, Tower

THERE = torch.device("meta")  # the one device beside the CPU that this torch can name
# of width only as much as decoding needs to be decoding
NARROW = (
    "model.llm.hidden_size=64", "model.llm.num_attention_heads=4", "model.llm.num_key_value_heads=2",
    "model.llm.intermediate_size=96", "model.encoder.num_layers=1", "model.encoder.sphere_channels=16",
    "model.encoder.attn_hidden_channels=16", "model.encoder.ffn_hidden_channels=16",
)  # fmt: skip
TOKENS = 65  # of an answer: the looks of a steady batch, in 16 tokens each, four times
SIZED = ("nonzero", "masked_select", "bincount", "_unique2", "unique_dim", "unique_consecutive")


class PerToken(NamedTuple):
    """Of a token of every answer: operators with one layer, those that a layer more adds, and waits."""

    one: float
    layer: float
    waits: float

    def operators(self, layers: int) -> float:
        return self.one + (layers - 1) * self.layer


@functools.lru_cache
def per_token(grammar: bool, steady: bool = True, tokens: int = TOKENS) -> PerToken:
    """Counted while 16 answers of `tokens` tokens each are decoded by narrow Qwen2.5s of one and of three
    layers: operators do not depend on the width, and grow with the layers alone. `steady`: as on a GPU. Under
    the grammar a token that is forced is one too, so they are fewer."""
    found, systems = [], synthetic_systems(14, 4)
    prompts = [Sample(cif_prompt(s.identity)) for s in systems]
    patterns = [answer_pattern(s.identity, s.target, False) for s in systems] if grammar else None
    params = SamplingConfig(temperature=1.0, top_p=0.95, max_new_tokens=tokens)
    for layers in (1, 3):
        config = load_config(None, [*NARROW, f"model.llm.num_hidden_layers={layers}"])
        model, collate = new_model(config, systems)
        engine = RolloutEngine(model.eval(), collate, torch.bfloat16, steady=steady)
        found.append(counted(engine, prompts, params, [0], 4, patterns=patterns))
    one, three = (c.operators / c.tokens for c in found)
    return PerToken(one, (three - one) / 2, sum(found[0].waits.values()) / found[0].tokens)


class There(torch.Tensor):
    """Looks like a tensor on another device; `here` has its values."""

    here: torch.Tensor

    @staticmethod
    def __new__(cls, here: torch.Tensor) -> There:
        there: There = torch.Tensor._make_wrapper_subclass(
            cls, here.shape, here.stride(), here.storage_offset(), dtype=here.dtype, device=THERE
        )
        there.here = here
        return there

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise AssertionError(f"{func} outside of `counted`")


@dataclass
class Counted(TorchDispatchMode):
    """Operators that the device is given, and waits of the host by what it waits for."""

    operators: int = 0
    waits: Counter[str] = field(default_factory=Counter)
    passes: int = 0
    tokens: int = 0  # of the longest answer

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name, tensors = func._opname, list(_tensors((args, kwargs)))
        given = any(isinstance(t, There) for t in tensors)
        wanted = kwargs.get("device")
        to_host = given and name == "_to_copy" and wanted is not None and torch.device(wanted).type == "cpu"
        made = given or (wanted is not None and torch.device(wanted).type == THERE.type)
        if made:
            self._wait(func, name, args, kwargs, to_host, given)
            self.operators += starts(func)
        if wanted is not None:
            kwargs["device"] = torch.device("cpu")
        out = func(*tree_map(_here, args), **tree_map(_here, kwargs))
        if name.endswith("_") and not name.startswith("_") and args and isinstance(args[0], There):
            return args[0]
        return tree_map(_there, out) if made and not to_host else out

    def _wait(self, func: Any, name: str, args: Any, kwargs: Any, to_host: bool, given: bool) -> None:
        if to_host or name == "_local_scalar_dense":
            self.waits["values"] += 1
        elif _sized(name, args, kwargs):
            self.waits["sizes"] += 1
        elif name == "_to_copy" and not given and not kwargs.get("non_blocking"):
            self.waits["copies to the device"] += 1
        elif name == "copy_" and not isinstance(args[1], There):
            self.waits["copies to the device"] += not (kwargs.get("non_blocking") or args[2:3] == (True,))


def _sized(name: str, args: Any, kwargs: Any) -> bool:
    """Whether values on the device say how long the result is."""
    if name in ("index", "index_put_", "index_put"):
        return any(t.dtype == torch.bool for t in _tensors(args[1]))
    return name in SIZED or (name == "repeat_interleave" and kwargs.get("output_size") is None)


def counted(engine: RolloutEngine, *args: Any, **options: Any) -> Counted:
    """What `engine.generate` gives the device, but for the reading of prompts."""
    to_device(engine.tower)
    engine.markers = There(engine.markers)
    count = Counted()
    prefill, advance = Tower.prefill, Rows.advance

    def read(tower: Tower, x: torch.Tensor, mrope: torch.Tensor | None = None) -> Any:
        """On the host: a prompt's attention asks which kernels its device has."""
        before = count.operators, count.waits.copy()
        plain = _moved(tower, _here)
        with torch._C._DisableTorchDispatch():
            found = prefill(plain, _here(x), _here(mrope))
        count.operators, count.waits = before
        return tree_map(_there, found)

    def passed(rows: Rows, *given: Any) -> None:
        count.passes += 1
        advance(rows, *given)

    tensor, normed = torch.tensor, torch.nn.functional.rms_norm

    def fused(x: torch.Tensor, shape: Any, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return torch.ops.aten._fused_rms_norm(x, shape, weight, eps)[0]  # as CUDA has it

    def put(data: Any, *, dtype: torch.dtype | None = None, device: Any = None) -> torch.Tensor:
        made = tensor(data, dtype=dtype)  # whose copy no mode sees
        return made if device is None else made.to(device)

    run = Graphs.run
    try:
        torch.tensor, torch.nn.functional.rms_norm = put, fused  # type: ignore[assignment]
        Tower.prefill, Rows.advance = read, passed  # type: ignore[method-assign, assignment]
        Graphs.run = lambda self, key, work: work()  # type: ignore[method-assign]
        with count:
            found = engine.generate(*args, **options)
    finally:
        torch.tensor, torch.nn.functional.rms_norm = tensor, normed
        Tower.prefill, Rows.advance = prefill, advance  # type: ignore[method-assign]
        Graphs.run = run  # type: ignore[method-assign]
    count.tokens = max(len(r.ids) for r in found)
    return count


def to_device(tower: Tower) -> None:
    tower.__dict__.update(_moved(tower, _there).__dict__)


def _moved(tower: Tower, change: Callable[[Any], Any]) -> Tower:
    """A tower with the same weights elsewhere."""
    new = object.__new__(Tower)
    for name, value in tower.__dict__.items():
        new.__dict__[name] = change(value)
    new.layers = [Layer(*map(change, layer.__dict__.values())) for layer in tower.layers]
    return new


def _tensors(part: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    tree_map(lambda x: found.append(x) if isinstance(x, torch.Tensor) else None, part)
    return found


def _here(x: Any) -> Any:
    return x.here if isinstance(x, There) else x


def _there(x: Any) -> Any:
    return There(x) if isinstance(x, torch.Tensor) and not isinstance(x, There) else x
