"""`catmllm evaluate tasks`, `candidates` and `generator`: the design tasks as a file, our own rows of CIFs,
and the score of any tool's."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from catmllm.cli.trained import load, model_option
from catmllm.evaluate import BENCHMARK

if TYPE_CHECKING:
    from collections.abc import Sequence

    from catmllm.config import Config
    from catmllm.data.batches import Collator
    from catmllm.design.predict import Predictor
    from catmllm.design.search import TaskState
    from catmllm.evaluate.benchmark import BenchmarkTask
    from catmllm.models.catalytic_mllm import CatalyticMLLM
    from catmllm.structure.system import System

TASKS_HELP = "write the design tasks that any tool can answer with CIFs"
CANDIDATES_HELP = "write CIFs that answer those tasks: ideal slabs, training systems, or the closed loop's"
GENERATOR_HELP = "score a tool's CIFs by the rules of our own designs"


def _tasks_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tasks",
        type=Path,
        default=BENCHMARK,
        metavar="FILE",
        help="tasks by `catmllm evaluate tasks` (default: those that come with the package)",
    )


def tasks_options(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Test systems of the shipped data, or of key=value settings as in training: each once with its "
        "composition, the paper's task, and once with the metals free. A seed is data.split_seed and seed."
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="a CSV")
    parser.add_argument("--n", type=int, default=48, help="tasks of each kind (default: 48)")
    parser.add_argument("set", nargs="*", metavar="key=value", help="data.split_seed=1, for example")


def tasks(args: argparse.Namespace) -> int:
    from catmllm.config import from_arguments
    from catmllm.data.open import open_data
    from catmllm.evaluate.benchmark import benchmark_tasks, write_tasks

    config = from_arguments(args.set)
    found = benchmark_tasks(open_data(config.data), args.n, config.seed)
    write_tasks(found, args.out)
    print(f"{args.out}: {len(found)} tasks")
    return 0


def candidates_options(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Rows to stand beside a tool's: random ideal slabs; random training systems of the adsorbate and "
        "facet, which break the rule that an answer be new; all candidates of a model's closed loop; "
        "those of a population search by the same "
        "predictor with as many predictions; the nearest training slabs with their elements exchanged "
        "for those asked for; or what a model answers to the bare prompt, without a search or a grammar."
    )
    parser.add_argument("row", choices=("ideal", "training", "search", "evolution", "transmute", "answers"))
    _tasks_option(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder for the CIFs")
    parser.add_argument("--seed", type=int, default=0)
    model_option(parser)


def candidates(args: argparse.Namespace) -> int:
    from catmllm.data.subsets import of_property
    from catmllm.design.analogues import analogues
    from catmllm.design.predict import predictor_of
    from catmllm.design.search import ANALOGUE, ClosedLoop
    from catmllm.evaluate.benchmark import allowed_slabs, ideal_of, known_of, read_tasks, write_candidates
    from catmllm.evaluate.controls import budgets
    from catmllm.evaluate.generators import answers, evolve
    from catmllm.structure.cif import write_cif

    asked = read_tasks(args.tasks)
    if args.out.exists() and any(args.out.iterdir()):
        raise ValueError(f"--out {args.out}: there is something in it; give a new folder")
    model, collate, config = load(args.model)
    n = budgets(config)[-1]
    predictor = predictor_of(config, model.energy_mean.device)
    train: Sequence[System] = ()
    if args.row != "ideal":
        data = _unseen(args, asked, config, needed=args.row in ("search", "training", "transmute"))
        train = of_property(data["train"], config.data) if data else ()
    if args.row == "search":
        states = _searched(model, collate, config, asked, predictor, train, args.seed)
        texts = {name: [c.text for c in state.tried] for name, state in states.items() if state.tried}
        relaxed = {name: [c.iteration == ANALOGUE for c in s.tried] for name, s in states.items()}
    else:
        if args.row == "answers":
            texts = answers(model, collate, config.evaluate.sampling, asked, n, args.seed)
        elif args.row == "evolution":
            loop = ClosedLoop(model, collate, config.ga_grpo, predictor)
            texts = evolve(loop, asked, args.seed, collate.data.decimals)
        else:
            if args.row == "ideal":
                made = {t.name: ideal_of(t, n, args.seed, k) for k, t in enumerate(asked)}
            elif args.row == "transmute":
                slabs, energies = [allowed_slabs(t) for t in asked], [t.task.energy for t in asked]
                made = dict(zip([t.name for t in asked], analogues(slabs, energies, train, n)))
            else:
                made = {t.name: known_of(t, train, n, args.seed, k) for k, t in enumerate(asked)}
            texts = {name: [write_cif(s, collate.data.decimals) for s in some] for name, some in made.items()}
        texts = {name: some for name, some in texts.items() if some}
        known_to_be = args.row in ("training", "transmute")
        relaxed = {name: [known_to_be] * len(some) for name, some in texts.items()}
    write_candidates(args.out, texts, relaxed)
    print(f"{args.out}: {sum(map(len, texts.values()))} CIFs for {len(texts)} of {len(asked)} tasks")
    return 0


def _unseen(
    args: argparse.Namespace, asked: Sequence[BenchmarkTask], config: Config, needed: bool
) -> dict[str, Sequence[System]]:
    """The data of the model, which has seen nothing that the tasks allow; empty, and said so, where they are
    not here and not needed. Raises ValueError as `refuse_known`."""
    from catmllm.data.open import open_data
    from catmllm.evaluate.benchmark import refuse_known

    try:
        data = open_data(config.data)
    except FileNotFoundError:
        if needed:
            raise
        print(
            f"{args.model}: its training data ({config.data.path}) is not here: whether it has seen what the "
            "tasks ask for is not checked",
            file=sys.stderr,
        )
        return {}
    refuse_known(args.tasks, asked, data, config.data)
    return data


def _searched(
    model: CatalyticMLLM,
    collate: Collator,
    config: Config,
    asked: Sequence[BenchmarkTask],
    predictor: Predictor | None,
    known: Sequence[System],
    seed: int,
) -> dict[str, TaskState]:
    """The closed loop's candidates for each task, by its name, as the evaluation of a run searches."""
    from catmllm.design.free import search_free
    from catmllm.evaluate.benchmark import KINDS, allowed_slabs
    from catmllm.evaluate.design import search, search_seed
    from catmllm.evaluate.free import free_seed

    fixed, free = ([t for t in asked if t.kind == kind] for kind in KINDS)
    states: list[TaskState] = []
    if fixed:
        tasks, own = [t.task for t in fixed], search_seed(seed)
        states += search(model, collate, config, tasks, own, progress=True, predictor=predictor, known=known)
    if free:
        tasks, slabs, own = [t.task for t in free], [allowed_slabs(t) for t in free], free_seed(seed)
        states += search_free(
            model, collate, config, tasks, slabs, own, progress=True, predictor=predictor, known=known
        )
    return dict(zip([t.name for t in (*fixed, *free)], states))


