"""Errors of energies, of all test systems and of a subset."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import mean_absolute_error, r2_score

from catmllm.data.batches import Collator
from catmllm.data.slabs import SHIPPED_SEVENNET, load_slabs, on_fcc_slab
from catmllm.evaluate import property
from catmllm.evaluate.property import agreement, evaluate_property
from catmllm.models.catalytic_mllm import CatalyticMLLM
from catmllm.report.summary import property_table
from catmllm.structure.system import System
from catmllm.world import World


class Alone(World):
    """A world of one without a process group."""

    def gather(self, value: Any) -> list[Any]:
        return [value]


def test_a_subset_has_errors_of_its_own(
    small_model: tuple[CatalyticMLLM, Collator], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against scikit-learn, in every way that energies are said; of all they stay what they are."""
    model, _ = small_model
    # energies of a few eV: parity has four digits of them, and r2 hangs on their squares
    monkeypatch.setitem(model._buffers, "energy_std", 0.05 * model.energy_std)
    systems, world = load_slabs()[::250], Alone(0, 1, torch.device("cpu"))

    def some(system: System) -> bool:
        return system.adsorbate in ("O", "CO", "NH")

    whole = evaluate_property(*small_model, systems, world, llm=False)
    found = evaluate_property(*small_model, systems, world, llm=False, subset=some)
    inside = [some(s) for s in systems]
    assert 1 < sum(inside) < len(systems)
    for way, other in (("encoder", found["parity"]["predicted"]), ("encoder_start", None)):
        assert {k: v for k, v in found[way].items() if k != "subset"} == whole[way]
        predicted = np.array(other or found["parity"]["others"][way])[inside]
        truth = np.array([s.known_energy for s in systems])[inside]
        part = found[way]["subset"]
        assert part["n"] == sum(inside)
        assert part["mae"] == pytest.approx(mean_absolute_error(truth, predicted), abs=1e-4)
        assert part["r2"] == pytest.approx(r2_score(truth, predicted), abs=1e-3)


def test_the_named_subset_is_the_first_file() -> None:
    assert all(on_fcc_slab(s) for s in load_slabs() + load_slabs(SHIPPED_SEVENNET))


def test_an_energy_that_is_no_number_makes_the_error_none(
    small_model: tuple[CatalyticMLLM, Collator], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a written answer may lack a number, which is counted."""
    systems, world = load_slabs()[::1000], Alone(0, 1, torch.device("cpu"))
    said = np.array([s.known_energy for s in systems])
    said[1] = np.nan
    monkeypatch.setattr(property, "predict_energies", lambda *_: said)
    monkeypatch.setattr(property, "written_energies", lambda *_: said)
    found = evaluate_property(*small_model, systems, world, subset=lambda s: s is systems[1])
    assert np.isnan([found["both"]["mae"], found["both"]["r2"], found["both"]["subset"]["mae"]]).all()
    assert found["both"]["n"] == len(systems) and "unread" not in found["both"]
    assert (found["generated"]["mae"], found["generated"]["unread"]) == (0.0, 1)
    assert np.isfinite(found["encoder"]["mae"])
    table = property_table({"property": {"joint": found}})
    assert table is not None and "– / –" in table.rows[0]


def test_an_adsorbate_of_one_structure_says_nothing_within() -> None:
    """Its mean is itself, so its residual of 0 would count as agreement."""
    predicted, truth = np.array([1.0, 2.0, 9.0, -4.0]), [1.5, 2.0, 0.0, 7.0]
    said = agreement(predicted, truth, ["O", "O", "H", "CO"])
    assert said.startswith("n 4, MAE 5.125 eV")
    assert "within an adsorbate (1; left out for a single structure: 2): r 1.000, MAE 0.250 eV" in said
    assert said.endswith("0.250 eV by the mean of the adsorbate")
    assert "within an adsorbate (1): r" in agreement(predicted[:2], truth[:2], ["O", "O"])
    alone = agreement(predicted[:2], truth[:2], ["O", "H"])
    assert alone.endswith("within an adsorbate (0; left out for a single structure: 2): nothing to compare")
