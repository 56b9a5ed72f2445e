"""Chemical formulas and the identity line `adsorbate</s>composition (h k l)`.

Written formulas stand in the order of the published data (electronegativity, then atomic number);
any order is read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from catmllm.structure.elements import NUMBER, order_elements

Miller = tuple[int, int, int]

SEPARATOR = "</s>"

_PIECE = re.compile(r"([A-Z][a-z]?)(\d*)|(\()|(\))(\d*)")
_IDENTITY = re.compile(
    r"\s*(?P<adsorbate>[^\s<>]*)\s*</s>\s*(?P<slab>[A-Za-z0-9()]+)\s*"
    r"(?:\(\s*(?P<h>-?\d+)[\s,]+(?P<k>-?\d+)[\s,]+(?P<l>-?\d+)\s*\))?\s*(?:</s>.*)?",
    re.DOTALL,
)


class Identity(NamedTuple):
    """What `CO</s>Pt9Cu3 (1 1 1)` says; miller is None where the line leaves it out."""

    adsorbate: str
    slab: dict[str, int]
    miller: Miller | None


def parse_formula(formula: str) -> dict[str, int]:
    """Counts by element of `Pd9Pt3`, `CHCH2OH` or `*ON(CH3)2`, in the order of first mention.

    Asterisks (OC20's mark of the binding atom) and spaces are passed over; the empty formula gives {}.
    Raises ValueError for anything else that is no symbol, whole number or matched bracket.
    """
    text = re.sub(r"[\s*]", "", formula)
    stack: list[dict[str, int]] = [{}]
    position = 0
    while position < len(text):
        piece = _PIECE.match(text, position)
        if piece is None or (piece[4] and len(stack) == 1) or (piece[1] and piece[1] not in NUMBER):
            raise ValueError(
                f"cannot read the formula {formula!r} at {text[position:]!r}; write it like 'Pd9Pt3'"
            )
        position = piece.end()
        if piece[1]:
            stack[-1][piece[1]] = stack[-1].get(piece[1], 0) + int(piece[2] or 1)
        elif piece[3]:
            stack.append({})
        else:
            for symbol, count in stack.pop().items():
                stack[-1][symbol] = stack[-1].get(symbol, 0) + count * int(piece[5] or 1)
    if len(stack) != 1:
        raise ValueError(f"the formula {formula!r} lacks a closing bracket")
    return {symbol: count for symbol, count in stack[0].items() if count}


def format_formula(counts: Mapping[str, int]) -> str:
    """`{"Ir": 6, "Pd": 6, "C": 1}` as `Pd6Ir6C`: canonical order, a count of one is not written."""
    return "".join(
        f"{symbol}{counts[symbol] if counts[symbol] != 1 else ''}" for symbol in order_elements(counts)
    )


def reduce_counts(counts: Mapping[str, int]) -> tuple[dict[str, int], int]:
    """Counts of one formula unit and the number of formula units (the greatest common divisor,
    1 for no atoms)."""
    units = math.gcd(*counts.values()) or 1
    return {symbol: count // units for symbol, count in counts.items()}, units


def count_elements(symbols: Iterable[str]) -> dict[str, int]:
    """Counts by element in canonical order."""
    found = list(symbols)
    return {symbol: found.count(symbol) for symbol in order_elements(found)}


def format_miller(miller: Miller) -> str:
    """`(2 -1 2)`."""
    return "({} {} {})".format(*miller)


def format_identity(adsorbate: str, slab: Mapping[str, int], miller: Miller | None) -> str:
    """`CO</s>Cu3Pt9 (1 1 1)`: the slab in canonical order, as every text that a model was trained on has it.
    A Miller index that is unknown is left out: `CO</s>Cu3Pt9`."""
    plane = "" if miller is None else f" {format_miller(miller)}"
    return f"{adsorbate}{SEPARATOR}{format_formula(slab)}{plane}"


def pieces(adsorbate: str) -> int:
    """How many molecules a name says: 4 of `(O)4`, 3 of `(CO)(OH)2`, 1 of a name that is not all in
    brackets, `ON(CH3)2`."""
    groups = re.findall(r"\(([^()]*(?:\([^()]*\)\d*[^()]*)*)\)(\d*)", adsorbate)
    whole = "".join(f"({inside}){count}" for inside, count in groups)
    return sum(int(count or 1) for _, count in groups) if groups and whole == adsorbate else 1


def cell_counts(identity: Identity) -> dict[str, int]:
    """Counts by element of slab and adsorbate together."""
    counts = dict(identity.slab)
    for symbol, count in parse_formula(identity.adsorbate).items():
        counts[symbol] = counts.get(symbol, 0) + count
    return counts


def text_identity(text: str) -> Identity:
    """What the first two parts of a three-part text say; of any other text an adsorbate `` and no slab."""
    try:
        return parse_identity(text)
    except ValueError:
        return Identity("", {}, None)


def parse_identity(text: str) -> Identity:
    """Adsorbate, counts of the composition and Miller index of `CO</s>Pt9Cu3 (1 1 1)`, whose Miller index may
    be left out; a third part is passed over.

    Raises ValueError for any other text.
    """
    match = _IDENTITY.fullmatch(text)
    if match is None:
        raise ValueError(f"cannot read the identity {text[:80]!r}; write it like 'CO</s>Pt9Cu3 (1 1 1)'")
    parse_formula(match["adsorbate"])  # an adsorbate that is no formula is an error here, not later
    miller = None if match["h"] is None else (int(match["h"]), int(match["k"]), int(match["l"]))
    return Identity(match["adsorbate"], parse_formula(match["slab"]), miller)
