"""RoBERTa as a baseline: what transformers makes of the same texts, signals that it has to find, pairs with
graphs, and what stays in the record."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from catmllm.config import Config, to_dict
from catmllm.data.open import open_data
from catmllm.evaluate import text_baselines, trained_baselines
from catmllm.evaluate.baselines import AdsorbateMean, energies
from catmllm.evaluate.metrics import mae
from catmllm.evaluate.text_baselines import main, pair, reader_of
from catmllm.evaluate.trained_baselines import fitted
from catmllm.models.build import new_model
from catmllm.models.state import save_model
from catmllm.structure.system import System
from catmllm.structure.text import three_part_text
from tests.contexts import small

Parts = dict[str, Sequence[System]]


@pytest.fixture(scope="module")
def parts() -> Parts:
    return {name: systems[:80] for name, systems in open_data().items()}


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    monkeypatch.setattr(text_baselines, "SIZES", sizes)
    monkeypatch.setattr(text_baselines, "LONGEST", 64)


def saved(folder: Path, texts: Sequence[str]) -> Path:
    torch.manual_seed(0)
    reader = reader_of(None, texts)
    torch.nn.init.normal_(
        reader.model.classifier.out_proj.weight, std=3.0
    )  # so that texts differ by more than 1e-3
    reader.model.save_pretrained(folder)
    reader.tokenizer.save_pretrained(folder)
    return folder


def test_energies_are_those_of_transformers_own_pipeline(parts: Parts, tmp_path: Path) -> None:
    """Its pipeline reads one text at a time, ours a padded batch: sums of 32 terms in another order."""
    from transformers import pipeline

    texts = [three_part_text(s) for s in parts["train"][:40]]
    texts.append(texts[0] * 20)  # longer than the model can read
    folder = saved(tmp_path / "roberta", texts)
    ask = pipeline("text-classification", str(folder), function_to_apply="none", device="cpu")
    wanted = torch.tensor([ask(text, truncation=True, max_length=64)[0]["score"] for text in texts])
    reader = reader_of(folder, []).eval()
    with torch.no_grad():
        found = reader(texts)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert float(found.std()) > 1e-3
    ids = reader.tokens(texts[:1])["input_ids"][0].tolist()
    names = reader.tokenizer.convert_ids_to_tokens([ids[0], ids[-1]])
    assert names == ["<|im_start|>", "<|im_end|>"]
    assert reader.tokenizer.decode(ids[1:-1]) == texts[0]


def test_a_planted_signal_is_learned(parts: Parts) -> None:
    """Whether the slab has platinum: the mean of the adsorbate cannot say it."""
    planted = {k: [replace(s, energy=float("Pt" in s.bulk)) for s in some] for k, some in parts.items()}
    platinum = [s for some in planted.values() for s in some]
    planted = {"train": platinum[::2], "val": platinum[1::4], "test": platinum[3::4]}
    assert 0.2 < float(np.mean(energies(planted["test"]))) < 0.8
    torch.manual_seed(1)
    reader = reader_of(None, [three_part_text(s) for s in planted["train"]])
    predict = fitted(reader, text_baselines._energies, planted, 400, np.random.default_rng(0), 3e-3)
    guess = AdsorbateMean.fit(planted["train"]).predict(planted["test"])
    truth = energies(planted["test"])
    assert mae(predict(planted["test"]), truth) < 0.5 * mae(guess, truth)


def test_pairs_teach_a_reader_what_graphs_say(parts: Parts) -> None:
    """After pairs, a linear read-out of the first hidden state finds more of the graph's features."""
    systems = [s for some in parts.values() for s in some]
    has = [[el in s.bulk for el in ("Pt", "Pd", "Cu", "Au", "Ni")] for s in systems]
    features = torch.tensor(has, dtype=torch.float32)
    features = (features - features.mean(0)) / features.std(0).clamp(min=1e-6)
    texts = [three_part_text(s) for s in systems]
    torch.manual_seed(2)
    reader = reader_of(None, texts)

    def unexplained() -> float:
        reader.eval()
        with torch.no_grad():
            hidden = reader.first(texts)
        hidden = torch.cat([hidden, torch.ones(len(hidden), 1)], 1)
        weights = torch.linalg.lstsq(hidden[::2], features[::2], driver="gelsd").solution
        return float((hidden[1::2] @ weights - features[1::2]).square().mean())

    before = unexplained()
    kept = features.clone()
    pair(reader, systems, features, 150, np.random.default_rng(0), 3e-3)
    assert unexplained() < 0.5 * before
    assert torch.equal(features, kept)


