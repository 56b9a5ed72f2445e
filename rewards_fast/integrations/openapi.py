"""What the server says of itself: the OpenAPI schema of every endpoint, and a page made of it that needs no internet."""

from __future__ import annotations

import importlib.metadata
import json
from dataclasses import fields
from html import escape
from typing import Any

import msgspec

from rewards_fast.pvcp import FIELD_NAMES, REASONS, SCORE_NAMES, TERM_NAMES
from rewards_fast.settings import LARGEST_THRESHOLD, LARGEST_WEIGHT, WEIGHTS, RewardSettings

QUERY_KEYS = tuple(f.name for f in fields(RewardSettings) if f.name != "threads")
DIAGNOSTIC_NUMBERS = ("n_sites", "volume", "density", "min_distance")
TERMS = SCORE_NAMES[:5]


def openapi_schema(types: tuple[Any, Any], base: RewardSettings, token: bool) -> dict[str, Any]:
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
            "terms": record(dict.fromkeys(TERM_NAMES, holes)),
            "fields": record(dict.fromkeys(FIELD_NAMES, flags)),
        }
    )
    components |= {
        "Diagnostics": details,
        "Scores": record(
            {
                **dict.fromkeys(TERMS, numbers),
                "reason": reasons,
                "diagnostics": {"$ref": "#/components/schemas/Diagnostics"},
            },
            ("diagnostics",),
        ),
        "OpenRLHFReply": record(
            {
                "rewards": numbers,
                "scores": numbers,
                "extra_logs": record(dict.fromkeys(("comp", "valid", "phys", "parses"), number)),
                "diagnostics": {"$ref": "#/components/schemas/Diagnostics"},
            },
            ("diagnostics",),
        ),
        "Error": record({"error": {"type": "string"}, "request_id": {"type": "string"}}),
    }

    def value(name: str) -> dict[str, Any]:
        kind = {f.name: str(f.type) for f in fields(RewardSettings)}[name]
        if kind == "bool":
            return {"type": "boolean", "default": base.extract}
        low, high = (
            (0.0, LARGEST_WEIGHT) if name in WEIGHTS else (-float(LARGEST_THRESHOLD), LARGEST_THRESHOLD)
        )
        return {
            "type": "integer" if kind == "int" else "number",
            "minimum": low,
            "maximum": high,
            "default": getattr(base, name),
        }

    parameters: list[dict[str, Any]] = [
        {"name": name, "in": "query", "required": False, "schema": value(name)} for name in QUERY_KEYS
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


STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse}td,th{border:1px solid #bbb;padding:.1rem .6rem;text-align:left}
pre,textarea{background:#f4f4f4;border:1px solid #ddd;padding:.6rem;overflow:auto}
textarea{width:100%;height:6rem;box-sizing:border-box}h2{border-top:1px solid #bbb;padding-top:1rem}"""
# The one script of the page: sends what stands in the text field, shows what comes back.
SCRIPT = """for (const form of document.forms) form.onsubmit = async event => {
  event.preventDefault();
  const out = form.querySelector("pre"), headers = {};
  const request = {method: form.dataset.method, headers};
  if (form.body) { request.body = form.body.value; headers["content-type"] = "application/json"; }
  if (form.token?.value) headers.authorization = "Bearer " + form.token.value;
  try {
    const answer = await fetch(form.dataset.path + (form.query?.value ? "?" + form.query.value : ""), request);
    out.textContent = answer.status + "\\n" + await answer.text();
  } catch (error) { out.textContent = error; }
};"""
EXAMPLES = {"/v1/score": {"texts": ["no idea"], "targets": "Pt3CuCO"}, "/get_reward": {"query": ["no idea"]}}


def docs_page(schema: dict[str, Any]) -> str:
    """HTML of a schema made by `openapi_schema`: each endpoint with its query keys, body and answers, and a form to try it."""

    def row(cells: list[Any], tag: str = "td") -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    def block(value: Any) -> str:
        return f"<pre>{escape(json.dumps(value, indent=1))}</pre>"

    parts = []
    for path, methods in schema["paths"].items():
        for method, about in methods.items():
            parts.append(f"<h2>{method.upper()} {path}</h2><p>{escape(about['summary'])}</p>")
            inputs = []
            if "parameters" in about:
                keys = [(key["name"], key["schema"]) for key in about["parameters"]]
                rows = [
                    [name, kind["type"], kind.get("minimum", ""), kind.get("maximum", ""), kind["default"]]
                    for name, kind in keys
                ]
                heads = row(["key of the query", "type", "least", "most", "default"], "th")
                parts.append(f"<details><summary>Query</summary><table>{heads}{''.join(map(row, rows))}</table></details>")  # fmt: skip
                inputs.append("<p>query <input name=query size=40 placeholder='near=0.7&amp;diagnostics=true'></p>")  # fmt: skip
            if "requestBody" in about:
                body = about["requestBody"]["content"]["application/json"]["schema"]
                parts.append(f"<details><summary>Body</summary>{block(body)}</details>")
                inputs.append(f"<textarea name=body>{escape(json.dumps(EXAMPLES[path]))}</textarea>")
            if "security" in about:
                inputs.append("<p>token <input name=token type=password></p>")
            answers = [[status, answer["description"]] for status, answer in about["responses"].items()]
            parts.append(f"<table>{row(['status', 'answer'], 'th')}{''.join(map(row, answers))}</table>")
            parts.append(f"<form data-method={method.upper()} data-path={path}>{''.join(inputs)}<p><button>Send</button></p><pre></pre></form>")  # fmt: skip
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>rewards-fast</title><style>{STYLE}</style>"
        f"<h1>{escape(schema['info']['title'])} {escape(schema['info']['version'])}</h1>"
        f"<p>{escape(schema['info']['description'])} For programs: <a href=/openapi.json>openapi.json</a>.</p>"
        f"{''.join(parts)}<h2>Types</h2>{block(schema['components']['schemas'])}<script>{SCRIPT}</script></html>"
    )
