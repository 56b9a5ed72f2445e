"""Low-rank adapters on the LLM through peft: put in, switched off, and merged into plain weights.

An adapted linear computes W x + (alpha / r) B A x; W is frozen. Exports hold W + (alpha / r) B A under W's
own name, so that nothing that reads an export knows of adapters.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from catmllm.config import LoRAConfig
from catmllm.models.catalytic_mllm import CatalyticMLLM
from catmllm.seeds import Stream, hash_seed

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NAME = "default"


def add_lora(model: CatalyticMLLM, config: LoRAConfig, seed: int) -> None:
    """Put adapters on the seven linears of every LLM block, in place. B starts at zero:
    the model computes what it did.

    Raises ModuleNotFoundError where peft is missing.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("`lora.r` is set, but peft is missing: pip install peft") from error
    adapters = LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # peft says int and divides it
        lora_dropout=config.dropout,
        target_modules=rf"model\.(language_model\.)?layers\.\d+\.\w+\.({'|'.join(LINEARS)})",
    )
    torch.manual_seed(hash_seed(Stream.ADAPTERS.key(seed)))
    inject_adapter_in_model(adapters, model.llm, adapter_name=NAME)


def adapted(model: nn.Module) -> list[Any]:
    """The adapted linears of a model."""
    return [m for m in model.modules() if NAME in getattr(m, "lora_A", ())]


@contextmanager
def without_lora(model: nn.Module) -> Iterator[None]:
    """The model as it was before `add_lora`: the adapters' products count zero times."""
    for linear in adapted(model):
        linear.set_scale(NAME, 0.0)
    try:
        yield
    finally:
        for linear in adapted(model):
            linear.set_scale(NAME, 1.0)


def effective_weight(linear: Any) -> torch.Tensor:
    """The weight [out, in] that a linear applies, its adapter included; whole parameters only,
    no gradient."""
    weight = linear.weight.detach()
    if not hasattr(linear, "lora_A"):
        return weight
    a, b = linear.lora_A[NAME].weight.detach().float(), linear.lora_B[NAME].weight.detach().float()
    return (weight.float() + linear.scaling[NAME] * (b @ a)).to(weight.dtype)


def merged(state: dict[str, torch.Tensor], config: LoRAConfig) -> dict[str, torch.Tensor]:
    """A whole state dict with the adapters multiplied out and every name as in a model without them."""
    out = {k.replace(".base_layer.", "."): v for k, v in state.items() if ".lora_" not in k}
    for key, a in state.items():
        if match := re.fullmatch(rf"(.*)\.lora_A\.{NAME}\.weight", key):
            b, name = state[f"{match[1]}.lora_B.{NAME}.weight"], f"{match[1]}.weight"
            out[name] = out[name] + config.alpha / config.r * (b.float() @ a.float()).to(out[name].dtype)
    return out
