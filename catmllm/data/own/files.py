"""Any file or folder to records: what ASE and pymatgen read, LMDBs, databases and tables.

A frame is a record. What cannot be read is a `Problem`, so that records and problems together are all that
there was.
"""

from __future__ import annotations

import bz2
import contextlib
import csv
import gzip
import io
import json
import lzma
import os
import re
import sqlite3
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from catmllm.data.oc20 import readers
from catmllm.data.oc20.readers import Problem, Record, Unit, from_atoms
from catmllm.data.own import keys
from catmllm.structure.cif import header_identity, require_whole_atoms
from catmllm.structure.elements import NUMBER
from rewards_fast import parse_cif

if TYPE_CHECKING:
    from pymatgen.core import Structure

# What is read in a folder; a file that is named itself may be anything that ASE knows.
ENDINGS = (
    ".extxyz", ".xyz", ".traj", ".db", ".json", ".cif", ".vasp", ".poscar", ".xsf", ".gen", ".res", ".pwo",
    ".jsonl", ".csv", ".tsv", ".parquet", ".lmdb", ".aselmdb",
)  # fmt: skip
PACKED = (".gz", ".xz", ".bz2")
# Of a VASP calculation the first that can be read counts: it says most.
VASP = ("vasprun.xml", "OUTCAR", "CONTCAR", "POSCAR")
_VASP_NAME = re.compile(r"(POSCAR|CONTCAR|OUTCAR|vasprun)([._-].*)?|.*vasprun\.xml")


@dataclass(frozen=True)
class Source:
    """One file (or folder of an LMDB), or the files of one VASP calculation, best first; name: what its
    records are called."""

    paths: tuple[Path, ...]
    name: str


def find(paths: Sequence[str | Path]) -> tuple[list[Source], list[Problem], int]:
    """The sources under some files and folders, sorted; what is missing; how many files were left alone."""
    problems: list[Problem] = []
    found: list[tuple[Path, ...]] = []
    left = 0
    bases = []
    for path in map(Path, paths):
        if path.is_file() or (path / "data.mdb").is_file():
            found.append((path,))
            bases.append(path.absolute().parent)
        elif path.is_dir():
            inside, others = _folder(path)
            found += inside
            left += others
            bases.append(path.absolute())
            if not inside:
                problems.append(Problem("nothing to read", f"{path}: no file there is of a known kind"))
        else:
            problems.append(Problem("nothing to read", f"{path}: does not exist"))
    if not bases:
        return [], problems, left
    base = os.path.commonpath(bases)
    names = [Path(os.path.relpath(p[0].absolute(), base)).as_posix() for p in found]
    return [Source(p, name) for p, name in zip(found, names)], problems, left


def _folder(folder: Path) -> tuple[list[tuple[Path, ...]], int]:
    """The sources in a folder and all under it, and the number of files that are none."""
    found: list[tuple[Path, ...]] = []
    left = 0
    for place, folders, names in os.walk(folder):
        folders.sort()
        here = Path(place)
        if "data.mdb" in names:
            found.append((here,))
            continue
        vasp = [here / (n + e) for n in VASP for e in ("", ".gz") if n + e in names]
        if vasp:
            found.append(tuple(vasp))
        for name in sorted(set(names) - {p.name for p in vasp}):
            stem = unpacked(name)
            if stem.lower().endswith(ENDINGS) or _VASP_NAME.fullmatch(stem):
                found.append((here / name,))
            else:
                left += 1
    return found, left


def unpacked(name: str) -> str:
    """The name of a file without the ending that says how it is packed."""
    for ending in PACKED:
        name = name.removesuffix(ending)
    return name


