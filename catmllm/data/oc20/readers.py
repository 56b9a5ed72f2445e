"""Records of adsorption systems from every file layout that OC20 users have.

- `*.lmdb`: IS2RE and S2EF as pickled PyG Data, before and since PyG 2.0; or ASE rows, told apart by what is
  inside
- `*.aselmdb`: fairchem's ASE rows, zlib JSON in LMDB
- `*.db`, `*.json`: ASE databases
- `*.extxyz`, `*.xyz` (also `.xz`, `.gz`): frames; beside them `NAME.txt` (`sid,frame12,reference` a frame) or
  `system.txt` (`sid,reference`)
- `*.traj`: ASE trajectories; the sid is the name, in OC20-Dense the folder and the name
- `*.pkl`: a list of PyG Data

`units` cuts files into pieces of some thousand records, `read` yields the records of a piece. What cannot be
read is yielded too, as a `Problem`, so that nothing is lost without being counted.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from catmllm.data.oc20.pickles import RefusedPickle, fields, load_pickle

if TYPE_CHECKING:
    from ase import Atoms

SUFFIXES = (".lmdb", ".aselmdb", ".db", ".json", ".extxyz", ".xyz", ".traj", ".pkl")
_COMPRESSED = (".xz", ".gz")
_LMDB_KEYS = frozenset(
    (
        *(
            "pos",
            "pos_relaxed",
            "y",
            "y_relaxed",
            "y_init",
            "energy",
            "force",
            "forces",
            "fixed",
            "sid",
            "cell",
        ),
        *("tags", "atomic_numbers", "natoms", "fid", "edge_index", "cell_offsets", "distances", "neighbors"),
        *("adsorbate", "miller_index"),
    )
)
_NOT_ROWS = frozenset((b"length", b"nextid", b"deleted_ids", b"metadata"))


@dataclass
class Record:
    """One structure as its file has it: Å, eV, the file's atom order and orientation, None for what it lacks.

    positions are those of the relaxed structure where the layout has both, then start is the other. energy is
    an adsorption energy where `referenced`, else a total one; reference is what turns the second into the
    first. fmax is the largest force (eV/Å) on an atom that is not fixed. frame counts along a relaxation.
    beside: what else the file says of it, by key.
    """

    sid: str
    lattice: NDArray[np.float64]
    positions: NDArray[np.float64]
    numbers: NDArray[np.int64]
    tags: NDArray[np.int8] | None = None
    energy: float | None = None
    referenced: bool = False
    reference: float | None = None
    frame: int = 0
    fmax: float | None = None
    adsorbate: str | None = None
    miller: tuple[int, int, int] | None = None
    start: NDArray[np.float64] | None = None
    beside: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Problem:
    """What stands in a file where a record should: a short reason to count by, and what exactly."""

    reason: str
    message: str
    sid: str = ""


@dataclass(frozen=True)
class Unit:
    """A piece of the input: files of one kind, or of one file `count` records
    from `first` (an LMDB key or a row id; None: all)."""

    paths: tuple[str, ...]
    first: str | None = None
    count: int | None = None
    size: int = field(default=0, compare=False)  # bytes, for the progress bar


# --------------------------------------------------------------------------- what to read


def find_files(sources: Iterable[str | Path]) -> list[Path]:
    """The readable files of some files and folders, sorted. Raises ValueError for a source that has none."""
    found: list[Path] = []
    for source in map(Path, sources):
        if source.is_file() or (source / "data.mdb").is_file():  # an LMDB may be a folder
            if kind(source) is None:
                raise ValueError(
                    f"{source}: is of no known kind; give files that end in {', '.join(SUFFIXES)}"
                )
            found.append(source)
        elif source.is_dir():
            # sorted as strings: the order must be the same on every run and machine
            inside = sorted(p for p in source.rglob("*") if kind(p) is not None and kind(p) != ".pkl")
            if not inside:
                raise ValueError(f"{source}: no file there ends in {', '.join(SUFFIXES[:-1])}")
            found += inside
        else:
            raise ValueError(f"{source}: does not exist")
    return list(dict.fromkeys(found))


def kind(path: Path) -> str | None:
    """The suffix by which a file is read, without `.xz` or `.gz`; None for files that are none of ours."""
    suffix = path.suffix
    if suffix in _COMPRESSED:
        suffix = Path(path.stem).suffix
        return suffix if suffix in (".extxyz", ".xyz") else None
    return suffix if suffix in SUFFIXES else None


def units(files: Iterable[Path], records: int = 4096, group: int = 256) -> Iterator[Unit | Problem]:
    """The work in pieces: LMDBs and databases by `records`, small files `group` at a time."""
    waiting: list[Path] = []

    def flush() -> Iterator[Unit]:
        for i in range(0, len(waiting), group):
            some = waiting[i : i + group]
            yield Unit(tuple(map(str, some)), size=sum(p.stat().st_size for p in some))
        waiting.clear()

    for path in files:
        size = path.stat().st_size
        # Trajectories come a system a file, hundreds of thousands of them;
        # anything larger is work enough alone.
        if kind(path) in (".extxyz", ".xyz", ".traj") and size < 4 << 20:
            if waiting and waiting[-1].parent != path.parent:
                yield from flush()
            waiting.append(path)
            continue
        yield from flush()
        try:
            starts: list[str | None] = [None]
            if kind(path) in (".lmdb", ".aselmdb"):
                starts = [*_keys(path)[::records]]
            elif kind(path) == ".db":
                starts = [*_row_ids(path)[::records]]
        except (
            Exception
        ) as error:  # lmdb and sqlite have their own; any of them means that nothing can be read
            yield Problem("unreadable file", f"{path}: {error}")
            continue
        for start in starts:
            yield Unit((str(path),), start, None if start is None else records, size // max(1, len(starts)))
    yield from flush()


def read(unit: Unit) -> Iterator[Record | Problem]:
    """The records of a unit; a file that breaks off ends in a Problem."""
    for name in unit.paths:
        path = Path(name)
        try:
            suffix = kind(path)
            if suffix in (".lmdb", ".aselmdb"):
                yield from _read_lmdb(path, unit.first, unit.count)
            elif suffix in (".db", ".json"):
                yield from _read_database(path, unit.first, unit.count)
            elif suffix in (".extxyz", ".xyz"):
                yield from _read_frames(path)
            elif suffix == ".traj":
                yield from _read_trajectory(path)
            else:
                data = load_pickle(path.read_bytes())
                for i, item in enumerate(data if isinstance(data, list) else [data]):
                    yield from _guarded(f"{path}, record {i}", lambda item=item: from_data(fields(item)))
        except RefusedPickle as error:
            yield Problem("refused pickle", f"{path}: {error}")
        except Exception as error:  # the file as a whole: each library fails in its own ways
            yield Problem("unreadable file", f"{path}: {type(error).__name__}: {error}")


def _guarded(where: str, make: Any) -> Iterator[Record | Problem]:
    """The record that `make` returns, or the Problem that it ran into."""
    try:
        yield make()
    except RefusedPickle as error:
        yield Problem("refused pickle", f"{where}: {error}")
    except KeyError as error:
        yield Problem("incomplete", f"{where}: the record lacks {error}")
    except Exception as error:
        yield Problem("unreadable record", f"{where}: {error}")


# --------------------------------------------------------------------------- LMDB


@contextlib.contextmanager
def _lmdb(path: Path) -> Iterator[Any]:
    """A cursor over an LMDB. Raises ValueError for a file that is cut short:
    reading past its end would be a fault that ends the process."""
    import lmdb

    environment = lmdb.open(
        str(path),
        subdir=path.is_dir(),
        readonly=True,
        lock=False,
        readahead=False,
        meminit=False,
        max_readers=1,
    )
    try:
        used = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
        size = (path / "data.mdb" if path.is_dir() else path).stat().st_size
        if size < used:
            raise ValueError(f"the LMDB is cut short: {size} bytes of {used}")
        with environment.begin() as transaction, transaction.cursor() as cursor:
            yield cursor
    finally:
        environment.close()


def _keys(path: Path) -> list[str]:
    with _lmdb(path) as cursor:
        return [
            bytes(k).decode("ascii")
            for k in cursor.iternext(keys=True, values=False)
            if bytes(k) not in _NOT_ROWS
        ]


def _read_lmdb(path: Path, first: str | None, count: int | None) -> Iterator[Record | Problem]:
    with _lmdb(path) as cursor:
        if not (cursor.set_range(first.encode()) if first else cursor.first()):
            return
        done = 0
        for key, value in cursor.iternext():
            key = bytes(key)
            if key in _NOT_ROWS:
                continue
            if done == count:
                return
            done += 1
            data, name = bytes(value), f"{path.stem}/{key.decode()}"
            yield from _guarded(
                f"{path}, key {key.decode()}", lambda data=data, name=name: _from_value(data, name)
            )


def _from_value(data: bytes, name: str) -> Record:
    """A row of an LMDB: ASE rows are zlib streams, everything else of OC20 is a pickle. name: the sid of a
    row that says none."""
    if data[:1] == b"\x78":
        return from_row(_ase_row(json.loads(zlib.decompress(data))), name)
    return from_data(fields(load_pickle(data)), name)


def from_data(data: dict[str, Any], name: str = "") -> Record:
    """The record of a PyG Data as `pickles.fields` gives it; name: its sid where it says none.
    Raises KeyError for what must be there, ValueError."""
    relaxed = "pos_relaxed" in data or "y_relaxed" in data
    positions = _array(data["pos_relaxed"] if relaxed else data["pos"], 3)
    # fairchem's own preprocessing writes `energy` since June 2024, `y` before
    energy = data.get("y_relaxed" if relaxed else "y", data.get("energy"))
    fmax = None
    # IS2RE records carry the forces of the initial structure, which say nothing of the relaxed one
    forces = None if relaxed else data.get("force", data.get("forces"))
    if forces is not None:
        free = np.asarray(data.get("fixed", np.zeros(len(positions)))).reshape(-1) == 0
        fmax = _largest(_array(forces, 3)[free])
    name = _sid(data["sid"]) if not name or data.get("sid") is not None else name
    if "oc22" in data or "nads" in data:
        name = f"oc22-{data['sid']}"
    return Record(
        sid=name,
        lattice=_array(data["cell"], 3),
        positions=positions,
        numbers=np.asarray(data["atomic_numbers"]).reshape(-1).astype(np.int64),
        tags=None if data.get("tags") is None else np.asarray(data["tags"]).reshape(-1).astype(np.int8),
        energy=None if energy is None else _number(energy),
        # OC22 publishes total energies alone
        referenced=not ("oc22" in data or "nads" in data),
        frame=int(_number(data.get("fid", 0))),
        fmax=fmax,
        start=_array(data["pos"], 3) if "pos_relaxed" in data and data.get("pos") is not None else None,
        beside={k: v for k, v in data.items() if k not in _LMDB_KEYS and np.size(v) < 1000},
        **_said(data),
    )


# --------------------------------------------------------------------------- ASE databases


def _ase_row(row: dict[str, Any]) -> dict[str, Any]:
    """ASE's JSON arrays (`{"__ndarray__": [shape, dtype, values]}`) as arrays."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            if "__ndarray__" in value:
                shape, dtype, flat = value["__ndarray__"]
                return np.array(flat, dtype=dtype).reshape(shape)
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, list) else value

    found = plain(row)
    if not isinstance(found, dict):
        raise ValueError(f"the row is a {type(found).__name__}, not a mapping")
    return found


