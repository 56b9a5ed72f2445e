"""`catmllm design`: CIFs of a system at a wanted energy, by the closed loop of design and refinement."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from catmllm.cli.trained import load, model_option

HELP = "CIFs of a system at a wanted energy"


def options(parser: argparse.ArgumentParser) -> None:
    parser.description = "The closed loop of design and refinement."
    parser.add_argument("identity", metavar="SYSTEM", nargs="?", help='for example "CO</s>Pt9Cu3 (1 1 1)"')
    parser.add_argument("--energy", type=float, help="wanted adsorption energy, eV")
    parser.add_argument(
        "--targets",
        type=Path,
        metavar="FILE",
        help='many targets at once: JSONL of {"system": …, "energy": …}, or a CSV with these columns',
    )
    model_option(parser)
    parser.add_argument(
        "--out", type=Path, default=Path("designs"), help="folder for the CIFs (default: designs)"
    )
    parser.add_argument(
        "--steps",
        type=int,
        dest="iterations",
        help="refinements after the first candidates (default: the run's)",
    )
    parser.add_argument("--pool", type=int, help="how many structures to keep (default: the run's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--free", action="store_true", help="let answers break a CIF's form and the composition"
    )
    parser.add_argument(
        "--judge", choices=("none", "sevennet"), default="none", help="also relax each answer with SevenNet-0"
    )


def run(args: argparse.Namespace) -> int:
    from catmllm.evaluate.controls import budgets, ideal_controls
    from catmllm.evaluate.design import search
    from catmllm.report.design import (
        CONSTRAINTS,
        adsorbate,
        hits,
        judge_designs,
        make_task,
        read_targets,
        save_designs,
        write_design_report,
    )
    from catmllm.seeds import Stream

    if (args.targets is None) == (args.identity is None) or (args.identity is None) != (args.energy is None):
        raise ValueError("give a SYSTEM and its --energy, or --targets FILE")
    tasks = read_targets(args.targets) if args.targets else [make_task(args.identity, args.energy)]
    model, collate, config = load(args.model)
    changes = {k: v for k, v in (("iterations", args.iterations), ("pool", args.pool)) if v is not None}
    config.ga_grpo = replace(config.ga_grpo, **changes)
    config.ga_grpo.sampling.grammar = not args.free
    states = search(model, collate, config, tasks, Stream.COMMAND_SEARCH.key(args.seed), progress=True)
    predictions = budgets(config)[-1]
    controls = ideal_controls(model, collate, tasks, predictions, args.seed)
    records = save_designs(states, controls, args.out)
    if args.judge == "sevennet":
        judge_designs(records)
    o = config.ga_grpo
    conditions = (
        f"{args.model}, {o.initial} candidates then {o.iterations} refinements of {o.group_size}, "
        f"seed {args.seed}"
    )
    report = write_design_report(records, args.out, conditions, predictions)
    for record in records:
        print(f"{record['identity']} at {record['energy']:.2f} eV")
        if not record["pool"]:
            print("  no candidate parsed into an adsorption system; try more --steps")
        elif not record["feasible"]:
            print(f"  no candidate met the hard constraints ({CONSTRAINTS}): the best others")
        for row in record["pool"]:
            judged = row.get("sevennet", "")
            judged = f"  SevenNet-0 {judged:.3f} eV" if isinstance(judged, float) else f"  {judged}"
            print(
                f"  {row['file']}: predicted {row['predicted']:.3f} eV, PVCP {row['pvcp']:.2f}, "
                f"{adsorbate(row)}{judged}"
            )
    print(f"{hits(records, predictions)}\nreport: {report}")
    return 0 if all(r["pool"] for r in records) else 1
