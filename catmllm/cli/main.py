"""The `catmllm` command: plan | predict | design | evaluate | data make, oc20, inspect. Each subcommand loads only what it needs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from catmllm.config import Config
    from catmllm.data.batches import Collator
    from catmllm.models.catalytic_mllm import CatalyticMLLM
    from catmllm.structure.system import System


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status. What the user can mend is one line on stderr, without a trace."""
    parser = _parser()
    args = parser.parse_args(arguments)
    try:
        return int(args.run_command(args) or 0)
    except (ValueError, OSError, ModuleNotFoundError, RuntimeError) as error:
        print(f"catmllm {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="catmllm",
        description="Language models on catalysts: predict energies, design structures, evaluate.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    predict = commands.add_parser("predict", help="relaxed adsorption energies of CIF files")
    predict.add_argument("files", nargs="+", metavar="FILE.cif", help="one adsorption system each")
    _model_option(predict)
    predict.add_argument(
        "--adsorbate", help="its formula, where the data_ line does not name it (data_CO</s>Pt9Cu3 (1 1 1))"
    )
    predict.add_argument("--miller", nargs=3, type=int, metavar=("H", "K", "L"), help="likewise")
    predict.add_argument(
        "--mode", choices=("both", "graph", "text"), default="both", help="what the model sees"
    )
    predict.add_argument("--json", action="store_true", help="one JSON object a file instead of a table")
    predict.set_defaults(run_command=_predict)

    design = commands.add_parser(
        "design",
        help="CIFs of a system at a wanted energy",
        description="The closed loop of design and refinement.",
    )
    design.add_argument("identity", metavar="SYSTEM", nargs="?", help='for example "CO</s>Pt9Cu3 (1 1 1)"')
    design.add_argument("--energy", type=float, help="wanted adsorption energy, eV")
    design.add_argument(
        "--targets",
        type=Path,
        metavar="FILE",
        help='many targets at once: JSONL of {"system": …, "energy": …}, or a CSV with these columns',
    )
    _model_option(design)
    design.add_argument(
        "--out", type=Path, default=Path("designs"), help="folder for the CIFs (default: designs)"
    )
    design.add_argument(
        "--steps",
        type=int,
        dest="iterations",
        help="refinements after the first candidates (default: the run's)",
    )
    design.add_argument("--pool", type=int, help="how many structures to keep (default: the run's)")
    design.add_argument("--seed", type=int, default=0)
    design.add_argument(
        "--grammar", action="store_true", help="only sample CIFs of the right form and composition"
    )
    design.add_argument(
        "--judge", choices=("none", "sevennet"), default="none", help="also relax each answer with SevenNet-0"
    )
    design.set_defaults(run_command=_design)

    evaluate = commands.add_parser(
        "evaluate", help="measure the stages of a run again and rewrite its report"
    )
    evaluate.add_argument("run", type=Path, help="folder of a run, runs/tiny for example")
    evaluate.add_argument("--report-only", action="store_true", help="rewrite report.html from metrics.json")
    evaluate.set_defaults(run_command=_evaluate)

    export = commands.add_parser(
        "export",
        help="a trained model for transformers, vLLM or fairchem",
        description="hf: Qwen2.5-VL with tokenizer, beside it graph.safetensors (encoder, projector, energy head). "
        "text: the text tower as Qwen2ForCausalLM, which vLLM serves. fairchem: the encoder as fairchem 1.x reads it.",
    )
    export.add_argument("layout", choices=("hf", "text", "fairchem"))
    export.add_argument("out", type=Path, help="folder to write (fairchem: file)")
    _model_option(export)
    export.add_argument(
        "--dtype", choices=("bf16", "fp16", "fp32"), default="bf16", help="of the LLM's weights"
    )
    export.add_argument(
        "--template",
        help="fairchem: a file of the same encoder whose tables, heads and configuration are taken over "
        "(default: the one that training began from)",
    )
    export.set_defaults(run_command=_export)

    plan = commands.add_parser(
        "plan",
        help="memory, FLOPs and traffic of a training step on N GPUs, without a GPU",
        description="Traces one training step of each stage on fake tensors as rank 0 of RANKS: GiB a rank by what they "
        "are, FLOPs, bytes sent, and the largest micro-batch that fits. Status 1 where a stage does not fit.",
    )
    plan.add_argument("config", nargs="+", metavar="FILE.yaml|key=value", help="as in training")
    plan.add_argument("--ranks", type=int, default=8, help="GPUs (default: 8)")
    plan.add_argument("--stage", action="append", help="only this stage; may be repeated")
    plan.add_argument(
        "--limit", type=float, default=76.0, help="GiB a GPU has for tensors (default: 76 of 80)"
    )
    plan.add_argument(
        "--atoms",
        type=int,
        default=80,
        help="of synthetic systems, where data.path is not there (default: 80)",
    )
    plan.add_argument("--no-search", action="store_true", help="do not look for the largest micro-batch")
    plan.add_argument("--json", action="store_true")
    plan.set_defaults(run_command=_plan)

    data = commands.add_parser("data", help="make training data, and look at it")
    kinds = data.add_subparsers(dest="kind", required=True, metavar="KIND")
    from catmllm.data import make

    maker = kinds.add_parser(
        "make", help="adsorption systems on fcc slabs, labelled by SevenNet-0 (an MLIP, not DFT)"
    )
    make.add_arguments(maker)
    maker.set_defaults(run_command=make.main)
    _oc20_options(kinds)
    return parser


def _oc20_options(kinds: Any) -> None:
    oc20 = kinds.add_parser(
        "oc20",
        help="OC20 and OC20-Dense from their files to a training set",
        description="Read OC20 in any layout, keep what can be learned from, and write memory-mapped shards that "
        "training takes as data.path. A run that was stopped goes on with the same command.",
        epilog="Layouts: IS2RE and S2EF LMDBs, fairchem's .aselmdb, .extxyz(.xz) with their text index, .traj, ASE "
        "databases. docs/data.md says which energies each holds and what is dropped.",
    )
    oc20.add_argument("sources", nargs="*", metavar="SRC", type=Path, help="files or folders of OC20")
    oc20.add_argument(
        "--dense",
        nargs="+",
        default=[],
        metavar="SRC",
        type=Path,
        help="files or folders of OC20-Dense; what overlaps with OC20 is left out",
    )
    oc20.add_argument(
        "--mapping",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE.pkl",
        type=Path,
        help="oc20_data_mapping.pkl, oc20dense_{mapping,targets,ref_energies,tags}.pkl, oc20_ref.pkl: any of them",
    )
    oc20.add_argument("--out", required=True, metavar="DIR", type=Path, help="folder of the dataset")
    oc20.add_argument("--workers", type=int, help="processes (default: all cores)")
    oc20.add_argument(
        "--max-energy",
        type=float,
        default=10.0,
        metavar="EV",
        help="largest |energy| kept (default %(default)s)",
    )
    oc20.add_argument(
        "--fmax",
        type=float,
        default=0.05,
        metavar="EV/Å",
        help="largest force of a relaxed structure, where the file has forces (default %(default)s)",
    )
    oc20.add_argument(
        "--total-energies",
        action="store_true",
        help="the LMDBs hold total energies; subtract the reference energies of a mapping",
    )
    oc20.add_argument(
        "--keep-reconstructed",
        action="store_true",
        help="keep systems whose surface reconstructed (anomaly 3 of the mapping)",
    )
    oc20.set_defaults(run_command=_oc20)

    inspect = kinds.add_parser(
        "inspect",
        help="what a training set holds: counts, energies, token lengths, pictures",
        description="Print what a folder made by `catmllm data oc20` holds, and write the same as a page with pictures.",
    )
    inspect.add_argument("folder", metavar="DIR", type=Path, help="the dataset")
    inspect.add_argument("--out", metavar="DIR", type=Path, help="where the page goes (default: DIR/inspect)")
    inspect.add_argument(
        "--tokenizer", metavar="NAME", help="Hugging Face tokenizer to count with (default: the small one)"
    )
    inspect.add_argument("--pictures", type=int, default=8, help="systems drawn (default %(default)s)")
    inspect.add_argument("--seed", type=int, default=0, help="which ones (default %(default)s)")
    inspect.set_defaults(run_command=_inspect)


def _plan(args: argparse.Namespace) -> int:
    from catmllm.config import STAGES, ConfigError, from_arguments
    from catmllm.plan.table import print_plans

    config = from_arguments(args.config)
    stages = args.stage or list(config.stages)
    for stage in stages:
        if stage not in STAGES:
            raise ConfigError(f"--stage {stage}: choose one of {', '.join(STAGES)}")
    return print_plans(config, stages, args.ranks, args.limit, args.atoms, not args.no_search, args.json)


def _model_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        type=Path,
        default=Path("runs/tiny"),
        help="folder of a run (its last finished stage is taken) or of one stage (default: runs/tiny)",
    )


