"""The rollout service: a process that holds a model and samples answers for trainers of any number of nodes.

It begins with nothing and keeps nothing: model and weights come over HTTP (`sample.wire`), so that one that
was lost is replaced by a new one. All work is done by one thread, in the order in which it comes.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
import uvicorn
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from torch import nn

from catmllm.data.prompts import Sample
from catmllm.models.build import on_meta
from catmllm.models.half_precision import keep_large_values
from catmllm.models.lora import add_lora
from catmllm.models.state import described_model
from catmllm.sample.engine import RolloutEngine
from catmllm.sample.grammar import answer_pattern
from catmllm.sample.wire import CONFLICT, LARGEST, Ask, Description, answers_to_bytes, sampled_with
from catmllm.world import DTYPES, encoder_dtype, set_products, settled

WAITING = 1024  # requests at a time, as many as there may be ranks
LONGEST = 1 << 22  # tokens of all answers of a request
Known = TypeVar("Known", bound=BaseModel)


class Service:
    """A model by its description, with the weights that have come, and the engine over them."""

    def __init__(self, device: torch.device, threads: int | None = None) -> None:
        """threads: of torch on a CPU; None: as many as a rank of the trainer has."""
        self.device, self.threads = device, threads
        self.session: str | None = None
        self.version: int | None = None
        self.loading: tuple[int, int] | None = None  # the version of which parts have come, and how many
        self.missing: set[str] = set()
        self.engine: RolloutEngine | None = None

    def state(self) -> dict[str, Any]:
        return {"session": self.session, "version": self.version}

    def describe(self, body: bytes) -> bytes:
        """Make the model of a new session; what was there before is forgotten."""
        asked = parsed(Description, body)
        try:
            with tempfile.TemporaryDirectory() as folder:
                asked.write(Path(folder))
                model, collate, config = described_model(Path(folder))
            if asked.adapters:
                with on_meta():
                    add_lora(model, config.lora, config.seed)
        except (ValueError, OSError, KeyError) as error:
            raise HTTPException(422, f"the model cannot be made of its description: {error}") from None
        config = settled(config, self.device.type)
        if self.device.type == "cuda":
            set_products(config)
        else:
            torch.set_num_threads(self.threads or config.threads)
        keep_large_values(model, DTYPES[config.precision], encoder_dtype(config))
        model.energy_head = nn.Module()  # type: ignore[assignment]
        if hasattr(model.llm.model, "visual"):
            model.llm.model.visual = nn.Module()
        self.model, self.collate, self.config = model.eval().requires_grad_(False), collate, config
        self.missing = {name for name in model.state_dict() if sampled_with(name)}
        self.version = self.loading = self.engine = None
        self.session = asked.session
        return b"{}"

    def weights(self, body: bytes, session: str, version: int, part: int, last: bool) -> bytes:
        """Take a part of a version's tensors; from the first to the last there is no version."""
        self._check(session)
        if part and self.loading != (version, part):
            raise HTTPException(CONFLICT, f"part {part} of weights {version} does not follow {self.loading}")
        try:
            tensors = load(body)
        except SafetensorError as error:
            raise HTTPException(400, f"the body is no safetensors: {error}") from None
        there = self.model.state_dict()
        for name, tensor in tensors.items():
            if name not in there or not sampled_with(name):
                raise HTTPException(422, f"the model has no {name}")
            wanted = there[name]
            if tensor.shape != wanted.shape or tensor.is_floating_point() != wanted.is_floating_point():
                raise HTTPException(
                    422,
                    f"{name} is {wanted.dtype} {list(wanted.shape)}, not {tensor.dtype} {list(tensor.shape)}",
                )
        self.version = self.loading = self.engine = None
        moved = {name: t.to(self.device) for name, t in tensors.items()}
        self.model.load_state_dict(moved, strict=False, assign=True)
        self.model.requires_grad_(False)
        self.missing -= tensors.keys()
        if not last:
            self.loading = version, part + 1
        elif self.missing:
            raise HTTPException(
                CONFLICT, f"{len(self.missing)} tensors have not come, {min(self.missing)} first"
            )
        else:
            self.model.to(self.device)  # the buffers that nobody sends
            self.version = version
        return b"{}"

    def sample(self, body: bytes) -> bytes:
        """Answers, by the weights that are asked for or not at all."""
        ask = parsed(Ask, body)
        self._check(ask.session)
        if ask.version != self.version:
            raise HTTPException(CONFLICT, f"the weights are {self.version}, not {ask.version}")
        if (tokens := ask.group_size * sum(p.limit for p in ask.prompts)) > LONGEST:
            raise HTTPException(422, f"answers of up to {tokens} tokens are asked for, more than {LONGEST}")
        if self.engine is None:
            self.engine = RolloutEngine(self.model, self.collate, DTYPES[self.config.precision])
        engine = self.engine
        engine.seconds = dict.fromkeys(engine.seconds, 0.0)
        try:
            shown = [None if (s := p.structure) is None else s.system() for p in ask.prompts]
            samples = [Sample(p.text, "", s) for p, s in zip(ask.prompts, shown)]
            patterns = None
            if ask.grammar:
                data, templates = self.config.data, self.collate.templates
                patterns = [
                    answer_pattern(p.identity, p.target, p.design, data, templates) for p in ask.prompts
                ]
            limits = [p.limit for p in ask.prompts]
            rollouts = engine.generate(
                samples, ask.sampling, ask.seed, ask.group_size, patterns=patterns, limits=limits
            )
        except ValueError as error:
            raise HTTPException(422, f"{error}") from None
        return answers_to_bytes(rollouts, ask.version, engine.seconds)

    def _check(self, session: str) -> None:
        if session != self.session:
            raise HTTPException(CONFLICT, f"the session is {self.session}, not {session}")


