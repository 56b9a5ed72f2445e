"""Every Python block of the pages runs as it stands, in a folder that has what its reader has, and every YAML
block is a configuration or a study.

docs/rewards is run in test_reward_docs, the small files of docs/own_data.md in data/test_own_formats; the
parsers' word on every command is in test_page_commands.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from catmllm import study
from catmllm.config import load_config
from catmllm.data.prompts import property_sample
from catmllm.data.shards import write_shards
from catmllm.models.state import save_model
from catmllm.structure.cif import write_cif
from tests.test_docs import PAGES, ROOT
from tests.test_page_commands import BLOCK

MINE = [page for page in PAGES if page.parent.name != "rewards"]


def blocks(page: Path, wanted: str) -> list[str]:
    """A page's blocks in a language."""
    return [body for language, body in BLOCK.findall(page.read_text(encoding="utf-8")) if language == wanted]


PYTHON = {page: found for page in MINE if (found := blocks(page, "python"))}


def given(model: Any, systems: list[Any]) -> dict[str, Any]:
    """What a page's Python has from before: answers, a model and data of TRL's, a sample, atoms of ASE's."""
    return {
        "answers": ["no CIF", write_cif(systems[0])],
        "GRPOTrainer": lambda model, reward_funcs, train_dataset: reward_funcs(
            prompts=["?"], completions=["x"], target=["Pt"], completion_ids=None
        ),
        "model": None,
        "data": None,
        "sample": property_sample(systems[0], "both"),
        "atoms": systems[0].as_ase(),
    }


@pytest.mark.parametrize("page", PYTHON, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_python_of_a_page_runs(
    page: Path, small_model, small_config, train_systems, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_shards(tmp_path / "data" / "oc20", train_systems[:40])
    model, collate = small_model
    save_model(tmp_path / "runs/mine/instruct", model, model.state_dict(), small_config, collate)
    names = given(model, train_systems[:2])
    for body in PYTHON[page]:
        exec(compile(body, str(page), "exec"), names)


def test_the_yaml_of_a_page_is_a_configuration(tmp_path: Path) -> None:
    found = [body for page in MINE for body in blocks(page, "yaml")]
    assert found
    for body in found:
        (tmp_path / "page.yaml").write_text(body)
        if "\ncells:" in body:
            study.read(tmp_path / "page.yaml")
        else:
            load_config([tmp_path / "page.yaml"])
