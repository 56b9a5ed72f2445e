"""`catmllm predict`: relaxed adsorption energies of CIF files."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from catmllm.cli.trained import load, model_option

if TYPE_CHECKING:
    from catmllm.structure.system import System


HELP = "relaxed adsorption energies of CIF files"


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE.cif", help="one adsorption system each")
    model_option(parser)
    parser.add_argument(
        "--adsorbate", help="its formula, where the data_ line does not name it (data_CO</s>Pt9Cu3 (1 1 1))"
    )
    parser.add_argument("--miller", nargs=3, type=int, metavar=("H", "K", "L"), help="likewise")
    parser.add_argument(
        "--mode", choices=("both", "graph", "text"), default="both", help="what the model sees"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a file instead of a table")


def run(args: argparse.Namespace) -> int:
    from catmllm.design.predict import predict_energies, question
    from catmllm.structure.adsorbed import adsorbate_fault
    from catmllm.structure.cif import read_cif

    model, collate, _ = load(args.model)
    read: list[tuple[str, System]] = []
    failed = 0
    for name in args.files:
        try:
            text = Path(name).read_text(encoding="utf-8")
            miller = None if args.miller is None else (args.miller[0], args.miller[1], args.miller[2])
            system = read_cif(text, args.adsorbate, miller)
            system.known_miller  # noqa: B018  the text needs it: say so here, by file
            collate.graphs([system])
            read.append((name, system))
        except (OSError, ValueError) as error:
            failed += 1
            print(f"{name}: {error}", file=sys.stderr)
    energies = predict_energies(model, collate, [question(s, args.mode) for _, s in read])
    for (name, system), energy in zip(read, energies.tolist()):
        fault = adsorbate_fault(system)
        if args.json:
            print(json.dumps({"file": name, "system": system.identity, "energy": energy, "AD": fault}))
        else:
            warning = f"  AD: {fault}, so no adsorption energy" if fault else ""
            print(f"{energy:9.3f} eV  {system.identity:32s} {name}{warning}")
    return 1 if failed else 0
