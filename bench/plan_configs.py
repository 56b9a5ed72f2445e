"""`catmllm plan` of the configurations for GPUs, each stage of each size: counted, not timed.

python bench/plan_configs.py                     # all of them: minutes of CPU per size
python bench/plan_configs.py --folder h100x1     # those of one folder; the records of the others stay
python bench/plan_configs.py --folder a100x8 --size 7b
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench import record  # first: it decides whose packages are measured

STAGES = ("align", "joint", "instruct", "grpo", "ga_grpo")


class Folder(NamedTuple):
    """Configurations of a folder: on which cards, which sizes, and where their stages are."""

    card: str
    ranks: int
    sizes: tuple[str, ...]
    stages: str


FOLDERS = {
    "a100x8": Folder("A100", 8, ("7b", "3b"), "a100x8"),
    "h100x8": Folder("H100", 8, ("7b", "3b"), "a100x8"),
    "h100x1": Folder("H100", 1, ("3b",), "h100x1"),
}


def row(plan: Any) -> dict[str, float]:
    """What a record has of a plan."""
    least = {f"least seconds, {k}": v for k, v in plan.seconds.items()}
    fast, slow = (v for k, v in plan.step.items() if k.startswith("update"))
    sampling = plan.step.get("sampling, at least", 0.0)
    decoding = {f"{k} a token of own decoding": v for k, v in plan.decoding.items()}
    return {
        "GiB per rank": plan.peak,
        **{f"peak of {k}, GiB": v for k, v in plan.phases.items()},
        "tokens per step and rank": plan.tokens,
        "passes": plan.passes,
        "TFLOP per step and rank": sum(plan.flops.values()) / 1e12,
        "sent per step and rank, GiB": sum(plan.sent.values()) / 2**30,
        **least,
        "kernels started per step, at least": plan.launches,
        "µs per start at which the host sets the pace": plan.launch_bound * 1e6,
        "MFU at most, %": 100 * plan.mfu_bound,
        "steps": plan.steps,
        "believable seconds of an update, from": fast,
        "believable seconds of an update, to": slow,
        "seconds of sampling, at least": sampling,
        "slowest rank's time over the mean's": plan.balance,
        "seconds of evaluation after the stage, at least": sum(plan.evaluation.values()),
        "evaluation, % of the steps' least time": 100 * plan.evaluation_share,
        **decoding,
    }


def claim(name: str, quick: bool, size: str | None) -> dict[str, Any]:
    from catmllm.config import load_config
    from catmllm.plan.trace import trace

    folder = FOLDERS[name]
    found: dict[str, dict[str, list[float]]] = {}
    parts = {}
    sizes = [size] if size else folder.sizes[-1:] if quick else folder.sizes
    for size in sizes:
        for stage in ("joint",) if quick else STAGES:
            print(f"{name} {size} {stage}", file=sys.stderr, flush=True)
            config = load_config([f"{name}/{size}.yaml", f"{folder.stages}/{stage}.yaml"])
            plan = trace(config, stage, folder.ranks, card=folder.card)
            found |= {f"{size} {stage}: {k}": {"plan": [float(v)]} for k, v in row(plan).items()}
            parts[f"{size} {stage}"] = {k: round(v, 2) for k, v in plan.parts.items() if v >= 0.005}
    on = f"{folder.ranks} {folder.card}" + ("s" if folder.ranks > 1 else "")
    return record.claim(
        f"plan_{name}",
        f"plans of configs/{name} on {on} of 80 GB; counted, not timed",
        "as named",
        found,
        {
            "systems": "80 atoms, synthetic",
            "steps": "the heaviest of 16",
            "GiB of the training step's peak": parts,
        },
        less_is_better=False,
    )


def main() -> None:
    parser = record.arguments(__doc__)
    parser.add_argument("--folder", choices=FOLDERS, help="only this one")
    parser.add_argument("--size", choices=("3b", "7b"), help="only this one")
    args = parser.parse_args()
    for name in [args.folder] if args.folder else FOLDERS:
        record.finish(args, [claim(name, args.quick, args.size)])


if __name__ == "__main__":
    main()
