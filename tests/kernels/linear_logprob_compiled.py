"""Compile the Triton kernels of linear_logprob for the GPU that ARCH names and print what they use, as JSON.

A script, because Triton must be imported without TRITON_INTERPRET; test_linear_logprob.py runs it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from catmllm_kernels.linear_logprob import triton as kernels

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
WIDTH = 3584  # of the 7B model; 2048 and this are multiples of every BLOCK_H
SIZES = {"fp16": 2, "bf16": 2, "fp32": 4}


def compiled(kernel: Any, name: str, dtype: str, arch: int, entropy: bool) -> dict[str, Any]:
    options = kernels.blocks(name, SIZES[dtype], WIDTH)
    launch = {k: options.pop(k) for k in ("num_warps", "num_stages")}
    constants = options | {"ENTROPY": entropy}
    kinds = {"targets": "*i64", "scale": "fp32"}
    kinds |= dict.fromkeys(("hidden", "weight", "reference", "out"), f"*{dtype}")
    kinds |= dict.fromkeys(("n_tokens", "n_words", "width", "tiles"), "i32")
    names = [p.name for p in kernel.params]
    signature = {n: "constexpr" if n in constants else kinds.get(n, "*fp32") for n in names}
    aligned = [i for i, n in enumerate(names) if n == "width" or signature[n].startswith("*")]
    source = ASTSource(
        kernel,
        signature,
        {(names.index(k),): v for k, v in constants.items()},
        {(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        Path(f.name).write_bytes(built.asm["cubin"])
        usage = _output([TOOLS / "cuobjdump", "--dump-resource-usage", f.name])
        listing = _output([TOOLS / "nvdisasm", f.name])
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found, usage
    registers, stack, local = map(int, found.groups())
    return {
        "kernel": kernel.fn.__name__,
        "dtype": dtype,
        "entropy": entropy,
        "registers": registers,
        "spills": stack + local,
        "shared": built.metadata.shared,
        "mma": len(re.findall(r"\bH(?:G)?MMA\b", listing)),
    }


def _output(command: list[Any]) -> str:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout


def main() -> None:
    arch = int(os.environ["ARCH"])
    kinds = [
        ("forward", kernels.forward_kernel),
        ("two_heads", kernels.two_heads_kernel),
        ("gradient", kernels.gradient_kernel),
    ]
    print(
        json.dumps(
            [
                compiled(kernel, name, dtype, arch, entropy)
                for name, kernel in kinds
                for dtype in SIZES
                for entropy in (False, True)
            ]
        )
    )


if __name__ == "__main__":
    main()
