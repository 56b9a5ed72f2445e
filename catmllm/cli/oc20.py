"""`catmllm data oc20`: OC20 and OC20-Dense from their files to a training set."""

from __future__ import annotations

import argparse
from pathlib import Path

from catmllm.cli.own import limit_options, several

HELP = "OC20 and OC20-Dense from their files to a training set"


def options(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Read OC20 in any layout, keep what can be learned from, and write memory-mapped shards that "
        "training takes as data.path. A run that was stopped goes on with the same command."
    )
    parser.epilog = (
        "Layouts: IS2RE and S2EF LMDBs, fairchem's .aselmdb, .extxyz(.xz) with their text index, .traj, ASE "
        "databases. docs/data.md says which energies each holds and what is dropped."
    )
    parser.add_argument("sources", nargs="*", metavar="SRC", type=Path, help="files or folders of OC20")
    several(parser, "--dense", "files or folders of OC20-Dense; what overlaps with OC20 is left out", "SRC")
    several(
        parser,
        "--mapping",
        "oc20_data_mapping.pkl, oc20dense_{mapping,targets,ref_energies,tags}.pkl, oc20_ref.pkl: any of them",
        "FILE.pkl",
    )
    parser.add_argument("--out", required=True, metavar="DIR", type=Path, help="folder of the dataset")
    parser.add_argument("--workers", type=int, help="processes (default: all cores)")
    limit_options(parser)
    parser.add_argument(
        "--total-energies",
        action="store_true",
        help="the LMDBs hold total energies; subtract the reference energies of a mapping",
    )
    parser.add_argument(
        "--keep-reconstructed",
        action="store_true",
        help="keep systems whose surface reconstructed (anomaly 3 of the mapping)",
    )


def run(args: argparse.Namespace) -> int:
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