def read(source: Source) -> Iterator[Record | Problem]:
    """The records of a source, their sids by its name and the frame; of a VASP calculation those of the first
    file that can be read, which say what could not (`passed over`)."""
    items: list[Record | Problem] = []
    passed = []
    for path in source.paths:
        items = list(_named(path, source.name))
        if any(isinstance(item, Record) for item in items):
            break
        passed.append(path.name)
    for item in items:
        if isinstance(item, Record) and passed:
            item.beside["passed over"] = f"read from {path.name}: {', '.join(passed)} could not be read"
        yield item


def _named(path: Path, name: str) -> Iterator[Record | Problem]:
    """The items of a file; a record that says no sid is called by the file, and by its frame where there are
    several."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        items = list(_guarded_file(path))
    many = len(items) > 1
    for frame, item in enumerate(items):
        if isinstance(item, Record):
            item.beside["source"] = name
            item.sid = item.sid or (f"{name}#{frame}" if many else name)
        yield item


def _guarded_file(path: Path) -> Iterator[Record | Problem]:
    try:
        yield from _items(path)
    except ModuleNotFoundError:
        raise  # a package that is missing is not the file's fault
    except Exception as error:  # each library fails in its own ways; any of them means that no more comes
        yield Problem("unreadable file", f"{path}: {type(error).__name__}: {str(error)[:200]}")


def _items(path: Path) -> Iterator[Record | Problem]:
    name = unpacked(path.name)
    suffix = Path(name).suffix.lower()
    if suffix in (".lmdb", ".aselmdb", ".pkl") or path.is_dir():
        for item in readers.read(Unit((str(path),))):
            if isinstance(item, Record):
                item.beside.setdefault("tags of OC20", suffix != ".aselmdb")
            yield item
    elif suffix == ".db":
        yield from _database(path)
    elif (rows := _table(path)) is not None:
        yield from _rows(path, rows)
    elif suffix == ".json":
        yield from _ase_rows(path)
    elif suffix == ".cif":
        yield from _cifs(path, _text(path))
    else:
        yield from _by_ase(path, name)


def _text(path: Path) -> str:
    unpack = {".gz": gzip.decompress, ".xz": lzma.decompress, ".bz2": bz2.decompress}.get(path.suffix, bytes)
    return unpack(path.read_bytes()).decode("utf-8-sig")


# --------------------------------------------------------------------------- ASE


def _by_ase(path: Path, name: str) -> Iterator[Record | Problem]:
    import ase.io
    from ase.io.formats import UnknownFileTypeError

    # their frames are always steps of one relaxation
    only_last = name.startswith("OUTCAR") or name.endswith("vasprun.xml")
    # ASE goes by the name, where `x.poscar` and `POSCAR_clean` are nothing it knows
    vasp = name.lower().endswith((".poscar", ".vasp")) or name.startswith(("POSCAR", "CONTCAR"))
    format = "vasp" if vasp else "extxyz" if name.endswith(".extxyz") else None
    frames: Iterable[Any] = ()
    frame = 0
    try:
        if only_last:
            last: Any = ase.io.read(path, index=-1)
            if name.startswith("OUTCAR"):  # it says forces on all atoms and not which are fixed
                last.set_constraint(_fixed(path.parent, len(last)))
            frames = (last,)
        else:
            frames = ase.io.iread(path, index=":", format=format)
        for frame, atoms in enumerate(frames):
            yield _from_ase(atoms, frame)
    except UnknownFileTypeError as error:
        yield Problem("unknown format", f"{path}: ASE does not know it ({error}); give .extxyz, .cif, .db, …")


def _fixed(folder: Path, n: int) -> list[Any]:
    """The constraints of the CONTCAR or POSCAR of a calculation of n atoms, none where neither has any."""
    import ase.io

    for path in (folder / "CONTCAR", folder / "POSCAR"):
        with contextlib.suppress(Exception):  # each way to be damaged raises its own
            beside: Any = ase.io.read(path, format="vasp")
            if len(beside) == n and beside.constraints:
                return list(beside.constraints)
    return []


def _from_ase(atoms: Any, frame: int = 0) -> Record:
    record = from_atoms(atoms, "", frame)
    record.beside.pop("spacegroup", None)  # ASE's own, of a CIF or a builder
    said = keys.value(record.beside, "id")
    record.sid = "" if said is None else str(said)
    return record


# --------------------------------------------------------------------------- databases


def _sqlite(path: Path) -> contextlib.closing[sqlite3.Connection]:
    return contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True))


def _database(path: Path) -> Iterator[Record | Problem]:
    with _sqlite(path) as connection:
        tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type='table'")}
    if {"reaction", "reaction_system"} <= tables:
        yield from _catalysis_hub(path)
        return
    yield from _ase_rows(path)


def _ase_rows(path: Path) -> Iterator[Record | Problem]:
    from ase.db import connect

    for row in connect(str(path), use_lock_file=False).select(sort="id"):
        try:
            atoms = row.toatoms()
            atoms.info = {**row.data, **row.key_value_pairs}
            record = _from_ase(atoms)
            said = keys.find(record.beside, "id")
            record.sid = str(said[1]) if said else f"{path.stem}/{row.id}"
            yield record
        except Exception as error:
            yield Problem("unreadable record", f"{path}, id {row.id}: {error}")


def _catalysis_hub(path: Path) -> Iterator[Record | Problem]:
    """Adsorption reactions of a local Catalysis-Hub database: gas molecules and a bare surface to one
    adsorbed species, whose structure is the record and whose reaction energy (eV) the adsorption energy."""
    from ase.db import connect

    database = connect(str(path), use_lock_file=False)
    with _sqlite(path) as connection:
        connection.row_factory = sqlite3.Row
        reactions = connection.execute("SELECT * FROM reaction ORDER BY id").fetchall()
        systems: dict[int, dict[str, str]] = {}
        for name, ase_id, reaction in connection.execute("SELECT name, ase_id, id FROM reaction_system"):
            systems.setdefault(reaction, {})[name] = ase_id
    for row in reactions:
        where = f"{path}, reaction {row['id']}"
        try:
            reactants, products = (json.loads(row[side]) for side in ("reactants", "products"))
            adsorbed = [k for k in products if k.endswith("star") and k != "star"]
            gases = {k.removesuffix("gas") for k in (*reactants, *products) if k.endswith("gas")}
            others = [k for k in reactants if not k.endswith("gas") and k != "star"]
            if len(adsorbed) != 1 or others or products[adsorbed[0]] != 1:
                equation = f"{' + '.join(reactants)} -> {' + '.join(products)}"
                yield Problem("not an adsorption", f"{where}: {equation}")
                continue
            name = adsorbed[0].removesuffix("star")
            atoms = database.get(unique_id=systems[row["id"]][adsorbed[0]]).toatoms()
            record = from_atoms(atoms, f"{path.stem}/{row['id']}", 0)
            record.adsorbate, record.energy, record.referenced = name, float(row["reaction_energy"]), True
            method = " ".join(str(row[k]) for k in ("dft_code", "dft_functional") if row[k])
            record.beside = {
                "facet": row["facet"], "surface": row["surface_composition"], "sites": row["sites"],
                "publication": row["pub_id"], "gases": sorted(gases), "method": method,
            }  # fmt: skip
            yield record
        except (KeyError, TypeError, ValueError) as error:
            yield Problem("unreadable record", f"{where}: {type(error).__name__}: {error}")


# --------------------------------------------------------------------------- tables


def _table(path: Path) -> Iterable[Any] | None:
    """The rows of a table of any kind; None for another file, as for an ASE database in JSON."""
    suffix = Path(unpacked(path.name)).suffix.lower()
    if suffix == ".json":
        return _json(path)
    if suffix == ".jsonl":
        return _json_lines(path)
    if suffix in (".csv", ".tsv"):
        return _cells(path, "\t" if suffix == ".tsv" else ",")
    return _parquet(path) if suffix == ".parquet" else None


def _cells(path: Path, delimiter: str) -> Iterator[dict[str, Any] | Problem]:
    """The rows of a CSV or TSV by its heading."""
    for number, row in enumerate(csv.DictReader(io.StringIO(_text(path)), delimiter=delimiter), start=1):
        if None in row:  # DictReader's place for them; the cells before may be shifted as well
            message = f"{len(row) - 1} columns and more cells; a cell that holds a {delimiter!r} needs quotes"
            yield Problem("unreadable record", f"{path}, row {number}: {message}")
        else:
            yield {k: keys.plain(v) for k, v in row.items() if k}


def _json_lines(path: Path) -> Iterator[dict[str, Any] | Problem]:
    for number, line in enumerate(_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"a line is an object, not {str(row)[:40]!r}")
            yield row
        except ValueError as error:
            yield Problem("unreadable record", f"{path}:{number}: {error}")


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise ModuleNotFoundError(f"{path}: Parquet is read by pyarrow: pip install pyarrow") from None
    yield from parquet.read_table(path).to_pylist()


def _json(path: Path) -> list[Any] | None:
    """The rows of a JSON file: structures of pymatgen or plain rows, one, a list, or by name; None for an ASE
    database."""
    content = json.loads(_text(path))
    if isinstance(content, dict) and "ids" in content and "nextid" in content:
        return None
    if isinstance(content, list):
        return content
    if not _is_structure(content) and content and all(isinstance(v, dict) for v in content.values()):
        return [{"id": name, **(row if not _is_structure(row) else {"structure": row})}
                for name, row in content.items()]  # fmt: skip
    return [content]


def _is_structure(content: Any) -> bool:
    return isinstance(content, dict) and (
        ("lattice" in content and "sites" in content) or _is_structure(content.get("structure"))
    ) and "@class" in content  # fmt: skip


def _rows(path: Path, rows: Iterable[Any]) -> Iterator[Record | Problem]:
    """The records of a table's rows: structures in columns, as text, as pymatgen's dicts, or in the file that
    a row names."""
    for number, row in enumerate(rows, start=1):
        if isinstance(row, Problem):
            yield row
            continue
        try:
            if not isinstance(row, dict):
                raise ValueError(f"a row is an object, not {str(row)[:40]!r}")
            yield _row(path, row)
        except ModuleNotFoundError:
            raise
        except Exception as error:
            yield Problem("unreadable record", f"{path}, row {number}: {str(error)[:200]}")


def _row(path: Path, row: dict[str, Any]) -> Record:
    """The record of one row. Raises ValueError for a row that says no structure."""
    if _is_structure(row):
        row = {"structure": row}
    inside = keys.value(row, "structure")
    file = keys.value(row, "file")
    if keys.value(row, "cell") is not None and keys.value(row, "elements") is not None:
        record = _columns(row)
    elif inside is not None:
        record = _inside(inside)
    elif file is not None:
        target = Path(str(file)) if Path(str(file)).is_absolute() else path.parent / str(file)
        if not target.exists():
            raise ValueError(f"the row names {file}, and {target} is not there")
        items = list(_named(target, target.name))
        found = [item for item in items if isinstance(item, Record)]
        if len(found) != 1 or len(items) != 1:
            problem = next((f": {i.message}" for i in items if isinstance(i, Problem)), "")
            raise ValueError(f"{file} holds {len(found)} structures, one is needed{problem}")
        record = found[0]
        record.sid = ""
    elif keys.value(row, "text") is not None:
        none = np.empty(0)  # words are all that is known
        record = Record("", np.eye(3), none.reshape(0, 3), none.astype(np.int64))
    else:
        raise ValueError(
            "the row has no structure: give columns cell, positions and symbols, or structure (CIF, POSCAR, "
            "extxyz or pymatgen's JSON), or file, or text alone; it has "
            f"{', '.join(map(str, list(row)[:12]))}"
        )
    structural = ("structure", "cell", "positions", "fractional positions", "start positions", "elements",
                  "tags")  # fmt: skip
    used = {column[0] for meaning in structural if (column := keys.find(row, meaning)) is not None}
    record.beside |= {k: v for k, v in row.items() if k not in used}
    energy = keys.find(row, "energy")
    if energy is not None:
        # in a table the plain `energy` is the one that is learned: an adsorption energy
        record.energy, record.referenced = keys.number(energy[1], energy[0]), True
        record.beside["energy column"] = energy[0]
    said = keys.value(row, "id")
    record.sid = "" if said is None else str(said)
    adsorbate = keys.value(row, "adsorbate")
    record.adsorbate = str(adsorbate) if adsorbate is not None else record.adsorbate
    return record


def _columns(row: Mapping[str, Any]) -> Record:
    cell = np.asarray(keys.value(row, "cell"), dtype=np.float64)
    if cell.shape == (6,):
        from ase.cell import Cell

        cell = np.asarray(Cell.fromcellpar(cell)[:])
    cell = cell.reshape(3, 3)
    elements = keys.value(row, "elements")
    if isinstance(elements, str):
        counted = re.findall(r"([A-Z][a-z]?)(\d*)", elements)  # Pt3O, or each atom
        elements = [symbol for symbol, count in counted for _ in range(int(count or 1))]
    numbers = [NUMBER[e] if isinstance(e, str) else int(e) for e in elements]
    positions = keys.value(row, "positions")
    if positions is None:
        frac = keys.value(row, "fractional positions")
        if frac is None:
            raise ValueError("a row with a cell needs positions or frac")
        positions = np.asarray(frac, dtype=np.float64).reshape(-1, 3) @ cell
    positions = np.asarray(positions, dtype=np.float64).reshape(-1, 3)
    tags, start = keys.value(row, "tags"), keys.value(row, "start positions")
    if len(positions) != len(numbers) or (tags is not None and len(tags) != len(numbers)):
        raise ValueError(f"{len(numbers)} elements, {len(positions)} positions, tags {tags and len(tags)}")
    return Record(
        sid="",
        lattice=cell,
        positions=positions,
        numbers=np.asarray(numbers, dtype=np.int64),
        tags=None if tags is None else np.asarray(tags).astype(np.int8),
        start=None if start is None else np.asarray(start, dtype=np.float64).reshape(-1, 3),
    )


def _inside(content: Any) -> Record:
    """The record of a structure in a cell of a table: pymatgen's dict, or text of CIF, POSCAR or extxyz."""
    import ase.io

    if isinstance(content, dict):
        return _pymatgen(content)
    text = str(content)
    if re.search(r"^\s*(data_|_cell_)", text, re.MULTILINE):
        return one_cif(text)
    first = text.lstrip().split("\n", 1)[0].strip()
    return _from_ase(ase.io.read(io.StringIO(text), format="extxyz" if first.isdigit() else "vasp", index=-1))


