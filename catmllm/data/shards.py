"""Adsorption systems on disk: memory-mapped shards that any number of processes read at once.

    DIR/shard-00000.safetensors ...  systems as they were read, a batch a file
    DIR/index.safetensors            which of them the dataset holds, in its order
    DIR/dataset.json                 where they are from, what was left out and why

    systems = Shards("DIR")          # a Sequence[System]: len, [i], [-1], [10:20], [an index array]
    parts = systems.split(seed=0)    # {"train": Shards, "val": Shards, "test": Shards}

Opening reads nothing but headers, `[i]` copies one system out of the page cache (about 10 µs), and a Shards
pickles as its path and its rows, so each worker maps the files for itself. Arrays over all systems, in order
and without touching a structure: `n_atoms`, `energies`, `pairs`, `sources`. Neighbour graphs are not stored:
they depend on cutoff and noise.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from catmllm.data.slabs import SplitName, pair_of, split_pairs
from catmllm.structure.formula import SEPARATOR, text_identity
from catmllm.structure.system import System
from catmllm.structure.text import three_part_text

INDEX, FACTS = "index.safetensors", "dataset.json"
VERSION = 1
Arrays = dict[str, NDArray[Any]]


class Shards(Sequence[System]):
    """The systems of a folder written by `catmllm data oc20` or `write_shards`, or some of them (`rows`).

    n_atoms int32 [n], energies float64 [n] (eV), sources int8 [n] (position in `source_names`), pairs int32
    [n] (position in `pair_names`, each `bulk (h, k, l)`, by which the split is made). Raises ValueError for a
    folder that holds no finished dataset.
    """

    def __init__(self, folder: str | Path, rows: NDArray[np.int64] | None = None) -> None:
        self.folder = Path(folder)
        self._rows = rows
        self._maps: dict[int, Arrays] = {}
        try:
            facts = json.loads((self.folder / FACTS).read_text(encoding="utf-8"))
            index = map_arrays(self.folder / INDEX)
        except FileNotFoundError as error:
            raise ValueError(
                f"{self.folder} is no dataset: it lacks {Path(error.filename).name}; `catmllm data oc20 ... "
                f"--out {self.folder}` makes one, and goes on where it was stopped"
            ) from None
        if facts.get("version") != VERSION:
            raise ValueError(
                f"{self.folder} is of version {facts.get('version')}, this program reads version {VERSION}; "
                "make it anew with `catmllm data oc20`"
            )
        self.facts: dict[str, Any] = facts
        self.source_names: list[str] = facts["sources"]
        self._pair_names = index["pair_names"]
        self._index = index if rows is None else {k: index[k][rows] for k in _INDEX_COLUMNS}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.folder, self._rows)

    def __repr__(self) -> str:
        return f"Shards({str(self.folder)!r}, {len(self)} systems)"

    def __len__(self) -> int:
        return len(self._index["row"])

    @property
    def n_atoms(self) -> NDArray[np.int32]:
        return self._index["n_atoms"]

    @property
    def energies(self) -> NDArray[np.float64]:
        return self._index["energy"]

    @property
    def sources(self) -> NDArray[np.int8]:
        return self._index["source"]

    @property
    def pairs(self) -> NDArray[np.int32]:
        return self._index["pair"]

    @property
    def pair_names(self) -> list[str]:
        return bytes(self._pair_names).decode().split("\n")

    @overload
    def __getitem__(self, index: int) -> System: ...
    @overload
    def __getitem__(self, index: slice | NDArray[np.int64]) -> Shards: ...
    def __getitem__(self, index: int | slice | NDArray[np.int64]) -> System | Shards:
        if isinstance(index, slice | np.ndarray):
            rows = np.arange(len(self)) if self._rows is None else self._rows
            return Shards(self.folder, rows[index])
        shard, row = self._place(index)
        a, b = shard["first_atom"][row : row + 2]
        energy = float(shard["energy"][row])
        text = _words(shard, "text", row)
        return System(
            lattice=np.array(shard["lattice"][row]),
            frac=np.array(shard["frac"][a:b]),
            numbers=shard["numbers"][a:b].astype(np.int64),
            tags=shard["tags"][a:b].astype(np.int8),
            adsorbate=text_identity(text).adsorbate if a == b else text.partition(SEPARATOR)[0],
            miller=tuple(shard["miller"][row].tolist()) if shard["miller"][row].any() else None,
            energy=energy,
            sid=_words(shard, "sid", row),
            start=_start(shard, a, b),
            text=text if a == b else None,
        )

    def __iter__(self) -> Iterator[System]:
        return (self[i] for i in range(len(self)))

    def text(self, index: int) -> str:
        """The three-part text of a system, as `three_part_text` makes it."""
        shard, row = self._place(index)
        return _words(shard, "text", row)

    def sid(self, index: int) -> str:
        shard, row = self._place(index)
        return _words(shard, "sid", row)

    def group(self, index: int) -> str:
        """The value of the column that a split may go by; empty where none was given."""
        shard, row = self._place(index)
        return _words(shard, "group", row) if "group" in shard else ""

    def split(self, seed: int = 0) -> dict[SplitName, Shards]:
        """About 80 / 10 / 10 % as train / val / test, whole (bulk, Miller index) pairs at a time, as
        `slabs.split`; inside a part the order of the dataset is kept."""
        names = self.pair_names
        used, position = np.unique(self.pairs, return_inverse=True)
        counts = np.bincount(position, minlength=len(used))
        part_of = split_pairs({names[pair]: int(n) for pair, n in zip(used, counts)}, seed)
        part = np.array([_PARTS.index(part_of[names[pair]]) for pair in used], dtype=np.int8)[position]
        return {name: self[np.flatnonzero(part == k)] for k, name in enumerate(_PARTS)}

    def _place(self, index: int) -> tuple[Arrays, int]:
        """The arrays of the shard that holds a system, and its row there."""
        i = index + len(self) if index < 0 else index
        if not 0 <= i < len(self):
            raise IndexError(f"system {index} of {len(self)}")
        number = int(self._index["shard"][i])
        shard = self._maps.get(number)
        if shard is None:
            shard = self._maps[number] = map_arrays(self.folder / shard_name(number))
        return shard, int(self._index["row"][i])


_PARTS: tuple[SplitName, ...] = ("train", "val", "test")
_INDEX_COLUMNS = ("shard", "row", "n_atoms", "energy", "pair", "source")


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def _start(shard: Arrays, first: int, end: int) -> NDArray[np.float64] | None:
    """Where a system's atoms stood before the relaxation, if its shard says so."""
    start = shard["start"][first:end] if "start" in shard and end > first else None
    return None if start is None or np.isnan(start[:1]).any() else np.array(start)


