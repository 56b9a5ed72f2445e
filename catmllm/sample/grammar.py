"""The policy's choices: only tokens by which an answer can still become the CIF that was asked for.

The answer to a CIF or design prompt is fixed text around numbers and site rows: the file's keys, the element
lines and formulas of the wanted composition, one row a site with the right columns. What stays free is every
number and, unless known layers determine it, the element of each row, each as often as the composition says.
The grammar works on characters, so that any tokenizer will do: a token is allowed where its text, character
by character, keeps to the pattern; text that must come is spelled as the tokenizer spells it, so that it is
no choice.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from catmllm.config import DataConfig
from catmllm.data.prompts import CIF_ANSWER, DESIGN_ANSWER
from catmllm.structure.cif import cif_pattern
from catmllm.structure.formula import parse_formula, parse_identity, pieces
from catmllm.structure.placing import Growing
from catmllm.structure.templates import NONE, Shape, Template, Templates

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VIEW = 3  # parts of a pattern by which sets are shared: hardly a token spans more
AHEAD = 12  # characters behind a choice on which a tokenizer's spelling of what comes before may depend

_FRACTION = re.compile(r" 0\.[0-9]+")

# A place in a pattern: the part it stands in, what of that part has been written, and how often each element
# is still to come. Equal places allow equal tokens.
Place = tuple[int, str, tuple[int, ...]]


@dataclass(frozen=True)
class Pattern:
    """The texts that answer one prompt: parts in order, each fixed text, a number or a site row.

    A part is ("text", t), ("number", digits before the point at most), ("fraction",) or ("site", index).
    by_layer: rows of one element come after those of another in each layer of the slab. layers: atoms of each
    element of the slab layer by layer, in the order of rows; none where the elements may come in any order.
    after: pairs of the molecule's elements, the first written after the second.
    """

    parts: tuple[tuple, ...]
    symbols: tuple[str, ...]
    counts: tuple[int, ...]
    decimals: int
    slab: int = 0  # elements of the slab, whose rows come before those of the adsorbate's elements
    pieces: int = 1  # molecules that the adsorbate is
    by_layer: bool = False
    layers: tuple[tuple[int, ...], ...] = ()
    after: tuple[tuple[int, int], ...] = ()
    template: Template | None = field(default=None, compare=False)  # what the slab has to be
    shape: Shape = field(default_factory=dict, compare=False)  # what the molecule has to be

    @property
    def start(self) -> Place:
        return 0, "", self.counts

    def ended(self, place: Place) -> bool:
        return place[0] == len(self.parts)

    def view(self, place: Place, reach: int) -> tuple:
        """What decides on the next characters as far as `reach` parts."""
        part, written, left = place
        ahead = list(self.parts[part : part + reach])
        kind, *rest = ahead[0]
        if kind in ("number", "fraction"):  # of its digits only how many there are
            whole, point, decimals = written.partition(".")
            written = (whole if whole == "0" else "9" * len(whole)) + point + "9" * len(decimals)
        elif kind == "text" or len(rows := self._rows(rest[0], written, left)) == 1:
            ahead[0], written = ("text", (rest[0] if kind == "text" else rows[0])[len(written) :]), ""
        if any(p[0] == "site" for p in ahead):
            return *ahead, written, tuple(self.symbols[k] for k in self._next(left)), self.decimals
        return *ahead, written, self.decimals

    def step(self, place: Place, char: str) -> Place | None:
        """Where one more character leads, or None where it breaks the pattern."""
        part, written, left = place
        if part == len(self.parts):
            return None
        kind, *rest = self.parts[part]
        written += char
        if kind == "text":
            fits, done = rest[0].startswith(written), written == rest[0]
        elif kind == "site":
            return self._site(part, written, left, rest[0])
        else:
            fits, done = self._number(written, 1 if kind == "fraction" else rest[0], kind == "fraction")
        if not fits:
            return None
        return (part + 1, "", left) if done else (part, written, left)

    def follow(self, place: Place) -> Iterator[tuple[str, Place]]:
        """The characters that may come next, and where each leads."""
        part, written, left = place
        if part == len(self.parts):
            return
        kind, *rest = self.parts[part]
        chars: Iterable[str] = "0123456789."
        if kind == "text":
            chars = rest[0][len(written)]
        elif kind == "site":
            chars = dict.fromkeys(row[len(written)] for row in self._rows(rest[0], written, left))
        for char in chars:
            there = self.step(place, char)
            if there is not None:
                yield char, there

    def forced(self, place: Place, most: int) -> tuple[str, list[tuple[str, Place]]]:
        """The text that must come next, as far as `most` characters, and then the ways on."""
        text = ""
        ahead = list(self.follow(place))
        while len(ahead) == 1 and len(text) < most:
            part, written, left = place
            if part < len(self.parts) and self.parts[part][0] == "text":
                text, place = text + self.parts[part][1][len(written) :], (part + 1, "", left)
            else:
                text, place = text + ahead[0][0], ahead[0][1]
            ahead = list(self.follow(place))
        return text, ahead

    def _next(self, left: tuple[int, ...]) -> list[int]:
        """Which elements the next row may be of, by how often each is still to come."""
        slab = left[: self.slab]
        for layer in reversed(self.layers):  # what is left of the one that is being written
            if sum(slab) <= sum(layer):
                break
            slab = tuple(n - m for n, m in zip(slab, layer))
        found = [k for k, n in enumerate(slab) if n]
        if found:
            return found[:1] if self.by_layer and self.layers else found
        found = [k for k, n in enumerate(left) if n]
        return [k for k in found if not any((k, other) in self.after for other in found)] or found

    def _rows(self, index: int, written: str, left: tuple[int, ...]) -> list[str]:
        """How a site row may begin, by the elements that are still to come and what of it is written."""
        rows = [f"{s} {s}{index} 1 " for s in (self.symbols[k] for k in self._next(left))]
        return [row for row in rows if row.startswith(written)]

    def _number(self, written: str, digits: int, fraction: bool) -> tuple[bool, bool]:
        """Whether a text begins a number of these many digits before the point, and whether it is whole."""
        whole, point, decimals = written.partition(".")
        fits = whole.isascii() and whole.isdigit() and len(whole) <= digits
        fits &= not (len(whole) > 1 and whole[0] == "0") and not (fraction and whole != "0")
        fits &= len(decimals) <= self.decimals and (
            not decimals or (decimals.isascii() and decimals.isdigit())
        )
        return fits, fits and point != "" and len(decimals) == self.decimals

    def _site(self, part: int, written: str, left: tuple[int, ...], index: int) -> Place | None:
        """A row's `Pd Pd7 1 `: the symbol is free among those still to come, the rest follows from it."""
        for k in self._next(left):
            row = f"{self.symbols[k]} {self.symbols[k]}{index} 1 "
            if row.startswith(written):
                if row == written:
                    return part + 1, "", (*left[:k], left[k] - 1, *left[k + 1 :])
                return part, written, left
        return None