def _load(folder: Path) -> tuple[CatalyticMLLM, Collator, Config]:
    from catmllm.models.state import load_model

    return load_model(_stage(folder))


def _stage(folder: Path) -> Path:
    """The folder itself, or the last finished stage of a run."""
    from catmllm.config import STAGES

    if not (folder / "model.safetensors").is_file():
        stages = [folder / s for s in STAGES if (folder / s / "model.safetensors").is_file()]
        if not stages:
            raise FileNotFoundError(f"{folder}: no trained stage there; `make run` trains one into runs/tiny")
        folder = stages[-1]
    return folder


def _oc20(args: argparse.Namespace) -> int:
    from catmllm.data.oc20.process import Rules, default_workers, process, summary

    if not args.sources and not args.dense:
        raise ValueError("give files or folders of OC20, or --dense")
    if args.workers is not None and args.workers < 1:
        raise ValueError(f"--workers is at least 1, not {args.workers}")
    rules = Rules(args.max_energy, args.fmax, args.total_energies, args.keep_reconstructed)
    workers = args.workers or default_workers()
    shards = process(args.sources, args.out, args.mapping, args.dense, rules, workers)
    print(summary(shards.facts))
    if not len(shards):
        raise ValueError(f"nothing was kept; {args.out / 'dataset.json'} says why, with examples")
    print(f"\n{args.out}: train on it with data.path={args.out}")
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from catmllm.report.dataset import inspect

    out = args.out or args.folder / "inspect"
    print(inspect(args.folder, out, args.tokenizer, args.pictures, args.seed))
    return 0


