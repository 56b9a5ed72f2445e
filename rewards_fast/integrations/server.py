"""`rewards-fast serve`: the PVCP reward over HTTP, for RL code that is not Python or runs on other machines.

One process answers for a node: the event loop moves bytes, a few threads decode, score (without the GIL, on every core)
and encode. Whatever is wrong with a request is a 4xx that says so; what the server has no room for is a 503 with
Retry-After. A small request that is right in everything is answered where its bytes arrive, without ASGI and threads,
which would cost ten times its score; all else goes the long way, through FastAPI. Needs the extra `server` (FastAPI,
uvicorn, msgspec, prometheus-client).
"""

from __future__ import annotations

import asyncio
import base64
import gc
import hmac
import ipaddress
import logging
import os
import random
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sized
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any
from urllib.parse import parse_qsl

import msgspec
import prometheus_client
import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from msgspec import Meta
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from rewards_fast.integrations.openapi import DIAGNOSTIC_NUMBERS, TERMS, docs_page, openapi_schema
from rewards_fast.integrations.openrlhf import reply, score_queries
from rewards_fast.pvcp import ELEMENTS, FIELD_NAMES, PVCP, REASONS, TERM_NAMES, Scores
from rewards_fast.settings import RewardSettings, read_settings

LOG = logging.getLogger("rewards_fast.server")
OPEN_PATHS = ("/healthz", "/readyz")
PATHS = ("/v1/score", "/get_reward", *OPEN_PATHS, "/metrics", "/docs", "/openapi.json")
LARGEST_COUNT = 1e6  # of an element in a target
TARGET_CHARS = 1000
REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,64}\Z")
# A body of at most this many bytes is scored where it arrives: four slabs of 68 atoms take 30 µs, a hand-over to a thread more.
SMALL_BODY = 16 << 10
SLOW_SECONDS = (
    0.002  # the same bytes can name a cell of 100,000 sites: a connection that sends such goes the long way
)
DETOUR = 100  # for so many requests
BODY_SECONDS = (
    0.05  # a body that comes later than this after its headers goes the long way too, which waits longer
)


@dataclass(frozen=True)
class Limits:
    """What one request, and all of them together, may take."""

    body: int = 32 << 20  # bytes of one request
    texts: int = 4096  # of one request
    chars: int = 1_000_000  # of one text; a cell of 10,000 sites has about 600,000
    queue: int = 256  # requests read and not yet answered
    held: int = 256 << 20  # bytes of all bodies that are being read or scored
    connections: int = 1024
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


class Metrics:
    """Prometheus counters of one application, in a registry of their own."""

    def __init__(self, load: Load) -> None:
        self.registry = prometheus_client.CollectorRegistry()
        prometheus_client.ProcessCollector(registry=self.registry)
        prometheus_client.GCCollector(registry=self.registry)
        options: dict[str, Any] = {"namespace": "rewards_fast", "registry": self.registry}
        buckets = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
        self.requests = prometheus_client.Counter("requests", "Answers", ["path", "status"], **options)
        self.seconds = prometheus_client.Histogram(
            "request_seconds", "From the headers to the last byte of the answer", ["path"], buckets=buckets, **options
        )  # fmt: skip
        self.stage = prometheus_client.Counter(
            "stage_seconds", "Time of the worker threads", ["stage"], **options
        )
        self.texts = prometheus_client.Counter(
            "texts", "Scored texts, by why they do not parse", ["reason"], **options
        )
        waiting = prometheus_client.Gauge("queue_requests", "Requests read and not yet answered", **options)
        waiting.set_function(lambda: load.requests)
        held = prometheus_client.Gauge("held_bytes", "Bodies that are being read or scored", **options)
        held.set_function(lambda: load.held)
        self.reasons = {reason: self.texts.labels(reason or "parses") for reason in (None, *REASONS)}
        self.decode, self.score, self.encode = (
            self.stage.labels(name) for name in ("decode", "score", "encode")
        )
        self.answered: dict[tuple[str, int], Any] = {}
        self.timed = {path: self.seconds.labels(path) for path in (*PATHS, "other")}

    def answer(self, path: str, status: int, seconds: float) -> None:
        """Counts an answer."""
        key = path, status
        if key not in self.answered:
            self.answered[key] = self.requests.labels(path, str(status))
        self.answered[key].inc()
        self.timed[path].observe(seconds)

    def scored(self, reasons: list[str | None]) -> None:
        """Counts texts by reason."""
        for reason in set(reasons):
            self.reasons[reason].inc(reasons.count(reason))


