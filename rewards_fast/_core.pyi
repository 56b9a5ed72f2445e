from typing import Any

import numpy as np
from numpy.typing import NDArray

SCORE_COLUMNS: tuple[str, ...]
REASONS: dict[str, tuple[str, str]]  # by code: a sentence, an example

def extract_cif(text: str) -> str: ...
def parse(text: str, extract: bool) -> tuple[Any, Any]: ...
def score(
    texts: list[str],
    targets: list[tuple[tuple[int, float], ...]],
    target_of_text: list[int],
    weights: tuple[float, ...],
    thresholds: tuple[float, ...],
    threads: int,
    extract: bool,
) -> tuple[NDArray[np.float64], list[str | None], NDArray[np.uint8]]: ...
def min_distance(lattice: NDArray[np.float64], frac: NDArray[np.float64]) -> float: ...
def profile(text: str, repeats: int) -> dict[str, Any]: ...
def instruction_set() -> str: ...