def _words(shard: Arrays, name: str, row: int) -> str:
    a, b = shard[f"{name}_start"][row : row + 2]
    return shard[name][a:b].tobytes().decode()


# --------------------------------------------------------------------------- writing


class Entry(NamedTuple):
    """A system on its way into a shard; frame orders the records of one sid, of which the last is kept."""

    system: System
    frame: int = 0
    text: str | None = None  # three-part text, where it is known already
    source: int = 0  # position in the names of the sources
    surface: str = ""  # names adsorbate and surface, by which two sources may not overlap
    group: str = ""  # what `data.split_by: column` goes by


def write_shard(path: Path, entries: Sequence[Entry], facts: dict[str, Any] | None = None) -> None:
    """Write systems as one shard, whole or not at all: a killed writer leaves nothing under this name.

    Every system needs an energy (ValueError). `facts` (JSON) go into the header.
    """
    systems = [e.system for e in entries]
    counts = [len(s) for s in systems]
    texts = [e.text if e.text is not None else three_part_text(e.system) for e in entries]
    arrays: Arrays = {
        "lattice": np.array([s.lattice for s in systems], dtype=np.float64).reshape(-1, 3, 3),
        "frac": _joined([s.frac for s in systems], np.float64, (3,)),
        "start": _joined(
            [np.full_like(s.frac, np.nan) if s.start is None else s.start for s in systems], np.float64, (3,)
        ),
        "source": np.array([e.source for e in entries], dtype=np.int8),
        "sid_key": _keys([s.sid for s in systems]),
        "surface_key": _keys([e.surface for e in entries]),
        "energy": np.array([s.known_energy for s in systems], dtype=np.float64),
        "first_atom": _starts(counts),
        "frame": np.array([e.frame for e in entries], dtype=np.int64),
        # (0 0 0) is no plane: an unknown one
        "miller": np.array([s.miller or (0, 0, 0) for s in systems], dtype=np.int16).reshape(-1, 3),
        "numbers": _joined([s.numbers for s in systems], np.uint8),
        "tags": _joined([s.tags for s in systems], np.uint8),
    }
    for name, words in (
        ("sid", [s.sid for s in systems]),
        ("text", texts),
        ("group", [e.group for e in entries]),
    ):
        encoded = [w.encode() for w in words]
        arrays[name] = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        arrays[f"{name}_start"] = _starts([len(w) for w in encoded])
    write_arrays(path, arrays, facts)


