"""Sampling speed of the rollout engine beside Hugging Face `generate`: same weights, prompts, lengths and dtype.

    python bench/rollout.py [--quick] [--json]

Both run in turn in this process on one thread; every row decodes exactly the same number of tokens (the end token is
disabled), so that tokens per second compare like with like. Medians over repeats.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable

import torch

from catmllm.config import Config, SamplingConfig
from catmllm.data.prompts import Sample, cif_prompt
from catmllm.data.slabs import load_slabs, split
from catmllm.models.build import new_model
from catmllm.sample.engine import RolloutEngine


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer tokens and repeats")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokens, repeats = (32, 1) if args.quick else (128, 5)
    systems = split(load_slabs())["train"]
    config = Config()
    config.model.llm.attention = "eager"  # of `generate`, whose fastest on a CPU it is; ours has its own
    model, collate = new_model(config, systems)
    model.eval()
    prompts = [Sample(cif_prompt(s.identity)) for s in systems[:8]]
    params = SamplingConfig(temperature=1.0, top_p=0.9, max_new_tokens=tokens)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        model.llm.to(dtype)
        for group in (1, 16):
            engine = RolloutEngine(model, collate, dtype)
            ours, peer = [], []
            for repeat in range(repeats + 1):
                ours.append(seconds(engine.generate, prompts, params, [repeat], group))
                peer.append(seconds(hugging_face, model, collate, prompts, params, group))
            # The first round of each warms up. Ours may end a row early, so its rate counts what it sampled.
            n = len(prompts) * group * tokens
            rate = statistics.median(n / t for t in peer[1:])
            mine = statistics.median(
                sum(len(r.ids) for r in engine.generate(prompts, params, [k], group)) / t
                for k, t in enumerate(ours[1:], 1)
            )
            found.append(
                {
                    "dtype": str(dtype)[6:],
                    "samples_per_prompt": group,
                    "rows": len(prompts) * group,
                    "tokens": tokens,
                }
                | {
                    "ours_tokens_per_s": round(mine),
                    "generate_tokens_per_s": round(rate),
                    "ratio": round(mine / rate, 2),
                }
            )
    if args.json:
        print(
            json.dumps(
                {"torch": torch.__version__, "machine": platform.machine(), "threads": 1, "rows": found}
            )
        )
        return
    print(
        f"torch {torch.__version__}, {platform.machine()}, 1 thread, {repeats} repeats, {tokens} tokens a row"
    )
    for row in found:
        print(
            f"{row['dtype']:9s} {row['rows']:4d} rows ({row['samples_per_prompt']} a prompt): "
            f"ours {row['ours_tokens_per_s']:6d} tok/s, generate {row['generate_tokens_per_s']:6d} tok/s, "
            f"ratio {row['ratio']:.2f}"
        )


def seconds(run: Callable[..., object], *arguments: object) -> float:
    began = time.perf_counter()
    run(*arguments)
    return time.perf_counter() - began


@torch.no_grad()
def hugging_face(model, collate, prompts: list[Sample], params: SamplingConfig, group: int) -> None:
    """transformers' own sampling on the same left-padded prompts."""
    rows = [collate.prompt_ids(p) for p in prompts for _ in range(group)]
    width = max(map(len, rows))
    ids = torch.tensor([[collate.pad_id] * (width - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    model.llm.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=True,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=0,
        min_new_tokens=params.max_new_tokens,
        max_new_tokens=params.max_new_tokens,
        pad_token_id=collate.pad_id,
    )


if __name__ == "__main__":
    main()
