"""Networks of others as baselines: what stands in for their parts, how they are trained and asked; with
fairchem 1.10 in FAIRCHEM_1_10 (see tests/oracles/test_fairchem_encoder.py) the networks themselves."""

from __future__ import annotations

import argparse
import json
import os
import sys
import types
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy
import torch
from ase import Atoms
from ase.calculators.lj import LennardJones
from hypothesis import given, settings
from hypothesis import strategies as st

from catmllm.config import Config, to_dict
from catmllm.data.open import open_data
from catmllm.data.subsets import of_property
from catmllm.evaluate import gnn_baselines, trained_baselines
from catmllm.evaluate.baselines import AdsorbateMean, energies, evenly_spaced
from catmllm.evaluate.gnn_baselines import SparseRows, batch, calculator, chgnet, main, network, trained
from catmllm.evaluate.metrics import mae
from catmllm.evaluate.trained_baselines import Record
from catmllm.structure.system import ADSORBATE, System

Parts = dict[str, Sequence[System]]


@pytest.fixture(scope="module")
def parts() -> Parts:
    return {name: systems[:80] for name, systems in open_data().items()}


@pytest.fixture
def no_modules_left() -> Iterator[None]:
    before = dict(sys.modules)
    yield
    for name in set(sys.modules) - set(before):
        if name.split(".")[0] in ("fairchem", "torch_scatter", "torch_sparse", "chgnet"):
            del sys.modules[name]


def test_what_stands_in_for_torch_scatter(no_modules_left: None) -> None:
    gnn_baselines._stand_ins()
    scatter: Any = sys.modules["torch_scatter"]
    source = torch.tensor([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0]])
    index = torch.tensor([0, 2, 2])
    wanted = torch.tensor([[1.0, 10.0], [0.0, 0.0], [6.0, 60.0]])
    assert torch.equal(scatter.scatter(source, index, dim=0, dim_size=3), wanted)
    assert torch.equal(scatter.segment_coo(source, index, dim_size=3), wanted)
    assert torch.equal(scatter.scatter(source.T, index, dim_size=3), wanted.T)
    largest = scatter.scatter(source, index, dim=0, dim_size=3, reduce="max")
    assert torch.equal(largest[2], torch.tensor([4.0, 40.0]))
    assert torch.equal(scatter.segment_csr(source, torch.tensor([0, 1, 1, 3])), wanted)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 40), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_what_stands_in_for_torch_sparse(rows: int, columns: int, entries: int, seed: int) -> None:
    """Rows as SciPy takes them of a matrix; of several entries at a place it takes the sum, so those are
    compared one by one. Counted from 1, for SciPy keeps no zero."""
    rng = np.random.default_rng(seed)
    row, col = rng.integers(0, rows, entries), rng.integers(0, columns, entries)
    value = np.arange(1, entries + 1)
    chosen = rng.integers(0, rows, 7)
    ours = SparseRows(*map(torch.from_numpy, (row, col, value)), sparse_sizes=(rows, columns))
    taken = ours[torch.from_numpy(chosen)]
    theirs = scipy.sparse.csr_array(scipy.sparse.coo_array((value, (row, col)), (rows, columns)))[chosen]
    np.testing.assert_array_equal(dense(taken), theirs.toarray())
    places = list(zip(taken.storage.row().tolist(), taken.storage.col().tolist()))
    assert places == sorted(places)
    wanted = sorted((i, c, v) for i, r in enumerate(chosen) for q, c, v in zip(row, col, value) if q == r)
    assert sorted((*p, v) for p, v in zip(places, taken.storage.value().tolist())) == wanted
    counted = np.bincount([i for i, _, _ in wanted], minlength=len(chosen))
    np.testing.assert_array_equal(taken.set_value(None).sum(dim=1).numpy(), counted)
    taken.set_value_(-taken.coo()[2], layout="coo")
    np.testing.assert_array_equal(dense(taken), -theirs.toarray())
    assert taken.sparse_sizes() == theirs.shape


def dense(sparse: SparseRows) -> np.ndarray:
    row, col, value = sparse.coo()
    assert value is not None
    out = torch.zeros(sparse.sparse_sizes(), dtype=value.dtype)
    return out.index_put((row, col), value, accumulate=True).numpy()


class Counting(torch.nn.Module):
    """A network that learns a number an element: what counting atoms tells."""

    reduce = "mean"

    def __init__(self) -> None:
        super().__init__()
        self.each = torch.nn.Embedding(100, 1)
        torch.nn.init.zeros_(self.each.weight)

    def forward(self, data: Any) -> dict[str, torch.Tensor]:
        each = self.each(data.atomic_numbers)
        return {"energy": torch.zeros(len(data.natoms), 1).index_add(0, data.batch, each)}


