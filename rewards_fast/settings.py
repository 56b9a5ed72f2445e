"""Everything that changes a reward as one flat set of keys: what a YAML file, a query string or a framework's options give.

The training configurations inherit these keys (`grpo.reward`, `ga_grpo.reward`), so a section of theirs is a file for
`rewards-fast serve` and the other way round.
"""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
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


@dataclass
class RewardSettings:
    """Weights (Eq. 13), thresholds (Eqs. 25-44) and how texts are read; the defaults are those of `PVCP`."""

    comp: float = Weights.comp
    parse: float = Weights.parse
    valid: float = Weights.valid
    phys: float = Weights.phys
    close: float = Thresholds.close  # Å; nearer than this is an overlap
    near: float = Thresholds.near  # Å; nearer than this is penalised
    volume_min: float = Thresholds.volume_min  # Å³
    volume_max: float = Thresholds.volume_max
    max_sites: int = Thresholds.max_sites
    coord_min: float = Thresholds.coord_min  # fractional, as written in the text
    coord_max: float = Thresholds.coord_max
    density_min: float = Thresholds.density_min  # g/cm³
    density_max: float = Thresholds.density_max
    volume_per_atom_min: float = Thresholds.volume_per_atom_min  # Å³
    volume_per_atom_max: float = Thresholds.volume_per_atom_max
    extract: bool = True  # find the CIF inside the answer first
    threads: int | None = None  # at most this many; None: all cores

    def check(self, source: str = "reward settings") -> None:
        """Raises ValueError where a value is out of range, naming the key."""
        for name in WEIGHTS:
            if not 0 <= getattr(self, name) <= LARGEST_WEIGHT:
                raise ValueError(
                    f"{source}: `{name}` must be from 0 to {LARGEST_WEIGHT:g}, got {getattr(self, name)!r}"
                )
        for name in THRESHOLDS:
            if not abs(getattr(self, name)) <= LARGEST_THRESHOLD:
                raise ValueError(
                    f"{source}: `{name}` must be finite and at most {LARGEST_THRESHOLD:g}, got {getattr(self, name)!r}"
                )
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"{source}: `threads` must be at least 1, got {self.threads}")

    def scorer(self) -> PVCP:
        """The reward with these settings; the same object for the same settings."""
        self.check()
        return _scorer(tuple(getattr(self, name) for name in _NAMES))


@dataclass
class LoopSettings(RewardSettings):
    """`RewardSettings`, and how the conversations of other people's RL code are read: what its bridges and the server take."""

    answer: Answer = "last"  # the assistant message that is scored: the last, or the last with a `data_`
    missing_target: Missing = "warn"  # an answer without a target composition: warn once, error, ignore


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
