"""Frameworks that want other versions than the trainer: their code runs in an environment of their own."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def called(script: str, job: Any, variable: str, needs: str, timeout: float = 600) -> Any:
    """What a script of this folder makes of a job, by the Python that an environment variable names.

    The job goes in as JSON; the result is what the script prints as JSON behind "RESULT". Skips the test
    where there is no such Python.
    """
    python = os.environ.get(variable)
    if not python:
        pytest.skip(f"{variable} names no interpreter that has {needs}")
    run = subprocess.run(
        [python, str(ROOT / "tests" / "oracles" / script)],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
        timeout=timeout,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout.rpartition("RESULT ")[2])
