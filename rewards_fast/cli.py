"""`rewards-fast score` for files of answers, `profile` for where the time of a reward goes, `serve` for HTTP."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from rewards_fast.pvcp import FIELD_NAMES, PVCP, SCORE_NAMES, TERM_NAMES, Scores
from rewards_fast.settings import load_settings

BATCH = 512


def read_rows(path: Path, start: int = 0) -> Iterator[dict[str, Any]]:
    """Rows of a .jsonl or .parquet file from row `start` on, one at a time."""
    if path.suffix == ".parquet":
        try:
            import pyarrow.parquet as parquet
        except ImportError:
            raise SystemExit("reading Parquet needs pyarrow: pip install pyarrow") from None
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=BATCH):
            if start >= batch.num_rows:
                start -= batch.num_rows
                continue
            yield from batch.slice(start).to_pylist()
            start = 0
        return
    with path.open(encoding="utf-8") as lines:
        number = 0
        for line_number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            number += 1
            if number <= start:
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise SystemExit(f"{path}:{line_number}: no JSON ({error})") from None
            if not isinstance(row, dict):
                raise SystemExit(
                    f'{path}:{line_number}: a row is an object like {{"text": ..., "target": ...}}'
                )
            yield row


def count_rows(path: Path) -> int:
    """Rows of a file, for the progress bar."""
    if path.suffix == ".parquet":
        import pyarrow.parquet as parquet

        return int(parquet.ParquetFile(path).metadata.num_rows)
    with path.open("rb") as lines:
        return sum(1 for line in lines if line.strip())


def batches(rows: Iterable[dict[str, Any]], size: int = BATCH) -> Iterator[list[dict[str, Any]]]:
    """Rows in lists of at most `size`."""
    rows = iter(rows)
    while batch := list(islice(rows, size)):
        yield batch


def _json_number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def score_rows(scores: Scores) -> Iterator[dict[str, Any]]:
    """One flat record a text: scores, reason, sub-terms, fields. What is not finite becomes null."""
    for i in range(len(scores)):
        record: dict[str, Any] = {name: _json_number(getattr(scores, name)[i]) for name in SCORE_NAMES}
        record["reason"] = scores.reason[i]
        record.update({name: _json_number(scores.terms[name][i]) for name in TERM_NAMES})
        record.update({f"field_{name}": bool(scores.fields[name][i]) for name in FIELD_NAMES})
        yield record


class Progress:
    """A bar on a terminal, a line now and then elsewhere."""

    def __init__(self, total: int, done: int, stream: TextIO) -> None:
        self.total, self.start_done, self.done, self.stream = total, done, done, stream
        self.start = self.shown = time.perf_counter()
        self.live = stream.isatty()

    def advance(self, n: int) -> None:
        self.done += n
        now = time.perf_counter()
        if now - self.shown < (0.1 if self.live else 5.0) and self.done < self.total:
            return
        self.shown = now
        rate = (self.done - self.start_done) / max(now - self.start, 1e-9)
        part = self.done / self.total if self.total else 1.0
        bar = "#" * round(30 * part)
        end = "\r" if self.live and self.done < self.total else "\n"
        print(
            f"[{bar:<30}] {self.done}/{self.total}  {rate:,.0f} texts/s",
            end=end,
            file=self.stream,
            flush=True,
        )


def _complete_lines(path: Path) -> int:
    """Whole lines already in an output; a line that was cut off goes."""
    if not path.exists():
        return 0
    with path.open("rb+") as file:
        lines, kept = 0, 0
        for line in file:
            if not line.endswith(b"\n"):
                break
            lines, kept = lines + 1, kept + len(line)
        file.truncate(kept)
    return lines


def run_score(arguments: argparse.Namespace) -> int:
    """Streams the input through the scorer, appending to the output; a second call goes on where the first stopped."""
    source, out = Path(arguments.input), Path(arguments.output)
    if not source.exists():
        raise SystemExit(f"no file {source}")
    if arguments.restart:
        out.unlink(missing_ok=True)
    done = _complete_lines(out)
    scorer = PVCP(
        thresholds={"near": arguments.near, "close": arguments.close},
        threads=arguments.threads,
        extract=not arguments.strict,
    )
    progress = Progress(count_rows(source), done, sys.stderr)
    if done:
        print(f"{done} rows are in {out} already", file=sys.stderr)
    sum_of_totals, parsed, n = 0.0, 0, 0
    with out.open("a", encoding="utf-8") as sink:
        number = done
        for rows in batches(read_rows(source, done)):
            for offset, row in enumerate(rows):
                if not isinstance(row.get(arguments.text), str):
                    keys = ", ".join(map(str, row)) or "nothing"
                    raise SystemExit(
                        f"{source}, row {number + offset + 1}: no text under {arguments.text!r} (it has {keys})"
                    )
            targets = [row.get(arguments.target) for row in rows]
            try:
                scores = scorer.score([row[arguments.text] for row in rows], targets)
            except (ValueError, TypeError) as error:
                raise SystemExit(f"{source}, rows {number + 1} to {number + len(rows)}: {error}") from None
            for row, record in zip(rows, score_rows(scores)):
                if "id" in row:
                    record = {"id": row["id"], **record}
                sink.write(json.dumps(record) + "\n")
            sink.flush()
            number += len(rows)
            n += len(rows)
            sum_of_totals += float(scores.total.sum())
            parsed += sum(reason is None for reason in scores.reason)
            progress.advance(len(rows))
    if n:
        print(
            f"{n} texts: mean reward {sum_of_totals / n:.3f}, {100 * parsed / n:.1f} % parse", file=sys.stderr
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
    source = Path(arguments.input)
    if not source.exists():
        raise SystemExit(f"no file {source}")
    if source.suffix in (".jsonl", ".parquet"):
        texts = [
            row[arguments.text]
            for row in islice(read_rows(source), arguments.most)
            if isinstance(row.get(arguments.text), str)
        ]
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
    """The token of a file, else of the environment variable REWARDS_FAST_TOKEN; an argument would show in `ps`."""
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
    files = [item for item in arguments.settings if "=" not in item]
    if len(files) > 1:
        raise SystemExit(f"one settings file at most, got {', '.join(files)}")
    try:
        settings = load_settings(files[0] if files else None, [i for i in arguments.settings if "=" in i])
    except ValueError as error:
        raise SystemExit(str(error)) from None
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


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `rewards-fast`."""
    parser = argparse.ArgumentParser(prog="rewards-fast", description=__doc__)
    parser.add_argument("--version", action="version", version=importlib.metadata.version("catmllm"))
    commands = parser.add_subparsers(dest="command", required=True)
    score = commands.add_parser(
        "score", help="score answers of a .jsonl or .parquet file; resumes an unfinished output"
    )
    score.add_argument("input")
    score.add_argument("-o", "--output", required=True, help="a .jsonl file, one record an answer")
    score.add_argument("--text", default="text", help="key of the answer (text)")
    score.add_argument("--target", default="target", help="key of the wanted composition (target)")
    score.add_argument("--threads", type=int)
    score.add_argument(
        "--strict", action="store_true", help="score texts as they stand, do not look for the CIF in them"
    )
    score.add_argument(
        "--near", type=float, default=1.0, help="distance (Å) below which pairs cost 3 (Eq. 41: 1.0)"
    )
    score.add_argument(
        "--close", type=float, default=0.5, help="distance (Å) below which pairs cost 8 (Eq. 41: 0.5)"
    )
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
    arguments = parser.parse_args(argv)
    return int(arguments.run(arguments))


if __name__ == "__main__":
    sys.exit(main())
