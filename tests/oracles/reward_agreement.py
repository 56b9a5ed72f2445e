"""Holds the engine against the pymatgen reference on many texts, with the reference's verdicts kept on disk.

A verdict of pymatgen costs milliseconds, so each text is judged once and remembered by its hash: `python
tests/oracles/reward_agreement.py --mutants 200000 --cache /tmp/verdicts.sqlite` prints every difference.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import math
import os
import pickle
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import numpy as np

from rewards_fast import PVCP, CIFError, Thresholds, Weights
from rewards_fast.pvcp import TERM_NAMES
from rewards_fast.reference import measure, score_measurement

SHARED = Path(os.environ.get("CATMLLM_SHARED", Path(__file__).parents[2] / "shared"))
SCALARS = ("n_sites", "volume", "density", "min_distance")
TARGET = {"Pt": 9.0, "O": 1.0}  # any: every text is scored against it by both
DELIBERATE = ("limit",)  # the engine's limits
SECONDS = 5  # of processor time for pymatgen on one text


class Slow(BaseException):
    """pymatgen took longer than SECONDS; no Exception, or pymatgen and
    the reference would take it for a bad file."""


def _alarm(*_: object) -> None:
    raise Slow


def judge(text: str) -> dict[str, Any] | None:
    """The reference's measurements of a text as plain arrays, None where it refuses,
    {} where it takes too long."""
    signal.signal(signal.SIGVTALRM, _alarm)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        measured = measure(text)
    except CIFError:
        return None
    except Slow:
        return {}
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    scores = score_measurement(measured, TARGET, Weights(), Thresholds())
    return {
        **{name: getattr(measured, name) for name in SCALARS},
        "scores": scores,
        "composition": dict(measured.composition),
        "lattice": measured.crystal.lattice,
        "frac": measured.crystal.frac.astype(np.float64),
        "numbers": measured.crystal.numbers,
        "fields": dict(measured.fields),
    }


class Verdicts:
    """Verdicts of the reference by the hash of the text."""

    def __init__(self, path: str | Path = ":memory:") -> None:
        self.database = sqlite3.connect(path)
        self.database.execute("create table if not exists verdicts (hash blob primary key, verdict blob)")

    def __call__(self, text: str) -> dict[str, Any] | None:
        key = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        row = self.database.execute("select verdict from verdicts where hash = ?", (key,)).fetchone()
        if row is not None:
            return pickle.loads(row[0])
        verdict = judge(text)
        self.database.execute("insert or replace into verdicts values (?, ?)", (key, pickle.dumps(verdict)))
        return verdict

    def commit(self) -> None:
        self.database.commit()


def _close(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b)) or abs(a - b) <= 1e-6 * max(abs(a), abs(b)) + 1e-12


def _same_sites(ours: tuple[np.ndarray, np.ndarray], theirs: tuple[np.ndarray, np.ndarray]) -> bool:
    """Equal as multisets of (number, position modulo 1), to 1e-6."""
    if len(ours[1]) != len(theirs[1]):
        return False

    def keys(frac: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        wrapped = np.where(np.isfinite(frac), frac, 0.0)
        wrapped = wrapped - np.floor(wrapped)
        wrapped[wrapped > 1 - 5e-7] = 0.0
        return np.concatenate([numbers[:, None].astype(float), wrapped], axis=1)

    a, b = keys(*ours), keys(*theirs)
    a, b = (x[np.lexsort(np.round(x, 5).T)] for x in (a, b))
    if np.allclose(a, b, atol=1e-6, rtol=0):
        return True
    # the sort may put nearly equal positions in another order: match one by one
    free = list(range(len(b)))
    for row in a:
        offset = b[free] - row
        offset[:, 1:] -= np.round(offset[:, 1:])
        near = np.flatnonzero(np.all(np.abs(offset) < 1e-6, axis=1))
        if not len(near):
            return False
        free.pop(int(near[0]))
    return True


def differences(text: str, verdict: dict[str, Any] | None, scores: Any, i: int) -> list[str]:
    """What the engine says otherwise than the reference about text i of a scored batch; [] for agreement."""
    reason = scores.reason[i]
    if verdict is None:
        return [] if reason is not None else ["accepted, the reference refuses"]
    if not verdict:
        return []
    if reason in DELIBERATE:
        return []
    if reason is not None:
        return [f"refused ({reason}), the reference accepts"]
    crystal = scores.crystals[i]
    found = []
    for name in SCALARS:
        a, b = float(getattr(scores, name)[i]), float(verdict[name])
        # a distance is as exact as the coordinates it comes from: some ten roundings of a cell's length
        # in either program, whose images and sums have another order
        noise = 16 * np.finfo(float).eps * np.abs(verdict["lattice"]).max(initial=0)
        if not _close(a, b) and not (name == "min_distance" and abs(a - b) < max(1e-9, noise)):
            found.append(f"{name} {a!r} != {b!r}")
    for name in ("total", "comp", "valid", "phys"):
        a, b = float(getattr(scores, name)[i]), float(verdict["scores"][name])
        if not _close(a, b):
            found.append(f"{name} {a!r} != {b!r}")
    for name in TERM_NAMES:
        a, b = float(scores.terms[name][i]), float(verdict["scores"][name])
        if not _close(a, b):
            found.append(f"{name} {a!r} != {b!r}")
    for name, value in verdict["fields"].items():
        if bool(scores.fields[name][i]) != value:
            found.append(f"field {name} {not value} != {value}")
    ours, theirs = crystal.composition, verdict["composition"]
    if set(ours) != set(theirs) or not all(_close(ours[k], theirs[k]) for k in ours):
        found.append(f"composition {ours} != {theirs}")
    finite = np.isfinite(verdict["lattice"])
    if not (finite == np.isfinite(crystal.lattice)).all() or not np.allclose(
        crystal.lattice[finite],
        verdict["lattice"][finite],
        rtol=1e-6,
        atol=1e-9 * np.abs(verdict["lattice"][finite]).max(initial=0),
    ):
        found.append("lattice")
    if not _same_sites((crystal.frac, crystal.numbers), (verdict["frac"], verdict["numbers"])):
        found.append("sites")
    return found


def hash_decides(text: str) -> bool:
    """Whether pymatgen sorts compositions of a text among whose species some have no order.

    Neither of a dummy (electronegativity 0) and an element without one (nan) is less than the other, nor of
    implicit hydrogen and H with an oxidation number; and with these numbers K < He < X < K. Then the order of
    a set counts, and so the hash of a name, which differs from process to process; with amounts of 1e-8 it
    decides what swallows what.
    """
    from pymatgen.io import cif

    species: set[Any] = set()

    def seen(items: Iterable[Any], **options: Any) -> list[Any]:
        listed = list(items)
        if "key" in options:
            species.update(s for _, composition in listed for s in composition)
        return sorted(listed, **options)

    cif.sorted = seen  # type: ignore[attr-defined]
    try:
        judge(text)
    finally:
        del cif.sorted  # type: ignore[attr-defined]
    if any(not a < b and not b < a for a, b in combinations(species, 2)):
        return True
    return any(a < b and b < c and c < a for a, b, c in permutations(species, 3))


def blas_decides(text: str) -> bool:
    """Whether pymatgen sees the sites of a magnetic structure otherwise with other kernels of its BLAS: the
    inverse of a change of axes is rounded by them, and sites at the tolerance are one or two by that."""
    if "_magn" not in text and "_moment" not in text:
        return False
    code = (
        "import sys, pickle; from tests.oracles.reward_agreement import judge;"
        "sys.stdout.buffer.write(pickle.dumps((judge(sys.stdin.read()) or {}).get('n_sites')))"
    )
    found = {
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code],
            input=text.encode("utf-8", "surrogatepass"),
            capture_output=True,
            check=True,
            env=os.environ | {"OPENBLAS_CORETYPE": kernels, "PYTHONIOENCODING": "utf-8:surrogatepass"},
        ).stdout
        for kernels in ("Haswell", "Prescott")
    }
    return len(found) > 1


def undefined(text: str) -> str | None:
    """By what pymatgen itself gives this text several verdicts, or None where it has one."""
    return "the hash" if hash_decides(text) else "the BLAS" if blas_decides(text) else None


def compare(
    texts: Iterable[str], verdicts: Verdicts, batch: int = 256, several: Counter[str] | None = None
) -> Iterator[tuple[str, list[str]]]:
    """Yields every text that the engine and the reference see differently; those on which the reference is
    not of one mind are counted in `several`, where it is given."""
    scorer = PVCP(threads=1, extract=False)
    pending: list[str] = []

    def flush() -> Iterator[tuple[str, list[str]]]:
        scores = scorer.score(pending, TARGET)
        for i, text in enumerate(pending):
            found = differences(text, verdicts(text), scores, i)
            if found and several is not None and (why := undefined(text)):
                several[why] += 1
            elif found:
                yield text, found
        verdicts.commit()
        pending.clear()

    for text in texts:
        pending.append(text)
        if len(pending) == batch:
            yield from flush()
    yield from flush()


def corpus() -> list[str]:
    """The real CIF texts of the shared corpus."""
    with gzip.open(SHARED / "data/cif_corpus.jsonl.gz", "rt") as lines:
        return [json.loads(line)["text"] for line in lines]


def main() -> int:
    from tests.oracles.cif_mutants import KINDS, mutants, of_kind

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutants", type=int, default=0)
    parser.add_argument("--kind", choices=KINDS, help="mutants of this kind alone, made from nothing")
    parser.add_argument("--files", nargs="*", type=Path, help="these files instead of the shared corpus")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", default=":memory:")
    parser.add_argument("--show", type=int, default=20)
    parser.add_argument("--dump", help="write differing texts to this folder")
    arguments = parser.parse_args()
    texts: Iterator[str]
    if arguments.kind:
        texts = of_kind(arguments.kind, arguments.mutants, arguments.seed)
    elif arguments.files:
        texts = (path.read_text(encoding="utf-8", errors="surrogateescape") for path in arguments.files)
    else:
        originals = corpus()
        texts = (
            mutants(originals, arguments.mutants, arguments.seed) if arguments.mutants else iter(originals)
        )
    start, shown, n = time.perf_counter(), 0, 0

    def counted() -> Iterator[str]:
        nonlocal n
        for n, text in enumerate(texts, start=1):
            if n % 10_000 == 0:
                print(f"{n} texts, {shown} differences, {time.perf_counter() - start:.0f} s", flush=True)
            yield text

    several: Counter[str] = Counter()
    for text, found in compare(counted(), Verdicts(arguments.cache), several=several):
        shown += 1
        if shown <= arguments.show:
            print(
                f"--- {hashlib.md5(text.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}: "
                f"{'; '.join(found)[:400]}"
            )
        if arguments.dump:
            folder = Path(arguments.dump)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{shown:05d}.cif").write_bytes(text.encode("utf-8", "surrogatepass"))
            (folder / f"{shown:05d}.why").write_text("; ".join(found))
    own = "".join(f", {k} that {why} decides in pymatgen itself" for why, k in several.items())
    print(f"{n} texts, {shown} differences{own}")
    return shown > 0


if __name__ == "__main__":
    sys.exit(main())