def write_index(
    folder: Path,
    order: Sequence[tuple[int, NDArray[np.int64]]],
    sources: Sequence[str],
    facts: dict[str, Any] | None = None,
) -> None:
    """Finish a dataset: for each shard in `order` the rows that it contributes, in this order; `sources`
    names where systems are from. `facts` go into dataset.json."""
    columns: dict[str, list[NDArray[Any]]] = {name: [] for name in _INDEX_COLUMNS}
    pair_names: dict[str, int] = {}
    for number, rows in order:
        shard = map_arrays(folder / shard_name(number))
        pairs = [pair_name(_words(shard, "text", row)) for row in rows.tolist()]
        columns["shard"].append(np.full(len(rows), number, np.int32))
        columns["row"].append(rows.astype(np.int32))
        columns["n_atoms"].append(np.diff(shard["first_atom"])[rows].astype(np.int32))
        columns["energy"].append(shard["energy"][rows])
        columns["pair"].append(np.array([pair_names.setdefault(p, len(pair_names)) for p in pairs], np.int32))
        columns["source"].append(shard["source"][rows])
    dtypes = dict.fromkeys(_INDEX_COLUMNS, np.int32) | {"energy": np.float64, "source": np.int8}
    arrays: Arrays = {k: _joined(v, dtypes[k]) for k, v in columns.items()}
    arrays["pair_names"] = np.frombuffer("\n".join(pair_names).encode(), dtype=np.uint8)
    write_arrays(folder / INDEX, arrays)
    text = json.dumps({"version": VERSION, "sources": list(sources), **(facts or {})}, indent=1)
    temporary = folder / f".{FACTS}.{os.getpid()}"
    temporary.write_text(text, encoding="utf-8")
    temporary.rename(folder / FACTS)  # last: a dataset with it is whole


def write_shards(
    folder: str | Path,
    systems: Iterable[System],
    shard_size: int = 4096,
    groups: Sequence[str] | None = None,
    source: str = "systems",
    facts: dict[str, Any] | None = None,
) -> Shards:
    """A dataset of systems at hand, in their order; each needs an energy. groups: of each system what
    `data.split_by: column` goes by; source: where all are from; facts: for dataset.json."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    every = list(systems)
    named = [""] * len(every) if groups is None else groups
    order = []
    for number, first in enumerate(range(0, len(every), shard_size)):
        some = slice(first, first + shard_size)
        entries = [Entry(s, group=g) for s, g in zip(every[some], named[some], strict=True)]
        write_shard(folder / shard_name(number), entries)
        order.append((number, np.arange(len(entries))))
    write_index(folder, order, [source], facts)
    return Shards(folder)


def pair_name(text: str) -> str:
    """`PdIr (1, 1, 1)`, by which systems are split, of a three-part text, however it writes the composition;
    of another text itself."""
    try:
        return pair_of(text)
    except ValueError:
        return f"{' '.join(text.split())} (?)"


def _keys(texts: Sequence[str]) -> NDArray[np.int64]:
    """int64 [n] by which equal texts are found without keeping them."""
    digests = [hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts]
    return np.frombuffer(b"".join(digests), dtype=np.int64)


def _starts(lengths: Sequence[int]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(np.asarray(lengths, dtype=np.int64))]).astype(np.int64)


def _joined(parts: Sequence[NDArray[Any]], dtype: Any, shape: tuple[int, ...] = ()) -> NDArray[Any]:
    return np.concatenate([np.empty((0, *shape), dtype), *parts]).astype(dtype)


# --------------------------------------------------------------------------- files


def write_arrays(path: Path, arrays: Arrays, facts: dict[str, Any] | None = None) -> None:
    """Arrays as one safetensors file, written beside and renamed, `facts` as JSON in its header."""
    from safetensors.numpy import save_file

    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(arrays, temporary, metadata={"facts": json.dumps(facts or {})})
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    temporary.rename(path)


def map_arrays(path: Path) -> Arrays:
    """The arrays of a safetensors file, mapped read-only. Raises FileNotFoundError,
    ValueError for a damaged file."""
    header, begin, size = _header(path)
    data = np.memmap(path, dtype=np.uint8, mode="r")[begin:] if size > begin else np.empty(0, np.uint8)
    arrays: Arrays = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        a, b = entry["data_offsets"]
        if b > len(data):
            raise ValueError(f"{path} is cut short: {name} ends at byte {begin + b} of {size}")
        # a plain array over the map: numpy.memmap's own slices cost 3 µs each
        view = np.asarray(data[a:b]).view(_DTYPES[entry["dtype"]])
        arrays[name] = view.reshape(entry["shape"])
    return arrays


def read_facts(path: Path) -> dict[str, Any]:
    """What `write_shard` was given as `facts`."""
    found: dict[str, Any] = json.loads(_header(path)[0]["__metadata__"]["facts"])
    return found


_DTYPES = {"F64": "<f8", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1"}


def _header(path: Path) -> tuple[dict[str, Any], int, int]:
    """The header of a safetensors file, where its data begins, and the size of the file."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if 8 + length > size:
            raise ValueError(f"{path} is no safetensors file, or cut short at {size} bytes")
        return json.loads(file.read(length)), 8 + length, size