# Bodies ------------------------------------------------------------------------------------------------------------

_SYMBOL = "|".join(sorted((*ELEMENTS, "D", "T"), key=len, reverse=True))
_COUNT = r"([0-9]{1,5}(\.[0-9]{1,5})?)?"
_GROUP = f"(({_SYMBOL}){_COUNT})"
_FORMULA = rf"({_GROUP}|\({_GROUP}+\){_COUNT}|\[{_GROUP}+\]{_COUNT})+"
_INDICES = r" \(-?[0-9]{1,2} -?[0-9]{1,2} -?[0-9]{1,2}\)"
TARGET_PATTERN = f"^({_FORMULA}(</s>{_FORMULA}{_INDICES})?)?$"


def body_types(limits: Limits) -> tuple[Any, Any]:
    """What the two endpoints read, with the limits in them; from these types come the decoders and the OpenAPI schemas."""
    text = Annotated[str, Meta(max_length=limits.chars)]
    formula = Annotated[
        str,
        Meta(
            max_length=TARGET_CHARS,
            description="A formula or a prompt; text around a prompt and deeper brackets are read as well.",
            extra_json_schema={"pattern": TARGET_PATTERN},
        ),
    ]
    count = Annotated[float, Meta(ge=0, le=LARGEST_COUNT)] | None
    counts = Annotated[
        dict[str, count],
        Meta(max_length=130, extra_json_schema={"propertyNames": {"enum": [*ELEMENTS, "D", "T"]}}),
    ]
    target: Any = formula | counts | None
    texts = Annotated[list[text], Meta(max_length=limits.texts)]
    targets: Any = Annotated[list[target], Meta(max_length=limits.texts)] | formula | counts | None
    score = msgspec.defstruct(
        "ScoreRequest", [("texts", texts), ("targets", targets, None)], forbid_unknown_fields=True
    )
    prompts: Any = texts | None
    labels: Any = Annotated[list[target], Meta(max_length=limits.texts)] | None
    openrlhf = msgspec.defstruct(
        "OpenRLHFRequest", [("query", texts), ("prompts", prompts, None), ("labels", labels, None)]
    )
    return score, openrlhf


def decode(decoder: msgspec.json.Decoder[Any], body: bytes) -> Any:
    """The request of a body; Refusal 400 for what is no JSON, 422 for what is another JSON."""
    if not body:
        raise Refusal(400, "the body is empty; send JSON")
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise Refusal(422, str(error)) from None
    except UnicodeDecodeError as error:
        raise Refusal(400, f"the body is not UTF-8: {error.reason}") from None
    except msgspec.DecodeError as error:
        raise Refusal(400, f"the body is not JSON: {error}") from None
    except RecursionError:
        raise Refusal(400, "the body is nested too deeply") from None


def diagnostics(scores: Scores) -> dict[str, Any]:
    """What stands beside the reward: numbers of the cell, sub-terms, completeness of the key fields."""
    return {
        **{name: getattr(scores, name).tolist() for name in DIAGNOSTIC_NUMBERS},
        "reason": scores.reason,
        "terms": {name: scores.terms[name].tolist() for name in TERM_NAMES},
        "fields": {name: scores.fields[name].tolist() for name in FIELD_NAMES},
    }


def score_reply(scorer: PVCP, request: Any) -> tuple[Scores, Callable[[], dict[str, Any]]]:
    """Scores of /v1/score and what makes its answer of them."""
    scores = scorer.score(request.texts, request.targets)
    return scores, lambda: {
        **dict(zip(TERMS, scores.rows[:, : len(TERMS)].T.tolist())),
        "reason": scores.reason,
    }


