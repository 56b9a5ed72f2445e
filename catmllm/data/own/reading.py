"""Records of any file as systems, with what was understood and everything that was refused, counted.

found = read_systems(["calcs/", "labels.csv"], Wanted(adsorbate="CO"))
found.systems, found.refused, summary(found)
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from catmllm.data.oc20.readers import Problem, Record
from catmllm.data.own import files, keys
from catmllm.data.own.adsorbates import Bare, Unclear, adsorbate_name, find_adsorbate
from catmllm.data.own.references import NoReference, References, dependent_gases, is_molecule
from catmllm.data.own.surfaces import stand_up, surface_miller
from catmllm.structure.adsorbed import adsorbate_fault
from catmllm.structure.elements import SYMBOLS
from catmllm.structure.formula import Miller
from catmllm.structure.periodic import bond_matrix
from catmllm.structure.system import ADSORBATE, BULK, SURFACE, System, make_system, text_system
from catmllm.structure.tags import LAYER_HEIGHT

# eV of one unit; what is per mole is divided by Avogadro's number (CODATA 2018)
UNITS = {
    "eV": 1.0, "meV": 1e-3, "kJ/mol": 0.010364269656, "kcal/mol": 0.043364104242, "Ha": 27.211386246,
    "Ry": 13.605693123,
}  # fmt: skip
EXAMPLES = 5  # of each reason
OVERLAP = 0.5  # Å; nearer atoms are a damaged structure (H-H is 0.74)
FAULTS = {
    "no_adsorbate": "no adsorbate",
    "squeezed": "a bond of the adsorbate is shorter than any",
    "broken": "the adsorbate is in more pieces than its name says",
    "overlap": "atoms nearer than their radii allow",
    "buried": "the adsorbate is inside the slab",
    "detached": "the adsorbate is out of reach of the surface",
}


@dataclass
class Wanted:
    """What the user says of the files. energies: what a plain energy is, `adsorption` or `total`; None: total
    in the results of a calculation, adsorption in a table. Energies in `unit`, references too."""

    adsorbate: str | None = None
    adsorbate_atoms: str | None = None
    slabs: Sequence[str | Path] = ()
    miller: Miller | None = None
    energies: str | None = None
    energy_key: str | None = None
    unit: str = "eV"
    references: Sequence[str | Path] = ()
    reference_state: str | None = None
    trajectories: bool = False
    group: str | None = None  # the column that `data.split_by: column` goes by
    max_energy: float = 10.0  # eV
    fmax: float = 0.05  # eV/Å
    labelled: bool = True  # systems without an energy are refused


@dataclass
class Item:
    """A system and what is to be said of it. state: its zero of energy, None where nothing says it; gases:
    the molecules of its reaction."""

    system: System
    source: str
    how: str = ""
    marks: list[str] = field(default_factory=list)
    state: str | None = None
    gases: frozenset[str] = frozenset()
    group: str = ""


@dataclass
class Found:
    """Systems in the order of the files, what was refused (reason -> examples), and what was understood."""

    items: list[Item] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    columns: dict[str, Counter[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    read: int = 0
    left: int = 0  # files in the folders that are none
    state: str | None = None
    mixed: str | None = None  # why the energies do not belong together

    @property
    def systems(self) -> list[System]:
        return [item.system for item in self.items]

    def refuse(self, reason: str, message: str) -> None:
        self.refused[reason] += 1
        some = self.examples.setdefault(reason, [])
        if len(some) < EXAMPLES:
            some.append(message)


class Refused(Exception):
    """A record that makes no system: the reason to count it by, and what exactly."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def read_systems(paths: Sequence[str | Path], wanted: Wanted | None = None) -> Found:
    """The systems of files and folders. Nothing raises for what is in a file: each record becomes a system or
    a refusal. Raises ValueError for references, slabs and options that cannot be."""
    wanted = wanted or Wanted()
    if wanted.unit not in UNITS:
        raise ValueError(f"--unit {wanted.unit}: give one of {', '.join(UNITS)}")
    references = read_references(wanted.references, wanted.unit)
    slabs = [_bare(r)[0] for r in _records(wanted.slabs, "--slab")]
    found = Found()
    sources, problems, found.left = files.find(paths)
    for problem in problems:
        found.read += 1
        found.refuse(problem.reason, problem.message)
    named = _named_in_tables(sources)
    alike = 0
    seen: dict[str, Item] = {}
    for source in sources:
        if not named.isdisjoint(p.resolve() for p in source.paths):
            continue  # a table's row has it
        items = list(files.read(source))
        frames = files.has_trajectory(source)
        alike += frames and not wanted.trajectories and _is_relaxation(items)
        last = max((i for i, item in enumerate(items) if isinstance(item, Record)), default=-1)
        for i, read in enumerate(items):
            found.read += 1
            if isinstance(read, Problem):
                found.refuse(read.reason, read.message)
                continue
            for key in read.beside:
                found.columns.setdefault(str(key), Counter())[_use(str(key), wanted)] += 1
            if wanted.trajectories and frames and i != last:
                found.refuse("earlier frame", read.sid)
                continue
            try:
                _take(read, wanted, references, slabs, found, seen)
            except (Refused, Unclear) as refused:
                found.refuse(refused.reason, f"{read.sid}: {refused}")
            except ValueError as error:
                found.refuse("bad structure", f"{read.sid}: {error}")
    if alike:
        found.notes.append(
            f"{alike} file{'s look' if alike > 1 else ' looks'} like a relaxation; every frame counts as a "
            "system unless --trajectories says that only the last one does"
        )
    _look_over(found, wanted, references)
    return found


