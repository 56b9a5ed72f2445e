"""Bodies: read within their limits, decoded into checked types,
which also make their part of the OpenAPI schema."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta
from starlette.requests import Request

from rewards_fast.crystal import ELEMENTS
from rewards_fast.server.limits import Limits, Load, Refusal

LARGEST_COUNT = 1e6  # of an element in a target
TARGET_CHARS = 1000

_SYMBOL = "|".join(sorted((*ELEMENTS, "D", "T"), key=len, reverse=True))
_COUNT = r"([0-9]{1,5}(\.[0-9]{1,5})?)?"
_GROUP = f"(({_SYMBOL}){_COUNT})"
_FORMULA = rf"({_GROUP}|\({_GROUP}+\){_COUNT}|\[{_GROUP}+\]{_COUNT})+"
_INDICES = r" \(-?[0-9]{1,2} -?[0-9]{1,2} -?[0-9]{1,2}\)"
TARGET_PATTERN = f"^({_FORMULA}(</s>{_FORMULA}{_INDICES})?)?$"


def body_types(limits: Limits) -> tuple[Any, Any]:
    """What the two endpoints read, with the limits in them;
    from these types come the decoders and the OpenAPI schemas."""
    text = Annotated[str, Meta(max_length=limits.chars)]
    part = msgspec.defstruct("Part", [("type", str, "text"), ("text", text | None, None)])
    content: Any = text | Annotated[list[part], Meta(max_length=1000)] | None  # type: ignore[valid-type]
    message = msgspec.defstruct("Message", [("role", str, "assistant"), ("content", content, None)])
    answer: Any = (
        text
        | Annotated[
            list[message],  # type: ignore[valid-type]
            Meta(max_length=1000, description="A conversation; its last assistant message is scored."),
        ]
    )
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
    answers: Any = Annotated[list[answer], Meta(max_length=limits.texts)]
    texts = Annotated[list[text], Meta(max_length=limits.texts)]
    targets: Any = Annotated[list[target], Meta(max_length=limits.texts)] | formula | counts | None
    score = msgspec.defstruct(
        "ScoreRequest", [("texts", answers), ("targets", targets, None)], forbid_unknown_fields=True
    )
    prompts: Any = texts | None
    labels: Any = Annotated[list[target], Meta(max_length=limits.texts)] | None
    openrlhf = msgspec.defstruct(
        "OpenRLHFRequest", [("query", texts), ("prompts", prompts, None), ("labels", labels, None)]
    )
    return score, openrlhf


def decode(decoder: msgspec.json.Decoder[Any], body: bytes) -> Any:
    """The request of a body; Refusal 400 for what is not JSON, 422 for another JSON.

    msgspec refuses a whole body for half of a surrogate pair in one text (`\\ud800`), which JSON allows and
    Python's encoder writes; such a body is read by the standard library, so that it costs the text at most.
    """
    if not body:
        raise Refusal(400, "the body is empty; send JSON")
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise Refusal(422, str(error)) from None
    except UnicodeDecodeError as error:
        raise Refusal(400, f"the body is not UTF-8: {error.reason}") from None
    except msgspec.DecodeError as error:
        if b"\\ud" not in body and b"\\uD" not in body:
            raise Refusal(400, f"the body is not JSON: {error}") from None
    except RecursionError:
        raise Refusal(400, "the body is nested too deeply") from None
    try:
        return msgspec.convert(json.loads(body.decode(), parse_constant=_no_constant), decoder.type)
    except msgspec.ValidationError as error:
        raise Refusal(422, str(error)) from None
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"the body is not JSON: {error}") from None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def header(scope: Mapping[str, Any], name: bytes) -> bytes | None:
    """A header of a request by its lower-case name."""
    return next((value for key, value in scope["headers"] if key == name), None)


async def read_body(request: Request, limits: Limits, load: Load) -> bytes:
    """The body of a request, counted in `load.held` until whoever gets it takes it out.
    Refusal 400 to 415 or 503 leaves nothing counted."""
    length = int(header(request.scope, b"content-length") or 0)
    if length > limits.body:
        raise Refusal(413, f"the body has {length} bytes, more than {limits.body}")
    kind = header(request.scope, b"content-type") or b""
    if kind.partition(b";")[0].strip().lower() != b"application/json":
        raise Refusal(
            415, f"content-type must be application/json, not {kind.decode('latin-1')[:100] or 'absent'!r}"
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
