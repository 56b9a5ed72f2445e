"""Cards of models and of the shipped data: their heads are what Hugging Face's library reads, their numbers
those of the records."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import DatasetCard, ModelCard

from catmllm.config import load_config
from catmllm.data.slabs import SHIPPED as SLABS
from catmllm.data.slabs import SHIPPED_SEVENNET, WIDE
from catmllm.models import SHIPPED
from catmllm.pipeline import differences
from catmllm.report.card import CARD, data_card, model_card

ROOT = Path(__file__).parents[2]
RECORD = json.loads((ROOT / "bench" / "results" / "tiny_pipeline.json").read_text())


def numbers(card: str) -> dict[str, float]:
    """Values of a card's head by task and metric."""
    results = ModelCard(card).data.eval_results or []
    return {f"{one.task_name}: {one.metric_type}": one.metric_value for one in results}


def test_the_card_of_the_shipped_model_is_of_the_published_run() -> None:
    """The commit and the numbers of the record behind README.md; what it does not show is said."""
    card = (SHIPPED / CARD).read_text(encoding="utf-8")
    assert f"commit {RECORD['machine']['commit']} " in card
    last = RECORD["config"]["stages"][-1]
    found, energies = numbers(card), RECORD["property"][last]
    for words, mode in (("text and graph", "both"), ("unrelaxed structure", "start"), ("text only", "text")):
        assert found[f"Relaxed adsorption energy, {words}: mae"] == pytest.approx(
            energies[mode]["mae"], abs=6e-5
        )
    share = found["Designs within 0.25 eV, by DIEP (r2SCAN): accuracy"]
    assert share == pytest.approx(RECORD["design"]["judge"]["success"], abs=6e-5)
    assert found["CIFs of unseen systems, held by the grammar: reward"] == pytest.approx(
        RECORD["generation"][last]["reward"], abs=6e-5
    )
    assert "not DFT" in card and f"{RECORD['data']['train']:,} training" in card
    assert ModelCard(card).data.license == "apache-2.0"
    config = json.loads((SHIPPED / "catmllm.json").read_text())
    assert {key for key, _, _ in differences(RECORD["config"], config)} <= {"out"}


def test_a_card_tells_of_its_stage_alone() -> None:
    """No design after `joint`, and no number of a later stage."""
    config = load_config([ROOT / "configs" / "tiny" / "pipeline.yaml"])
    card = model_card("joint", RECORD, config, None)
    found = numbers(card)
    assert found["Relaxed adsorption energy, text and graph: mae"] == pytest.approx(
        RECORD["property"]["joint"]["both"]["mae"], abs=6e-5
    )
    assert not [name for name in found if name.startswith(("Designs", "CIFs"))]
    assert "GA-GRPO" not in card and "says nothing of its training data" in card
    silent = model_card("somewhere", RECORD, config, None)
    assert "has no record" in silent and not numbers(silent)


@pytest.mark.parametrize(
    ("pretrained", "licence", "name"),
    [
        ("Qwen/Qwen2.5-VL-7B-Instruct", "apache-2.0", None),
        ("Qwen/Qwen2.5-VL-3B-Instruct", "other", "qwen-research"),
        ("Qwen/Qwen2.5-3B-Instruct", "other", "qwen-research"),
        ("Qwen/Qwen2.5-VL-72B-Instruct", "other", "qwen"),
        ("Qwen/Qwen3-VL-8B-Instruct", "apache-2.0", None),
        ("somebody/model", "other", "that-of-its-backbone"),
    ],
)
def test_a_card_has_the_licence_of_the_weights_that_it_began_from(
    pretrained: str, licence: str, name: str | None
) -> None:
    config = load_config()
    config.model = replace(config.model, llm=replace(config.model.llm, pretrained=pretrained))
    head = ModelCard(model_card("joint", {}, config, None)).data
    assert (head.license, head.license_name) == (licence, name) and head.base_model == [pretrained]
    assert head.license_link == (f"https://huggingface.co/{pretrained}" if name else None)


def records() -> Iterator[dict[str, Any]]:
    with gzip.open(SLABS, "rt") as lines:
        yield from map(json.loads, lines)


def test_the_card_of_the_data_is_made_from_its_files() -> None:
    page = (ROOT / "docs" / "data_card.md").read_text(encoding="utf-8")
    assert page == data_card(), "python -m catmllm.report.card > docs/data_card.md"
    head = DatasetCard(page).data.to_dict()
    assert head["license"] == "apache-2.0" and head["size_categories"] == ["10K<n<100K"]
    files = [part["data_files"] for part in head["configs"]]
    assert files == [SLABS.name, SHIPPED_SEVENNET.name, [SLABS.name, WIDE.name]]
    usable = [r["energy"] for r in records() if r["ok"] and r["adsorbate"] == "CO"]
    mean = sum(usable) / len(usable)
    assert f"| CO | {len(usable)} | {mean:.2f} |" in page
