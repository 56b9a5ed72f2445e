"""Bytes that the edge path moves per edge, counted while its kernels run in Triton's interpreter.

    TRITON_INTERPRET=1 python -m catmllm_kernels.traffic [--json]

Forward pass at the sizes of the two OC20 models, float16, 120 edges. A tensor that a launch streams counts
each address once; node embeddings count at every gather, as if no cache held them; weights and tables, which
stay in the L2, are a sum of their own. "issued" counts what every load and store instruction asks of the
caches. The products that are torch's count their operands and results once. Compared with the figures for two
fused kernels around plain products (66 and 126 KiB, counted by hand).
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from catmllm_kernels.escn.cases import MODELS, Size, inputs

GOAL = {"L4M2 s2 31M": 66, "L6M3 s2 153M": 126}  # KiB an edge
EAGER = {"L4M2 s2 31M": 420, "L6M3 s2 153M": 681}  # the same of code without fusion
DEGREES = (20,) * 6
RESIDENT = {
    "packed",
    "weights",
    "bias",
    "to_lat",
    "from_lat",
    "dot",
    "norm_weight",
    "norm_bias",
    "ptr",
}


class Products(TorchDispatchMode):
    """Bytes of edge-long operands and results of torch's products."""

    def __init__(self, n_edges: int) -> None:
        super().__init__()
        self.n_edges, self.bytes, self.resident = n_edges, 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            for t in (*args, out):
                if isinstance(t, Tensor):
                    size = t.numel() * t.element_size()
                    if t.dim() == 2 and t.shape[0] == self.n_edges:
                        self.bytes += size
                    else:
                        self.resident += size
        return out


def forward(size: Size) -> dict[str, Any]:
    """KiB an edge of each step of the forward pass, their sum, what was issued, and resident KiB a launch."""
    from catmllm_kernels.escn import triton
    from catmllm_kernels.interpret import counted, strict

    n_edges = sum(DEGREES)
    # the grid's size does not change what is moved; a small one spares the interpreter
    a = inputs(replace(size, degrees=DEGREES, resolution=(2, 2)), torch.float16, torch.device("cpu"))
    with torch.no_grad(), strict(), counted() as found, Products(n_edges) as products:
        triton.edge_attention_forward(a, True)
    steps, issued, resident = {}, 0.0, products.resident / 1024
    for launch in found:
        total = 0
        for name, touched in launch.touched.items():
            # the radial weights are a stream of the producer, though `weights` elsewhere are the model's
            if name in RESIDENT and not (name == "weights" and launch.kernel != "product_kernel"):
                resident += touched / 1024
            else:
                total += launch.asked[name] if name == "x" else touched
        steps[launch.kernel.removesuffix("_kernel")] = total / n_edges / 1024
        issued += sum(launch.moved.values()) / n_edges / 1024
    steps["torch's products"] = products.bytes / n_edges / 1024
    return {
        "KiB an edge": sum(steps.values()),
        "steps": steps,
        "issued by kernels": issued,
        "resident KiB": resident,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m catmllm_kernels.traffic",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    args = parser.parse_args(arguments)
    import triton

    if not triton.knobs.runtime.interpret:
        parser.error("set TRITON_INTERPRET=1: the bytes are counted in the interpreter")
    found = {
        name: forward(MODELS[name]) | {"two kernels": goal, "eager": EAGER[name]}
        for name, goal in GOAL.items()
    }
    if args.json:
        print(json.dumps(found))
        return 0
    for name, row in found.items():
        ratio = row["KiB an edge"] / row["two kernels"]
        print(
            f"{name}: {row['KiB an edge']:.1f} KiB an edge, {ratio:.2f} of the {row['two kernels']} of two "
            "kernels"
        )
        for step, kib in row["steps"].items():
            print(f"    {step:20s} {kib:6.1f}")
        print(
            f"    issued by kernels    {row['issued by kernels']:6.1f}   resident "
            f"{row['resident KiB'] / 1024:.1f} MiB a layer"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
