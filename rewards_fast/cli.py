"""`rewards-fast score` for files of answers, `profile` for where the time of a reward goes,
`serve` for HTTP."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from rewards_fast.conversation import answer_text
from rewards_fast.files import BAD_TARGET, BATCH, read_rows, score_file
from rewards_fast.pvcp import PVCP
from rewards_fast.settings import LoopSettings, load_settings


def _settings(given: Sequence[str]) -> LoopSettings:
    """Settings of `FILE.yaml` and `key=value` arguments; SystemExit says what is wrong with them."""
    files = [item for item in given if "=" not in item]
    if len(files) > 1:
        raise SystemExit(f"one settings file at most, got {', '.join(files)}")
    try:
        return load_settings(files[0] if files else None, [i for i in given if "=" in i])
    except ValueError as error:
        raise SystemExit(str(error)) from None


def _existing(path: str) -> Path:
    if not Path(path).is_file():
        raise SystemExit(f"no file {path}")
    return Path(path)


def run_score(arguments: argparse.Namespace) -> int:
    """Scores a file; a second call goes on where the first stopped."""
    settings = _settings(arguments.settings)
    score_file(
        _existing(arguments.input),
        Path(arguments.output),
        settings,
        arguments.text,
        arguments.target,
        arguments.restart,
    )
    return 0


def _median_seconds(call: Any, repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))


def profile_text(text: str, repeats: int = 200) -> dict[str, float]:
    """Microseconds of each stage of one text, and its characters and sites."""
    from rewards_fast import _core

    stages = _core.profile(text, repeats)
    return {
        "characters": len(text),
        "sites": stages["sites"],
        "extract": 1e6 * stages["extract"],
        "tokenise": 1e6 * stages["tokenise"],
        "symmetry": 1e6 * stages["symmetry"],
        "parse": 1e6 * max(0.0, stages["parse"] - stages["tokenise"] - stages["symmetry"]),
        "distance": 1e6 * stages["distance"],
        "score": 1e6 * stages["score"],
    }


STAGES = ("extract", "tokenise", "symmetry", "parse", "distance", "score")


def profile_file(texts: Sequence[str], thread_counts: Sequence[int]) -> dict[str, Any]:
    """Stages by length (quarters of the texts, short to long) and throughput by thread count."""
    ordered = sorted(texts, key=len)
    groups = []
    for part in np.array_split(np.arange(len(ordered)), min(4, len(ordered))):
        chosen = [ordered[i] for i in part]
        sample = [profile_text(t) for t in chosen[:: max(1, len(chosen) // 25)]]
        row: dict[str, float] = {
            name: float(np.mean([s[name] for s in sample])) for name in ("characters", "sites", *STAGES)
        }
        repeated = (chosen * (BATCH // len(chosen) + 1))[:BATCH]
        for threads in thread_counts:
            scorer = PVCP(threads=threads)
            row[f"texts_per_s_{threads}"] = BATCH / _median_seconds(
                lambda r=repeated, s=scorer: s.score(r), 7
            )
        groups.append(row)
    return {"n_texts": len(texts), "threads": list(thread_counts), "groups": groups}


def print_profile(result: dict[str, Any], stream: TextIO) -> None:
    """The profile as a table."""
    heads = ["chars", "sites", *(f"{s} µs" for s in STAGES), *(f"texts/s ×{t}" for t in result["threads"])]
    print("  ".join(f"{h:>12}" for h in heads), file=stream)
    for row in result["groups"]:
        cells = [f"{row['characters']:.0f}", f"{row['sites']:.1f}", *(f"{row[s]:.2f}" for s in STAGES)]
        cells += [f"{row[f'texts_per_s_{t}']:,.0f}" for t in result["threads"]]
        print("  ".join(f"{c:>12}" for c in cells), file=stream)


def plot_profile(result: dict[str, Any], path: Path) -> None:
    """Stacked stages by length beside throughput by thread count."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("the plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    rows = result["groups"]
    names = [f"{row['characters']:.0f}" for row in rows]
    base = np.zeros(len(rows))
    for stage in STAGES:
        heights = np.array([row[stage] for row in rows])
        left.bar(names, heights, bottom=base, label=stage)
        base += heights
    left.set(xlabel="characters of a text (mean of a quarter)", ylabel="µs a text")
    left.legend()
    for row, name in zip(rows, names):
        right.plot(
            result["threads"],
            [row[f"texts_per_s_{t}"] for t in result["threads"]],
            "o-",
            label=f"{name} characters",
        )
    right.set(xlabel="threads", ylabel="texts a second", xticks=result["threads"])
    right.legend()
    figure.savefig(path, dpi=150)


