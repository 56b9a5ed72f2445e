"""`catmllm study`: cells of settings times seeds, each a run of the trainer, and their table."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "run cells of settings over several seeds and compare them"


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("study", type=Path, help="a YAML file, configs/studies/spread.yaml for example")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and of what they say")
    parser.add_argument("--ranks", type=int, help="processes of a run (default: what the file says)")
    parser.add_argument("--seeds", type=int, metavar="N", help="the first N seeds of the file alone")
    parser.add_argument("--only", metavar="CELL", help="this cell alone")
    parser.add_argument(
        "--reuse",
        nargs="+",
        action="extend",
        type=Path,
        default=[],
        metavar="RUNS",
        help="folders of finished runs, whose stages are taken where the same settings have trained them",
    )
    parser.add_argument(
        "--set",
        dest="changes",
        nargs="+",
        action="extend",
        default=[],
        metavar="key=value",
        help="settings of every run, above all others",
    )


def run(args: argparse.Namespace) -> int:
    from catmllm.study import study

    print(
        study(
            args.study, args.out, args.ranks, args.only, seeds=args.seeds, more=args.changes, reuse=args.reuse
        )
    )
    return 0
