"""What the server says of itself: the OpenAPI schema of every endpoint;
bodies come from the types that decode them."""

from __future__ import annotations

import importlib.metadata
from dataclasses import Field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from rewards_fast.pvcp import FIELD_NAMES, REASONS, TERM_NAMES, TERMS
from rewards_fast.settings import LoopSettings

DIAGNOSTIC_NUMBERS = ("n_sites", "volume", "density", "min_distance")
SCORES = ("total", *TERMS)


DIAGNOSTICS = {"$ref": "#/components/schemas/Diagnostics"}
REFUSALS = {
    "400": "no JSON in UTF-8",
    "408": "the body came too slowly",
    "413": "the body is too large",
    "415": "another content-type than application/json",
    "422": "another JSON than described here, or a target or a setting that cannot be read",
    "500": "a fault of the server",
    "503": "no room; try again after Retry-After seconds",
}
UNAUTHORISED = {"401": "no valid bearer token"}


def openapi_schema(types: tuple[Any, Any], base: LoopSettings, token: bool) -> dict[str, Any]:
    """The description of every endpoint; bodies come from the types that decode them."""
    bodies, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    parameters = _parameters(base)
    metrics_page: dict[str, Any] = {
        "get": {
            "summary": "Prometheus metrics",
            "responses": {"200": {"description": "Text exposition format", "content": {"text/plain": {}}}},
        }
    }
    if token:
        metrics_page["get"]["responses"] |= _refused(UNAUTHORISED)
        metrics_page["get"]["security"] = [{"token": []}]
    security = {"securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}} if token else {}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "rewards-fast",
            "version": importlib.metadata.version("catmllm"),
            "description": "The PVCP reward of crystal-structure texts.",
        },
        "paths": {
            "/v1/score": _post("Rewards and their terms, one a text", parameters, bodies[0], "Scores", token),
            "/get_reward": _post(
                "OpenRLHF's remote reward model", parameters, bodies[1], "OpenRLHFReply", token
            ),
            "/healthz": _status("Whether the process lives", {"200": "ok"}),
            "/readyz": _status("Whether it takes requests", {"200": "ready", "503": "stopping"}),
            "/metrics": metrics_page,
        },
        "components": {"schemas": components | _replies(), **security},
    }


def _record(properties: dict[str, Any], optional: tuple[str, ...] = ()) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": [name for name in properties if name not in optional],
        "additionalProperties": False,
    }


def _replies() -> dict[str, Any]:
    """The schemas of what is answered, by name."""
    number, numbers = {"type": "number"}, {"type": "array", "items": {"type": "number"}}
    holes = {"type": "array", "items": {"type": ["number", "null"]}}
    flags = {"type": "array", "items": {"type": "boolean"}}
    reasons = {"type": "array", "items": {"enum": [None, *REASONS]}}
    logs = (*(t for t in TERMS if t != "parse"), "parses", "no_target")
    return {
        "Diagnostics": _record(
            {
                **dict.fromkeys(DIAGNOSTIC_NUMBERS, holes),
                "reason": reasons,
                "no_target": flags,
                "terms": _record(dict.fromkeys(TERM_NAMES, holes)),
                "fields": _record(dict.fromkeys(FIELD_NAMES, flags)),
            }
        ),
        "Scores": _record(
            {**dict.fromkeys(SCORES, numbers), "reason": reasons, "diagnostics": DIAGNOSTICS},
            ("diagnostics",),
        ),
        "OpenRLHFReply": _record(
            {
                "rewards": numbers,
                "scores": numbers,
                "extra_logs": _record(dict.fromkeys(logs, number)),
                "diagnostics": DIAGNOSTICS,
            },
            ("diagnostics",),
        ),
        "Error": _record({"error": {"type": "string"}, "request_id": {"type": "string"}}),
    }


def _parameters(base: LoopSettings) -> list[dict[str, Any]]:
    """The keys of a query; `base` has the defaults."""
    kinds = get_type_hints(LoopSettings)

    def value(f: Field[Any]) -> dict[str, Any]:
        kind, default, about = kinds[f.name], getattr(base, f.name), f.metadata
        unit = f", {about['unit']}" if about["unit"] else ""
        found = {"description": about["description"] + unit, "default": default}
        if kind is bool:
            return {"type": "boolean", **found}
        if get_origin(kind) is Literal:
            return {"type": "string", "enum": list(get_args(kind)), **found}
        bounds = {"minimum": about["ge"], "maximum": about["le"]}
        return {"type": "integer" if kind is int else "number", **bounds, **found}

    # threads belongs to the server
    values = {f.name: value(f) for f in fields(LoopSettings) if f.name != "threads"}
    values["diagnostics"] = {"type": "boolean", "default": False}
    return [
        {"name": name, "in": "query", "required": False, "schema": schema} for name, schema in values.items()
    ]


def _answer(description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {
        "description": description,
        "headers": {
            "X-Request-ID": {"description": "Also in the server's log", "schema": {"type": "string"}},
        },
        "content": {"application/json": {"schema": schema}},
    }


def _refused(reasons: dict[str, str]) -> dict[str, Any]:
    return {status: _answer(text, {"$ref": "#/components/schemas/Error"}) for status, text in reasons.items()}


def _post(
    summary: str, parameters: list[dict[str, Any]], body: dict[str, Any], reply: str, token: bool
) -> dict[str, Any]:
    return {
        "post": {
            "summary": summary,
            "parameters": parameters,
            "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
            "responses": {
                "200": _answer("One entry a text, in order", {"$ref": f"#/components/schemas/{reply}"}),
                **_refused(REFUSALS | (UNAUTHORISED if token else {})),
            },
            **({"security": [{"token": []}]} if token else {}),
        }
    }


def _status(summary: str, values: dict[str, str]) -> dict[str, Any]:
    return {
        "get": {
            "summary": summary,
            "responses": {
                code: _answer(word, _record({"status": {"const": word}})) for code, word in values.items()
            },
        }
    }
