"""From files to a dataset: records filtered into systems, all files in parallel, any kill survived.

    catmllm data oc20 is2re/ --mapping oc20_data_mapping.pkl \\
        --dense dense/ --mapping oc20dense_mapping.pkl --out DIR

The input is cut into pieces (`readers.units`), each becomes one shard, written whole or not at all, with the
count of what was dropped and why in its header. A run that finds a shard does not make it again. When all are
there, the index is made: of a system read twice the last frame counts, and OC20-Dense gives way where it
overlaps with OC20.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from catmllm.data.make import exit_with_parent
from catmllm.data.oc20 import metadata, readers
from catmllm.data.oc20.metadata import ANOMALIES, DENSE_KEY, Facts, Metadata
from catmllm.data.oc20.readers import Problem, Record, Unit
from catmllm.data.own.adsorbates import molecule_name
from catmllm.data.shards import (
    FACTS,
    INDEX,
    Entry,
    Shards,
    map_arrays,
    read_facts,
    shard_name,
    write_index,
    write_shard,
)
from catmllm.structure.elements import COVALENT_RADIUS, SYMBOLS
from catmllm.structure.formula import SEPARATOR, count_elements, parse_formula
from catmllm.structure.periodic import bond_matrix
from catmllm.structure.system import ADSORBATE, make_system
from catmllm.structure.tags import surface_tags
from catmllm.structure.text import three_part_text

SOURCES = ("OC20", "OC20-Dense", "OC22", "other")
PLAN, TABLE = "plan.json", "metadata.safetensors"
LARGE_MAPPINGS = 16 << 20  # bytes
EXAMPLES = 3  # of each reason, kept with its count
OVERLAP = 0.5  # Å; nearer atoms are a damaged structure (H-H is 0.74)


class DataError(RuntimeError):
    """The run cannot go on; the message says why, what is kept and what to do."""


@dataclass(frozen=True)
class Rules:
    """What is kept. Energies in eV, forces in eV/Å."""

    max_energy: float = 10.0  # OC20's own bound: what lies beyond is a failed calculation, or a total energy
    fmax: float = 0.05  # OC20 relaxed to 0.03; only files with forces are held to it
    total_energies: bool = False  # LMDBs hold total energies: the reference is still to be subtracted
    keep_reconstructed: bool = False


class Drop(Exception):
    """A record that is not kept: the reason to count it by, and what exactly."""

    def __init__(self, reason: str, message: str = "") -> None:
        super().__init__(message)
        self.reason = reason


# --------------------------------------------------------------------------- one record


def to_entry(record: Record, table: Metadata | None, rules: Rules, dense: bool = False) -> Entry:
    """The system of a record under what is known of it. Raises Drop.

    Slab atoms come first, the adsorbate last, each in the order of the file.
    The mapping wins over what the file says.
    """
    facts = table.find(DENSE_KEY * dense + record.sid) if table is not None else None
    if table is not None and facts is None and (record.adsorbate is None or record.miller is None):
        raise Drop("not in the mapping")
    if facts is not None and facts.anomaly and not (facts.anomaly == 3 and rules.keep_reconstructed):
        raise Drop(ANOMALIES.get(facts.anomaly, f"anomaly {facts.anomaly}"))
    if record.fmax is not None and not record.fmax <= rules.fmax:
        raise Drop("unconverged", f"largest force {record.fmax:.3f} eV/Å, allowed {rules.fmax:g}")
    miller = (facts and facts.miller) or record.miller
    if miller is None:
        raise Drop("no Miller index", "neither the file nor a mapping says it")
    energy = _energy(record, facts, table, rules, dense)
    n = len(record.numbers)
    if len(record.positions) != n:
        raise Drop("incomplete", f"{n} elements and {len(record.positions)} positions")
    if record.start is not None and len(record.start) != n:
        raise Drop("incomplete", f"{n} elements and {len(record.start)} start positions")
    if not (np.isfinite(record.positions).all() and np.isfinite(record.lattice).all()):
        raise Drop("not finite", "a position or the cell is not a number")
    try:
        name, tags = _adsorbate(record, facts)
        order = np.argsort(tags == ADSORBATE, kind="stable")
        system = make_system(
            record.lattice,
            record.positions[order],
            record.numbers[order],
            tags[order],
            name,
            miller,
            energy,
            facts.sid if facts is not None else record.sid,
            start_positions=None if record.start is None else record.start[order],
        )
        _check(system, facts)
        text = three_part_text(system)
    except ValueError as error:
        reason = "left-handed cell" if "left-handed" in str(error) else "bad structure"
        raise Drop(reason, str(error)) from error
    source = (
        1 if dense else 2 if record.sid.startswith("oc22-") else 0 if record.sid.startswith("random") else 3
    )
    surface = facts.surface if facts is not None and facts.surface else text.split(SEPARATOR)[1]
    return Entry(system, record.frame, text, source, f"{name} {surface}")


def _energy(record: Record, facts: Facts | None, table: Metadata | None, rules: Rules, dense: bool) -> float:
    """The adsorption energy: the target of the configuration,
    else the file's energy less the reference it needs."""
    if dense and table is not None and table.has_targets:
        # the published targets leave out what did not converge or fell apart
        if facts is None or facts.target is None:
            raise Drop("no target energy", "oc20dense_targets.pkl does not list this configuration")
        energy = facts.target
    else:
        if record.energy is None:
            raise Drop("incomplete", "no energy")
        energy = record.energy
        if rules.total_energies or not record.referenced:
            reference = record.reference
            if reference is None and facts is not None:
                reference = facts.reference
            if reference is None:
                raise Drop("no reference energy", f"{energy:.3f} eV is a total energy")
            energy -= reference
    if not np.isfinite(energy):
        raise Drop("not finite", f"the energy is {energy}")
    if abs(energy) > rules.max_energy:
        raise Drop("implausible energy", f"{energy:.3f} eV, allowed are ±{rules.max_energy:g}")
    return energy


