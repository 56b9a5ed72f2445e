"""Kernels compiled without a GPU: what the binaries use, against the rules and against the committed table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
TABLE = json.loads((ROOT / "kernels/catmllm_kernels/aot_sm_80.json").read_text())


def compiled(*options: str) -> list[dict[str, Any]]:
    """The rows of `python -m catmllm_kernels.aot`, in a process of its own: Triton reads its switches on import."""
    done = subprocess.run(
        [sys.executable, "-m", "catmllm_kernels.aot", "--json", *options],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "TRITON_INTERPRET": "0"},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(done.stdout)


def compare(rows: list[dict[str, Any]]) -> None:
    """Each row is in the table; with the same compiler, number by number."""
    names = ("kernel", "config", "dtype")
    known = {tuple(row[n] for n in names): row for row in TABLE}
    assert rows
    for row in rows:
        expected = known[tuple(row[n] for n in names)]
        if row["triton"] == expected["triton"]:
            assert row | {"case": ""} == expected | {"case": ""}


def test_the_table_holds_every_rule() -> None:
    from catmllm_kernels.aot import Row

    assert not [row for row in TABLE if Row(**row).faults()]
    assert {row["dtype"] for row in TABLE} == {"fp16", "bf16"}
    assert {row["case"].split()[0] for row in TABLE if row["op"] == "escn"} == {"L4M2", "L6M3"}
    assert all(row["mma"] for row in TABLE if row["kernel"] == "product_kernel")


def test_some_kernels_compile_to_what_the_table_says() -> None:
    options = ("--op", "escn", "--dtype", "fp16", "--match", "(product|value_grad|softmax)_kernel L4M2 s2")
    rows = compiled(*options)
    assert {row["kernel"] for row in rows} == {"product_kernel", "value_grad_kernel", "softmax_kernel"}
    compare(rows)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ("--op", "escn", "--match", "L4M2", "--tiles"),
        ("--op", "escn", "--match", "L6M3", "--dtype", "fp16"),
        ("--op", "so3_pool_project"),
    ],
)
def test_every_row_of_the_table_is_what_compiles(options: tuple[str, ...]) -> None:
    compare(compiled(*options))


@pytest.mark.slow
def test_the_rules_hold_on_hopper() -> None:
    assert compiled("--arch", "sm_90", "--dtype", "fp16", "--op", "escn", "--op", "so3_pool_project")