def openrlhf_reply(scorer: PVCP, request: Any) -> tuple[Scores, Callable[[], dict[str, Any]]]:
    """Scores of /get_reward and what makes its answer of them."""
    scores = score_queries(scorer, request.query, request.prompts, request.labels)
    return scores, lambda: reply(scorer, scores)


# Settings in the query ---------------------------------------------------------------------------------------------


def read_query(query: bytes, base: RewardSettings) -> tuple[PVCP, bool]:
    """The scorer that a query string asks for, and whether it asks for diagnostics. Refusal 422 names what is wrong."""
    try:
        pairs = parse_qsl(
            query.decode("ascii"), keep_blank_values=True, strict_parsing=bool(query), errors="strict", max_num_fields=50
        )  # fmt: skip
    except ValueError:
        raise Refusal(422, "the query string cannot be read; write ?near=0.7&diagnostics=true") from None
    given = dict(pairs)
    if len(given) < len(pairs):
        raise Refusal(422, "a key stands twice in the query string")
    if "threads" in given:
        raise Refusal(422, "query: `threads` belongs to the server, not to a request")
    wanted = given.pop("diagnostics", "false")
    if wanted not in ("true", "false"):
        raise Refusal(422, f"query: `diagnostics` must be true or false, got {wanted[:50]!r}")
    try:
        return read_settings(given, "query", base).scorer(), wanted == "true"
    except ValueError as error:
        raise Refusal(422, str(error)) from None


# The application ---------------------------------------------------------------------------------------------------

Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]


def header(scope: Mapping[str, Any], name: bytes) -> bytes | None:
    """A header of a request by its lower-case name."""
    return next((value for key, value in scope["headers"] if key == name), None)


def is_json(content_type: bytes) -> bool:
    """Whether a header names JSON, whatever its parameters."""
    return content_type.partition(b";")[0].strip().lower() == b"application/json"


def request_id_of(given: bytes | None) -> bytes:
    """The client's request id where it is a plain word, else one of our own."""
    return given if given and REQUEST_ID.match(given) else b"%016x" % random.getrandbits(64)


Work = Callable[
    [bytes, PVCP, bool], tuple[bytes, int]
]  # body, scorer, whether diagnostics: the answer, number of texts


class Gate:
    """Around the application: request ids, the bearer token, the log, the metrics; whatever fails has an answer.

    An answer that comes before the body was read first waits a moment for the rest of it, so that a client which writes
    before it reads sees the answer and no reset connection.
    """

    def __init__(
        self,
        app: Any,
        load: Load,
        metrics: Metrics,
        token: str | None,
        limits: Limits,
        works: Mapping[str, Work],
        scorer_of: Callable[[bytes], tuple[PVCP, bool]],
    ) -> None:
        self.app, self.load, self.metrics, self.limits, self.scorer_of = app, load, metrics, limits, scorer_of
        self.works = {path.encode(): (path, work) for path, work in works.items()}
        self.token = None if token is None else token.encode()

    def at_once(
        self, url: bytes, headers: list[tuple[bytes, bytes]], body: bytes, client: str
    ) -> tuple[bytes, bytes] | None:
        """Request id and body of the 200 to a small POST, or None: the long way, which has a word for all that is wrong."""
        start = time.perf_counter()
        path, _, query = url.partition(b"?")
        given = dict(headers)
        if (
            path not in self.works
            or len(given) < len(headers)
            or not is_json(given.get(b"content-type", b""))
            or b"content-encoding" in given
            or self.load.draining
            or self.load.requests >= self.limits.queue
            or not self.allowed(given.get(b"authorization"))
        ):
            return None
        name, work = self.works[path]
        try:
            content, texts = work(body, *self.scorer_of(query))
        except Exception:
            return None
        request_id = request_id_of(given.get(b"x-request-id"))
        self.answered(name, 200, time.perf_counter() - start, request_id, client, "POST", texts)
        return request_id, content

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
        unread = header(scope, b"transfer-encoding") is not None or length not in (None, b"0")

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
            if scope["path"] in OPEN_PATHS or self.allowed(header(scope, b"authorization")):
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
        """Whether that header has the token: as bearer, or as the password of a URL like http://any:TOKEN@host."""
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


