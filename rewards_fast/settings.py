"""Everything that changes a reward as one flat set of keys: what a YAML file, a query string or a
framework's options give.

The training configurations inherit these keys (`grpo.reward`, `ga_grpo.reward`), so a section of theirs is a
file for `rewards-fast serve` and the other way round. Help, unit and bounds of a key stand beside it.
"""

from __future__ import annotations

import difflib
import math
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

from rewards_fast.conversation import Answer
from rewards_fast.pvcp import PVCP, Thresholds, Weights
from rewards_fast.targets import Missing

WEIGHTS = tuple(f.name for f in fields(Weights))
THRESHOLDS = tuple(f.name for f in fields(Thresholds))
LARGEST_WEIGHT = 1e6  # a reward stays a finite number
LARGEST_THRESHOLD = 1e12


def key(default: Any, description: str, *, unit: str = "", **bounds: float) -> Any:
    """A dataclass field with its help, unit and bounds (`gt`, `ge`, `lt`, `le`) as metadata, named as
    pydantic names them."""
    return field(default=default, metadata={"description": description, "unit": unit, **bounds})


def _weight(default: float, description: str) -> Any:
    return key(default, description, ge=0.0, le=LARGEST_WEIGHT)


def _threshold(default: float, description: str, unit: str = "") -> Any:
    return key(default, description, unit=unit, ge=-LARGEST_THRESHOLD, le=LARGEST_THRESHOLD)


@dataclass
class RewardSettings:
    """Weights (Eq. 13), thresholds (Eqs. 25-44) and how texts are read; the defaults are those of `PVCP`."""

    comp: float = _weight(Weights.comp, "weight of the composition term")
    parse: float = _weight(Weights.parse, "weight of the term for a text that parses")
    valid: float = _weight(Weights.valid, "weight of the term for a complete file")
    phys: float = _weight(Weights.phys, "weight of the term for a physical structure")
    close: float = _threshold(Thresholds.close, "two atoms nearer than this overlap", "Å")
    near: float = _threshold(Thresholds.near, "two atoms nearer than this are penalised", "Å")
    volume_min: float = _threshold(Thresholds.volume_min, "least volume of the cell", "Å³")
    volume_max: float = _threshold(Thresholds.volume_max, "largest volume of the cell", "Å³")
    max_sites: int = _threshold(Thresholds.max_sites, "most atoms in the cell")
    coord_min: float = _threshold(Thresholds.coord_min, "least fractional coordinate, as written in the text")
    coord_max: float = _threshold(Thresholds.coord_max, "largest fractional coordinate, as written")
    density_min: float = _threshold(Thresholds.density_min, "least density", "g/cm³")
    density_max: float = _threshold(Thresholds.density_max, "largest density", "g/cm³")
    volume_per_atom_min: float = _threshold(Thresholds.volume_per_atom_min, "least volume per atom", "Å³")
    volume_per_atom_max: float = _threshold(Thresholds.volume_per_atom_max, "largest volume per atom", "Å³")
    own_images: bool = key(
        Thresholds.own_images, "a site's own images count for the least distance; Eq. 41 leaves them out"
    )
    extract: bool = key(True, "find the CIF inside the answer first")
    threads: int | None = key(None, "at most this many threads; null: all cores", ge=1)

    def check(self, source: str = "reward settings") -> None:
        """Raises ValueError where a value is out of range, naming the key."""
        for f in fields(self):
            value, low, high = getattr(self, f.name), f.metadata.get("ge"), f.metadata.get("le")
            if value is None or low is None or low <= value <= (math.inf if high is None else high):
                continue
            allowed = f"at least {low:g}"
            if high is not None:
                allowed = f"finite and at most {high:g}" if low == -high else f"from {low:g} to {high:g}"
            raise ValueError(f"{source}: `{f.name}` must be {allowed}, got {value!r}")

    def scorer(self) -> PVCP:
        """The reward with these settings; the same object for the same settings."""
        self.check()
        return _scorer(tuple(getattr(self, name) for name in _NAMES))


