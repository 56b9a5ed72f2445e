"""`catmllm predict`: relaxed adsorption energies of structures in any format, of texts, and of systems
that have no structure."""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from catmllm.cli.own import reading_options, wanted
from catmllm.cli.trained import best_stage, load_to_read, model_option, must_write

if TYPE_CHECKING:
    from catmllm.config import Config
    from catmllm.data.batches import Collator
    from catmllm.data.own.reading import Item
    from catmllm.design.domain import Domain
    from catmllm.design.predict import Mode
    from catmllm.evaluate.ensemble import Ensemble, Floats
    from catmllm.models.catalytic_mllm import CatalyticMLLM
    from catmllm.structure.system import System

HELP = "relaxed adsorption energies of structures in any format, or of texts"
BATCH = 64
COLUMNS = ("file", "system", "energy", "error", "low", "high", "AD", "outside", "notes", "reference",
           "labels", "model")  # fmt: skip


def options(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Predict relaxed adsorption energies of all structures in files and folders (docs/own_data.md has "
        "the formats), of texts, and of systems that have no structure. ± holds 68 % of the errors on "
        "validation systems and is wider where the model expects more; what lies outside of the training "
        "data is marked and has none. Of a run the stage with the best validation is taken."
    )
    parser.add_argument("files", nargs="*", metavar="PATH", type=Path, help="files or folders")
    parser.add_argument(
        "--system",
        action="append",
        default=[],
        metavar="SYSTEM",
        help='a system without a structure, "CO</s>Pt9Cu3 (1 1 1)", every slab atom counted: predicted by '
        "the bonds of CIFs that the model writes for it; may come again",
    )
    parser.add_argument(
        "--candidates", type=int, default=12, metavar="N", help="CIFs for each SYSTEM (default %(default)s)"
    )
    parser.add_argument(
        "--scale",
        type=float,
        default=1.0,
        help="what covalent radii are multiplied by to find the bonds of those CIFs (default %(default)s; "
        "the paper's 4 is for models trained with relaxed_text)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of those CIFs (default %(default)s)")
    parser.add_argument(
        "--text",
        action="append",
        default=[],
        metavar="TEXT",
        help='a text alone, "CO</s>Pt3Cu (1 1 1)</s>[C Pt atop [Pt Cu Pt C]]", its third part where it is '
        "known; may come again",
    )
    model_option(parser, "stage with the best validation")
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
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="also write the predictions: .csv and .jsonl a row each, .extxyz the structures with them",
    )


def run(args: argparse.Namespace) -> int:
    from catmllm.data.own.reading import Found, read_systems
    from catmllm.design.domain import load_domain
    from catmllm.evaluate.ensemble import load_ensemble
    from catmllm.evaluate.property import agreement

    if not (args.files or args.system or args.text):
        raise ValueError("give files or folders, or --system or --text")
    _writable(args)
    folder = best_stage(args.model)
    model, collate, config = load_to_read(folder)
    domain, of_texts = load_domain(folder), load_ensemble(folder)
    asked = _asked(args, folder, config)
    found = read_systems(args.files, wanted(args, labelled=False)) if args.files else Found()
    for reason, n in found.refused.items():
        for example in found.examples[reason]:
            print(example, file=sys.stderr)
        if more := n - len(found.examples[reason]):
            print(f"and {more:,} more refused: {reason}", file=sys.stderr)
    for note in found.notes:
        print(f"note: {note}", file=sys.stderr)
    found.items += _texts(args.text, of_texts is not None)
    mode: Mode = "text" if of_texts is not None else args.mode
    for item in found.items:
        item.system = replace(item.system, relaxed=not args.unrelaxed)
    items, (energies, errors) = _energies(model, collate, found.items, mode)
    if of_texts is not None:
        energies = of_texts.mean([item.system for item in items], energies)
    failed = len(found.items) - len(items) + found.refused.total()
    rows: list[dict[str, Any]] = []
    for item, energy, error in zip(items, energies.tolist(), errors.tolist()):
        # errors on validation are of what the model was shown there
        shown = mode == "both" and item.system.text is None
        told = domain is not None and (of_texts is not None or shown)
        width = (
            domain.half_width(item.system.adsorbate, item.system.relaxed, error) if domain and told else None
        )
        rows.append(row := _row(item, energy, width, folder, domain))
        print(json.dumps(row) if args.json else _line(row))
    unread, said = _without_structures(args, asked, model, collate, config, folder, domain)
    failed += unread
    if args.out is not None:
        _write(args.out, [*rows, *said], [item.system for item in items])
    print(_conditions(folder, domain, of_texts), file=sys.stderr)
    known = [k for k, item in enumerate(items) if item.system.energy is not None]
    if len(known) > 1:
        truth = [items[k].system.known_energy for k in known]
        words = agreement(energies[known], truth, [items[k].system.adsorbate for k in known])
        print(f"against the energies in the files: {words}", file=sys.stderr)
    return 1 if failed else 0


