"""Design tasks as a file that any tool can answer with CIFs, and what its CIFs are worth by the rules of our
own designs.

The tasks ask for an adsorbate on a slab of a facet at an energy. Of a `fixed` one the composition is told: it
is the paper's task, on pairs of bulk and facet that training lacks. Of a `free` one the tool chooses it: so
many slab atoms of some metals, but no pair that training or validation has, or a known system would answer.
A tool writes DIR/TASK/NAME.cif, its first prediction first (1.cif, 2.cif, …), and no more of them count than
the closed loop makes. `VERSION` changes with every rule that changes a score.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from catmllm.config import DataConfig
from catmllm.data.slabs import pair_of
from catmllm.data.subsets import pairs
from catmllm.design.enumeration import enumerable, ideal_system
from catmllm.design.exemplar_pool import ExemplarPool
from catmllm.design.search import ClosedLoop, Task, TaskState, free_composition, make_task
from catmllm.evaluate.controls import ideal_candidates
from catmllm.evaluate.design import JUDGES, answers_of, design_curves, design_tasks, judge_answers
from catmllm.evaluate.metrics import TOLERANCE, generation_failures
from catmllm.seeds import Stream, hash_seed
from catmllm.structure.adsorbed import adsorbate_fault
from catmllm.structure.elements import NUMBER, SYMBOLS
from catmllm.structure.formula import (
    format_formula,
    format_identity,
    parse_formula,
    parse_identity,
    reduce_counts,
)
from catmllm.structure.system import System
from rewards_fast import CIFError, extract_cif, parse_cif

VERSION = "1"
RELAXED = ".relaxed"  # before a CIF's ".cif": its structure is a relaxed one, which the predictor is told
KINDS = ("fixed", "free")
FAILURES = ("PF", "VF", "CM", "PV_0.7", "AD")
COLUMNS = ("version", "task", "system", "energy", "metals", "known")


@dataclass(frozen=True)
class BenchmarkTask:
    """A task by its name. metals: what a free slab may be of; known: reduced formulas that it may not have.
    The composition of a free task's `task` is that of the system whose energy is asked for."""

    name: str
    task: Task
    metals: tuple[str, ...] = ()
    known: frozenset[str] = frozenset()

    @property
    def kind(self) -> str:
        return "free" if self.metals else "fixed"

    def asked(self, text: str) -> Task:
        """What a text is scored against: of a free task the composition that it has itself where that is
        allowed, else the task's, which it misses."""
        if not self.metals:
            return self.task
        wanted = parse_identity(self.task.identity)
        try:
            numbers = parse_cif(extract_cif(text)).numbers
        except CIFError:
            return self.task
        slab = Counter(SYMBOLS[z] for z in numbers if z)
        slab.subtract(parse_formula(wanted.adsorbate))
        slab = Counter({symbol: n for symbol, n in slab.items() if n})
        allowed = (
            set(slab) <= set(self.metals)
            and min(slab.values(), default=0) > 0
            and slab.total() == sum(wanted.slab.values())
            and _bulk(slab) not in self.known
        )
        if not allowed:
            return self.task
        return make_task(format_identity(wanted.adsorbate, slab, wanted.miller), self.task.energy)


def _bulk(slab: Mapping[str, int]) -> str:
    return format_formula(reduce_counts(slab)[0])


def benchmark_tasks(data: Mapping[str, Sequence[System]], n: int, seed: int) -> list[BenchmarkTask]:
    """n fixed tasks, those of a run's report, and the same with free metals."""
    picks = design_tasks(data["test"], n, seed)
    rules = free_rules(data)
    fixed = [BenchmarkTask(f"fixed-{k:03d}", task) for k, task in enumerate(picks)]
    return fixed + [free_task(f"free-{k:03d}", task, rules) for k, task in enumerate(picks)]


def free_rules(data: Mapping[str, Sequence[System]]) -> tuple[tuple[str, ...], frozenset[str]]:
    """What slabs with free metals may be of, and `known_pairs`."""
    metals = sorted({symbol for part in data.values() for s in part for symbol in s.slab_counts})
    return tuple(metals), known_pairs(data)


def known_pairs(data: Mapping[str, Sequence[System]]) -> frozenset[str]:
    """The (bulk, Miller index) pairs, as `slabs.pair` names them, that training or validation has: none may
    answer."""
    return pairs(data["train"]) | pairs(data["val"])


def free_task(name: str, task: Task, rules: tuple[tuple[str, ...], frozenset[str]]) -> BenchmarkTask:
    """A task with free metals, by `free_rules`."""
    (metals, known), facet = rules, pair_of(task.identity).partition(" ")[2]
    bulks = (pair.partition(" ") for pair in known)
    return BenchmarkTask(name, task, metals, frozenset(bulk for bulk, _, on in bulks if on == facet))


