"""What the site needs beside MkDocs (a hook of mkdocs.yml), and how well its pages read.

    python .ci/site.py      # `make docs`: reading ease of every page, status 1 where one is too hard

Flesch's reading ease and words per sentence are textstat's, of a page's prose: without code, tables,
figures, headings and addresses; a name in code counts as one short word. Reference pages are printed, and not
held to it.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
# Made from the code, or lists of it.
REFERENCE = ("api.md", "commands.md", "configuration.md", "kernels.md", "kernels_cpu.md")
EASE, WORDS = 50, 25  # at least; at most, on average
FENCE = re.compile(r"^```(\w+) (\S+)$", re.MULTILINE)
NOT_PROSE = (
    (re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL), ""),
    (re.compile(r"<!-- figures: .*?<!-- /figures -->", re.DOTALL), ""),
    (re.compile(r"^(?:\||#|:::|    ).*$", re.MULTILINE), ""),
    (re.compile(r"!?\[([^\]]*)\]\([^)]*\)"), r"\1"),
    (re.compile(r"`[^`]*`"), "code"),
    (re.compile(r"[*_]{1,2}(?=\S)|(?<=\S)[*_]{1,2}"), ""),
)


def on_page_markdown(markdown: str, **_: object) -> str:
    """A block that is a file of the reader's (```yaml my.yaml) shows the file's name."""
    return FENCE.sub(r'```\1 title="\2"', markdown)


def prose(text: str) -> str:
    """What is left of a page to read as sentences; a list's item is one by itself."""
    for pattern, to in NOT_PROSE:
        text = pattern.sub(to, text)
    return re.sub(r"(?<![.!?\s])\s*\n(?=\s*\n|\s*- |\s*\d\. )", ".\n", text)


def main() -> int:
    import textstat

    hard = 0
    print("Flesch  words/sentence  page")
    for page in sorted(DOCS.rglob("*.md")):
        text = prose(page.read_text(encoding="utf-8"))
        name = str(page.relative_to(DOCS))
        ease, words = textstat.flesch_reading_ease(text), textstat.words_per_sentence(text)
        bad = name not in REFERENCE and (ease < EASE or words > WORDS)
        hard += bad
        print(f"{ease:6.1f}  {words:14.1f}  {name}{'  TOO HARD' if bad else ''}")
    if hard:
        print(f"{hard} pages are hard to read: at least {EASE} and at most {WORDS} words", file=sys.stderr)
    return int(hard > 0)


if __name__ == "__main__":
    sys.exit(main())
