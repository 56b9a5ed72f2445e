"""Wanted compositions: formulas, prompts and counts as they stand in data sets,
and what to do where there is none."""

from __future__ import annotations

import functools
import json
import logging
import math
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from rewards_fast.conversation import Conversation, last_user_message
from rewards_fast.crystal import ATOMIC_NUMBER, ELEMENTS

LOG = logging.getLogger("rewards_fast")
COUNT_TOLERANCE = 1e-3  # two counts of an element within this are equal
Target = str | Mapping[str, float | None] | None
Missing = Literal["warn", "error", "ignore"]

# pymatgen's reading of a formula: space may stand behind a symbol and between groups, nowhere else.
_NUMBER = r"((?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[0-9]+)?)?"
_PIECE = re.compile(rf"\s*(?:([A-Z][a-z]?)\s*{_NUMBER}|(\()|(\))\s*{_NUMBER})")
_BRACKETS = str.maketrans("[]{}", "()()", "@")
# `PT3CU` is P, tritium, C, U for pymatgen and platinum for whoever wrote it;
# D and T beside these letters are refused.
_CAPITALS = re.compile("|".join(f"{s[0]}{s[1].upper()}" for s in ELEMENTS if s[1:] in ("d", "t")))
# A word is tried from its first letter only, an index has few digits, and space has one way to be read:
# no prompt takes more than linear time.
_WORD = r"(?<![^\s<>])([^\s<>]+)\s*</s>\s*([A-Za-z0-9.()\[\]]+"
_NEXT = r"\s*(?:,\s*)?-?\d{1,3}"
_PROMPT = re.compile(_WORD + rf"?)\s*\(\s*-?\d{{1,3}}{_NEXT}{_NEXT}\s*\)")
_PROMPT_BARE = re.compile(_WORD + r")")


def _parse_formula(formula: str) -> dict[str, float]:
    if not any(c.islower() for c in formula) and (pair := _CAPITALS.search(formula)):
        written = pair.group().capitalize()
        raise ValueError(
            f"the formula {formula!r} is in capitals: write {written!r} for {written}, or counts"
        )
    text = formula.translate(_BRACKETS).rstrip()
    stack: list[dict[str, float]] = [{}]
    position = 0
    while position < len(text):
        piece = _PIECE.match(text, position)
        if piece is None:
            raise ValueError(
                f"cannot read the formula {formula!r} at {text[position:]!r}; write it like 'Pt9Cu3CO'"
            )
        position = piece.end()
        symbol, count, opening, closing, times = piece.groups()
        if symbol:
            _add(stack[-1], symbol, float(count or 1), formula)
        elif opening:
            stack.append({})
        elif closing:
            if len(stack) == 1:
                raise ValueError(f"unbalanced bracket in the formula {formula!r}")
            group = stack.pop()
            if not group:
                raise ValueError(f"empty brackets in the formula {formula!r}")
            for inner, amount in group.items():
                _add(stack[-1], inner, amount * float(times or 1), formula)
    if len(stack) != 1:
        raise ValueError(f"unbalanced bracket in the formula {formula!r}")
    return stack[0]


def _add(counts: dict[str, float], symbol: str, amount: float, source: object) -> None:
    number = ATOMIC_NUMBER.get(symbol)
    if number is None:
        raise ValueError(f"{symbol!r} in the target {source!r} is not an element")
    symbol = ELEMENTS[number - 1]
    counts[symbol] = counts.get(symbol, 0.0) + amount


def _parse_prompt(passage: str) -> dict[str, float]:
    """Adsorbate and slab of `CO</s>Pt9Cu3 (1 1 1)` together;
    the adsorbate may carry a data set's stars or quotes."""
    found = _PROMPT.fullmatch(passage) or _PROMPT_BARE.fullmatch(passage)
    if found is None:
        raise ValueError(passage)
    counts = _parse_formula(found.group(1).strip("\"'`").replace("*", ""))
    for symbol, amount in _parse_formula(found.group(2)).items():
        _add(counts, symbol, amount, passage)
    return counts


def prompt_target(prompt: Conversation) -> str | None:
    """The passage of a prompt that names a composition (`CO</s>Pt9Cu3 (1 1 1)`): the last one of what the
    user said last. None where that names none, whatever a system prompt, an example or an earlier turn
    says."""
    said = last_user_message(prompt)
    for pattern in (_PROMPT, _PROMPT_BARE):
        for found in reversed(list(pattern.finditer(said))):
            try:
                _parse_prompt(found.group())
            except ValueError:
                continue
            return found.group()
    return None


def _loaded(target: str) -> Target:
    """A target that a data set keeps as JSON (`{"Pt": 3}`, `"Pt3Cu"`, `null`), else the text itself."""
    text = target.strip()
    if text[:1] in ("{", '"') or text == "null":
        try:
            loaded = json.loads(text)
        except ValueError:
            return target
        if loaded is None or isinstance(loaded, str | dict):
            return loaded
    return target