def _named_in_tables(sources: Iterable[files.Source]) -> set[Path]:
    """Files that rows of a table among the sources name, which are not to be read a second time."""
    named: set[Path] = set()
    for source in sources:
        path = source.paths[0]
        for word in files.words_of(path):
            target = path.parent / word
            if word and target.is_file() and target != path:
                named.add(target.resolve())
    return named


def _take(
    record: Record,
    wanted: Wanted,
    references: References,
    slabs: Sequence[Bare],
    found: Found,
    seen: dict[str, Item],
) -> None:
    item = to_item(record, wanted, references, slabs)
    before = seen.get(item.system.sid)
    if before is not None and wanted.labelled:
        if _same(before.system, item.system):
            raise Refused("read twice", f"the same structure and energy as {before.source}")
        name = f"{item.source}:{item.system.sid}"
        while name in seen:
            name += "'"
        item.marks.append("its id is another system's too; the file's name was put before it")
        item.system = replace(item.system, sid=name)
    seen[item.system.sid] = item
    found.items.append(item)


def _same(a: System, b: System) -> bool:
    return (
        len(a) == len(b)
        and a.text == b.text
        and a.energy == b.energy
        and bool((a.numbers == b.numbers).all())
        and np.allclose(a.positions, b.positions, atol=1e-6)
    )


def to_item(record: Record, wanted: Wanted, references: References, slabs: Sequence[Bare]) -> Item:
    """The system of one record. Raises Refused, Unclear or ValueError."""
    beside = record.beside
    words = keys.value(beside, "text") if not len(record.numbers) else None
    _check(record, wanted, structure=words is None)
    if words is not None:
        return _of_text(record, str(words), wanted)
    given = wanted.miller or record.miller
    plane = keys.find(beside, "Miller index")
    if given is None and plane is not None:
        given = keys.miller(plane[1])
    bare, marks = _bare(record)
    if "passed over" in beside:
        marks.append(beside["passed over"])
    said = keys.value(beside, "adsorbate")
    said = "F" if said is False else said  # fluorine, which ASE reads in extended XYZ as false
    name = wanted.adsorbate or record.adsorbate or _text(said)
    name = name.replace("*", "") if name else None
    indices = keys.value(beside, "adsorbate atoms")
    mask, how = find_adsorbate(bare, name, wanted.adsorbate_atoms, indices, slabs)
    energy, state, gases = _energy(record, wanted, references, bare, mask)
    lattice, height = bare.lattice, bare.height
    if height[mask].mean() < height[~mask].mean():
        # the other side up: the same lattice, seen from below
        lattice = lattice * np.array([1.0, -1.0, -1.0])[:, None]
        bare = bare._replace(lattice=lattice)
        height = bare.height
        marks.append("the adsorbate is under the slab: the third lattice vector was turned over")
    called = adsorbate_name(bare, mask, name)
    order = np.argsort(mask, kind="stable")
    if given is None:
        given = surface_miller(bare.lattice, bare.positions[~mask])
        marks.append(
            "no Miller index: left out"
            if given is None
            else "Miller index by the structure, of the fcc or bcc cube"
        )
    system = make_system(
        bare.lattice,
        bare.positions[order],
        bare.numbers[order],
        _tags(bare, mask, height, how)[order],
        called,
        given,
        energy,
        record.sid,
        start_positions=None if record.start is None else record.start[order],
    )
    if bond_matrix(system.lattice, system.positions, np.full(len(system), OVERLAP / 2), 0.0).any():
        raise Refused("overlapping atoms", f"two atoms are nearer than {OVERLAP} Å")
    fault = adsorbate_fault(system)
    if fault is not None:
        marks.append(FAULTS[fault])
    return Item(system, str(beside.get("source", "")), how, marks, state, gases, _group(record, wanted))


