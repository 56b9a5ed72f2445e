"""A run on texts alone: trained, measured beside ridge regression, and asked by `catmllm predict`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from catmllm.cli.main import main
from catmllm.config import load_config
from catmllm.data.open import open_data
from catmllm.data.shards import write_shards
from catmllm.data.slabs import load_slabs
from catmllm.design.domain import load_domain
from catmllm.evaluate.baselines import TextRidge
from catmllm.pipeline import run
from catmllm.structure.cif import write_cif
from catmllm.structure.system import text_system
from catmllm.structure.text import three_part_text

SLABS = load_slabs()[::30]
SMALL = [
    "tensorboard=false",
    "model.llm={hidden_size: 48, num_hidden_layers: 1, num_attention_heads: 4, num_key_value_heads: 2, "
    "intermediate_size: 64}",
    "model.encoder={num_layers: 1, sphere_channels: 16, attn_hidden_channels: 16, num_heads: 2, "
    "ffn_hidden_channels: 16}",
    "joint={steps: 6, batch_size: 8, warmup: 2, validate_every: 3, checkpoint_every: 2}",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    write_shards(folder / "mine", [text_system(three_part_text(s), s.energy, s.sid) for s in SLABS])
    settings = [*SMALL, f"data.path={folder / 'mine'}", f"out={folder / 'run'}"]
    assert run(load_config(["tiny/text.yaml"], settings)) == 0
    return folder


def test_the_report_sets_model_ridge_and_their_mean_side_by_side(trained: Path) -> None:
    metrics = json.loads((trained / "run" / "metrics.json").read_text())
    found = metrics["property"]["joint"]
    assert set(found) == {"text", "generated", "ensemble", "parity"}
    assert set(metrics["baselines"]) == {"adsorbate_mean", "text_ridge"}
    share, parts = metrics["ensemble"]["joint"]["share"], open_data(load_config(overrides=SMALL + [
        f"data.path={trained / 'mine'}"]).data)  # fmt: skip
    ridge = TextRidge.fit(parts["train"], parts["val"])
    truth = np.array([s.known_energy for s in parts["test"]])
    assert metrics["baselines"]["text_ridge"]["mae"] == pytest.approx(
        np.abs(ridge.predict(parts["test"]) - truth).mean()
    )
    mixed, alone = np.array(found["parity"]["predicted"]), ridge.predict(parts["test"])
    llm = (mixed - (1 - share) * alone) / share if share else np.full(len(truth), np.nan)
    assert np.abs(mixed - truth).mean() == pytest.approx(found["ensemble"]["mae"], abs=1e-4)
    if share >= 0.2:  # else the digits of the record say little of the model
        assert np.abs(llm - truth).mean() == pytest.approx(found["text"]["mae"], abs=1e-3)
    page = (trained / "run" / "report.html").read_text()
    assert "mean with ridge" in page and "text + graph" not in page
    domain = load_domain(trained / "run" / "joint")
    assert (
        domain is not None
        and domain.contact is None
        and set(domain.adsorbates) <= {s.adsorbate for s in SLABS}
    )


def test_predict_reads_texts_and_the_text_of_a_structure(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same words, the same energy, whether they come as a row or are made of a structure."""
    some = SLABS[:3]
    lines = [{"id": s.sid, "text": three_part_text(s)} for s in some]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "odd.csv").write_text("text\na bare word\n")
    (tmp_path / "slab.cif").write_text(write_cif(some[0], 8))
    asked = [str(tmp_path / name) for name in ("rows.jsonl", "odd.csv", "slab.cif")]
    assert main(["predict", *asked, "--model", str(trained / "run"), "--json"]) == 0
    out, err = capsys.readouterr()
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["file"] for row in rows] == [*(s.sid for s in some), "odd.csv", "slab.cif"]
    assert rows[0]["energy"] == pytest.approx(rows[4]["energy"], abs=1e-5)
    assert rows[0]["system"].startswith(f"{some[0].adsorbate}</s>{some[0].bulk}")
    assert rows[3]["system"] == "a bare word" and rows[3]["outside"] and rows[3]["error"] is None
    assert rows[0]["error"] > 0 and "the rest ridge regression's" in err


def test_a_run_of_texts_goes_on_from_its_checkpoint(trained: Path) -> None:
    """Nothing without a gradient trains, or its optimizer state would be missing from every checkpoint."""
    from safetensors.numpy import load_file

    again = trained / "run"
    whole = load_file(again / "joint" / "model.safetensors")
    (again / "joint" / "model.safetensors").unlink()
    settings = [*SMALL, f"data.path={trained / 'mine'}", f"out={again}"]
    assert run(load_config(["tiny/text.yaml"], settings)) == 0
    for name, values in load_file(again / "joint" / "model.safetensors").items():
        assert np.array_equal(values, whole[name]), name


def test_stages_of_structures_refuse_texts(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = [*SMALL, f"data.path={trained / 'mine'}", f"out={trained / 'other'}"]
    assert run(load_config(overrides=settings)) == 1
    assert "encoder, align, grpo, ga_grpo need structures" in capsys.readouterr().err
    assert not (trained / "other").exists()


def test_finetune_takes_texts(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import catmllm.pipeline

    asked = []
    monkeypatch.setattr(catmllm.pipeline, "run", lambda config: asked.append(config) or 0)
    assert main(["finetune", str(trained / "run"), "--data", str(trained / "mine")]) == 0
    assert asked[0].stages == ("joint",) and asked[0].init == str(trained / "run" / "joint")
