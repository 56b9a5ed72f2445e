"""Two ranks, one of which never comes to the collective: both end, and a line names it and its call."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from catmllm.train.hang import EXIT_HUNG, Watchdog, lost, verdict

SCRIPT = """
import datetime, sys, time
from pathlib import Path
import torch, torch.distributed as dist
import catmllm.train.hang as hang
hang.GRACE = 3.0
rank, folder = int(sys.argv[1]), Path(sys.argv[2])

def sleeps():
    time.sleep(120)

dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
dist.barrier()
with hang.Watchdog(folder / "hang", rank, 2, 2.0) as watchdog:
    watchdog.beat("forward of step 7")
    if rank == 1:
        sleeps()
    dist.all_reduce(torch.ones(1))
"""


def test_the_rank_that_hangs_is_named(tmp_path: Path) -> None:
    began = time.monotonic()
    command = [sys.executable, "-c", SCRIPT]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path)], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    said = [r.communicate(timeout=100)[1] for r in ranks]
    assert [r.returncode for r in ranks] == [EXIT_HUNG] * 2, said
    assert time.monotonic() - began < 100
    (line,) = [x for x in "".join(said).splitlines() if x.startswith("error: the run hangs")]
    culprit, waits = line.split("; ", 1)
    assert "rank 1 is in sleeps at" in culprit and "began forward of step 7" in culprit
    assert "rank 0 waits in all_reduce" in waits
    assert "time.sleep" not in (tmp_path / "hang" / "rank-0.txt").read_text()
    assert "in sleeps" in (tmp_path / "hang" / "rank-1.txt").read_text()


def test_a_rank_whose_collective_breaks_while_it_tells_still_tells(tmp_path: Path) -> None:
    """Rank 1 ends first; the error of rank 0's collective does not hide the verdict."""
    script = SCRIPT.replace("hang.GRACE = 3.0", "hang.GRACE = 4.0 if sys.argv[1] == '0' else 1.0")
    command = [sys.executable, "-c", script]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path)], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    said = [r.communicate(timeout=100)[1] for r in ranks]
    assert [r.returncode for r in ranks] == [EXIT_HUNG] * 2, said
    assert "error: the run hangs" in said[0] and "rank 1 is in sleeps at" in said[0]


DIES = """
import os, sys
from pathlib import Path
import torch, torch.distributed as dist
from catmllm.train.hang import lost
from catmllm.world import World
rank, folder = int(sys.argv[1]), Path(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
dist.barrier()
if rank == 1:
    os.kill(os.getpid(), 9)
try:
    World(rank, 2, torch.device("cpu")).gather("here")
except RuntimeError as error:
    print(lost(error, rank))
"""


def test_a_rank_that_died_is_one_line_on_the_others(tmp_path: Path) -> None:
    """What gloo itself says of a peer that was killed, and not of a fault of another kind."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", DIES, str(r), str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        for r in range(2)
    ]
    said = [r.communicate(timeout=100)[0] for r in ranks]
    assert re.fullmatch(
        r"another rank is gone: rank 0 stood in all_gather_object \(catmllm/world\.py:\d+\) and read: "
        r"[^\n]*[Cc]onnection [^\n]* The log of that rank has the reason; the same command goes on\n",
        said[0],
    ), said[0]
    assert lost(RuntimeError("shapes cannot be multiplied"), 0) is None


def test_a_rank_that_says_nothing_is_named(tmp_path: Path) -> None:
    one = {"rank": 0, "in": "step 3", "seconds": 9.0, "collective": "barrier", "call": "f", "line": "a.py:1"}
    said = verdict([one], 3, tmp_path)
    assert "rank 1, 2 says nothing" in said and "rank 0 waits in barrier (a.py:1)" in said


@pytest.mark.parametrize("limit", [0.0, 0.4])
def test_a_step_that_moves_is_left_alone(tmp_path: Path, limit: float) -> None:
    with Watchdog(tmp_path / "hang", 0, 1, limit) as watchdog:
        for k in range(5):
            watchdog.beat(f"step {k}")
            time.sleep(0.15)
    assert not (tmp_path / "hang").exists()