def _row_ids(path: Path) -> list[str]:
    from ase.db import connect

    return [str(row.id) for row in connect(str(path), use_lock_file=False).select(columns=["id"], sort="id")]


def _read_database(path: Path, first: str | None, count: int | None) -> Iterator[Record | Problem]:
    from ase.db import connect

    database = connect(str(path), use_lock_file=False)
    chosen = f"id>={first}" if first else None
    for row in database.select(chosen, sort="id", limit=count):

        def make(row: Any = row) -> Record:
            plain = dict(row.__dict__) | {"key_value_pairs": row.key_value_pairs, "data": row.data}
            return from_row(plain | {"constraints": row.get("constraints", [])}, f"{path.stem}/{row.id}")

        yield from _guarded(f"{path}, id {row.id}", make)


def from_row(row: dict[str, Any], name: str) -> Record:
    """The record of an ASE row; what ASE has no place for is looked for in its key-value pairs and its data.
    name: the sid of a row that says none."""
    beside: dict[str, Any] = {}
    for part in (row.get("data"), row.get("info"), row.get("key_value_pairs")):
        if isinstance(part, dict):
            beside |= part | (part["info"] if isinstance(part.get("info"), dict) else {})
    positions = _array(row["positions"], 3)
    energy, referenced = row.get("energy"), False
    for key in ("adsorption_energy", "y_relaxed"):
        if beside.get(key) is not None:
            energy, referenced = beside[key], True
    fixed = _fixed(row.get("constraints") or (), len(positions))
    sid = beside.get("sid", beside.get("system_id"))
    return Record(
        sid=name if sid is None else _sid(sid),
        lattice=_array(row["cell"], 3),
        positions=positions,
        numbers=np.asarray(row["numbers"], dtype=np.int64),
        tags=None if row.get("tags") is None else np.asarray(row["tags"]).astype(np.int8),
        energy=None if energy is None else _number(energy),
        referenced=referenced,
        reference=_optional(beside, "reference_energy", "ref_energy"),
        frame=int(_number(beside.get("fid", beside.get("frame_number", 0)))),
        fmax=None if row.get("forces") is None else _largest(_array(row["forces"], 3)[~fixed]),
        beside=beside,
        **_said(beside),
    )


