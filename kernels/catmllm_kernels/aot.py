"""Compile every registered Triton kernel for a GPU that need not be there, and check what it uses.

    python -m catmllm_kernels.aot [--arch sm_80] [--op escn] [--dtype fp16] [--match REGEX] \\
        [--json | --table FILE]

The launches of each model-sized case, with every candidate tile that tuning may choose, are recorded on meta
tensors and compiled for `--arch`; Triton's wheel carries ptxas, cuobjdump and nvdisasm. One row per kernel
variant: registers a thread, spilled bytes, local (stack) bytes, shared bytes a block, tensor-core
instructions (HMMA, HGMMA), 16-byte global loads, bytes of code, CPU seconds to compile (next to none where
Triton's cache has it). A variant that several cases launch is one row, under the first one's name. A row is
wrong if it spills, wants more shared memory than an A100 gives (163 KiB), has a half-precision product
without tensor cores, reads a stream without 16-byte loads, or is longer than what an instruction cache is
likely to hold beside others (48 KiB; Volta's measures 128 KiB, Hopper's nobody has published). Exit status 1
if any row is wrong. `--table` keeps the rows of a file, compiles what it lacks and writes it after each row,
so that a run of hours may be cut off; to compile everything again, delete the file.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from catmllm_kernels.launch import Launch, recorded
from catmllm_kernels.registry import OPS, Case, cases

DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
KINDS = {torch.int64: "i64", torch.int32: "i32", torch.float64: "fp64", **DTYPES}
SHARED_LIMIT = 163 * 1024
REGISTERS = 65536  # of a multiprocessor
CODE_LIMIT = 48 * 1024
INSTRUCTION = 16  # bytes, since Volta


@dataclass(frozen=True)
class Row:
    """What one compiled kernel uses."""

    op: str
    case: str
    kernel: str
    config: str
    dtype: str
    arch: str
    triton: str
    registers: int
    spills: int
    local: int
    shared: int
    mma: int
    loads16: int
    warps: int  # resident on a multiprocessor as registers and shared memory allow, of 64
    code: int  # bytes of instructions
    seconds: float  # CPU time of the compiler, its processes included; differs between runs and machines

    def faults(self) -> list[str]:
        """What is wrong with it."""
        found = []
        if self.spills or self.local:
            found.append(f"spills {self.spills} B, {self.local} B on the stack")
        if self.shared > SHARED_LIMIT:
            found.append(f"{self.shared} B shared, an A100 has {SHARED_LIMIT}")
        if self.kernel in PRODUCTS and self.dtype != "fp32" and not self.mma:
            found.append("a product without tensor cores")
        if not self.loads16 and self.kernel not in NARROW:
            found.append("no 16-byte loads")
        if self.code > CODE_LIMIT:
            found.append(f"{self.code} B of code")
        return found


PRODUCTS = ("product_kernel", "forward_kernel", "two_heads_kernel", "gradient_kernel")
# The activations hold three tiles of every row of an edge in registers, one or two values a thread: their
# loads are narrow, and they are bound by the exponential of 324 grid points, not by memory. The scatter's
# warp reads the 128 channels of a row at once, 8 bytes a thread in half precision.
NARROW = ("activation_kernel", "activation_grad_kernel", "scatter_kernel")


def launches(case: Case, dtype: torch.dtype, arch: int) -> list[Launch]:
    """What the case launches on an architecture, forward and backward."""
    if case.compile is None:
        return []
    with recorded(arch) as found:
        case.compile(dtype)
    return found


def specialised(
    start: Launch,
) -> tuple[dict[str, str], dict[tuple[int, ...], Any], dict[tuple[int, ...], Any]]:
    """Signature, constants and known alignments of a launch, as Triton's own launcher derives them.

    Equal ones share a binary: their number is that of compilations.
    """
    names, varying = start.kernel.arg_names, unspecialised(start.kernel)
    given = dict(zip(names, start.arguments)) | start.constants
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for i, name in enumerate(names):
        value = given[name]
        if isinstance(value, torch.Tensor):
            signature[name] = f"*{KINDS[value.dtype]}"
            aligned = value.storage_offset() * value.element_size() % 16 == 0
        elif name in start.constants or value is None:
            signature[name], constants[(i,)], aligned = "constexpr", value, False
        elif isinstance(value, float):
            signature[name], aligned = "fp32", False
        elif value == 1 and name not in varying:
            signature[name], constants[(i,)], aligned = "constexpr", value, False
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
            aligned = value % 16 == 0 and name not in varying
        if aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def unspecialised(kernel: Any) -> tuple[str, ...]:
    """The arguments whose value makes no difference to the binary
    (of a kernel to compile, or to interpret)."""
    given = vars(kernel).get("do_not_specialize") or vars(kernel).get("kwargs", {}).get("do_not_specialize")
    return tuple(given or ())


def compiled(start: Launch, arch: int) -> Any:
    """Triton's compiled kernel of a launch."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    source = ASTSource(start.kernel, *specialised(start))
    return compile(source, target=GPUTarget("cuda", arch, 32), options=start.options)


