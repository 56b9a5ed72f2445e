"""`catmllm predict`: relaxed adsorption energies of structures in any format."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from catmllm.cli.own import reading_options, wanted
from catmllm.cli.trained import best_stage, load_to_read, model_option

if TYPE_CHECKING:
    from catmllm.data.batches import Collator
    from catmllm.data.own.reading import Item
    from catmllm.design.domain import Domain


HELP = "relaxed adsorption energies of structures in any format"


def options(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Predict relaxed adsorption energies of all structures in files and folders (docs/own_data.md has "
        "the formats). ± holds 68 % of the errors on validation systems; what lies outside of the training "
        "data is marked and has none. Of a run the stage with the best validation is taken."
    )
    parser.add_argument("files", nargs="+", metavar="PATH", type=Path, help="files or folders")
    model_option(parser)
    reading_options(parser)
    parser.add_argument(
        "--mode", choices=("both", "graph", "text"), default="both", help="what the model sees"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a structure instead of a table")


def run(args: argparse.Namespace) -> int:
    from catmllm.data.own.reading import read_systems
    from catmllm.design.domain import load_domain
    from catmllm.design.predict import predict_energies, question
    from catmllm.evaluate.property import agreement
    from catmllm.structure.adsorbed import adsorbate_fault

    folder = best_stage(args.model)
    model, collate = load_to_read(folder)
    domain = load_domain(folder)
    found = read_systems(args.files, wanted(args, labelled=False))
    for reason, n in found.refused.items():
        for example in found.examples[reason]:
            print(example, file=sys.stderr)
        if more := n - len(found.examples[reason]):
            print(f"and {more:,} more refused: {reason}", file=sys.stderr)
    for note in found.notes:
        print(f"note: {note}", file=sys.stderr)
    items, failed = _with_graph(found.items, collate)
    failed += found.refused.total()
    energies = predict_energies(model, collate, [question(i.system, args.mode) for i in items])
    for item, energy in zip(items, energies.tolist()):
        fault = adsorbate_fault(item.system)
        outside = [] if domain is None else domain.outside(item.system)
        width = None if domain is None or outside or fault else domain.half_width(item.system.adsorbate)
        if args.json:
            row = {"file": item.system.sid, "system": item.system.identity, "energy": energy, "error": width,
                   "AD": fault, "outside": outside, "notes": item.marks,
                   "reference": domain and domain.reference, "labels": domain and domain.labels,
                   "model": str(folder)}  # fmt: skip
            print(json.dumps(row))
            continue
        spread = "      " if width is None else f"±{width:5.2f}"
        warning = f"  AD: {fault}, so no adsorption energy" if fault else ""
        warning += f"  OUTSIDE of training: {'; '.join(outside)}" if outside else ""
        print(f"{energy:9.3f} {spread} eV  {item.system.identity:32s} {item.system.sid}{warning}")
    print(_conditions(folder, domain), file=sys.stderr)
    known = [k for k, item in enumerate(items) if item.system.energy is not None]
    if len(known) > 1:
        truth = [items[k].system.known_energy for k in known]
        words = agreement(energies[known], truth, [items[k].system.adsorbate for k in known])
        print(f"against the energies in the files: {words}", file=sys.stderr)
    return 1 if failed else 0


def _with_graph(items: list[Item], collate: Collator) -> tuple[list[Item], int]:
    """The items whose graphs can be made, and the number of the others, which are told."""
    kept, failed = [], 0
    for k in range(0, len(items), 64):
        some = items[k : k + 64]
        try:
            collate.graphs([item.system for item in some])
            kept += some
        except ValueError:  # of one of them
            for item in some:
                try:
                    collate.graphs([item.system])
                    kept.append(item)
                except ValueError as error:
                    failed += 1
                    print(f"{item.system.sid}: {error}", file=sys.stderr)
    return kept, failed


def _conditions(folder: Path, domain: Domain | None) -> str:
    if domain is None:
        return (
            f"{folder}: it says nothing of its training data (`catmllm evaluate RUN` writes it), so nothing "
            "was checked against it"
        )
    error = ""
    if domain.validation:
        error = f"; MAE {domain.validation['mae']:.3f} eV on {domain.validation['n']:.0f} validation systems"
    zero = domain.reference or "not said by the training data"
    return f"{folder}: adsorption energies, zero: {zero}; labels: {domain.labels or 'not said'}{error}"
