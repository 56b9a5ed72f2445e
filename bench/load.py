"""Closed-loop HTTP clients on loopback for `server.py`:
each connection sends its next request when the last one is answered.

`python bench/load.py HOST PORT PATH CLIENTS SECONDS` reads the bodies (JSON, one a line) from standard input
and prints one JSON object: answers by status, percentiles of their latency, seconds, and what an answer cost
the clients themselves. Bare sockets under one epoll, whole requests made beforehand: an event loop's
protocols would cost as much as the server measured. It stops by itself; only loopback addresses are taken.
"""

from __future__ import annotations

import ipaddress
import json
import select
import socket
import sys
import time
from itertools import cycle
from typing import Any

SHARES = {"p50_ms": 0.5, "p99_ms": 0.99, "worst_ms": 0.999999}
PATIENCE = 60.0  # seconds without any answer after which the rest is given up


class Connection:
    """One client: its socket and what is under way on it."""

    def __init__(self, host: str, port: int) -> None:
        self.socket = socket.create_connection((host, port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)
        self.unsent = memoryview(b"")
        self.head = b""  # of an answer whose headers are not there yet
        self.missing = -1  # bytes of its body
        self.begin = 0.0


def run(host: str, port: int, path: str, clients: int, seconds: float, bodies: list[bytes]) -> dict[str, Any]:
    """Latencies (ms) and statuses (0: the connection broke) of `clients` connections over `seconds`.

    A hot loop, in one piece: the clients share a machine with the server that they measure.
    """
    start = (
        f"POST {path} HTTP/1.1\r\nhost: {host}\r\n"
        "content-type: application/json\r\ncontent-length: %d\r\n\r\n"
    ).encode()
    requests = cycle([start % len(body) + body for body in bodies])
    latencies: list[float] = []
    statuses: dict[bytes, int] = {}
    poll = select.epoll()
    known: dict[int, Connection] = {}
    clock = time.perf_counter

    def send(one: Connection, now: float) -> None:
        one.begin = now
        request = next(requests)
        sent = one.socket.send(request)
        if sent < len(request):
            one.unsent = memoryview(request)[sent:]
            poll.modify(one.socket, select.EPOLLIN | select.EPOLLOUT)

    def drop(one: Connection) -> None:
        del known[one.socket.fileno()]
        one.socket.close()  # epoll forgets it

    begin, cpu = clock(), time.process_time()
    until = begin + seconds
    for _ in range(clients):
        one = Connection(host, port)
        known[one.socket.fileno()] = one
        poll.register(one.socket, select.EPOLLIN)
        send(one, clock())
    while known:
        events = poll.poll(PATIENCE)
        if not events:
            statuses[b"0"] = statuses.get(b"0", 0) + len(known)
            break
        for number, what in events:
            one = known[number]
            try:
                if one.unsent and what & select.EPOLLOUT:
                    one.unsent = one.unsent[one.socket.send(one.unsent) :]
                    if not one.unsent:
                        poll.modify(one.socket, select.EPOLLIN)
                if not what & ~select.EPOLLOUT:
                    continue
                data = one.socket.recv(1 << 16)
            except BlockingIOError:
                continue
            except OSError:
                data = b""
            if not data:
                statuses[b"0"] = statuses.get(b"0", 0) + 1
                drop(one)
                continue
            if one.missing < 0:
                one.head += data
                head, end, rest = one.head.partition(b"\r\n\r\n")
                if not end:
                    continue
                _, _, length = head.lower().partition(b"content-length:")
                one.head, one.missing = b"", int(length.split(b"\r\n", 1)[0]) - len(rest)
                statuses[head[9:12]] = statuses.get(head[9:12], 0) + 1
            else:
                one.missing -= len(data)
            if one.missing == 0:
                now = clock()
                latencies.append(now - one.begin)
                one.missing = -1
                if now < until:
                    send(one, now)
                else:
                    drop(one)
    spent, cpu, ordered = clock() - begin, time.process_time() - cpu, sorted(latencies)
    share = {name: ordered[int(len(ordered) * q)] if ordered else None for name, q in SHARES.items()}
    return {
        "seconds": spent,
        "answers": len(ordered),
        **{name: None if x is None else 1e3 * x for name, x in share.items()},
        "client_cpu_us_an_answer": 1e6 * cpu / max(1, len(ordered)),
        "statuses": {status.decode(): n for status, n in statuses.items()},
    }


def main() -> None:
    if len(sys.argv) != 6 or sys.argv[1].startswith("-"):
        print(
            "skipped: the clients of bench/server.py, which starts them; see --help of that", file=sys.stderr
        )
        raise SystemExit(77)
    host, port, path, clients, seconds = sys.argv[1:]
    if not ipaddress.ip_address(host).is_loopback:
        raise SystemExit(f"{host} is not a loopback address")
    bodies = [line for line in sys.stdin.buffer.read().splitlines() if line]
    print(json.dumps(run(host, int(port), path, int(clients), min(float(seconds), 900.0), bodies)))


if __name__ == "__main__":
    main()
