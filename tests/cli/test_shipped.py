"""The model that comes with the package: what a newcomer types without any run.

The notebook (test_notebook.py) designs with it.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard

from catmllm.cli.finetune import configured
from catmllm.cli.main import main
from catmllm.cli.trained import load_to_read
from catmllm.config import load_config
from catmllm.data.slabs import load_slabs, split
from catmllm.design.predict import predict_energies, predictor_of, question
from catmllm.models import SHIPPED
from catmllm.structure.cif import write_cif


def said(paths: list[Path], capsys: pytest.CaptureFixture[str]) -> list[dict]:
    assert main(["predict", *map(str, paths), "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_predict_needs_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Systems of the test split, in a folder where nothing was trained; the mean of the adsorbate errs by
    0.58 eV on them."""
    monkeypatch.chdir(tmp_path)
    systems = split(load_slabs())["test"][::48]
    for k, system in enumerate(systems):
        (tmp_path / f"{k:02}.cif").write_text(write_cif(system))
    rows = said(sorted(tmp_path.glob("*.cif")), capsys)
    assert [r["system"] for r in rows] == [s.identity for s in systems]
    errors = np.abs([r["energy"] - s.known_energy for r, s in zip(rows, systems)])
    assert errors.mean() < 0.2 and not any(r["outside"] for r in rows)
    assert all(0 < r["error"] < 1 and r["model"] == str(SHIPPED) for r in rows)


def test_finetune_begins_from_it(tmp_path: Path) -> None:
    config = configured(SHIPPED, tmp_path, tmp_path / "out", [])
    assert config.init == str(SHIPPED) and config.stages == ("encoder", "joint")


def test_it_is_as_good_as_its_card_says() -> None:
    """The MAE on all test systems is that of the run's record: these weights are those that were measured."""
    systems = split(load_slabs())["test"]
    model, collate, _ = load_to_read(SHIPPED)
    predicted = predict_energies(model, collate, [question(s) for s in systems])
    error = np.abs(predicted - [s.known_energy for s in systems]).mean()
    (told,) = [
        one.metric_value
        for one in ModelCard((SHIPPED / "README.md").read_text(encoding="utf-8")).data.eval_results or []
        if one.task_name.endswith("text and graph") and one.metric_type == "mae"
    ]
    # the card rounds to 5e-5; another processor may sum bfloat16 products in another order
    assert error == pytest.approx(told, abs=1e-3)


@pytest.mark.parametrize("fast", [True, False])
def test_it_is_read_as_it_would_be_trained_here(monkeypatch: pytest.MonkeyPatch, fast: bool) -> None:
    """Trained in bfloat16, and read in float32 by a CPU that has no products of bfloat16."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: fast)
    model, _, config = load_to_read(SHIPPED)
    read = predictor_of(load_config(None, [f"ga_grpo.predictor={SHIPPED}"]), torch.device("cpu"))
    assert config.precision == ("bf16" if fast else "fp32") and read is not None
    for one in (model, read[0]):
        assert {p.dtype for p in one.llm.parameters()} == {torch.bfloat16 if fast else torch.float32}
