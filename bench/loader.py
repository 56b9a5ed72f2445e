"""What packing buys, and whether the loader keeps up.

    python bench/loader.py [--quick] [--json] [--base COMMIT]

1. A training step of `joint` on the tiny model (sharded as in training, one process, one thread, bf16):
   samples end to end compared with the same samples padded to the longest, the latter with each attention.
   Tokens per second, padding not counted.
2. The loader on the same samples with 0, 1 and 2 workers: tokens per second,
   compared with what the packed step consumes.
3. The loader on made 70-atom systems (12 Å, 20 nearest neighbours) in packs of 16,384 tokens,
   and the room left empty.

Layouts and numbers of workers run in turn in one process; medians over turns. 1, 3 and
no worker count processor time, workers the clock.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench import record  # first: it decides whose packages are measured
from bench.data import made_slab
from catmllm.config import Config
from catmllm.data.batches import Batch, Collator
from catmllm.data.loader import Loader, Windows
from catmllm.data.open import open_data
from catmllm.models.build import new_model
from catmllm.models.catalytic_mllm import CatalyticMLLM
from catmllm.seeds import Stream
from catmllm.stages.joint import Joint
from catmllm.stages.supervised import Mixture, property_with_dropout
from catmllm.train.sharding import shard
from catmllm.train.stage import Context
from catmllm.world import start

LAYOUTS = (("end to end", False, "varlen"), ("padded, eager", True, "eager"), ("padded, sdpa", True, "sdpa"))


def steps(context: Context, turns: int, size: int) -> dict[str, list[float]]:
    """Tokens per second of forward, backward and AdamW, by layout."""
    stage, model = Joint(context), context.model
    shard(model, context.config, context.world)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    model.train()
    rates: dict[str, list[float]] = {name: [] for name, *_ in LAYOUTS}
    for turn in range(turns + 1):
        batches = stage.batches(size)
        for name, padded, attention in LAYOUTS:
            model.text.set_attn_implementation(attention)
            began = time.process_time()
            for batch in batches:
                out = model(CatalyticMLLM.answer, replace(batch, padded=padded))
                (out.energy.nan_to_num().sum() - out.logprob.mean()).backward()
                optimizer.step()
                optimizer.zero_grad()
            if turn:  # the first warms up
                rates[name].append(sum(b.tokens for b in batches) / (time.process_time() - began))
    return rates


def loading(windows: Windows, turns: int, count: int) -> dict[str, list[float]]:
    """Tokens per second of the loader, by number of workers."""
    rates: dict[int, list[float]] = {0: [], 1: [], 2: []}
    for _ in range(turns):
        for workers, found in rates.items():
            loader = Loader(windows, workers=workers)
            for _ in itertools.islice(loader, count // 4):  # workers start
                pass
            clock = time.perf_counter if workers else time.process_time
            began = clock()
            tokens = sum(b.tokens for b in itertools.islice(loader, count))
            found.append(tokens / (clock() - began))
            del loader  # and its workers, which would make batches ahead beside the next
    return {f"{k} workers": v for k, v in rates.items()}


def large(config: Config, collate: Collator, turns: int, quick: bool) -> dict[str, list[float]]:
    """Packs of 16,384 tokens of 70-atom systems: tokens and samples per second,
    share of the room left empty."""
    data = replace(config.data, cutoff=12.0, max_neighbours=20, strict_neighbours=True)
    rng = np.random.default_rng(0)
    systems = [made_slab(rng) for _ in range(50 if quick else 200)]
    o = config.joint
    mixture = Mixture(
        *(systems, systems),  # of property samples, and of the others
        data,
        Stream.JOINT_ORDER.key(0),
        Stream.JOINT_SAMPLES.key(0),
        0.5,
        lambda s, r: property_with_dropout(s, r, 0.1, 0.1, 0.05),
        0.5,
        o.exemplar_noise,
    )
    windows = Windows(mixture, replace(collate, data=data), budget=4096 if quick else 16384)
    found: dict[str, list[float]] = {
        "tokens per second": [],
        "samples per second": [],
        "room left empty, %": [],
    }
    for turn in range(turns):
        began = time.process_time()
        packs: list[Batch] = windows[turn].packs
        seconds = time.process_time() - began
        tokens = sum(p.tokens for p in packs)
        found["tokens per second"].append(tokens / seconds)
        found["samples per second"].append(sum(map(len, packs)) / seconds)
        found["room left empty, %"].append(100 * (1 - tokens / (len(packs) * (windows.budget or 1))))
    return found


def main() -> None:
    args = record.arguments(__doc__).parse_args()
    config = Config(tensorboard=False)
    systems = open_data()["train"]
    world = start(config)
    model, collate = new_model(config, systems)
    o = config.joint
    mixture = Mixture(
        *(systems, systems),  # of property samples, and of the others
        config.data,
        Stream.JOINT_ORDER.key(0),
        Stream.JOINT_SAMPLES.key(0),
        o.property_share,
        lambda s, r: property_with_dropout(s, r, o.drop_text, o.drop_graph, o.position_noise),
        0.5,
        o.exemplar_noise,
    )
    turns = 1 if args.quick else 5
    of_loader = loading(Windows(mixture, collate, o.batch_size), turns, 10 if args.quick else 100)
    packs = Windows(mixture, collate, budget=2048)
    waste = statistics.mean(1 - p.tokens / 2048 for p in packs[0].packs)
    of_large = large(config, collate, 1 if args.quick else 3, args.quick)
    of_steps = steps(
        Context(config, model, collate, {"train": systems}, world, Path()), turns, 1 if args.quick else 3
    )
    consumed = statistics.median(of_steps["end to end"])
    conditions = {"turns": turns, "threads": 1, "precision": "bf16", "samples a step": o.batch_size}
    made = f"packs of {4096 if args.quick else 16384} tokens of 70-atom systems, no worker"
    record.finish(
        args,
        [
            record.claim(
                "loader_step",
                "a training step of `joint`, tiny model: samples end to end compared with padded ones",
                "tokens per second of processor time",
                {"step": of_steps},
                conditions,
                less_is_better=False,
            ),
            record.claim(
                "loader_rate",
                "the loader compared with what the packed step consumes",
                "tokens per second (workers: of wall time)",
                {
                    name: {"loader": rates, "step": [consumed] * len(rates)}
                    for name, rates in of_loader.items()
                },
                conditions | {"room left empty in packs of 2,048 tokens, %": 100 * waste},
                less_is_better=False,
            ),
            record.claim(
                "loader_large",
                made,
                "see each value",
                {name: {"ours": values} for name, values in of_large.items()},
                conditions | {"turns": len(next(iter(of_large.values())))},
                less_is_better=False,
            ),
        ],
    )


if __name__ == "__main__":
    main()
