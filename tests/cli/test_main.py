"""The `catmllm` command on a small trained run: what a person types, and what they see when it is wrong."""

import csv
import json
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import ase.io
import numpy as np
import pytest

from catmllm.cli import evaluate
from catmllm.cli.main import main
from catmllm.config import Config, DataConfig
from catmllm.data.open import open_data
from catmllm.data.slabs import load_slabs
from catmllm.data.subsets import learned
from catmllm.evaluate import missing, slab_tasks
from catmllm.evaluate.judges import Judge
from catmllm.report.design import adsorbate
from catmllm.structure.cif import read_cif, write_cif
from catmllm.structure.text import three_part_text
from rewards_fast import parse_cif
from tests.data.toy_calculator import EggBox


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


def test_predict_writes_what_it_says(
    unbroken: Path, cif: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same numbers in each form, and a structure that ASE and this command read again."""
    model = ["--model", str(unbroken)]
    for name in ("said.csv", "said.jsonl", "said.extxyz"):
        assert main(["predict", str(cif), *model, "--json", "--out", str(tmp_path / name)]) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[0])
    assert json.loads((tmp_path / "said.jsonl").read_text()) == row
    (told,) = csv.DictReader((tmp_path / "said.csv").open())
    assert float(told["energy"]) == row["energy"] and told["system"] == row["system"]
    frame = ase.io.read(tmp_path / "said.extxyz")
    assert frame.info["predicted_energy"] == pytest.approx(row["energy"])
    np.testing.assert_allclose(frame.positions, read_cif(cif.read_text()).positions, atol=1e-3)
    assert (
        main(["predict", str(tmp_path / "said.extxyz"), *model, "--adsorbate", load_slabs()[0].adsorbate])
        == 0
    )
    text = three_part_text(load_slabs()[0])
    capsys.readouterr()
    for words, name, why in (
        ([str(cif)], "said.xlsx", ".csv, .jsonl or .extxyz"),
        (["--text", text], "said.extxyz", "no structure"),
        ([str(cif)], "none/said.csv", "no folder"),
    ):
        assert main(["predict", *words, *model, "--out", str(tmp_path / name)]) == 1
        err = capsys.readouterr().err
        assert why in err and len(err.splitlines()) == 1


def test_a_reader_that_has_seen_enough_sees_no_error() -> None:
    command = [sys.executable, "-m", "catmllm.cli", "doctor"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()  # as `| head` does
        assert process.stderr.read() == b"" and process.wait() == 1


def test_predict_reads_a_text_alone(
    unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same as of a table with it; of two parts something else; with a warning for what is unknown."""
    text = three_part_text(load_slabs()[0])
    two = text.rpartition("</s>")[0]
    (tmp_path / "table.csv").write_text(f'text\n"{text}"\n')
    model = ["--model", str(unbroken), "--json"]
    assert main(["predict", str(tmp_path / "table.csv"), "--text", text, "--text", two, *model]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows[0]["energy"] == pytest.approx(rows[1]["energy"], abs=1e-5)
    assert rows[2]["energy"] != pytest.approx(rows[1]["energy"], abs=1e-4) and rows[2]["error"] is None
    assert main(["predict", "--text", "CO</s>Ru (1 1 1)", *model]) == 0
    assert "Ru" in json.loads(capsys.readouterr().out)["outside"][0]


def test_predict_of_a_system_without_a_structure(
    unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line for each different text, then their mean and range; a run of a few steps may write CIFs that
    cannot be read, and then says so."""
    command = ["predict", "--system", "CO</s>Pt9Cu3 (1 1 1)", "--candidates", "3", "--model", str(unbroken)]
    status = main([*command, "--json"])
    row = json.loads(capsys.readouterr().out)
    assert (
        row["system"] == "CO</s>Cu3Pt9 (1 1 1)" and row["candidates"] == 3 and np.isfinite(row["two_parts"])
    )
    assert sum(text["times"] for text in row["texts"]) == row["read"] and status == (row["read"] == 0)
    assert all(text["text"].startswith("CO</s>CuPt3 (1 1 1)</s>[") for text in row["texts"])
    if row["read"]:
        energies = [text["energy"] for text in row["texts"] for _ in range(text["times"])]
        assert row["energy"] == pytest.approx(np.mean(energies))
        assert (row["low"], row["high"]) == (min(energies), max(energies))
    assert main([*command, "--out", str(tmp_path / "said.csv")]) == status
    (told,) = csv.DictReader((tmp_path / "said.csv").open())
    assert told["system"] == row["system"] and bool(told["energy"]) == bool(row["read"])
    out, err = capsys.readouterr()
    assert out.count("CO</s>Cu3Pt9 (1 1 1)") == 1 + len(row["texts"]) + bool(row["read"])
    assert "two parts alone" in out and "drop_configuration" in err
    assert ("none of 3 CIFs" in err) == (row["read"] == 0)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "or --system or --text"),
        (["--system", "CO on Pt"], "cannot read the identity"),
        (["--system", "</s>Pt9 (1 1 1)"], "names no system"),
        (["--text", "CO on platinum"], "names no system"),
        (["--system", "CO</s>Pt9 (1 1 1)", "--candidates", "0"], "must be above 0"),
        (["--system", "CO</s>Pt9 (1 1 1)", "--model", "align"], "writes no CIFs"),
    ],
)
def test_predict_refuses_what_is_no_system(
    unbroken: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = [str(unbroken / words.pop())] if "--model" in words else ["--model", str(unbroken)]
    assert main(["predict", *words, *stage]) == 1
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err and len(err.splitlines()) == 1


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


@pytest.mark.slow
def test_evaluate_measures_a_finished_run_without_structures(unbroken: Path, tmp_path: Path) -> None:
    run = tmp_path / "copy"
    shutil.copytree(unbroken, run)
    metrics = json.loads((run / "metrics.json").read_text())
    before = metrics.pop("missing")["ga_grpo"]
    (run / "metrics.json").write_text(json.dumps(metrics))
    assert main(["evaluate", str(run), "--indicative", "2"]) == 0
    after = json.loads((run / "metrics.json").read_text())["missing"]["ga_grpo"]
    for arm in ("true", "two_parts", "ridge_true"):
        for old, new in zip(before["pairs"], after["pairs"]):
            np.testing.assert_allclose(new["predicted"][arm], old["predicted"][arm], atol=2e-2)  # bf16
    assert "Predictions without a structure" in (run / "report.html").read_text()
    assert main(["evaluate", str(run), "--indicative", "0"]) == 1
    assert main(["evaluate", str(run / "instruct"), "--indicative", "1"]) == 0
    assert set(json.loads((run / "metrics.json").read_text())["missing"]) == {"ga_grpo", "instruct"}
    assert main(["evaluate", str(run / "align"), "--indicative", "1"]) == 1


def test_indicative_predictions_stand_beside_what_the_run_learned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean of the adsorbate and the ridge are fitted to the systems whose energies were learned."""
    config, data, given = Config(), open_data(), {}
    config.data.property = (0.0, 0.5)
    last = nullcontext((tmp_path / "joint", None, None, config, data, None))
    monkeypatch.setattr(evaluate, "_last_stage", lambda _: last)
    monkeypatch.setattr(missing, "evaluate_missing", lambda *args: given.update(data=args[2]))
    (tmp_path / "metrics.json").write_text("{}")
    evaluate._without_structures(tmp_path, tmp_path, 1)
    assert given["data"] == learned(data, config.data) != data


def test_slabs_are_judged_by_the_potential_of_the_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a run without a judge; where nobody knows who made the labels, that is an error in a line."""
    given: list[str] = []

    def searched(judge: str, **data: str) -> None:
        config = Config()
        config.evaluate.judge, config.data = judge, DataConfig(**data)
        last = nullcontext((tmp_path, None, None, config, None, None))
        monkeypatch.setattr(evaluate, "_last_stage", lambda _: last)
        evaluate._slabs(tmp_path, tmp_path, 1)

    monkeypatch.setattr(
        slab_tasks, "evaluate_slabs", lambda *args: given.append(args[2].evaluate.judge) or {"one": 1}
    )
    (tmp_path / "metrics.json").write_text("{}")
    searched("none")
    searched("none", labels="sevennet")
    searched("diep")
    assert given == ["diep", "sevennet", "diep"]
    with pytest.raises(ValueError, match="SevenNet-0 cannot judge"):
        searched("sevennet")
    searched("sevennet", path="mine.jsonl")
    assert "note: SevenNet-0 judges by a zero of its own" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"who made those of mine\.jsonl is not known"):
        searched("none", path="mine.jsonl")


@pytest.mark.slow
def test_evaluate_searches_slabs_for_a_finished_run(
    unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slab_tasks, "Judge", lambda name: Judge(EggBox()))
    run = tmp_path / "copy"
    shutil.copytree(unbroken, run)
    path = run / "metrics.json"
    metrics = json.loads(path.read_text())
    assert "slab_design" not in metrics
    assert main(["evaluate", str(run), "--slabs", "0"]) == 1
    assert main(["evaluate", str(run), "--slabs", "1"]) == 1  # the run's judge is none
    folder = run / "ga_grpo" / "catmllm.json"
    folder.write_text(folder.read_text().replace('"judge": "none"', '"judge": "diep"'))
    assert main(["evaluate", str(run), "--slabs", "2"]) == 0
    found = json.loads(path.read_text())["slab_design"]
    assert found["one"]["n"] == found["several"]["n"] == 2
    assert "Slabs for the best sites" in (run / "report.html").read_text()


def test_predict_reads_any_format_and_marks_what_it_has_not_seen(
    unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An extxyz of a training-like system, one of ruthenium, one with sulfur; no flag is needed."""
    import ase.io

    inside = next(s for s in load_slabs() if s.adsorbate == "O").as_ase()
    ruthenium, sulfur = inside.copy(), inside.copy()
    ruthenium.numbers[:4], sulfur.numbers[-1] = 44, 16
    ase.io.write(tmp_path / "three.extxyz", [inside, ruthenium, sulfur])
    assert main(["predict", str(tmp_path / "three.extxyz"), "--model", str(unbroken), "--json"]) == 0
    out, err = capsys.readouterr()
    rows = [json.loads(line) for line in out.splitlines()]
    assert [r["file"] for r in rows] == [f"three.extxyz#{k}" for k in range(3)]
    assert (
        rows[0]["outside"] == [] and "Ru" in rows[1]["outside"][0] and "adsorbate S" in rows[2]["outside"][0]
    )
    assert rows[0]["error"] > 0 and rows[1]["error"] is None and rows[2]["error"] is None
    assert "zero:" in err and "MAE" in err and rows[0]["labels"]
    assert main(["predict", str(tmp_path / "three.extxyz"), "--model", str(unbroken)]) == 0
    out = capsys.readouterr().out
    assert out.count("±") == 1 and out.count("OUTSIDE of training") == 2


def test_design_refuses_what_the_model_has_never_seen(
    unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--model", str(unbroken), "--out", str(tmp_path / "designs")]
    for system, word in (("CH3OH</s>Pt12 (1 1 1)", "CH3OH"), ("CO</s>Ru12 (1 1 1)", "Ru")):
        assert main(["design", system, "--energy", "-1", *model]) == 1
        err = capsys.readouterr().err
        assert word in err and "the model knows" in err and not (tmp_path / "designs").exists()
    assert main(["design", "CO</s>Pt12 (1 1 1)", "--energy", "-1", "--sites", "top", *model]) == 1
    assert "atop, bridge, hollow" in capsys.readouterr().err


def test_design_from_a_structure_over_free_metals(
    unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    system = next(s for s in load_slabs() if s.adsorbate == "O" and len(s.slab_counts) == 1)
    (metal,) = system.slab_counts
    other = "Cu" if metal != "Cu" else "Pt"
    (tmp_path / "at_hand.cif").write_text(write_cif(system))
    command = [
        "design",
        "--from",
        str(tmp_path / "at_hand.cif"),
        "--energy",
        "50",
        "--metals",
        f"{metal},{other}",
    ]
    main([*command, "--model", str(unbroken), "--out", str(tmp_path / "out"), "--steps", "1"])
    out, err = capsys.readouterr()
    records = json.loads((tmp_path / "out" / "designs.json").read_text())
    assert len(records) == 5 and records[0]["identity"] == system.identity
    assert out.count("(the given structure)") == 1 and "out of reach" in err
    assert [p["iteration"] for r in records for p in r["pool"]].count(-1) == 1
    other = ["design", "CO</s>Pt12 (1 1 1)", *command[1:5], "--model", str(unbroken)]
    assert main([*other, "--out", str(tmp_path / "other")]) == 1
    assert f"its atoms are {system.identity}, not those of CO" in capsys.readouterr().err


def test_finetune_takes_over_a_stage(unbroken: Path, tmp_path: Path) -> None:
    """The configuration of the stage, two stages of it, a third of its rates, and the user's changes."""
    from catmllm.cli.finetune import configured
    from catmllm.config import from_dict

    stage = unbroken / "joint"
    before = from_dict(json.loads((stage / "catmllm.json").read_text()))
    config = configured(stage, tmp_path, tmp_path / "out", ["joint.patience=3", "data.split_by=metal"], 700)
    assert config.stages == ("encoder", "joint") and config.init == str(stage)
    assert config.encoder.steps == config.joint.steps == 700 and config.joint.patience == 3
    assert config.joint.lr == pytest.approx(before.joint.lr / 3) and config.data.split_by == "metal"
    assert config.model == before.model and config.data.cutoff == before.data.cutoff


def test_the_best_validated_stage_predicts(tmp_path: Path) -> None:
    from catmllm.cli.trained import best_stage

    def stage(name: str, mae: float | None) -> None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").touch()
        domain = {"elements": [], "adsorbates": [], "contact": [0, 1], "between": [0, 1], "area": [0, 1],
                  "energy": [0, 1], "energies": {}}  # fmt: skip
        domain["validation"] = {} if mae is None else {"mae": mae, "n": 9}
        (tmp_path / name / "domain.json").write_text(json.dumps(domain))

    stage("encoder", None)
    stage("joint", 0.2)
    stage("instruct", 0.3)
    assert best_stage(tmp_path).name == "joint" and best_stage(tmp_path / "instruct").name == "instruct"
    stage("grpo", 0.2)
    assert best_stage(tmp_path).name == "grpo"
    (tmp_path / "grpo" / "domain.json").unlink()  # trained before there were any
    assert best_stage(tmp_path).name == "grpo"


def test_evaluate_on_structures_of_ones_own(
    unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The numbers are those of the energies in the file and of `predict`, by NumPy."""
    import gzip

    from catmllm.data.slabs import SHIPPED

    lines = gzip.decompress(SHIPPED.read_bytes()).decode().splitlines()[:12]
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(lines))
    assert main(["evaluate", str(unbroken), "--on", str(path)]) == 0
    said = capsys.readouterr().out
    assert said.count("within an adsorbate") == 3
    assert main(["predict", str(path), "--model", str(unbroken), "--json"]) == 0
    predicted = {r["file"]: r["energy"] for r in map(json.loads, capsys.readouterr().out.splitlines())}
    truth = {r["sid"]: r["energy"] for r in map(json.loads, lines) if r.get("ok", True)}
    error = np.mean([abs(predicted[sid] - energy) for sid, energy in truth.items()])
    assert f"both: n {len(truth)}, MAE {error:.3f} eV" in said


def test_evaluate_reads_energies_as_it_is_told_and_says_what_it_refuses(
    unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An extxyz of a calculation: its energies are total ones unless it is said that they are not."""
    import ase.io
    from ase.calculators.singlepoint import SinglePointCalculator

    frames = []
    for system in load_slabs()[:40:5]:
        frames.append(system.as_ase())
        frames[-1].calc = SinglePointCalculator(frames[-1], energy=system.known_energy)
    ase.io.write(tmp_path / "mine.extxyz", frames)
    command = ["evaluate", str(unbroken), "--on", str(tmp_path / "mine.extxyz")]
    assert main(command) == 1
    out, err = capsys.readouterr()
    assert "8  refused: no reference energy" in out and "0 structures with an energy" in err
    assert main([*command, "--energies", "adsorption"]) == 0
    assert "both: n 8, MAE" in capsys.readouterr().out


def test_predict_counts_all_that_it_refuses(
    unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n" * 9)
    assert main(["predict", str(tmp_path / "rows.jsonl"), "--model", str(unbroken)]) == 1
    err = capsys.readouterr().err
    assert err.count("the row has no structure") == 5 and "and 4 more refused: unreadable record" in err


def test_finetune_leaves_out_each_metal_and_draws_a_learning_curve(
    unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runs that are asked of the pipeline, and a table of what they found."""
    import catmllm.pipeline
    from catmllm.config import Config
    from catmllm.data.shards import write_shards

    systems = [s for s in load_slabs()[::6] if {"Pt", "Cu", "Ni"} >= set(s.slab_counts)]
    write_shards(tmp_path / "mine", systems)
    asked: list[Config] = []

    def run(config: Config) -> int:
        asked.append(config)
        Path(config.out).mkdir(parents=True, exist_ok=True)
        found = {"property": {"joint": {"both": {"mae": 0.125 * len(asked)}}}, "baselines": {}}
        (Path(config.out) / "metrics.json").write_text(json.dumps(found))
        return 0

    monkeypatch.setattr(catmllm.pipeline, "run", run)
    command = ["finetune", str(unbroken), "--data", str(tmp_path / "mine"), "--out", str(tmp_path / "out")]
    assert main([*command, "--leave-one-out", "metal"]) == 0
    assert [(c.data.split_by, c.data.hold_out) for c in asked] == [
        ("metal", (m,)) for m in ("Cu", "Ni", "Pt")
    ]
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in table[-3:]] == [["Cu", "0.125"], ["Ni", "0.250"], ["Pt", "0.375"]]
    asked.clear()
    write_shards(tmp_path / "of_pt", [s for s in systems if "Pt" in s.slab_counts])
    command[3] = str(tmp_path / "of_pt")
    assert main([*command, "--leave-one-out", "metal"]) == 0
    assert [c.data.hold_out for c in asked] == [("Cu",), ("Ni",)]
    assert "every system has Pt, so it is not left out" in capsys.readouterr().out
    asked.clear()
    assert main([*command, "--learning-curve"]) == 0
    sizes = [c.data.train_systems for c in asked]
    assert sizes[-1] is None and sizes[:-1] == sorted(s for s in sizes if s) and len(sizes) >= 2
    assert len(capsys.readouterr().out.splitlines()) >= len(sizes) + 1
