"""The `catmllm` command, a file a subcommand: plan | predict | design | finetune | evaluate run, generator,
candidates, tasks | export | rollouts | study | doctor | completion | data make, relabel, import, oc20,
inspect.

Each subcommand has a line of help, its `options`, and `run`, which loads only what it needs. What they name
themselves is loaded where the parser is made, so that `doctor` runs where a package is missing.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from catmllm.cli import doctor

EXAMPLES = """\
what people do:
  catmllm predict slab.cif                                   energies of structures at hand
  catmllm design "CO</s>Pt9Cu3 (1 1 1)" --energy -1.2        CIFs of new systems at a wanted energy
  catmllm data import calcs/ --out data/mine                 their own structures to a training set
  catmllm finetune --data data/mine                          the trained model on that
  catmllm plan a100x8/7b.yaml a100x8/joint.yaml              whether a large run fits, without a GPU

The model that comes with the package is taken; --model RUN takes another.
catmllm COMMAND --help has the arguments; catmllm doctor says what is missing on this machine.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status. What the user can mend is one line on stderr, without a trace."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        parser = command_line()
    except ModuleNotFoundError as error:
        if given[:1] != ["doctor"]:
            mend = "pip install '.[train]' in the clone; `catmllm doctor` says what else is missing"
            print(f"catmllm: {error.name} is not installed: {mend}", file=sys.stderr)
            return 1
        parser = _empty()
        _add(parser.add_subparsers(dest="command"), "doctor", doctor.HELP, doctor.options, doctor.run)
    args = parser.parse_args(given)
    try:
        status = int(args.run_command(args) or 0)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # of a reader that has seen enough, `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, ModuleNotFoundError, RuntimeError) as error:
        print(f"catmllm {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


class _Command(argparse.ArgumentParser):
    """One of whose kinds may be left out: `catmllm evaluate RUN` is `catmllm evaluate run RUN`."""

    kinds: Mapping[str, Any] = MappingProxyType({})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if args and self.kinds and args[0] not in (*self.kinds, "-h", "--help"):
            args = [next(iter(self.kinds)), *args]
        return super().parse_known_args(args, namespace)


def _empty() -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog="catmllm",
        description="Language models on catalysts: predict energies, design structures, train, measure.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def command_line() -> argparse.ArgumentParser:
    """The parser of `catmllm`; docs/commands.md and the shells' completion are made from it too.

    Raises ModuleNotFoundError where a package of the extra `train` is missing.
    """
    from catmllm.cli import (
        benchmark,
        design,
        evaluate,
        export,
        finetune,
        inspect,
        oc20,
        own,
        plan,
        predict,
        rollouts,
        study,
    )
    from catmllm.data import make, relabel

    modules = {"predict": predict, "design": design, "finetune": finetune, "export": export,
               "plan": plan, "rollouts": rollouts, "study": study, "doctor": doctor}  # fmt: skip
    parser = _empty()
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Command)
    for name, module in modules.items():
        _add(commands, name, module.HELP, module.options, module.run)
    measure = commands.add_parser("evaluate", help="measure a run, or score the CIFs of any tool")
    kinds = measure.add_subparsers(dest="kind", required=True, metavar="KIND")
    _add(kinds, "run", evaluate.HELP, evaluate.options, evaluate.run)
    b = benchmark
    _add(kinds, "generator", b.GENERATOR_HELP, b.generator_options, b.generator)
    _add(kinds, "candidates", b.CANDIDATES_HELP, b.candidates_options, b.candidates)
    _add(kinds, "tasks", b.TASKS_HELP, b.tasks_options, b.tasks)
    measure.kinds = kinds.choices
    data = commands.add_parser("data", help="make training data, and look at it")
    kinds = data.add_subparsers(dest="kind", required=True, metavar="KIND")
    made = "adsorption systems on random slabs, labelled by DIEP (an MLIP, not DFT)"
    _add(kinds, "make", made, make.add_arguments, make.main)
    _add(kinds, "relabel", "new labels for such systems, by DIEP", relabel.add_arguments, relabel.main)
    for name, module in (("import", own), ("oc20", oc20), ("inspect", inspect)):
        _add(kinds, name, module.HELP, module.options, module.run)
    _add(commands, "completion", "print the completion of a shell", _completion_options, _completion)
    return parser


def _completion_options(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Print a script that completes catmllm's commands and options. For bash: catmllm completion bash > "
        "~/.local/share/bash-completion/completions/catmllm"
    )
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"))


def _completion(args: argparse.Namespace) -> int:
    try:
        import shtab
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "shtab writes the script: pip install '.[completion]' in the clone"
        ) from None
    print(shtab.complete(command_line(), args.shell))
    return 0


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
