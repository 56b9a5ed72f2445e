from typing import Any

import numpy as np
from numpy.typing import NDArray

SCORE_COLUMNS: tuple[str, ...]

class Cells:
    def __len__(self) -> int: ...
    def get(
        self, i: int
    ) -> (
        tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64], dict[int | str, float]] | None
    ): ...

def is_bare_cif(text: str) -> bool: ...
def score(
    texts: list[str],
    targets: list[list[tuple[int, float]]],
    target_of_text: list[int],
    weights: tuple[float, ...],
    thresholds: tuple[float, ...],
    threads: int,
) -> tuple[NDArray[np.float64], list[str | None], NDArray[np.uint8], Cells]: ...
def min_distance(lattice: NDArray[np.float64], frac: NDArray[np.float64]) -> float: ...
def profile(text: str, repeats: int) -> dict[str, Any]: ...
def instruction_set() -> str: ...