def run_profile(arguments: argparse.Namespace) -> int:
    """Profiles the texts of a .jsonl/.parquet file, or one .cif file."""
    source = _existing(arguments.input)
    if source.suffix in (".jsonl", ".gz", ".parquet"):
        rows = islice(read_rows(source, arguments.text), arguments.most)
        texts = [answer_text(row.text) for row in rows if row.reason in (None, BAD_TARGET)]
    else:
        texts = [source.read_text(encoding="utf-8", errors="replace")]
    if not texts:
        raise SystemExit(f"{source}: no text under {arguments.text!r}")
    counts = [1]
    while counts[-1] * 2 <= (arguments.threads or os.cpu_count() or 1):
        counts.append(counts[-1] * 2)
    result = profile_file(texts, counts)
    if arguments.json:
        print(json.dumps(result))
    else:
        print_profile(result, sys.stdout)
    if arguments.plot:
        plot_profile(result, Path(arguments.plot))
    return 0


def read_token(path: str | None) -> str | None:
    """The token of a file, else of the environment variable REWARDS_FAST_TOKEN;
    an argument would show in `ps`."""
    try:
        token = (
            Path(path).read_text(encoding="utf-8") if path else os.environ.get("REWARDS_FAST_TOKEN", "")
        ).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SystemExit(f"{path}: cannot be read: {error}") from None
    if path and not token:
        raise SystemExit(f"{path}: the token is empty")
    return token or None


def run_serve(arguments: argparse.Namespace) -> int:
    """Serves scores over HTTP until it is told to stop."""
    try:
        from rewards_fast import server
    except ImportError as error:
        raise SystemExit(
            f"serving needs the extra `server` ({error}): pip install '.[server]' in a clone of catmllm"
        ) from None
    settings = _settings(arguments.settings)
    limits = server.Limits(
        body=int(arguments.max_body * 2**20),
        texts=arguments.max_texts,
        chars=arguments.max_chars,
        queue=arguments.queue,
        held=max(server.Limits.held, int(2 * arguments.max_body * 2**20)),
        body_seconds=arguments.body_seconds,
        drain_seconds=arguments.drain_seconds,
    )
    server.serve(
        settings, arguments.host, arguments.port, read_token(arguments.token_file), limits, arguments.log
    )
    return 0


def command_line() -> argparse.ArgumentParser:
    """The parser of `rewards-fast`, from which its page of the documentation is made too."""
    parser = argparse.ArgumentParser(prog="rewards-fast", description=__doc__)
    parser.add_argument("--version", action="version", version=importlib.metadata.version("catmllm"))
    commands = parser.add_subparsers(dest="command", required=True)
    score = commands.add_parser(
        "score", help="score answers of a .jsonl, .jsonl.gz or .parquet file; resumes an unfinished output"
    )
    score.add_argument("input")
    score.add_argument(
        "settings", nargs="*", metavar="FILE.yaml|key=value", help="weights, thresholds, `extract=false`, …"
    )
    score.add_argument("-o", "--output", required=True, help="a .jsonl file, one record an answer")
    score.add_argument("--text", default="text", help="key of the answer (text)")
    score.add_argument("--target", default="target", help="key of the wanted composition (target)")
    score.add_argument("--restart", action="store_true", help="begin anew instead of resuming")
    score.set_defaults(run=run_score)
    profile = commands.add_parser("profile", help="where the time of each text goes")
    profile.add_argument("input", help=".jsonl, .parquet or one .cif")
    profile.add_argument("--text", default="text")
    profile.add_argument("--threads", type=int, help="largest number of threads to try (all cores)")
    profile.add_argument("--most", type=int, default=2000, help="texts to read (2000)")
    profile.add_argument("--plot", help="write a figure to this file")
    profile.add_argument("--json", action="store_true")
    profile.set_defaults(run=run_profile)
    serve = commands.add_parser(
        "serve", help="score over HTTP", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    serve.add_argument(
        "settings", nargs="*", metavar="FILE.yaml|key=value", help="weights and thresholds, as in training"
    )
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on")
    serve.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    serve.add_argument("--token-file", help="file with the bearer token (else REWARDS_FAST_TOKEN)")
    serve.add_argument("--max-body", type=float, default=32, metavar="MiB", help="of one request")
    serve.add_argument("--max-texts", type=int, default=4096, help="of one request")
    serve.add_argument("--max-chars", type=int, default=1_000_000, help="of one text")
    serve.add_argument("--queue", type=int, default=256, help="requests that may wait; more are refused")
    serve.add_argument("--body-seconds", type=float, default=30, help="in which a body must have come")
    serve.add_argument("--drain-seconds", type=float, default=1, help="of answering on after SIGTERM")
    serve.add_argument("--log", default="info", choices=("debug", "info", "warning", "error"))
    serve.set_defaults(run=run_serve)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `rewards-fast`."""
    parser = command_line()
    arguments, rest = parser.parse_known_args(argv)
    if rest and (not hasattr(arguments, "settings") or any(item.startswith("-") for item in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # settings behind options, which argparse leaves over
        arguments.settings = [*arguments.settings, *rest]
    return int(arguments.run(arguments))


if __name__ == "__main__":
    sys.exit(main())
