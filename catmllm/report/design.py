"""What `catmllm design` leaves: a folder a target with the CIFs of its pool, designs.json,
and report.html over all."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from catmllm.design.search import ANALOGUE, GIVEN, Task, TaskState, make_task
from catmllm.evaluate.metrics import TOLERANCE
from catmllm.report import page as html
from catmllm.report.figures import draw_trace
from catmllm.report.summary import Table, number
from catmllm.structure.cif import read_cif, write_cif
from catmllm.structure.formula import Identity, parse_identity
from catmllm.structure.system import System
from rewards_fast import extract_cif

if TYPE_CHECKING:
    from ase.calculators.calculator import Calculator

_CARDS = 6  # structures of a pool that are drawn
CONSTRAINTS = "exact composition, no overlap, a real adsorbate"


def read_targets(path: Path) -> list[Task]:
    """Tasks of a JSONL file of {"system": …, "energy": …}, or of a CSV with these columns.

    Raises ValueError with file and line for what cannot be read.
    """
    text = path.read_text(encoding="utf-8-sig")  # of a spreadsheet
    rows: list[tuple[int, Any]] = []
    if path.suffix.lower() == ".csv":
        rows = [(k, row) for k, row in enumerate(csv.DictReader(text.splitlines()), 2)]
    else:
        for k, line in enumerate(text.splitlines(), 1):
            if line.strip():
                try:
                    rows.append((k, json.loads(line)))
                except ValueError as error:
                    raise ValueError(f"{path}:{k}: not JSON: {error}") from error
    tasks = []
    for k, row in rows:
        try:
            tasks.append(make_task(row["system"], float(row["energy"])))
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}:{k}: needs `system` and `energy`, got {row!r}") from error
        except ValueError as error:
            raise ValueError(f"{path}:{k}: {error}") from error
    if not tasks:
        raise ValueError(f"{path}: no target in it")
    return tasks


def save_designs(
    states: Sequence[TaskState], controls: Sequence[Mapping[str, tuple[System, float]]], out: Path
) -> list[dict[str, Any]]:
    """Write each pool's CIFs as out/<number>-<adsorbate>/design-<rank>.cif, and those of its controls beside
    them; the records that go into designs.json."""
    records = []
    for n, (state, ideal) in enumerate(zip(states, controls), 1):
        folder = out / f"{n:03d}-{state.task.adsorbate or 'slab'}"
        folder.mkdir(parents=True, exist_ok=True)
        pool = []
        for k, candidate in enumerate(state.pool.members, 1):
            path = folder / f"design-{k}.cif"
            path.write_text(extract_cif(candidate.text) + "\n", encoding="utf-8")
            pool.append({"file": str(path), **candidate.to_json()})
        beside = {}
        for name, (system, energy) in ideal.items():
            path = folder / f"{name}.cif"
            path.write_text(write_cif(system), encoding="utf-8")
            beside[name] = {"file": str(path), "predicted": energy}
        records.append(
            {
                "identity": state.task.identity,
                "energy": state.task.energy,
                "feasible": state.pool.feasible,
                "pool": pool,
                "controls": beside,
                "trace": state.trace,
            }
        )
    return records


def judge_designs(
    records: Sequence[dict[str, Any]], potential: str | Calculator, progress: bool = True
) -> None:
    """Relax every structure of every pool and its controls with one of `oracle.POTENTIALS`, or any of ASE's
    calculators; its energy, or why there is none, as `judged`, its name as `judge` of the record."""
    from catmllm.evaluate.judges import Judge

    judge = Judge(potential)
    for record in records:
        record["judge"] = judge.name

    entries = [(r, p) for r in records for p in (*r["pool"], *r["controls"].values())]
    systems = []
    for record, entry in entries:
        identity = parse_identity(record["identity"])
        systems.append(read_cif(Path(entry["file"]).read_text(), identity.adsorbate, identity.miller))
    for (_, entry), verdict in zip(entries, judge.judge_many(systems, progress=progress)):
        entry["judged"] = verdict.energy if verdict.ok else verdict.reason


def origin(entry: Mapping[str, Any]) -> str:
    """Where a design comes from."""
    if entry["iteration"] == GIVEN:
        return "the given structure"
    if entry["iteration"] == ANALOGUE:
        return "a training slab with its elements exchanged"
    return f"iteration {entry['iteration']}"


def hits(records: Sequence[dict[str, Any]], predictions: int, tolerance: float = TOLERANCE) -> str:
    """How many of the best designs, and of what needs no search, are near the wanted energies: by the
    potential that has judged them, else by the own predictor."""
    judged = any("judged" in p for r in records for p in r["pool"])

    def near(record: dict[str, Any], entry: dict[str, Any]) -> bool:
        energy = entry["judged" if judged else "predicted"]
        return isinstance(energy, float) and abs(energy - record["energy"]) <= tolerance + 1e-9

    count = sum(r["feasible"] and near(r, r["pool"][0]) for r in records)
    parts = [f"designs {count} of {len(records)}"]
    for name, says in _controls(predictions).items():
        some = [r for r in records if name in r["controls"]]
        if some:
            parts.append(f"{says} {sum(near(r, r['controls'][name]) for r in some)} of {len(some)}")
    if not any(r["controls"] for r in records):
        parts.append("no ideal slabs of these systems can be made to compare with")
    judge = records[0]["judge"] if judged else "the own predictor, which chose all but the random one"
    return f"Within {tolerance:g} eV of the wanted energy, by {judge}: {'; '.join(parts)}"


def _controls(predictions: int) -> dict[str, str]:
    return {"enumeration": f"best of {predictions} ideal slabs", "random": "one random ideal slab"}


def write_design_report(
    records: Sequence[dict[str, Any]], out: Path, conditions: str, predictions: int
) -> Path:
    """out/designs.json and out/report.html: the search trace over all targets, beside what `predictions`
    ideal slabs give, then every pool with pictures."""
    (out / "designs.json").write_text(json.dumps(records, indent=1))
    head = f"<h1>Designs</h1>\n<p class='conditions'>{html.text(conditions)}</p>"
    sections = [head, _overview(records, predictions)]
    sections += [_target(record) for record in records]
    path = out / "report.html"
    path.write_text(html.page("Designs", sections), encoding="utf-8")
    return path


def _overview(records: Sequence[dict[str, Any]], predictions: int) -> str:
    controls = _controls(predictions)
    rows = [
        [
            r["identity"],
            number(r["energy"], 2),
            _energies(r["pool"][0] if r["pool"] else {}),
            *(_energies(r["controls"].get(name, {})) for name in controls),
            str(len(r["pool"])),
            met(r),
        ]
        for r in records
    ]
    header = ["system", "wanted", "best of the pool", *controls.values(), "pool", "constraints met"]
    notes = [
        "Energies in eV: predicted / by the potential that judged (– where none was asked).",
        "Ideal slabs are random ones of the asked composition, unrelaxed; the best is chosen by the same "
        "predictor, from as many as the search has predicted.",
        hits(records, predictions) + ".",
    ]
    table = html.table(Table("The best of each pool, and what needs no search", header, rows, notes))
    if not any(r["trace"] for r in records):
        return html.section("Overview", table)

    def draw(figure: Figure) -> None:
        draw_trace(figure.subplots(), {"items": list(records)})

    caption = (
        "Distance from the wanted energy by the own predictor; iteration 0 is drawn from the text alone."
    )
    return html.section("Overview", table, html.figure("trace", caption, (6.4, 3.4), draw))


def met(record: dict[str, Any]) -> str:
    """Whether the best of a pool meets the hard constraints, and what is wrong with its adsorbate."""
    if not record["pool"]:
        return "nothing readable"
    return "yes" if record["feasible"] else f"no; {adsorbate(record['pool'][0])}"


def adsorbate(entry: dict[str, Any]) -> str:
    """What is to be said of a candidate's adsorbate."""
    return f"AD: {entry['fault']}" if entry["fault"] else "a real adsorbate"