def refuse_known(
    path: Path, tasks: Sequence[BenchmarkTask], data: Mapping[str, Sequence[System]], config: DataConfig
) -> None:
    """Raises ValueError where training or validation on `data`, which `config` names, has what one of the
    tasks of a file asks for or allows: whoever learned from them knows an answer. What a test system is asked
    for is sound however the data are split."""
    known = known_pairs(data)
    doubtful = [t for t in tasks if any(pair_of(line) in known for line in allowed_slabs(t))]
    tested = {s.identity for s in data["test"]} if doubtful else set()
    seen = [t.name for t in doubtful if t.metals or t.task.identity not in tested]
    if not seen:
        return
    keys = ("path", "labels", "slabs", "split_by", "hold_out", "split_seed")
    given = {k: v for k in keys if (v := getattr(config, k)) != getattr(DataConfig(), k)}
    words = {k: v if isinstance(v, str | int) else f"[{','.join(v)}]" for k, v in given.items()}
    command = " ".join(["catmllm evaluate tasks --out FILE", *(f"data.{k}={v}" for k, v in words.items())])
    raise ValueError(
        f"{path}: {len(seen)} of {len(tasks)} tasks ask for a bulk and facet that the model has in training "
        f"or validation, or allow one: {', '.join(seen[:3])}{', …' if len(seen) > 3 else ''}. Give --tasks "
        f"FILE of the model's own split (`{command}` writes it), or a model of the split of these tasks"
    )


def write_tasks(tasks: Sequence[BenchmarkTask], path: Path) -> None:
    """A CSV of `COLUMNS`, which `catmllm design --targets` reads too; energies in eV, lists with spaces."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for t in tasks:
            row = [t.task.identity, repr(t.task.energy), " ".join(t.metals), " ".join(sorted(t.known))]
            writer.writerow([VERSION, t.name, *row])


def read_tasks(path: Path) -> list[BenchmarkTask]:
    """Raises ValueError, with file and line, for what is no task of this version."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        if missing := [c for c in COLUMNS if c not in (reader.fieldnames or ())]:
            raise ValueError(
                f"{path}: no column {', '.join(missing)}; `catmllm evaluate tasks` writes such a file"
            )
        rows = list(reader)
    tasks = []
    for line, row in enumerate(rows, 2):
        where = f"{path}:{line}"
        if row["version"] != VERSION:
            raise ValueError(f"{where}: tasks of version {row['version']}; these rules are version {VERSION}")
        if not re.fullmatch(r"[\w-]+", row["task"] or ""):
            raise ValueError(f"{where}: a task's name is that of a folder, not {row['task']!r}")
        try:
            task = make_task(row["system"], float(row["energy"]))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from error
        metals, known = (row["metals"] or "").split(), (row["known"] or "").split()
        if strange := [m for m in metals if m not in NUMBER]:
            raise ValueError(f"{where}: {strange[0]!r} is no element; write the metals as 'Cu Ni Pt'")
        tasks.append(BenchmarkTask(row["task"], task, tuple(metals), frozenset(known)))
    if not tasks:
        raise ValueError(f"{path}: no task in it")
    if twice := [name for name, n in Counter(t.name for t in tasks).items() if n > 1]:
        raise ValueError(f"{path}: the task {twice[0]} is there twice")
    return tasks


def read_candidates(
    folder: Path, tasks: Sequence[BenchmarkTask], most: int
) -> tuple[dict[str, list[str]], dict[str, list[bool]], int]:
    """Of each task that has a folder the first `most` CIFs, in the order of the numbers in their names; which
    are of relaxed structures, `1.relaxed.cif`; and how many more there were. Raises ValueError where a folder
    is of no task, or none is of one."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no folder; give one with a folder of CIFs for each task")
    names = [t.name for t in tasks]
    found = {p.name: p for p in sorted(folder.iterdir()) if p.is_dir()}
    if strange := [name for name in found if name not in names]:
        near = get_close_matches(strange[0], names, 1) or names[:1]
        raise ValueError(f"{folder / strange[0]}: no task has this name; one is {near[0]}")
    texts: dict[str, list[str]] = {}
    relaxed: dict[str, list[bool]] = {}
    more = 0
    for name, place in found.items():
        paths = sorted(place.glob("*.cif"), key=_in_order)
        more += max(0, len(paths) - most)
        if paths:
            texts[name] = [p.read_text(encoding="utf-8", errors="replace") for p in paths[:most]]
            relaxed[name] = [p.stem.endswith(RELAXED) for p in paths[:most]]
    if not texts:
        raise ValueError(f"{folder}: no CIFs; a task's are {folder / names[0]}/1.cif, 2.cif, …")
    return texts, relaxed, more


def _in_order(path: Path) -> list[tuple[int, str]]:
    """2.cif before 10.cif."""
    return [(int(word), "") if word.isdigit() else (-1, word) for word in re.split(r"(\d+)", path.stem)]


def write_candidates(
    folder: Path, texts: Mapping[str, Sequence[str]], relaxed: Mapping[str, Sequence[bool]]
) -> None:
    """What `read_candidates` reads."""
    for name, mine in texts.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for k, (text, known) in enumerate(zip(mine, relaxed[name], strict=True), 1):
            (folder / name / f"{k}{RELAXED if known else ''}.cif").write_text(text, encoding="utf-8")


def ideal_of(task: BenchmarkTask, n: int, seed: int, place: int) -> list[System]:
    """n random ideal slabs with a real adsorbate: `ideal_candidates` of a fixed task; of a free one each of
    another random composition that it allows. None where none can be made."""
    if not task.metals:
        return ideal_candidates(task.task, n, seed, place)
    rng = Random(hash_seed(Stream.BENCHMARK_ROWS.key(seed, place, 0)))
    open_to = [identity for identity in allowed_slabs(task) if enumerable(identity) is None]
    found: list[System] = []
    while open_to and len(found) < n:
        system = ideal_system(rng.choice(open_to), rng)
        if adsorbate_fault(system) is None:
            found.append(system)
    return found


def allowed_slabs(task: BenchmarkTask) -> list[str]:
    """Identity lines that answers may have: a fixed task's own; slabs of one metal, and of two at 3:1 and
    1:1, that a free one allows."""
    if not task.metals:
        return [task.task.identity]
    freed = [one.identity for one in free_composition(task.task, task.metals)]
    return [identity for identity in freed if _bulk(parse_identity(identity).slab) not in task.known]


def known_of(task: BenchmarkTask, train: Sequence[System], n: int, seed: int, place: int) -> list[System]:
    """n random training systems of the adsorbate on the facet, the last rule's control: none is an answer."""
    asked = parse_identity(task.task.identity)
    same = [s for s in train if (s.adsorbate, s.miller) == (asked.adsorbate, asked.miller)]
    return Random(hash_seed(Stream.BENCHMARK_ROWS.key(seed, place, 1))).choices(same, k=n) if same else []