def _adsorbate(record: Record, facts: Facts | None) -> tuple[str, NDArray[np.int8]]:
    """Name of the adsorbate and tags, each derived from the other where one is missing."""
    name = (facts.adsorbate if facts is not None else "") or (record.adsorbate or "").replace("*", "")
    tags = record.tags
    if (tags is None or not (tags == ADSORBATE).any()) and facts is not None and facts.tags is not None:
        tags = facts.tags
    if tags is not None and len(tags) != len(record.numbers):
        raise Drop("incomplete", f"{len(record.numbers)} atoms and {len(tags)} tags")
    if tags is None or not (tags == ADSORBATE).any():
        if not name:
            raise Drop("no adsorbate", "neither tags nor a name say which atoms it is")
        frac = np.linalg.solve(record.lattice.T, record.positions.T).T.astype(np.float64)
        return name, surface_tags(record.lattice, frac, record.numbers, parse_formula(name))
    if not name:
        return adsorbate_name(record, tags), tags
    symbols = [SYMBOLS[z] for z in record.numbers[tags == ADSORBATE] if 0 < z < len(SYMBOLS)]
    if count_elements(symbols) != count_elements(s for s, n in parse_formula(name).items() for _ in range(n)):
        raise Drop(
            "mapping disagrees", f"the adsorbate is {name}, the atoms tagged 2 are {' '.join(symbols)}"
        )
    return name, tags


def adsorbate_name(record: Record, tags: NDArray[np.int8]) -> str:
    """A name as OC20 writes them of the atoms tagged 2: heavy atoms in order,
    each with its hydrogens (`CH2CO`)."""
    at = np.flatnonzero(tags == ADSORBATE)
    numbers = record.numbers[at]
    bonded = bond_matrix(record.lattice, record.positions[at], COVALENT_RADIUS[numbers], 0.1)
    return molecule_name(numbers, bonded)


def _check(system: Any, facts: Facts | None) -> None:
    if facts is not None and facts.elements and not facts.elements.issuperset(system.slab_counts):
        raise Drop(
            "mapping disagrees",
            f"the bulk holds {' '.join(sorted(facts.elements))}, the slab is {system.slab_formula}",
        )
    radii = np.full(len(system), OVERLAP / 2)
    if bond_matrix(system.lattice, system.positions, radii, 0.0).any():
        raise Drop("overlapping atoms", f"two atoms are nearer than {OVERLAP} Å")


# --------------------------------------------------------------------------- one unit


