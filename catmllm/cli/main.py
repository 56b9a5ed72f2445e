"""The `catmllm` command, a file a subcommand: plan | predict | design | finetune | evaluate | export |
study | data make, relabel, import, oc20, inspect.

Each subcommand has a line of help, its `options`, and `run`, which loads only what it needs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from catmllm.cli import design, evaluate, export, finetune, inspect, oc20, own, plan, predict, study
from catmllm.data import make, relabel

COMMANDS = {
    "predict": predict,
    "design": design,
    "finetune": finetune,
    "evaluate": evaluate,
    "export": export,
    "plan": plan,
    "study": study,
}
KINDS = {"import": own, "oc20": oc20, "inspect": inspect}  # of `catmllm data`


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
    for name, module in COMMANDS.items():
        _add(commands, name, module.HELP, module.options, module.run)
    data = commands.add_parser("data", help="make training data, and look at it")
    kinds = data.add_subparsers(dest="kind", required=True, metavar="KIND")
    made = "adsorption systems on random slabs, labelled by DIEP (an MLIP, not DFT)"
    _add(kinds, "make", made, make.add_arguments, make.main)
    _add(kinds, "relabel", "new labels for such systems, by DIEP", relabel.add_arguments, relabel.main)
    for name, module in KINDS.items():
        _add(kinds, name, module.HELP, module.options, module.run)
    return parser


def _add(
    to: Any,
    name: str,
    help: str,
    options: Callable[[argparse.ArgumentParser], None],
    run: Callable[[argparse.Namespace], int],
) -> None:
    subcommand = to.add_parser(name, help=help)
    options(subcommand)
    subcommand.set_defaults(run_command=run)