def _of_text(record: Record, words: str, wanted: Wanted) -> Item:
    """The system of a row that has words alone; its energy must be an adsorption energy."""
    energy, state, gases = _energy(record, wanted, References(), None, np.empty(0, dtype=np.bool_))
    system = text_system(words, energy, record.sid)
    mark = [] if system.slab_counts else ["no three-part text: taken as it is"]
    source, group = str(record.beside.get("source", "")), _group(record, wanted)
    return Item(system, source, "its text alone", mark, state, gases, group)


def _group(record: Record, wanted: Wanted) -> str:
    """The value of the column that a split may go by."""
    beside = record.beside
    group = beside.get(wanted.group) if wanted.group else keys.value(beside, "split")
    return "" if group is None else str(group)


def _check(record: Record, wanted: Wanted, structure: bool) -> None:
    """Raises Refused for a record that says or shows that it is of no use."""
    if str(keys.value(record.beside, "usable")).strip().lower() in ("false", "f", "no", "0"):
        raise Refused("marked unusable", "its `ok` is false")
    fmax = record.fmax
    if fmax is None and (said := keys.find(record.beside, "largest force")) is not None:
        fmax = keys.number(said[1], said[0])
    if fmax is not None and wanted.labelled and not fmax <= wanted.fmax:
        raise Refused("unconverged", f"largest force {fmax:.3f} eV/Å, allowed {wanted.fmax:g} (--fmax)")
    if not structure:
        return
    if not (np.isfinite(record.positions).all() and np.isfinite(record.lattice).all()):
        raise Refused("not finite", "a position or the cell is not a number")
    if not len(record.numbers) or len(record.positions) != len(record.numbers):
        raise Refused("incomplete", f"{len(record.numbers)} elements and {len(record.positions)} positions")
    if not (record.numbers.min() >= 1 and record.numbers.max() < len(SYMBOLS)):
        raise Refused("no element", f"atomic numbers are {sorted(set(record.numbers.tolist()))}")


def _bare(record: Record) -> tuple[Bare, list[str]]:
    lattice, said = stand_up(record.lattice, record.positions)
    oc20 = bool(record.beside.get("tags of OC20"))
    return Bare(lattice, record.positions, record.numbers, record.tags, oc20), said


def _tags(bare: Bare, mask: np.ndarray, height: np.ndarray, how: str) -> np.ndarray:
    """OC20's tags as they are; else 2 for the adsorbate, 1 for slab atoms within 0.9 Å of the highest."""
    if how.startswith("tags of OC20") and bare.tags is not None:
        return bare.tags
    tags = np.where(mask, ADSORBATE, BULK).astype(np.int8)
    tags[~mask & (height >= height[~mask].max() - LAYER_HEIGHT)] = SURFACE
    return tags


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _energy(
    record: Record, wanted: Wanted, references: References, bare: Bare | None, mask: np.ndarray
) -> tuple[float | None, str | None, frozenset[str]]:
    """Adsorption energy (eV), its zero, and the gas molecules of its reaction; without a structure (`bare`)
    references are those beside the record."""
    beside = record.beside
    unit = UNITS[wanted.unit]
    state = wanted.reference_state or _text(keys.value(beside, "reference state")) or beside.get("method")
    gases = frozenset(beside.get("gases", ()))
    found = _said_energy(record, wanted)
    if found is None:
        if not wanted.labelled:
            return None, None, gases
        seen = ", ".join(sorted(str(k) for k in beside if k != "source")) or "nothing"
        raise Refused(
            "no energy",
            f"the record says {seen} beside its structure; name the key by --energy-key, or call it "
            f"{' or '.join(keys.KEYS['adsorption energy'][:2])} (docs/own_data.md has all names)",
        )
    energy, total = found
    energy *= unit
    if total:
        try:
            energy, made = _adsorption(energy, record, references, bare, mask, unit)
        except NoReference as missing:
            if not wanted.labelled:
                return None, None, gases
            raise Refused(
                "no reference energy",
                f"{energy:.3f} eV is a total energy: {missing}. --energies adsorption says that it is not",
            ) from None
        state = state or made
    if not wanted.labelled and not abs(energy) <= wanted.max_energy:
        return None, state, gases  # what is to be predicted needs none
    if not math.isfinite(energy):
        raise Refused("not finite", f"the energy is {energy}")
    if abs(energy) > wanted.max_energy:
        raise Refused(
            "implausible energy",
            f"{energy:.3f} eV as an adsorption energy, allowed are ±{wanted.max_energy:g} (--max-energy); is "
            "it a total energy (--energies total), or of another unit (--unit)?",
        )
    return energy, state, gases


