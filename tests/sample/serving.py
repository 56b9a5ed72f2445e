"""Rollout services for tests, that can be lost: in a thread, or in a process of their own."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from catmllm.sample.service import make_server, serve
from catmllm.sample.wire import Client
from tests.ranks import forks


class Served:
    """Services at one port, one after the other."""

    def __init__(self, process: bool) -> None:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.process, self.client = process, Client(f"http://127.0.0.1:{self.port}", 60.0)
        self.running: Any = None
        self.begun = 0

    def begin(self) -> None:
        self.begun += 1
        if self.process:
            self.running = forks().Process(target=serve, args=("127.0.0.1", self.port), daemon=True)  # type: ignore[attr-defined]
            self.running.start()
        else:
            self.running = make_server("127.0.0.1", self.port)
            threading.Thread(target=self.running.run, daemon=True).start()

    def kill(self) -> None:
        """Without a word to those who wait for an answer."""
        if self.process:
            os.kill(self.running.pid, signal.SIGKILL)
            self.running.join()
            return
        loop = self.running.servers[0].get_loop()
        for server in self.running.servers:
            loop.call_soon_threadsafe(server.close)
        for connection in list(self.running.server_state.connections):
            loop.call_soon_threadsafe(connection.transport.abort)
        self.running.should_exit = self.running.force_exit = True


@contextmanager
def served(process: bool = False) -> Iterator[Served]:
    service = Served(process)
    service.begin()
    service.client.wait()
    try:
        yield service
    finally:
        service.kill()