@dataclass
class LoopSettings(RewardSettings):
    """`RewardSettings`, and how the conversations of other people's RL code are read: what its bridges and
    the server take."""

    answer: Answer = key(  # noqa: RUF009
        "last", "the assistant message that is scored: the last, or the last with a `data_`"
    )
    missing_target: Missing = key(  # noqa: RUF009
        "warn", "an answer without a target composition: warn once, error, ignore"
    )


_NAMES = tuple(f.name for f in fields(RewardSettings))
_types = lru_cache(typing.get_type_hints)
_NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?\Z")


@lru_cache(maxsize=256)
def _scorer(values: tuple[Any, ...]) -> PVCP:
    given = dict(zip(_NAMES, values))
    return PVCP(
        weights=Weights(*(given[name] for name in WEIGHTS)),
        thresholds=Thresholds(*(given[name] for name in THRESHOLDS)),
        threads=given["threads"],
        extract=given["extract"],
    )


def _value(kinds: Mapping[str, Any], name: str, value: Any, source: str) -> Any:
    """A value of a key's type, from itself or from the text of a query or a command line."""
    kind = kinds[name]
    if typing.get_origin(kind) is Literal:
        if value in typing.get_args(kind):
            return value
        raise ValueError(
            f"{source}: `{name}` must be one of {', '.join(typing.get_args(kind))}, got {value!r}"
        )
    if kind is bool:
        known = {"true": True, "false": False}.get(value.lower()) if isinstance(value, str) else value
        if isinstance(known, bool):
            return known
        raise ValueError(f"{source}: `{name}` must be true or false, got {value!r}")
    if name == "threads" and (value is None or value == "null"):
        return None
    whole = kind is not float
    number = value
    if isinstance(value, str):  # also 1e-4 in a YAML file, which YAML reads as text
        try:
            number = None if not _NUMBER.match(value) else int(value) if whole else float(value)
        except ValueError:
            number = None
    if isinstance(number, bool) or not isinstance(number, int if whole else (int, float)):
        raise ValueError(f"{source}: `{name}` must be a {'whole ' * whole}number, got {value!r}")
    try:
        return number if whole else float(number)
    except OverflowError:
        raise ValueError(f"{source}: `{name}` must be finite") from None


Settings = TypeVar("Settings", bound=RewardSettings)


@overload
def read_settings(given: Mapping[str, Any], source: str = ..., base: None = ...) -> RewardSettings: ...
@overload
def read_settings(given: Mapping[str, Any], source: str, base: Settings) -> Settings: ...
def read_settings(
    given: Mapping[str, Any], source: str = "reward settings", base: RewardSettings | None = None
) -> RewardSettings:
    """`base` (the defaults) with the given keys of its class, each checked; texts are read as numbers.

    Raises ValueError for an unknown key (naming the nearest), a wrong type or a value out of range.
    """
    base = base or RewardSettings()
    kinds = _types(type(base))  # type: ignore[arg-type]
    values = {}
    for name, value in given.items():
        if name not in kinds:
            near = difflib.get_close_matches(str(name), kinds, n=1, cutoff=0.4)
            hint = f"did you mean `{near[0]}`?" if near else f"valid keys: {', '.join(kinds)}"
            raise ValueError(f"{source}: unknown key `{name}`; {hint}")
        values[name] = _value(kinds, name, value, source)
    settings = replace(base, **values)
    settings.check(source)
    return settings


def load_settings(path: str | Path | None, overrides: typing.Sequence[str] = ()) -> LoopSettings:
    """Settings of a YAML file with `key=value` overrides. Raises ValueError for what cannot be read."""
    settings = LoopSettings()
    if path is not None:
        try:
            import yaml
        except ImportError:
            raise ValueError("a YAML file needs PyYAML: pip install pyyaml") from None
        try:
            tree = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ValueError(f"{path}: cannot be read as YAML: {error}") from None
        if not isinstance(tree, dict):
            raise ValueError(f"{path}: the top level must be a mapping of keys, got {type(tree).__name__}")
        settings = read_settings(tree, str(path), settings)
    pairs = [item.partition("=") for item in overrides]
    for key, equals, _ in pairs:
        if not key or not equals:
            raise ValueError(f"override {key!r}: write key=value, for example near=0.7")
    return read_settings({key: text for key, _, text in pairs}, "command line", settings)