def parsed(kind: type[Known], body: bytes) -> Known:
    """The message of a body, or a refusal that names what is wrong with it."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        status = 400 if first["type"] == "json_invalid" else 422
        where = ".".join(map(str, first["loc"]))
        raise HTTPException(status, f"{where}: {first['msg']}".lstrip(": ")) from None


def make_app(service: Service) -> Starlette:
    """The application: what is asked is done by one thread, while others are told the state."""
    pool = ThreadPoolExecutor(1, "rollouts")
    waiting = 0

    async def done(request: Request, work: Callable[..., bytes], **options: Any) -> Response:
        nonlocal waiting
        if waiting >= WAITING:
            raise HTTPException(503, "too many requests are waiting")
        waiting += 1
        try:
            body = await read_body(request)
            loop = asyncio.get_running_loop()
            found = await loop.run_in_executor(pool, lambda: work(body, **options))
        finally:
            waiting -= 1
        return Response(found, media_type="application/octet-stream")

    async def state(request: Request) -> Response:
        return JSONResponse(service.state())

    async def model(request: Request) -> Response:
        return await done(request, service.describe)

    async def weights(request: Request) -> Response:
        q = request.query_params
        try:
            version, part, last = (int(q[k]) for k in ("version", "part", "last"))
            session = q["session"]
        except (KeyError, ValueError):
            raise HTTPException(422, "weights need ?session=…&version=N&part=N&last=0 or 1") from None
        return await done(
            request, service.weights, session=session, version=version, part=part, last=bool(last)
        )

    async def sample(request: Request) -> Response:
        return await done(request, service.sample)

    async def refused(request: Request, error: Any) -> Response:
        return Response(str(error.detail), error.status_code, media_type="text/plain")

    async def failed(request: Request, error: Exception) -> Response:
        return Response(f"{type(error).__name__}: {error}", 500, media_type="text/plain")

    routes = [
        Route("/", state, methods=["GET"]),
        Route("/model", model, methods=["POST"]),
        Route("/weights", weights, methods=["PUT"]),
        Route("/sample", sample, methods=["POST"]),
    ]
    return Starlette(routes=routes, exception_handlers={HTTPException: refused, Exception: failed})


async def read_body(request: Request) -> bytes:
    """The body of a request that says how long it is; a refusal where it is too long."""
    given = request.headers.get("content-length", "")
    if not given.isdigit():
        raise HTTPException(411, "a request must say its content-length")
    if int(given) > LARGEST:
        raise HTTPException(413, f"the body has {given} bytes, more than {LARGEST}")
    body, at = bytearray(int(given)), 0
    async for chunk in request.stream():
        body[at : at + len(chunk)] = chunk
        at += len(chunk)
    return bytes(body)


def make_server(host: str, port: int, threads: int | None = None) -> uvicorn.Server:
    """A server that is not yet running, of the first GPU or the CPU; `run()` serves until SIGTERM or SIGINT,
    and answers what is under way."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    app = make_app(Service(device, threads))
    return uvicorn.Server(
        uvicorn.Config(app, host, port, log_level="warning", lifespan="off", ws="none", timeout_keep_alive=60)
    )


def serve(host: str, port: int, threads: int | None = None) -> None:
    """Serve until SIGTERM or SIGINT."""
    make_server(host, port, threads).run()
