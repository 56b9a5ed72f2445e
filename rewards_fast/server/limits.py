"""What one request, and all of them together, may take; what is held at this moment; and the word for no."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What one request, and all of them together, may take."""

    body: int = 32 << 20  # bytes of one request
    texts: int = 4096  # of one request
    chars: int = 1_000_000  # of one text; a cell of 10,000 sites has about 600,000
    queue: int = 256  # requests read and not yet answered
    held: int = 256 << 20  # bytes of all bodies that are being read or scored
    connections: int = 1024  # open at once; one more closes the one that has been idle longest
    header_seconds: float = 10.0  # for the first line and the headers
    body_seconds: float = 30.0  # for the whole body
    idle_seconds: float = 60.0  # of a connection without a request
    drain_seconds: float = 1.0  # after SIGTERM: still answers, tells clients to go, is not ready
    stop_seconds: float = 30.0  # after that: for what was accepted


class Refusal(Exception):
    """A request that is answered with a 4xx or 503 and a reason."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message[:500]


@dataclass
class Load:
    """What the server holds at this moment."""

    requests: int = 0
    held: int = 0
    draining: bool = False
