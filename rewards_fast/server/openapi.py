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


def openapi_schema(types: tuple[Any, Any], base: LoopSettings, token: bool) -> dict[str, Any]:
    """The description of every endpoint; bodies come from the types that decode them."""
    bodies, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    number, numbers = {"type": "number"}, {"type": "array", "items": {"type": "number"}}
    holes = {"type": "array", "items": {"type": ["number", "null"]}}
    flags = {"type": "array", "items": {"type": "boolean"}}
    reasons = {"type": "array", "items": {"enum": [None, *REASONS]}}

    def record(properties: dict[str, Any], optional: tuple[str, ...] = ()) -> dict[str, Any]:
        required = [name for name in properties if name not in optional]
        return {
            "type": "object",
            "properties": properties,
            "required": required,
            "additionalProperties": False,
        }

    details = record(
        {
            **dict.fromkeys(DIAGNOSTIC_NUMBERS, holes),
            "reason": reasons,
            "no_target": flags,
            "terms": record(dict.fromkeys(TERM_NAMES, holes)),
            "fields": record(dict.fromkeys(FIELD_NAMES, flags)),
        }
    )
    components |= {
        "Diagnostics": details,
        "Scores": record(
            {
                **dict.fromkeys(SCORES, numbers),
                "reason": reasons,
                "diagnostics": {"$ref": "#/components/schemas/Diagnostics"},
            },
            ("diagnostics",),
        ),
        "OpenRLHFReply": record(
            {
                "rewards": numbers,
                "scores": numbers,
                "extra_logs": record(
                    dict.fromkeys((*(t for t in TERMS if t != "parse"), "parses", "no_target"), number)
                ),
                "diagnostics": {"$ref": "#/components/schemas/Diagnostics"},
            },
            ("diagnostics",),
        ),
        "Error": record({"error": {"type": "string"}, "request_id": {"type": "string"}}),
    }

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

    parameters: list[dict[str, Any]] = [
        {"name": f.name, "in": "query", "required": False, "schema": value(f)}
        for f in fields(LoopSettings)
        if f.name != "threads"  # that one belongs to the server
    ]
    parameters.append(
        {
            "name": "diagnostics",
            "in": "query",
            "required": False,
            "schema": {"type": "boolean", "default": False},
        }
    )
    request_id = {
        "X-Request-ID": {"description": "Also in the server's log", "schema": {"type": "string"}},
    }

    def answer(description: str, schema: dict[str, Any]) -> dict[str, Any]:
        return {
            "description": description,
            "headers": request_id,
            "content": {"application/json": {"schema": schema}},
        }

    error = {"$ref": "#/components/schemas/Error"}
    refusals = {
        "400": "no JSON in UTF-8",
        "408": "the body came too slowly",
        "413": "the body is too large",
        "415": "another content-type than application/json",
        "422": "another JSON than described here, or a target or a setting that cannot be read",
        "500": "a fault of the server",
        "503": "no room; try again after Retry-After seconds",
    }
    if token:
        refusals["401"] = "no valid bearer token"

    def post(summary: str, body: dict[str, Any], reply: str) -> dict[str, Any]:
        return {
            "post": {
                "summary": summary,
                "parameters": parameters,
                "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
                "responses": {
                    "200": answer(
                        "One entry a text, in order", {"$ref": f"#/components/schemas/{reply}"}
                    ),
                    **{status: answer(text, error) for status, text in refusals.items()},
                },
                **({"security": [{"token": []}]} if token else {}),
            }
        }  # fmt: skip

    def status(summary: str, values: dict[str, str]) -> dict[str, Any]:
        return {
            "get": {
                "summary": summary,
                "responses": {
                    code: answer(word, record({"status": {"const": word}})) for code, word in values.items()
                },
            }
        }

    metrics_page: dict[str, Any] = {
        "get": {
            "summary": "Prometheus metrics",
            "responses": {"200": {"description": "Text exposition format", "content": {"text/plain": {}}}},
        }
    }
    if token:
        metrics_page["get"]["responses"]["401"] = answer(refusals["401"], error)
        metrics_page["get"]["security"] = [{"token": []}]
        components_security = {"securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}}
    else:
        components_security = {}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "rewards-fast",
            "version": importlib.metadata.version("catmllm"),
            "description": "The PVCP reward of crystal-structure texts.",
        },
        "paths": {
            "/v1/score": post("Rewards and their terms, one a text", bodies[0], "Scores"),
            "/get_reward": post("OpenRLHF's remote reward model", bodies[1], "OpenRLHFReply"),
            "/healthz": status("Whether the process lives", {"200": "ok"}),
            "/readyz": status("Whether it takes requests", {"200": "ready", "503": "stopping"}),
            "/metrics": metrics_page,
        },
        "components": {"schemas": components, **components_security},
    }