def _texts(texts: Sequence[str], any_words: bool) -> list[Item]:
    """The texts of --text. A model of structures reads those that name a system, one of texts any words.
    Raises ValueError."""
    from catmllm.data.own.reading import Item
    from catmllm.structure.system import text_system

    items = []
    for text in texts:
        system = text_system(text, sid="--text")
        if not any_words and not (system.adsorbate and system.slab_counts):
            raise ValueError(
                f"--text {text[:80]!r} names no system; write it like 'CO</s>Pt3Cu (1 1 1)', or with the "
                "bonds behind it 'CO</s>Pt3Cu (1 1 1)</s>[C Pt atop [Pt Cu Pt C]]'"
            )
        items.append(Item(system, "--text"))
    return items


def _asked(args: argparse.Namespace, folder: Path, config: Config) -> list[tuple[str, dict[str, int]]]:
    """Identity lines and counts of the cells of --system. Raises ValueError."""
    from catmllm.structure.formula import cell_counts, format_identity, parse_identity

    if not args.system:
        return []
    must_write(folder, config)
    if args.candidates < 1 or not args.scale > 0:
        raise ValueError(f"--candidates {args.candidates} --scale {args.scale:g}: both must be above 0")
    asked = []
    for line in args.system:
        named = parse_identity(line)
        if not (named.adsorbate and named.slab):
            raise ValueError(f"--system {line!r} names no system; write it like 'CO</s>Pt9Cu3 (1 1 1)'")
        asked.append((format_identity(*named), cell_counts(named)))
    return asked


def _without_structures(
    args: argparse.Namespace,
    asked: Sequence[tuple[str, dict[str, int]]],
    model: CatalyticMLLM,
    collate: Collator,
    config: Config,
    folder: Path,
    domain: Domain | None,
) -> tuple[int, list[dict[str, Any]]]:
    """Print what the model says of systems by two parts and by the bonds of CIFs that it writes: a line for
    different bonds, and their mean and range. Returns for how many systems no CIF could be read, and what
    was said of each."""
    from catmllm.design.indicative import CHARACTERS, indicated, indicative_systems
    from catmllm.design.predict import predict_energies, question
    from catmllm.seeds import Stream
    from catmllm.structure.system import text_system
    from catmllm.structure.text import two_part_text

    if not asked:
        return 0, []
    seed = Stream.COMMAND_INDICATIVE.key(args.seed)
    written = indicative_systems(model, collate, asked, args.candidates, config.evaluate.sampling, seed)
    if not (config.joint.drop_configuration or config.instruct.drop_configuration):
        print("note: this model was not trained on two parts alone (drop_configuration)", file=sys.stderr)
    cap = CHARACTERS if args.scale > 1 else None
    failed, said = 0, []
    for (line, _), systems in zip(asked, written):
        bare = two_part_text(text_system(line))
        read = [indicated(bare, s, args.scale, cap) for s in systems if s is not None]
        times = Counter(s.text for s in read)
        texts = list({s.text: s for s in read}.values())
        alone, *energies = predict_energies(
            model, collate, [question(s) for s in (text_system(bare), *texts)]
        ).tolist()
        failed += not texts
        of_text = {str(s.text): e for s, e in zip(texts, energies)}
        outside = [] if domain is None else domain.outside(text_system(bare))
        found = {"system": line, "two_parts": alone, "candidates": args.candidates, "read": len(read),
                 "outside": outside, "model": str(folder)}  # fmt: skip
        if read:
            every = np.repeat(energies, [times[s.text] for s in texts])
            found |= {"energy": float(every.mean()), "low": float(every.min()), "high": float(every.max())}
        found["texts"] = [{"text": text, "energy": e, "times": times[text]} for text, e in of_text.items()]
        said.append(found)
        if args.json:
            print(json.dumps(found))
            continue
        print(f"{alone:9.3f}        eV  {line:32s} two parts alone")
        for text, energy in sorted(of_text.items(), key=lambda pair: pair[1]):
            bonds = text.rpartition("</s>")[2]
            print(f"{energy:9.3f}        eV  {line:32s} {times[text]} of {args.candidates} CIFs: {bonds}")
        warning = f"  OUTSIDE of training: {'; '.join(outside)}" if outside else ""
        if read:
            spread = f"{found['low']:.3f} to {found['high']:.3f} eV by {len(read)} CIFs"
            print(f"{found['energy']:9.3f}        eV  {line:32s} their mean; {spread}{warning}")
        else:
            print(f"{line}: none of {args.candidates} CIFs could be read{warning}", file=sys.stderr)
    return failed, said