def score(
    loop: ClosedLoop,
    tasks: Sequence[BenchmarkTask],
    texts: Mapping[str, Sequence[str]],
    relaxed: Mapping[str, Sequence[bool]],
    limits: Sequence[int],
    judge: str = "none",
    progress: bool = False,
) -> dict[str, Any]:
    """Of each kind of task: the shares of texts that fail by how, success over the numbers of predictions, by
    the loop's predictor and by a judge, and `items`, the tasks one by one. A task without texts is a miss.
    relaxed: of which texts the predictor is told that their structures are relaxed."""
    from tqdm import tqdm

    items: list[dict[str, Any]] = []
    systems: list[System | None] = []
    failed: dict[str, list[dict[str, np.ndarray]]] = {kind: [] for kind in KINDS}
    for t in tqdm(tasks, desc="score    ", unit="task", disable=not progress):
        mine = texts.get(t.name, [])
        state = TaskState(t.task, ExemplarPool(1))
        if mine:
            state.tried, scores = loop.judge([t.asked(text) for text in mine], mine, 0, relaxed[t.name])
            failed[t.kind].append(generation_failures(scores, [c.fault for c in state.tried]))
        answers, chosen = answers_of(state, limits)
        systems += chosen
        items.append(
            {
                "task": t.name,
                "identity": t.task.identity,
                "energy": t.task.energy,
                "candidates": len(mine),
                "answers": {"search": answers},
            }
        )
    if judge != "none":
        judge_answers(judge, items, systems, progress)
    judges = JUDGES if judge != "none" else JUDGES[:1]
    found: dict[str, Any] = {"version": VERSION, "tolerance": TOLERANCE, "budgets": list(limits)}
    for kind in KINDS:
        some = [item for t, item in zip(tasks, items) if t.kind == kind]
        if not some:
            continue
        parts = failed[kind]
        curve = design_curves(some, judges, TOLERANCE)["search"]
        found[kind] = {
            "tasks": len(some),
            "answered": len(parts),
            "candidates": sum(item["candidates"] for item in some),
            "failures": {
                name: float(np.concatenate([p[name] for p in parts]).mean()) if parts else float("nan")
                for name in FAILURES
            },
            **{name: curve[name] for name in judges},
        }
    return found | {"items": items}


def table(scored: Mapping[str, Mapping[str, Any]]) -> str:
    """A Markdown table of `score` by the name of each row."""
    limits = next(iter(scored.values()))["budgets"]
    judged = any("judge" in row.get(kind, {}) for row in scored.values() for kind in KINDS)
    judges = JUDGES if judged else JUDGES[:1]
    head = ["", "tasks", "answered", "CIFs", *(name.removesuffix("_0.7") for name in FAILURES)]
    head += [f"{judge}, {limit}" for judge in judges for limit in limits]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, row in scored.items():
        for kind in (k for k in KINDS if k in row):
            of = row[kind]
            cells = [name, f"{of['tasks']} {kind}", str(of["answered"]), str(of["candidates"])]
            cells += [_percent(of["failures"][failure]) for failure in FAILURES]
            for judge in judges:
                rates = of.get(judge, {})
                pairs = zip(rates.get("success", []), rates.get("interval", []))
                told = [f"{_percent(rate)} ({100 * low:.0f}-{100 * high:.0f})" for rate, (low, high) in pairs]
                cells += told or ["–"] * len(limits)
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _percent(share: float) -> str:
    return "–" if np.isnan(share) else f"{100 * share:.1f} %"
