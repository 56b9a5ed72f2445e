"""`catmllm data inspect`: the numbers are the dataset's, the page stands alone."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from catmllm.cli.main import main
from catmllm.data.shards import Shards, write_shards
from catmllm.data.slabs import load_slabs
from catmllm.report.dataset import bar_chart, facts, token_lengths
from catmllm.structure.text import configuration

SYSTEMS = load_slabs()[::20]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return write_shards(tmp_path_factory.mktemp("dataset"), SYSTEMS)


def test_command(shards: Shards, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "inspect", str(shards.folder), "--out", str(tmp_path), "--pictures", "5"]) == 0
    printed = capsys.readouterr().out
    assert re.search(rf"systems +{len(SYSTEMS)}\b", printed) and "tokens, CIF" in printed and "█" in printed
    page = (tmp_path / "inspect.html").read_text()
    assert page.count("<svg") == 10 and "data:image/png;base64," in page
    assert not re.search(r"https?://|<script", page.replace("http://www.w3.org", ""))
    for name in ("energies.png", "tokens.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    parser = HTMLParser()
    parser.feed(page)
    parser.close()
    before = page
    main(["data", "inspect", str(shards.folder), "--out", str(tmp_path), "--pictures", "5", "--seed", "3"])
    assert (tmp_path / "inspect.html").read_text() != before


def test_facts_are_counted(shards: Shards) -> None:
    found = dict(facts(shards, SYSTEMS))
    energies = np.array([s.energy for s in SYSTEMS])
    assert found["systems"] == f"{len(SYSTEMS):,}"
    assert f"mean {energies.mean():.3f}" in found["energy (eV)"]
    assert found["bulks"] == str(len({s.bulk for s in SYSTEMS}))
    assert found["(bulk, Miller index)"] == str(len({(s.bulk, s.miller) for s in SYSTEMS}))
    unbound = np.mean([configuration(s) == "[]" for s in SYSTEMS])
    assert found[f"unbound of {len(SYSTEMS)}"] == f"{unbound:.1%}"
    assert sum(int(n) for n in found["train / val / test"].split(" / ")) == len(SYSTEMS)


def test_token_lengths_are_those_of_training(shards: Shards) -> None:
    lengths = token_lengths(SYSTEMS[:50])
    assert all(len(n) == 50 for n in lengths.values())
    assert (lengths["CIF sample"] > lengths["CIF"]).all() and lengths["CIF"].mean() < 150


def test_bars_add_up() -> None:
    values = np.random.default_rng(0).normal(size=1000)
    rows = bar_chart(values).splitlines()
    assert sum(int(row.rsplit(" ", 1)[1]) for row in rows) == 1000
    assert bar_chart(np.array([1.0])).endswith(" 1")


def test_what_cannot_be_looked_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "inspect", str(tmp_path)]) == 1
    assert "no dataset" in capsys.readouterr().err
    write_shards(tmp_path, [])
    assert main(["data", "inspect", str(tmp_path)]) == 1
    assert "holds no system" in capsys.readouterr().err
