"""What `catmllm design` leaves: a folder a target with the CIFs of its pool, designs.json,
and report.html over all."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from catmllm.design.search import Task, TaskState
from catmllm.report import page as html
from catmllm.report.figures import draw_trace
from catmllm.report.summary import Table, number
from catmllm.structure.cif import read_cif
from catmllm.structure.formula import Identity, format_identity, parse_formula, parse_identity
from catmllm.structure.system import System
from rewards_fast import extract_cif

_CARDS = 6  # structures of a pool that are drawn
CONSTRAINTS = "exact composition, no overlap, a real adsorbate"


def make_task(identity: str, energy: float) -> Task:
    """The task of an identity line: its target is slab and adsorbate together.
    Raises ValueError for what is no such line."""
    parsed = parse_identity(identity)
    target = dict(parsed.slab)
    for symbol, count in parse_formula(parsed.adsorbate).items():
        target[symbol] = target.get(symbol, 0) + count
    return Task(format_identity(*parsed), target, energy)


def read_targets(path: Path) -> list[Task]:
    """Tasks of a JSONL file of {"system": …, "energy": …}, or of a CSV with these columns.

    Raises ValueError with file and line for what cannot be read.
    """
    text = path.read_text(encoding="utf-8")
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


def save_designs(states: Sequence[TaskState], out: Path) -> list[dict[str, Any]]:
    """Write each pool's CIFs as out/<number>-<adsorbate>/design-<rank>.cif;
    the records that go into designs.json."""
    records = []
    for n, state in enumerate(states, 1):
        folder = out / f"{n:03d}-{state.task.adsorbate or 'slab'}"
        folder.mkdir(parents=True, exist_ok=True)
        pool = []
        for k, candidate in enumerate(state.pool.members, 1):
            path = folder / f"design-{k}.cif"
            path.write_text(extract_cif(candidate.text) + "\n", encoding="utf-8")
            pool.append({"file": str(path), **candidate.to_json()})
        records.append(
            {
                "identity": state.task.identity,
                "energy": state.task.energy,
                "feasible": state.pool.feasible,
                "pool": pool,
                "trace": state.trace,
            }
        )
    return records


def judge_designs(records: Sequence[dict[str, Any]], progress: bool = True) -> None:
    """Relax every structure of every pool with SevenNet-0; its energy, or why there is none,
    as `sevennet`."""
    from catmllm.evaluate.judges import SevenNetJudge

    entries = [(r, p) for r in records for p in r["pool"]]
    systems = []
    for record, entry in entries:
        identity = parse_identity(record["identity"])
        systems.append(read_cif(Path(entry["file"]).read_text(), identity.adsorbate, identity.miller))
    for (_, entry), verdict in zip(entries, SevenNetJudge().judge_many(systems, progress=progress)):
        entry["sevennet"] = verdict.energy if verdict.ok else verdict.reason


def write_design_report(records: Sequence[dict[str, Any]], out: Path, conditions: str) -> Path:
    """out/designs.json and out/report.html: the search trace over all targets,
    then every pool with pictures."""
    (out / "designs.json").write_text(json.dumps(records, indent=1))
    sections = [f"<h1>Designs</h1>\n<p class='conditions'>{html.text(conditions)}</p>", _overview(records)]
    sections += [_target(record) for record in records]
    path = out / "report.html"
    path.write_text(html.page("Designs", sections), encoding="utf-8")
    return path


def _overview(records: Sequence[dict[str, Any]]) -> str:
    rows = []
    for r in records:
        best = r["pool"][0] if r["pool"] else {}
        judged = best.get("sevennet", "–")
        rows.append(
            [
                r["identity"],
                number(r["energy"], 2),
                number(best.get("predicted"), 3),
                number(judged, 3) if isinstance(judged, float) else str(judged),
                str(len(r["pool"])),
                met(r),
            ]
        )
    header = ["system", "wanted (eV)", "predicted (eV)", "SevenNet-0 (eV)", "pool", "constraints met"]
    table = html.table(Table("The best of each pool", header, rows, []))
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


def _read(text: str, identity: Identity) -> System:
    return read_cif(extract_cif(text), identity.adsorbate, identity.miller)


def _target(record: dict[str, Any]) -> str:
    identity = parse_identity(record["identity"])
    cards = []
    for entry in record["pool"][:_CARDS]:
        picture = html.views(partial(_read, entry["text"], identity))
        judged = entry.get("sevennet")
        judged = (
            f" · SevenNet-0 {judged:.3f} eV"
            if isinstance(judged, float)
            else f" · {judged}"
            if judged
            else ""
        )
        facts = (
            f"{html.text(Path(entry['file']).name)}: predicted {number(entry['predicted'], 3)} eV, "
            f"PVCP {number(entry['pvcp'], 2)}, {adsorbate(entry)}, "
            f"iteration {entry['iteration']}{html.text(judged)}"
        )
        text = html.details("CIF", html.pre(entry["text"]))
        cards.append(f'<div class="design">{picture}<p>{facts}</p>{text}</div>')
    flag = "" if record["feasible"] or not cards else (
        f'<p class="missing">None meets the hard constraints ({CONSTRAINTS}): these are the best others.</p>'
    )  # fmt: skip
    body = f'<div class="designs">{"".join(cards)}</div>' if cards else "<p>No candidate could be read.</p>"
    return html.section(f"{record['identity']} at {record['energy']:.2f} eV", flag, body)
