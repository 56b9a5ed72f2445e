"""The application: endpoints, what they score and answer, and the settings that a query asks for."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any
from urllib.parse import parse_qsl

import msgspec
import prometheus_client
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from rewards_fast.integrations.loops import score_answers
from rewards_fast.integrations.openrlhf import reply, score_queries
from rewards_fast.pvcp import FIELD_NAMES, TERM_NAMES, Scores
from rewards_fast.server.bodies import body_types, decode, read_body
from rewards_fast.server.gate import Gate
from rewards_fast.server.limits import Limits, Load, Refusal
from rewards_fast.server.metrics import Metrics
from rewards_fast.server.openapi import DIAGNOSTIC_NUMBERS, SCORES, openapi_schema
from rewards_fast.server.page import docs_page
from rewards_fast.settings import LoopSettings, RewardSettings, read_settings
from rewards_fast.targets import MissingTargets

# Body, settings, whether diagnostics are wanted: the answer, the number of texts.
Work = Callable[[bytes, LoopSettings, bool], tuple[bytes, int]]
Handler = Callable[[Request], Awaitable[Response]]
# What makes the answer of a decoded request: scores, which had no target, the answer's object.
Reply = Callable[[LoopSettings, Any, MissingTargets], tuple[Scores, list[bool], dict[str, Any]]]


def diagnostics(scores: Scores, missing: list[bool]) -> dict[str, Any]:
    """What stands beside the reward: numbers of the cell, sub-terms, completeness of the key fields."""
    return {
        **{name: getattr(scores, name).tolist() for name in DIAGNOSTIC_NUMBERS},
        "reason": scores.reason,
        "no_target": missing,
        "terms": {name: scores.terms[name].tolist() for name in TERM_NAMES},
        "fields": {name: scores.fields[name].tolist() for name in FIELD_NAMES},
    }


def score_reply(
    settings: LoopSettings, request: Any, watch: MissingTargets
) -> tuple[Scores, list[bool], dict[str, Any]]:
    """The answer of /v1/score."""
    scores, missing = score_answers(
        settings, request.texts, request.targets, watch, "Send `targets`, one for each text or one for all."
    )
    columns = scores.rows[:, : len(SCORES)].T.tolist()
    return scores, missing, {**dict(zip(SCORES, columns)), "reason": scores.reason}


def openrlhf_reply(
    settings: LoopSettings, request: Any, watch: MissingTargets
) -> tuple[Scores, list[bool], dict[str, Any]]:
    """The answer of /get_reward."""
    scores, missing = score_queries(settings, request.query, request.prompts, request.labels, watch)
    return scores, missing, reply(settings.scorer(), scores, missing)


def read_query(query: bytes, base: LoopSettings) -> tuple[LoopSettings, bool]:
    """The settings that a query string asks for, and whether it asks for diagnostics.
    Refusal 422 names what is wrong."""
    try:
        pairs = parse_qsl(
            query.decode("ascii"), keep_blank_values=True, strict_parsing=bool(query), errors="strict",
            max_num_fields=50
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
        return read_settings(given, "query", base), wanted == "true"
    except ValueError as error:
        raise Refusal(422, str(error)) from None


def worker(kind: Any, answer: Reply, path: str, metrics: Metrics) -> Work:
    """What a thread does with a body: decode, score, encode."""
    decoder, encoder = msgspec.json.Decoder(kind), msgspec.json.Encoder()
    watch = MissingTargets(path)

    def work(body: bytes, settings: LoopSettings, detail: bool) -> tuple[bytes, int]:
        begin = time.perf_counter()
        request = decode(decoder, body)
        decoded = time.perf_counter()
        try:
            scores, missing, result = answer(settings, request, watch)
        except (ValueError, TypeError) as error:
            raise Refusal(422, str(error)) from None
        scored = time.perf_counter()
        if detail:
            result["diagnostics"] = diagnostics(scores, missing)
        encoded = encoder.encode(result)
        metrics.scored(scores.reason, missing)
        metrics.decode.inc(decoded - begin)
        metrics.score.inc(scored - decoded)
        metrics.encode.inc(time.perf_counter() - scored)
        return encoded, len(scores)

    return work


def make_app(
    settings: RewardSettings | None = None,
    limits: Limits | None = None,
    token: str | None = None,
    workers: int | None = None,
) -> Gate:
    """The ASGI application (a Starlette one inside a `Gate`). settings: what a query without keys gets."""
    base = (
        settings if isinstance(settings, LoopSettings) else LoopSettings(**vars(settings or RewardSettings()))
    )
    limits = limits or Limits()
    base.scorer().score(["data_"], None)  # a first score loads the engine
    load = Load()
    metrics = Metrics(load)
    pool = ThreadPoolExecutor(workers or max(2, os.cpu_count() or 1), "score")
    settings_of = lru_cache(maxsize=256)(lambda query: read_query(query, base))
    types = body_types(limits)
    replies = {"/v1/score": (types[0], score_reply), "/get_reward": (types[1], openrlhf_reply)}
    posts = [
        Route(
            path,
            endpoint(worker(kind, answer, path, metrics), settings_of, limits, load, pool),
            methods=["POST"],
        )
        for path, (kind, answer) in replies.items()
    ]
    pages = [
        Route(path, show, methods=["GET"])
        for path, show in show_pages(load, metrics, openapi_schema(types, base, token is not None)).items()
    ]
    app = Starlette(routes=[*posts, *pages], exception_handlers={HTTPException: http_error, Exception: fault})
    return Gate(app, load, metrics, token, limits)


def endpoint(
    work: Work,
    settings_of: Callable[[bytes], tuple[LoopSettings, bool]],
    limits: Limits,
    load: Load,
    pool: ThreadPoolExecutor,
) -> Handler:
    """What answers a POST: reads the body while there is room, and has a thread do the work."""

    async def respond(request: Request) -> Response:
        notes = request.scope["state"]["notes"]
        try:
            chosen, detail = settings_of(request.scope["query_string"])
            if load.requests >= limits.queue:
                raise Refusal(503, "too many requests are waiting; try again")
            body = await read_body(request, limits, load)
            try:
                if load.requests >= limits.queue:
                    raise Refusal(503, "too many requests are waiting; try again")
                load.requests += 1
                try:
                    loop = asyncio.get_running_loop()
                    content, notes["texts"] = await loop.run_in_executor(pool, work, body, chosen, detail)
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


def show_pages(load: Load, metrics: Metrics, schema: dict[str, Any]) -> dict[str, Handler]:
    """What answers a GET, by path."""
    page = docs_page(schema)

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

    return {
        "/healthz": healthz,
        "/readyz": readyz,
        "/metrics": show_metrics,
        "/openapi.json": show_schema,
        "/docs": show_page,
    }


async def http_error(request: Request, error: Any) -> Response:
    message = {"error": error.detail, "request_id": request.scope["state"]["notes"]["id"]}
    return JSONResponse(message, error.status_code, error.headers)


async def fault(request: Request, error: Exception) -> Response:
    message = {"error": "internal error", "request_id": request.scope["state"]["notes"]["id"]}
    return JSONResponse(message, 500)
