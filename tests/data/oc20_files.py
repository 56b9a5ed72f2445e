"""The same adsorption systems in every layout of OC20, written by the
libraries that OC20's own files were written by.

PyG records by torch_geometric, LMDBs by lmdb, `.aselmdb` by ase-db-backends, frames,
trajectories and databases by ASE.
"""

from __future__ import annotations

import copyreg
import io
import lzma
import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ase.db
import ase.io
import lmdb
import numpy as np
from ase import Atoms
from ase.build import add_adsorbate, fcc100, fcc111, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms


@dataclass
class Case:
    """A relaxed structure as OC20 publishes it. energy: adsorption energy;
    the total one is energy + reference (eV)."""

    atoms: Atoms
    sid: int
    adsorbate: str
    bulk: str
    miller: tuple[int, int, int]
    energy: float
    reference: float = -120.5

    @property
    def total(self) -> float:
        return self.energy + self.reference

    def calculated(self, step: float = 0.0) -> Atoms:
        """With total energy and forces, small on free atoms;
        `step` moves it away from the relaxed structure."""
        atoms = self.atoms.copy()
        atoms.positions[~self.fixed] += step
        forces = np.where(self.fixed[:, None], 0.5, 0.01 + step) * np.ones(3)
        atoms.calc = SinglePointCalculator(atoms, energy=self.total + step, forces=forces)
        return atoms

    @property
    def fixed(self) -> np.ndarray:
        fixed = np.zeros(len(self.atoms), dtype=bool)
        fixed[self.atoms.constraints[0].index] = True
        return fixed


def cases(n: int = 12) -> list[Case]:
    """Different slabs, some turned out of the standard orientation,
    some with tag-2 atoms between the others."""
    made = []
    rng = np.random.default_rng(5)
    metals = ["Cu", "Pt", "Ni", "Pd", "Ag", "Al"]
    for i in range(n):
        build, miller = ((fcc111, (1, 1, 1)), (fcc100, (1, 0, 0)))[i % 2]
        metal = metals[i % len(metals)]
        atoms = build(metal, (2, 2, 3), vacuum=8.0, periodic=True)
        name, species = (("CO", "CO"), ("OH", "OH"), ("O", "O"), ("NH3", "NH3"))[i % 4]
        body = molecule(species) if len(species) > 1 else Atoms(species)
        if name == "CO":  # ASE's has the oxygen first
            body = body[[1, 0]]
            body.positions[:] = [[0, 0, 0], [0, 0, 1.15]]
        add_adsorbate(atoms, body, 1.9, "ontop")
        atoms.pbc = True
        atoms.set_tags([2] * len(atoms))
        atoms.set_tags([0] * 8 + [1] * 4 + [2] * (len(atoms) - 12))
        atoms.positions += rng.normal(0, 0.03, atoms.positions.shape)
        if i % 3 == 1:
            atoms.rotate(33, "z", rotate_cell=True)
            atoms.rotate(20, "x", rotate_cell=True)
        if i % 5 == 4:  # OC22 sorts by element: the adsorbate need not stand last
            atoms = atoms[rng.permutation(len(atoms))]
        atoms.set_constraint(FixAtoms(np.flatnonzero(atoms.get_tags() == 0)))
        made.append(Case(atoms, 1000 + i, name, f"{metal}4", miller, round(float(rng.normal(-1, 1)), 6)))
    return made


def mapping(some: Iterable[Case], **changes: Any) -> dict[str, dict[str, Any]]:
    """In the form of oc20_data_mapping.pkl."""
    return {
        f"random{c.sid}": {
            "bulk_id": 1,
            "ads_id": 2,
            "bulk_mpid": f"mp-{c.bulk}",
            "bulk_symbols": c.bulk,
            "ads_symbols": f"*{c.adsorbate}",
            "miller_index": c.miller,
            "shift": 0.125,
            "top": True,
            "adsorption_site": ((np.float64(1.0), 2.0, 3.0),),
            "class": 0,
            "anomaly": 0,
        }
        | changes
        for c in some
    }


def dump(value: Any, path: Path) -> Path:
    path.write_bytes(pickle.dumps(value))
    return path