def _pymatgen(content: dict[str, Any]) -> Record:
    """The record of a pymatgen Structure, Slab or ComputedStructureEntry as a dict. Only these classes are
    made: a dict that names another is data, never code."""
    from pymatgen.core import Structure

    energy = None
    beside: dict[str, Any] = {}
    if "structure" in content:
        energy = content.get("energy", content.get("uncorrected_energy"))
        beside |= content.get("parameters") or {}
        beside |= content.get("data") or {}
        if content.get("entry_id") is not None:
            beside["id"] = content["entry_id"]
        content = content["structure"]
    structure: Structure = Structure.from_dict(content)
    if not structure.is_ordered:
        raise ValueError("partly occupied sites: a structure of whole atoms is needed")
    beside |= structure.properties or {}
    if "miller_index" in content:
        beside["miller_index"] = content["miller_index"]
    properties = structure.site_properties
    # AdsorbateSiteFinder says of each site what it is
    kinds = properties.get("surface_properties")
    if kinds and "adsorbate" in kinds:
        beside["adsorbate_indices"] = [i for i, kind in enumerate(kinds) if kind == "adsorbate"]
    tags = properties.get("tags")
    return Record(
        sid=str(beside.pop("id", "")),
        lattice=np.array(structure.lattice.matrix, dtype=np.float64),
        positions=np.array(structure.cart_coords, dtype=np.float64),
        numbers=np.array([site.specie.Z for site in structure], dtype=np.int64),
        tags=None if tags is None or None in tags else np.asarray(tags).astype(np.int8),
        energy=None if energy is None else float(energy),
        beside=beside,
    )


