"""Sampling with 0.5B and 1.5B models of random weights: our decoding beside transformers' `generate` and,
where it is there, vLLM. Every answer has its full length."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from bench.gpu_phases import peers
from bench.gpu_phases.measure import Bench
from bench.gpu_phases.models import Maker, options, some_systems
from catmllm.config import SamplingConfig, load_config
from catmllm.data.prompts import Sample, cif_prompt
from catmllm.sample.engine import RolloutEngine
from catmllm.sample.vllm_engine import VLLMEngine

PROMPTS = 8
TURNS = 2


def prepare(bench: Bench) -> Maker:
    return Maker(some_systems() if bench.tiny else None)


def run(bench: Bench, maker: Maker) -> None:
    python = peers.vllm(bench)
    for size in ("tiny",) if bench.tiny else ("0.5B", "1.5B"):
        with bench.guard(size):
            timed(bench, maker, size, python if size != "0.5B" else None)


def timed(bench: Bench, maker: Maker, size: str, python: str | None) -> None:
    config = load_config(None, [*options(size), "model.llm.attention=sdpa"])
    model, collate = maker.model(config, bench.device)
    model = model.to(bench.device).eval()
    model.llm.to(torch.bfloat16)
    collate.end_id = -1  # no token ends an answer
    prompts = [Sample(cif_prompt(s.identity)) for s in maker.data["train"][:PROMPTS]]
    tokens, few = (8, 4) if bench.tiny else (96, 32)
    params = SamplingConfig(temperature=1.0, top_p=0.95, max_new_tokens=tokens)
    engines: dict[str, Any] = {}
    with contextlib.ExitStack() as ends:
        if python is not None:
            with bench.guard(size, "vLLM"):
                log = bench.settings.folder / "vllm.log"
                engine = VLLMEngine(python, model, collate, params, torch.bfloat16, log)
                ends.callback(engine.close)
                engine.update()
                engines["vLLM"] = engine
        for group in (1,) if bench.tiny else (8, 32):
            rows = PROMPTS * group
            what = f"{size}, {rows} rows"
            rates: dict[str, list[float]] = {}

            def ours(group: int = group) -> int:
                made = RolloutEngine(model, collate, torch.bfloat16).generate(prompts, params, [1], group)
                return sum(len(r.ids) for r in made)

            ways: dict[str, Any] = {
                "ours": ours,
                "generate": generate(model, collate, prompts, group, few, bench),
            }
            if "vLLM" in engines:
                ways["vLLM"] = lambda group=group: sum(
                    len(r.ids) for r in engines["vLLM"].generate(prompts, params, [1], group)
                )
            for turn in range(TURNS + 1):  # the first does not count
                for who, way in ways.items():
                    with bench.guard(what, who):
                        n: list[int] = []
                        seconds = bench.seconds(lambda way=way, n=n: n.append(way()))
                        rates.setdefault(who, []).extend([n[0] / seconds] if turn else [])
            for who, samples in rates.items():
                if samples:
                    bench.row(what, who, unit="tokens/s", samples=samples, ms_step=1e3 * rows / max(samples))
            bench.host_row(what, ours)


def generate(model: Any, collate: Any, prompts: list[Sample], group: int, few: int, bench: Bench) -> Any:
    """transformers' own loop over left-padded prompts; `few` tokens each, since it is slow."""
    ids = [collate.prompt_ids(p) for p in prompts for _ in range(group)]
    width = max(map(len, ids))
    padded = torch.tensor([[collate.pad_id] * (width - len(r)) + r for r in ids], device=bench.device)
    seen = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in ids], device=bench.device)

    def run() -> int:
        with torch.no_grad():
            model.llm.generate(
                input_ids=padded, attention_mask=seen, do_sample=True, top_p=0.95, top_k=0,
                min_new_tokens=few, max_new_tokens=few, pad_token_id=collate.pad_id,
            )  # fmt: skip
        return few * len(ids)

    return run