def answer_pattern(
    identity: str,
    target: Mapping[str, int],
    design: bool,
    data: DataConfig | None = None,
    templates: Templates = NONE,
) -> Pattern:
    """The answers to the CIF prompt, or the design prompt,
    of a system that hold `target` atoms of each element, digits and rows as `data` has them, slab and
    molecule as `templates`."""
    data = data or DataConfig()
    asked = parse_identity(identity)
    name = asked.adsorbate
    adsorbate = parse_formula(name)
    slab = {s: n - adsorbate.get(s, 0) for s, n in target.items()}
    if any(n < 0 for n in slab.values()) or not adsorbate.keys() <= target.keys():
        raise ValueError(f"{identity!r} has more of its adsorbate's elements than {dict(target)}")
    begins, ends = (DESIGN_ANSWER if design else CIF_ANSWER).split("{cif}")
    symbols, parts = cif_pattern(identity, target, data.decimals)
    whole: list[tuple] = []
    for part in (("text", begins), *parts, ("text", ends)):
        if part[0] == "text" and whole and whole[-1][0] == "text":
            whole[-1] = ("text", whole[-1][1] + part[1])
        elif part != ("text", ""):
            whole.append(part)
    of_slab, on_it = [s for s in symbols if slab[s]], [s for s in symbols if s in adsorbate]
    counts = *(slab[s] for s in of_slab), *(adsorbate[s] for s in on_it)
    template = templates.slab({s: slab[s] for s in of_slab}, asked.miller, data.decimals)
    layers = tuple(tuple(layer[s] for s in of_slab) for layer in (template.layers if template else ()))
    shape = templates.shape(name)
    after = tuple(
        (len(of_slab) + i, len(of_slab) + j)
        for i, one in enumerate(on_it)
        for j, other in enumerate(on_it)
        if (one, other) in shape and (other, one) not in shape
    )
    return Pattern(
        tuple(whole),
        (*of_slab, *on_it),
        counts,
        data.decimals,
        len(of_slab),
        pieces(name),
        data.rows == "layers",
        layers,
        after,
        template,
        shape,
    )


