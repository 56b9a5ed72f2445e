"""The one door to adsorption systems: what `data.path` names, split for training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from catmllm.config import DataConfig
from catmllm.data.shards import Shards
from catmllm.data.slabs import load_slabs, split
from catmllm.structure.system import System


def open_data(config: DataConfig | None = None) -> dict[str, Sequence[System]]:
    """Systems as "train", "val" and "test": of a folder of shards (`catmllm data oc20`), of a JSON-lines
    file, or, where `data.path` is None, the shipped ones. None: the defaults of the section.

    Nothing of a folder is read before it is asked for. Raises FileNotFoundError where the path names nothing,
    and ValueError for a folder or a line that is not what it should be.
    """
    config = DataConfig() if config is None else config
    path, seed = config.path, config.split_seed
    if path is not None and not Path(path).exists():
        raise FileNotFoundError(
            f"`data.path: {path}`: nothing there; give a folder made by `catmllm data oc20`, a JSON-lines "
            "file of `catmllm data make`, or leave it out for the shipped systems"
        )
    if path is not None and Path(path).is_dir():
        return {str(part): shards for part, shards in Shards(path).split(seed).items()}
    return {str(part): systems for part, systems in split(load_slabs(path), seed).items()}
