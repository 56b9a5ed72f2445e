"""Users' own files: what people reported of them, and where the right value or a clear refusal must come."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bcc110, fcc100, fcc111, fcc211
from ase.constraints import FixAtoms

from catmllm.cli.main import main
from catmllm.data.own import keys
from catmllm.data.own.references import References
from catmllm.data.own.surfaces import surface_miller
from catmllm.data.shards import Shards
from catmllm.structure.adsorbed import adsorbate_fault
from catmllm.structure.formula import pieces
from tests.data import own_files as made
from tests.data.own_files import found, one, refusal


def test_every_frame_is_a_system(tmp_path: Path) -> None:
    """Two systems in one extxyz: the first must not be taken for a step towards the second."""
    frames = [made.calculated(made.slab("Pt"), -1.5), made.calculated(made.slab("Cu", "O"), -3.0)]
    ase.io.write(tmp_path / "two.extxyz", frames)
    a, b = found(tmp_path / "two.extxyz", energies="adsorption").systems
    assert (a.identity, b.identity) == ("CO</s>Pt12 (1 1 1)", "O</s>Cu12 (1 1 1)")
    assert (a.sid, b.sid) == ("two.extxyz#0", "two.extxyz#1") and (a.energy, b.energy) == (-1.5, -3.0)


def test_a_relaxation_is_said_and_its_last_frame_kept(tmp_path: Path) -> None:
    frames = []
    for step in range(4):
        atoms = made.slab()
        atoms.positions[-2:] += 0.1 * step
        frames.append(made.calculated(atoms, -1.0 - step))
    ase.io.write(tmp_path / "relax.traj", frames)
    every = found(tmp_path, energies="adsorption")
    assert len(every.items) == 4 and any("--trajectories" in note for note in every.notes)
    last = found(tmp_path, energies="adsorption", trajectories=True)
    assert [s.energy for s in last.systems] == [-4.0] and last.refused == {"earlier frame": 3}
    rows = [made.row(atoms, energy=atoms.get_potential_energy()) for atoms in frames]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    table = found(tmp_path / "rows.jsonl", trajectories=True)
    assert len(table.items) == 4 and not table.refused and not table.notes


@pytest.mark.parametrize("tags", ["ASE", "OC20", "none"])
@pytest.mark.parametrize("named", [True, False])
def test_tags_of_either_kind(tmp_path: Path, tags: str, named: bool) -> None:
    info = {"adsorbate": "CO"} if named else {}
    ase.io.write(tmp_path / "a.extxyz", made.calculated(made.slab(tags=tags), -1.5, **info))
    system = one(tmp_path / "a.extxyz", energies="adsorption")
    assert system.identity == "CO</s>Pt12 (1 1 1)"
    assert system.tags.tolist() == [0] * 8 + [1] * 4 + [2] * 2


def test_tags_that_fit_nothing_are_refused(tmp_path: Path) -> None:
    """OC20's tags turned round (2 at the bottom, 0 the adsorbate) are ASE's; a slab numbered from below is
    neither."""
    atoms = made.slab(tags="OC20")
    right = atoms.get_tags()
    atoms.set_tags(2 - right)
    ase.io.write(tmp_path / "a.extxyz", made.calculated(atoms, -1.5))
    assert one(tmp_path / "a.extxyz", energies="adsorption").tags.tolist() == right.tolist()
    atoms.set_tags([1] * 4 + [2] * 4 + [3] * 4 + [0] * 2)
    ase.io.write(tmp_path / "b.extxyz", made.calculated(atoms, -1.5))
    assert refusal(tmp_path / "b.extxyz").startswith("tags unclear")
    assert one(tmp_path / "b.extxyz", energies="adsorption", adsorbate_atoms="tag:0").adsorbate == "CO"


def test_tags_of_an_adsorbate_that_sank(tmp_path: Path) -> None:
    """One of the shipped systems has its H 0.1 Å under the mean of the surface."""
    atoms = made.slab("Pt", "H", tags="OC20")
    atoms.positions[-1, 2] = atoms.positions[8:12, 2].mean() - 0.1
    ase.io.write(tmp_path / "a.extxyz", made.calculated(atoms, -0.5))
    assert one(tmp_path / "a.extxyz", energies="adsorption").tags.tolist() == atoms.get_tags().tolist()


def test_the_shipped_systems_come_in_as_they_are(tmp_path: Path) -> None:
    import gzip

    from catmllm.data.slabs import SHIPPED, load_slabs

    some = gzip.decompress(SHIPPED.read_bytes()).decode().splitlines()[::11]
    path = tmp_path / "shipped.jsonl"
    path.write_text("\n".join(some))
    known = {s.sid: s for s in load_slabs(path)}
    result = found(path)
    assert {s.sid for s in result.systems} == set(known) and set(result.refused) <= {"marked unusable"}
    for s in result.systems:
        other = known[s.sid]
        assert (s.identity, s.energy) == (other.identity, other.energy) and (s.tags == other.tags).all()
        assert np.allclose(s.frac, other.frac) and np.allclose(s.lattice, other.lattice)


def test_both_generations_of_lmdb(tmp_path: Path) -> None:
    """`y` and since June 2024 `energy`; plain dicts by protocol 5, as `pickle.dumps(record, -1)` writes."""
    atoms = made.slab(tags="OC20")
    base = {
        "pos": atoms.positions, "cell": atoms.cell[:][None], "atomic_numbers": atoms.numbers.astype(float),
        "tags": atoms.get_tags(), "natoms": len(atoms), "fixed": np.zeros(len(atoms)),
    }  # fmt: skip
    records = [{**base, "y": -1.5, "sid": 7}, {**base, "energy": -2.5, "force": np.zeros((len(atoms), 3))}]
    old, new = found(made.write_lmdb(tmp_path / "a.lmdb", records)).systems
    assert (old.sid, old.energy, new.sid, new.energy) == ("random7", -1.5, "a/1", -2.5)
    assert old.identity == new.identity == "CO</s>Pt12 (1 1 1)"


def test_test_records_without_labels_are_read_for_prediction(tmp_path: Path) -> None:
    atoms = made.slab(tags="OC20")
    record = {"pos": atoms.positions, "cell": atoms.cell[:], "atomic_numbers": atoms.numbers, "sid": 12}
    path = made.write_lmdb(tmp_path / "test.lmdb", [record | {"tags": atoms.get_tags()}])
    assert one(path, labelled=False).sid == "random12" and refusal(path).startswith("no energy")


def test_pickled_atoms_are_refused_with_what_to_do(tmp_path: Path) -> None:
    import lmdb

    with lmdb.open(str(tmp_path / "a.lmdb"), subdir=False) as environment, environment.begin(write=True) as t:
        t.put(b"0", pickle.dumps(made.slab()))
    assert ".aselmdb instead" in (text := refusal(tmp_path / "a.lmdb")) and text.startswith("refused pickle")


def test_energy_keys(tmp_path: Path) -> None:
    """MACE's REF_energy is a total one, OC20's ref_energy a reference; a key of one's own can be named."""
    atoms = made.slab()
    atoms.info = {"REF_energy": -80.0, "ref_energy": -78.5, "my_energy": -0.5}
    ase.io.write(tmp_path / "a.extxyz", atoms)
    assert one(tmp_path / "a.extxyz").energy == pytest.approx(-1.5)
    assert one(tmp_path / "a.extxyz", energy_key="my_energy").energy == -0.5
    atoms.info = {"mace_energy": -1.0}
    ase.io.write(tmp_path / "b.extxyz", atoms)
    message = refusal(tmp_path / "b.extxyz")
    assert "mace_energy" in message and "--energy-key" in message and "adsorption_energy" in message


