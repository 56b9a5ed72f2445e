"""`catmllm design`: CIFs of a system at a wanted energy, by the closed loop of design and refinement."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from catmllm.cli.own import reading_options, wanted
from catmllm.cli.trained import load, model_option

if TYPE_CHECKING:
    from catmllm.config import Config
    from catmllm.design.domain import Domain
    from catmllm.design.search import Task
    from catmllm.structure.system import System

HELP = "CIFs of a system at a wanted energy"


def options(parser: argparse.ArgumentParser) -> None:
    parser.description = "The closed loop of design and refinement."
    parser.add_argument("identity", metavar="SYSTEM", nargs="?", help='for example "CO</s>Pt9Cu3 (1 1 1)"')
    parser.add_argument("--energy", type=float, help="wanted adsorption energy, eV")
    parser.add_argument(
        "--from",
        dest="given",
        type=Path,
        metavar="FILE",
        help="a structure in any format to begin with: the first exemplar, and SYSTEM where none is given",
    )
    reading_options(parser)
    parser.add_argument(
        "--metals",
        metavar="A,B,C",
        help="free composition: each of these metals alone, and each two of them at 1:3, 1:1 and 3:1, on as "
        "many slab atoms as SYSTEM has",
    )
    parser.add_argument(
        "--sites",
        metavar="SITE,…",
        help="only designs that bind atop, on a bridge or in a hollow: atop,bridge,hollow",
    )
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
    parser.add_argument(
        "--predictor",
        metavar="RUN",
        help="a run, or a stage, whose energies the search takes (default: the run's, its own as a rule)",
    )
    parser.add_argument("--pool", type=int, help="how many structures to keep (default: the run's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--free", action="store_true", help="let answers break a CIF's form and the composition"
    )
    parser.add_argument(
        "--judge",
        choices=("none", "diep", "sevennet"),
        default="none",
        help="also relax each answer with DIEP, which made the shipped labels, or with SevenNet-0",
    )


def run(args: argparse.Namespace) -> int:
    from catmllm.design.predict import predictor_of
    from catmllm.evaluate.controls import budgets, ideal_controls
    from catmllm.evaluate.design import search
    from catmllm.report.design import (
        hits,
        judge_designs,
        save_designs,
        write_design_report,
    )
    from catmllm.seeds import Stream

    given = None if args.given is None else _given(args)
    tasks = _tasks(args, given)
    model, collate, config = load(args.model)
    asked = {"iterations": args.iterations, "pool": args.pool, "predictor": args.predictor}
    changes = {k: v for k, v in asked.items() if v is not None}
    config.ga_grpo = replace(config.ga_grpo, **changes)
    config.ga_grpo.sampling.grammar = not args.free
    seed = Stream.COMMAND_SEARCH.key(args.seed)
    begun = [given if given is not None and t.target == given.target else None for t in tasks]
    if given is not None and not args.metals and not any(begun):
        raise ValueError(f"--from {args.given}: its atoms are {given.identity}, not those of {args.identity}")
    predictor = predictor_of(config, model.energy_mean.device) or (model, collate)
    known = _training(config, args.model)
    states = search(
        model, collate, config, tasks, seed, progress=True, given=begun, predictor=predictor, known=known
    )
    predictions = budgets(config)[-1]
    controls = ideal_controls(predictor, config.ga_grpo, tasks, predictions, args.seed)
    records = save_designs(states, controls, args.out)
    if args.judge != "none":
        judge_designs(records, args.judge)
    o = config.ga_grpo
    conditions = (
        f"{args.model}, {o.initial} candidates then {o.iterations} refinements of {o.group_size}, "
        f"seed {args.seed}"
    )
    report = write_design_report(records, args.out, conditions, predictions)
    if args.metals:  # the nearest composition first
        records = sorted(records, key=_distance)
    for record in records:
        _print(record)
    print(f"{hits(records, predictions)}\nreport: {report}")
    return 0 if all(r["pool"] for r in records) else 1


def _training(config: Config, model: Path) -> Sequence[System]:
    """The systems that the model was trained on, where the search makes analogues of them and they are
    here."""
    from catmllm.data.open import open_data

    if not config.ga_grpo.analogues:
        return ()
    try:
        return open_data(config.data)["train"]
    except FileNotFoundError:
        print(
            f"{model}: its training data ({config.data.path}) is not here: no slabs of it to begin with",
            file=sys.stderr,
        )
        return ()


def _print(record: dict[str, Any]) -> None:
    """The designs of one task."""
    from catmllm.report.design import CONSTRAINTS, adsorbate, origin, predicted

    print(f"{record['identity']} at {record['energy']:.2f} eV")
    if not record["pool"]:
        print("  no candidate parsed into an adsorption system; try more --steps")
    elif not record["feasible"]:
        print(f"  no candidate met the hard constraints ({CONSTRAINTS}): the best others")
    for row in record["pool"]:
        sampled = row["iteration"] >= 0
        judged = row.get("judged", "")
        if judged != "":
            judged = f"  {record['judge']} {judged:.3f} eV" if isinstance(judged, float) else f"  {judged}"
        print(
            f"  {row['file']}: predicted {predicted(row)}, PVCP {row['pvcp']:.2f}, "
            f"{adsorbate(row)}{judged}{'' if sampled else f'  ({origin(row)})'}"
        )


def _tasks(args: argparse.Namespace, given: System | None) -> list[Task]:
    """What is asked for, checked against what the model has seen. Raises ValueError."""
    from catmllm.data.oracle import POTENTIALS
    from catmllm.design.domain import load_domain
    from catmllm.design.search import free_composition, make_task
    from catmllm.models.state import stage_folder
    from catmllm.report.design import read_targets

    named = args.identity is not None or args.given is not None
    if (args.targets is not None) == named or named != (args.energy is not None):
        raise ValueError("give a SYSTEM (or --from FILE) and its --energy, or --targets FILE")
    if args.targets:
        tasks = read_targets(args.targets)
    else:
        identity = args.identity or (given.identity if given is not None else "")
        tasks = [make_task(identity, args.energy)]
    if args.metals:
        tasks = [freed for task in tasks for freed in free_composition(task, args.metals.split(","))]
    tasks = [replace(task, sites=_sites(args.sites)) for task in tasks]
    domain = load_domain(stage_folder(args.model))
    if domain is None:
        print(f"{args.model} says nothing of its training data: nothing is checked", file=sys.stderr)
        return tasks
    _check(tasks, domain)
    name = POTENTIALS.get(args.judge)
    if name and not domain.labels.startswith(name):
        print(
            f"{name} judges from gas CO, H2, H2O, N2 by its own energies, the model was trained on "
            f"{domain.labels} (zero: {domain.reference or 'not said'}): the two energies differ by more than "
            "their errors",
            file=sys.stderr,
        )
    return tasks


def _given(args: argparse.Namespace) -> System:
    """The one structure of --from. Raises ValueError for none or several."""
    from catmllm.data.own.reading import read_systems

    found = read_systems([args.given], wanted(args, labelled=False))
    if len(found.items) != 1 or found.refused:
        why = "; ".join(e for some in found.examples.values() for e in some)
        raise ValueError(f"--from {args.given}: {len(found.items)} structures, one is needed. {why}".strip())
    return found.items[0].system


def _sites(text: str | None) -> tuple[str, ...]:
    sites = tuple(text.split(",")) if text else ()
    if wrong := [s for s in sites if s not in ("atop", "bridge", "hollow")]:
        raise ValueError(f"--sites {wrong[0]}: give atop, bridge, hollow, or several with commas")
    return sites


def _check(tasks: Sequence[Task], domain: Domain) -> None:
    """Refuse what the model has never seen, which it would turn into something else; say where a wanted
    energy lies beyond all that it has. Raises ValueError."""
    from catmllm.structure.formula import parse_identity

    for task in tasks:
        asked = parse_identity(task.identity)
        if unseen := sorted(set(asked.slab) - set(domain.elements)):
            raise ValueError(
                f"{task.identity}: no training slab holds {', '.join(unseen)}; the model knows "
                f"{', '.join(domain.elements)}"
            )
        if asked.adsorbate not in domain.adsorbates:
            raise ValueError(
                f"{task.identity}: the adsorbate {asked.adsorbate} is not in training; the model knows "
                f"{', '.join(domain.adsorbates)}"
            )
        low, high = domain.energies[asked.adsorbate]
        if not low <= task.energy <= high:
            print(
                f"{task.identity}: {task.energy:.2f} eV is out of reach: {asked.adsorbate} had {low:.2f} to "
                f"{high:.2f} eV in training",
                file=sys.stderr,
            )


def _distance(record: dict[str, Any]) -> float:
    """How far the best of a pool is from the wanted energy (eV); those that meet no constraint come last."""
    if not record["pool"]:
        return float("inf")
    return abs(record["pool"][0]["predicted"] - record["energy"]) + (0 if record["feasible"] else 1e6)