def _said_energy(record: Record, wanted: Wanted) -> tuple[float, bool] | None:
    """The energy that a record says, in its unit, and whether it is a total one; None where it says none."""
    beside, total = record.beside, None if wanted.energies is None else wanted.energies == "total"
    if wanted.energy_key is not None:
        if wanted.energy_key == beside.get("energy column") and record.energy is not None:
            return record.energy, bool(total)
        if beside.get(wanted.energy_key) is None:
            return None
        kind = keys.meaning(wanted.energy_key) == "total energy"
        value = keys.number(beside[wanted.energy_key], wanted.energy_key)
        return value, kind if total is None else total
    if (found := keys.find(beside, "adsorption energy")) is not None:
        return keys.number(found[1], found[0]), False
    if record.energy is not None:
        return record.energy, not record.referenced if total is None else total
    if (found := keys.find(beside, "total energy")) is not None:
        return keys.number(found[1], found[0]), True if total is None else total
    if (found := keys.find(beside, "energy")) is not None:
        return keys.number(found[1], found[0]), True if total is None else total
    return None


def _adsorption(
    energy: float, record: Record, references: References, bare: Bare | None, mask: np.ndarray, unit: float
) -> tuple[float, str | None]:
    """The adsorption energy (eV) of a total one, and its zero. Raises NoReference."""
    beside = record.beside
    reference = record.reference
    if reference is None and (found := keys.find(beside, "reference energy")) is not None:
        reference = keys.number(found[1], found[0])
    if reference is not None:
        return energy - reference * unit, None
    if bare is None:
        raise NoReference("a text needs `reference_energy` beside it")
    slab, gas = keys.find(beside, "slab energy"), keys.find(beside, "gas energy")
    if gas is not None:
        gas_energy, state = keys.number(gas[1], gas[0]) * unit, "the gas energy beside each record"
    else:
        gas_energy, _ = references.gas(bare.formula(mask))
        state = references.state
    if slab is not None:
        slab_energy = keys.number(slab[1], slab[0]) * unit
    else:
        clean = Bare(bare.lattice, bare.positions[~mask], bare.numbers[~mask], None)
        names = [
            record.sid,
            str(keys.value(beside, "clean slab")),
            str(Path(str(beside.get("source"))).parent),
        ]
        slab_energy = references.slab(clean, names)
    return energy - slab_energy - gas_energy, state


# --------------------------------------------------------------------------- references


def _records(paths: Sequence[str | Path], option: str) -> list[Record]:
    """All records of files that must be readable. Raises ValueError."""
    sources, problems, _ = files.find(paths)
    records = []
    for source in sources:
        items = list(files.read(source))
        problems += [item for item in items if isinstance(item, Problem)]
        found = [item for item in items if isinstance(item, Record)]
        records += found[-1:] if _is_relaxation(items) else found
    if problems:
        raise ValueError(f"{option}: {problems[0].message}")
    return records


