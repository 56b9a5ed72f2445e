"""`catmllm predict`: relaxed adsorption energies of structures in any format."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from catmllm.cli.own import reading_options, wanted
from catmllm.cli.trained import best_stage, load_to_read, model_option

if TYPE_CHECKING:
    from catmllm.data.batches import Collator
    from catmllm.data.own.reading import Item
    from catmllm.design.domain import Domain
    from catmllm.design.predict import Mode
    from catmllm.evaluate.ensemble import Ensemble, Floats
    from catmllm.models.catalytic_mllm import CatalyticMLLM

HELP = "relaxed adsorption energies of structures in any format, or of texts"
BATCH = 64


def options(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Predict relaxed adsorption energies of all structures in files and folders (docs/own_data.md has "
        "the formats). ± holds 68 % of the errors on validation systems and is wider where the model expects "
        "more; what lies outside of the training data is marked and has none. Of a run the stage with the "
        "best validation is taken."
    )
    parser.add_argument("files", nargs="+", metavar="PATH", type=Path, help="files or folders")
    model_option(parser)
    reading_options(parser)
    parser.add_argument(
        "--mode",
        choices=("both", "graph", "text"),
        default="both",
        help="what the model sees; of a text without a structure, and by a model of texts, always the text",
    )
    parser.add_argument(
        "--unrelaxed",
        action="store_true",
        help="the structures are guesses: predict what they relax to; else they are taken as relaxed",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a structure instead of a table")


def run(args: argparse.Namespace) -> int:
    from catmllm.data.own.reading import read_systems
    from catmllm.design.domain import load_domain
    from catmllm.evaluate.ensemble import load_ensemble
    from catmllm.evaluate.property import agreement

    folder = best_stage(args.model)
    model, collate = load_to_read(folder)
    domain, of_texts = load_domain(folder), load_ensemble(folder)
    found = read_systems(args.files, wanted(args, labelled=False))
    for reason, n in found.refused.items():
        for example in found.examples[reason]:
            print(example, file=sys.stderr)
        if more := n - len(found.examples[reason]):
            print(f"and {more:,} more refused: {reason}", file=sys.stderr)
    for note in found.notes:
        print(f"note: {note}", file=sys.stderr)
    mode: Mode = "text" if of_texts is not None else args.mode
    for item in found.items:
        item.system = replace(item.system, relaxed=not args.unrelaxed)
    items, (energies, errors) = _energies(model, collate, found.items, mode)
    if of_texts is not None:
        energies = of_texts.mean([item.system for item in items], energies)
    failed = len(found.items) - len(items) + found.refused.total()
    for item, energy, error in zip(items, energies.tolist(), errors.tolist()):
        # errors on validation are of what the model was shown there
        shown = mode == "both" and item.system.text is None
        told = domain is not None and (of_texts is not None or shown)
        width = (
            domain.half_width(item.system.adsorbate, item.system.relaxed, error) if domain and told else None
        )
        print(_line(item, energy, width, folder, domain, args.json))
    print(_conditions(folder, domain, of_texts), file=sys.stderr)
    known = [k for k, item in enumerate(items) if item.system.energy is not None]
    if len(known) > 1:
        truth = [items[k].system.known_energy for k in known]
        words = agreement(energies[known], truth, [items[k].system.adsorbate for k in known])
        print(f"against the energies in the files: {words}", file=sys.stderr)
    return 1 if failed else 0


def _line(
    item: Item, energy: float, width: float | None, folder: Path, domain: Domain | None, as_json: bool
) -> str:
    """What is said of one structure; width: the error of such predictions, where it is known."""
    from catmllm.structure.adsorbed import adsorbate_fault

    system = item.system
    fault = None if system.text is not None else adsorbate_fault(system)
    outside = [] if domain is None else domain.outside(system)
    if outside or fault:
        width = None
    if as_json:
        row = {"file": system.sid, "system": system.identity, "energy": energy, "error": width, "AD": fault,
               "outside": outside, "notes": item.marks, "reference": domain and domain.reference,
               "labels": domain and domain.labels, "model": str(folder)}  # fmt: skip
        return json.dumps(row)
    spread = "      " if width is None else f"±{width:5.2f}"
    warning = f"  AD: {fault}, so no adsorption energy" if fault else ""
    warning += f"  OUTSIDE of training: {'; '.join(outside)}" if outside else ""
    return f"{energy:9.3f} {spread} eV  {system.identity:32s} {system.sid}{warning}"


def _energies(
    model: CatalyticMLLM, collate: Collator, items: list[Item], mode: Mode
) -> tuple[list[Item], Floats]:
    """The items whose graphs can be made, and [2, n] their energies and the errors that the model expects
    (eV); the others are told."""
    from catmllm.design.predict import energies_and_errors, question

    kept: list[Item] = []
    parts: list[Floats] = [np.zeros((2, 0))]
    groups = [items[k : k + BATCH] for k in range(0, len(items), BATCH)]
    while groups:
        some = groups.pop(0)
        try:
            said = energies_and_errors(model, collate, [question(i.system, mode) for i in some], BATCH)
            parts.append(np.stack(said))
            kept += some
        except ValueError as error:
            if len(some) > 1:  # of one of them
                groups[:0] = [[item] for item in some]
            else:
                print(f"{some[0].system.sid}: {error}", file=sys.stderr)
    return kept, np.concatenate(parts, axis=1)


def _conditions(folder: Path, domain: Domain | None, of_texts: Ensemble | None) -> str:
    if domain is None:
        return (
            f"{folder}: it says nothing of its training data (`catmllm evaluate RUN` writes it), so nothing "
            "was checked against it"
        )
    error = ""
    if domain.validation:
        error = f"; MAE {domain.validation['mae']:.3f} eV on {domain.validation['n']:.0f} validation systems"
    zero = domain.reference or "not said by the training data"
    how = (
        ""
        if of_texts is None
        else f" of texts, {of_texts.share:.0%} the model's, the rest ridge regression's"
    )
    return f"{folder}: adsorption energies{how}, zero: {zero}; labels: {domain.labels or 'not said'}{error}"