def test_a_database_row_needs_no_key(tmp_path: Path) -> None:
    with ase.db.connect(str(tmp_path / "mine.db")) as database:
        database.write(made.calculated(made.slab(), -100.0), adsorption_energy=-1.5)
        database.write(made.calculated(made.slab("Cu", "O"), -100.0), adsorption_energy=-3.0, adsorbate="O")
    a, b = found(tmp_path / "mine.db").systems
    assert (a.sid, a.energy, a.identity) == ("mine/1", -1.5, "CO</s>Pt12 (1 1 1)")
    assert (b.sid, b.energy, b.identity) == ("mine/2", -3.0, "O</s>Cu12 (1 1 1)")


def test_an_element_of_the_slab_is_never_guessed(tmp_path: Path) -> None:
    atoms = made.rutile_with_oxygen()
    ase.io.write(tmp_path / "POSCAR", atoms)
    for name in ("O", None):
        message = refusal(tmp_path / "POSCAR", adsorbate=name, labelled=False)
        assert message.startswith(("ambiguous adsorbate", "no adsorbate")) and "--adsorbate-atoms" in message
    ase.io.write(tmp_path / "clean.vasp", atoms[:-1])
    for options in (
        {"adsorbate": "O", "adsorbate_atoms": "last"},
        {"adsorbate_atoms": "last:1"},
        {"adsorbate_atoms": "16"},
        {"adsorbate_atoms": "-1"},
        {"slabs": [tmp_path / "clean.vasp"]},
    ):
        system = one(tmp_path / "POSCAR", labelled=False, **options)
        assert system.adsorbate == "O" and system.slab_formula == "Ru12O4"
        assert system.tags.tolist()[-1] == 2


