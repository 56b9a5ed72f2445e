"""Pieces of the HTML pages that this package writes: nothing from outside, no script but our own,
untrusted text made harmless."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from catmllm.report.drawing import legend, structure_svg
from catmllm.report.figures import figure_svg
from catmllm.report.summary import Table
from catmllm.structure.system import System

_EXAMPLE_CHARACTERS = 4000  # of a model's text that are shown
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_STYLE = Path(__file__).with_name("page.css").read_text(encoding="utf-8")


def page(title: str, body: Iterable[str], data: str = "", scripts: Sequence[str] = ()) -> str:
    """A whole document of these pieces; empty ones are left out.

    data: what the scripts read, in base64, as `script#records`. The page allows itself these scripts alone,
    by their digests, and no request.
    """
    digests = "".join(f" 'sha256-{_digest(script)}'" for script in scripts)
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    policy += f"; script-src{digests}" if scripts else ""
    end = [f'<script type="text/plain" id="records">{data}</script>'] if scripts else []
    end += [f"<script>{script}</script>" for script in scripts]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta '
        'http-equiv="Content-Security-Policy" '
        f'content="{policy}">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n"
        f"<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(filter(None, [*body, *end]))
        + "\n</body>\n</html>\n"
    )


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def clean(value: Any) -> str:
    """Any text without control and direction characters and lone surrogates."""
    return _CONTROL.sub("\ufffd", str(value).replace("\r\n", "\n"))


def text(value: Any) -> str:
    """Any text made harmless: `clean` and escaped."""
    return html.escape(clean(value))


def section(title: str, *parts: str) -> str:
    return "\n".join(
        [f'<section id="{_anchor(title)}">\n<h2>{text(title)}</h2>', *filter(None, parts), "</section>"]
    )


def contents(titles: Iterable[str]) -> str:
    """Links to the sections of these titles."""
    links = "\n".join(f'<a href="#{_anchor(title)}">{text(title)}</a>' for title in titles)
    return f"<nav>{links}</nav>"


def _anchor(title: str) -> str:
    return "at-" + re.sub(r"\W+", "-", title.lower()).strip("-")


def table(content: Table | None) -> str:
    if content is None:
        return ""
    head = "".join(f'<th scope="col">{text(cell)}</th>' for cell in content.header)
    rows = "\n".join(
        "<tr>" + "".join(f"<td>{text(cell)}</td>" for cell in row) + "</tr>" for row in content.rows
    )
    return (
        f'<div class="wide"><table><caption>{text(content.title)}</caption>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{rows}\n</tbody></table></div>" + notes(content.notes)
    )


def notes(lines: Iterable[str]) -> str:
    items = "".join(f"<li>{text(line)}</li>" for line in lines)
    return f'\n<ul class="notes">{items}</ul>' if items else ""


def figure(name: str, caption: str, size: tuple[float, float], draw: Callable[[Figure], None]) -> str:
    svg = figure_svg(name, caption, size, draw)
    return f"<figure>{svg}<figcaption>{text(caption)}</figcaption></figure>"


def live(part: str, still: str = "") -> str:
    """A place that report.js fills with its part of the same name; without scripts it shows `still`."""
    return f'<div data-live="{part}">{still}</div>'


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