@dataclass
class Count:
    """What was read, kept and dropped; the first few of each reason by name."""

    read: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def drop(self, reason: str, example: str, number: int = 1) -> None:
        self.dropped[reason] += number
        some = self.examples.setdefault(reason, [])
        if len(some) < EXAMPLES:
            some.append(example)

    def add(self, other: dict[str, Any]) -> None:
        self.read += other["read"]
        self.kept += other["kept"]
        self.dropped.update(other["dropped"])
        for reason, some in other["examples"].items():
            mine = self.examples.setdefault(reason, [])
            mine += some[: EXAMPLES - len(mine)]

    def as_dict(self) -> dict[str, Any]:
        return {
            "read": self.read,
            "kept": self.kept,
            "dropped": dict(self.dropped.most_common()),
            "examples": self.examples,
        }


def entries(
    items: Iterable[Record | Problem], table: Metadata | None, rules: Rules, dense: bool, count: Count
) -> list[Entry]:
    """The systems of some records, of each the last frame; what is dropped goes into `count`."""
    last: dict[str, Entry] = {}
    for item in items:
        count.read += 1
        if isinstance(item, Problem):
            count.drop(item.reason, item.message)
            continue
        try:
            entry = to_entry(item, table, rules, dense)
        except Drop as drop:
            count.drop(drop.reason, f"{item.sid}: {drop}" if str(drop) else item.sid)
            continue
        before = last.get(entry.system.sid)
        if before is not None:
            count.drop("earlier frame" if before.frame != entry.frame else "read twice", entry.system.sid)
        if before is None or entry.frame >= before.frame:
            last[entry.system.sid] = entry
    count.kept = len(last)
    return list(last.values())


@lru_cache(1)
def _table(folder: str) -> Metadata | None:
    path = Path(folder) / TABLE
    return Metadata(path) if path.is_file() else None


def process_unit(folder: str, number: int, unit: Unit, dense: bool, rules: Rules) -> dict[str, Any]:
    """Make one shard; returns its counts."""
    count = Count()
    found = entries(readers.read(unit), _table(folder), rules, dense, count)
    write_shard(Path(folder) / shard_name(number), found, count.as_dict())
    return count.as_dict()


# --------------------------------------------------------------------------- all of them


class Work(NamedTuple):
    unit: Unit
    dense: bool


