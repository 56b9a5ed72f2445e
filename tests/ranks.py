"""Functions in processes of their own, without the seconds of imports that each would begin with."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from typing import Any

from torch.multiprocessing import start_processes

IMPORTED_ONCE = [
    "pytest",
    "catmllm.data.shards",
    "catmllm.models.build",
    "catmllm.stages",
    "catmllm.train.loop",
    "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
]


def forks() -> ForkServerContext:
    """Processes that are forks of one which has imported and no more, one for each worker of the tests.
    pytest's own has run autograd, and after that its forks cannot."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED_ONCE)
    return context


def two_ranks(function: Callable[..., None], *arguments: Any) -> None:
    """function(rank, *arguments) as ranks 0 and 1. Raises what a rank raises."""
    forks()
    start_processes(function, arguments, nprocs=2, start_method="forkserver")