@functools.lru_cache(maxsize=2)
def grammar_of(tokenizer: PreTrainedTokenizerBase, end_id: int) -> Grammar:
    """The grammar of a tokenizer, kept: its sets are worth more the longer they are collected."""
    return Grammar(tokenizer, end_id)


class Grammar:
    """The tokens of one tokenizer as a tree of characters, and the sets that have been asked for so far."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end_id: int) -> None:
        self.tokenizer, self.end_id = tokenizer, end_id
        self.end = torch.tensor([end_id])
        special = set(tokenizer.all_special_ids)
        self.text = [
            "" if i in special else str(tokenizer.decode([i], clean_up_tokenization_spaces=False))
            for i in range(len(tokenizer))
        ]
        self._reach = 2 * max(map(len, self.text))
        self._tree: dict = {}
        for token, text in enumerate(self.text):
            if text and "\ufffd" not in text:  # a part of a UTF-8 character has no place in a CIF
                node = self._tree
                for char in text:
                    node = node.setdefault(char, {})
                node.setdefault("", []).append(token)
        self._allowed: dict[tuple, torch.Tensor] = {}
        self._sets: dict[tuple[int, ...], torch.Tensor] = {}
        self._walked: dict[tuple, torch.Tensor] = {}  # by no more parts than were looked at
        self._values: dict[
            tuple[int, int], tuple[torch.Tensor, NDArray[np.float64] | None]
        ] = {}  # by a set's number
        self._within: dict[tuple, tuple[torch.Tensor, torch.Tensor]] = {}  # as well
        self._spelled: dict[str, torch.Tensor] = {}  # the token with which a text begins

    def allowed(self, pattern: Pattern, place: Place) -> torch.Tensor:
        """The tokens [n] int64 that may come next, ascending, at least one. Text that must come has one
        spelling: of the tokens inside it only those with which the tokenizer itself begins to write it."""
        if pattern.ended(place):
            return self.end
        key = pattern.view(place, VIEW)
        found = self._allowed.get(key)
        if found is None:
            found = self._allowed.get((pattern, place))
        if found is None:
            if len(self._allowed) > 50_000:
                self._allowed.clear()
            found, reach = self._find(pattern, place)
            # What no token looks beyond allows the same wherever it stands, in whichever pattern.
            self._allowed[key if reach <= VIEW else (pattern, place)] = found
        return found

    def _find(self, pattern: Pattern, place: Place) -> tuple[torch.Tensor, int]:
        """The tokens that may come next, and as many parts as decide on them."""
        text, ahead = pattern.forced(place, self._reach)
        node, depth, longest = self._tree, 0, -1
        while depth < len(text) and text[depth] in node:
            node, depth = node[text[depth]], depth + 1
            longest = node[""][0] if "" in node else longest
        if depth < len(text):  # no token reaches a choice
            more = text[: depth + AHEAD]
            if len(more) < depth + AHEAD:
                more += _completions(pattern, ahead[:1])[0]
            if more not in self._spelled:
                first = self._first(more)
                fits = self.text[first] and text.startswith(self.text[first])
                # One that writes other tokens than it can sample: the longest does as well.
                self._spelled[more] = torch.tensor([first if fits else longest])
            return self._spelled[more], 1
        for reach in range(1, VIEW + 1):
            if (found := self._walked.get(pattern.view(place, reach))) is not None:
                return found, reach
        tokens: list[int] = []
        reach = self._walk(pattern, place, self._tree, tokens) - place[0] + 1
        begin = {self._first(text + more) for more in _completions(pattern, ahead)} if text else set()
        kept = [t for t in tokens if len(self.text[t]) > len(text) or t in begin]
        # Equal sets are one object, so that many tokens of a pass share it.
        words = tuple(sorted(kept or [longest]))
        found = self._sets.setdefault(words, torch.tensor(words))
        if reach <= VIEW:
            self._walked[pattern.view(place, reach)] = found
        return found, reach

    def fractions(self, tokens: torch.Tensor, decimals: int) -> NDArray[np.float64] | None:
        """What a set of tokens says, [n], where each is a whole coordinate; None for other sets."""
        key = id(tokens), decimals
        if key not in self._values:
            texts = [self.text[t] for t in tokens.tolist()]
            whole = len(texts) > 1 and all(len(t) == 3 + decimals and _FRACTION.fullmatch(t) for t in texts)
            # with the set itself, whose number is then no other's
            self._values[key] = tokens, np.array([float(t) for t in texts]) if whole else None
        return self._values[key][1]

    def within(
        self, tokens: torch.Tensor, written: str, low: float, high: float, digits: int, decimals: int
    ) -> torch.Tensor:
        """Those of some tokens [n] that go on from a begun number, with at most so many digits before the
        point and so many behind it, to one from `low` to `high`, as it rounds; all where none does."""
        key = id(tokens), written, low, high, digits, decimals
        if key not in self._within:
            if len(self._within) > 50_000:
                self._within.clear()
            texts = [(written + self.text[t]).partition("\n")[0] for t in tokens.tolist()]
            fits = torch.tensor([_reaches(text, low, high, digits, decimals) for text in texts])
            self._within[key] = tokens, tokens[fits] if fits.any() and not fits.all() else tokens
        return self._within[key][1]

    def _first(self, text: str) -> int:
        """The first token of a text as the tokenizer writes it."""
        return int(self.tokenizer.encode(text, add_special_tokens=False)[0])

    def _walk(self, pattern: Pattern, place: Place, node: dict, tokens: list[int]) -> int:
        """Collect the tokens below a node of the tree; returns the last
        part of the pattern that was looked at."""
        furthest = 0
        for char, below in node.items():
            if not char:
                tokens += below
                continue
            furthest = max(furthest, place[0])
            there = pattern.step(place, char)
            if there is not None:
                furthest = max(furthest, self._walk(pattern, there, below, tokens))
        return furthest

    def after(self, pattern: Pattern, place: Place, token: int) -> Place:
        """The place behind an allowed token."""
        for char in self.text[token]:
            there = pattern.step(place, char)
            if there is None:
                raise ValueError(f"token {token} ({self.text[token]!r}) breaks the pattern at {place}")
            place = there
        return place


def _reaches(begun: str, low: float, high: float, digits: int, decimals: int) -> bool:
    """Whether a begun number can still become one that rounds to a value from `low` to `high`."""
    whole, point, part = begun.partition(".")
    step = 10.0**-decimals
    low, high = low - 0.5 * step, high + 0.5 * step
    if point:
        least = float(f"{whole}.{part:0<{decimals}}")
        return least <= high and least + 10.0 ** -len(part) - step >= low
    # `5` may become 5.346 or 53.46, `0` only 0.346
    more = range(digits - len(whole) + 1) if whole != "0" else range(1)
    at = int(whole or 0)
    return not whole or any(at * 10**k <= high and (at + 1) * 10**k - step >= low for k in more)


def _completions(pattern: Pattern, ahead: Sequence[tuple[str, Place]]) -> list[str]:
    """For each way on a text that may follow, some characters long."""
    out = []
    for text, place in ahead:
        while len(text) < AHEAD and (one := next(pattern.follow(place), None)):
            text, place = text + one[0], one[1]
        out.append(text)
    return out or [""]


@dataclass
class Node:
    """A place at which answers stand: the tokens [n] that may come next, and by token that was taken the
    tokens that are then forced and the node behind them."""

    place: Place
    allowed: torch.Tensor
    behind: dict[int, Run] = field(default_factory=dict)


Run = tuple[list[int], Node]


class Walk:
    """Where each answer stands in its pattern."""

    def __init__(self, grammar: Grammar, patterns: Sequence[Pattern], longest: int) -> None:
        """Answers of at most `longest` tokens, each at the first of which there is a choice: `begun` has the
        tokens before it."""
        self.grammar, self.patterns = grammar, patterns
        self._runs: dict[int, dict[Place, Run]] = {}  # by pattern and where they begin
        first = {id(p): self._forced(p, p.start, longest - 1) for p in patterns}
        self.begun = [first[id(p)][0] for p in patterns]
        self._at = [first[id(p)][1] for p in patterns]
        self._growing = [self._grown(p, b) for p, b in zip(patterns, self.begun)]
        self._ways: list[torch.Tensor | None] = [None] * len(self._at)  # what each allows, once it was asked

    def _grown(self, pattern: Pattern, begun: list[int]) -> Growing | None:
        """The structure of an answer that these tokens begin; None for a pattern without a slab."""
        if not pattern.slab:
            return None
        atoms = list(zip(pattern.symbols, pattern.counts))
        slab, adsorbate = dict(atoms[: pattern.slab]), dict(atoms[pattern.slab :])
        growing = Growing(slab, adsorbate, pattern.pieces, pattern.template, pattern.shape, pattern.by_layer)
        growing.read("".join(self.grammar.text[t] for t in begun))
        return growing

    def _forced(self, pattern: Pattern, place: Place, most: int = sys.maxsize) -> Run:
        """The tokens, at most so many, that are forced from a place on, and the node behind them."""
        tokens: list[int] = []
        allowed = self.grammar.allowed(pattern, place)
        while len(allowed) == 1 and len(tokens) < most and not pattern.ended(place):
            tokens.append(int(allowed))
            place = self.grammar.after(pattern, place, tokens[-1])
            allowed = self.grammar.allowed(pattern, place)
        return tokens, Node(place, allowed)

    def allowed(self, row: int) -> torch.Tensor:
        """The tokens [n] that may come next in an answer: of coordinates those that keep its atoms apart and
        its adsorbate whole and on the surface, where there are any, and its slab to its template; of the
        cell's numbers those of the template, or that its slab can span."""
        ways = self._ways[row]
        if ways is None:
            ways = self._ways[row] = self._allowed(row)
        return ways

    def _allowed(self, row: int) -> torch.Tensor:
        found, growing, pattern = self._at[row].allowed, self._growing[row], self.patterns[row]
        if growing is None:
            return found
        if (bounds := growing.bounds()) is not None:
            kind, *digits = pattern.parts[self._at[row].place[0]]
            if kind != "number":
                return found
            return self.grammar.within(found, *bounds, digits[0], pattern.decimals)
        fractions = self.grammar.fractions(found, pattern.decimals)
        if fractions is None:
            return found
        free = growing.free(fractions)
        return found if free is None else found[torch.from_numpy(free)]

    def take(self, row: int, token: int) -> list[int]:
        """Move an answer past a token and what it forces; returns all of these tokens, the end's included."""
        taken = self._move(row, token)
        # What its structure leaves no choice in is forced as well.
        while taken[-1] != self.grammar.end_id and len(one := self.allowed(row)) == 1:
            taken += self._move(row, int(one))
        return taken

    def _move(self, row: int, token: int) -> list[int]:
        """Move an answer past a token and what its pattern forces."""
        node, pattern, end = self._at[row], self.patterns[row], self.grammar.end_id
        if token == end:
            return [token]
        if token not in node.behind:
            place = self.grammar.after(pattern, node.place, token)
            runs = self._runs.setdefault(id(pattern), {})
            if place not in runs:
                run, there = self._forced(pattern, place)
                runs[place] = run + [end] * pattern.ended(there.place), there
            node.behind[token] = runs[place]
        run, self._at[row] = node.behind[token]
        self._ways[row] = None
        growing = self._growing[row]
        if growing is not None:
            growing.read("".join(self.grammar.text[t] for t in (token, *run)))
        return [token, *run]