# --------------------------------------------------------------------------- CIF


def _cifs(path: Path, text: str) -> Iterator[Record | Problem]:
    """The records of a CIF: each `data_` block with atoms is one."""
    starts = [m.start() for m in re.finditer(r"^data_", text, re.MULTILINE)]
    blocks = [text[a:b] for a, b in zip(starts, [*starts[1:], len(text)])] or [text]
    held = [b for b in blocks if "_atom_site" in b] or blocks[:1]
    for block in held:
        try:
            yield one_cif(block)
        except ValueError as error:
            yield Problem("unreadable record", f"{path}: {error}")


def one_cif(text: str) -> Record:
    """The record of one CIF; adsorbate and Miller index by a `data_` line like that of `write_cif`. Raises
    ValueError, also for partly occupied sites."""
    crystal = parse_cif(text)
    require_whole_atoms(crystal)
    record = Record(
        sid="",
        lattice=np.array(crystal.lattice),
        positions=np.array(crystal.frac @ crystal.lattice),
        numbers=np.array(crystal.numbers, dtype=np.int64),
    )
    identity = header_identity(text)
    if identity is not None:
        record.adsorbate, record.miller = identity.adsorbate, identity.miller
    return record


# --------------------------------------------------------------------------- small tables


def words_of(path: Path) -> set[str]:
    """The values of a table that may name files; nothing where the table cannot be read."""
    try:
        rows = [row for row in _table(path) or () if isinstance(row, dict)]
        found = [row for row in rows if keys.value(row, "structure") is None]
        return {str(keys.value(row, "file")) for row in found} - {"None"}
    except ModuleNotFoundError:
        raise
    except Exception:  # whatever it is, reading the table's records tells it
        return set()