def test_vacuum_along_another_axis(tmp_path: Path) -> None:
    upright = made.slab(tags="none")
    for axis in (0, 1):
        atoms = upright.copy()
        order = [[2, 0, 1], [1, 2, 0]][axis]
        atoms.set_cell(atoms.cell[:][order])
        ase.io.write(tmp_path / f"{axis}.vasp", atoms)
        (item,) = found(tmp_path / f"{axis}.vasp", labelled=False).items
        assert (
            item.system.identity == "CO</s>Pt12 (1 1 1)"
            and item.system.tags.tolist()[8:] == [1] * 4 + [2] * 2
        )
        assert any(f"vacuum along {'ab'[axis]}" in mark for mark in item.marks)
        assert np.allclose(item.system.lattice[2, 2], upright.cell[2, 2])


def test_a_slab_that_crosses_the_boundary_or_hangs_upside_down(tmp_path: Path) -> None:
    for k, shift in enumerate((0.0, 0.3, 0.5, 0.7, 0.95)):
        atoms = made.slab(tags="none")
        atoms.positions += shift * atoms.cell[2]
        atoms.wrap()
        ase.io.write(tmp_path / f"{k}.cif", atoms)
        assert one(tmp_path / f"{k}.cif", labelled=False).tags.tolist() == [0] * 8 + [1] * 4 + [2] * 2
    atoms = made.slab(tags="none")
    atoms.positions[:, 2] = atoms.cell[2, 2] - atoms.positions[:, 2]
    ase.io.write(tmp_path / "down.vasp", atoms)
    (item,) = found(tmp_path / "down.vasp", labelled=False).items
    assert item.system.tags.tolist() == [0] * 8 + [1] * 4 + [2] * 2
    assert any("turned over" in mark for mark in item.marks) and adsorbate_fault(item.system) is None


def test_cells_that_lack_something(tmp_path: Path) -> None:
    atoms = made.slab()
    atoms.cell[2] = 0
    atoms.pbc = (True, True, False)
    ase.io.write(tmp_path / "flat.extxyz", atoms)
    (item,) = found(tmp_path / "flat.extxyz", labelled=False).items
    assert item.system.identity == "CO</s>Pt12 (1 1 1)" and "vacuum were added" in item.marks[0]
    ase.io.write(tmp_path / "gas.xyz", Atoms("CO", [[0, 0, 0], [0, 0, 1.1]]))
    assert "no periodic cell" in refusal(tmp_path / "gas.xyz", labelled=False)
    atoms = made.slab(tags="none")
    atoms.cell[2, 2] = np.ptp(atoms.positions[:, 2]) + 2.0
    ase.io.write(tmp_path / "tight.extxyz", atoms)
    (item,) = found(tmp_path / "tight.extxyz", labelled=False, adsorbate="CO").items
    assert any("no vacuum" in mark for mark in item.marks)
    left = made.slab(tags="none")
    left.set_cell(left.cell[:][[1, 0, 2]])
    ase.io.write(tmp_path / "left.vasp", left)
    (item,) = found(tmp_path / "left.vasp", labelled=False, miller=(2, 1, 1)).items
    assert any("left-handed" in mark for mark in item.marks) and item.system.volume > 0
    assert item.system.miller == (2, 1, 1)  # in the axes of the bulk, which did not change


def test_far_and_buried_adsorbates_are_said(tmp_path: Path) -> None:
    for height, word in ((6.0, "out of reach"), (-2.2, "inside the slab")):
        atoms = made.slab("Pt", "H", tags="none")
        atoms.positions[-1, 2] = atoms.positions[:-1, 2].max() + height
        ase.io.write(tmp_path / "a.vasp", atoms)
        (item,) = found(tmp_path / "a.vasp", labelled=False, adsorbate="H").items
        assert any(word in mark for mark in item.marks), item.marks


