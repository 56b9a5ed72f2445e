"""The cells of docs/examples/quickstart.ipynb run in their order, as one program; `make test-notebook` runs
them in Jupyter's kernel."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib
import pytest

NOTEBOOK = Path(__file__).parents[1] / "docs" / "examples" / "quickstart.ipynb"


def test_the_notebook_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    matplotlib.use("agg")
    monkeypatch.chdir(tmp_path)
    book = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert book["nbformat"] == 4 and not any(c.get("outputs") for c in book["cells"])
    names: dict[str, object] = {}
    for k, cell in enumerate(book["cells"]):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{NOTEBOOK.name}, cell {k}", "exec"), names)
    said = capsys.readouterr().out
    assert "slab.cif" in said and "MAE 0." in said and "designs/" in said
    assert float(said.splitlines()[-1].split()[0]) > 0 and said.splitlines()[-1].endswith("None")
