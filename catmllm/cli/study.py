"""`catmllm study`: cells of settings times seeds, each a run of the trainer, and their table."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "run cells of settings over several seeds and compare them"


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("study", type=Path, help="a YAML file, configs/studies/spread.yaml for example")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs, study.json and table.md")
    parser.add_argument("--ranks", type=int, default=1, help="processes of a run (default %(default)s)")
    parser.add_argument("--only", metavar="CELL", help="this cell alone")


def run(args: argparse.Namespace) -> int:
    from catmllm.study import study

    print(study(args.study, args.out, args.ranks, args.only))
    return 0