def process(
    sources: Sequence[str | Path],
    out: str | Path,
    mappings: Sequence[str | Path] = (),
    dense: Sequence[str | Path] = (),
    rules: Rules = Rules(),
    workers: int = 1,
    progress: bool = True,
) -> Shards:
    """Make a dataset of OC20 files, or go on with one that was stopped. Raises ValueError for sources and
    mappings that cannot be, DataError where the run cannot go on."""
    folder = Path(out)
    works, problems = _plan(folder, sources, dense, mappings, rules)
    if (folder / FACTS).is_file():
        return Shards(folder)
    with _alone(folder):
        _make(folder, works, mappings, rules, workers, progress)
        return _finish(folder, len(works), problems, rules, sources, dense)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder against another run; what a killed one left half written goes."""
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DataError(
                f"another run is at work in {folder}; wait for it, or give another --out"
            ) from None
        for half in folder.glob(".shard-*"):
            half.unlink()
        yield


def _make(
    folder: Path,
    works: Sequence[Work],
    mappings: Sequence[str | Path],
    rules: Rules,
    workers: int,
    progress: bool,
) -> None:
    """All shards that are not there yet, the table of the mappings before them."""
    if mappings and not (folder / TABLE).is_file():
        _say(progress, f"reading {len(mappings)} mapping{'s' * (len(mappings) > 1)}")
        names = list(map(str, mappings))
        if sum(os.path.getsize(name) for name in names) < LARGE_MAPPINGS:
            known = metadata.build(names, folder / TABLE)
        else:  # in a process of its own, whose gigabyte of dicts goes with it
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                known = pool.submit(metadata.build, names, folder / TABLE).result()
        _say(progress, f"  {known:,} systems")
    todo = [i for i in range(len(works)) if not (folder / shard_name(i)).is_file()]
    _run(folder, works, todo, rules, workers, progress)


def _say(progress: bool, text: str) -> None:
    if progress:
        print(text, file=sys.stderr, flush=True)


def _plan(
    folder: Path,
    sources: Sequence[str | Path],
    dense: Sequence[str | Path],
    mappings: Sequence[str | Path],
    rules: Rules,
) -> tuple[list[Work], list[Problem]]:
    """The work in pieces, the same on every call; kept with what it was made of,
    so that nothing else is mixed in."""
    parts = [(readers.find_files(some), is_dense) for some, is_dense in ((sources, False), (dense, True))]
    for path in map(Path, mappings):
        if not path.is_file():
            raise ValueError(f"the mapping {path} does not exist")
    files = [p for some, _ in parts for p in some] + [Path(m) for m in mappings]
    if not files:
        raise ValueError("no source is given")
    stats = hashlib.sha256()
    for path in files:
        info = path.stat()
        stats.update(f"{path.resolve()} {info.st_size} {info.st_mtime_ns}\n".encode())
    wanted = {"input": stats.hexdigest(), "rules": asdict(rules)}
    folder.mkdir(parents=True, exist_ok=True)
    plan = folder / PLAN
    if plan.is_file():
        before = json.loads(plan.read_text(encoding="utf-8"))
        changed = "files" if before["input"] != wanted["input"] else "rules"
        if {k: before[k] for k in wanted} != wanted:
            raise DataError(
                f"{folder} was begun with other {changed}; give the same command as then, another --out, or "
                "remove it"
            )
        works = [Work(Unit(tuple(u[0]), *u[1:4]), u[4]) for u in before["units"]]
        return works, [Problem(*p) for p in before["problems"]]
    if any(folder.iterdir()):
        raise DataError(f"{folder} is not empty and no dataset was begun there; give another --out")
    works, problems = [], []
    for some, is_dense in parts:
        for item in readers.units(some):
            if isinstance(item, Problem):
                problems.append(item)
            else:
                works.append(Work(item, is_dense))
    content = wanted | {
        "units": [[w.unit.paths, w.unit.first, w.unit.count, w.unit.size, w.dense] for w in works],
        "problems": [[p.reason, p.message] for p in problems],
    }
    temporary = folder / f".{PLAN}"
    temporary.write_text(json.dumps(content), encoding="utf-8")
    temporary.rename(plan)
    return works, problems


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=exit_with_parent, daemon=True).start()


def _run(
    folder: Path, works: Sequence[Work], todo: Sequence[int], rules: Rules, workers: int, progress: bool
) -> None:
    from tqdm import tqdm

    sizes = [w.unit.size for w in works]
    done = sum(sizes) - sum(sizes[i] for i in todo)
    total = Count()
    try:
        with tqdm(
            total=sum(sizes), initial=done, unit="B", unit_scale=True, disable=not progress, desc="processing"
        ) as bar:
            for i, counts in _results(folder, works, todo, rules, workers):
                total.add(counts)
                bar.set_postfix_str(
                    f"{total.kept:,} kept, {sum(total.dropped.values()):,} dropped", refresh=False
                )
                bar.update(sizes[i])
    except OSError as error:
        raise DataError(f"{error}; finished shards are kept: the same command goes on") from error
    except BrokenProcessPool as error:
        raise DataError(
            f"a worker process died ({error}), perhaps for want of memory; finished shards are kept: give "
            "the same command again, with fewer --workers, to go on"
        ) from error


def _results(
    folder: Path, works: Sequence[Work], todo: Sequence[int], rules: Rules, workers: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(unit, its counts) as units get done. Few wait in the queue at a time,
    so that memory does not grow with them."""
    workers = min(workers, len(todo))
    if workers <= 1:
        for i in todo:
            yield i, process_unit(str(folder), i, works[i].unit, works[i].dense, rules)
        return
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_start_worker)
    waiting: dict[Future[dict[str, Any]], int] = {}
    rest = iter(todo)
    try:
        while True:
            for i in rest:
                unit, dense = works[i]
                waiting[pool.submit(process_unit, str(folder), i, unit, dense, rules)] = i
                if len(waiting) >= 2 * workers:
                    break
            if not waiting:
                return
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                yield waiting.pop(future), future.result()
    finally:
        processes = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for process_ in processes:
            process_.terminate()


