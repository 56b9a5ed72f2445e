"""What OC20's mappings say of a record: adsorbate, Miller index, surface, anomaly,
target and reference energy, tags.

`oc20_data_mapping.pkl` is a dict of 640,000 dicts, a gigabyte as Python objects: `build` reads it once and
writes a table of 50 MB, which every worker maps. The kind of a mapping is told by its content:

- `oc20_data_mapping.pkl`, OC22's `oc22_metadata.pkl`:
  sid -> {ads_symbols, bulk_symbols, miller_index, bulk_mpid, shift, top, anomaly}
- `oc20dense_mapping.pkl`: sid -> {system_id, config_id, adsorbate, mpid, miller_idx, shift, top}
- `oc20dense_targets.pkl`: system_id -> [(config_id, adsorption energy), ...]
- `oc20dense_ref_energies.pkl`, `oc20_ref.pkl`: system_id or sid -> reference energy
- `oc20dense_tags.pkl`: system_id -> tags of its atoms
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from catmllm.data.oc20.pickles import load_pickle
from catmllm.data.shards import map_arrays, write_arrays

ANOMALIES = {1: "dissociated", 2: "desorbed", 3: "reconstructed", 4: "misplaced adsorbate"}
DENSE_KEY = "dense:"  # before the sids of OC20-Dense, which numbers its configurations anew


@dataclass(frozen=True)
class Facts:
    """What is known of a sid beside its structure. surface names bulk, Miller index, shift and side;
    target and reference are energies in eV."""

    sid: str
    adsorbate: str  # empty where unknown
    miller: tuple[int, int, int] | None
    surface: str
    anomaly: int = 0
    elements: frozenset[str] = frozenset()  # of the bulk, empty where unknown
    target: float | None = None
    reference: float | None = None
    tags: NDArray[np.int8] | None = None


class Metadata:
    """A table made by `build`, mapped. `find` is a binary search among its sids."""

    def __init__(self, path: str | Path) -> None:
        arrays = map_arrays(Path(path))
        self._arrays = arrays
        self._keys = arrays["keys"].view(f"S{arrays['keys'].shape[1]}").reshape(-1)
        self.has_targets = bool(np.isfinite(arrays["target"]).any())

    def __len__(self) -> int:
        return len(self._keys)

    def _word(self, column: str, at: int) -> str:
        first, last = self._arrays["words_start"][self._arrays[column][at] :][:2]
        return self._arrays["words"][first:last].tobytes().decode()

    def find(self, sid: str) -> Facts | None:
        """The facts of a record by its sid (`random12`), by `DENSE_KEY` and OC20-Dense's number or
        `system/configuration`; None where it is not there."""
        key = sid.encode()
        at = int(np.searchsorted(self._keys, key)) if len(key) <= self._keys.itemsize else len(self._keys)
        if at == len(self._keys) or self._keys[at] != key:
            return None
        target, reference = (float(self._arrays[k][at]) for k in ("target", "reference"))
        h, k, l = (int(i) for i in self._arrays["miller"][at])
        first, last = self._arrays["tags_start"][at], self._arrays["tags_end"][at]
        return Facts(
            sid=self._word("name", at),
            adsorbate=self._word("adsorbate", at),
            miller=(h, k, l) if h or k or l else None,
            surface=self._word("surface", at),
            anomaly=int(self._arrays["anomaly"][at]),
            elements=frozenset(re.findall("[A-Z][a-z]?", self._word("bulk", at))),
            target=None if np.isnan(target) else target,
            reference=None if np.isnan(reference) else reference,
            tags=np.array(self._arrays["tags"][first:last]).astype(np.int8) if last > first else None,
        )


def build(files: Sequence[str | Path], path: Path) -> int:
    """Read mappings and write the table of all of them; returns the number of sids. Raises ValueError for a
    pickle that is no mapping of OC20, naming the file and what it holds."""
    rows: dict[str, dict[str, Any]] = {}
    targets: dict[tuple[str, str], float] = {}
    references: dict[str, float] = {}
    tags: dict[str, NDArray[np.int8]] = {}
    for file in files:
        try:
            content = load_pickle(Path(file).read_bytes())
            _take(content, rows, targets, references, tags)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{file}: no mapping of OC20: {error}") from error
    for key, row in rows.items():
        system = row.get("system", key)
        if (wanted := (system, row.get("configuration", ""))) in targets:
            row["target"] = targets[wanted]
        row["reference"] = references.get(system, references.get(key, np.nan))
        row["tags"] = tags.get(system)
    if not rows:  # reference energies alone, for files that say all the rest themselves
        unknown = (0, 0, 0)
        rows = {key: _row(key, "", unknown, "", "") | {"reference": e} for key, e in references.items()}
    _write(rows, path)
    return len(rows)


def _take(
    content: Any,
    rows: dict[str, dict[str, Any]],
    targets: dict[tuple[str, str], float],
    references: dict[str, float],
    tags: dict[str, NDArray[np.int8]],
) -> None:
    """Sort one mapping into what it is."""
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"a mapping is a dict with entries, not a {type(content).__name__}")
    example = next(iter(content.values()))
    if isinstance(example, Mapping) and "ads_symbols" in example:
        for sid, entry in content.items():
            key = _key(sid) if str(sid).startswith("random") else f"oc22-{sid}"
            miller = entry["miller_index"]
            surface = _surface(entry.get("bulk_mpid"), miller, entry.get("shift"), entry.get("top"))
            row = _row(key, entry["ads_symbols"], miller, surface, entry.get("bulk_symbols") or "")
            rows[key] = row | {"anomaly": int(entry.get("anomaly") or 0)}
    elif isinstance(example, Mapping) and "system_id" in example:
        for sid, entry in content.items():
            system, configuration = str(entry["system_id"]), str(entry["config_id"])
            surface = _surface(entry["mpid"], entry["miller_idx"], entry.get("shift"), entry.get("top"))
            name = f"{system}/{configuration}"
            row = _row(name, entry["adsorbate"], entry["miller_idx"], surface, "")
            row |= {"system": system, "configuration": configuration}
            # the LMDBs know a configuration by its number, the trajectories by its names:
            # system/configuration or, as they are downloaded, system/system_configuration
            for key in (_key(sid), name, f"{system}/{system}_{configuration}"):
                rows[DENSE_KEY + key] = row
    elif isinstance(example, list | tuple) and example and isinstance(example[0], list | tuple):
        for system, entries in content.items():
            targets |= {(str(system), str(c)): float(energy) for c, energy, *_ in entries}
    elif isinstance(example, list | tuple | np.ndarray):
        tags |= {str(system): np.asarray(values).astype(np.int8) for system, values in content.items()}
    elif isinstance(example, int | float | np.number) and not isinstance(example, bool):
        references |= {_key(sid): float(value) for sid, value in content.items()}
    else:
        raise ValueError(f"its entries are {type(example).__name__} {str(example)[:60]!r}")


def _row(name: str, adsorbate: str, miller: Sequence[int], surface: str, bulk: str) -> dict[str, Any]:
    h, k, l = (int(i) for i in miller)
    return {
        "name": name,
        "adsorbate": str(adsorbate).replace("*", ""),
        "miller": (h, k, l),
        "surface": surface,
        "bulk": str(bulk),
    }


def _key(sid: Any) -> str:
    return f"random{sid}" if str(sid).isdigit() else str(sid)


def _surface(bulk: Any, miller: Sequence[int], shift: Any, top: Any) -> str:
    if bulk is None or shift is None:
        return ""
    return f"{bulk} {tuple(int(i) for i in miller)} {float(shift):.3f} {bool(top)}"


def _write(rows: dict[str, dict[str, Any]], path: Path) -> None:
    keys = sorted(rows, key=str.encode)
    words: dict[str, int] = {"": 0}

    def word(text: str) -> int:
        return words.setdefault(text, len(words))

    width = max((len(k.encode()) for k in keys), default=1)
    tagged = [rows[k].get("tags") for k in keys]
    ends = np.cumsum([0 if t is None else len(t) for t in tagged], dtype=np.int64)
    counts = np.diff(ends, prepend=0)
    arrays: dict[str, NDArray[Any]] = {
        "keys": np.array([k.encode() for k in keys], dtype=f"S{width}").view(np.uint8).reshape(-1, width),
        "miller": np.array([rows[k]["miller"] for k in keys], dtype=np.int16).reshape(-1, 3),
        "anomaly": np.array([rows[k].get("anomaly", 0) for k in keys], dtype=np.int8),
        "target": np.array([rows[k].get("target", np.nan) for k in keys], dtype=np.float64),
        "reference": np.array([rows[k].get("reference", np.nan) for k in keys], dtype=np.float64),
        "tags": np.concatenate([np.empty(0, np.int8), *(t for t in tagged if t is not None)]).astype(np.int8),
        "tags_start": ends - counts,
        "tags_end": ends,
    }
    for column in ("name", "adsorbate", "surface", "bulk"):
        arrays[column] = np.array([word(rows[k][column]) for k in keys], dtype=np.int32)
    encoded = [text.encode() for text in words]
    arrays["words"] = np.frombuffer(b"".join(encoded), dtype=np.uint8)
    arrays["words_start"] = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
    write_arrays(path, arrays)