def test_coverage_and_several_adsorbates_are_kept(tmp_path: Path) -> None:
    four = fcc111("Pt", (2, 2, 3), vacuum=8.0)
    four += Atoms("O4", four.positions[-4:] + [0, 0, 2.0])
    four.set_tags(0)
    ase.io.write(tmp_path / "four.vasp", four)
    for name in ("O", "O4", None):
        system = one(tmp_path / "four.vasp", labelled=False, adsorbate=name)
        assert system.slab_formula == "Pt12" and (system.tags == 2).sum() == 4
        assert system.adsorbate == ("O4" if name == "O4" else "(O)4")
        assert adsorbate_fault(system) == ("broken" if name == "O4" else None)
    two = fcc111("Pt", (2, 2, 3), vacuum=8.0)
    top = two.positions[-4:]
    two += Atoms(
        "COOH", [top[0] + [0, 0, 1.9], top[0] + [0, 0, 3.05], top[3] + [0, 0, 1.9], top[3] + [0, 0, 2.9]]
    )
    two.set_tags(0)
    ase.io.write(tmp_path / "two.vasp", two)
    assert one(tmp_path / "two.vasp", labelled=False).adsorbate == "(CO)(OH)"
    assert [pieces(n) for n in ("(CO)(OH)2", "(O)4", "ON(CH3)2", "O4", "")] == [3, 4, 1, 1, 1]


def test_equal_names_in_two_folders_are_two_systems(tmp_path: Path) -> None:
    for folder, metal in (("A", "Pt"), ("B", "Cu")):
        (tmp_path / folder).mkdir()
        for name in ("relaxed.extxyz", "0.traj"):
            ase.io.write(tmp_path / folder / name, made.calculated(made.slab(metal), -1.5))
    result = found(tmp_path, energies="adsorption")
    assert sorted(s.sid for s in result.systems) == [
        "A/0.traj",
        "A/relaxed.extxyz",
        "B/0.traj",
        "B/relaxed.extxyz",
    ]
    assert not result.refused and any("2 exact copies" in note for note in result.notes)


def test_oc20_keeps_them_apart_too(tmp_path: Path) -> None:
    """`catmllm data oc20` on users' files: equal names in two folders, two systems in a file."""
    from catmllm.data.oc20 import readers

    for folder, metal in (("A", "Pt"), ("B", "Cu")):
        (tmp_path / folder).mkdir()
        ase.io.write(tmp_path / folder / "relaxed.extxyz", made.calculated(made.slab(metal), -1.5))
        ase.io.write(tmp_path / folder / "0.traj", made.calculated(made.slab(metal), -1.5))
    ase.io.write(tmp_path / "two.extxyz", [made.slab("Pt"), made.slab("Cu", "O")])
    read = [r for u in readers.units(readers.find_files([tmp_path])) for r in readers.read(u)]  # type: ignore[arg-type]
    assert len({r.sid for r in read}) == len(read) == 6