def test_training_learns_and_keeps_the_best(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gnn_baselines, "network", lambda name: Counting())
    predict = trained("painn", parts, 0.4, argparse.Namespace(seed=0, steps=300))
    train = parts["train"]
    mean = AdsorbateMean.fit(train).predict(train)
    assert mae(predict(train), energies(train)) < 0.95 * mae(mean, energies(train))
    again = trained("painn", parts, 0.4, argparse.Namespace(seed=0, steps=300))
    np.testing.assert_array_equal(again(parts["test"]), predict(parts["test"]))


def test_chgnet_has_an_offset_for_every_adsorbate(
    parts: Parts, monkeypatch: pytest.MonkeyPatch, no_modules_left: None
) -> None:
    """A potential that is right up to a constant of each adsorbate's atoms is right after the offset."""
    known = {s.frac.tobytes(): s.known_energy for part in parts.values() for s in part}

    class Right:
        @staticmethod
        def load(**_: Any) -> Any:
            return Right()

        def predict_structure(self, structures: list[Any], **_: Any) -> list[dict[str, float]]:
            metals = [sum(z for z in s.atomic_numbers if z > 10) for s in structures]
            light = [sum(3.7 * z for z in s.atomic_numbers if z <= 10) for s in structures]
            bound = [known.get(np.asarray(s.frac_coords).tobytes(), 0.0) for s in structures]
            return [{"e": sum(e) / len(s)} for s, *e in zip(structures, metals, light, bound)]

    module: Any = types.ModuleType("chgnet.model")
    module.CHGNet = Right
    monkeypatch.setitem(sys.modules, "chgnet", types.ModuleType("chgnet"))
    monkeypatch.setitem(sys.modules, "chgnet.model", module)
    names = {s.adsorbate for s in parts["train"]}
    test = [s for s in parts["test"] if s.adsorbate in names]
    assert len(test) > 40
    np.testing.assert_allclose(chgnet(parts["train"])(test), energies(test), atol=1e-6)


