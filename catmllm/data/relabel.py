"""Give the systems of a file new labels by another potential, each from where it stands.

    catmllm data relabel slabs.jsonl.gz --out relabelled.jsonl

The surface layer of each slab is relaxed anew, then the adsorbate on the rigid slab; energies are counted
from the gases by the same potential. Every record keeps its name, its start and its old label. Finished slabs
are appended to the file, so a killed run goes on by the same command.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from catmllm.data.oracle import GASES, SWING, atomic_references
from catmllm.data.surfaces import refusal
from catmllm.potentials.hessian import on_relaxed_slab
from catmllm.potentials.relax import BLOWN_UP, Potential, PotentialMissing, Relaxed, Start, Structure, relaxed
from catmllm.structure.elements import atomic_number
from catmllm.structure.system import ADSORBATE, BULK

Record = dict[str, Any]
NEEDED = (
    "sid", "slab", "adsorbate", "miller", "energy", "ok", "symbols", "cell", "tags", "pos", "pos_start"
)  # fmt: skip


def by_slab(path: Path) -> dict[str, list[Record]]:
    """The records of a JSON-lines file (gzip by its name) by their slab, in the order of the file. Raises
    ValueError for a line that is no such record."""
    opened = gzip.open if path.suffix == ".gz" else open
    groups: dict[str, list[Record]] = {}
    with opened(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                missing = [key for key in NEEDED if key not in record]
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: not a JSON record: {error}") from error
            if missing:
                raise ValueError(
                    f"{path}, line {number}: no `{missing[0]}`; only what `catmllm data make` made, and the "
                    "shipped file, can be relabelled"
                )
            groups.setdefault(record["slab"], []).append(record)
    return groups


def relabelled(
    records: Sequence[Record], potential: Potential, references: Mapping[str, float], source: str
) -> list[Record]:
    """The records of one slab with labels by the potential; the old energy becomes `energy_<source>`, and
    `frames`, whose energies are old ones too, go."""
    first = records[0]
    tags = np.array(first["tags"])
    slab, bottom = tags != ADSORBATE, tags[tags != ADSORBATE] == BULK
    lattice = np.array(first["cell"], dtype=np.float64)
    numbers = np.array([atomic_number(s) for s in first["symbols"]])
    start = Start(Structure(numbers[slab], lattice, np.array(first["pos"])[slab], ~bottom))
    (base,) = relaxed([start], potential, max_steps=100, swing=SWING["diep"])
    starts = []
    for record in records:
        tags = np.array(record["tags"])
        own = np.array([atomic_number(s) for s in record["symbols"]])
        structure = Structure(own, lattice, np.array(record["pos"], dtype=np.float64), tags == ADSORBATE)
        surface = (tags != ADSORBATE) & (tags != BULK)
        starts.append(on_relaxed_slab(structure, base.positions, surface))
    ends = relaxed(starts, potential, longest=0.15, swing=SWING["diep"])
    return [_labelled(r, base, e, references, source) for r, e in zip(records, ends)]


def _labelled(
    record: Record, slab: Relaxed, end: Relaxed, references: Mapping[str, float], source: str
) -> Record:
    adsorbate = np.array(record["tags"]) == ADSORBATE
    symbols = [s for s, there in zip(record["symbols"], adsorbate) if there]
    energy = end.energy - slab.energy - sum(references[s] for s in symbols)
    start = np.array(record["pos_start"])
    start[~adsorbate] = slab.positions
    reason = refusal(record, slab, end, energy)
    kept = {key: value for key, value in record.items() if key != "frames"}
    return kept | {
        "energy": round(energy, 5) if np.isfinite(energy) else None,
        "ok": reason is None,
        "reason": reason,
        "converged": end.converged,
        "steps": end.steps,
        "pos_start": np.round(start, 4).tolist(),
        "pos": np.round(end.positions, 4).tolist(),
        f"energy_{source}": record["energy"],
        f"ok_{source}": record["ok"],
    }


def relabel(
    path: Path, out: Path, potential: Potential, source: str = "old", progress: bool = True
) -> Counter[str]:
    """Relabel a file, slab by slab, into `out` (JSON lines); returns how many systems count (`ok`) and why
    others do not. Slabs that `out` holds already are kept, a half-written one is made again. Raises
    ValueError where `out` is something else, and is left as it is."""
    from tqdm import tqdm

    if out.suffix == ".gz":
        raise ValueError(f"{out}: a plain file is appended to as slabs get done; give --out FILE.jsonl")
    groups = by_slab(path)
    size, counts, done = _finished(out, groups, source)
    references = atomic_references(potential, tuple(GASES))
    with open(out, "ab") as file:
        file.truncate(size)
        left = [name for name in groups if name not in done]
        for name in tqdm(left, unit="slab", initial=len(done), total=len(groups), disable=not progress):
            try:
                made = relabelled(groups[name], potential, references, source)
            except BLOWN_UP as error:
                raise RuntimeError(f"slab {name}: {error}") from error
            counts.update(r["reason"] or "ok" for r in made)
            file.write("".join(json.dumps(r, allow_nan=False) + "\n" for r in made).encode())
            file.flush()
    return counts


def _finished(
    out: Path, groups: Mapping[str, Sequence[Record]], source: str
) -> tuple[int, Counter[str], set[str]]:
    """Bytes of whole slabs in `out`, what their systems are, and their names."""
    size, counts, done = 0, Counter[str](), set[str]()
    if not out.exists():
        return size, counts, done
    block: list[Record] = []
    held = 0
    for line in _whole_lines(out):
        record = json.loads(line)
        if record["slab"] not in groups:
            raise ValueError(
                f"{out} holds slab {record['slab']}, which is not in the file: give another --out"
            )
        if f"energy_{source}" not in record:
            raise ValueError(
                f"{out} holds a record without `energy_{source}`: give the --source that it was begun with, "
                "or another --out"
            )
        block.append(record)
        held += len(line)
        if len(block) == len(groups[record["slab"]]):
            size += held
            counts.update(r["reason"] or "ok" for r in block)
            done.add(record["slab"])
            block, held = [], 0
    return size, counts, done


def _whole_lines(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        yield from (line for line in file if line.endswith(b"\n"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `catmllm data relabel`."""
    parser.description = (
        "Give the systems of a file new labels by DIEP (r2SCAN), a machine-learned potential: the surface "
        "layer and then the adsorbate are relaxed from where they stand. The old energies stay in the "
        "records. After a kill the same command goes on."
    )
    parser.add_argument("slabs", type=Path, metavar="FILE.jsonl[.gz]", help="what `catmllm data make` makes")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.jsonl", help="the file to make")
    parser.add_argument(
        "--source", default="old", help="what made the old labels: energy_SOURCE (default old)"
    )


def main(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    import torch

    from catmllm.potentials.diep import diep

    torch.set_num_threads(1)
    began = time.process_time()
    try:
        counts = relabel(args.slabs, args.out, diep(), args.source)
    except (PotentialMissing, OSError, ValueError, RuntimeError) as error:
        print(f"catmllm data relabel: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"catmllm data relabel: stopped; {args.out} keeps what is done", file=sys.stderr)
        return 130
    said = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
    print(f"{args.out}: {said}; {time.process_time() - began:.0f} s of CPU")
    return 0
