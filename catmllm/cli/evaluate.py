"""`catmllm evaluate`: measure the stages of a run again and rewrite its report, or measure it on structures
of one's own."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from catmllm.cli.own import label_options, reading_options, wanted
from catmllm.cli.trained import best_stage, load_to_read, must_write

if TYPE_CHECKING:
    from catmllm.structure.system import System

HELP = "measure the stages of a run again and rewrite its report; or measure it on your own structures"


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="folder of a run, runs/tiny for example")
    parser.add_argument(
        "--on",
        nargs="+",
        metavar="PATH",
        type=Path,
        help="structures with energies, in any format: say how the run's best stage agrees with them, and no "
        "more",
    )
    parser.add_argument(
        "--judge",
        choices=("diep", "sevennet"),
        help="let a potential that did not make the labels judge the run's designs, beside its own ceiling, "
        "and add it to the report",
    )
    parser.add_argument(
        "--indicative",
        type=int,
        metavar="N",
        help="measure predictions where no structure is known, by N CIFs that the run's last stage "
        "(or the stage given) writes for each adsorbate and catalyst of the test part "
        "(the paper's PIR), and add that to the report",
    )
    parser.add_argument(
        "--slabs",
        type=int,
        metavar="N",
        help="for the energies of N test slabs at their best sites, by the run's judge (where it has none, "
        "by the potential that made the shipped labels), search slabs of other metals with the run's last "
        "stage (or the stage given), and add the rates of success to the report "
        "(20 to 40 CPU seconds a slab for one adsorbate, and some 40 for two)",
    )
    reading_options(parser)
    label_options(parser)
    parser.add_argument("--report-only", action="store_true", help="rewrite report.html from metrics.json")


def run(args: argparse.Namespace) -> int:
    from catmllm.config import from_dict
    from catmllm.report.run import write_report

    if args.on:
        return _on(args)
    given = args.run
    if (args.run / "model.safetensors").is_file() and (args.run.parent / "metrics.json").is_file():
        args.run = args.run.parent  # a stage's folder: its run is meant
    path = args.run / "metrics.json"
    if not path.is_file():
        raise FileNotFoundError(f"{args.run}: no metrics.json there; give the folder of a run")
    if args.judge:
        _second_opinion(args.run, args.judge)
    if args.indicative is not None:
        _without_structures(args.run, given, args.indicative)
    if args.slabs is not None:
        _slabs(args.run, given, args.slabs)
    if args.judge or args.indicative is not None or args.slabs is not None or args.report_only:
        print(write_report(args.run, _tested(path)))
        return 0
    from catmllm.pipeline import judge_note, run

    metrics = json.loads(path.read_text())
    config = from_dict(metrics["config"], str(path))
    config.out = str(args.run)
    done = [s for s in config.stages if (args.run / s / "model.safetensors").is_file()]
    if len(done) < len(config.stages):
        missing = [s for s in config.stages if s not in done]
        raise ValueError(f"{args.run}: not trained yet: {', '.join(missing)}; run train.py again to go on")
    judge_note(config)
    again = ["property", "generation", "design", "designs", "free_design"]
    again += ["missing"] if config.evaluate.indicative else []
    again += ["slab_design"] if config.evaluate.slab_tasks else []
    for part in again:
        metrics.pop(part, None)
    metrics["config"]["out"] = config.out
    path.write_text(json.dumps(metrics, indent=1))
    return run(config)


def _tested(path: Path) -> Sequence[System]:
    """The systems that a run was measured on; none, and why, where they are not at hand."""
    from catmllm.config import from_dict
    from catmllm.data.open import open_data
    from catmllm.evaluate.baselines import evenly_spaced

    try:
        config = from_dict(json.loads(path.read_text())["config"], str(path))
        return evenly_spaced(open_data(config.data)["test"], config.evaluate.property_systems)
    except (KeyError, OSError, ValueError) as error:
        print(f"the report names and shows no test systems: {error}")
        return ()


def _second_opinion(run: Path, name: str) -> None:
    """Put a potential's word on the designs of a run into its metrics.json."""
    from catmllm.config import from_dict
    from catmllm.data.open import open_data
    from catmllm.evaluate.judges import Judge
    from catmllm.evaluate.second_opinion import second_opinion

    path = run / "metrics.json"
    metrics = json.loads(path.read_text())
    design = metrics.get("design")
    if not design:
        raise ValueError(f"{run}: it has no designs to judge; they come after `ga_grpo`")
    config = from_dict(metrics["config"], str(path))
    found = second_opinion(Judge(name), design["items"], open_data(config.data), design["tolerance"], 2)
    design.setdefault("second", {})[name] = found
    path.write_text(json.dumps(metrics, indent=1))