def _predict(args: argparse.Namespace) -> int:
    from catmllm.design.predict import predict_energies, question
    from catmllm.structure.cif import read_cif

    model, collate, _ = _load(args.model)
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
        if args.json:
            print(json.dumps({"file": name, "system": system.identity, "energy": energy}))
        else:
            print(f"{energy:9.3f} eV  {system.identity:32s} {name}")
    return 1 if failed else 0


def _design(args: argparse.Namespace) -> int:
    from dataclasses import replace

    from catmllm.evaluate.design import search
    from catmllm.report.design import (
        judge_designs,
        make_task,
        read_targets,
        save_designs,
        write_design_report,
    )

    if (args.targets is None) == (args.identity is None) or (args.identity is None) != (args.energy is None):
        raise ValueError("give a SYSTEM and its --energy, or --targets FILE")
    tasks = read_targets(args.targets) if args.targets else [make_task(args.identity, args.energy)]
    model, collate, config = _load(args.model)
    changes = {k: v for k, v in (("iterations", args.iterations), ("pool", args.pool)) if v is not None}
    config.ga_grpo = replace(config.ga_grpo, **changes)
    config.ga_grpo.sampling.grammar |= args.grammar
    states = search(model, collate, config, tasks, [args.seed], progress=True)
    records = save_designs(states, args.out)
    if args.judge == "sevennet":
        judge_designs(records)
    o = config.ga_grpo
    conditions = f"{args.model}, {o.initial} candidates then {o.iterations} refinements of {o.group_size}, seed {args.seed}"
    report = write_design_report(records, args.out, conditions)
    for record in records:
        print(f"{record['identity']} at {record['energy']:.2f} eV")
        if not record["pool"]:
            print("  no candidate parsed into an adsorption system; try more --steps")
        elif not record["feasible"]:
            print("  no candidate met the hard constraints (exact composition, no overlap): the best others")
        for row in record["pool"]:
            judged = row.get("sevennet", "")
            judged = f"  SevenNet-0 {judged:.3f} eV" if isinstance(judged, float) else f"  {judged}"
            print(f"  {row['file']}: predicted {row['predicted']:.3f} eV, PVCP {row['pvcp']:.2f}{judged}")
    print(f"report: {report}")
    return 0 if all(r["pool"] for r in records) else 1


def _export(args: argparse.Namespace) -> int:
    from catmllm.models.export import export

    out = export(_stage(args.model), args.layout, args.out, args.dtype, args.template)
    print(out)
    if (own := out / "tokenizer").is_dir():
        print(f"its tokenizer is none of Qwen's and lies in {own}: vllm serve {out} --tokenizer {own}")
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    from catmllm.config import from_dict
    from catmllm.report.run import write_report

    path = args.run / "metrics.json"
    if not path.is_file():
        raise FileNotFoundError(f"{args.run}: no metrics.json there; give the folder of a run")
    if args.report_only:
        print(write_report(args.run))
        return 0
    from catmllm.pipeline import run

    metrics = json.loads(path.read_text())
    config = from_dict(metrics["config"], str(path))
    config.out = str(args.run)
    done = [s for s in config.stages if (args.run / s / "model.safetensors").is_file()]
    if len(done) < len(config.stages):
        missing = [s for s in config.stages if s not in done]
        raise ValueError(f"{args.run}: not trained yet: {', '.join(missing)}; run train.py again to go on")
    for part in ("property", "generation", "design"):
        metrics.pop(part, None)
    metrics["config"]["out"] = config.out
    path.write_text(json.dumps(metrics, indent=1))
    return run(config)


if __name__ == "__main__":
    sys.exit(main())
