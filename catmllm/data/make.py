"""Make adsorption systems on random slabs, labelled by DIEP, in any number of processes.

    catmllm data make --slabs 100 --seed 7 --out more.jsonl.gz

The labels are those of a machine-learned potential, not DFT; `surfaces.py` has the protocol. Every slab has
its own random stream, so neither the number of workers nor a kill changes what is made. The shipped file is
SevenNet-0's, by an older protocol (`fcc_slabs.py`) with one stream for all slabs of a seed; `--check` repeats
its beginning.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import math
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from itertools import islice
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from random import Random
from typing import Any

from catmllm.data.fcc_slabs import Record, slab_records
from catmllm.data.oracle import GASES, atomic_references, require_sevennet, sevennet
from catmllm.data.surfaces import surface_records
from catmllm.potentials.relax import Potential, PotentialMissing, by_calculator

PotentialFactory = Callable[[], Potential]


def labelling_potential() -> Potential:
    """DIEP on one thread: workers share the cores by being many, and one thread gives one result."""
    import torch

    from catmllm.potentials.diep import diep

    torch.set_num_threads(1)
    return diep()


# --------------------------------------------------------------------------- the shipped file, again


def reproduce_shipped(
    slabs: int = 2, per_slab: int = 8, limit: int | None = None, seed: int = 101
) -> Iterator[tuple[Record, Record]]:
    """Make the first systems of a shipped seed again (101 or 202), and yield pairs (made now, shipped).

    The shipped slabs of a seed share one random stream, and where it goes depends on the relaxed slabs: only
    its beginning can be repeated, in order and in one process. `limit` stops after so many systems.
    """
    from catmllm.data.slabs import SHIPPED_SEVENNET  # pulls in Numba, which no worker needs

    with gzip.open(SHIPPED_SEVENNET, "rt", encoding="utf-8") as file:
        shipped = {record["sid"]: record for record in map(json.loads, file)}
    import torch

    torch.set_num_threads(1)
    calculator = sevennet()
    references = atomic_references(by_calculator(calculator))
    rng = Random(seed)

    def made() -> Iterator[Record]:
        for slab in range(slabs):
            yield from slab_records(rng, f"{seed}-{slab}", per_slab, calculator, references)

    for record in islice(made(), limit):
        yield record, shipped[record["sid"]]


def difference(made: Record, shipped: Record) -> float:
    """How far two labels of one system are apart, eV; inf where they
    are not the same system or differ in `ok`."""
    same = all(made[key] == shipped[key] for key in ("symbols", "adsorbate", "start_site", "ok"))
    if not same or made["energy"] is None:
        return math.inf
    return abs(made["energy"] - shipped["energy"])


def check(tolerance: float = 0.005) -> int:
    """Print how well this machine repeats two shipped slabs;
    returns the exit status (1 beyond `tolerance`, eV)."""
    worst = 0.0
    for record, shipped in reproduce_shipped():
        error = difference(record, shipped)
        worst = max(worst, error)
        print(
            f"{record['sid']:<14}{record['adsorbate']:<4}{record['start_site']:<8}"
            f"made {record['energy']} eV   shipped {shipped['energy']} eV   apart {1000 * error:.2f} meV",
            flush=True,
        )
    passed = worst <= tolerance
    print(
        f"{'agrees' if passed else 'DIFFERS'}: worst {1000 * worst:.2f} meV, allowed "
        f"{1000 * tolerance:.0f} meV"
    )
    return 0 if passed else 1


# --------------------------------------------------------------------------- many slabs,
# in any number of processes

_worker: dict[str, Any] = {}  # calculator and references of this process


def exit_with_parent() -> None:
    """A killed parent leaves pool workers waiting for ever; end them with it."""
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _load(factory: PotentialFactory) -> None:
    _worker["potential"] = factory()
    _worker["references"] = atomic_references(_worker["potential"], tuple(GASES))


def _start_worker(factory: PotentialFactory) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=exit_with_parent, daemon=True).start()
    _load(factory)


def _make_slab(seed: int, slab: int, per_slab: int) -> str:
    """All records of one slab as JSON lines; depends on (seed, slab, per_slab) alone."""
    rng = Random(f"{seed}/{slab}")
    records = surface_records(rng, f"p{seed}-{slab}", per_slab, _worker["potential"], _worker["references"])
    return "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)


def _made_slabs(
    todo: list[int], seed: int, per_slab: int, workers: int, factory: PotentialFactory
) -> Generator[tuple[int, str], None, None]:
    """Yield (slab, its lines) as slabs get done, in any order."""
    workers = min(workers, len(todo))
    if workers <= 1:
        if not todo:
            return
        _load(factory)
        for slab in todo:
            yield slab, _make_slab(seed, slab, per_slab)
        return
    pool = ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=_start_worker, initargs=(factory,)
    )
    try:
        futures = {pool.submit(_make_slab, seed, slab, per_slab): slab for slab in todo}
        for future in as_completed(futures):
            yield futures.pop(future), future.result()
    finally:
        processes = list((pool._processes or {}).values())  # 3.14 has terminate_workers()
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()  # a slab that is under way is not waited for; it is made again


class MakeError(RuntimeError):
    """The run cannot go on; the message says why, what is kept and what to do."""


def part_path(out: Path) -> Path:
    """Where finished slabs are kept until all are done: one JSON record a line,
    slabs in the order they got done."""
    return out.with_name(out.name + ".part")


def read_finished(path: Path, seed: int, per_slab: int) -> tuple[dict[int, str], int]:
    """Whole slabs of a file that an earlier run left: {slab: its lines}, and the bytes (unpacked)
    they take up.

    What a kill tore off, a half line or a slab short of records at the end, is left out. Raises `MakeError`
    if the file is of another seed or number per slab, or damaged elsewhere.
    """
    if not path.exists():
        return {}, 0
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, OSError) as error:
        raise MakeError(f"{path} cannot be read: {error}. Move it away, or choose another --out") from error
    finished: dict[int, str] = {}
    size = 0
    lines = data[: data.rfind(b"\n") + 1].decode("utf-8", errors="replace").splitlines(keepends=True)
    for first in range(0, len(lines), per_slab):
        block = lines[first : first + per_slab]
        for k, line in enumerate(block):
            try:
                label, sid = (json.loads(line)[key] for key in ("slab", "sid"))
            except (ValueError, KeyError, TypeError) as error:
                raise MakeError(
                    f"{path}, line {first + k + 1}: not a record ({error}). Move the file away"
                ) from error
            if k == 0:
                expected = label
            if not label.startswith(f"p{seed}-") or sid != f"diep-{expected}-{k}":
                raise MakeError(
                    f"{path}, line {first + k + 1}: {sid} does not belong to --seed {seed} --per-slab "
                    f"{per_slab}. Give the settings that the file was made with, or another --out"
                )
        if len(block) == per_slab:
            finished[int(expected.rsplit("-", 1)[1])] = "".join(block)
            size += sum(len(line.encode()) for line in block)
    return finished, size


def _write_whole(out: Path, text: str) -> None:
    """Write `out` at once (gzip by its name, without time stamp: same records, same bytes) or not at all."""
    temporary = out.with_name(out.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            if out.suffix == ".gz":
                with gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as packed:
                    packed.write(text.encode())
            else:
                file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, out)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _open_part(part: Path, size: int) -> io.BufferedWriter:
    """Open the part file for appending after its first `size` bytes, which are whole slabs."""
    file = open(part, "ab")  # noqa: SIM115 (the caller closes it)
    file.truncate(size)
    return file


def make(
    out: Path,
    slabs: int,
    seed: int,
    per_slab: int = 8,
    workers: int = 1,
    factory: PotentialFactory = labelling_potential,
    progress: bool = True,
) -> None:
    """Make `slabs` slabs with `per_slab` systems each and write them to `out`,
    JSON lines (gzip if it ends in .gz).

    Slabs that an earlier run of the same settings finished are taken over from `out` and from its part file,
    so a killed run goes on and a finished one can be extended; the file is the same as that of an unbroken
    run. `factory` makes the potential in each process (picklable if workers > 1). Raises `MakeError`,
    `PotentialMissing`.
    """
    from tqdm import tqdm

    part = part_path(out)
    whole, _ = read_finished(out, seed, per_slab)
    if len(whole) > slabs:
        raise MakeError(
            f"{out} already holds {len(whole)} slabs, more than the {slabs} asked for; it is left as it is"
        )
    kept, size = read_finished(part, seed, per_slab)
    finished = whole | kept
    todo = [slab for slab in range(slabs) if slab not in finished]
    if not todo and not part.exists():
        print(f"{out} is complete: {slabs} slabs", file=sys.stderr)
        return
    target = part

    def state() -> str:
        return (
            f"{len(finished)} of {slabs} slabs are kept in {part}" if finished else "no slab was finished yet"
        )

    with _said(lambda: target, state):
        out.parent.mkdir(parents=True, exist_ok=True)
        with (
            _open_part(part, size) as file,
            tqdm(total=slabs, initial=slabs - len(todo), unit="slab", disable=not progress) as bar,
            closing(_made_slabs(todo, seed, per_slab, workers, factory)) as made,  # an error ends the workers
        ):
            for slab, lines in made:
                file.write(lines.encode())
                file.flush()
                finished[slab] = lines
                bar.update()
        target = out
        _write_whole(out, "".join(finished[slab] for slab in range(slabs)))
        part.unlink(missing_ok=True)


@contextmanager
def _said(target: Callable[[], Path], state: Callable[[], str]) -> Iterator[None]:
    """What a person can mend, as a MakeError that says what is kept and how to go on."""
    try:
        yield
    except OSError as error:
        raise MakeError(
            f"cannot write {target()}: {error.strerror or error}; {state()}. "
            "Make room (or fix the folder) and give the same command again to go on"
        ) from error
    except BrokenProcessPool as error:
        raise MakeError(
            f"a worker process died ({error}), perhaps for want of memory; {state()}. "
            "Give the same command again, with fewer --workers, to go on"
        ) from error


def told(out: Path) -> str:
    """How many systems of a file count, and why others do not."""
    with (gzip.open if out.suffix == ".gz" else open)(out, "rt", encoding="utf-8") as lines:
        reasons = Counter(json.loads(line)["reason"] for line in lines)
    usable = reasons.pop(None, 0)
    refused = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    return f"{usable + reasons.total()} systems, {usable} of them usable{refused and '; ' + refused}"


# --------------------------------------------------------------------------- the command


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, not {value}")
    return value


def _data_path(text: str) -> Path:
    if not text.endswith((".jsonl", ".jsonl.gz")):
        raise argparse.ArgumentTypeError(f"{text!r} must end in .jsonl or .jsonl.gz")
    return Path(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `catmllm data make`."""
    parser.description = (
        "Make adsorption systems on random slabs of 23 metals and their alloys. The labels are adsorption "
        "energies by DIEP (r2SCAN), a machine-learned potential: they are not DFT. About 2.5 s a slab of 8 "
        "systems and core. Finished slabs are kept in OUT.part until all are done: after a kill the same "
        "command goes on from there, and with a larger --slabs it extends a finished file."
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--slabs", type=_positive, default=100, help="slabs to make (default %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=1, help="seed; each slab has its own stream (default %(default)s)"
    )
    parser.add_argument("--out", type=_data_path, metavar="FILE.jsonl[.gz]", help="the file to make")
    parser.add_argument("--per-slab", type=_positive, default=8, help="systems a slab (default %(default)s)")
    parser.add_argument(
        "--workers",
        type=_positive,
        default=cores,
        help="processes of one thread each (default: all cores, %(default)s)",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="make the first two shipped slabs again and compare, write nothing (1 min)",
    )


def main(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    if not args.check and args.out is None:
        print("catmllm data make: --out FILE.jsonl[.gz] is missing", file=sys.stderr)
        return 2
    try:
        if args.check:
            require_sevennet()
            return check()
        labelling_potential()  # says at once what is missing
        make(args.out, args.slabs, args.seed, args.per_slab, args.workers)
        print(f"{args.out}: {told(args.out)}")
    except (MakeError, PotentialMissing) as error:
        print(f"catmllm data make: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        kept = f"; finished slabs are kept in {part_path(args.out)}" if args.out else ""
        print(f"catmllm data make: stopped{kept}. The same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    cli = argparse.ArgumentParser(prog="python -m catmllm.data.make")
    add_arguments(cli)
    sys.exit(main(cli.parse_args()))
