"""Users' own files, whatever their format: the same system of each, nothing lost, nothing raised, and the
examples of docs/own_data.md."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.constraints import FixAtoms
from hypothesis import given, settings
from hypothesis import strategies as st

from catmllm.data.own import keys
from catmllm.data.own.reading import summary
from tests.data import own_files as made
from tests.data.own_files import found, one
from tests.data.vasp_files import write_outcar, write_vasprun
from tests.structure.systems import read_back

METALS, MOLECULES = ("Pt", "Cu", "Ni", "Ag"), ("CO", "O", "H", "OH", "NH3")
Writer = Callable[[Path, Atoms], Path]


def _pymatgen(path: Path, atoms: Atoms) -> Path:
    from pymatgen.io.ase import AseAtomsAdaptor

    path = path.with_suffix(".json")
    path.write_text(json.dumps(AseAtomsAdaptor.get_structure(atoms).as_dict()))
    return path


def _by(suffix: str, **options: object) -> Writer:
    def write(path: Path, atoms: Atoms) -> Path:
        ase.io.write(path.with_suffix(suffix), atoms, **options)
        return path.with_suffix(suffix)

    return write


def _jsonl(path: Path, atoms: Atoms) -> Path:
    path.with_suffix(".jsonl").write_text(json.dumps(made.row(atoms)))
    return path.with_suffix(".jsonl")


def _csv(path: Path, atoms: Atoms) -> Path:
    import csv

    with open(path.with_suffix(".csv"), "w", newline="") as file:
        writer = csv.DictWriter(file, made.row(atoms))
        writer.writeheader()
        writer.writerow({k: json.dumps(v) for k, v in made.row(atoms).items()})
    return path.with_suffix(".csv")


def _parquet(path: Path, atoms: Atoms) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    parquet.write_table(pyarrow.Table.from_pylist([made.row(atoms)]), path.with_suffix(".parquet"))
    return path.with_suffix(".parquet")


def _lmdb(path: Path, atoms: Atoms) -> Path:
    record = {"pos": atoms.positions, "cell": atoms.cell[:], "atomic_numbers": atoms.numbers, "y": -1.0}
    return made.write_lmdb(path.with_suffix(".lmdb"), [record])


def _aselmdb(path: Path, atoms: Atoms) -> Path:
    pytest.importorskip("ase_db_backends")
    with ase.db.connect(str(path.with_suffix(".aselmdb")), type="aselmdb") as database:
        database.write(atoms)
    return path.with_suffix(".aselmdb")


# The least precise number that a format holds, as a position in Å: extxyz has 8 decimals, others 16 digits.
FORMATS: dict[str, tuple[Writer, float]] = {
    "extxyz": (_by(".extxyz"), 1e-7), "traj": (_by(".traj"), 1e-9), "db": (_by(".db"), 1e-9),
    "ase json": (_by(".json"), 1e-9), "vasp": (_by(".vasp"), 1e-9), "cif": (_by(".cif"), 1e-9),
    "pymatgen": (_pymatgen, 1e-9), "jsonl": (_jsonl, 1e-9), "csv": (_csv, 1e-9), "parquet": (_parquet, 1e-9),
    "lmdb": (_lmdb, 1e-9), "aselmdb": (_aselmdb, 1e-9),
}  # fmt: skip


@pytest.mark.parametrize("format", FORMATS)
def test_a_system_is_the_same_from_every_format(
    format: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    write, tolerance = FORMATS[format]

    @settings(max_examples=6, deadline=None)
    @given(
        st.sampled_from(METALS), st.sampled_from(MOLECULES), st.integers(0, 2**31), st.sampled_from((0, 37.0))
    )
    def holds(metal: str, adsorbate: str, seed: int, turn: float) -> None:
        rng = np.random.default_rng(seed)
        atoms = made.slab(metal, adsorbate, tags="none")
        atoms.positions += rng.normal(0, 0.02, atoms.positions.shape)
        atoms.rotate(turn, "z", rotate_cell=True)
        folder = tmp_path_factory.mktemp("own")
        path = write(folder / "a", atoms)
        read = one(path, labelled=False)
        if format == "cif":  # of which thirds are read as pymatgen reads them, not as ASE
            atoms = ase.io.read(path)
            atoms.set_scaled_positions(read_back(atoms.get_scaled_positions(), 16))
        straight = one(_jsonl(folder / "direct", atoms), labelled=False)
        assert read.identity == straight.identity
        assert (read.numbers == atoms.numbers).all() and (read.tags == straight.tags).all()
        assert np.allclose(read.lattice, straight.lattice, rtol=0, atol=10 * tolerance)
        way = read.frac - straight.frac
        assert np.abs((way - np.round(way)) @ straight.lattice).max() < tolerance
        # the distances are those of ASE, whatever was turned
        assert read.volume == pytest.approx(atoms.get_volume(), rel=1e-4)

    holds()


KINDS = ("good", "garbage", "no structure", "no energy", "nan", "overlap", "half", "far")


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from(KINDS), min_size=1, max_size=8))
def test_nothing_is_lost(kinds: list[str]) -> None:
    """Records read and refused are together those that were given, whatever is wrong with them."""
    import tempfile

    lines = []
    for kind in kinds:
        record = made.row(GOOD, energy=-1.5)
        if kind == "garbage":
            lines.append('{"symbols": [')
            continue
        if kind == "no structure":
            record = {"energy": 1.0}
        elif kind == "no energy":
            del record["energy"]
        elif kind == "nan":
            record["pos"][3][1] = float("nan")
        elif kind == "overlap":
            record["pos"][1] = record["pos"][0]
        elif kind == "half":
            record["pos"] = record["pos"][:4]
        elif kind == "far":
            record["energy"] = -400.0
        lines.append(json.dumps(record))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.jsonl"
        path.write_text("\n".join(lines))
        result = found(path)
    assert len(result.items) + result.refused.total() == result.read == len(kinds)
    assert len({s.sid for s in result.systems}) == len(result.items) == kinds.count("good")
    assert summary(result)


GOOD = made.slab()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 4000), st.integers(0, 255), st.sampled_from(("extxyz", "vasp", "cif", "traj")))
def test_damaged_files_never_raise(at: int, byte: int, format: str) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = FORMATS[format][0](Path(folder) / "a", GOOD)
        data = bytearray(path.read_bytes())
        data[at % len(data)] = byte
        path.write_bytes(bytes(data))
        result = found(path, labelled=False)
    assert len(result.items) + result.refused.total() == result.read >= 1


# --------------------------------------------------------------------------- docs/own_data.md

PAGE = (Path(__file__).parents[2] / "docs" / "own_data.md").read_text(encoding="utf-8")


def test_the_page_has_every_key() -> None:
    for meaning, names in keys.KEYS.items():
        assert f"| {meaning} | {', '.join(f'`{name}`' for name in names)} |" in PAGE


def test_the_small_files_of_the_page(tmp_path: Path) -> None:
    """Each is imported as it stands and is the same system."""
    import re

    blocks = dict(re.findall(r"```([\w.]+\.\w+|POSCAR)\n(.*?)```", PAGE, re.DOTALL))
    assert set(blocks) == {
        "slab.extxyz", "POSCAR", "labels.csv", "rows.jsonl", "slab.cif", "pymatgen.json", "gas.csv",
        "texts.csv",
    }  # fmt: skip
    for name, text in blocks.items():
        (tmp_path / name).write_text(text)
    for name in ("slab.extxyz", "labels.csv", "rows.jsonl", "slab.cif", "pymatgen.json", "POSCAR"):
        labelled = name not in ("slab.cif", "POSCAR")
        system = one(tmp_path / name, labelled=labelled)
        assert system.identity == "O</s>Pt3 (1 1 1)" and system.energy == (-1.2 if labelled else None), name
        assert system.tags.tolist() == [0, 0, 1, 2]
    assert one(tmp_path / "texts.csv").text == "O</s>Pt (1 1 1)</s>[O Pt Pt bridge [Pt Pt O] [Pt Pt O]]"
    ase.io.write(tmp_path / "total.extxyz", made.calculated(ase.io.read(tmp_path / "POSCAR"), -24.7))
    system = one(tmp_path / "total.extxyz", references=[tmp_path / "gas.csv"])
    assert system.energy == pytest.approx(-24.7 + 16.1 + 14.22 - 6.76)


# --------------------------------------------------------------------------- VASP


def test_a_vasp_calculation_reads_as_pymatgen_reads_it(tmp_path: Path) -> None:
    """A vasprun.xml and an OUTCAR of two steps with fixed atoms, whose forces stay large: the last step, its
    energy without smearing, and only free atoms are held to `--fmax`."""
    from pymatgen.io.vasp import Outcar, Vasprun

    start = made.slab("Pt", "CO", tags="none")
    end, fixed = start.copy(), [0, 1, 2, 3]
    end.positions[-2:] += [0.02, 0.01, 0.05]
    forces = np.zeros((2, len(start), 3))
    forces[0, -1], forces[1, -1], forces[1, fixed] = 0.3, 0.02, 0.5
    steps = [(start, -77.1, forces[0]), (end, -77.6, forces[1])]
    xml = write_vasprun(tmp_path / "vasprun.xml", steps, fixed)
    theirs = Vasprun(str(xml), parse_dos=False, parse_eigen=False, parse_potcar_file=False)
    (tmp_path / "gas.csv").write_text("Pt12,-61.0\nCO,-14.8\n")
    asked = {"references": [tmp_path / "gas.csv"]}
    system = one(xml, **asked)
    assert system.energy == pytest.approx(float(theirs.final_energy) + 61.0 + 14.8)
    frac = theirs.final_structure.frac_coords - end.get_scaled_positions()
    assert np.abs(frac - np.round(frac)).max() < 1e-6
    away = system.as_ase().get_all_distances(mic=True) - end.get_all_distances(mic=True)
    assert np.abs(away).max() < 1e-6 and system.identity == "CO</s>Pt12 (1 1 1)"

    assert found(write_vasprun(xml, steps, []), **asked).refused == {"unconverged": 1}
    # cut by a queue in its third step: the second counts
    assert one(write_vasprun(xml, steps, fixed, whole=False), **asked).energy == system.energy
    assert found(write_vasprun(xml, steps[:1], fixed, whole=False), **asked).refused == {"unconverged": 1}

    xml.write_text("<modeling><generator>")
    outcar = write_outcar(tmp_path / "OUTCAR", steps)
    (tmp_path / "gas.csv").rename(tmp_path.parent / "gas.csv")
    asked = {"references": [tmp_path.parent / "gas.csv"]}
    assert "unconverged" in found(tmp_path, **asked).refused  # nothing says which atoms are fixed
    end.set_constraint(FixAtoms(fixed))
    ase.io.write(tmp_path / "CONTCAR", end, format="vasp")
    (item,) = found(tmp_path, **asked).items
    assert Outcar(str(outcar)).final_energy == pytest.approx(-77.6)
    assert item.system.energy == pytest.approx(system.energy)
    assert "read from OUTCAR: vasprun.xml could not be read" in item.marks
