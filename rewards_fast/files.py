"""Files of answers: read a row at a time, whatever a row holds,
scored into a file that a second call goes on with.

A row that cannot be scored costs itself: its record has null for every number,
a `reason` and the `problem` in words.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.metadata
import json
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import numpy as np

from rewards_fast.conversation import Conversation
from rewards_fast.integrations.loops import score_answers
from rewards_fast.pvcp import FIELD_NAMES, SCORE_NAMES, TERM_NAMES, Scores
from rewards_fast.settings import LoopSettings
from rewards_fast.targets import MissingTargets, Target, parse_target

BATCH = 512
UNREADABLE, NO_TEXT, BAD_TARGET = "unreadable", "no_text", "bad_target"


@dataclass
class Row:
    """One row of a file: its answer and target, or why it has none."""

    number: int  # from 1, blank lines not counted
    source: dict[str, Any]
    text: Conversation = ""
    target: Target = None
    reason: str | None = None
    problem: str = ""

    def digest(self, settings: str) -> str:
        """What a score was made of: 16 hexadecimal digits of answer, target, settings and version."""
        made_of = json.dumps(
            [settings, self.text, self.target, self.reason, self.problem], sort_keys=True, default=str
        )
        return hashlib.blake2b(made_of.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def _open(path: Path) -> BinaryIO:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _lines(path: Path) -> Iterator[bytes]:
    """Lines that are not blank; SystemExit where the file itself cannot be read on."""
    try:
        with _open(path) as file:
            start = file.peek(2)[:2] if hasattr(file, "peek") else b""
            if start in (b"\xff\xfe", b"\xfe\xff"):
                raise SystemExit(f"{path}: is UTF-16; write it as UTF-8")
            for line in file:
                if line.strip(b" \t\r\n\xef\xbb\xbf"):
                    yield line
    except (OSError, EOFError, zlib.error) as error:
        raise SystemExit(f"{path}: cannot be read on: {error}") from None


def _objects(path: Path) -> Iterator[dict[str, Any] | str]:
    """The objects of a .jsonl, .jsonl.gz or .parquet file; in the place of one that cannot be read,
    what is wrong with it."""
    if path.suffix == ".parquet":
        try:
            import pyarrow
            import pyarrow.parquet as parquet
        except ImportError:
            raise SystemExit("reading Parquet needs pyarrow: pip install pyarrow") from None
        try:
            for batch in parquet.ParquetFile(path).iter_batches(batch_size=BATCH):
                yield from batch.to_pylist()
        except (OSError, pyarrow.ArrowException) as error:
            raise SystemExit(f"{path}: cannot be read on: {error}") from None
        return
    for line in _lines(path):
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            yield f"not UTF-8: byte 0x{line[error.start]:02x} at {error.start}"
        except (ValueError, RecursionError) as error:
            yield f"not JSON: {error}"
        else:
            yield row if isinstance(row, dict) else f"a {type(row).__name__}, not an object"


def read_rows(path: Path, text: str = "text", target: str = "target") -> Iterator[Row]:
    """The rows of a file, one at a time. text, target: the keys of the answer (a text, or the messages of a
    conversation) and of the wanted composition (see `parse_target`)."""
    for number, found in enumerate(_objects(path), start=1):
        if isinstance(found, str):
            yield Row(number, {}, reason=UNREADABLE, problem=found)
            continue
        answer, wanted = found.get(text), found.get(target)
        row = Row(number, found, answer, wanted)  # type: ignore[arg-type]
        said = isinstance(answer, str) or (
            isinstance(answer, list) and all(isinstance(m, dict) for m in answer)
        )
        if not said:
            keys = ", ".join(map(str, found)) or "nothing"
            row.reason, row.problem, row.text = NO_TEXT, f"no text under {text!r} (it has {keys})", ""
        else:
            try:
                parse_target(wanted)
            except (ValueError, TypeError) as error:
                row.reason, row.problem = BAD_TARGET, str(error)
        yield row


def count_rows(path: Path) -> int:
    """Rows of a file, for the progress bar."""
    if path.suffix == ".parquet":
        import pyarrow.parquet as parquet

        return int(parquet.ParquetFile(path).metadata.num_rows)
    return sum(1 for _ in _lines(path))


def _json_number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def score_records(scores: Scores) -> Iterator[dict[str, Any]]:
    """One flat record per text: scores, reason, sub-terms, fields. What is not finite becomes null."""
    for i in range(len(scores)):
        record: dict[str, Any] = {name: _json_number(getattr(scores, name)[i]) for name in SCORE_NAMES}
        record["reason"] = scores.reason[i]
        record.update({name: _json_number(scores.terms[name][i]) for name in TERM_NAMES})
        record.update({f"field_{name}": bool(scores.fields[name][i]) for name in FIELD_NAMES})
        yield record


def _unscored(row: Row) -> dict[str, Any]:
    return {**dict.fromkeys(SCORE_NAMES), "reason": row.reason, "problem": row.problem}


def _digests(out: Path) -> Iterator[tuple[int, str]]:
    """Number and digest of each whole line of an earlier output; what follows the last whole line is cut off.

    SystemExit where the file is not such an output, before anything in it is changed."""
    if not out.exists():
        return
    kept = 0
    with out.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                digest = json.loads(line)["digest"] if line.endswith(b"\n") else None
            except (ValueError, TypeError, KeyError):
                raise SystemExit(
                    f"{out}:{number}: not an output of this command; name another file, or --restart writes "
                    "over it"
                ) from None
            if digest is None:
                if number == 1:  # one line without an end may be anybody's
                    raise SystemExit(
                        f"{out}: has no whole line of an output; name another file, or --restart"
                    )
                break
            kept += len(line)
            yield number, digest
    with out.open("rb+") as file:
        file.truncate(kept)


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
        line = f"[{bar:<30}] {self.done}/{self.total}  {rate:,.0f} texts/s"
        print(line, end=end, file=self.stream, flush=True)


def batches(rows: Iterable[Row], size: int = BATCH) -> Iterator[list[Row]]:
    """Rows in lists of at most `size`."""
    rows = iter(rows)
    while batch := list(islice(rows, size)):
        yield batch


def _pass_over(out: Path, rows: Iterator[Row], source: Path, fingerprint: str) -> int:
    """Takes from `rows` those that `out` has scores of; how many. SystemExit where one is another."""
    done = 0
    for number, digest in _digests(out):
        row = next(rows, None)
        if row is None or row.digest(fingerprint) != digest:
            what = "has no row for it any more" if row is None else "is another answer, target or setting now"
            raise SystemExit(
                f"{out}:{number} was scored earlier, and row {number} of {source} {what}; "
                "name another output, or score anew with --restart"
            )
        done = number
    return done


def score_file(
    source: Path,
    out: Path,
    settings: LoopSettings,
    text: str = "text",
    target: str = "target",
    restart: bool = False,
) -> None:
    """Scores a file into `out`, a .jsonl with one record per row, and goes on where an earlier call stopped.

    A record's `digest` is made of its answer, target and settings: where one in `out` is not that of the row
    at its place, the earlier scores are of something else, and SystemExit says so instead of keeping or
    losing them.
    """
    if out.exists() and out.samefile(source):
        raise SystemExit(f"{out} is the input itself")
    if restart:
        out.unlink(missing_ok=True)
    made_by = {k: v for k, v in vars(settings).items() if k != "threads"}
    fingerprint = json.dumps([importlib.metadata.version("catmllm"), made_by], sort_keys=True)
    rows = read_rows(source, text, target)
    done = _pass_over(out, rows, source, fingerprint)
    if done:
        print(f"{done} rows are in {out} already", file=sys.stderr)
    progress = Progress(count_rows(source), done, sys.stderr)
    watch = MissingTargets(str(source))
    hint = f"No row has anything under {target!r}, or its prompt names none."
    reasons: Counter[str] = Counter()
    total, parsed, n, first = 0.0, 0, 0, ""
    with out.open("a", encoding="utf-8") as sink:
        for batch in batches(rows):
            good = [row for row in batch if row.reason is None]
            try:
                scores, _ = score_answers(
                    settings, [r.text for r in good], [r.target for r in good], watch, hint
                )
            except ValueError as error:  # a missing target, where that is an error
                raise SystemExit(f"{error} (rows {batch[0].number} to {batch[-1].number})") from None
            records = score_records(scores)
            for row in batch:
                record = _unscored(row) if row.reason else next(records)
                record = {"digest": row.digest(fingerprint), **record}
                if "id" in row.source:
                    record = {"id": row.source["id"], **record}
                sink.write(json.dumps(record) + "\n")
                if row.reason:
                    reasons[row.reason] += 1
                    first = first or f"row {row.number}: {row.problem}"
            sink.flush()
            n += len(good)
            total += float(scores.total.sum())
            parsed += sum(reason is None for reason in scores.reason)
            progress.advance(len(batch))
    if n:
        print(f"{n} texts: mean reward {total / n:.3f}, {100 * parsed / n:.1f} % parse", file=sys.stderr)
    if watch.missing:
        print(f"{watch.missing} of {watch.seen} texts have no target composition", file=sys.stderr)
    if reasons:
        counts = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
        print(f"{reasons.total()} rows are not scored ({counts}); the first is {first}", file=sys.stderr)
