"""`catmllm plan`: memory, FLOPs and traffic of a training step on N GPUs, without a GPU."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "memory, FLOPs and traffic of a training step on N GPUs, without a GPU"


def options(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Traces one training step of each stage on fake tensors as rank 0 of RANKS: GiB a rank by what they "
        "are, FLOPs, bytes sent, and the largest micro-batch that fits. Status 1 where a stage does not fit. "
        "Of a study (configs/studies/oc20/kl.yaml) every stage of its cells, alike ones once; there the "
        "largest micro-batch is looked for only where a stage does not fit."
    )
    parser.add_argument(
        "config", nargs="+", metavar="FILE.yaml|key=value", help="as in training; or a study's file first"
    )
    parser.add_argument("--ranks", type=int, default=8, help="GPUs (default: 8)")
    parser.add_argument("--stage", action="append", help="only this stage; may be repeated")
    parser.add_argument(
        "--card",
        choices=("A100", "H100", "H200"),
        default="A100",
        help="GPU by its data sheet, of 80, 80 and 141 GB (default: A100)",
    )
    parser.add_argument(
        "--limit", type=float, help="GiB a GPU has for tensors (default: 76 of 80 GB, 135.8 of 141)"
    )
    parser.add_argument(
        "--atoms",
        type=int,
        default=80,
        help="of synthetic systems, where data.path is not there (default: 80)",
    )
    parser.add_argument("--no-search", action="store_true", help="do not look for the largest micro-batch")
    parser.add_argument("--json", action="store_true")


def run(args: argparse.Namespace) -> int:
    from catmllm.config import STAGES, ConfigError, from_arguments
    from catmllm.plan.table import print_plans
    from catmllm.study import every_run, is_study, plans, read

    if args.stage and (wrong := [s for s in args.stage if s not in STAGES]):
        raise ConfigError(f"--stage {wrong[0]}: choose one of {', '.join(STAGES)}")
    first = Path(args.config[0])
    if is_study(first):
        asked = read(first, args.config[1:])
        jobs = plans(every_run(asked), args.stage)
    else:
        config = from_arguments(args.config)
        jobs = [("", config, stage) for stage in args.stage or config.stages]
    return print_plans(jobs, args.ranks, args.card, args.limit, args.atoms, not args.no_search, args.json)
