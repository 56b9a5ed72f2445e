"""`rewards-fast score` and `profile` on small files."""

import gzip
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
    main(["score", str(source), "-o", str(out), "--text", "answer", "--target", "wanted", "near=0.7"])
    assert [r["total"] for r in records(out)] == pytest.approx([10, -15])


SCORED = {"volume", "density", "n_sites", "min_distance", "total", "comp", "parse", "valid", "phys"}


def test_scores_of_other_answers_or_settings_are_never_kept(tmp_path: Path) -> None:
    source, out = write(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"
    main(["score", str(source), "-o", str(out)])
    whole = out.read_text()
    changed = source.read_text().replace("nothing", "something")
    for name, text, more in (
        ("another answer", changed, []),
        ("another target", source.read_text().replace("Pt3Cu", "Pt2Cu2"), []),
        ("another setting", source.read_text(), ["near=0.7"]),
        ("strict", source.read_text(), ["extract=false"]),
        ("fewer rows", "".join(source.read_text().splitlines(keepends=True)[:3]), []),
        ("other order", "".join(reversed(source.read_text().splitlines(keepends=True)[:4])), []),
    ):
        other = tmp_path / "other.jsonl"
        other.write_text(text)
        with pytest.raises(SystemExit, match=r"out\.jsonl:\d was scored earlier.*--restart"):
            main(["score", str(other), *more, "-o", str(out)])
        assert out.read_text() == whole, name
    # more rows: those alone are new
    source.write_text(source.read_text() + json.dumps({"text": SLAB}) + "\n")
    main(["score", str(source), "threads=1", "-o", str(out)])
    assert out.read_text().startswith(whole) and len(records(out)) == 6
    source.write_text(changed)
    main(["score", str(source), "near=0.7", "-o", str(out), "--restart"])
    assert [r["total"] for r in records(out)] == pytest.approx([-15, 10, -15, 10, -15])


def test_what_is_not_an_output_is_not_touched(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl")
    text = source.read_text()
    with pytest.raises(SystemExit, match="is the input itself"):
        main(["score", str(source), "-o", str(source)])
    for content in (text, "a note\n", "no end", '{"digest": "x"'):
        other = tmp_path / "note"
        other.write_text(content)
        with pytest.raises(SystemExit, match="--restart"):
            main(["score", str(source), "-o", str(other)])
        assert other.read_text() == content and source.read_text() == text
    with pytest.raises(SystemExit, match="no file"):
        main(["score", str(tmp_path), "-o", str(tmp_path / "x")])


def test_a_bad_row_costs_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = json.dumps({"text": SLAB, "target": TARGET}).encode()
    rows = [
        good,
        b'{"text": null}',
        b'{"answer": "y"}',
        b'{"text": 5}',
        b'{"text": "x", "target": "Qq3"}',
        b'{"text": "x", "target": 5}',
        b'{"text": "x", "target": "PT3CU"}',
        b"not json",
        b"[1]",
        b'{"text": "caf\xe9"}',  # latin-1
        b"\xef\xbb\xbf" + good,  # a BOM inside, where files were joined
        b'{"text": "\\ud800"}',
        b"[" * 100_000,
        b"",
        b'{"id": 7, "text": "x", "target": {"Pt": -1}}',
        good,
    ]
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(rows))  # a BOM at the start, Windows' line ends
    main(["score", str(source), "-o", str(out)])
    found = records(out)
    bad = ["no_text"] * 3 + ["bad_target"] * 3 + ["unreadable"] * 3
    assert [r["reason"] for r in found] == [None, *bad, None, "no_block", "unreadable", "bad_target", None]
    assert [r["total"] for r in found if r["total"] is not None] == pytest.approx([10, 10, -15, 10])
    assert all(r[name] is None for r in found if "problem" in r for name in SCORED)
    assert "it has answer" in str(found[2]["problem"]) and "Qq" in str(found[4]["problem"])
    assert "not UTF-8: byte 0xe9" in str(found[9]["problem"]) and found[13]["id"] == 7
    said = capsys.readouterr().err
    assert (
        "11 rows are not scored (4 bad_target, 3 no_text, 4 unreadable); the first is row 2: no text" in said
    )
    whole = out.read_text()
    out.write_text("".join(whole.splitlines(keepends=True)[:8]))
    main(["score", str(source), "-o", str(out)])
    assert out.read_text() == whole
    assert main(["profile", str(source), "--threads", "1", "--json"]) == 0


def test_compressed_files_and_broken_ones(tmp_path: Path) -> None:
    plain = write(tmp_path / "in.jsonl", 700)
    packed = tmp_path / "in.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    for source in (plain, packed):
        main(["score", str(source), "-o", str(tmp_path / f"{source.name}.out")])
    assert (tmp_path / "in.jsonl.out").read_text() == (tmp_path / "in.jsonl.gz.out").read_text()
    packed.write_bytes(packed.read_bytes()[:-200])
    with pytest.raises(SystemExit, match=r"in\.jsonl\.gz: cannot be read on"):
        main(["score", str(packed), "-o", str(tmp_path / "cut")])
    packed.write_bytes(plain.read_bytes())
    with pytest.raises(SystemExit, match="cannot be read on"):
        main(["score", str(packed), "-o", str(tmp_path / "not packed")])
    plain.write_text(plain.read_text(), encoding="utf-16")
    with pytest.raises(SystemExit, match="is UTF-16"):
        main(["score", str(plain), "-o", str(tmp_path / "wide")])


def test_conversations_and_missing_targets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loop = [{"role": "assistant", "content": "I ask."}, {"role": "tool", "content": SLAB}]
    rows = [
        {
            "text": [*loop, {"role": "assistant", "content": SLAB}],
            "target": '{"Pt": 3, "Cu": 1, "C": 1, "O": 1}',
        },
        {"text": [*loop, {"role": "assistant", "content": "No."}], "target": TARGET},
        {"text": SLAB},
        {"text": [1]},
    ]
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    main(["score", str(source), "-o", str(out)])
    assert [r["total"] for r in records(out)] == [pytest.approx(10), -15, pytest.approx(4), None]
    assert "1 of 3 texts have no target composition" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="row 2 has no target composition"):
        main(["score", str(source), "missing_target=error", "-o", str(tmp_path / "strict")])
    with pytest.raises(SystemExit, match="did you mean `near`"):
        main(["score", str(source), "nearr=1", "-o", str(tmp_path / "wrong")])


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