def read_references(paths: Sequence[str | Path], unit: str = "eV") -> References:
    """References of tables (`name,energy`: a molecule's formula, a slab's name or formula) and of structures
    with energies: what has no vacuum-free metal is a molecule. Raises ValueError."""
    references = References()
    structures: list[str | Path] = []
    for path in map(Path, paths):
        rows = files.name_and_energy(path)
        if rows is None:
            structures.append(path)
            continue
        for name, value in rows:
            gas = name.removesuffix("(g)").removesuffix("_g").removesuffix("gas")
            if is_molecule(gas):
                _put(references.gases, gas, value * UNITS[unit])
            else:
                _put(references.by_name, name, value * UNITS[unit])
    for record in _records(structures, "--reference"):
        energy = record.energy
        if energy is None and (found := keys.find(record.beside, "total energy")) is not None:
            energy = keys.number(found[1], found[0])
        if energy is None:
            raise ValueError(f"--reference: {record.sid} says no energy")
        formula = "".join(_in_order(record))
        if is_molecule(formula):
            _put(references.gases, formula, energy * UNITS[unit])
        else:
            references.slabs.append((_bare(record)[0], energy * UNITS[unit], record.sid))
    references.check()
    return references


def _put(energies: dict[str, float], name: str, energy: float) -> None:
    if energies.setdefault(name, energy) != energy:
        raise ValueError(f"--reference: two energies of {name}: {energies[name]:.3f} and {energy:.3f} eV")


def _in_order(record: Record) -> list[str]:
    counts = Counter(SYMBOLS[z] for z in record.numbers)
    return [s + (str(n) if n > 1 else "") for s, n in counts.items()]


# --------------------------------------------------------------------------- all of them


def _is_relaxation(items: Sequence[Record | Problem]) -> bool:
    """Whether the frames of a file are steps of one relaxation: equal atoms and cell, little moved."""
    frames = [item for item in items if isinstance(item, Record)]
    if len(frames) < 3 or not len(frames[0].numbers):
        return False
    for a, b in pairwise(frames):
        if len(a.numbers) != len(b.numbers) or (a.numbers != b.numbers).any():
            return False
        if np.abs(a.lattice - b.lattice).max() > 0.1 or not np.abs(np.linalg.det(a.lattice)) > 1e-6:
            return False
        way = np.linalg.solve(a.lattice.T, (b.positions - a.positions).T).T
        if np.linalg.norm((way - np.round(way)) @ a.lattice, axis=1).max() > 1.0:
            return False
    return True


def _use(key: str, wanted: Wanted) -> str:
    if key == wanted.energy_key:
        return "energy, as --energy-key says"
    if key == wanted.group:
        return "groups of the split, as --group says"
    if key in ("source", "tags of OC20", "energy column", "gases", "method", "passed over"):
        return "ours"
    return keys.meaning(key) or "not used"


def _look_over(found: Found, wanted: Wanted, references: References) -> None:
    """Outliers, copies, and whether all energies have one zero."""
    by_adsorbate: dict[str, list[Item]] = defaultdict(list)
    for item in found.items:
        if item.system.energy is not None:
            by_adsorbate[item.system.adsorbate].append(item)
    for name, items in sorted(by_adsorbate.items()):
        energies = np.array([i.system.known_energy for i in items])
        far = np.abs(energies - np.median(energies))
        spread = 1.4826 * np.median(far)
        odd = np.flatnonzero(far > max(6 * spread, 1.5)) if len(items) >= 8 else np.empty(0, np.int64)
        for k in odd:
            items[k].marks.append(
                f"outlier: {energies[k]:.2f} eV, the median of {name} is {np.median(energies):.2f} eV"
            )
        _offsets(found, name, items)
    shapes = Counter(
        (i.system.numbers.tobytes(), (np.round(i.system.positions, 4) + 0.0).tobytes())
        for i in found.items
        if i.system.text is None
    )
    if copies := sum(n - 1 for n in shapes.values()):
        found.notes.append(
            f"{copies} exact cop{'ies' if copies > 1 else 'y'} of systems under another name; all are kept"
        )
    states = Counter(i.state or "not said" for i in found.items if i.system.energy is not None)
    gases = sorted(set().union(*(i.gases for i in found.items)))
    if len(states) > 1:
        found.mixed = "energies of several zeros: " + "; ".join(
            f"{n} of {s}" for s, n in states.most_common()
        )
    elif gases and (dependent := dependent_gases(gases)):
        found.mixed = f"energies of several zeros: the reactions hold {', '.join(gases)}, and {dependent}"
    if found.mixed:
        found.mixed += ": import them apart, or say by --reference-state that they are the same"
    texts = sum(i.system.text is not None for i in found.items)
    if 0 < texts < len(found.items):
        found.mixed = (
            f"{texts:,} texts and {len(found.items) - texts:,} structures: import them apart; a structure's "
            "own text is made of it"
        )
    if states and "not said" not in states:
        found.state = next(iter(states))
    if gases:
        found.state = "; ".join(filter(None, (found.state, "gas " + ", ".join(gases))))


