"""`catmllm data inspect`: what a training set holds."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "what a training set holds: counts, energies, token lengths, pictures"


def options(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Print what a folder made by `catmllm data oc20` holds, and write the same as a page with pictures."
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="the dataset")
    parser.add_argument("--out", metavar="DIR", type=Path, help="where the page goes (default: DIR/inspect)")
    parser.add_argument(
        "--tokenizer", metavar="NAME", help="Hugging Face tokenizer to count with (default: the small one)"
    )
    parser.add_argument("--pictures", type=int, default=8, help="systems drawn (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which ones (default %(default)s)")


def run(args: argparse.Namespace) -> int:
    from catmllm.report.dataset import inspect

    out = args.out or args.folder / "inspect"
    print(inspect(args.folder, out, args.tokenizer, args.pictures, args.seed))
    return 0
