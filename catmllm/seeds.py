"""Seeds of a run's random streams."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def hash_seed(parts: Sequence[int]) -> int:
    """One 63-bit seed from several integers, well mixed."""
    # With their number in front: to NumPy [3] and [3, 0] are one seed.
    entropy = [len(parts), *(p & 0xFFFFFFFF for p in parts)]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)
