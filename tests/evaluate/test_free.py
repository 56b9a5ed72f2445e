"""The evaluation of designs with free metals and what stands beside it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from catmllm.config import Config
from catmllm.data.batches import Collator
from catmllm.data.open import open_data
from catmllm.data.slabs import pair_of
from catmllm.data.subsets import of_property, pairs
from catmllm.design.free import nearest_slabs
from catmllm.design.predict import predict_energies, question
from catmllm.evaluate import free
from catmllm.evaluate.benchmark import allowed_slabs, benchmark_tasks
from catmllm.evaluate.design import METHODS
from catmllm.evaluate.free import evaluate_free, ideal_ordered
from catmllm.models.catalytic_mllm import CatalyticMLLM
from catmllm.report.summary import free_table, tables
from catmllm.structure.adsorbed import adsorbate_fault
from tests.evaluate.test_design import ONE, configured


def test_each_method_has_as_many_predictions(
    small_model: tuple[CatalyticMLLM, Collator], small_config: Config
) -> None:
    data = {name: some[:80] for name, some in open_data().items()}
    config = configured(small_config, judge="none", free_tasks=3)
    found = evaluate_free(*small_model, config, data, ONE)
    assert found["n"] == 3 and found["budgets"] == [1, 4, 5]
    assert [found["curves"][m]["n"] for m in METHODS] == [3] * 5
    tasks = [t for t in benchmark_tasks(data, 3, config.seed) if t.kind == "free"]
    order = nearest_slabs(small_model, [t.task for t in tasks], [allowed_slabs(t) for t in tasks])
    for k, (task, lines, item) in enumerate(zip(tasks, order, found["items"])):
        assert item["identity"] == task.task.identity and item["energy"] == task.task.energy
        slabs = ideal_ordered(lines, 7, config.seed, k)
        assert [s.identity for s in slabs] == [lines[i % len(lines)] for i in range(7)]
        assert not any(map(adsorbate_fault, slabs))
        first = predict_energies(*small_model, [question(slabs[0])])[0]
        assert item["answers"]["ordered"][0]["predicted"] == pytest.approx(float(first), abs=1e-4)
    assert ideal_ordered(["CO</s>Fe12 (1 1 1)"], 2, 0, 0) == []


def test_a_task_that_allows_no_slab_is_a_miss(
    small_model: tuple[CatalyticMLLM, Collator], small_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = {name: some[:80] for name, some in open_data().items()}
    config = configured(small_config, judge="none", free_tasks=2)
    whole = evaluate_free(*small_model, config, data, ONE)
    tasks = benchmark_tasks(data, 2, config.seed)
    tasks[2] = replace(tasks[2], metals=("Pt",), known=frozenset({"Pt"}))
    monkeypatch.setattr(free, "benchmark_tasks", lambda *_: tasks)
    found = evaluate_free(*small_model, config, data, ONE)
    none, other = found["items"]
    assert (found["n"], none["best"], none["feasible"], none["success_own"]) == (2, None, False, False)
    assert [len(none["answers"][m]) for m in METHODS] == [3, 0, 0, 0, 0]
    assert [found["curves"][m]["n"] for m in METHODS] == [2, 1, 1, 1, 1]
    assert other["identity"] == whole["items"][1]["identity"] and all(map(other["answers"].get, METHODS))
    assert len(found["iterations_to_success"]["curve"]) == len(other["trace"])


def test_what_was_trained_on_for_cifs_alone_is_no_answer(
    small_model: tuple[CatalyticMLLM, Collator], small_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The search begins with systems whose energies were learned, and answers with pairs that nobody saw."""
    data, given = open_data(), {}

    def searched(*args: object) -> None:
        given["slabs"], given["known"] = args[4], args[8]
        raise InterruptedError

    monkeypatch.setattr(free, "search_free", searched)
    config = configured(small_config, judge="none", free_tasks=3)
    config.data = replace(config.data, property=(0.0, 0.5), generation=(0.5, 1.0), unit="pair")
    with pytest.raises(InterruptedError):
        evaluate_free(*small_model, config, data, ONE)
    seen = pairs(data["train"]) | pairs(data["val"])
    assert given["slabs"] and not any(pair_of(line) in seen for some in given["slabs"] for line in some)
    assert given["known"] == of_property(data["train"], config.data) != data["train"]


def test_the_report_has_the_curve(small_model: tuple[CatalyticMLLM, Collator], small_config: Config) -> None:
    data = {name: some[:80] for name, some in open_data().items()}
    config = configured(small_config, judge="none", free_tasks=2)
    config = replace(config, seed=1)
    metrics = {"free_design": evaluate_free(*small_model, config, data, ONE)}
    table = free_table(metrics)
    assert table is not None and table in tables(metrics) and free_table({}) is None
    assert [row[0].partition(" (n")[0] for row in table.rows] == [
        "closed loop",
        "ideal slabs, same predictor",
        "ideal slabs, kernel ridge",
        "ideal slabs in the loop's order",
        "training slabs with exchanged elements",
    ]
    assert table.header == ["", "1", "4", "5"] and len(table.notes) == 5
