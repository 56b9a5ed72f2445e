"""What the scripts of report.html read: every system, answer and curve of a run, packed for one page.

Structures are whole numbers (0.01 Å) in one list, each once. All goes through gzip and base64, which no text
of a model can end or break out of; report.js sets text as text.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from catmllm.design.reward import TERMS
from catmllm.evaluate.metrics import TOLERANCE
from catmllm.report.drawing import MAX_ATOMS, unbroken
from catmllm.report.figures import ADSORBATE_COLOURS, JUDGE_COLOURS, LOSSES, PROGRESS, STAGE_COLOURS
from catmllm.report.page import clean
from catmllm.report.summary import STAGE_NAMES, Metrics, finite, judge_title, last_judge, ordered
from catmllm.structure.cif import system_from_crystal
from catmllm.structure.elements import COLOUR, COVALENT_RADIUS, NUMBER, SYMBOLS
from catmllm.structure.formula import SEPARATOR, parse_identity
from catmllm.structure.system import ADSORBATE, BULK, System, make_system
from rewards_fast import PVCP, Crystal

SCRIPTS = tuple(
    Path(__file__).with_name(f"{name}.js").read_text(encoding="utf-8")
    for name in ("3Dmol-min", "elements", "structures", "plots", "tables", "report")
)
_ATOMS = 150_000  # that a page holds: about a megabyte
_ANSWERS = 512  # of a stage and way of sampling
_TEXT = 6000  # characters of an answer


class Structures:
    """The structures of a page by their number in `packed`; None for what has none or is too much."""

    def __init__(self) -> None:
        self.packed: list[dict[str, Any]] = []
        self._known: dict[str, int] = {}
        self._left = _ATOMS

    def add(self, system: System | None) -> int | None:
        if system is None or system.text is not None or len(system) > MAX_ATOMS:
            return None
        found = _packed(system)
        key = json.dumps(found)
        if key not in self._known:
            if len(system) > self._left:
                return None
            self._left -= len(system)
            self._known[key] = len(self.packed)
            self.packed.append(found)
        return self._known[key]

    def elements(self) -> dict[str, dict[str, Any]]:
        """Colour and covalent radius (Å) of every element that occurs."""
        symbols = {symbol for one in self.packed for symbol in one["e"][::2]}
        return {
            s: {"c": COLOUR[NUMBER[s]], "r": round(float(COVALENT_RADIUS[NUMBER[s]]), 3)}
            for s in sorted(symbols)
        }


def records(
    metrics: Metrics,
    logs: dict[str, list[dict[str, Any]]],
    tested: Sequence[System],
    answers: dict[str, list[dict[str, Any]]],
) -> dict[str, Any]:
    """Everything that the page shows live, by part; parts without content are left out.

    tested: the systems of metrics["property"], in that order, or none. answers: rows of `answers.jsonl` by
    stage.
    """
    structures = Structures()
    parts = {
        "tasks": _tasks(metrics, structures),
        "answers": _answers(answers, structures),
        "parity": _parity(metrics, tested, structures),
        "training": _training(logs),
    }
    found = {name: part for name, part in parts.items() if part}
    if found:
        found |= {"structures": structures.packed, "elements": structures.elements()}
    return found


def encoded(content: dict[str, Any]) -> str:
    """Records as base64 of gzip; numbers that JSON has not become null, texts are `clean`."""
    text = json.dumps(_plain(content), separators=(",", ":"), allow_nan=False)
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode("ascii")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {clean(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, str):
        return clean(value)
    return value if value is None or isinstance(value, bool) or finite(value) else None


def drawable(texts: Sequence[str], identities: Sequence[str]) -> list[System | None]:
    """The structure of each text [n], read as the answer for its identity [n]; without an adsorbate where
    that cannot be told from the slab; None for a text that holds no cell of whole atoms."""
    found = []
    for crystal, identity in zip(PVCP().score(list(texts), [""] * len(texts)).crystals, identities):
        found.append(None if crystal is None else _system(crystal, identity))
    return found


def _system(crystal: Crystal, identity: str) -> System | None:
    try:
        asked = parse_identity(identity)
        return system_from_crystal(crystal, asked.adsorbate, asked.miller)
    except ValueError:
        pass
    tags = np.full(len(crystal.numbers), BULK)
    try:
        return make_system(crystal.lattice, None, crystal.numbers, tags, "", None, frac=crystal.frac)
    except ValueError:
        return None


def _packed(system: System) -> dict[str, Any]:
    symbols: list[Any] = []
    for z in system.numbers.tolist():
        if symbols and symbols[-2] == SYMBOLS[z]:
            symbols[-1] += 1
        else:
            symbols += [SYMBOLS[z], 1]
    return {
        "l": np.rint(1000 * system.lattice).astype(int).ravel().tolist(),
        "e": symbols,
        "a": np.flatnonzero(system.tags == ADSORBATE).tolist(),
        "x": np.rint(100 * unbroken(system)).astype(int).ravel().tolist(),
    }


def _named(identity: str) -> dict[str, Any]:
    """A system by name, and what the filters ask for."""
    name = identity.replace(SEPARATOR, " on ")[:120]
    try:
        asked = parse_identity(identity)
    except ValueError:
        return {"name": name, "adsorbate": "", "metals": []}
    return {"name": name, "adsorbate": asked.adsorbate, "metals": list(asked.slab)}


# --------------------------------------------------------------------------- parts


def _parity(metrics: Metrics, tested: Sequence[System], structures: Structures) -> dict[str, Any] | None:
    """Predictions after every stage. Names and structures only where the systems given are those measured."""
    stages = [s for s in ordered(metrics.get("property")) if metrics["property"][s].get("parity")]
    if not stages:
        return None
    first = metrics["property"][stages[-1]]["parity"]
    energy, adsorbates = first["energy"], first.get("adsorbate") or [""] * len(first["energy"])
    same = len(tested) == len(energy) and np.allclose([s.known_energy for s in tested], energy, atol=1e-4)
    systems = [
        {**_named(s.identity), "structure": structures.add(s)}
        if s is not None
        else {"name": str(a), "adsorbate": str(a), "metals": []}
        for s, a in zip(tested if same else [None] * len(energy), adsorbates)
    ]
    names = sorted({str(s["adsorbate"]) for s in systems})
    return {
        "systems": systems,
        "energy": energy,
        "colours": {name: ADSORBATE_COLOURS[k % len(ADSORBATE_COLOURS)] for k, name in enumerate(names)},
        "stages": [
            {"name": STAGE_NAMES[s], "predicted": metrics["property"][s]["parity"]["predicted"]}
            for s in stages
            if len(metrics["property"][s]["parity"]["predicted"]) == len(energy)
        ],
    }


def _tasks(metrics: Metrics, structures: Structures) -> dict[str, Any] | None:
    design = metrics.get("design") or {}
    items = design.get("items") or []
    if not items:
        return None
    texts = [str((item.get("best") or {}).get("text") or "") for item in items]
    systems = drawable(texts, [str(item["identity"]) for item in items])
    rows = []
    for item, text, system in zip(items, texts, systems):
        best, judged = item.get("best") or {}, item.get("judged")
        rows.append(
            {
                **_named(str(item["identity"])),
                "energy": item["energy"],
                "predicted": best.get("predicted"),
                "judged": judged.get("energy") if judged and judged.get("ok") else None,
                "outcome": _outcome(item),
                "why": str((judged or {}).get("reason") or best.get("fault") or ""),
                "structure": structures.add(system),
                "text": text[:_TEXT],
                "trace": [
                    [_off(row.get("best_predicted"), item["energy"]), row.get("mean_error")]
                    for row in item.get("trace") or []
                ],
            }
        )
    return {
        "rows": rows,
        "judge": judge_title(design, "judge") if last_judge(design) == "judge" else "",
        "tolerance": design.get("tolerance", TOLERANCE),
        "colour": JUDGE_COLOURS["own"],
    }


def _outcome(item: dict[str, Any]) -> str:
    judged = item.get("judged")
    if not item.get("best"):
        return "no readable answer"
    if judged and not judged.get("ok"):
        return "refused"
    return "hit" if item.get("success_judge" if judged else "success_own") else "missed"


def _off(predicted: Any, target: float) -> float | None:
    return abs(predicted - target) if finite(predicted) else None


def _answers(answers: dict[str, list[dict[str, Any]]], structures: Structures) -> dict[str, Any] | None:
    rows: list[list[Any]] = []
    systems: dict[str, int] = {}
    for stage in ordered(answers):
        for free in (False, True):
            some = [row for row in answers[stage] if bool(row.get("free")) == free][:_ANSWERS]
            texts, identities = [str(r["text"]) for r in some], [str(r["identity"]) for r in some]
            for row, text, system in zip(some, texts, drawable(texts, identities)):
                number = systems.setdefault(str(row["identity"]), len(systems))
                what = [STAGE_NAMES[stage], free, number, row.get("energy"), row.get("reward")]
                what += [row.get(term) for term in TERMS]
                what += [row.get("reason"), row.get("fault"), structures.add(system), text[:_TEXT]]
                rows.append(what)
    if not rows:
        return None
    return {"terms": list(TERMS), "systems": [_named(name) for name in systems], "rows": rows}


def _training(logs: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Every number of every stage's log over its steps."""
    return [
        {
            "name": STAGE_NAMES[stage],
            "colour": STAGE_COLOURS[stage],
            "curves": [_curve(key, stage, logs[stage]) for key in _keys(stage, logs[stage])],
        }
        for stage in ordered(logs)
    ]


def _keys(stage: str, rows: Iterable[dict[str, Any]]) -> list[str]:
    """Loss and progress first, then the rest in the order of the log."""
    seen = dict.fromkeys(key for row in rows for key, value in row.items() if finite(value) and key != "step")
    first = [key for key in ("loss", PROGRESS[stage][0]) if key in seen]
    return first + [key for key in seen if key not in first]


def _curve(key: str, stage: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    titles = {"loss": LOSSES[stage], PROGRESS[stage][0]: PROGRESS[stage][1]}
    points = [(row["step"], row[key]) for row in rows if finite(row.get(key)) and finite(row.get("step"))]
    return {
        "key": key,
        "title": titles.get(key, key.replace("_", " ")),
        "steps": [step for step, _ in points],
        "values": [float(f"{value:.5g}") for _, value in points],
    }
