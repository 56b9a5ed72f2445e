"""Pages agree with the records in bench/results, and records say what they must.
No test here measures anything."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench import record, studies, tables
from catmllm.study.cells import read

ROOT = Path(__file__).parents[2]
RECORDS = {p.name: json.loads(p.read_text()) for p in sorted((ROOT / "bench" / "results").glob("*.json"))}
RUN = RECORDS.pop("tiny_pipeline.json")  # the metrics of a run, as catmllm writes them
STUDIES = {p.stem: json.loads(p.read_text()) for p in sorted(studies.RESULTS.glob("*.json"))}
KEYS = {"claim", "says", "unit", "better", "value", "peer", "ratio", "spread", "conditions"}
KEYS |= {"command", "quick", "commit", "dirty", "date", "versions", "processor", "load"}


def git(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)


def missing_commits(named: dict[str, str]) -> dict[str, str]:
    """What names a commit that the history does not have. (A copy of the repository on the same disk may
    still hold a commit that was rebased away, so that being there is not enough.)"""
    return {name: c for name, c in named.items() if git("merge-base", "--is-ancestor", c, "HEAD").returncode}


def test_pages_agree_with_the_records() -> None:
    found = list(tables.pages())
    assert len(found) >= 9
    for page in found:
        text = page.read_text(encoding="utf-8")
        assert tables.rendered(text) == text, f"{page}: run `make tables`"


def test_every_figure_stands_in_a_page() -> None:
    used = {m[2] for page in tables.pages() for m in tables.BLOCK.finditer(page.read_text(encoding="utf-8"))}
    assert used == set(tables.FIGURES)


def test_a_changed_number_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tables.rendered("<!-- figures: plan -->\n<!-- /figures -->")
    assert tables.rendered(text) == text
    one = RECORDS["plan.json"]
    one = one | {"value": {case: 2 * x for case, x in one["value"].items()}}
    (tmp_path / "plan.json").write_text(json.dumps(one))
    monkeypatch.setattr(record.read, "__defaults__", (tmp_path,))
    assert tables.rendered(text) != text
    (tmp_path / "plan.json").unlink()
    assert "Not measured yet" in tables.rendered(text)


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_is_whole(name: str) -> None:
    one = RECORDS[name]
    assert set(one) >= KEYS
    assert name in (f"{one['claim']}.json", f"{one['claim']}.{record.slug(one)}.json")
    assert one["dirty"] is False, "measured with changes that no commit has: commit, and measure again"
    about = one["processor"]
    assert about.get("device") or {"kind", "name", "family", "model", "sets"} <= set(about)
    assert about.get("device") or about["family"] is not None or "note" in about
    assert (ROOT / "bench" / "results" / name).read_text(encoding="utf-8") == record.layout(one) + "\n"
    for case, others in one["ratio"].items():
        for who, ratio in others.items():
            bounds = one["spread"].get(case, {}).get(who)
            if bounds:
                assert 0 < 0.999 * bounds[0] <= ratio <= 1.001 * bounds[1], (case, who)
            elif case in one["value"]:
                pair = (one["value"][case], one["peer"][case][who])
                expected = pair[1] / pair[0] if one["better"] == "less" else pair[0] / pair[1]
                assert ratio == pytest.approx(expected, rel=2e-3), (case, who)


def test_commits_are_in_the_history() -> None:
    if git("rev-parse", "--is-inside-work-tree").stdout.strip() != "true":
        pytest.skip("this tree is no git repository: whether the records' commits exist was not checked")
    named = {name: one["commit"] for name, one in RECORDS.items() if one["commit"]}
    named |= {"tiny_pipeline.json": RUN["machine"]["commit"]}
    named |= {f"rl_seeds.json: {k}": c for k, c in RECORDS["rl_seeds.json"]["conditions"]["commits"].items()}
    named |= {f"studies/{name}.json: {c}": c for name, said in STUDIES.items() for c in said["commits"]}
    lost = missing_commits(named)
    if lost and git("rev-parse", "--is-shallow-repository").stdout.strip() == "true":
        pytest.skip(f"a shallow clone lacks the commits of {', '.join(lost)}: they were not checked")
    assert not lost
    assert missing_commits({"made up": "ef141bf"})  # which a results file once named


def test_only_ratios_lack_a_commit() -> None:
    for name, one in RECORDS.items():
        assert one["commit"] or (not one["value"] and "note" in one["conditions"]), name


def test_short_runs_are_called_so() -> None:
    for name, one in RECORDS.items():
        assert ("--quick" in one["command"]) == one["quick"], name
        assert ("--quick" in tables.source(one)) == one["quick"], name


def test_no_page_names_a_file_that_went() -> None:
    """Figures once lay in text files."""
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        assert not re.search(r"bench/results/\w+\.txt", page.read_text(encoding="utf-8")), page


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_has_its_rows_and_its_picture(name: str) -> None:
    said = STUDIES[name]
    path = studies.RESULTS / f"{name}.json"
    assert path.read_text(encoding="utf-8") == record.layout(record.rounded(said)) + "\n"
    rows = studies.shown(name, said)
    asked = read(ROOT / "configs" / "studies" / f"{name}.yaml")
    assert {cell for row in rows.values() for cell in row} == set(asked.cells)
    assert [tuple(pair) for pair in said["seeds"]] == list(asked.seeds)
    assert (studies.PICTURES / f"{name}.png").stat().st_size > 5000


def test_a_study_is_kept(tmp_path: Path) -> None:
    cell = {"mean": 0.2, "sd": 0.01, "each": [0.19, 0.21], "interval": [0.18, 0.22]}
    other = cell | {"more": 0.1234567, "more_interval": [0.1, 0.14], "more_over_seeds": [-0.01, 0.25],
                    "separate": False, "seeds_needed": 4}  # fmt: skip
    rows = {row: {"none": cell, "all of B": other} for row in studies.SHOWN["inverse_helps"]}
    said = {"study": "x", "sentences": [], "rows": rows | {"of no page": {}}, "commits": ["abc"]}
    (folder := tmp_path / "inverse_helps").mkdir()
    (folder / "study.json").write_text(json.dumps(said))
    studies.keep(folder, tmp_path / "results", tmp_path / "pictures")
    kept = json.loads((tmp_path / "results" / "inverse_helps.json").read_text())
    assert set(kept) == {"rows", "commits"} and set(kept["rows"]) == set(said["rows"])
    assert kept["rows"]["joint: test error, eV"]["all of B"]["more"] == 0.1235
    assert (tmp_path / "pictures" / "inverse_helps.png").stat().st_size > 5000
    with pytest.raises(SystemExit, match="no study 'other' stands in SHOWN"):
        studies.keep(tmp_path / "other")


def test_a_difference_is_bold_where_it_holds() -> None:
    cell = {"more": 0.1234, "more_interval": [0.1, 0.14], "more_over_seeds": [0.02, 0.23], "separate": True}
    assert (
        tables._more("errors, eV", cell | {"seeds_needed": 3})
        == "**+0.123 (+0.100 to +0.140; +0.020 to +0.230)**"
    )
    open_ = cell | {"separate": False, "more_over_seeds": [-0.02, 0.27], "seeds_needed": None}
    assert tables._more("PF, %", open_) == "+12.3 (+10.0 to +14.0; -2.0 to +27.0) [over 1,000]"
    assert tables._more("PF, %", None) == "–"


# The format itself ------------------------------------------------------------------------------------------


def test_a_claim_from_samples() -> None:
    made = record.claim(
        "c", "says", "ms", {"case": {"ours": [1.0, 2.0, 3.0], "peer": [4.0, 8.0, 9.0]}}, {"turns": 3}
    )
    assert made["value"] == {"case": 2.0} and made["peer"] == {"case": {"peer": 8.0}}
    assert made["ratio"] == {"case": {"peer": 4.0}}
    assert made["spread"] == {"case": {"peer": [3.5, 4.0]}}  # quartiles of 4, 4, 3
    # the machine slowed down between turns: 8 / 1 is no ratio that any turn saw
    uneven = record.claim("c", "", "", {"case": {"ours": [1.0, 1.0, 8.0], "peer": [2.0, 9.0, 8.0]}}, {})
    assert uneven["ratio"] == {"case": {"peer": 2.0}}
    more = record.claim("c", "", "", {"case": {"ours": [6.0], "peer": [3.0]}}, {}, less_is_better=False)
    assert more["ratio"] == {"case": {"peer": 2.0}}


def test_rounding_keeps_four_digits() -> None:
    assert record.rounded({"a": 1234.567, "b": [0.00123456, 12], "c": 123456.7, "d": True}) == {
        "a": 1235, "b": [0.001235, 12], "c": 123500, "d": True}  # fmt: skip


def test_short_runs_and_other_processors_replace_nothing(tmp_path: Path) -> None:
    def one(kind: str, quick: bool, value: int) -> dict[str, object]:
        return {"claim": "c", "quick": quick, "processor": {"kind": kind}, "value": value}

    record.write(tmp_path, one("Zen 5", False, 1))
    record.write(tmp_path, one("Zen 4", True, 2))
    assert json.loads((tmp_path / "c.json").read_text())["value"] == 1
    record.write(tmp_path, one("Zen 4", False, 3))
    assert [r["value"] for r in record.read("c", tmp_path)] == [3, 1]
    record.write(tmp_path, one("Zen 5", False, 4))
    assert [r["value"] for r in record.read("c", tmp_path)] == [4, 3]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.json", "c.zen-4.json"]


def test_kinds_of_processors() -> None:
    assert record.kind("AuthenticAMD", 25, 0x11) == record.kind("AuthenticAMD", 25, 0xA0) == "Zen 4"
    assert record.kind("AuthenticAMD", 25, 0x01) == "Zen 3" and record.kind("AuthenticAMD", 26, 2) == "Zen 5"
    assert record.kind("GenuineIntel", 6, 143) == "Sapphire Rapids"
    assert record.kind("GenuineIntel", 6, 1) is None and record.kind("", None, None) is None


@pytest.mark.parametrize(
    ("script", "reason"), [("load.py", "bench/server.py"), ("seeds.py", "finished runs")]
)
def test_what_cannot_run_says_why(script: str, reason: str) -> None:
    command = [sys.executable, str(ROOT / "bench" / script), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == record.SKIPPED and done.stderr.startswith("skipped: ") and reason in done.stderr


def test_a_bench_shadows_no_package(tmp_path: Path) -> None:
    """Once `bench.record` is imported, the folder of the scripts is off the path."""
    script = ROOT / "bench" / "seeds.py"
    code = (
        f"import runpy, sys, pathlib; sys.path.insert(0, {str(script.parent)!r}); import bench.record; "
        "print(sys.path)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert str(script.parent) not in done.stdout


def test_another_commit_is_compared_pair_by_pair() -> None:
    def runs(*values: float) -> list[dict[str, object]]:
        return [{"c": {"value": {"case": v}, "unit": "ms", "better": "less"}} for v in values]

    (row,) = record.compared(runs(4.0, 6.0), runs(2.0, 2.0))
    assert row["ratio"] == 2.5 and row["each"] == [2, 3] and row["base"] == 5
