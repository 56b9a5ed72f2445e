"""What a section of the configuration is: a dataclass whose keys carry help, unit and bounds,
and which checks itself.

A key is a dataclass field with metadata (`rewards_fast.settings.key`). Pydantic reads the bounds from there,
`--help` and docs/configuration.md the rest, so each is written once. A section is checked when it is made,
when a key is assigned and by `dataclasses.replace`; rules over several keys are
`@model_validator(mode="after")` methods of the section, and name its own keys as `.key` in backticks.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple, TypeVar, dataclass_transform

from pydantic import ConfigDict, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

T = TypeVar("T")
# Strict: a number is not made of a text, nor an int of true.
_CHECKED = ConfigDict(strict=True, extra="forbid", validate_assignment=True, allow_inf_nan=False)


class ConfigError(ValueError):
    """A configuration that cannot be used; a line for each fault says which key, why,
    and what would be valid."""


@dataclass_transform(field_specifiers=(dataclasses.field,))
def section(cls: type[T]) -> type[T]:
    """Class decorator. A subclass that gives a key another default keeps the key's help, unit and bounds."""
    inherited = {f.name: f for f in getattr(cls, "__dataclass_fields__", {}).values()}
    for name in inspect.get_annotations(cls):
        default = cls.__dict__.get(name)
        if name in inherited and not isinstance(default, dataclasses.Field):
            setattr(cls, name, dataclasses.field(default=default, metadata=inherited[name].metadata))
    made: Any = checked_dataclass(cls, config=_CHECKED)
    make, assign = made.__init__, made.__setattr__

    def __init__(self: Any, *args: Any, **values: Any) -> None:
        try:
            make(self, *args, **values)
        except ValidationError as error:
            raise explain(error, made) from None

    def __setattr__(self: Any, name: str, value: Any) -> None:
        before = self.__dict__.copy()
        try:
            assign(self, name, value)
        except ValidationError as error:
            self.__dict__.update(before)  # pydantic has assigned before it asks the rules
            raise explain(error, made) from None

    made.__init__, made.__setattr__ = __init__, __setattr__
    return made


class Key(NamedTuple):
    """A key of the schema: its dotted name, its type, and the field with default and metadata."""

    name: str
    type: Any
    field: dataclasses.Field[Any]

    @property
    def default(self) -> Any:
        return self.field.default


def keys(kind: type, prefix: str = "") -> Iterator[Key]:
    """Every key of a section and of those inside it, in the order of the schema."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from keys(hints[field.name], f"{prefix}{field.name}.")
        else:
            yield Key(prefix + field.name, hints[field.name], field)


def type_words(hint: Any) -> str:
    """A key's type in words: `int`, `list of 2 float`, `one of a, b`, `str or null`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_words(a) for a in args if a is not type(None)) + " or null"
    if origin is Literal:
        return f"one of {', '.join(args)}"
    if origin is tuple:
        inner = type_words(args[0])
        return f"list of {inner}" if args[-1] is Ellipsis else f"list of {len(args)} {inner}"
    return str(hint.__name__)


def bound_words(metadata: Mapping[str, Any]) -> str:
    """A key's bounds in words, empty where it has none."""
    gt, ge, lt, le = (metadata.get(k) for k in ("gt", "ge", "lt", "le"))
    if gt is None and ge is None:
        return ""
    low = f"{ge:g}" if gt is None else f"above {gt:g}"
    if lt is not None:
        return f"from {low} to below {lt:g}"
    if le is not None:
        return f"between {low} and {le:g}" if gt is None else f"{low}, at most {le:g}"
    return "positive" if gt == 0 else low if gt is not None else f"{low} or more"


def explain(
    error: ValidationError, kind: type, where: Mapping[tuple[str, ...], str] | None = None, source: str = ""
) -> ConfigError:
    """Pydantic's findings about a value of `kind` in our words, a line each.

    `where` says in which file and line (or on the command line) a key was given;
    `source` stands for the others.
    """
    lines = []
    for found in error.errors(include_url=False):
        path, message = _describe(found, kind)
        named = [path]
        if found["type"] == "value_error":  # a rule: at home where one of the keys that it names was given
            named = [tuple(name.split(".")) for name in re.findall(r"`([\w.]+)[^`]*`", message)]
        at = next((where[name] for name in named if where and name in where), source)
        lines.append(f"{at}: {message}" if at else message)
    return ConfigError("\n".join(lines))


def _describe(found: Any, kind: type) -> tuple[tuple[str, ...], str]:
    """The path of the key that is wrong, and what is wrong with it."""
    reason, got, rest = found["type"], found["input"], list(found["loc"])
    path: tuple[str, ...] = ()
    hint: Any = kind
    metadata: Mapping[str, Any] = {}
    while rest and dataclasses.is_dataclass(hint) and rest[0] in hint.__dataclass_fields__:
        metadata = hint.__dataclass_fields__[rest[0]].metadata
        hint = typing.get_type_hints(hint)[rest[0]]
        path = (*path, rest.pop(0))
    name = ".".join(path)
    if reason == "value_error":
        return path, str(found["ctx"]["error"]).replace("`.", f"`{name}." if name else "`")
    if reason in ("unexpected_keyword_argument", "no_such_attribute"):
        return (*path, str(rest[0])), _unknown(str(rest[0]), hint, name, kind)
    if dataclasses.is_dataclass(hint):
        return path, f"`{name}` is a section with keys of its own, got {got!r}"
    if reason == "finite_number":
        return path, f"`{name}` must be finite, got {got!r}"
    if reason.startswith(("greater_than", "less_than")):
        return path, f"`{name}` must be {bound_words(metadata)}, got {got!r}"
    if isinstance(got, list | tuple) and typing.get_origin(hint) is tuple:
        return path, f"`{name}` must have {len(typing.get_args(hint))} entries, got {len(got)}"
    if rest:  # inside a list
        name, hint = f"{name}[{rest[0]}]", typing.get_args(hint)[0]
    choices = [
        c
        for a in (hint, *typing.get_args(hint))
        if typing.get_origin(a) is Literal
        for c in typing.get_args(a)
    ]
    near = difflib.get_close_matches(str(got), choices, n=1, cutoff=0.3)
    words = type_words(hint)
    article = "a " if words.startswith("list") else ""
    return path, f"`{name}` must be {article}{words}, got {got!r}" + (
        f"; did you mean {near[0]}?" if near else ""
    )


def _unknown(key: str, section: type, prefix: str, root: type) -> str:
    """What to say of a key that a section does not have: the nearest one,
    or where there is one of this name."""
    dot = f"{prefix}." if prefix else ""
    own = [f.name for f in dataclasses.fields(section)]
    near = difflib.get_close_matches(key, own, n=1, cutoff=0.4)
    elsewhere = [k.name for k in keys(root) if k.name.rpartition(".")[2] == key]
    if elsewhere:
        hint = f"there is {', '.join(f'`{name}`' for name in elsewhere)}"
    elif near:
        hint = f"did you mean `{dot}{near[0]}`?"
    else:
        hint = f"valid keys: {', '.join(sorted(own))}"
    return f"unknown key `{dot}{key}`; {hint}"
