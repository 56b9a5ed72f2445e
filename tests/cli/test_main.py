"""The `catmllm` command on a small trained run: what a person types, and what they see when it is wrong."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from catmllm.cli.main import main
from catmllm.data.slabs import load_slabs
from catmllm.report.design import adsorbate
from catmllm.structure.cif import read_cif, write_cif
from rewards_fast import parse_cif


@pytest.fixture
def cif(tmp_path: Path) -> Path:
    path = tmp_path / "system.cif"
    path.write_text(write_cif(load_slabs()[0]))
    return path


def test_predict_prints_an_energy_for_every_file(
    unbroken: Path, cif: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", str(cif), str(cif), "--model", str(unbroken), "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 2 and rows[0]["energy"] == pytest.approx(rows[1]["energy"], abs=1e-5)
    assert rows[0]["system"] == load_slabs()[0].identity and rows[0]["AD"] is None


def test_predict_says_where_there_is_no_adsorbate(
    unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A CO 3 Å up has no adsorption energy, whatever the model says."""
    system = next(s for s in load_slabs() if s.adsorbate == "CO")
    up = system.positions + [0, 0, 3.0] * (system.tags == 2)[:, None]
    path = tmp_path / "up.cif"
    path.write_text(write_cif(replace(system, frac=np.linalg.solve(system.lattice.T, up.T).T)))
    assert main(["predict", str(path), "--model", str(unbroken)]) == 0
    assert "AD: detached" in capsys.readouterr().out
    assert main(["predict", str(path), "--model", str(unbroken), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["AD"] == "detached"


def test_predict_tells_of_bad_files_and_goes_on(
    unbroken: Path, cif: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.cif"
    broken.write_text("data_x\nloop_\n")
    missing = tmp_path / "missing.cif"
    assert main(["predict", str(broken), str(missing), str(cif), "--model", str(unbroken)]) == 1
    out, err = capsys.readouterr()
    assert out.count("eV") == 1 and "broken.cif" in err and "missing.cif" in err and "Traceback" not in err


def test_design_writes_cifs_or_says_that_there_are_none(
    unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["design", "CO</s>Pt9Cu3 (1 1 1)", "--energy", "-1.2", "--model", str(unbroken)]
    status = main([*command, "--out", str(tmp_path / "designs")])
    out = capsys.readouterr().out
    files = sorted((tmp_path / "designs").glob("*/design-*.cif"))
    if status:  # a model of a few steps writes nothing that parses; then it must say so
        assert not files and "no candidate parsed" in out
    else:
        assert files and "predicted" in out
        read_cif(files[0].read_text(), "CO", (1, 1, 1))


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_design_of_many_targets(
    unbroken: Path, tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every CIF has the composition asked for, whatever the weights; pools, traces and pictures are kept."""
    wanted = [("CO</s>Pt9Cu3 (1 1 1)", -1.2), ("H</s>Pd12 (1 0 0)", 0.1)]
    targets = tmp_path / f"targets.{suffix}"
    if suffix == "csv":
        targets.write_text("system,energy\n" + "".join(f"{s},{e}\n" for s, e in wanted))
    else:
        targets.write_text("".join(json.dumps({"system": s, "energy": e}) + "\n" for s, e in wanted))
    out = tmp_path / "designs"
    model = ["--model", str(unbroken), "--out", str(out), "--steps", "1", "--pool", "2"]
    status = main(["design", "--targets", str(targets), *model])
    records = json.loads((out / "designs.json").read_text())
    assert [(r["identity"], r["energy"]) for r in records] == [("CO</s>Cu3Pt9 (1 1 1)", -1.2), wanted[1]]
    assert status == (0 if all(r["pool"] for r in records) else 1)
    for record, counts in zip(records, ({"Pt": 9, "Cu": 3, "C": 1, "O": 1}, {"Pd": 12, "H": 1})):
        assert len(record["trace"]) == 2 and len(record["pool"]) <= 2
        assert set(record["controls"]) == {"random", "enumeration"}
        for entry in (*record["pool"], *record["controls"].values()):
            assert parse_cif(Path(entry["file"]).read_text()).composition == pytest.approx(counts)
    page = (out / "report.html").read_text()
    assert "Pd12 (1 0 0)" in page and "<svg" in page and "<script" not in page
    said = capsys.readouterr().out
    assert "report:" in said and "ideal slabs" in said and "one random ideal slab" in said
    for record in records:
        for entry in record["pool"]:
            assert (entry["fault"] is None) >= entry["feasible"]
            assert f"PVCP {entry['pvcp']:.2f}, {adsorbate(entry)}" in said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"system": "CO</s>Pt9Cu3 (1 1 1)"}\n', ":1: needs `system` and `energy`"),
        ('\n{"system": "CO", "energy": 1}\n', ":2: cannot read the identity"),
        ("nonsense\n", ":1: not JSON"),
        ("", "no target in it"),
    ],
)
def test_targets_that_cannot_be_read(
    tmp_path: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.jsonl").write_text(text)
    assert main(["design", "--targets", str(tmp_path / "t.jsonl")]) == 1
    assert message in capsys.readouterr().err


def test_design_wants_one_target_or_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in (["design"], ["design", "CO</s>Pt9Cu3 (1 1 1)"], ["design", "--energy", "1"]):
        assert main(wrong) == 1
        assert "--targets FILE" in capsys.readouterr().err


@pytest.mark.parametrize("identity", ["CO", "Xx</s>Pt9 (1 1 1)", "CO</s>"])
def test_design_refuses_what_is_no_system(
    unbroken: Path, identity: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["design", identity, "--energy", "0", "--model", str(unbroken)]) == 1
    err = capsys.readouterr().err
    assert "Traceback" not in err and len(err.splitlines()) == 1


def test_model_folder_without_a_model_is_an_error(
    tmp_path: Path, cif: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", str(cif), "--model", str(tmp_path)]) == 1
    assert "no trained stage" in capsys.readouterr().err


def test_evaluate_rewrites_the_report(unbroken: Path, tmp_path: Path) -> None:
    run = tmp_path / "copy"
    shutil.copytree(unbroken, run)
    (run / "report.html").unlink()
    assert main(["evaluate", str(run), "--report-only"]) == 0
    assert (run / "report.html").stat().st_size > 10_000