def _without_structures(run: Path, given: Path, candidates: int) -> None:
    """Put what a run's last stage says where no structure is known into its metrics.json, or what the stage
    says whose folder was given."""
    from catmllm.data.subsets import learned
    from catmllm.evaluate.missing import evaluate_missing
    from catmllm.world import DTYPES

    if candidates < 1:
        raise ValueError(f"--indicative {candidates}: give a number of CIFs of 1 or more")
    with _last_stage(given) as (folder, model, collate, config, data, world):
        e, dtype, data = config.evaluate, DTYPES[config.precision], learned(data, config.data)
        found = evaluate_missing(model, collate, data, candidates, e.sampling, config.seed, world, dtype)
    path = run / "metrics.json"
    metrics = json.loads(path.read_text())
    metrics.setdefault("missing", {})[folder.name] = found
    path.write_text(json.dumps(metrics, indent=1))


def _slabs(run: Path, given: Path, n: int) -> None:
    """Put the slabs that a run's last stage finds for n test slabs' energies into its metrics.json. Where the
    run has no judge, the potential that made the shipped labels is it."""
    from catmllm.data.oracle import check_judge
    from catmllm.evaluate.slab_tasks import evaluate_slabs

    if n < 1:
        raise ValueError(f"--slabs {n}: give a number of test slabs of 1 or more")
    with _last_stage(given) as (_, model, collate, config, data, world):
        if config.evaluate.judge == "none":
            if config.data.path is not None:
                raise ValueError(
                    f"{run}: --slabs needs the potential that made the labels as its judge; the run has none "
                    f"(`evaluate.judge: none`), and who made those of {config.data.path} is not known here"
                )
            config.evaluate.judge = config.data.labels
        if note := check_judge(config.evaluate.judge, config.data):
            print(f"note: {note}", file=sys.stderr)
        config.evaluate.slab_tasks = n
        found = evaluate_slabs(model, collate, config, data, world)
    if not found:
        raise ValueError(
            f"{run}: no test slab is one of the shipped kind (fcc metals, 12 atoms), as --slabs needs"
        )
    path = run / "metrics.json"
    metrics = json.loads(path.read_text())
    metrics["slab_design"] = found
    path.write_text(json.dumps(metrics, indent=1))


@contextmanager
def _last_stage(given: Path) -> Iterator[Any]:
    """Folder, model, collator, configuration and data of a run's last stage, or of the stage given, and a
    world to measure them in."""
    import torch.distributed as dist

    from catmllm.data.open import open_data
    from catmllm.models.state import stage_folder
    from catmllm.world import start

    folder = stage_folder(given)
    model, collate, config = load_to_read(folder)
    must_write(folder, config)
    world = start(config)
    try:
        yield folder, model.to(world.device), collate, config, open_data(config.data), world
    finally:
        dist.destroy_process_group()


def _on(args: argparse.Namespace) -> int:
    """How the energies of a run's best stage agree with those of structures at hand, in each mode."""
    from catmllm.data.own.reading import read_systems, summary
    from catmllm.design.predict import MODES, predict_energies, question
    from catmllm.evaluate.property import agreement

    folder = best_stage(args.run)
    found = read_systems(args.on, wanted(args))
    systems = found.systems
    print(summary(found))
    if len(systems) < 2:
        raise ValueError(f"{len(systems)} structures with an energy; at least two are needed; see above")
    model, collate, _ = load_to_read(folder)
    truth, names = [s.known_energy for s in systems], [s.adsorbate for s in systems]
    for mode in MODES if collate.shows_structures else MODES[-1:]:
        predicted = predict_energies(model, collate, [question(s, mode) for s in systems])
        print(f"{folder}, {mode}: {agreement(predicted, truth, names)}")
    return 0