def test_what_is_there_is_not_trained_again(
    parts: Parts, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trained_baselines, "open_data", lambda data: parts)
    config = small()
    (tmp_path / "metrics.json").write_text(json.dumps({"config": to_dict(config)}))
    command = [str(tmp_path), "--steps", "2", "--pairs", "2"]
    assert main(command) == 0
    assert "roberta_gap: left out" in capsys.readouterr().out
    record = json.loads((tmp_path / "baselines.json").read_text())
    assert set(record["baselines"]) == {"roberta"} and "start" not in record["baselines"]["roberta"]
    first = record["baselines"]["roberta"]
    model, collate = new_model(config, parts["train"])
    (tmp_path / "encoder").mkdir()
    save_model(tmp_path / "encoder", model, model.state_dict(), config, collate)
    assert main(command) == 0
    record = json.loads((tmp_path / "baselines.json").read_text())
    assert set(record["baselines"]) == {"roberta", "roberta_gap"} and record["baselines"]["roberta"] == first
    written = (tmp_path / "baselines.json").stat().st_mtime_ns
    assert main(command) == 0
    assert (tmp_path / "baselines.json").stat().st_mtime_ns == written
    folder = saved(tmp_path / "catberta", [three_part_text(s) for s in parts["train"]])
    assert main([*command, "--pretrained", str(folder)]) == 0
    capsys.readouterr()
    assert main([str(tmp_path), "--steps", "2", "--pairs", "3"]) == 0  # pairs are of the second alone
    said = capsys.readouterr().out
    assert "roberta: kept" in said and "roberta_gap: measured anew, as it was made with {'steps': 2" in said
    names = set(json.loads((tmp_path / "baselines.json").read_text())["baselines"])
    assert names == {"roberta", "roberta_gap", "catberta", "catberta_gap"}


@pytest.mark.parametrize("projector", ["invariant", "atoms"])
def test_graph_features_are_the_encoders(parts: Parts, tmp_path: Path, projector: str) -> None:
    config = small()
    config.model.projector = projector  # type: ignore[assignment]
    systems = parts["train"][:70]  # two batches
    model, collate = new_model(config, parts["train"])
    (tmp_path / "encoder").mkdir()
    save_model(tmp_path / "encoder", model, model.state_dict(), config, collate)
    found = text_baselines._graph_features(tmp_path, systems)
    with torch.no_grad():
        alone = [model.features(collate.graphs([s])).mean(0) for s in systems]
    wanted = torch.stack(alone)
    wanted = (wanted - wanted.mean(0)) / wanted.std(0).clamp(min=1e-6)
    assert found is not None
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-3)


def test_what_cannot_be_read_is_told(parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import BertConfig

    monkeypatch.setattr(trained_baselines, "open_data", lambda data: parts)
    with pytest.raises(SystemExit, match="no metrics"):
        main([str(tmp_path / "nowhere")])
    (tmp_path / "metrics.json").write_text(json.dumps({"config": to_dict(Config())}))
    with pytest.raises(SystemExit, match="no model with its tokenizer"):
        main([str(tmp_path), "--pretrained", str(tmp_path / "nothing")])
    folder = saved(tmp_path / "roberta", [three_part_text(s) for s in parts["train"]])
    BertConfig().save_pretrained(folder)
    with pytest.raises(SystemExit, match="of the kind bert; give"):
        main([str(tmp_path), "--pretrained", str(folder)])