def make_app(
    settings: RewardSettings | None = None,
    limits: Limits | None = None,
    token: str | None = None,
    workers: int | None = None,
) -> Gate:
    """The ASGI application (a FastAPI one inside a `Gate`). settings: what a query without keys gets."""
    base, limits = settings or RewardSettings(), limits or Limits()
    base.scorer().score(["data_"], None)  # a first score loads the engine
    load = Load()
    metrics = Metrics(load)
    pool = ThreadPoolExecutor(workers or max(2, os.cpu_count() or 1), "score")
    scorer_of = lru_cache(maxsize=256)(lambda query: read_query(query, base))
    types = body_types(limits)
    app = FastAPI(openapi_url=None)
    schema = openapi_schema(types, base, token is not None)
    page = docs_page(schema)

    async def read_body(request: Request) -> bytes:
        length = int(header(request.scope, b"content-length") or 0)
        if length > limits.body:
            raise Refusal(413, f"the body has {length} bytes, more than {limits.body}")
        kind = header(request.scope, b"content-type") or b""
        if not is_json(kind):
            raise Refusal(
                415,
                f"content-type must be application/json, not {kind.decode('latin-1')[:100] or 'absent'!r}",
            )
        if header(request.scope, b"content-encoding") not in (None, b"identity"):
            raise Refusal(415, "content-encoding is not supported; send the JSON as it is")
        chunks, size = [], 0
        try:
            async with asyncio.timeout(limits.body_seconds):
                more = True
                while more:
                    message = await request.receive()
                    if message["type"] == "http.disconnect":
                        raise Refusal(400, "the client went away")
                    chunk, more = message.get("body", b""), message.get("more_body", False)
                    size += len(chunk)
                    load.held += len(chunk)
                    if size > limits.body:
                        raise Refusal(413, f"the body has more than {limits.body} bytes")
                    if load.held > limits.held:
                        raise Refusal(503, "too much is being sent at once; try again")
                    chunks.append(chunk)
        except TimeoutError:
            load.held -= size
            raise Refusal(408, f"the body did not come within {limits.body_seconds:g} s") from None
        except Refusal:
            load.held -= size
            raise
        return b"".join(chunks)

    def worker(kind: Any, answer: Callable[..., Any]) -> Work:
        decoder = msgspec.json.Decoder(kind)
        encoder = msgspec.json.Encoder()

        def work(body: bytes, scorer: PVCP, detail: bool) -> tuple[bytes, int]:
            begin = time.perf_counter()
            request = decode(decoder, body)
            decoded = time.perf_counter()
            try:
                scores, make = answer(scorer, request)
            except (ValueError, TypeError) as error:
                raise Refusal(422, str(error)) from None
            scored = time.perf_counter()
            result = make()
            if detail:
                result["diagnostics"] = diagnostics(scores)
            encoded = encoder.encode(result)
            metrics.scored(scores.reason)
            metrics.decode.inc(decoded - begin)
            metrics.score.inc(scored - decoded)
            metrics.encode.inc(time.perf_counter() - scored)
            return encoded, len(scores)

        return work

    def endpoint(work: Work) -> Callable[[Request], Awaitable[Response]]:
        async def respond(request: Request) -> Response:
            notes = request.scope["state"]["notes"]
            try:
                scorer, detail = scorer_of(request.scope["query_string"])
                if load.requests >= limits.queue:
                    raise Refusal(503, "too many requests are waiting; try again")
                body = await read_body(request)
                try:
                    if load.requests >= limits.queue:
                        raise Refusal(503, "too many requests are waiting; try again")
                    load.requests += 1
                    try:
                        loop = asyncio.get_running_loop()
                        content, notes["texts"] = await loop.run_in_executor(pool, work, body, scorer, detail)
                    finally:
                        load.requests -= 1
                finally:
                    load.held -= len(body)
            except Refusal as refusal:
                headers = {"retry-after": "1"} if refusal.status == 503 else None
                message = {"error": refusal.message, "request_id": notes["id"]}
                return JSONResponse(message, refusal.status, headers)
            return Response(content, media_type="application/json")

        return respond

    async def healthz(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def readyz(request: Request) -> Response:
        if load.draining:
            return JSONResponse({"status": "stopping"}, 503, {"retry-after": "1"})
        return JSONResponse({"status": "ready"})

    async def show_metrics(request: Request) -> Response:
        text = prometheus_client.generate_latest(metrics.registry)
        return Response(text, media_type=prometheus_client.CONTENT_TYPE_LATEST)

    async def show_schema(request: Request) -> Response:
        return JSONResponse(schema)

    async def show_page(request: Request) -> Response:
        return HTMLResponse(page)

    async def http_error(request: Request, error: Any) -> Response:
        message = {"error": error.detail, "request_id": request.scope["state"]["notes"]["id"]}
        return JSONResponse(message, error.status_code, error.headers)

    async def fault(request: Request, error: Exception) -> Response:
        message = {"error": "internal error", "request_id": request.scope["state"]["notes"]["id"]}
        return JSONResponse(message, 500)

    works = {"/v1/score": worker(types[0], score_reply), "/get_reward": worker(types[1], openrlhf_reply)}
    for path, work in works.items():
        app.add_route(path, endpoint(work), methods=["POST"])
    app.add_route("/healthz", healthz)
    app.add_route("/readyz", readyz)
    app.add_route("/metrics", show_metrics)
    app.add_route("/openapi.json", show_schema)
    app.add_route("/docs", show_page)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(Exception, fault)
    return Gate(app, load, metrics, token, limits, works, scorer_of)


# Sockets and signals -----------------------------------------------------------------------------------------------


HEAD = (
    b"HTTP/1.1 200 OK\r\n%scontent-length: %d\r\ncontent-type: application/json\r\nx-request-id: %s\r\n\r\n"
)


class OneByOne(FlowControl):
    """uvicorn's flow control that reads on only when every request at hand is being answered. uvicorn's own reads another
    256 KiB after each answer: a client that pipelines small requests and reads slowly would fill the memory."""

    def __init__(self, transport: Any, pipeline: Sized) -> None:
        super().__init__(transport)
        self.pipeline = pipeline

    def resume_reading(self) -> None:
        if not self.pipeline:
            super().resume_reading()


class PatientProtocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 with an end to its patience, headers must be there in time and be of some size; and with a short
    way for a small request to `Gate.at_once` that arrives whole. What `at_once` does not answer goes uvicorn's way."""

    HEADER_BYTES = 64 << 10
    header_seconds = 10.0
    gate: Gate
    waiting: asyncio.TimerHandle | None = None
    in_headers = False
    one_message = True  # the bytes at hand are of one message
    header_bytes = 0
    small: bytes | None = None  # the body so far of a request that may be answered at once
    detour = 0  # requests that still go the long way
    running: Any = (
        None  # uvicorn's cycle that answers; `self.cycle` is the newest, which may wait in the pipeline
    )

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.flow = OneByOne(transport, self.pipeline)
        self.await_headers()

    def await_headers(self) -> None:
        """Starts the clock of one request's headers."""
        self.stop_waiting()
        self.waiting = self.loop.call_later(self.header_seconds, self.give_up, b"408 Request Timeout")

    def stop_waiting(self) -> None:
        """Stops that clock."""
        if self.waiting is not None:
            self.waiting.cancel()
            self.waiting = None

    def give_up(self, status: bytes) -> None:
        """Ends a connection whose headers do not come or do not end."""
        self.stop_waiting()
        if not self.transport.is_closing():
            self.transport.write(b"HTTP/1.1 %s\r\nconnection: close\r\ncontent-length: 0\r\n\r\n" % status)
            self.transport.close()

    def data_received(self, data: bytes) -> None:
        self.one_message = True
        super().data_received(data)
        if self.small is not None and self.waiting is None:  # its body, or more of it, is a packet of its own
            self.waiting = self.loop.call_later(BODY_SECONDS, self.go_the_long_way)
        if self.in_headers:
            if self.waiting is None:
                self.await_headers()
            if self.one_message:  # else most of it may be bodies
                self.header_bytes += len(data)
            if self.header_bytes > self.HEADER_BYTES:
                self.give_up(b"431 Request Header Fields Too Large")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.stop_waiting()
        self.in_headers, self.header_bytes = True, 0

    def on_headers_complete(self) -> None:
        self.stop_waiting()
        self.in_headers = False
        if (
            not self.detour
            and (self.cycle is None or self.cycle.response_complete)
            and not self.flow.write_paused
            and self.parser.get_method() == b"POST"
            and self.parser.get_http_version() == "1.1"
            and self.parser.should_keep_alive()
            and not self.parser.should_upgrade()
            and not self.expect_100_continue
            and max(len(self.connections), len(self.tasks)) < self.gate.limits.connections
        ):
            self.small = b""
            return
        self.detour = max(0, self.detour - 1)
        self.start_cycle()

    def start_cycle(self) -> None:
        """uvicorn's course of a request, from its headers on."""
        super().on_headers_complete()
        if not self.pipeline:
            self.running = self.cycle

    def on_response_complete(self) -> None:
        self.running = self.pipeline[-1][0] if self.pipeline else None
        super().on_response_complete()

    def on_body(self, body: bytes) -> None:
        if self.small is None:
            super().on_body(body)
            return
        self.small += body
        if len(self.small) > SMALL_BODY:
            self.go_the_long_way()

    def on_message_complete(self) -> None:
        self.one_message = False
        if self.small is None:
            super().on_message_complete()
            return
        begin = time.thread_time()
        found = self.gate.at_once(self.url, self.headers, self.small, self.client[0] if self.client else "-")
        if time.thread_time() - begin > SLOW_SECONDS:
            self.detour = DETOUR
        if found is None:
            self.go_the_long_way()
            if self.cycle is not None:
                super().on_message_complete()
            return
        self.small = None
        self.stop_waiting()
        request_id, content = found
        lines = b"".join(b"%s: %s\r\n" % line for line in self.server_state.default_headers)
        self.transport.write(HEAD % (lines, len(content), request_id) + content)
        self.on_response_complete()

    def go_the_long_way(self) -> None:
        """Hands what has come of a request to uvicorn's own course."""
        self.stop_waiting()
        body, self.small = self.small, None
        if self.transport.is_closing():
            return
        self.start_cycle()
        if body:
            super().on_body(body)

    def shutdown(self) -> None:
        if self.small is not None:  # its headers were accepted
            self.go_the_long_way()
        super().shutdown()

    def connection_lost(self, exc: Exception | None) -> None:
        self.stop_waiting()
        if (
            self.running is not None
        ):  # uvicorn tells the newest one only; the others would write to a closed socket
            self.running.disconnected = True
            self.running.message_event.set()
        super().connection_lost(exc)


class DrainingServer(uvicorn.Server):
    """uvicorn's server that after SIGTERM or SIGINT goes on for a moment: not ready, closing connections after answers.

    So clients learn that they must go elsewhere before the port closes, and no request is lost on a connection that was
    idle when it was closed. A second signal ends the moment.
    """

    should_exit: bool
    force_exit: bool

    def __init__(self, config: uvicorn.Config, load: Load, seconds: float) -> None:
        super().__init__(config)
        self.load, self.seconds, self.stop_at = load, seconds, float("inf")

    def handle_exit(self, sig: int, frame: Any) -> None:
        if self.should_exit:  # a third one
            self.force_exit = True
        elif self.load.draining:
            self.should_exit = True
        else:
            self.load.draining = True
            self.stop_at = time.monotonic() + self.seconds

    async def on_tick(self, counter: int) -> bool:
        if time.monotonic() >= self.stop_at:
            self.should_exit = True
        return await super().on_tick(counter)


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def make_server(
    settings: RewardSettings | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    limits: Limits | None = None,
    log_level: str = "info",
) -> DrainingServer:
    """A server that is not yet running; `run()` serves until SIGTERM or SIGINT, answers what it accepted and returns."""
    limits = limits or Limits()
    app = make_app(settings, limits, token)
    protocol = type("Protocol", (PatientProtocol,), {"header_seconds": limits.header_seconds, "gate": app})
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level=log_level,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=limits.connections,
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
