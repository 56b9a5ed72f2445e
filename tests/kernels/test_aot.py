"""Kernels compiled without a GPU: what the binaries use,
against the rules and against the committed table."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from catmllm_kernels.aot import config_of
from catmllm_kernels.registry import OPS

ROOT = Path(__file__).resolve().parents[2]
ARCHS = ("sm_80", "sm_90")
# One for each architecture; of the compilers at the ends of the range too: `aot_sm_90.triton-3.6.0.json`.
TABLES = {
    path.stem: json.loads(path.read_text())
    for path in sorted((ROOT / "kernels/catmllm_kernels").glob("aot_sm_*.json"))
}
# What is not as it should be: 254 registers of 255 by a Triton that no torch of the range brings.
FAULTS = {
    "aot_sm_90.triton-3.9.0": [("product_kernel", "L6M3 s2 153M", "spills 12 B, 24 B on the stack")] * 4,
}
NAMES = ("op", "case", "kernel", "config", "dtype")


def run(*options: str) -> subprocess.CompletedProcess[str]:
    """`python -m catmllm_kernels.aot`, in a process of its own: Triton reads its switches on import."""
    return subprocess.run(
        [sys.executable, "-m", "catmllm_kernels.aot", *options],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "TRITON_INTERPRET": "0"},
    )


def compiled(*options: str) -> list[dict[str, Any]]:
    """Its rows."""
    done = run("--json", *options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(done.stdout)


def compare(rows: list[dict[str, Any]]) -> None:
    """Each row is in the tables of its architecture; where one is of the same compiler, number by number."""
    assert rows
    for row in map(without_time, rows):
        known = [
            without_time(r)
            for table in TABLES.values()
            for r in table
            if all(r[n] == row[n] for n in (*NAMES, "arch"))
        ]
        assert known, row
        assert row in known or row["triton"] not in {r["triton"] for r in known}


def without_time(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "seconds"}


@pytest.mark.parametrize("name", TABLES)
def test_the_table_holds_every_rule(name: str) -> None:
    from catmllm_kernels.aot import PRODUCTS, Row

    table = TABLES[name]
    wrong = [(row["kernel"], row["case"], fault) for row in table for fault in Row(**row).faults()]
    assert wrong == FAULTS.get(name, [])
    ((arch, triton),) = {(row["arch"], row["triton"]) for row in table}
    assert name in (f"aot_{arch}", f"aot_{arch}.triton-{triton}")
    assert {row["op"] for row in table} == {
        op for op in OPS if importlib.util.find_spec(f"catmllm_kernels.{op}.triton")
    }
    half = [row for row in table if row["kernel"] in PRODUCTS and row["dtype"] != "fp32"]
    assert half and all(row["mma"] for row in half)
    assert {row["kernel"] for row in table} > set(PRODUCTS)


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("name", TABLES)
def test_the_table_is_complete(name: str, dtype: str) -> None:
    """Every launch of every model-sized case, forward and backward,
    with every tile that tuning may choose; and nothing else."""
    from catmllm_kernels.aot import DTYPES, variants

    (of,) = (d for d, short in DTYPES.items() if short == dtype)
    wanted = {
        (case.op, case.name, start.kernel.__name__, config_of(start))
        for case, start, _ in variants(OPS, (of,), arch=int(TABLES[name][0]["arch"][3:]))
    }
    rows = [tuple(row[n] for n in NAMES[:4]) for row in TABLES[name] if row["dtype"] == dtype]
    assert len(wanted) > 30
    assert sorted(rows) == sorted(wanted)


def test_a_shared_variant_is_found_by_each_case_and_named_by_the_first() -> None:
    from catmllm_kernels.aot import variants

    found = list(variants(("escn",), (torch.float16,), "^softmax_kernel L6M3"))
    assert [case.name for case, _, _ in found] == ["L4M2 s2 31M"]


def test_some_kernels_compile_to_what_the_table_says() -> None:
    options = ("--op", "escn", "--dtype", "fp16", "--match", "(product|value_grad|softmax)_kernel L4M2 s2")
    rows = compiled(*options)
    assert {row["kernel"] for row in rows} == {"product_kernel", "value_grad_kernel", "softmax_kernel"}
    compare(rows)
    rows = compiled("--op", "linear_logprob", "--dtype", "bf16", "--match", "forward", "--arch", "sm_90")
    assert len(rows) == 1
    compare(rows)


def test_a_table_is_added_to(tmp_path: Path) -> None:
    """Rows that a file has are not compiled again, those that it lacks are,
    and a wrong one makes the exit status 1."""
    options = ("--op", "so3_pool_project", "--dtype", "fp16", "--match", "(stats|pool)_kernel L4 max")
    file = tmp_path / "table.json"
    known = {r["kernel"]: r for r in TABLES["aot_sm_80"] if r["case"] == "L4 max" and r["dtype"] == "fp16"}
    file.write_text(json.dumps([known["stats_kernel"] | {"registers": 7, "spills": 4}]))
    done = run(*options, "--table", str(file))
    assert done.returncode == 1 and "2 variants, 1 wrong" in done.stdout
    rows = json.loads(file.read_text())
    assert [row["kernel"] for row in rows] == ["stats_kernel", "pool_kernel"]
    assert rows[0]["registers"] == 7
    compare(rows[1:])


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("op", ["escn", "so3_pool_project", "linear_logprob", "decoder"])
def test_every_row_of_the_table_is_what_compiles(arch: str, op: str, dtype: str) -> None:
    rows = compiled("--arch", arch, "--op", op, "--dtype", dtype)
    assert len(rows) == sum(row["op"] == op and row["dtype"] == dtype for row in TABLES[f"aot_{arch}"])
    compare(rows)
