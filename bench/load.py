"""Closed-loop HTTP clients on loopback for `server.py`: each connection sends its next request when the last one is answered.

`python bench/load.py HOST PORT PATH CLIENTS SECONDS` reads the bodies (JSON, one a line) from standard input and prints one
JSON object: answers by status, percentiles of their latency, seconds. It stops by itself; only loopback addresses are taken.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import sys
import time
from itertools import cycle
from typing import Any

SHARES = {"p50_ms": 0.5, "p99_ms": 0.99, "worst_ms": 0.999999}


class Client(asyncio.Protocol):
    """One connection; requests are whole byte strings made beforehand, so that the clients cost little."""

    def __init__(self, requests: Any, until: float, latencies: list[float], statuses: dict[int, int]) -> None:
        self.requests, self.until, self.latencies, self.statuses = requests, until, latencies, statuses
        self.buffer, self.missing, self.begin = b"", -1, 0.0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.transport: Any = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.send()

    def send(self) -> None:
        if time.perf_counter() >= self.until:
            self.transport.close()
            return
        self.begin = time.perf_counter()
        self.transport.write(next(self.requests))

    def data_received(self, data: bytes) -> None:
        if self.missing < 0:
            self.buffer += data
            head, end, rest = self.buffer.partition(b"\r\n\r\n")
            if not end:
                return
            length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
            self.missing = int(length.partition(b":")[2]) - len(rest)
            status = int(head[9:12])
            self.statuses[status] = self.statuses.get(status, 0) + 1
        else:
            self.missing -= len(data)
        if self.missing == 0:
            self.latencies.append(time.perf_counter() - self.begin)
            self.buffer, self.missing = b"", -1
            self.send()

    def connection_lost(self, error: Exception | None) -> None:
        if error is not None:
            self.statuses[0] = self.statuses.get(0, 0) + 1
        if not self.done.done():
            self.done.set_result(None)


async def run(host: str, port: int, path: str, clients: int, seconds: float, bodies: list[bytes]) -> Any:
    """Latencies (ms) and statuses (0: the connection broke) of `clients` connections over `seconds`."""
    head = f"POST {path} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n".encode()
    requests = cycle([head % len(body) + body for body in bodies])
    latencies: list[float] = []
    statuses: dict[int, int] = {}
    begin = time.perf_counter()
    until = begin + seconds
    loop = asyncio.get_running_loop()
    made = [
        await loop.create_connection(lambda: Client(requests, until, latencies, statuses), host, port)
        for _ in range(clients)
    ]
    await asyncio.gather(*(client.done for _, client in made))
    spent, ordered = time.perf_counter() - begin, sorted(latencies)
    share = {name: ordered[int(len(ordered) * q)] if ordered else None for name, q in SHARES.items()}
    return {
        "seconds": spent,
        "answers": len(ordered),
        **{name: None if x is None else 1e3 * x for name, x in share.items()},
        "statuses": statuses,
    }


def main() -> None:
    host, port, path, clients, seconds = sys.argv[1:]
    if not ipaddress.ip_address(host).is_loopback:
        raise SystemExit(f"{host} is no loopback address")
    with contextlib.suppress(ImportError):
        import uvloop

        uvloop.install()
    bodies = [line for line in sys.stdin.buffer.read().splitlines() if line]
    result = asyncio.run(run(host, int(port), path, int(clients), min(float(seconds), 900.0), bodies))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
