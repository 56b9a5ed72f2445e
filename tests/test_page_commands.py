"""Every command in the pages is one that the programs take.

A command line of README.md, CONTRIBUTING.md or docs/ goes through the parser that would read it: options and
choices are right, configurations load, scripts, modules and make's targets are there. Nothing is started;
Python and YAML run in test_page_blocks, docs/rewards line by line in test_reward_docs.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from catmllm.cli.main import command_line
from catmllm.cli.reference import markdown
from catmllm.config import ConfigError, from_arguments
from catmllm.study import is_study, read
from rewards_fast.cli import command_line as reward_command_line
from tests.test_docs import PAGES, READERS, ROOT

BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PLACEHOLDER = re.compile(r"\b[A-Z]{3,}\b|\.\.\.|…|/opt/|<")
LAUNCHER = "catmllm/train.py"


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each command in a page's blocks, comments and what stands before the program left out."""
    for language, body in BLOCK.findall(page.read_text(encoding="utf-8")):
        if language not in ("", "bash"):
            continue
        for line in body.replace("\\\n", " ").splitlines():
            with contextlib.suppress(ValueError):  # a drawing
                words = shlex.split(line, comments=True)
                while words and (re.fullmatch(r"[A-Z_]+=.*", words[0]) or words[0] in ("srun", "export")):
                    words = words[1:]
                if words:
                    yield words


@cache
def targets() -> set[str]:
    return set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def fault(words: list[str]) -> str:
    """What is wrong with a command, or nothing."""
    program, rest = words[0], words[1:]
    if program in ("catmllm", "rewards-fast"):
        parser = command_line() if program == "catmllm" else reward_command_line()
        if {"-h", "--help"} & {*rest}:
            return ""
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                args, more = parser.parse_known_args([word for word in rest if word != "&"])
            if (program == "catmllm" and more) or any(word.startswith("-") for word in more):
                return f"not understood: {' '.join(more)}"
        except SystemExit:
            return said.getvalue()
        return configuration(args.config) if program == "catmllm" and args.command == "plan" else ""
    if LAUNCHER in words:
        return configuration(words[words.index(LAUNCHER) + 1 :])
    if program == "make":
        return ", ".join({w for w in rest if "=" not in w} - targets())
    if program == "python" and rest[:1] == ["-m"] and rest[1].startswith(("catmllm", "rewards_fast")):
        return "" if importlib.util.find_spec(rest[1]) else f"no module {rest[1]}"
    if program == "python" and rest[0].startswith("bench/"):
        return "" if (ROOT / rest[0]).is_file() else f"no file {rest[0]}"
    return ""


def configuration(words: list[str]) -> str:
    """What is wrong with a configuration's words, or a study's; files of the reader's are left out."""
    if words and is_study(ROOT / words[0]):
        read(ROOT / words[0], words[1:])
        return ""
    if "--help" in words:
        return ""
    known = [w for w in words if "=" in w or not READERS.search(w)]
    try:
        from_arguments([w for w in known if not PLACEHOLDER.search(w) and not w.startswith("-")])
    except (ConfigError, OSError) as error:
        return str(error)
    return ""


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_command_of_a_page_is_understood(page: Path) -> None:
    wrong = {" ".join(words): why for words in commands(page) if (why := fault(words))}
    assert not wrong


def test_a_wrong_command_is_found() -> None:
    for line in (
        "catmllm predict slab.cif --modle runs/tiny",
        "catmllm forecast slab.cif",
        "catmllm plan a100x8/7b.yaml grpo.lrr=1",
        "torchrun --nproc-per-node 8 catmllm/train.py a100x8/8b.yaml",
        "rewards-fast score answers.jsonl",
        "make everything",
        "python -m catmllm.nothing",
        "python bench/nothing.py",
    ):
        assert fault(line.split()), line


def test_the_page_of_commands_is_that_of_the_parsers() -> None:
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    assert page == markdown(), "python -m catmllm.cli.reference > docs/commands.md"