def _columns(folder: Path, shards: int, total: Count) -> dict[str, NDArray[Any]]:
    """What tells systems apart, over all shards; adds what each shard counted to `total`."""
    columns: dict[str, list[NDArray[Any]]] = {
        k: [] for k in ("sid_key", "surface_key", "frame", "source", "shard", "row")
    }
    for number in range(shards):
        path = folder / shard_name(number)
        total.add(read_facts(path))
        arrays = map_arrays(path)
        n = len(arrays["energy"])
        for name in ("sid_key", "surface_key", "frame", "source"):
            columns[name].append(np.array(arrays[name]))
        columns["shard"].append(np.full(n, number))
        columns["row"].append(np.arange(n))
    return {k: np.concatenate([np.empty(0, np.int64), *v]) for k, v in columns.items()}


def _finish(
    folder: Path,
    shards: int,
    problems: Sequence[Problem],
    rules: Rules,
    sources: Sequence[str | Path],
    dense: Sequence[str | Path],
) -> Shards:
    """The index over all shards, without what was read twice and what overlaps, and the summary."""
    total = Count()
    for problem in problems:
        total.drop(problem.reason, problem.message)
        total.read += 1
    c = _columns(folder, shards, total)
    keep = np.ones(len(c["row"]), dtype=np.bool_)

    def drop(rows: NDArray[np.int64], reason: str) -> None:
        keep[rows] = False
        total.kept -= len(rows)
        for row in rows[:EXAMPLES].tolist():
            arrays = map_arrays(folder / shard_name(int(c["shard"][row])))
            a, b = arrays["sid_start"][int(c["row"][row]) :][:2]
            total.drop(reason, arrays["sid"][a:b].tobytes().decode(), 0)
        total.dropped[reason] += len(rows)

    # of one sid the last frame, and of that the one read first
    order = np.lexsort((-np.arange(len(keep)), c["frame"], c["sid_key"], c["source"]))
    same = (np.diff(c["sid_key"][order]) == 0) & (np.diff(c["source"][order]) == 0)
    earlier = order[:-1][same]
    later_frame = np.diff(c["frame"][order])[same] != 0
    for reason, rows in (("earlier frame", earlier[later_frame]), ("read twice", earlier[~later_frame])):
        if len(rows):
            drop(np.sort(rows), reason)
    oc20 = np.unique(c["surface_key"][keep & (c["source"] == 0)])
    overlapping = np.flatnonzero(keep & (c["source"] == 1) & np.isin(c["surface_key"], oc20))
    if len(overlapping):
        drop(overlapping, "overlaps OC20")
    chosen = [(number, c["row"][keep & (c["shard"] == number)]) for number in range(shards)]
    kept = {name: int((keep & (c["source"] == i)).sum()) for i, name in enumerate(SOURCES)}
    facts = total.as_dict() | {
        "systems": {name: n for name, n in kept.items() if n},
        # the three instruction samples of every system
        "samples": {
            name: dict.fromkeys(("cif", "property", "design_by_energy"), n) for name, n in kept.items() if n
        },
        "rules": asdict(rules),
        "input": {"sources": [str(s) for s in sources], "dense": [str(s) for s in dense]},
    }
    (folder / INDEX).unlink(missing_ok=True)
    write_index(folder, chosen, SOURCES, facts)
    return Shards(folder)


def summary(facts: dict[str, Any]) -> str:
    """The paper's Table 7 of a dataset, and what was dropped and why, as text."""
    lines = [
        f"{'data source':<14}{'CIF generation':>16}{'relaxed energy':>16}{'inverse design':>16}{'total':>12}"
    ]
    rows = {name: list(tasks.values()) for name, tasks in facts["samples"].items()}
    if len(rows) != 1:
        rows["total"] = [sum(r[k] for r in rows.values()) for k in range(3)]
    lines += [f"{name:<14}" + "".join(f"{n:>16,}" for n in r) + f"{sum(r):>12,}" for name, r in rows.items()]
    lines.append(f"\n{facts['read']:,} records read, {facts['kept']:,} systems kept")
    for reason, n in facts["dropped"].items():
        example = facts["examples"].get(reason, [""])[0]
        lines.append(f"  {n:>9,}  {reason:<20} {example[:100]}")
    return "\n".join(lines)


def default_workers() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
