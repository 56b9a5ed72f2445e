"""A table of texts and energies without any structure: read, kept, split, and never mixed with structures."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from catmllm.cli.main import main
from catmllm.config import DataConfig
from catmllm.data.open import open_data, texts_only
from catmllm.data.shards import Shards, write_shards
from catmllm.data.slabs import load_slabs, pair, split
from catmllm.data.splits import parts_of
from catmllm.structure.system import text_system
from catmllm.structure.text import three_part_text
from tests.data.own_files import found

SLABS = load_slabs()[::12]


def table(path: Path, rows: Sequence[dict[str, object]]) -> Path:
    """The rows as CSV, JSON lines or Parquet, by the ending."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        import pyarrow.parquet as parquet

        parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    else:
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    return path


def rows() -> list[dict[str, object]]:
    return [{"id": s.sid, "text": three_part_text(s), "energy": s.energy} for s in SLABS]


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
def test_texts_come_back_from_the_imported_folder(tmp_path: Path, ending: str) -> None:
    """Word for word with their energies, and split as the structures that they were made of."""
    path = table(tmp_path / f"texts{ending}", rows())
    assert main(["data", "import", str(path), "--out", str(tmp_path / "mine")]) == 0
    kept = Shards(tmp_path / "mine")
    assert [(s.sid, s.text, s.energy) for s in kept] == [tuple(r.values()) for r in rows()]
    assert [(s.adsorbate, s.bulk, s.miller) for s in kept] == [(s.adsorbate, s.bulk, s.miller) for s in SLABS]
    assert all(len(s) == 0 and s.start is None and three_part_text(s) == s.text for s in kept)
    parts = open_data(DataConfig(path=str(tmp_path / "mine"), split_seed=3))
    assert texts_only(parts["train"]) and not texts_only(SLABS)
    for part, systems in split(SLABS, 3).items():
        assert sorted(s.sid for s in parts[part]) == sorted(s.sid for s in systems)


def test_any_words_do_but_none_do_not(tmp_path: Path) -> None:
    given = [
        {"text": "one O on a bridge of Pt(111)", "energy": 1.0},
        {"text": " ", "energy": 1.0},
        {"text": "O</s>Pt (1 1 1)</s>[]", "energy": ""},
        {"text": "O</s>Pt (1 1 1)</s>[]", "energy": "low"},
        {"text": "O</s>Pt (1 1 1)</s>[]", "energy": 50.0},
    ]
    result = found(table(tmp_path / "texts.csv", given))
    assert [s.text for s in result.systems] == ["one O on a bridge of Pt(111)"]
    assert result.items[0].marks == ["no three-part text: taken as it is"]
    (kept,) = write_shards(tmp_path / "kept", result.systems)
    assert kept.adsorbate == result.systems[0].adsorbate == ""  # it was the whole text
    assert result.refused == {
        "unreadable record": 2, "no energy": 1, "implausible energy": 1
    } and result.read == 5  # fmt: skip
    assert len(found(table(tmp_path / "texts.csv", given), labelled=False).items) == 4 - 1


def test_a_total_energy_needs_its_reference_beside(tmp_path: Path) -> None:
    text = {"text": "O</s>Pt (1 1 1)</s>[]"}
    result = found(table(tmp_path / "total.csv", [text | {"total_energy": -30.0}]))
    assert result.refused == {"no reference energy": 1}
    result = found(table(tmp_path / "total.csv", [text | {"total_energy": -30.0, "reference_energy": -29.0}]))
    assert result.systems[0].energy == pytest.approx(-1.0)


def test_texts_beside_structures_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = table(tmp_path / "texts.csv", rows()[:2])
    lines = Path(tmp_path / "rows.jsonl")
    system = SLABS[0]
    columns = {"symbols": system.symbols, "cell": system.lattice.tolist(), "pos": system.positions.tolist()}
    lines.write_text(json.dumps(columns | {"adsorbate": system.adsorbate, "energy": -1.0, "text": "mine"}))
    alone = found(lines)
    assert alone.systems[0].text is None and len(alone.systems[0]) == len(system)
    assert main(["data", "import", str(path), str(lines), "--out", str(tmp_path / "mine")]) == 1
    assert "2 texts and 1 structures: import them apart" in capsys.readouterr().err


def test_a_composition_is_one_pair_and_one_formula_however_it_is_written(tmp_path: Path) -> None:
    """Each writing was a pair and a formula of its own, and a slab stood in training and test."""
    ways = ["Pt3Ni (1 1 1)", "NiPt3 (1 1 1)", "Pt9Ni3 (1,1,1)", "Ni3Pt9  ( 1  1 1 )"]
    texts = [f"O</s>{way}</s>[]" for way in ways]
    given = [{"text": text, "energy": -1.0} for text in [*texts, "O</s>Pt3Ni"]]
    path = table(tmp_path / "texts.csv", given)
    assert main(["data", "import", str(path), "--out", str(tmp_path / "mine")]) == 0
    kept = Shards(tmp_path / "mine")
    assert kept.pair_names == [pair(kept[0]), "NiPt3 (?)"]
    assert set(parts_of(texts, [""] * 4, [""] * 4, "formula", ["NiPt3"], 0)) == {"test"}


def test_a_split_by_what_a_text_does_not_name_is_refused() -> None:
    with pytest.raises(ValueError, match="does not name it; split by column"):
        parts_of(["some words"], ["some words (?)"], [""], "metal", None, 0)
    assert parts_of(["some words"] * 2, ["a", "b"], ["train", "test"], "column", None, 0) == ["train", "test"]
    with pytest.raises(ValueError, match="empty"):
        text_system("  ")
    assert np.isnan(text_system("x", None).energy or np.nan)