def test_a_vasp_calculation_is_one_system(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for name in ("POSCAR", "CONTCAR"):
            ase.io.write(tmp_path / folder / name, made.slab(), format="vasp")
        (tmp_path / folder / "OUTCAR").write_text("a run that was killed at once\n")
        (tmp_path / folder / "INCAR").write_text("ENCUT = 400\n")
    result = found(tmp_path, labelled=False)
    assert len(result.items) == 2 and result.left == 2


def test_files_that_are_damaged_or_of_no_kind(tmp_path: Path) -> None:
    (tmp_path / "vasprun.xml").write_text("<modeling><generator>")
    assert refusal(tmp_path / "vasprun.xml").startswith("unreadable file")
    (tmp_path / "notes.bin").write_bytes(b"\xf8\x01nothing")
    assert refusal(tmp_path / "notes.bin").split(":")[0] in ("unknown format", "unreadable file")
    assert refusal(tmp_path / "absent").startswith("nothing to read")


def test_partly_occupied_sites_are_refused(tmp_path: Path) -> None:
    ase.io.write(tmp_path / "a.cif", made.slab())
    text = (tmp_path / "a.cif").read_text()
    (tmp_path / "a.cif").write_text(text.replace(" 1.0000\n", " 0.5000\n", 1))
    assert "occupied" in refusal(tmp_path / "a.cif", labelled=False)


def test_fixed_atoms_do_not_count_as_unconverged(tmp_path: Path) -> None:
    from ase.calculators.singlepoint import SinglePointCalculator

    atoms = made.slab()
    atoms.set_constraint(FixAtoms(range(4)))
    for free, ok in ((0.02, True), (0.4, False)):
        forces = np.full((len(atoms), 3), free / 3)
        forces[:4] = 2.0
        atoms.calc = SinglePointCalculator(atoms, energy=-1.5, forces=forces)
        with ase.db.connect(str(tmp_path / f"{ok}.db")) as database:
            database.write(atoms)
        result = found(tmp_path / f"{ok}.db", energies="adsorption")
        assert (len(result.items) == 1) is ok and (result.refused == {}) is ok


def test_total_energies_by_references(tmp_path: Path) -> None:
    """E(slab + CO) - E(slab) - E(CO), and C by CO, H2O and H2 as OC20 counts; the values by hand."""
    carbon = made.slab("Pt", "C")
    ase.io.write(tmp_path / "co.extxyz", made.calculated(made.slab(), -90.0))
    ase.io.write(tmp_path / "c.extxyz", made.calculated(carbon, -85.0))
    ase.io.write(tmp_path / "clean.extxyz", made.calculated(made.slab()[:12], -74.0))
    (tmp_path / "gas.csv").write_text("name,energy\nCO,-14.4\nH2,-6.7\nH2O,-14.1\n")
    references = {"references": [tmp_path / "gas.csv", tmp_path / "clean.extxyz"]}
    system = one(tmp_path / "co.extxyz", **references)
    assert system.energy == pytest.approx(-90.0 + 74.0 + 14.4)
    assert one(tmp_path / "c.extxyz", **references).energy == pytest.approx(-85.0 + 74.0 + 14.4 - 14.1 + 6.7)
    assert "gas CO -14.400 eV" in (found(tmp_path / "co.extxyz", **references).state or "")
    (tmp_path / "slabs.yaml").write_text("Pt12: -74.0\nCO: -14.4\n")
    assert one(tmp_path / "co.extxyz", references=[tmp_path / "slabs.yaml"]).energy == pytest.approx(-1.6)
    assert refusal(tmp_path / "co.extxyz").startswith("no reference energy")
    assert "do not make C" in refusal(tmp_path / "c.extxyz", references=[tmp_path / "slabs.yaml"])
    (tmp_path / "gas.csv").write_text("H2,-6.7\nO2,-9.8\nH2O,-14.1\n")
    with pytest.raises(ValueError, match="can be made of each other"):
        found(tmp_path / "co.extxyz", **references)


def test_a_slab_under_which_the_adsorbate_is_has_the_clean_ones_reference(tmp_path: Path) -> None:
    """The cell was turned over before it was compared with the clean slab's."""
    atoms = made.slab(tags="none")
    atoms.positions[:, 2] = atoms.cell[2, 2] - atoms.positions[:, 2]
    ase.io.write(tmp_path / "clean.extxyz", made.calculated(atoms[:12], -74.0))
    ase.io.write(tmp_path / "down.extxyz", made.calculated(atoms, -90.0))
    (tmp_path / "gas.csv").write_text("CO,-14.4\n")
    references = [tmp_path / "gas.csv", tmp_path / "clean.extxyz"]
    assert one(tmp_path / "down.extxyz", references=references).energy == pytest.approx(-1.6)


def test_keys_of_extended_xyz_are_kept(tmp_path: Path) -> None:
    """ASE reads 0001 and 7 as numbers."""
    frames = [made.slab() for _ in range(4)]
    for atoms, more in zip(frames, ("sid=7 facet=0001", 'sid="my slab" facet=011', "name=a facet=111", "")):
        atoms.info["adsorption_energy"] = -1.0
        ase.io.write(tmp_path / "one.extxyz", atoms)
        lines = (tmp_path / "one.extxyz").read_text().split("\n")
        lines[1] += f" {more}"
        with open(tmp_path / "all.extxyz", "a") as file:
            file.write("\n".join(lines))
    systems = found(tmp_path / "all.extxyz").systems
    assert [s.sid for s in systems] == ["7", "my slab", "a", "all.extxyz#3"]
    assert [s.miller for s in systems] == [(0, 0, 1), (0, 1, 1), (1, 1, 1), (1, 1, 1)]


def test_elements_as_one_string(tmp_path: Path) -> None:
    atoms = made.slab("Pt", "O")
    for symbols in ("Pt12O", "Pt" * 12 + "O", " ".join(["Pt"] * 12 + ["O"])):
        row = made.row(atoms, energy=-1.0) | {"symbols": symbols}
        (tmp_path / "a.jsonl").write_text(json.dumps(row))
        assert one(tmp_path / "a.jsonl").symbols == ["Pt"] * 12 + ["O"]


def test_the_molecule_no_is_a_reference_in_yaml(tmp_path: Path) -> None:
    """YAML 1.1 has it for false, and the energy of NO was made of other molecules."""
    ase.io.write(tmp_path / "no.extxyz", made.calculated(made.slab("Pt", "NO"), -90.0))
    (tmp_path / "gas.yaml").write_text("NO: -12.5\nPt12: -74\nN2: -16.0\nO2: -9.0\n")
    with pytest.raises(ValueError, match="NO"):
        found(tmp_path / "no.extxyz", references=[tmp_path / "gas.yaml"])
    (tmp_path / "gas.yaml").write_text("NO: -12.5\nPt12: -74\n")
    assert one(tmp_path / "no.extxyz", references=[tmp_path / "gas.yaml"]).energy == pytest.approx(-3.5)


def test_oc20_gas_energies_make_methane() -> None:
    """The published example: E(CH4) = -7.282 + 4 (-3.477) with one energy an element."""
    references = References({"H": -3.477, "O": -7.204, "C": -7.282, "N": -8.083})
    assert references.gas({"C": 1, "H": 4})[0] == pytest.approx(-7.282 + 4 * -3.477)


def test_units_and_implausible_energies(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(made.row(made.slab(), energy=-100.0, id="x")))
    message = refusal(tmp_path / "a.jsonl")
    assert message.startswith("implausible energy") and "--unit" in message and "--energies total" in message
    assert one(tmp_path / "a.jsonl", unit="kJ/mol").energy == pytest.approx(-1.0364, abs=1e-4)


def test_catalysis_hub_imports_as_it_is(tmp_path: Path) -> None:
    co, h = made.slab(tags="none"), made.slab("Cu", "H", tags="none")
    star = {"star": 1}
    reactions = [
        ({"COgas": 1, **star}, {"COstar": 1}, -1.46, "111", {"COstar": co}),
        ({"H2gas": 0.5, **star}, {"Hstar": 1}, 0.1, "111", {"Hstar": h}),
        ({"COstar": 1}, {"Cstar": 1, "Ostar": 1}, 1.0, "111", {"Cstar": co}),
    ]
    result = found(made.write_catalysis_hub(tmp_path / "Peng.db", reactions))
    a, b = result.systems
    assert (a.identity, a.energy) == ("CO</s>Pt12 (1 1 1)", -1.46)
    assert (b.identity, b.energy) == ("H</s>Cu12 (1 1 1)", 0.1)
    assert result.refused == {"not an adsorption": 1} and result.state == "QE BEEF-vdW; gas CO, H2"
    oxygen = made.slab("Pt", "O", tags="none")
    more = [
        ({"O2gas": 0.5, **star}, {"Ostar": 1}, -1.0, "111", {"Ostar": oxygen}),
        ({"H2Ogas": 1, "H2gas": -1, **star}, {"Ostar": 1}, 1.5, "111", {"Ostar": oxygen}),
    ]
    assert "several zeros" in (found(made.write_catalysis_hub(tmp_path / "mixed.db", more)).mixed or "")


def test_odd_energies_and_shifted_sources_are_said(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name, offset in (("a", 0.0), ("b", 5.0)):
        rows = []
        for i in range(10):
            atoms = made.slab("Pt", "O")
            atoms.positions[-1, :2] += rng.normal(0, 0.05, 2)
            rows.append(
                made.row(
                    atoms, energy=offset - 2.0 + 0.05 * i + 3.0 * (i == 9 and name == "a"), adsorbate="O"
                )
            )
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    alone = found(tmp_path / "a.jsonl")
    assert [i.system.sid for i in alone.items if any("outlier" in m for m in i.marks)] == ["a.jsonl#9"]
    assert any("is the reference the same" in note for note in found(tmp_path).notes)


def test_mixed_states_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        made.row(made.slab(m), energy=-1.5, reference_state=s)
        for m, s in (("Pt", "CO gas"), ("Cu", "C atom"))
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert main(["data", "import", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "out")]) == 1
    assert "several zeros" in capsys.readouterr().err and not (tmp_path / "out").exists()
    arguments = ["--out", str(tmp_path / "out"), "--reference-state", "CO gas"]
    assert main(["data", "import", str(tmp_path / "a.jsonl"), *arguments]) == 0
    assert Shards(tmp_path / "out").facts["reference"] == "CO gas" and len(Shards(tmp_path / "out")) == 2


def test_equal_ids_of_different_systems(tmp_path: Path) -> None:
    rows = [made.row(made.slab(m), energy=-1.5, id="x") for m in ("Pt", "Cu", "Pt")]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = found(tmp_path / "a.jsonl")
    assert [s.sid for s in result.systems] == ["x", "a.jsonl:x"] and result.refused == {"read twice": 1}


@pytest.mark.parametrize(
    ("atoms", "miller"),
    [
        (fcc111("Pt", (2, 2, 3), vacuum=8), (1, 1, 1)),
        (fcc100("Cu", (2, 2, 3), vacuum=8), (1, 0, 0)),
        (fcc211("Au", (3, 2, 3), vacuum=8), (2, 1, 1)),
        (bcc110("Fe", (2, 2, 4), vacuum=8), (1, 1, 0)),
        (fcc111("Pt", (2, 2, 2), vacuum=8), None),  # two layers could be hcp as well
    ],
    ids=str,
)
def test_miller_index_of_the_structure(atoms: Atoms, miller: tuple[int, int, int] | None) -> None:
    """ASE's own builders, turned and shaken."""
    rng = np.random.default_rng(1)
    atoms.rotate(37, "z", rotate_cell=True)
    atoms.positions += rng.normal(0, 0.03, atoms.positions.shape)
    assert surface_miller(np.array(atoms.cell[:]), atoms.positions) == miller


@pytest.mark.parametrize(
    ("said", "miller"),
    [
        ("111", (1, 1, 1)), (111, (1, 1, 1)), ("fcc(211)", (2, 1, 1)), ("1 -1 0", (1, -1, 0)),
        ([1, 0, 0], (1, 0, 0)), ("0001", (0, 0, 1)), ("10-10", (1, 0, 0)), ("1-11", (1, -1, 1)),
        (1, (0, 0, 1)), (11, (0, 1, 1)), (-111, (-1, 1, 1)),
        ("stepped", None), ("(1, 1, 10)", (1, 1, 10)), ("fcc111-4x4", None), ("1x1x0", (1, 1, 0)),
    ],
)  # fmt: skip
def test_miller_index_as_people_write_it(said: object, miller: tuple[int, int, int] | None) -> None:
    assert keys.miller(said) == miller


def test_the_command_checks_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        "file,energy,adsorbate,note,split",
        "a.vasp,-1.5,CO,good,train",
        "b.vasp,-1.2,CO,,test",
        "c.vasp,0,CO,,",
    ]
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    for name, metal in (("a", "Pt"), ("b", "Cu")):
        ase.io.write(tmp_path / f"{name}.vasp", made.slab(metal, tags="none"))
    arguments = ["data", "import", str(tmp_path)]
    assert main([*arguments, "--check"]) == 0
    said = capsys.readouterr().out
    for line in ("3 records read: 2 systems, 1 refused", "c.vasp is not there", "column note: not used",
                 "column energy: energy", "adsorbate by its formula", "nothing was written"):  # fmt: skip
        assert line in said, said
    assert main([*arguments, "--out", str(tmp_path / "set")]) == 0
    shards = Shards(tmp_path / "set")
    assert [shards.group(i) for i in range(2)] == ["train", "test"]
    assert [(s.identity, s.energy) for s in shards] == [
        ("CO</s>Pt12 (1 1 1)", -1.5),
        ("CO</s>Cu12 (1 1 1)", -1.2),
    ]
    assert main([*arguments, "--out", str(tmp_path / "set")]) == 1 and "not empty" in capsys.readouterr().err


