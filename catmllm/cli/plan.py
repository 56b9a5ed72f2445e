"""`catmllm plan`: memory, FLOPs and traffic of a training step on N GPUs, without a GPU."""

from __future__ import annotations

import argparse
from typing import Any


def add(commands: Any) -> None:
    plan = commands.add_parser(
        "plan",
        help="memory, FLOPs and traffic of a training step on N GPUs, without a GPU",
        description="Traces one training step of each stage on fake tensors as rank 0 of RANKS: GiB a rank by what they "
        "are, FLOPs, bytes sent, and the largest micro-batch that fits. Status 1 where a stage does not fit.",
    )
    plan.add_argument("config", nargs="+", metavar="FILE.yaml|key=value", help="as in training")
    plan.add_argument("--ranks", type=int, default=8, help="GPUs (default: 8)")
    plan.add_argument("--stage", action="append", help="only this stage; may be repeated")
    plan.add_argument(
        "--limit", type=float, default=76.0, help="GiB a GPU has for tensors (default: 76 of 80)"
    )
    plan.add_argument(
        "--atoms",
        type=int,
        default=80,
        help="of synthetic systems, where data.path is not there (default: 80)",
    )
    plan.add_argument("--no-search", action="store_true", help="do not look for the largest micro-batch")
    plan.add_argument("--json", action="store_true")
    plan.set_defaults(run_command=run)


def run(args: argparse.Namespace) -> int:
    from catmllm.config import STAGES, ConfigError, from_arguments
    from catmllm.plan.table import print_plans

    config = from_arguments(args.config)
    stages = args.stage or list(config.stages)
    for stage in stages:
        if stage not in STAGES:
            raise ConfigError(f"--stage {stage}: choose one of {', '.join(STAGES)}")
    return print_plans(config, stages, args.ranks, args.limit, args.atoms, not args.no_search, args.json)
