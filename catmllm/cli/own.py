"""`catmllm data import`: users' own structures in any format to a training set. Its options that say how
files are read are those of `predict` and `design --from` too."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from catmllm.data.own.reading import Wanted

HELP = "your own structures, in any format, to a training set"


def options(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Read structures and energies from files and folders: everything that ASE reads, VASP calculations, "
        "pymatgen's JSON, LMDBs, ASE and Catalysis-Hub databases, tables. Every record becomes a system or"
        " is refused with a reason. docs/own_data.md has the keys and a small file of each format."
    )
    parser.add_argument("paths", nargs="+", metavar="PATH", type=Path, help="files or folders")
    parser.add_argument("--out", metavar="DIR", type=Path, help="folder of the dataset")
    parser.add_argument(
        "--check", action="store_true", help="say what would be read and refused; write nothing"
    )
    reading_options(parser)
    label_options(parser)
    parser.add_argument("--group", metavar="COLUMN", help="column that data.split_by=column goes by")


def several(parser: argparse.ArgumentParser, name: str, says: str, metavar: str = "FILE") -> None:
    """An option that takes one path or more and may come again."""
    parser.add_argument(name, nargs="+", action="extend", default=[], metavar=metavar, type=Path, help=says)


def label_options(parser: argparse.ArgumentParser) -> None:
    """The options that say how energies are read and which count, where labels are needed."""
    parser.add_argument(
        "--energies",
        choices=("adsorption", "total"),
        help="what a plain energy is (default: total in a calculation's results, adsorption in a table)",
    )
    parser.add_argument("--energy-key", metavar="KEY", help="the column or key that holds the energy")
    parser.add_argument("--unit", default="eV", help="of the energies, references too (default %(default)s)")
    several(
        parser,
        "--reference",
        "energies that total ones are counted from: tables `name,energy`, or clean slabs and gas "
        "molecules as structures with energies",
    )
    parser.add_argument("--reference-state", metavar="TEXT", help="the zero of the energies, in words")
    limit_options(parser)


def limit_options(parser: argparse.ArgumentParser) -> None:
    """The options that say which labels are too odd to learn from."""
    parser.add_argument(
        "--max-energy",
        type=float,
        default=10.0,
        metavar="EV",
        help="largest |energy| kept (default %(default)s)",
    )
    parser.add_argument(
        "--fmax",
        type=float,
        default=0.05,
        metavar="EV/Å",
        help="largest force on a free atom of a relaxed structure, where the file has forces "
        "(default %(default)s)",
    )


def reading_options(parser: argparse.ArgumentParser) -> None:
    """The options that say how structures are read, the same for every command."""
    parser.add_argument("--adsorbate", metavar="FORMULA", help="its formula, where the files do not say it")
    parser.add_argument(
        "--adsorbate-atoms",
        metavar="WHICH",
        help="which atoms it is: last (as many as the formula has), last:N, tag:N, or indices from 0: 12,13",
    )
    several(parser, "--slab", "clean slabs; what they lack is the adsorbate")
    parser.add_argument(
        "--miller",
        nargs=3,
        type=int,
        metavar=("H", "K", "L"),
        help="Miller index, where the files do not say it; fcc and bcc facets are recognised",
    )
    parser.add_argument(
        "--trajectories",
        action="store_true",
        help="each file is a relaxation, of which the last frame counts",
    )


def wanted(args: argparse.Namespace, labelled: bool = True) -> Wanted:
    """What the options say."""
    from catmllm.data.own.reading import Wanted

    said = {
        name: getattr(args, name)
        for name in ("energies", "energy_key", "unit", "reference_state", "group", "max_energy", "fmax")
        if hasattr(args, name)
    }
    return Wanted(
        adsorbate=args.adsorbate,
        adsorbate_atoms=args.adsorbate_atoms,
        slabs=args.slab,
        miller=None if args.miller is None else (args.miller[0], args.miller[1], args.miller[2]),
        references=getattr(args, "reference", ()),
        trajectories=args.trajectories,
        labelled=labelled,
        **said,
    )


def run(args: argparse.Namespace) -> int:
    from catmllm.data.own.reading import facts, read_systems, summary
    from catmllm.data.shards import write_shards

    if (args.out is None) == (not args.check):
        raise ValueError("give --out DIR, or --check to write nothing")
    if args.out is not None and args.out.exists() and any(args.out.iterdir()):
        raise ValueError(f"{args.out} is not empty; give another --out, or remove it")
    asked = wanted(args)
    found = read_systems(args.paths, asked)
    print(summary(found))
    if found.mixed:
        raise ValueError(found.mixed)
    if not found.items:
        raise ValueError("nothing was kept; the reasons are above")
    if args.check:
        print("\nnothing was written (--check)")
        return 0
    groups = [item.group for item in found.items]
    write_shards(args.out, found.systems, groups=groups, source="own", facts=facts(found, asked, args.paths))
    print(f"\n{args.out}: train on it with data.path={args.out}")
    return 0