def test_adsorbates_on_both_sides(tmp_path: Path) -> None:
    atoms = fcc111("Pt", (2, 2, 3), vacuum=8.0)
    top, bottom = atoms.positions[-1], atoms.positions[0]
    atoms += Atoms("O2", [top + [0, 0, 2.0], bottom - [0, 0, 2.0]])
    atoms.set_tags(0)
    ase.io.write(tmp_path / "a.vasp", atoms)
    system = one(tmp_path / "a.vasp", labelled=False, adsorbate="O")
    assert system.adsorbate == "(O)2" and system.slab_formula == "Pt12"


def test_more_molecules_than_the_name_says(tmp_path: Path) -> None:
    atoms = made.slab("Pt", "H2O", n=3, tags="none")
    atoms += Atoms(atoms[-3:].get_chemical_symbols(), atoms.positions[-3:] + 0.5 * atoms.cell[0])
    ase.io.write(tmp_path / "two.extxyz", made.calculated(atoms, -1.0, adsorbate="H2O"))
    assert one(tmp_path / "two.extxyz", energies="adsorption").adsorbate == "(H2O)2"
    ase.io.write(tmp_path / "odd.extxyz", made.calculated(atoms[:-1], -1.0, adsorbate="H2O"))
    assert refusal(tmp_path / "odd.extxyz", energies="adsorption").startswith("ambiguous adsorbate")


