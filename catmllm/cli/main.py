"""The `catmllm` command, a file a subcommand: plan | predict | design | evaluate | export | data make, oc20, inspect.

Each subcommand has `add`, its options, and `run`, which loads only what it needs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from catmllm.cli import design, evaluate, export, inspect, oc20, plan, predict
from catmllm.data import make


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status. What the user can mend is one line on stderr, without a trace."""
    parser = _parser()
    args = parser.parse_args(arguments)
    try:
        return int(args.run_command(args) or 0)
    except (ValueError, OSError, ModuleNotFoundError, RuntimeError) as error:
        print(f"catmllm {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="catmllm",
        description="Language models on catalysts: predict energies, design structures, evaluate.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for subcommand in (predict, design, evaluate, export, plan):
        subcommand.add(commands)
    data = commands.add_parser("data", help="make training data, and look at it")
    kinds = data.add_subparsers(dest="kind", required=True, metavar="KIND")
    maker = kinds.add_parser(
        "make", help="adsorption systems on fcc slabs, labelled by SevenNet-0 (an MLIP, not DFT)"
    )
    make.add_arguments(maker)
    maker.set_defaults(run_command=make.main)
    for kind in (oc20, inspect):
        kind.add(kinds)
    return parser
