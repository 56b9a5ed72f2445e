"""The schema as text: `--help` in a terminal, and docs/configuration.md."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
import textwrap
import typing
from collections.abc import Iterator
from typing import Any

from catmllm.config.schema import Config
from catmllm.config.section import ConfigError, Key, bound_words, keys, type_words

WIDTH = 100


def overview() -> str:
    """The sections and the keys of the run itself."""
    lines = ["Sections:"]
    for name, section in _sections():
        if name:
            first = f"  {name:20s} {_doc(section).split('. ')[0].rstrip('.')}"
            lines.append(textwrap.fill(first, WIDTH, subsequent_indent=" " * 23, drop_whitespace=True))
    return "\n".join([*lines, "", "Keys of the run itself:", *(_entry(k) for k in _own("", Config))])


def describe(name: str) -> str:
    """The keys of a section and of those inside it, one key, or `all`: default, type, bounds, unit, help.

    Raises ConfigError for an unknown name, with the nearest.
    """
    sections, every = dict(_sections()), list(keys(Config))
    if name == "all":
        found = list(sections)
    elif name in sections:
        found = [s for s in sections if s == name or s.startswith(f"{name}.")]
    else:
        for key in every:
            if key.name == name:
                return _entry(key)
        near = difflib.get_close_matches(name, [*sections, *(k.name for k in every)], n=1, cutoff=0.4)
        hint = f"did you mean `{near[0]}`?" if near else f"sections: {', '.join(s for s in sections if s)}"
        raise ConfigError(f"no section or key `{name}`; {hint}")
    blocks = []
    for section in found:
        title = f"{section}: {_doc(sections[section])}" if section else _doc(sections[section])
        blocks.append(
            "\n".join([textwrap.fill(title, WIDTH), *(_entry(k) for k in _own(section, sections[section]))])
        )
    return "\n\n".join(blocks)


def markdown() -> str:
    """docs/configuration.md."""
    parts = [_INTRODUCTION]
    for name, section in _sections():
        parts.append(f"## {f'`{name}`' if name else 'The run itself'}\n\n{_doc(section)}\n")
        own = list(_own(name, section))
        if own:
            rows = ["| key | type | default | bounds | unit | what it is |", "|---|---|---|---|---|---|"]
            for k in own:
                cells = (
                    f"`{k.name}`",
                    type_words(k.type),
                    f"`{_plain(k.default)}`",
                    _bounds(k),
                    _unit(k),
                    _help(k),
                )
                rows.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
            parts.append("\n".join(rows) + "\n")
    return "\n".join(parts)


_INTRODUCTION = """# Configuration

Every key of a run, for looking up. This page is made from `catmllm/config/schema.py` by
`python -m catmllm.config > docs/configuration.md`; `python catmllm/train.py --help SECTION` prints the same
in a terminal.

```
torchrun --nproc-per-node 8 catmllm/train.py a100x8/7b.yaml a100x8/joint.yaml joint.lr=5e-6 name=mine
```

- Files are YAML, read from left to right over the defaults below: a later file changes single keys of an
  earlier one, a list is replaced whole. A file that is not there is looked for in the repository's `configs/`
  too.
- `key=value` comes after the files, wherever it stands; the value is YAML (`grpo.lr=1e-6`,
  `stages=[align, joint]`, `init=null`).
- Everything is checked before anything runs: an unknown key names the nearest one, a wrong value its file and
  line.
- A run keeps its configuration in `metrics.json`, and every model folder in `catmllm.json`.
"""


def _sections(name: str = "", section: type = Config) -> Iterator[tuple[str, type]]:
    """Every section by its dotted name, the run itself first, under the empty name."""
    yield name, section
    hints = typing.get_type_hints(section)
    for field in dataclasses.fields(section):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from _sections(f"{name}.{field.name}".lstrip("."), hints[field.name])


def _own(name: str, section: type) -> Iterator[Key]:
    """The keys of a section without those of the sections inside it."""
    prefix = f"{name}." if name else ""
    return (k for k in keys(section, prefix) if "." not in k.name.removeprefix(prefix))


def _doc(section: type) -> str:
    return " ".join((inspect.getdoc(section) or "").split())


def _entry(key: Key) -> str:
    about = "; ".join(w for w in (type_words(key.type), _bounds(key), _unit(key)) if w)
    left = f"  {key.name} = {_plain(key.default)}"
    head = f"{left:44s}  {about}"
    if len(head) > WIDTH:
        head = f"{left}\n" + textwrap.fill(about, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return head + "\n" + textwrap.fill(_help(key), WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)


def _help(key: Key) -> str:
    return str(key.field.metadata["description"])


def _unit(key: Key) -> str:
    return str(key.field.metadata["unit"])


def _bounds(key: Key) -> str:
    return bound_words(key.field.metadata)


def _plain(value: Any) -> str:
    """A default as YAML has it."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(_plain, value))}]"
    return value if isinstance(value, str) else json.dumps(value)