def test_a_record_with_both_energies(tmp_path: Path) -> None:
    atoms = made.slab(tags="OC20")
    record = {"pos": atoms.positions, "cell": atoms.cell[:], "atomic_numbers": atoms.numbers, "y": -1.5}
    path = made.write_lmdb(tmp_path / "a.lmdb", [record | {"raw_y": -300.0, "tags": atoms.get_tags()}])
    assert (
        one(path).energy == -1.5
        and one(path, energy_key="raw_y", energies="adsorption", max_energy=400).energy == -300
    )


def test_a_decimal_comma_is_no_energy(tmp_path: Path) -> None:
    """`-1,5` without quotes is two cells: neither -1 eV nor a cell lost."""
    ase.io.write(tmp_path / "a.vasp", made.slab(tags="none"))
    (tmp_path / "labels.csv").write_text("file,adsorbate,energy\na.vasp,CO,-1,5\n")
    message = refusal(tmp_path / "labels.csv")
    assert message.startswith("unreadable record") and "row 1" in message and "quotes" in message


def test_a_table_that_says_unusable_or_unconverged(tmp_path: Path) -> None:
    ase.io.write(tmp_path / "a.vasp", made.slab(tags="none"))
    for cells, reason in (("False,0.01", "marked unusable"), ("true,0.9", "unconverged"), ("1,0.01", None)):
        (tmp_path / "labels.csv").write_text(f"file,energy,ok,fmax\na.vasp,-1.5,{cells}\n")
        result = found(tmp_path / "labels.csv")
        assert list(result.refused) == ([] if reason is None else [reason])


