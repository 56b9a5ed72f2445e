"""The page at /docs: made of the OpenAPI schema, with a form for each endpoint; it needs no internet."""

from __future__ import annotations

import json
from html import escape
from typing import Any

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
    const answer = await fetch(
      form.dataset.path + (form.query?.value ? "?" + form.query.value : ""), request);
    out.textContent = answer.status + "\\n" + await answer.text();
  } catch (error) { out.textContent = error; }
};"""
EXAMPLES = {"/v1/score": {"texts": ["no idea"], "targets": "Pt3CuCO"}, "/get_reward": {"query": ["no idea"]}}


def docs_page(schema: dict[str, Any]) -> str:
    """HTML of a schema made by `openapi_schema`: each endpoint with its query keys, body and answers,
    and a form to try it."""

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
                parts.append(
                    f"<details><summary>Query</summary><table>{heads}{''.join(map(row, rows))}"
                    "</table></details>"
                )
                inputs.append(
                    "<p>query <input name=query size=40 placeholder='near=0.7&amp;diagnostics=true'></p>"
                )
            if "requestBody" in about:
                body = about["requestBody"]["content"]["application/json"]["schema"]
                parts.append(f"<details><summary>Body</summary>{block(body)}</details>")
                inputs.append(f"<textarea name=body>{escape(json.dumps(EXAMPLES[path]))}</textarea>")
            if "security" in about:
                inputs.append("<p>token <input name=token type=password></p>")
            answers = [[status, answer["description"]] for status, answer in about["responses"].items()]
            parts.append(f"<table>{row(['status', 'answer'], 'th')}{''.join(map(row, answers))}</table>")
            parts.append(
                f"<form data-method={method.upper()} data-path={path}>{''.join(inputs)}"
                "<p><button>Send</button></p><pre></pre></form>"
            )
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>rewards-fast</title><style>{STYLE}</style>"
        f"<h1>{escape(schema['info']['title'])} {escape(schema['info']['version'])}</h1>"
        f"<p>{escape(schema['info']['description'])} For programs: "
        "<a href=/openapi.json>openapi.json</a>.</p>"
        f"{''.join(parts)}<h2>Types</h2>{block(schema['components']['schemas'])}"
        f"<script>{SCRIPT}</script></html>"
    )
