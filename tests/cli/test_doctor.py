"""`catmllm doctor` and the shells' completion: said rightly of a machine that lacks something."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

from catmllm.cli import doctor
from catmllm.cli.main import main

ROOT = Path(__file__).parents[2]


def test_doctor_names_versions_and_what_is_built(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    main(["doctor"])
    out = capsys.readouterr().out
    assert f"torch {torch.__version__}" in out and "the reward's engine is built" in out
    for line in out.splitlines()[:-1]:
        assert line.split()[0] in ("ok", "missing", "optional"), line


def test_a_missing_or_old_package_is_a_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ['torch>=999; extra == "train"', 'no-such-thing>=1; extra == "train"', 'peft; extra == "lora"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: wanted)
    found = {f.what.split(" ")[0]: f for f in doctor._packages()}
    assert found["train"].state == "missing" and "'.[train]'" in found["train"].mend
    assert "torch>=999 (there is " in found["train"].what and "no-such-thing>=1" in found["train"].what
    assert found["lora"].state == "ok"


def test_the_compiler_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    (line,) = doctor._compiler()
    assert line.state == "optional" and "CXX=no-such-compiler is not there" in line.what and line.mend


def test_where_torch_and_numba_are_missing_doctor_runs_and_the_rest_says_so() -> None:
    """As after an install of the reward alone: what imports them fails, and one line says what to do."""
    code = (
        "import sys\n"
        "for name in ('torch', 'numba', 'yaml'): sys.modules[name] = None\n"
        "from catmllm.cli.main import main\n"
        "print(main(['predict', 'x.cif']), file=sys.stderr)\n"
        "main(['doctor'])\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    said = run.stderr.splitlines()
    assert said[-1] == "1" and "pip install '.[train]'" in said[-2] and "Traceback" not in run.stderr
    assert "Python 3" in run.stdout


def test_completion_has_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert all(word in script for word in ("predict", "finetune", "--leave-one-out", "doctor"))
    subprocess.run(["bash", "-n"], input=script.encode(), check=True)


def test_completion_without_its_package_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 1
    assert "'.[completion]'" in capsys.readouterr().err
