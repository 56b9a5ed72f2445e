"""What stands around the application: request ids, the bearer token, the log, the metrics."""

from __future__ import annotations

import asyncio
import base64
import hmac
import logging
import random
import re
import time
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.responses import JSONResponse

from rewards_fast.server.bodies import header
from rewards_fast.server.limits import Limits, Load
from rewards_fast.server.metrics import OPEN_PATHS, PATHS, Metrics

LOG = logging.getLogger("rewards_fast.server")
REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,64}\Z")
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]


def request_id_of(given: bytes | None) -> bytes:
    """The client's request id where it is a plain word, else one of our own."""
    return given if given and REQUEST_ID.match(given) else b"%016x" % random.getrandbits(64)


class Gate:
    """Around the application: request ids, the bearer token, the log, the metrics;
    whatever fails has an answer.

    An answer that comes before the body was read first waits a moment for the rest of it, so that a client
    which writes before it reads sees the answer and no reset connection.
    """

    def __init__(
        self,
        app: Any,
        load: Load,
        metrics: Metrics,
        token: str | None,
        limits: Limits,
    ) -> None:
        self.app, self.load, self.metrics, self.limits = app, load, metrics, limits
        self.token = None if token is None else token.encode()

    def answered(
        self, path: str, status: int, seconds: float, request_id: bytes, client: str, method: str, texts: int
    ) -> None:
        """Counts and logs an answer."""
        known = path if path in PATHS else "other"
        self.metrics.answer(known, status, seconds)
        if LOG.isEnabledFor(logging.INFO):
            LOG.info(
                "request_id=%s client=%s method=%s path=%s status=%s ms=%.2f texts=%s",
                request_id.decode(),
                client,
                method,
                path if path == known else ascii(path[:200]),
                status or "gone",
                1e3 * seconds,
                texts,
            )

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start = time.perf_counter()
        request_id = request_id_of(header(scope, b"x-request-id"))
        notes: dict[str, Any] = {"id": request_id.decode()}
        scope["state"] = {"notes": notes}
        status = 0
        length = header(scope, b"content-length")
        chunked = header(scope, b"transfer-encoding") is not None
        unread = chunked or length not in (None, b"0")

        async def receive_and_note() -> Any:
            nonlocal unread
            message = await receive()
            unread = unread and bool(message.get("more_body", False))
            return message

        async def send_with_id(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message["headers"], (b"x-request-id", request_id)]
                if (unread and not await self.discard(scope, receive_and_note)) or self.load.draining:
                    headers.append((b"connection", b"close"))
                message = {**message, "headers": headers}
            await send(message)

        try:
            if chunked and length is not None:  # two ends of one body: what one reader skips another may run
                answer = JSONResponse(
                    {
                        "error": "content-length and transfer-encoding exclude each other",
                        "request_id": notes["id"],
                    },
                    400,
                    {"connection": "close"},
                )
                await answer(scope, receive_and_note, send_with_id)
            elif scope["path"] in OPEN_PATHS or self.allowed(header(scope, b"authorization")):
                await self.app(scope, receive_and_note, send_with_id)
            else:
                answer = JSONResponse(
                    {"error": "a valid bearer token is needed", "request_id": notes["id"]},
                    401,
                    {"www-authenticate": "Bearer"},
                )
                await answer(scope, receive_and_note, send_with_id)
        except Exception:  # the application has answered 500
            LOG.exception("request_id=%s failed", notes["id"])
        finally:
            seconds = time.perf_counter() - start
            client = (scope.get("client") or ("-",))[0]
            self.answered(
                scope["path"], status, seconds, request_id, client, scope["method"], notes.get("texts", 0)
            )

    async def discard(self, scope: Any, receive: Receive) -> bool:
        """Reads the rest of a body for at most a second; whether that was all of it."""
        if header(scope, b"expect") is not None:  # such a client waits for the answer before it sends
            return False
        size = 0
        try:
            async with asyncio.timeout(1.0):
                while size <= 2 * self.limits.body:
                    message = await receive()
                    size += len(message.get("body", b""))
                    if not message.get("more_body", False):
                        return True
        except TimeoutError:
            pass
        return False

    def allowed(self, authorization: bytes | None) -> bool:
        """Whether that header has the token: as bearer,
        or as the password of a URL like http://any:TOKEN@host."""
        if self.token is None:
            return True
        kind, _, credentials = (authorization or b"").partition(b" ")
        credentials = credentials.strip()
        if kind.lower() == b"basic":
            try:
                credentials = base64.b64decode(credentials, validate=True).partition(b":")[2]
            except ValueError:
                return False
        elif kind.lower() != b"bearer":
            return False
        return hmac.compare_digest(credentials, self.token)