def test_any_calculator_of_ase_is_a_row(
    parts: Parts, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Labels that are ASE's own differences of energies and an offset of each adsorbate are found again."""
    made = tmp_path / "mine.py"
    made.write_text(
        "from ase.calculators.lj import LennardJones\n\n\n"
        "def make():\n    return LennardJones(sigma=1.2, rc=3.0)\n"
    )

    def energy(s: System, bare: bool) -> float:
        kept = s.tags != ADSORBATE if bare else slice(None)
        atoms = Atoms(
            numbers=s.numbers[kept], positions=s.positions[kept], cell=s.lattice, pbc=True,
            calculator=LennardJones(sigma=1.2, rc=3.0),
        )  # fmt: skip
        return float(atoms.get_potential_energy())

    shift = {name: 0.1 * i for i, name in enumerate(sorted({s.adsorbate for s in parts["train"]}))}
    some = {k: [s for s in v if s.adsorbate in shift][:12] for k, v in parts.items()}
    labelled = {
        k: [replace(s, energy=energy(s, False) - energy(s, True) + shift[s.adsorbate]) for s in v]
        for k, v in some.items()
    }
    test = [s for s in labelled["test"] if s.adsorbate in {t.adsorbate for t in labelled["train"]}]
    assert len(test) > 5
    predict = calculator(f"{made}:make", labelled["train"])
    np.testing.assert_allclose(predict(test), energies(test), rtol=1e-9, atol=1e-9)
    monkeypatch.setattr(trained_baselines, "open_data", lambda data: labelled | {"test": test})
    (tmp_path / "metrics.json").write_text(json.dumps({"config": to_dict(Config())}))
    monkeypatch.setattr(gnn_baselines, "chgnet", lambda train: energies)
    main([str(tmp_path), "--models", "chgnet", "--calculator", f"{made}:make"])
    record = json.loads((tmp_path / "baselines.json").read_text())["baselines"]
    assert record["calculator"]["mae"] < 1e-9 and set(record) == {"chgnet", "calculator"}
    other = tmp_path / "other.py"
    other.write_text(made.read_text().replace("1.2", "1.3"))
    main([str(tmp_path), "--models", "chgnet", "--calculator", f"{other}:make"])
    record = json.loads((tmp_path / "baselines.json").read_text())["baselines"]
    assert record["calculator"]["mae"] > 1e-3  # its own
    with pytest.raises(SystemExit, match="no such file"):
        calculator(f"{tmp_path}/absent.py:make", test)
    with pytest.raises(SystemExit, match="has no function absent"):
        calculator(f"{made}:absent", test)


def test_what_is_there_is_not_trained_again(
    parts: Parts, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    def fake(name: str, *_: Any) -> Any:
        asked.append(name)
        return lambda systems: energies(systems) + 0.25

    monkeypatch.setattr(gnn_baselines, "trained", fake)
    monkeypatch.setattr(trained_baselines, "open_data", lambda data: parts)
    (tmp_path / "metrics.json").write_text(json.dumps({"config": to_dict(Config())}))
    command = [str(tmp_path), "--models", "schnet", "painn"]
    for _ in range(2):
        assert main(command) == 0
    assert asked == ["schnet", "schnet", "painn", "painn"]
    assert [line for line in capsys.readouterr().out.splitlines() if line.endswith(": kept")] == [
        f"{name}: kept" for name in ("schnet", "schnet_frames", "painn", "painn_frames")
    ]
    record = json.loads((tmp_path / "baselines.json").read_text())
    assert set(record["baselines"]) == {"schnet", "schnet_frames", "painn", "painn_frames"}
    assert record["baselines"]["painn"]["mae"] == pytest.approx(0.25)
    assert record["baselines"]["painn"]["start"]["mae"] == pytest.approx(0.25)
    asked.clear()
    for more, anew in (("--steps=9", 4), ("--seed=1", 4), ("--frames=0.2", 2)):
        assert main([*command, more]) == 0
        said = capsys.readouterr().out
        assert len(asked) == said.count("measured anew, as it was made with {'steps'") == anew
        asked.clear()
    main([*command, "--frames=0.2"])
    assert not asked
    with pytest.raises(SystemExit):
        main([*command, "--frames", "0.2", "0.4"])
    assert "--frames: one share above 0" in capsys.readouterr().err
    other = replace(Config().data, split_seed=3)
    (tmp_path / "metrics.json").write_text(json.dumps({"config": to_dict(replace(Config(), data=other))}))
    main(command)
    assert len(asked) == 4  # of another split nothing is there
    with pytest.raises(SystemExit, match="no metrics"):
        main([str(tmp_path / "nowhere")])


def test_the_systems_are_those_of_the_run(tmp_path: Path) -> None:
    """Those whose energies it learned, and those on which it was measured."""
    config = Config()
    config.data.property, config.evaluate.property_systems = (0.0, 0.5), 50
    (tmp_path / "metrics.json").write_text(json.dumps({"config": to_dict(config)}))
    data, found = open_data(), Record(tmp_path).parts()
    assert [s.sid for s in found["train"]] == [s.sid for s in of_property(data["train"], config.data)]
    assert [s.sid for s in found["test"]] == [s.sid for s in evenly_spaced(data["test"], 50)]
    assert len(found["train"]) < len(data["train"]) and len(found["val"]) == len(data["val"])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["schnet", "painn", "dimenet", "gemnet_oc"])
def test_networks_see_each_system_by_itself(name: str, parts: Parts, no_modules_left: None) -> None:
    """Alone and in a batch, turned and moved, a system has one energy.

    Float32 sums of some thousand terms; what is turned has other roundings in its angles too.
    """
    folder = os.environ.get("FAIRCHEM_1_10")
    if not folder or not os.path.isdir(folder):
        pytest.skip("fairchem 1.10 is not in FAIRCHEM_1_10")
    sys.path.insert(0, folder)
    torch.manual_seed(3)
    try:
        model = network(name).eval()
    finally:
        sys.path.remove(folder)
    for parameter in model.parameters():
        if not parameter.any():  # DimeNet++ begins with an output of 0
            torch.nn.init.normal_(parameter)
    systems = parts["train"][:5]
    turn = scipy.spatial.transform.Rotation.from_rotvec([0.4, -1.1, 0.7]).as_matrix()
    turned = [replace(s, lattice=s.lattice @ turn.T, frac=s.frac + [0.2, 0.3, 0.0]) for s in systems]
    with torch.no_grad():
        together = gnn_baselines._outputs(model, batch(systems))
        alone = torch.cat([gnn_baselines._outputs(model, batch([s])) for s in systems])
        otherwise = gnn_baselines._outputs(model, batch(turned))
    assert torch.isfinite(together).all() and len(set(together.tolist())) == 5
    size = float(together.abs().max())
    torch.testing.assert_close(together, alone, atol=1e-5 * size, rtol=1e-5)
    torch.testing.assert_close(together, otherwise, atol=1e-4 * size, rtol=1e-4)