def generator_options(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "DIR has a folder for each task, named as the task, with the tool's CIFs in the order of its "
        "predictions: 1.cif, 2.cif, …, or 1.relaxed.cif where the structure is relaxed, which the predictor "
        "is told. Each is read, checked and screened as a candidate of the closed loop, "
        "and only as many count as that makes. Success is told after 1, 4, 16 and all predictions."
    )
    parser.add_argument("dirs", nargs="+", type=Path, metavar="DIR", help="a row of the table each")
    _tasks_option(parser)
    parser.add_argument(
        "--judge",
        choices=("none", "diep", "sevennet"),
        default="none",
        help="also relax each answer with the potential that made the model's labels, DIEP as a rule; "
        "another has another zero and is refused",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="all numbers, task by task, as JSON")
    model_option(parser)


def generator(args: argparse.Namespace) -> int:
    from catmllm.data.oracle import check_judge
    from catmllm.design.predict import predictor_of
    from catmllm.design.search import ClosedLoop
    from catmllm.evaluate.benchmark import read_candidates, read_tasks, score, table
    from catmllm.evaluate.controls import budgets

    asked = read_tasks(args.tasks)
    model, collate, config = load(args.model)
    _unseen(args, asked, config, needed=False)
    if note := check_judge(args.judge, config.data):
        print(f"note: {note}", file=sys.stderr)
    limits = budgets(config)
    predictor = predictor_of(config, model.energy_mean.device)
    loop, rows = ClosedLoop(model, collate, config.ga_grpo, predictor), {}
    read = {str(folder): read_candidates(folder, asked, limits[-1]) for folder in args.dirs}
    for name, (texts, relaxed, more) in read.items():
        if more:
            print(f"{name}: {more} CIFs beyond the first {limits[-1]} of a task do not count")
        rows[name] = score(loop, asked, texts, relaxed, limits, args.judge, True)
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(table(rows))
    print(f"\nSuccess (95 %) after so many predictions; own: the predictor of {args.model}, which chooses.")
    return 0
