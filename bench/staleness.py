"""GRPO one step off its policy compared with GRPO on it: the reward of each of 50 steps, over seeds.

    python bench/staleness.py [--steps 50] [--seeds 3] [--half]

The model of the package, free of the grammar (under it every answer has the whole reward before training
begins), learns to write the CIFs of four systems: with all of them the reward moves less in so few steps
than it differs from prompt to prompt. A service samples in both cases, so that only `grpo.staleness` differs:
with 1 the answers of a step are those of the weights one step before. `each` in the record has the reward of
every step of every run; a case is compared by the mean over its last ten steps, one value a seed. A lag asks
for smaller steps: `--half` halves the stage's learning rate, in a record of its own.
"""

from __future__ import annotations

import os
import socket
import statistics
import subprocess
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench import record  # first: it decides whose packages are measured
from catmllm.config import SamplingConfig
from catmllm.data.open import open_data
from catmllm.evaluate.baselines import evenly_spaced
from catmllm.models import SHIPPED
from catmllm.models.state import load_model
from catmllm.sample.wire import Client
from catmllm.stages.grpo import GRPO
from catmllm.train.loop import train
from catmllm.train.metrics import read_log
from catmllm.train.stage import Context
from catmllm.world import World, start

LAST = 10  # steps whose mean reward stands for a run
SYSTEMS, PROMPTS, ANSWERS, TOKENS = 4, 4, 10, 320


def main() -> None:
    parser = record.arguments(__doc__)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--half", action="store_true", help="with half the learning rate")
    args = parser.parse_args()
    steps, seeds = (4, 2) if args.quick else (args.steps, args.seeds)
    torch.set_num_threads(1)
    systems = evenly_spaced(open_data()["train"], SYSTEMS)
    each: dict[str, list[list[float]]] = {"1": [], "0": []}
    with tempfile.TemporaryDirectory() as folder, Service() as address:
        config = load_model(SHIPPED)[2]
        lr = config.grpo.lr / (1 + args.half)
        world = start(config)
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            for seed in range(seeds):
                for staleness, curves in each.items():
                    place = Path(folder) / f"{seed}-{staleness}"
                    curves.append(rewards(address, int(staleness), lr, seed, steps, systems, world, place))
        torch.distributed.destroy_process_group()
    record.finish(args, [claim(f"rl_staleness{'_half' * args.half}", each, steps, lr)])


class Service:
    """`catmllm rollouts` beside this process, by its address."""

    def __enter__(self) -> str:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        command = [sys.executable, "-m", "catmllm.cli", "rollouts", "--port", str(port)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        address = f"http://127.0.0.1:{port}"
        Client(address, 120.0).wait()
        return address

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()


def rewards(
    address: str,
    staleness: int,
    lr: float,
    seed: int,
    steps: int,
    systems: Any,
    world: World,
    folder: Path,
) -> list[float]:
    """The mean reward of each step of a run from the model of the package."""
    model, collate, config = load_model(SHIPPED)
    grpo = replace(
        config.grpo,
        steps=steps,
        lr=lr,
        batch_size=PROMPTS,
        group_size=ANSWERS,
        property_share=0.0,
        validate_every=0,
        checkpoint_every=1000,
        rollout="service",
        service=address,
        staleness=staleness,
        sampling=SamplingConfig(max_new_tokens=TOKENS, grammar=False),
    )
    config = replace(config, seed=seed, grpo=grpo, tensorboard=False)
    folder.mkdir()
    train(GRPO, Context(config, model, collate, {"train": systems}, world, folder))
    return [row["reward"] for row in read_log(folder / "log.jsonl")]


def claim(name: str, each: dict[str, list[list[float]]], steps: int, lr: float) -> dict[str, Any]:
    """The record of all curves: of the last steps by case, with the spread over seeds."""
    names = {"1": "staleness 1", "0": "staleness 0"}
    first, last = (
        {names[k]: [statistics.mean(c[part]) for c in curves] for k, curves in each.items()}
        for part in (slice(None, LAST), slice(-LAST, None))
    )
    cases = {"first steps": first, "last steps": last}
    conditions = {
        "steps": steps,
        "seeds": len(each["0"]),
        "learning rate": lr,
        "systems": SYSTEMS,
        "prompts": PROMPTS,
        "answers per prompt": ANSWERS,
        "mean over": f"{LAST} steps",
    }
    says = "mean reward of GRPO whose answers are sampled one step ahead, and by the weights of the step"
    found = record.claim(name, says, "reward", cases, conditions, less_is_better=False)
    for case, of in cases.items():
        found["value"][case] = statistics.mean(of["staleness 1"])
        found["peer"][case] = {"staleness 0": statistics.mean(of["staleness 0"])}
    deviation = {
        case: {who: statistics.stdev(v) if len(v) > 1 else None for who, v in of.items()}
        for case, of in cases.items()
    }
    return found | {"deviation": deviation, "each": {names[k]: v for k, v in each.items()}}


if __name__ == "__main__":
    main()
