"""Answers of the decode loop as it was when they were recorded, so that one that is made anew can be held to
their every bit. `python -m tests.sample.recorded` writes the record, only from a loop that is trusted."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from bench.record import processor
from catmllm.config import SamplingConfig, load_config
from catmllm.data.batches import Collator
from catmllm.data.prompts import Sample, cif_prompt, design_prompt
from catmllm.models.build import new_model
from catmllm.models.catalytic_mllm import CatalyticMLLM
from catmllm.plan.made_up import synthetic_systems
from catmllm.sample.answers import Rollout
from catmllm.sample.engine import RolloutEngine
from catmllm.sample.grammar import answer_pattern
from tests.conftest import SMALL_MODEL

RECORD = Path(__file__).parents[1] / "fixtures" / "answers.safetensors"
END = 323  # in place of the end token, one that comes now and then
# rows at a time, answers to a prompt, dtype, and what is sampled: long answers that pass the caches' steps,
# answers that end at times that differ and make room for others, and the grammar's
CASES: dict[str, tuple[int, int, torch.dtype, SamplingConfig]] = {
    "long": (256, 2, torch.float32, SamplingConfig(temperature=0.8, top_p=0.95, max_new_tokens=150)),
    "ending": (7, 3, torch.float32, SamplingConfig(temperature=1.0, top_p=0.9, max_new_tokens=40)),
    "half": (256, 3, torch.bfloat16, SamplingConfig(temperature=1.3, top_p=1.0, max_new_tokens=20)),
    "grammar": (6, 3, torch.float32, SamplingConfig(temperature=1.0, top_p=0.95, max_new_tokens=400)),
}


def model_and_prompts() -> tuple[CatalyticMLLM, Collator, list[Sample], list[Any]]:
    """Of made-up systems: the shipped ones may change."""
    systems = synthetic_systems(14, 6)
    model, collate = new_model(load_config(None, [*SMALL_MODEL]), systems)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and name.startswith("llm."):
                parameter.mul_(25 if "lm_head" in name else 5)
    prompts = [
        Sample(cif_prompt(s.identity) if k % 2 else design_prompt(s.identity, -0.1 * k))
        for k, s in enumerate(systems)
    ]
    patterns = [answer_pattern(s.identity, s.target, k % 2 == 0) for k, s in enumerate(systems)]
    return model.eval(), collate, prompts, patterns


def answers(case: str, made: tuple, **options: Any) -> list[Rollout]:
    """`options` go to the engine."""
    model, collate, prompts, patterns = made
    rows, group, dtype, params = CASES[case]
    if case == "ending":
        collate = copy.copy(collate)
        collate.end_id = END
    engine = RolloutEngine(model, collate, dtype, rows, **options)
    given = patterns if case == "grammar" else None
    return engine.generate(prompts, params, [3, 1], group, keep_hidden=True, patterns=given)


def tensors(case: str, rollouts: list[Rollout]) -> dict[str, torch.Tensor]:
    found = {
        "lengths": torch.tensor([len(r.ids) for r in rollouts]),
        "ids": torch.cat([r.ids for r in rollouts]).int(),
        "logprob": torch.cat([r.logprob for r in rollouts]),
        "hidden": torch.cat([r.hidden.double().sum(1) for r in rollouts]),  # type: ignore[union-attr]
    }
    return {f"{case}.{k}": v for k, v in found.items()}


def recorded() -> tuple[dict[str, torch.Tensor], str]:
    """What was recorded, and on which kind of processor."""
    with safe_open(RECORD, "pt") as f:
        return {k: f.get_tensor(k) for k in f.keys()}, f.metadata()["kind"]  # noqa: SIM118


if __name__ == "__main__":
    torch.set_num_threads(1)
    made = model_and_prompts()
    found = {k: v for case in CASES for k, v in tensors(case, answers(case, made)).items()}
    save_file(found, RECORD, {"kind": str(processor()["kind"])})
    for case in CASES:
        print(case, found[f"{case}.lengths"].tolist())
