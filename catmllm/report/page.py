"""Pieces of the HTML pages that this package writes: no scripts, no outside resource,
untrusted text made harmless."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterable
from typing import Any

from matplotlib.figure import Figure

from catmllm.report.drawing import legend, structure_svg
from catmllm.report.figures import figure_svg
from catmllm.report.summary import Table
from catmllm.structure.system import System

_EXAMPLE_CHARACTERS = 4000  # of a model's text that are shown
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_CSS = """
body { font: 15px/1.5 Verdana, "DejaVu Sans", sans-serif; color: #1a1a1a; background: #fff; max-width: 66rem;
  margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.5rem; margin: 0; }
h2 { font-size: 1.15rem; border-bottom: 1px solid #ccc; margin: 2.4rem 0 .8rem; }
.conditions, figcaption, .notes { color: #555; font-size: .82rem; }
.notes { margin: .3rem 0 1rem; padding-left: 1.1rem; }
.missing { border-left: 4px solid #e69f00; background: #fff8e8; padding: .5rem .9rem; }
.claims { list-style: none; padding: 0; }
.claims li { margin: .5rem 0; padding-left: 6rem; position: relative; }
.verdict { position: absolute; left: 0; top: .1rem; width: 5rem; text-align: center; border-radius: 3px;
  color: #fff; font-size: .8rem; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.yes { background: #00734f; } .no { background: #b03a2e; } .unclear { background: #6b6b6b; }
.evidence { display: block; color: #555; font-size: .85rem; }
table { border-collapse: collapse; font-size: .85rem; margin: .6rem 0 .2rem;
  font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: bold; white-space: nowrap; padding-bottom: .3rem; }
th, td { padding: .2rem .8rem .2rem 0; text-align: right; border-bottom: 1px solid #e4e4e4; }
th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 1px solid #888; vertical-align: bottom; }
figure { margin: 1rem 0; } figure svg { max-width: 100%; height: auto; display: block; }
.pair { display: flex; flex-wrap: wrap; gap: 1.5rem; align-items: flex-start; }
.pair figure { flex: 1 1 26rem; }
.designs { display: flex; flex-wrap: wrap; gap: 1rem; }
.design { border: 1px solid #ddd; padding: .6rem; width: 19.5rem;
  break-inside: avoid; font-size: .82rem; box-sizing: border-box; }
.design .views { display: flex; gap: .4rem; align-items: flex-end; margin-bottom: .4rem; }
.atoms { background: #fafafa; flex: none; }
.dot { display: inline-block; width: .7em; height: .7em; border: 1px solid #555;
  border-radius: 50%; margin: 0 .2em 0 .5em; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
pre { font: 12px/1.35 monospace; background: #f6f6f6; padding: .7rem; overflow-x: auto; white-space: pre-wrap;
  unicode-bidi: isolate; } summary { cursor: pointer; margin: .3rem 0; }
@media print { h2 { break-after: avoid; } body { margin: 0; max-width: none; font-size: 11px; }
  figure, table, .claims li { break-inside: avoid; } }
"""


def page(title: str, body: Iterable[str]) -> str:
    """A whole document of these pieces; empty ones are left out."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta '
        'http-equiv="Content-Security-Policy" '
        f'content="{_POLICY}">\n<meta name="viewport" content="width=device-width">\n'
        f"<title>{text(title)}</title>\n"
        f"<style>{_CSS}</style>\n</head>\n<body>\n" + "\n".join(filter(None, body)) + "\n</body>\n</html>\n"
    )


def text(value: Any) -> str:
    """Any text made harmless: escaped, control and direction characters and lone surrogates replaced."""
    return html.escape(_CONTROL.sub("\ufffd", str(value).replace("\r\n", "\n")))


def section(title: str, *parts: str) -> str:
    return "\n".join([f"<section>\n<h2>{text(title)}</h2>", *filter(None, parts), "</section>"])


def table(content: Table | None) -> str:
    if content is None:
        return ""
    head = "".join(f'<th scope="col">{text(cell)}</th>' for cell in content.header)
    rows = "\n".join(
        "<tr>" + "".join(f"<td>{text(cell)}</td>" for cell in row) + "</tr>" for row in content.rows
    )
    return (
        f"<table><caption>{text(content.title)}</caption>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n"
        "</tbody></table>" + notes(content.notes)
    )


def notes(lines: Iterable[str]) -> str:
    items = "".join(f"<li>{text(line)}</li>" for line in lines)
    return f'\n<ul class="notes">{items}</ul>' if items else ""


def figure(name: str, caption: str, size: tuple[float, float], draw: Callable[[Figure], None]) -> str:
    svg = figure_svg(name, caption, size, draw)
    return f"<figure>{svg}<figcaption>{text(caption)}</figcaption></figure>"


def details(summary: str, body: str) -> str:
    return f"<details><summary>{text(summary)}</summary>\n{body}\n</details>"


def pre(content: Any) -> str:
    shown = str(content)[:_EXAMPLE_CHARACTERS]
    cut = len(str(content)) - len(shown)
    return f"<pre>{text(shown)}</pre>" + (f'<p class="notes">{cut} more characters</p>' if cut else "")


def views(read: Callable[[], System]) -> str:
    """A structure from the top and from the side with its legend; why there is none,
    where `read` or the drawing raises ValueError."""
    try:
        system = read()
        pictures = structure_svg(system, "top", 150) + structure_svg(system, "side", 118)
        return f'<div class="views">{pictures}</div>{legend(system)}'
    except ValueError as error:
        return f"<p>cannot be drawn: {text(error)}</p>"
