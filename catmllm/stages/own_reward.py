"""A reward of one's own, in processes beside training: it may take its time, its memory, or its process down.

In a thread, Python that computes holds the lock of the decoding loop, and what hangs cannot be ended. So
texts go to processes, each with a limit of memory, and one that takes too long on an answer is ended and
started anew. This file is also the program of such a process: it needs nothing else of this package.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# The trainer's process group and allocator are none of a reward's business.
_OURS = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "GROUP_", "ROLE_", "TORCHELASTIC_", "PYTORCH_ALLOC_CONF")
START = 120.0  # seconds for the imports of a reward


@dataclass
class Totals:
    """Rewards of texts, NaN for none; `problems` says why, by the place of the text."""

    total: list[float]
    problems: dict[int, str] = field(default_factory=dict)


class OwnReward:
    """`count` processes that run the function which `name` names; calls are shared among them.

    timeout: seconds for one answer; memory: GiB of address space for each process (None: no limit). Raises
    ValueError for a name that cannot be loaded.
    """

    def __init__(self, name: str, count: int, timeout: float, memory: float | None = None) -> None:
        self.name, self.timeout, self.memory = name, timeout, memory
        self.workers: list[_Process | None] = [None] * count
        self.workers[0] = self._start()  # a name that is wrong is told now

    def __call__(self, texts: Sequence[str], targets: Sequence[Mapping[str, int]]) -> Totals:
        """Rewards of answers. A share that fails as a whole is asked for answer by answer."""
        n, count = len(texts), len(self.workers)
        out = Totals([float("nan")] * n)

        def ask(k: int, places: Sequence[int]) -> list[int]:
            """Put the rewards of some answers into `out`; returns those that failed together."""
            if not places:
                return []
            try:
                asked = [[texts[i] for i in places], [dict(targets[i]) for i in places]]
                for i, value in zip(places, self._ask(k, asked), strict=True):
                    out.total[i] = float("nan") if value is None else float(value)
            except Exception as error:  # somebody else's code: anything may come
                if len(places) > 1:
                    return list(places)
                out.problems[places[0]] = f"{error}"[:300]
            return []

        def one_by_one(k: int, places: Sequence[int]) -> list[int]:
            return [i for place in places for i in ask(k, [place])]

        left = self._share([range(k, n, count) for k in range(count)], ask)
        self._share([left[k::count] for k in range(count)], one_by_one)
        return out

    def _share(
        self, parts: Sequence[Sequence[int]], do: Callable[[int, Sequence[int]], list[int]]
    ) -> list[int]:
        """A thread a process, which only waits; what they return, together."""
        found: list[list[int]] = [[] for _ in parts]

        def run(k: int) -> None:
            found[k] = do(k, parts[k])

        busy = [k for k, part in enumerate(parts) if part]
        threads = [threading.Thread(target=run, args=(k,), daemon=True) for k in busy]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sorted(i for part in found for i in part)

    def _ask(self, k: int, asked: list[Any]) -> list[float | None]:
        worker = self.workers[k] = self.workers[k] or self._start()
        try:
            reply = worker.ask(asked, self.timeout)
        except (EOFError, OSError, TimeoutError) as error:
            worker.end()
            self.workers[k] = None
            if isinstance(error, TimeoutError):
                raise
            raise RuntimeError("the reward's process ended: out of memory, or a crash") from None
        if "error" in reply:
            raise RuntimeError(reply["error"])
        return list(reply["rewards"])

    def _start(self) -> _Process:
        worker = _Process(self.name, self.memory)
        try:
            problem = worker.ask(None, START).get("error")
        except (EOFError, OSError, TimeoutError) as error:
            problem = f"its process ended while it was loaded ({type(error).__name__})"
        if problem:
            worker.end()
            raise ValueError(f"reward_function {self.name}: {problem}")
        return worker

    def close(self) -> None:
        for worker in self.workers:
            if worker is not None:
                worker.end()


class _Process:
    """One process and the line to it."""

    def __init__(self, name: str, memory: float | None) -> None:
        ours, theirs = socket.socketpair()
        environment = {k: v for k, v in os.environ.items() if not k.startswith(_OURS)}
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno()), name, str(memory or 0.0)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,  # a Ctrl-C is the trainer's to answer
            )
        self.link = Connection(ours.detach())

    def ask(self, value: Any, timeout: float) -> dict[str, Any]:
        self.link.send_bytes(json.dumps(value).encode())
        if not self.link.poll(timeout):
            raise TimeoutError(f"no reward within {timeout:g} s")
        return dict(json.loads(self.link.recv_bytes()))

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.link.close()


def load_reward(name: str) -> Callable[[list[str], list[Mapping[str, int]]], Any]:
    """The function that `file.py:function` or `package.module:function` names.

    It is called as f(texts, targets), targets being counts by element,
    and returns one number a text (None: no reward).
    """
    where, colon, function = name.rpartition(":")
    if not colon or not function:
        raise ValueError(f"reward_function: write file.py:function or module:function, not {name!r}")
    if where.endswith(".py"):
        path = Path(where)
        if not path.is_file():
            raise FileNotFoundError(f"reward_function: no file {where}")
        spec = importlib.util.spec_from_file_location(f"catmllm_reward_{path.stem}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    else:
        try:
            module = importlib.import_module(where)
        except ImportError as error:
            raise ValueError(f"reward_function: cannot import {where!r}: {error}") from error
    found = getattr(module, function, None)
    if not callable(found):
        raise ValueError(f"reward_function: {where} has no function {function!r}")
    return found


def _limit(gib: float) -> None:
    """Hold this process to so much address space; a core of it would be no use."""
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if gib:
        resource.setrlimit(resource.RLIMIT_AS, (int(gib * 2**30),) * 2)


def _serve(link: Connection, name: str, memory: float) -> None:
    """Answer until the other side closes; what fails is answered with its error."""
    link.recv_bytes()
    try:
        _limit(memory)
        function = load_reward(name)
    except Exception as error:
        link.send_bytes(json.dumps({"error": f"{type(error).__name__}: {error}"}).encode())
        return
    link.send_bytes(b"{}")
    while True:
        texts, targets = json.loads(link.recv_bytes())
        try:
            found = function(texts, targets)
            rewards = [None if v is None else float(v) for v in getattr(found, "total", found)]
            if len(rewards) != len(texts):
                raise ValueError(f"the reward gave {len(rewards)} numbers for {len(texts)} texts")
            reply: dict[str, Any] = {"rewards": rewards}
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        link.send_bytes(json.dumps(reply).encode())


if __name__ == "__main__":
    sys.path[0] = os.getcwd()  # as for the trainer: modules of the folder that it was started in
    with contextlib.suppress(EOFError, OSError), Connection(int(sys.argv[1])) as connection:
        _serve(connection, sys.argv[2], float(sys.argv[3]))
