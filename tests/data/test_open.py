"""One door to systems: a folder of shards, a JSON-lines file, or what is shipped."""

from __future__ import annotations

import gzip
import itertools
from pathlib import Path

import pytest

from catmllm.config import ConfigError, DataConfig, load_config
from catmllm.data.open import open_data
from catmllm.data.shards import Shards, write_shards
from catmllm.data.slabs import SHIPPED, WIDE, load_slabs, split


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lines") / "some.jsonl"
    with gzip.open(SHIPPED, "rt") as file:
        path.write_text("".join(itertools.islice(file, 240)))
    return path


def test_a_folder_opens_as_the_file_that_it_was_made_of(lines: Path, tmp_path: Path) -> None:
    write_shards(tmp_path, sorted(load_slabs(lines), key=lambda s: s.sid))
    for seed in (0, 3):
        listed = open_data(DataConfig(path=str(lines), split_seed=seed))
        opened = open_data(DataConfig(path=str(tmp_path), split_seed=seed))
        assert all(isinstance(part, Shards) for part in opened.values())
        assert {k: [s.sid for s in v] for k, v in opened.items()} == {
            k: [s.sid for s in v] for k, v in listed.items()
        }
        assert listed["train"] and listed["test"]


def test_without_a_path_the_shipped_systems_are_opened() -> None:
    expected = split(load_slabs(), 0)
    assert {k: [s.sid for s in v] for k, v in open_data().items()} == {
        k: [s.sid for s in v] for k, v in expected.items()
    }


def test_all_shipped_systems_are_opened() -> None:
    fcc, wide = load_slabs(), load_slabs(WIDE)
    expected = split(fcc + wide, 3, len(fcc))
    found = open_data(DataConfig(slabs="all", split_seed=3))
    assert {k: [s.sid for s in v] for k, v in found.items()} == {
        k: [s.sid for s in v] for k, v in expected.items()
    }
    held = open_data(DataConfig(slabs="all", split_by="adsorbate", hold_out=("CHO",)))
    assert {s.adsorbate for s in held["test"]} == {"CHO"}
    assert sum(map(len, held.values())) == len(fcc) + len(wide)
    with pytest.raises(ConfigError, match=r"data\.slabs: all. has labels of diep alone, not of sevennet"):
        load_config(None, ["data.slabs=all", "data.labels=sevennet"])


def test_what_cannot_be_opened_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data\.path: .*absent.*catmllm data import"):
        open_data(DataConfig(path=str(tmp_path / "absent")))
    with pytest.raises(ValueError, match=r"no dataset.*catmllm data oc20"):
        open_data(DataConfig(path=str(tmp_path)))
