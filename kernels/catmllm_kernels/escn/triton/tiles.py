"""The tiles of every kernel, and the arithmetic of launch grids."""

from __future__ import annotations

# Candidates of every kernel, each compiled and checked by `aot`; the first is used. Chosen by the compiler's
# resource report for sm_80 (no spill, most threads resident), not by a clock: bench/gpu.py --tune times them
# all.
TILES: dict[str, list[dict[str, int]]] = {
    "gather_rotate": [{"BLOCK_E": 8, "BLOCK_C": 128, "num_warps": 4}],
    "scatter": [{"BLOCK_C": 128, "num_warps": 1}],
    "value_grad": [{"BLOCK_E": 8, "BLOCK_C": 128, "num_warps": 4}],
    "product": [
        {"BLOCK_E": 128, "BLOCK_C": 16, "BLOCK_K": 32, "STEP": 16, "num_warps": 8, "num_stages": 3},
        {"BLOCK_E": 128, "BLOCK_C": 16, "BLOCK_K": 32, "STEP": 16, "num_warps": 8, "num_stages": 4},
    ],
    "real_form": [{"BLOCK": 1024, "num_warps": 2}],
    "activation": [{"BLOCK_E": 4, "BLOCK_C": 64, "num_warps": 4}],
    "activation_grad": [{"BLOCK_E": 2, "BLOCK_C": 64, "num_warps": 4}],
    "softmax": [{"BLOCK_E": 16, "num_warps": 4}],
    "softmax_grad": [{"BLOCK_E": 16, "num_warps": 2}],
}
PROGRAMS = 128  # of softmax_grad; a constant, so that sums do not depend on the device


def power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def tile(name: str, **limits: int) -> dict[str, int]:
    """The options of a kernel, blocks no larger than `limits` (rounded up to powers of two)."""
    options = dict(TILES[name][0])
    for key, limit in limits.items():
        if key in options:
            options[key] = min(options[key], power_of_two(limit))
    return options


def cells(n: int, block: int) -> int:
    return -(-n // block)