def cpu_seconds() -> float:
    """Of this process and of those that it has started and waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(of.ru_utime + of.ru_stime for of in used)


def config_of(start: Launch) -> str:
    """Everything that was decided at compile time, as one line."""
    constants = [f"{k}={v}" for k, v in start.constants.items() if v is not False]
    return " ".join([*constants, *(f"{k.removeprefix('num_')}={v}" for k, v in start.options.items())])


def inspect(case: Case, start: Launch, dtype: torch.dtype, arch: int) -> Row:
    """Compile one launch and read what the binary uses."""
    import triton

    began = cpu_seconds()
    built = compiled(start, arch)
    seconds = cpu_seconds() - began
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(built.asm["cubin"])
        usage = _output([tools / "cuobjdump", "--dump-resource-usage", file.name])
        listing = _output([tools / "nvdisasm", "-c", file.name])
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    if not found:
        raise RuntimeError(f"cuobjdump printed no resource usage: {usage[:500]}")
    registers, stack, local = map(int, found.groups())
    shared = built.metadata.shared
    places = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/", listing, re.MULTILINE)
    by_registers = REGISTERS // (-(-registers * 32 // 256) * 256)
    by_shared = SHARED_LIMIT // shared * start.num_warps if shared else 64
    return Row(
        op=case.op,
        case=case.name,
        kernel=start.kernel.__name__,
        config=config_of(start),
        dtype=DTYPES[dtype],
        arch=f"sm_{arch}",
        triton=triton.__version__,
        registers=registers,
        spills=4 * len(re.findall(r"\bSTL\b", listing)),
        local=stack + local,
        shared=shared,
        mma=len(re.findall(r"\bHG?MMA\b", listing)),
        loads16=len(re.findall(r"\b(?:LDG\.E|LDGSTS\.E)(?:\.\w+)*\.128\b|\bUBLKCP\b", listing)),
        warps=min(64, by_registers, by_shared) // start.num_warps * start.num_warps,
        code=INSTRUCTION * len(places),
        seconds=round(seconds, 1),
    )


def _output(command: list[Any]) -> str:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout


@contextmanager
def first_tile(op: str, name: str, index: int) -> Iterator[None]:
    """Candidate `index` of a kernel in the place of the chosen one."""
    tiles = importlib.import_module(f"catmllm_kernels.{op}.triton").TILES
    before = tiles[name]
    tiles[name] = [before[index]]
    try:
        yield
    finally:
        tiles[name] = before


def variants(
    ops: tuple[str, ...], dtypes: tuple[torch.dtype, ...], match: str = "", arch: int = 80
) -> Iterator[tuple[Case, Launch, torch.dtype]]:
    """Every different launch of the model-sized cases, with every candidate tile.

    One that several cases share comes once, as the first one's;
    `match` is searched in "kernel case" of each of them.
    """
    found: dict[tuple[str, ...], tuple[Case, Launch, torch.dtype]] = {}
    wanted = set()
    for case in (c for op in ops for c in cases(op, "model") if c.compile):
        for start, dtype in every_launch(case, dtypes, arch):
            name = start.kernel.__name__
            key = (name, config_of(start), repr(specialised(start)))
            found.setdefault(key, (case, start, dtype))
            if re.search(match, f"{name} {case.name}"):
                wanted.add(key)
    yield from (variant for key, variant in found.items() if key in wanted)


def every_launch(
    case: Case, dtypes: tuple[torch.dtype, ...], arch: int
) -> Iterator[tuple[Launch, torch.dtype]]:
    """Those with the chosen tiles, then each kernel with its other candidates."""
    dtypes = tuple(d for d in dtypes if d in case.dtypes)
    yield from ((start, d) for d in dtypes for start in launches(case, d, arch))
    tiles = getattr(importlib.import_module(f"catmllm_kernels.{case.op}.triton"), "TILES", {})
    for name, index in ((n, i) for n, t in tiles.items() for i in range(1, len(t))):
        with first_tile(case.op, name, index):
            again = [(start, d) for d in dtypes for start in launches(case, d, arch)]
        yield from (s for s in again if s[0].kernel.__name__ == f"{name}_kernel")


def table(
    ops: tuple[str, ...],
    arch: int,
    dtypes: tuple[torch.dtype, ...],
    match: str = "",
    known: list[Row] | None = None,
    done: Callable[[list[Row]], None] = lambda rows: None,
) -> list[Row]:
    """The rows `known`, and one for each of `variants` that they lack;
    `done` gets all rows after each new one."""
    rows: list[Row] = list(known or [])
    held = {(row.op, row.case, row.kernel, row.config, row.dtype, row.arch) for row in rows}
    for case, start, dtype in variants(ops, dtypes, match, arch):
        key = (case.op, case.name, start.kernel.__name__, config_of(start), DTYPES[dtype], f"sm_{arch}")
        if key not in held:
            rows.append(inspect(case, start, dtype, arch))
            done(rows)
    return rows


def print_row(row: Row) -> None:
    print(
        f"{row.kernel:24s} {row.case:13s} {row.dtype:4s} {row.registers:4d} {row.spills:6d} {row.local:5d} "
        f"{row.shared / 1024:6.1f} {row.mma:5d} {row.loads16:5d} {row.warps:3d} "
        f"{row.code / 1024:5.1f} {row.seconds:5.1f}  {row.config}"
        + "".join(f"\n    WRONG: {fault}" for fault in row.faults()),
        flush=True,
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m catmllm_kernels.aot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--arch", default="sm_80", help="sm_80 (A100), sm_90 (H100), …")
    parser.add_argument("--op", choices=OPS, action="append", help="only this op; may be repeated")
    parser.add_argument(
        "--dtype", choices=DTYPES.values(), action="append", help="only this one; may be repeated"
    )
    parser.add_argument("--match", default="", metavar="REGEX", help='searched in "kernel case"')
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="the rows as JSON")
    output.add_argument(
        "--table", type=Path, metavar="FILE", help="add what this JSON file lacks, row by row"
    )
    args = parser.parse_args(arguments)
    import triton

    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set; the compiler needs it unset")
    dtypes = tuple(d for d, name in DTYPES.items() if name in (args.dtype or DTYPES.values()))
    if not args.json:
        print(
            f"{'kernel':24s} {'case':13s} {'type':4s} {'reg':>4s} {'spills':>6s} {'local':>5s} "
            f"{'KiB':>6s} {'mma':>5s} {'ld16':>5s} {'wrp':>3s} "
            f"{'code':>5s} {'s':>5s}  config"
        )
    arch = int(args.arch.removeprefix("sm_"))
    known = []
    if args.table and args.table.exists():
        known = [Row(**row) for row in json.loads(args.table.read_text())]

    def done(rows: list[Row]) -> None:
        if not args.json:
            print_row(rows[-1])
        if args.table:
            args.table.write_text(as_json(rows))

    rows = table(tuple(args.op or OPS), arch, dtypes, args.match, known, done)
    wrong = [row for row in rows if row.faults()]
    if args.json:
        print(as_json(rows), end="")
    else:
        print(f"{len(rows)} variants, {len(wrong)} wrong")
    return 1 if wrong else 0


def as_json(rows: list[Row]) -> str:
    return json.dumps([asdict(row) for row in rows], indent=0) + "\n"


if __name__ == "__main__":
    sys.exit(main())