def _fixed(constraints: Iterable[Any], n: int) -> NDArray[np.bool_]:
    """bool [n]: the atoms that ASE constraints, as objects or as dicts, hold in place."""
    fixed = np.zeros(n, dtype=np.bool_)
    for constraint in constraints:
        plain = constraint if isinstance(constraint, dict) else constraint.todict()
        if plain["name"] == "FixAtoms":
            fixed[np.asarray(plain["kwargs"]["indices"], dtype=np.int64)] = True
    return fixed


# --------------------------------------------------------------------------- frames and trajectories


def _read_frames(path: Path) -> Iterator[Record | Problem]:
    """Of each system in a file of frames the last one; only that one is parsed, each other is a Problem."""
    index = _frame_index(path)
    last: dict[str, tuple[int, str, float | None]] = {}
    broken = None
    try:
        for number, text in enumerate(_frame_texts(path)):
            sid, frame, reference = index(number, text)
            before = last.get(sid)
            if before is not None:
                yield Problem("earlier frame", f"{path}, {sid} frame {min(before[0], frame)}")
            if before is None or frame >= before[0]:
                last[sid] = frame, text, reference
    except (ValueError, EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        broken = Problem("unreadable file", f"{path}: {error}")
    if broken is not None and not index.own:
        # a trajectory that breaks off has lost its last frame, the only one that counts
        yield broken
        return
    for sid, (frame, text, reference) in last.items():

        def make(
            sid: str = sid, frame: int = frame, text: str = text, reference: float | None = reference
        ) -> Record:
            from ase.io.extxyz import read_xyz

            record = from_atoms(next(iter(read_xyz(io.StringIO(text), 0))), sid, frame)
            record.reference = reference if reference is not None else record.reference
            return record

        yield from _guarded(f"{path}, {sid} frame {frame}", make)
    if broken is not None:
        yield broken


def _opened(path: Path) -> Any:
    if path.suffix == ".xz":
        return lzma.open(path, "rt", encoding="utf-8")
    return gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8")


def _frame_texts(path: Path) -> Iterator[str]:
    """The text of each frame. Raises ValueError where a frame does not
    begin with its number of atoms or ends early."""
    with _opened(path) as lines:
        for line in lines:
            if not line.strip():
                continue
            if not line.strip().isdigit():
                raise ValueError(
                    f"a frame begins with the number of its atoms, not with {line.strip()[:40]!r}"
                )
            rest = [lines.readline() for _ in range(int(line) + 1)]
            if not rest[-1].endswith("\n") and not rest[-1].strip():
                raise ValueError("the last frame is cut short")
            yield line + "".join(rest)


@dataclass
class _Index:
    """Sid, frame number and reference energy of the n-th frame of a file."""

    lines: list[tuple[str, int, float]]  # of the file's own index, where it has one
    references: dict[str, float]  # by sid
    name: str  # of the file, the sid where nothing else says it
    elements: list[str] = field(default_factory=list)  # of the frame before that had no sid
    first: int = 0  # the frame with which these elements began

    @property
    def own(self) -> bool:
        return bool(self.lines)

    def __call__(self, number: int, text: str) -> tuple[str, int, float | None]:
        if self.lines:
            if number >= len(self.lines):
                raise ValueError(f"the text index ends at frame {len(self.lines)}, the file goes on")
            return self.lines[number]
        comment = text.split("\n", 2)[1]
        found = re.search(r'\b(?:sid|system_id)=(?:"([^"]+)"|([^\s"]+))', comment)
        if found:
            sid = _sid(found[1] or found[2])
            return sid, number, self.references.get(sid)
        # frames that say nothing are one relaxation, but those of other elements are another system
        elements = [line.split(None, 1)[0] for line in text.split("\n")[2:] if line.strip()]
        if self.elements and elements != self.elements:
            self.first = number
        self.elements = elements
        sid = f"{self.name}#{self.first}" if self.first else self.name
        return sid, number, self.references.get(sid)


def _frame_index(path: Path) -> _Index:
    """The text index beside a file: `NAME.txt` a line a frame, else `system.txt` a line a system."""
    stem = Path(path.stem).stem if path.suffix in _COMPRESSED else path.stem
    for name in (f"{stem}.txt", f"{stem}.txt.xz", f"{stem}.txt.gz"):
        own = path.with_name(name)
        if own.is_file():
            with _opened(own) as lines:
                rows = [line.strip().split(",") for line in lines if line.strip()]
            if any(len(row) != 3 or not re.fullmatch(r"(frame)?\d+", row[1]) for row in rows):
                raise ValueError(f"{own.name} is no index: a line is `random12,frame3,-45.6`")
            return _Index([(_sid(s), int(f.removeprefix("frame")), float(e)) for s, f, e in rows], {}, stem)
    references: dict[str, float] = {}
    for folder in (path.parent, path.parent.parent):
        if (folder / "system.txt").is_file():
            references = _references(str(folder / "system.txt"), (folder / "system.txt").stat().st_mtime_ns)
            break
    return _Index([], references, _own_name(path, stem))


def _own_name(path: Path, stem: str) -> str:
    """The sid by a file's name: `random12`, else with its folder, as calculations often lie one a folder
    under equal names."""
    return stem if re.fullmatch(r"random\d+", stem) else f"{path.parent.name}/{stem}"


_KEPT: dict[tuple[str, int], dict[str, float]] = {}


def _references(path: str, changed: int) -> dict[str, float]:
    """The reference energies of a system.txt, kept: every trajectory of its folder asks for them."""
    if (path, changed) not in _KEPT:
        rows = [
            line.split(",") for line in Path(path).read_text(encoding="utf-8").split("\n") if line.strip()
        ]
        _KEPT.clear()
        _KEPT[path, changed] = {_sid(row[0]): float(row[1]) for row in rows}
    return _KEPT[path, changed]


def _read_trajectory(path: Path) -> Iterator[Record | Problem]:
    from ase.io.trajectory import Trajectory

    index = _frame_index(path)
    with Trajectory(str(path)) as frames:
        sid = _own_name(path, path.stem)  # OC20-Dense: <system>/<configuration>.traj
        record = from_atoms(frames[-1], sid, len(frames) - 1)
        record.reference = index.references.get(sid, record.reference)
        yield record


def from_atoms(atoms: Atoms, sid: str, frame: int) -> Record:
    """The record of an ase.Atoms with a calculator's results."""
    results = dict(atoms.calc.results) if atoms.calc is not None else {}
    fixed = _fixed(atoms.constraints, len(atoms))
    forces = results.get("forces")
    referenced = atoms.info.get("adsorption_energy") is not None
    energy = (
        atoms.info["adsorption_energy"] if referenced else results.get("energy", atoms.info.get("energy"))
    )
    return Record(
        sid=sid,
        lattice=np.array(atoms.cell[:], dtype=np.float64),
        positions=np.array(atoms.positions, dtype=np.float64),
        numbers=np.array(atoms.numbers, dtype=np.int64),
        tags=atoms.get_tags().astype(np.int8) if atoms.has("tags") else None,
        energy=None if energy is None else _number(energy),
        referenced=referenced,
        reference=_optional(atoms.info, "reference_energy", "ref_energy"),
        frame=frame,
        fmax=None if forces is None else _largest(_array(forces, 3)[~fixed]),
        beside=dict(atoms.info),
        **_said(atoms.info),
    )


# --------------------------------------------------------------------------- values


def _sid(value: Any) -> str:
    """`random123` of 123, "123" and "random123"; other names as they are."""
    text = str(value.reshape(-1)[0]) if isinstance(value, np.ndarray) and value.size == 1 else str(value)
    return f"random{text}" if text.isdigit() else text


def _number(value: Any) -> float:
    """One number of a scalar, a list or an array of one."""
    return float(np.asarray(value, dtype=np.float64).reshape(-1)[0])


def _array(value: Any, width: int) -> NDArray[np.float64]:
    return np.asarray(value, dtype=np.float64).reshape(-1, width)


def _largest(forces: NDArray[np.float64]) -> float:
    return float(np.sqrt((forces**2).sum(axis=1).max(initial=0.0)))


def _optional(beside: dict[str, Any], *keys: str) -> float | None:
    return next((_number(beside[key]) for key in keys if beside.get(key) is not None), None)


def _said(beside: dict[str, Any]) -> dict[str, Any]:
    """Adsorbate and Miller index where a row says them."""
    adsorbate = next(
        (beside[k] for k in ("adsorbate", "ads_symbols") if isinstance(beside.get(k), str)), None
    )
    miller = next(
        (beside[k] for k in ("miller_index", "millers", "miller_idx", "miller") if k in beside), None
    )
    if isinstance(miller, str):
        miller = [int(i) for i in re.findall(r"-?\d+", miller)]
    said: dict[str, Any] = {"adsorbate": adsorbate}
    if miller is not None and len(miller) == 3:
        said["miller"] = tuple(int(i) for i in miller)
    return said
