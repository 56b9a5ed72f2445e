"""Adsorption systems on slabs, shipped with the package, and the split into training, validation and test.

3,008 systems (H, O, N, C, CO, OH, NH and CH on 2x2x3 slabs of nine fcc metals and their A3B and AB alloys)
are in two files of the same records: `fcc_slabs_diep.jsonl.gz` has energies and structures by DIEP (r2SCAN),
`fcc_slabs_7net.jsonl.gz` the older ones by SevenNet-0. `wide_slabs_diep.jsonl.gz` has what `catmllm data
make` made with seed 11: more metals, facets, cells and adsorbates (`surfaces.py`). Both potentials are
machine-learned, not DFT: results on them say whether the pipeline works, nothing about real catalysts.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from catmllm.structure.elements import atomic_number
from catmllm.structure.formula import SEPARATOR, format_formula, parse_identity, reduce_counts
from catmllm.structure.system import System, make_system

SHIPPED = Path(__file__).with_name("fcc_slabs_diep.jsonl.gz")
SHIPPED_SEVENNET = SHIPPED.with_name("fcc_slabs_7net.jsonl.gz")
WIDE = SHIPPED.with_name("wide_slabs_diep.jsonl.gz")
WIDE_SEED = 11  # `catmllm data make --seed 11` makes it again

SplitName = Literal["train", "val", "test"]


def load_slabs(path: str | Path | None = None) -> list[System]:
    """The usable systems of a JSON-lines file (gzip by its name), in file order; None:
    the 2,992 of 3,008 by DIEP on fcc slabs.

    A record that says `"ok": false` (unconverged, dissociated, desorbed) is left out. Energy: adsorption
    energy in eV. The sid of a shipped record is `7net-<seed>-<slab>-<number>`; `slab_id` gives its slab.
    Raises ValueError that names file and line of a bad record.
    """
    source = SHIPPED if path is None else Path(path)
    opened = gzip.open if source.suffix == ".gz" else open
    systems = []
    with opened(source, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                if record.get("ok", True):
                    systems.append(_system(record))
            except KeyError as error:
                raise ValueError(f"{source}, line {number}: the record lacks {error}") from error
            except (TypeError, ValueError) as error:
                raise ValueError(f"{source}, line {number}: {error}") from error
    return systems


def _system(record: dict[str, Any]) -> System:
    return make_system(
        record["cell"],
        record["pos"],
        [atomic_number(symbol) for symbol in record["symbols"]],
        record["tags"],
        record["adsorbate"],
        record["miller"],
        energy=record["energy"],
        sid=record["sid"],
        start_positions=record.get("pos_start"),
    )


def slab_id(system: System) -> str:
    """The slab that a system stands on: `7net-101-0` of `7net-101-0-3`.
    Systems of one slab share the metal atoms."""
    return system.sid.rpartition("-")[0]


def on_fcc_slab(system: System) -> bool:
    """Whether a shipped system is one of the 3,008, the subset `fcc` of `data.slabs: all`."""
    return system.sid.startswith("7net-")


def split(
    systems: Sequence[System], seed: int = 0, first: int | None = None
) -> dict[SplitName, list[System]]:
    """About 80 / 10 / 10 % of the systems as train / val / test, whole (bulk, Miller index) pairs at a time.

    The pairs of the `first` systems (None: of all) are dealt as if there were no others, and the pairs that
    only later ones have among themselves. So no pair changes its part where systems are added at the end.

    By pair because a split by slab is no split: slabs of one metal and facet repeat, and 23 % of the test
    slabs would have an exact twin in training (and by sample nearly all). The bulk is the reduced formula in
    canonical order, so `IrPd` and `PdIr` are one. Each part is sorted by sid. Parts may be empty where there
    are few pairs.
    """
    pairs: dict[str, list[System]] = defaultdict(list)
    for system in systems[:first]:
        pairs[pair(system)].append(system)
    part_of = split_pairs({name: len(group) for name, group in pairs.items()}, seed)
    for system in systems[len(systems) if first is None else first :]:
        pairs[pair(system)].append(system)
    later = {name: len(group) for name, group in pairs.items() if name not in part_of}
    part_of |= split_pairs(later, seed)
    parts: dict[SplitName, list[System]] = {"train": [], "val": [], "test": []}
    for name, group in pairs.items():
        parts[part_of[name]].extend(group)
    return {part: sorted(members, key=lambda system: system.sid) for part, members in parts.items()}


def pair(system: System) -> str:
    """Its (bulk, Miller index), such as `PdIr (1, 1, 1)`, by which data are split."""
    return f"{system.bulk} {system.miller or '(?)'}"


def pair_of(identity: str) -> str:
    """The same of an identity line, whatever it says of the adsorbate."""
    _, slab, miller = parse_identity(SEPARATOR + identity.partition(SEPARATOR)[2])
    return f"{format_formula(reduce_counts(slab)[0])} {miller or '(?)'}"


def split_pairs(counts: Mapping[str, int], seed: int = 0) -> dict[str, SplitName]:
    """The part that each pair belongs to, of the number of systems by pair (`PdIr (1, 1, 1)`).

    The pairs are taken in the order of a hash of (seed, pair),
    so the result depends neither on the order of the systems nor on the machine.
    """
    shuffled = sorted(counts, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())
    total = sum(counts.values())
    filled: dict[SplitName, int] = {"test": 0, "val": 0}
    chosen: dict[str, SplitName] = {}
    for name in shuffled:
        chosen[name] = "train"
        for part in filled:
            # a pair goes in if most of it fits into the tenth that the part is meant to have
            if filled[part] + counts[name] / 2 <= total / 10:
                filled[part] += counts[name]
                chosen[name] = part
                break
    return chosen
