"""`rewards-fast score` and `profile` on small files."""

import json
from pathlib import Path

import pytest

from rewards_fast.cli import main
from tests.rewards_fast.cif_texts import SLAB, TARGET


def write(path: Path, n: int = 5) -> Path:
    rows = [{"id": i, "text": SLAB if i % 2 else "nothing", "target": TARGET} for i in range(n)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def records(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_score_and_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = write(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"
    assert main(["score", str(source), "-o", str(out)]) == 0
    whole = out.read_text()
    assert [r["total"] for r in records(out)] == pytest.approx([-15, 10, -15, 10, -15])
    assert records(out)[0]["reason"] == "no_block" and records(out)[1]["id"] == 1
    assert records(out)[0]["volume"] is None
    assert "5/5" in capsys.readouterr().err

    lines = whole.splitlines(keepends=True)
    out.write_text("".join(lines[:2]) + lines[2][:20])  # cut off in the third line
    main(["score", str(source), "-o", str(out)])
    assert out.read_text() == whole
    main(["score", str(source), "-o", str(out)])  # nothing left to do
    assert out.read_text() == whole


def test_score_parquet(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    source, out = tmp_path / "in.parquet", tmp_path / "out.jsonl"
    parquet.write_table(pyarrow.table({"answer": [SLAB, "x"], "wanted": ["Pt3CuCO", ""]}), source)
    main(["score", str(source), "-o", str(out), "--text", "answer", "--target", "wanted", "--near", "0.7"])
    assert [r["total"] for r in records(out)] == pytest.approx([10, -15])


def test_errors_name_the_place(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "x"}\n{"answer": "y"}\n')
    with pytest.raises(SystemExit, match="row 2: no text under 'text'"):
        main(["score", str(source), "-o", str(tmp_path / "a")])
    source.write_text('{"text": "x"}\nnot json\n')
    with pytest.raises(SystemExit, match=r"in\.jsonl:2"):
        main(["score", str(source), "-o", str(tmp_path / "b")])
    source.write_text('{"text": "x", "target": "Qq3"}\n')
    with pytest.raises(SystemExit, match="Qq"):
        main(["score", str(source), "-o", str(tmp_path / "c")])


def test_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "in.jsonl", 8)
    assert main(["profile", str(source), "--threads", "2", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["threads"] == [1, 2] and len(result["groups"]) == 4
    assert result["groups"][-1]["parse"] > 0 and result["groups"][-1]["texts_per_s_1"] > 0
    pytest.importorskip("matplotlib")
    plot = tmp_path / "profile.png"
    cif = tmp_path / "one.cif"
    cif.write_text(SLAB)
    main(["profile", str(cif), "--threads", "1", "--plot", str(plot)])
    assert plot.stat().st_size > 1000 and "texts/s" in capsys.readouterr().out