def _row(
    item: Item, energy: float, width: float | None, folder: Path, domain: Domain | None
) -> dict[str, Any]:
    """What is said of one structure; width: the error of such predictions, where it is known."""
    from catmllm.structure.adsorbed import adsorbate_fault

    system = item.system
    fault = None if system.text is not None else adsorbate_fault(system)
    outside = [] if domain is None else domain.outside(system)
    if outside or fault:
        width = None
    return {"file": system.sid, "system": system.identity, "energy": energy, "error": width, "AD": fault,
            "outside": outside, "notes": item.marks, "reference": domain and domain.reference,
            "labels": domain and domain.labels, "model": str(folder)}  # fmt: skip


def _line(row: dict[str, Any]) -> str:
    """A row as people read it."""
    spread = "      " if row["error"] is None else f"±{row['error']:5.2f}"
    warning = f"  AD: {row['AD']}, so no adsorption energy" if row["AD"] else ""
    warning += f"  OUTSIDE of training: {'; '.join(row['outside'])}" if row["outside"] else ""
    return f"{row['energy']:9.3f} {spread} eV  {row['system']:32s} {row['file']}{warning}"


def _writable(args: argparse.Namespace) -> None:
    """Refuse a file that could not be written in the end, before a model is loaded. Raises ValueError."""
    if args.out is None:
        return
    if args.out.suffix not in (".csv", ".jsonl", ".extxyz"):
        raise ValueError(f"--out {args.out}: give a file that ends in .csv, .jsonl or .extxyz")
    if args.out.suffix == ".extxyz" and (args.system or args.text):
        raise ValueError(f"--out {args.out}: what has no structure goes into .csv or .jsonl only")
    if not args.out.parent.is_dir():
        raise ValueError(f"--out {args.out}: there is no folder {args.out.parent}")


def _write(path: Path, rows: Sequence[dict[str, Any]], systems: Sequence[System]) -> None:
    """The predictions as a file; of .extxyz, each structure with what is said of it. In .csv several words of
    a column stand behind one another, and the texts of --system are left to .jsonl."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, COLUMNS)
            table.writeheader()
            for row in rows:
                said = {key: row.get(key) for key in COLUMNS}
                table.writerow({k: "; ".join(v) if isinstance(v, list) else v for k, v in said.items()})
        return
    import ase.io

    frames = [system.as_ase() for system in systems]
    for frame, system, row in zip(frames, systems, rows):
        frame.info["adsorbate"] = system.adsorbate
        told = {"predicted_energy": row["energy"], "predicted_error": row["error"], "AD": row["AD"],
                "outside": "; ".join(row["outside"]) or None, "file": row["file"]}  # fmt: skip
        frame.info |= {key: value for key, value in told.items() if value is not None}
    ase.io.write(path, frames, format="extxyz")


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