def pyg_fields(case: Case, layout: str) -> dict[str, Any]:
    """Keys and dtypes of OC20's IS2RE and S2EF records."""
    import torch

    a = case.atoms
    common = {
        "cell": torch.tensor(a.cell[:], dtype=torch.float32)[None],
        "atomic_numbers": torch.tensor(a.numbers, dtype=torch.float32),
        "natoms": len(a),
        "tags": torch.tensor(a.get_tags(), dtype=torch.long),
        "fixed": torch.tensor(case.fixed, dtype=torch.float32),
        "sid": case.sid,
        "edge_index": torch.zeros((2, 7), dtype=torch.long),
    }
    positions = torch.tensor(a.positions, dtype=torch.float32)
    if layout == "is2re":
        # forces are those of the initial structure, as in OC20's own files
        start = {"pos": positions + 0.25, "y_init": case.energy + 1.5, "force": torch.full((len(a), 3), 2.5)}
        return common | start | {"pos_relaxed": positions, "y_relaxed": case.energy}
    forces = torch.tensor(case.calculated().get_forces(apply_constraint=False), dtype=torch.float32)
    return common | {"pos": positions, "y": case.energy, "force": forces, "fid": 17}


def pyg_pickle(values: dict[str, Any], old: bool) -> bytes:
    """A Data as torch_geometric pickles it; `old`: as before 2.0,
    where the values were the object's own attributes."""
    from torch_geometric.data import Data

    if not old:
        return pickle.dumps(Data(**values), protocol=-1)
    stream = io.BytesIO()
    marker = Data()

    class Old(pickle.Pickler):
        def reducer_override(self, obj: Any) -> Any:
            if obj is marker:
                state = {"x": None, "edge_attr": None, "face": None, **values}
                return copyreg.__newobj__, (Data,), state  # type: ignore[attr-defined]
            return NotImplemented

    Old(stream, protocol=4).dump(marker)
    return stream.getvalue()


def write_lmdb(path: Path, values: Iterable[bytes], keys: Iterable[bytes] | None = None) -> Path:
    environment = lmdb.open(str(path), map_size=1 << 28, subdir=False, meminit=False, map_async=False)
    rows = list(values)
    with environment.begin(write=True) as transaction:
        for key, value in zip(keys or (f"{i}".encode("ascii") for i in range(len(rows))), rows):
            transaction.put(key, value)
        transaction.put(b"length", pickle.dumps(len(rows), protocol=-1))
    environment.sync()
    environment.close()
    return path


def write_pyg_lmdb(path: Path, some: Iterable[Case], layout: str = "is2re", old: bool = False) -> Path:
    return write_lmdb(path, [pyg_pickle(pyg_fields(c, layout), old) for c in some])


def write_database(path: Path, some: Iterable[Case]) -> Path:
    """`.db`, `.json` or, with ase-db-backends, `.aselmdb`; metadata as key-value pairs and data."""
    kind = {"type": "aselmdb"} if path.suffix == ".aselmdb" else {}
    with ase.db.connect(str(path), **kind) as database:
        for c in some:
            database.write(
                c.calculated(),
                key_value_pairs={"sid": f"random{c.sid}"},
                data={"ref_energy": c.reference, "fid": 3},
            )
    return path


def write_frames(folder: Path, some: Iterable[Case], packed: bool = True) -> Path:
    """S2EF as it is downloaded: frames of several systems in one file, and a line of text for each."""
    frames, index = [], []
    for step, frame in ((0.4, 3), (0.0, 41), (0.2, 12)):
        for c in some:
            frames.append(c.calculated(step))
            index.append(f"random{c.sid},frame{frame},{c.reference}")
    text = io.StringIO()
    ase.io.write(text, frames, format="extxyz")
    (folder / "0.txt").write_text("\n".join(index) + "\n")
    path = folder / ("0.extxyz.xz" if packed else "0.extxyz")
    path.write_bytes(lzma.compress(text.getvalue().encode()) if packed else text.getvalue().encode())
    return path


def write_relaxations(folder: Path, some: Iterable[Case]) -> Path:
    """Relaxation trajectories as they are downloaded: a file a system, and system.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    for c in some:
        text = io.StringIO()
        ase.io.write(text, [c.calculated(s) for s in (0.5, 0.2, 0.0)], format="extxyz")
        (folder / f"random{c.sid}.extxyz.xz").write_bytes(lzma.compress(text.getvalue().encode()))
    (folder / "system.txt").write_text("".join(f"random{c.sid},{c.reference}\n" for c in some))
    return folder


def write_trajectories(folder: Path, some: Iterable[Case]) -> Path:
    for c in some:
        path = folder / f"random{c.sid}.traj"
        ase.io.write(path, [c.calculated(s) for s in (0.5, 0.0)])
    (folder / "system.txt").write_text("".join(f"random{c.sid},{c.reference}\n" for c in some))
    return folder
