"""Freed memory stays with the process on a CPU, so that the next step's tensors cost no page faults."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

SCRIPT = """
import pathlib, torch
from catmllm.trainer import distributed

def held():  # MiB
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmRSS"))) >> 10

if {kept}:
    distributed._keep_freed_memory()
before = held()
tensor = torch.ones(5 << 20)
grown = held() - before
del tensor
print(grown, held() - before)
"""


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="glibc alone"
)
@pytest.mark.parametrize("kept", [True, False])
def test_a_freed_tensor_stays_with_the_process(kept: bool) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(kept=kept)], capture_output=True, text=True, check=True
    )
    grown, after = map(int, done.stdout.split())
    assert grown >= 15
    assert after >= 15 if kept else after < 5
