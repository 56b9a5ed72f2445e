"""`python -m catmllm.cli.reference > docs/commands.md`: the page of every command, made from its parser.

argparse's own help is laid out otherwise from one Python to the next; these tables are not.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from catmllm.cli.main import command_line
from catmllm.evaluate import BENCHMARK
from catmllm.models import SHIPPED
from rewards_fast.cli import command_line as reward_command_line

INTRODUCTION = """\
# Commands

Every command with its arguments, made from the code. `COMMAND --help` says the same in a terminal.
Training is started by `torchrun catmllm/train.py` and takes [keys](configuration.md) instead of options.
"""


def markdown() -> str:
    """docs/commands.md."""
    parts = [INTRODUCTION]
    for parser in (command_line(), reward_command_line()):
        parts += _page(parser)
    return "\n".join(parts)


def _page(parser: argparse.ArgumentParser, help: str = "") -> Iterator[str]:
    """A parser's heading, description and table, and those of its subcommands behind it."""
    below = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    own = [a for a in parser._actions if a not in below and not isinstance(a, argparse._HelpAction)]
    words = parser.description if parser.description and " " in parser.prog else help or parser.description
    yield f"## `{parser.prog}`\n\n{_sentence(words or '')}\n"
    rows = [_row(action, parser.prog) for action in own if action.help != argparse.SUPPRESS]
    if rows:
        yield "\n".join(["| argument | default | meaning |", "|---|---|---|", *rows]) + "\n"
    for group in below:
        said = {choice.dest: choice.help or "" for choice in group._choices_actions}
        for name, child in group.choices.items():
            yield from _page(child, said[name])


def _row(action: argparse.Action, prog: str) -> str:
    name = ", ".join(action.option_strings)
    values = ", ".join(map(str, action.choices)) if action.choices else ""
    shown = action.metavar or (values and f"{{{values}}}") or action.dest.upper()
    if isinstance(shown, tuple):
        shown = " ".join(shown)
    if action.nargs == 0:
        words = name
    else:
        words = f"{name} {shown}".strip() + (" …" if action.nargs in ("+", "*") else "")
    default = action.default
    if (
        default in (None, False, SHIPPED, BENCHMARK, argparse.SUPPRESS)
        or default == []
        or not action.option_strings
    ):
        default = ""
    meaning = ((action.help or "") % {**vars(action), "prog": prog}).replace("<", "&lt;")
    cells = (f"`{words}`", f"`{default}`" if default != "" else "", meaning)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _sentence(words: str) -> str:
    return words[:1].upper() + words[1:].rstrip(".").replace("<", "&lt;") + "."


if __name__ == "__main__":
    print(markdown(), end="")
