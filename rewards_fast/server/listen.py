"""Sockets and signals: uvicorn's HTTP/1.1 with an end to its patience, and a stop that resets nothing."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import ipaddress
import logging
import os
import socket
import struct
import sys
import time
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.h11_impl import H11Protocol

from rewards_fast.server.app import make_app
from rewards_fast.server.limits import Limits, Load
from rewards_fast.settings import RewardSettings

LOG = logging.getLogger("rewards_fast.server")
HEADER_BYTES = 64 << 10


class PatientProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 by h11, which takes an `Upgrade` that nobody answers for the plain request that it
    is. (By httptools the body of such a request is lost, or read as the next request.) Headers must come in
    time; of more connections than `most` the one that has been idle longest goes; who pipelines and does not
    read is not read on.
    """

    header_seconds = 10.0
    most = 1024
    idle: dict[PatientProtocol, None]  # of one server, those without a request in the order of their last one
    waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.note_state(waiting=True)
        while len(self.connections) > self.most and self.idle:
            oldest = next(iter(self.idle))
            oldest.connections.discard(oldest)
            oldest.give_up()

    def note_state(self, waiting: bool = False) -> None:
        """Starts the clock of headers where some are due; knows the connection as idle or not."""
        if self.transport.is_closing():
            self.stop_waiting()
            self.idle.pop(self, None)
        elif self.conn.their_state is h11.IDLE:
            self.idle.setdefault(self)
            if self.waiting is None and (waiting or self.conn.trailing_data[0]):
                self.waiting = self.loop.call_later(self.header_seconds, self.give_up, b"408 Request Timeout")
        else:
            self.stop_waiting()
            self.idle.pop(self, None)

    def stop_waiting(self) -> None:
        """Stops that clock."""
        if self.waiting is not None:
            self.waiting.cancel()
            self.waiting = None

    def give_up(self, status: bytes | None = None) -> None:
        """Ends a connection without a request, with a word where its headers did not come."""
        self.stop_waiting()
        self.idle.pop(self, None)
        if not self.transport.is_closing():
            if status is not None:
                self.transport.write(
                    b"HTTP/1.1 %s\r\nconnection: close\r\ncontent-length: 0\r\n\r\n" % status
                )
            self.transport.close()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.note_state()

    def send_400_response(self, msg: str) -> None:
        error = sys.exception()
        large = getattr(error, "error_status_hint", 400) == 431
        begun = self.conn.our_state not in (
            h11.IDLE,
            h11.SEND_RESPONSE,
        )  # its answer is on the way: nothing to add
        status = b"431 Request Header Fields Too Large" if large else b"400 Bad Request"
        self.give_up(None if begun else status)

    def on_response_complete(self) -> None:
        self.idle.pop(self, None)  # to the end of the line
        super().on_response_complete()
        if len(self.conn.trailing_data[0]) > HIGH_WATER_LIMIT:
            self.flow.pause_reading()
        self.note_state()

    def connection_lost(self, exc: Exception | None) -> None:
        self.stop_waiting()
        self.idle.pop(self, None)
        super().connection_lost(exc)


def drop_handshakes(listener: Any) -> None:
    """From here on the system drops the first packet of a new connection to a listening socket, and the
    client tries again a second later: the socket can then be closed when all that knocked before have been
    let in. Closed at once, it would reset those that wait. Linux only (a packet filter: no SYN without ACK);
    elsewhere nothing happens."""
    flags, mask, syn, drop, keep = 13, 0x12, 0x02, 0, 0xFFFFFFFF
    program = [
        (0x30, 0, 0, flags),
        (0x54, 0, 0, mask),
        (0x15, 0, 1, syn),
        (0x06, 0, 0, drop),
        (0x06, 0, 0, keep),
    ]
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code)
    attach = 26  # SO_ATTACH_FILTER, which Python's socket module does not name
    if sys.platform == "linux":
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(listener.fileno())) as same:
            same.setsockopt(
                socket.SOL_SOCKET, attach, struct.pack("HL", len(program), ctypes.addressof(buffer))
            )


class DrainingServer(uvicorn.Server):
    """uvicorn's server that after SIGTERM or SIGINT goes on for a moment: not ready,
    closing connections after answers.

    So clients learn that they must go elsewhere before the port closes, and no request is lost on a
    connection that was idle when it was closed. A second signal ends the moment.
    """

    should_exit: bool
    force_exit: bool
    SETTLE = 0.3  # seconds between the last new connection and the end of listening

    def __init__(self, config: uvicorn.Config, load: Load, seconds: float) -> None:
        super().__init__(config)
        self.load, self.seconds, self.stop_at = load, seconds, float("inf")
        self.deaf = False

    @property
    def port(self) -> int:
        """Where it listens, once it has started."""
        return int(self.servers[0].sockets[0].getsockname()[1])

    def handle_exit(self, sig: int, frame: Any) -> None:
        if self.should_exit:  # a third one
            self.force_exit = True
        elif self.load.draining:
            self.stop_at = 0.0
        else:
            self.load.draining = True
            self.stop_at = time.monotonic() + self.seconds

    async def on_tick(self, counter: int) -> bool:
        if time.monotonic() >= self.stop_at:
            if self.deaf:
                self.should_exit = True
            else:
                self.deaf = True
                for listener in (s for server in self.servers for s in server.sockets):
                    drop_handshakes(listener)
                self.stop_at = time.monotonic() + self.SETTLE
        return await super().on_tick(counter)


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def allow_connections(wanted: int) -> int:
    """Raises the limit of open files so that `wanted` connections fit, as far as the system lets it;
    what fits."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return wanted
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    others = 128  # files, pipes and threads of the process
    if soft != resource.RLIM_INFINITY and soft < wanted + others:
        soft = wanted + others if hard == resource.RLIM_INFINITY else min(hard, wanted + others)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return wanted if soft == resource.RLIM_INFINITY else max(1, min(wanted, soft - others))


def make_server(
    settings: RewardSettings | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    limits: Limits | None = None,
    log_level: str = "info",
) -> DrainingServer:
    """A server that is not yet running; `run()` serves until SIGTERM or SIGINT,
    answers what it accepted and returns."""
    limits = limits or Limits()
    app = make_app(settings, limits, token)
    most = allow_connections(limits.connections)
    options = {"header_seconds": limits.header_seconds, "most": most, "idle": {}}
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=type("Protocol", (PatientProtocol,), options),
        ws="none",
        lifespan="off",
        log_config=None,
        log_level=log_level,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        h11_max_incomplete_event_size=HEADER_BYTES,
        backlog=limits.connections,
        timeout_keep_alive=int(limits.idle_seconds),
        timeout_graceful_shutdown=int(limits.stop_seconds),
    )
    return DrainingServer(config, app.load, limits.drain_seconds)


def serve(
    settings: RewardSettings, host: str, port: int, token: str | None, limits: Limits, log_level: str
) -> None:
    """Serves until SIGTERM or SIGINT; the log goes to standard error."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s %(message)s", level=log_level.upper())
    if token is None and not is_loopback(host):
        LOG.warning("%s is reached from other machines and no token is set: anybody there can ask", host)
    server = make_server(settings, host, port, token, limits, log_level)
    gc.collect()
    gc.freeze()  # what is loaded by now stays: looking through it again and again took 20 ms each time
    server.run()