def predicted(entry: dict[str, Any]) -> str:
    """A candidate's energy and, where the model knows it, how far that is expected to be off."""
    off = f" ± {entry['error']:.2f}" if entry["error"] > 0 else ""
    return f"{entry['predicted']:.3f}{off} eV"


def _energies(entry: dict[str, Any]) -> str:
    judged = entry.get("judged")
    judged = number(judged, 3) if isinstance(judged, float) else judged or "–"
    return f"{number(entry.get('predicted'), 3)} / {judged}" if entry else "–"


def _read(text: str, identity: Identity) -> System:
    return read_cif(extract_cif(text), identity.adsorbate, identity.miller)


def _target(record: dict[str, Any]) -> str:
    identity = parse_identity(record["identity"])
    cards = []
    for entry in record["pool"][:_CARDS]:
        picture = html.views(partial(_read, entry["text"], identity))
        judged = entry.get("judged")
        judged = (
            f" · {record['judge']} {judged:.3f} eV"
            if isinstance(judged, float)
            else f" · {judged}"
            if judged
            else ""
        )
        facts = (
            f"{html.text(Path(entry['file']).name)}: predicted {predicted(entry)}, "
            f"PVCP {number(entry['pvcp'], 2)}, {adsorbate(entry)}, "
            f"{origin(entry)}{html.text(judged)}"
        )
        text = html.details("CIF", html.pre(entry["text"]))
        cards.append(f'<div class="design">{picture}<p>{facts}</p>{text}</div>')
    flag = "" if record["feasible"] or not cards else (
        f'<p class="missing">None meets the hard constraints ({CONSTRAINTS}): these are the best others.</p>'
    )  # fmt: skip
    body = f'<div class="designs">{"".join(cards)}</div>' if cards else "<p>No candidate could be read.</p>"
    return html.section(f"{record['identity']} at {record['energy']:.2f} eV", flag, body)
