"""How candidates for labels are held against DFT: sites, offsets and the claims that come of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from ase.build import add_adsorbate, fcc111

from bench import labels
from catmllm.data.fcc_slabs import ADSORBATES, FCC_CONSTANT
from tests.data.toy_calculator import egg_box


@pytest.mark.parametrize("name", ["O", "CO"])
def test_the_hollow_is_that_of_ase(name: str) -> None:
    start = labels.in_hollow("Pt", labels.bare_slab("Pt").structure.positions, name)
    slab = fcc111("Pt", (2, 2, 3), a=FCC_CONSTANT["Pt"], vacuum=5.0, periodic=True)
    add_adsorbate(slab, name[0], ADSORBATES[name].heights[2], "fcc")
    expected, ours = slab.positions[-1], start.structure.positions[12]
    apart = np.linalg.solve(slab.cell[:].T, ours - expected)
    np.testing.assert_allclose(apart - np.round(apart * 2) / 2 * [1, 1, 0], 0, atol=1e-6)
    assert start.structure.free is not None and start.structure.free.sum() == len(ADSORBATES[name].symbols)


def test_an_offset_an_adsorbate_costs_nothing() -> None:
    names = ["H", "O"] * 5
    wanted = np.arange(10.0)
    said = wanted + [7.0, -3.0] * 5
    said[4] += 1.0
    assert labels.offset_error(said.tolist(), wanted.tolist(), names) == pytest.approx(0.1)
    np.testing.assert_allclose(labels.centred(wanted.tolist(), names), [-4, -4, -2, -2, 0, 0, 2, 2, 4, 4])


def test_candidates_become_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command whole, but for its processes; potentials of microseconds in place of the candidates."""
    monkeypatch.setattr(labels, "CANDIDATES", {"one": egg_box, "other": egg_box})
    monkeypatch.setattr(labels, "apart", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(labels, "dft_slabs", lambda path: drawn_slabs())
    (there := tmp_path / "there").touch()
    monkeypatch.setattr(labels, "DFT", there)
    for name in ("chgnet", "diep", "sevenn"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))

    def made(*words: str) -> dict[str, dict[str, Any]]:
        out = tmp_path / "-".join(["out", *words])
        monkeypatch.setattr(sys, "argv", ["labels.py", "--quick", "--out", str(out), *words])
        assert labels.main() == 0
        return {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}

    slabs = made("--part", "slabs")
    assert set(slabs) == {"labels_r", "labels_mae", "labels_seconds"}
    assert set(slabs["labels_mae"]["value"]) == {"one", "other"}
    assert slabs["labels_mae"]["conditions"]["slabs"].startswith("4 of Pt and Cu")
    published = made("--candidate", "other", "--part", "published")
    assert set(published) == {"labels_published", "labels_nickel"}
    (error,) = published["labels_published"]["value"].values()
    assert np.isfinite(error) and set(published["labels_nickel"]["value"]) == {"other"}
    said = published["labels_published"]["conditions"]
    assert set(said["energies"]["other"]) == set(labels.PUBLISHED) and "other" in said["not converged"]


def drawn_slabs() -> list[dict[str, Any]]:
    """16 rows as the file of DFT slabs has them."""
    found = []
    for metal in ("Pt", "Cu"):
        for k, name in enumerate(("H", "O") * 4):
            atoms = fcc111(metal, (2, 2, 3), a=FCC_CONSTANT[metal], vacuum=5.0, periodic=True)
            add_adsorbate(atoms, name, 1.2 + 0.05 * k, "ontop")
            found.append({"metal": metal, "ads": name, "E": 0.1 * k, "symbols": atoms.get_chemical_symbols(),
                          "cell": atoms.cell.tolist(), "pos": atoms.positions.tolist()})  # fmt: skip
    return found
