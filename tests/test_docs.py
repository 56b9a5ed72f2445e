"""What the pages name is in the tree: files, folders and links, as a reader would follow them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "CONTRIBUTING.md", ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FOLDERS = (".ci", "bench", "catmllm", "configs", "csrc", "docs", "kernels", "rewards_fast", "tests")
# Names that stand for a file of the reader's: the walks' `mine`, `my_rewards.py`, `file.py`.
READERS = re.compile(r"(^|[/_])(my|mine|file)([._]|/|$)")
# A figure names the script that made it, which may have moved since that commit.
FIGURES = re.compile(r"<!-- figures: \w+ -->.*?<!-- /figures -->", re.DOTALL)
IN_A_FOLDER = re.compile(rf"(?<![\w./-])(?:{'|'.join(map(re.escape, FOLDERS))})/[\w./-]*")
SOURCE = re.compile(r"(?<![\w./<-])[\w-]+(?:/[\w-]+)*\.(?:py|pyx|pyi|cpp|h)\b(?!\.)")
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")
SOURCES = [
    "/" + str(path.relative_to(ROOT))
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".pyx", ".pyi", ".cpp", ".h")
]


def absent(page: Path, text: str) -> Iterator[str]:
    """The names in a page's text that lead nowhere."""
    for link in LINK.findall(text):
        if not (page.parent / link).exists():
            yield link
    for found in IN_A_FOLDER.findall(text):
        name = found.rstrip("./")
        path = ROOT / name
        if not READERS.search(name) and not path.exists() and not list(path.parent.glob(f"{path.name}.*")):
            yield name  # without an ending a pair is meant, csrc/cif/scan
    for name in (
        SOURCE.findall(text) if page.parent.name != "rewards" else ()
    ):  # there: files of other programs
        if not READERS.search(name) and not any(source.endswith("/" + name) for source in SOURCES):
            yield name


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_path_in_a_page_is_in_the_tree(page: Path) -> None:
    assert not list(absent(page, FIGURES.sub("", page.read_text(encoding="utf-8"))))


def test_a_path_that_leads_nowhere_is_found() -> None:
    text = (
        "`catmllm/rl/reward.py`, [here](docs/none.md#a), `escn/triton.py`, bench/none and `catmllm/seeds.py`"
    )
    assert sorted(set(absent(ROOT / "README.md", text))) == [
        "bench/none",
        "catmllm/rl/reward.py",
        "docs/none.md",
        "escn/triton.py",
    ]