@pytest.mark.parametrize("packed", ["gz", "xz", "bz2"])
def test_a_packed_table(tmp_path: Path, packed: str) -> None:
    import importlib

    module = importlib.import_module({"gz": "gzip", "xz": "lzma"}.get(packed, packed))
    text = "\ufeff" + json.dumps(made.row(made.slab(), energy=-1.5))  # as Excel begins its UTF-8
    (tmp_path / f"a.jsonl.{packed}").write_bytes(module.compress(text.encode()))
    assert one(tmp_path / f"a.jsonl.{packed}").energy == -1.5


def test_tags_and_elements_that_no_one_writes(tmp_path: Path) -> None:
    atoms = made.slab()
    atoms.set_tags([-1] * 8 + [0] * 6)
    ase.io.write(tmp_path / "a.extxyz", atoms)
    assert refusal(tmp_path / "a.extxyz", labelled=False).startswith("tags unclear")
    for z in (0, 119):
        (tmp_path / "a.jsonl").write_text(
            json.dumps(made.row(made.slab()) | {"symbols": [z, *made.slab().numbers.tolist()[1:]]})
        )
        assert refusal(tmp_path / "a.jsonl", labelled=False).startswith("no element")


def test_two_energies_of_one_reference(tmp_path: Path) -> None:
    ase.io.write(tmp_path / "co.extxyz", made.calculated(made.slab(), -90.0))
    (tmp_path / "gas.csv").write_text("Pt12,-74.0\nCO,-14.4\nCO,-14.0\n")
    (tmp_path / "slabs.csv").write_text("name,energy\nPt12,-73.0\nCO,-14.4\n")
    with pytest.raises(ValueError, match=r"two energies of CO: -14\.400 and -14\.000 eV"):
        found(tmp_path / "co.extxyz", references=[tmp_path / "gas.csv"])
    (tmp_path / "gas.csv").write_text("Pt12,-74.0\nCO,-14.4\n")
    with pytest.raises(ValueError, match="two energies of Pt12"):
        found(tmp_path / "co.extxyz", references=[tmp_path / "gas.csv", tmp_path / "slabs.csv"])


@pytest.mark.parametrize("name", ["a.json", "a.parquet", "a.CSV", "a.JSONL"])
def test_a_file_that_a_table_names_is_read_once(tmp_path: Path, name: str) -> None:
    ase.io.write(tmp_path / "slab.extxyz", made.slab())
    rows = [{"file": "slab.extxyz", "energy": -1.5}]
    if name == "a.parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / name)
    else:
        csv = "file,energy\nslab.extxyz,-1.5\n"
        (tmp_path / name).write_text(
            csv if name == "a.CSV" else json.dumps(rows).strip("[]" * (name != "a.json"))
        )
    assert one(tmp_path, labelled=False).energy == -1.5


def test_what_a_calculation_was_read_from_is_said_and_a_table_has_it_once(tmp_path: Path) -> None:
    """The vasprun.xml was cut short: CONTCAR counts, without an energy of its own."""
    (tmp_path / "calc").mkdir()
    (tmp_path / "calc" / "vasprun.xml").write_text("<modeling><generator>")
    for name in ("POSCAR", "CONTCAR"):
        ase.io.write(tmp_path / "calc" / name, made.slab(), format="vasp")
    (item,) = found(tmp_path / "calc", labelled=False).items
    assert "read from CONTCAR: vasprun.xml could not be read" in item.marks
    (tmp_path / "labels.csv").write_text("file,energy\ncalc/CONTCAR,-1.5\n")
    assert one(tmp_path).energy == -1.5
