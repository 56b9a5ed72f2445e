"""The one door to adsorption systems: what `data.path` names, split for training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from catmllm.config import DataConfig
from catmllm.data.shards import Shards
from catmllm.data.slabs import SHIPPED, SHIPPED_SEVENNET, WIDE, load_slabs, split
from catmllm.data.splits import parts_of
from catmllm.data.subsets import part
from catmllm.structure.formula import SEPARATOR
from catmllm.structure.system import System

PARTS = ("train", "val", "test")


def open_data(config: DataConfig | None = None) -> dict[str, Sequence[System]]:
    """`parts`, of whose training systems so many are kept as `data.train_systems` and `data.share` say."""
    config = DataConfig() if config is None else config
    found = parts(config)
    train, n = found["train"], config.train_systems
    if n is not None and n < len(train):
        rows = np.linspace(0, len(train) - 1, n).round().astype(np.int64)
        found["train"] = train[rows] if isinstance(train, Shards) else [train[i] for i in rows]
    found["train"] = part(found["train"], (0.0, config.share), config.split_seed, config.unit, "data.share")
    return found


def texts_only(systems: Sequence[System]) -> bool:
    """Whether a data set is one of texts without structures; no data set has both."""
    return len(systems) > 0 and systems[0].text is not None


def parts(config: DataConfig) -> dict[str, Sequence[System]]:
    """Systems as "train", "val" and "test": of a folder of shards (`catmllm data import` or `oc20`), of a
    JSON-lines file, or, where `data.path` is None, the shipped ones.

    Nothing of a folder is read before it is asked for. Raises FileNotFoundError where the path names nothing,
    and ValueError for a folder or a line that is not what it should be.
    """
    path, seed = config.path, config.split_seed
    if path is not None and not Path(path).exists():
        raise FileNotFoundError(
            f"`data.path: {path}`: nothing there; give a folder made by `catmllm data import` or `oc20`, a "
            "JSON-lines file of `catmllm data make`, or leave it out for the shipped systems"
        )
    by_pair = config.split_by == "pair" and config.hold_out is None
    if path is not None and Path(path).is_dir():
        shards = Shards(path)
        if by_pair:
            return {str(name): some for name, some in shards.split(seed).items()}
        rows = range(len(shards))
        texts, groups = [shards.text(i) for i in rows], [shards.group(i) for i in rows]
        names = shards.pair_names
        pairs = [names[p] for p in shards.pairs]
        chosen = np.array(parts_of(texts, pairs, groups, config.split_by, config.hold_out, seed))
        return {name: shards[np.flatnonzero(chosen == name)] for name in PARTS}
    systems = load_slabs(path or (SHIPPED if config.labels == "diep" else SHIPPED_SEVENNET))
    first = len(systems)
    if path is None and config.slabs == "all":
        systems += load_slabs(WIDE)
    if by_pair:
        return {str(name): some for name, some in split(systems, seed, first).items()}
    texts = [f"{s.adsorbate}{SEPARATOR}{s.bulk}" for s in systems]
    pairs = [f"{s.bulk} {s.miller or '(?)'}" for s in systems]
    named = parts_of(texts, pairs, [""] * len(systems), config.split_by, config.hold_out, seed)
    return {name: [s for s, p in zip(systems, named) if p == name] for name in PARTS}
