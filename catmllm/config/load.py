"""How a configuration is read: YAML files from left to right over the defaults, then `key.sub=value` overrides.

A fault is one line of a `ConfigError`: file and line (or the command line), the key, what is wrong with it and what
would be valid.
"""

from __future__ import annotations

import dataclasses
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
_VALIDATOR: Any = Config.__pydantic_validator__  # type: ignore[attr-defined]  # of every pydantic dataclass


class _Loader(yaml.SafeLoader):
    """YAML as everybody expects it: 1e-4 is a number (YAML 1.1 wants 1.0e-4), and a key that is given twice an error."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+\Z"), list("-+0123456789")
)


def load_config(
    files: str | Path | Sequence[str | Path] | None = None, overrides: Sequence[str] = ()
) -> Config:
    """The defaults, changed by each file in turn and then by each override.

    A file that is not there is looked for in the repository's `configs/` too. `{name}` in `out` and `init` becomes the
    key `name`. Raises `ConfigError` for a file that cannot be read, an unknown key (naming the nearest), a wrong type, a
    value out of bounds, and keys that do not fit each other.
    """
    tree: dict[str, Any] = {}
    where: Where = {}
    for file in [files] if isinstance(files, str | Path) else files or []:
        _merge(tree, _read(file, where))
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise ConfigError(f"override {item!r}: write key=value, for example grpo.lr=1e-4")
        path = tuple(key.split("."))
        try:
            # A lone dash (`joint.mmtg_sign=-`) would be a YAML list of one null.
            value = text if text == "-" else yaml.load(text, _Loader) if text else None
        except yaml.YAMLError as error:
            raise ConfigError(f"override {item!r}: the value is not YAML: {_one_line(error)}") from error
        where[path] = "command line"
        nested: Any = value
        for part in reversed(path):
            nested = {part: nested}
        _merge(tree, nested)
    config = _checked(tree, where, "command line")
    config.out = config.out.replace("{name}", config.name)
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
        # By way of JSON, where strictness lets a list be a tuple and a mapping a section. YAML's dates become texts.
        return _VALIDATOR.validate_json(json.dumps(tree, default=str))
    except ValidationError as error:
        raise explain(error, Config, where, source) from None


def _read(file: str | Path, where: Where) -> dict[str, Any]:
    """The tree of a YAML file; adds to `where` the file and line of every key."""
    path = Path(file)
    if not path.is_file() and (SHIPPED / file).is_file():
        path = SHIPPED / file
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        try:
            root = loader.get_single_node()
            if root is None:
                return {}
            if not isinstance(root, yaml.MappingNode):
                raise ConfigError(
                    f"{file}: the top level must be a mapping of keys, got {loader.construct_object(root, deep=True)!r}"
                )
            return _mapping(loader, root, str(file), (), where)
        finally:
            loader.dispose()
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{file}: cannot be read as YAML: {_one_line(error)}") from error


def _mapping(
    loader: _Loader, node: yaml.MappingNode, file: str, prefix: tuple[str, ...], where: Where
) -> dict[str, Any]:
    lines: dict[str, int] = {}
    for name, _ in node.value:
        line = name.start_mark.line + 1
        if isinstance(name, yaml.ScalarNode) and lines.setdefault(name.value, line) != line:
            raise ConfigError(
                f"{file}:{line}: `{'.'.join((*prefix, name.value))}` was given in line {lines[name.value]} already"
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


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