def parse_target(target: Target) -> dict[str, float]:
    """Counts by element of a target: a prompt (`CO</s>Pt9Cu3 (1 1 1)`: adsorbate + slab, other text around it
    is passed over), a formula by pymatgen's rules, counts (a count of None is none), or one of them as JSON
    text. Empty (None, '', {}) gives {}. D and T count as H.

    Raises ValueError for what is none of these, and for capitals that may be meant otherwise (`PT3CU`).
    """
    if isinstance(target, str):
        target = _loaded(target)
    if target is None:
        return {}
    if isinstance(target, Mapping):
        counts: dict[str, float] = {}
        for symbol, amount in target.items():
            if amount is None:  # Arrow and Parquet fill the elements that a row does not have
                amount = 0.0
            if isinstance(amount, str) or not 0 <= amount < math.inf:
                raise ValueError(f"the target {target!r} has the count {amount!r} for {symbol!r}")
            _add(counts, str(symbol), float(amount), target)
    elif not isinstance(target, str):
        raise TypeError(f"a target is a prompt, a formula or a dict of counts, not {type(target).__name__}")
    elif "</s>" in target:
        passage = prompt_target(target)
        if passage is None:
            raise ValueError(f"cannot read the prompt {target!r}; write it like 'CO</s>Pt9Cu3 (1 1 1)'")
        counts = _parse_prompt(passage)
    else:
        counts = _parse_formula(target)
    if not all(map(math.isfinite, counts.values())):
        raise ValueError(f"the target {target!r} has a count that is not a finite number")
    return {symbol: amount for symbol, amount in counts.items() if amount > COUNT_TOLERANCE}


Numbered = tuple[tuple[int, float], ...]


def number_targets(targets: Sequence[Target] | Target, n: int) -> tuple[list[Numbered], list[int]]:
    """The different targets as (atomic number, count) pairs, and for each text which of them is its ([]:
    the first)."""
    if targets is None or isinstance(targets, str | Mapping):
        return [_numbered(targets)], []
    if len(targets) != n:
        raise ValueError(f"{n} texts but {len(targets)} targets")
    known: dict[str | None, int] = {}
    parsed: list[Numbered] = []
    index: list[int] = []
    for row, target in enumerate(targets):
        named = isinstance(target, str) or target is None
        if not named or target not in known:
            try:
                parsed.append(_numbered(target))
            except (ValueError, TypeError) as error:
                raise type(error)(f"row {row}: {error}") from None
            if named:
                known[target] = len(parsed) - 1  # type: ignore[index]
            index.append(len(parsed) - 1)
        else:
            index.append(known[target])
    return parsed, index


def _numbered(target: Target) -> Numbered:
    if isinstance(target, str):
        return _numbered_text(target)
    return tuple((ATOMIC_NUMBER[symbol], amount) for symbol, amount in parse_target(target).items())


@functools.lru_cache(maxsize=4096)
def _numbered_text(target: str) -> Numbered:
    return tuple((ATOMIC_NUMBER[symbol], amount) for symbol, amount in parse_target(target).items())


def is_empty(target: Target) -> bool:
    """Whether a target names no composition, without reading a formula."""
    if isinstance(target, str):
        target = _loaded(target)
    if isinstance(target, Mapping):
        return not any(target.values())
    return not (target.strip() if isinstance(target, str) else target)


class MissingTargets:
    """Counts the answers that came without a composition where one was expected: says so once,
    or refuses them.

    `missing` of `seen` answers had none. Without it an answer has no composition term,
    so that a perfect one gets 4.0.
    """

    def __init__(self, where: str) -> None:
        self.where, self.seen, self.missing = where, 0, 0
        self._told = False
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.where,)  # in another process it counts anew

    def count(self, targets: Iterable[Target], policy: Missing = "warn", hint: str = "") -> list[bool]:
        """For each target whether it is missing. ValueError where one is and `policy` is `error`;
        else a warning, once."""
        holes = [is_empty(target) for target in targets]
        missing = sum(holes)
        with self._lock:
            self.seen += len(holes)
            self.missing += missing
            tell = missing and policy == "warn" and not self._told
            self._told = self._told or bool(tell)
        if missing and policy == "error":
            raise ValueError(
                f"{self.where}: row {holes.index(True)} has no target composition. {hint}".strip()
            )
        if tell:
            LOG.warning(
                "%s: %d of %d answers have no target composition and are scored without the composition "
                "term. %s `missing_target` makes this an error (`error`) or silent (`ignore`); this is "
                "said once.",
                self.where, missing, len(holes), hint,
            )  # fmt: skip
        return holes
