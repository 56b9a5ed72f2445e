"""How a configuration is read: YAML files from left to right over the defaults,
then `key.sub=value` overrides.

A fault is one line of a `ConfigError`: file and line (or the command line), the key,
what is wrong with it and what would be valid.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from catmllm.config.schema import Config
from catmllm.config.section import ConfigError, explain

SHIPPED = Path(__file__).parents[2] / "configs"
Where = dict[tuple[str, ...], str]
# A ValueError is a date that is none, a RecursionError a mapping that is in itself.
_UNREADABLE = (OSError, yaml.YAMLError, ValueError, RecursionError)
_VALIDATOR: Any = Config.__pydantic_validator__  # type: ignore[attr-defined]  # of every pydantic dataclass


class _Loader(yaml.SafeLoader):
    """YAML as everybody expects it: 1e-4 is a number (YAML 1.1 wants 1.0e-4),
    and a key that is given twice an error."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+\Z"), list("-+0123456789")
)


def load_config(
    files: str | Path | Sequence[str | Path] | None = None, overrides: Sequence[str] = ()
) -> Config:
    """The defaults, changed by each file in turn and then by each override.

    A file that is not there is looked for in the repository's `configs/` too. `{name}` in `out`, `store` and
    `init` becomes the key `name`. Raises `ConfigError` for a file that cannot be read, an unknown key (naming
    the nearest), a wrong type, a value out of bounds, and keys that do not fit each other.
    """
    tree: dict[str, Any] = {}
    where: Where = {}
    for file in [files] if isinstance(files, str | Path) else files or []:
        _merge(tree, _read(file, where))
    for item in overrides:
        _merge(tree, _override(item, where))
    config = _checked(tree, where, "command line")
    config.out = config.out.replace("{name}", config.name)
    config.store = config.store and config.store.replace("{name}", config.name)
    config.init = config.init and config.init.replace("{name}", config.name)
    return config


def from_arguments(arguments: Sequence[str]) -> Config:
    """`load_config` of a command line's `FILE.yaml ... key=value ...`."""
    return load_config([a for a in arguments if "=" not in a], [a for a in arguments if "=" in a])


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration, or a section, as plain nested dicts and lists, as JSON and YAML can hold it."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(tree: dict[str, Any], source: str = "saved configuration") -> Config:
    """The inverse of `to_dict`, checked like a YAML file."""
    return _checked(tree, {}, source)


def _checked(tree: dict[str, Any], where: Where, source: str) -> Config:
    try:
        # By way of JSON, where strictness lets a list be a tuple and a mapping a section.
        return _VALIDATOR.validate_json(json.dumps(tree))
    except ValidationError as error:
        raise explain(error, Config, where, source) from None


def _override(item: str, where: Where) -> dict[str, Any]:
    """The tree of `key.sub=value`."""
    key, equals, text = item.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {item!r}: write key=value, for example grpo.lr=1e-4")
    path = tuple(key.split("."))
    where[path] = "command line"
    try:
        # A lone dash (`joint.mmtg_sign=-`) would be a YAML list of one null.
        value: Any = text if text == "-" else _plain(yaml.load(text, _Loader)) if text else None
    except _UNREADABLE as error:
        raise ConfigError(f"override {item!r}: the value is not YAML: {_one_line(error)}") from error
    for part in reversed(path):
        value = {part: value}
    return value


def _read(file: str | Path, where: Where) -> dict[str, Any]:
    """The tree of a YAML file; adds to `where` the file and line of every key."""
    path = next((p for p in (Path(file), SHIPPED / file) if p.is_file()), None)
    if path is None:
        shipped = [str(p.relative_to(SHIPPED)) for p in SHIPPED.rglob("*.yaml")]
        near = difflib.get_close_matches(str(file), shipped, n=1)
        raise ConfigError(f"{file}: no such file" + (f"; did you mean {near[0]}?" if near else ""))
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        root = loader.get_single_node()
        if root is None:
            return {}
        if not isinstance(root, yaml.MappingNode):
            raise ConfigError(
                f"{file}: the top level must be a mapping of keys, got a {root.tag.rpartition(':')[2]}"
            )
        return _plain(_mapping(loader, root, str(file), (), where))
    except ConfigError:
        raise
    except _UNREADABLE as error:
        raise ConfigError(f"{file}: cannot be read as YAML: {_one_line(error)}") from error


def _mapping(
    loader: _Loader, node: yaml.MappingNode, file: str, prefix: tuple[str, ...], where: Where
) -> dict[str, Any]:
    lines: dict[str, int] = {}
    for name, _ in node.value:
        line = name.start_mark.line + 1
        if isinstance(name, yaml.ScalarNode) and lines.setdefault(name.value, line) != line:
            raise ConfigError(
                f"{file}:{line}: `{'.'.join((*prefix, name.value))}` was given in "
                f"line {lines[name.value]} already"
            )
    loader.flatten_mapping(node)
    tree = {}
    for name, value in node.value:
        key = str(loader.construct_object(name, deep=True))
        path = (*prefix, key)
        where[path] = f"{file}:{name.start_mark.line + 1}"
        tree[key] = (
            _mapping(loader, value, file, path, where)
            if isinstance(value, yaml.MappingNode)
            else loader.construct_object(value, deep=True)
        )
    return tree


def _merge(tree: dict[str, Any], changes: dict[str, Any]) -> None:
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            _merge(tree[key], value)
        else:
            tree[key] = value


def _plain(value: Any) -> Any:
    """What JSON makes of it: dates become texts. Raises ValueError for a list that is in itself."""
    return json.loads(json.dumps(value, default=str))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