def _offsets(found: Found, name: str, items: Sequence[Item]) -> None:
    """Say where two sources of one adsorbate are so far apart that their zeros may differ."""
    by_source: dict[str, list[float]] = defaultdict(list)
    for item in items:
        by_source[item.source].append(item.system.known_energy)
    large = {s: np.array(e) for s, e in by_source.items() if len(e) >= 5}
    if len(large) < 2:
        return
    low = min(large, key=lambda s: float(np.median(large[s])))
    high = max(large, key=lambda s: float(np.median(large[s])))
    gap = float(np.median(large[high]) - np.median(large[low]))
    if large[low].max() < large[high].min() and gap > 2.0:
        found.notes.append(
            f"{name}: all energies of {high} lie above those of {low} (medians {gap:.2f} eV apart); is the "
            "reference the same?"
        )


def summary(found: Found) -> str:
    """What was understood, refused and marked, as text for the terminal."""
    lines = [f"{found.read:,} records read: {len(found.items):,} systems, {found.refused.total():,} refused"]
    if found.left:
        lines.append(f"{found.left:,} other files in the folders are of no kind that is read")
    for reason, n in found.refused.most_common():
        lines.append(f"  {n:>7,}  refused: {reason}")
        lines += [f"           {example[:400]}" for example in found.examples[reason]]
    for what, n in Counter(i.how for i in found.items).most_common():
        lines.append(f"  {n:>7,}  adsorbate by {what}")
    marks: dict[str, list[str]] = defaultdict(list)
    for item in found.items:
        for mark in item.marks:
            kind, _, rest = mark.partition(": ") if mark.startswith("outlier") else (mark, "", "")
            marks[kind].append(f"{item.system.sid}{': ' + rest if rest else ''}")
    for mark, names in sorted(marks.items(), key=lambda m: -len(m[1])):
        shown = ", ".join(names[:EXAMPLES]) + (", …" if len(names) > EXAMPLES else "")
        lines.append(f"  {len(names):>7,}  said: {mark} ({shown})")
    used = {k: c for k, c in found.columns.items() if set(c) != {"ours"}}
    for key, uses in sorted(used.items()):
        lines.append(f"  column {key}: {', '.join(u for u in uses)}")
    some = Counter(i.system.adsorbate for i in found.items)
    if some:
        shown = ", ".join(f"{name} {n}" for name, n in some.most_common(12))
        lines.append(f"adsorbates: {shown}{', …' if len(some) > 12 else ''}")
    energies = [i.system.energy for i in found.items if i.system.energy is not None]
    if energies:
        lines.append(
            f"energies: {len(energies):,}, {min(energies):.3f} to {max(energies):.3f} eV, "
            f"zero: {found.state or 'not said (--reference-state TEXT says it)'}"
        )
    lines += [f"note: {note}" for note in found.notes]
    if found.mixed:
        lines.append(f"mixed: {found.mixed}")
    return "\n".join(lines)


def facts(found: Found, wanted: Wanted, paths: Sequence[str | Path]) -> dict[str, Any]:
    """What dataset.json keeps of an import."""
    n = len(found.items)
    return {
        "read": found.read,
        "kept": n,
        "dropped": dict(found.refused.most_common()),
        "examples": found.examples,
        "systems": {"own": n},
        "samples": {"own": dict.fromkeys(("cif", "property", "design_by_energy"), n)},
        "reference": found.state,
        "notes": found.notes,
        "marks": {i.system.sid: i.marks for i in found.items if i.marks},
        "columns": {k: dict(c) for k, c in found.columns.items()},
        "rules": {k: v for k, v in vars(wanted).items() if not isinstance(v, list | tuple)},
        "input": {"sources": [str(p) for p in paths]},
    }