def has_trajectory(source: Source) -> bool:
    """Whether the records of a source may be frames of one relaxation: those of tables, databases and LMDBs
    are systems of their own."""
    path = source.paths[0]
    own = (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".db", ".aselmdb", ".lmdb", ".pkl")
    return not unpacked(path.name).lower().endswith(own) and not path.is_dir()


def name_and_energy(path: Path) -> list[tuple[str, float]] | None:
    """Names and energies of a table `name,energy` (CSV, TSV, JSON, YAML); None for a file that is none.
    Raises ValueError for a value that is no number."""
    if not path.is_file() or path.suffix not in (".csv", ".tsv", ".json", ".yaml", ".yml"):
        return None
    text = _text(path)
    if path.suffix in (".csv", ".tsv"):
        rows: list[Any] = [
            r for r in csv.reader(io.StringIO(text), delimiter="\t" if path.suffix == ".tsv" else ",") if r
        ]
        if any(len(row) != 2 for row in rows):
            return None
        try:
            float(rows[0][1])
        except (ValueError, IndexError):
            rows = rows[1:]  # its heading
    else:
        import yaml

        # as text: YAML's own types make False of the molecule NO
        content: Any = yaml.load(text, yaml.BaseLoader) if path.suffix != ".json" else json.loads(text)
        if not isinstance(content, dict) or any(isinstance(v, dict | list) for v in content.values()):
            return None
        rows = list(content.items())
    return [(str(name).strip(), keys.number(value, str(name))) for name, value in rows]
