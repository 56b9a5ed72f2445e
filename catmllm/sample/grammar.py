"""An optional mask on sampling: only tokens by which the answer can still become the CIF that was asked for.

The answer to a CIF or design prompt is fixed text around numbers and site rows: the file's keys, the element
lines and formulas of the wanted composition, one row a site with the right columns. What stays free is every
number and the order of the elements over the rows, each element as often as the composition says. The mask
works on characters, so that any tokenizer will do: a token is allowed where its text, character by character,
keeps to the pattern.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from catmllm.data.prompts import CIF_ANSWER, DESIGN_ANSWER
from catmllm.structure.cif import cif_pattern
from catmllm.structure.formula import parse_identity

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VIEW = 3  # parts of a pattern by which masks are shared: hardly a token spans more

# A place in a pattern: the part it stands in, what of that part has been written, and how often each element
# is still to come. Equal places allow equal tokens.
Place = tuple[int, str, tuple[int, ...]]


@dataclass(frozen=True)
class Pattern:
    """The texts that answer one prompt: parts in order, each fixed text, a number or a site row.

    A part is ("text", t), ("number", digits before the point at most), ("fraction",) or ("site", index).
    """

    parts: tuple[tuple, ...]
    symbols: tuple[str, ...]
    counts: tuple[int, ...]
    decimals: int

    @property
    def start(self) -> Place:
        return 0, "", self.counts

    def ended(self, place: Place) -> bool:
        return place[0] == len(self.parts)

    def view(self, place: Place) -> tuple:
        """What decides on the next characters as far as `VIEW` parts reach."""
        part, written, left = place
        ahead = self.parts[part : part + VIEW]
        if any(p[0] == "site" for p in ahead):
            return ahead, written, tuple(s for s, n in zip(self.symbols, left) if n), self.decimals
        return ahead, written, self.decimals

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
        for k, (symbol, n) in enumerate(zip(self.symbols, left)):
            row = f"{symbol} {symbol}{index} 1 "
            if n and row.startswith(written):
                if row == written:
                    return part + 1, "", (*left[:k], n - 1, *left[k + 1 :])
                return part, written, left
        return None


def answer_pattern(identity: str, target: Mapping[str, int], design: bool, decimals: int = 3) -> Pattern:
    """The answers to the CIF prompt, or the design prompt,
    of a system that hold `target` atoms of each element."""
    parse_identity(identity)  # a broken one is an error here
    before, after = (DESIGN_ANSWER if design else CIF_ANSWER).split("{cif}")
    symbols, parts = cif_pattern(identity, target, decimals)
    whole: list[tuple] = []
    for part in (("text", before), *parts, ("text", after)):
        if part[0] == "text" and whole and whole[-1][0] == "text":
            whole[-1] = ("text", whole[-1][1] + part[1])
        elif part != ("text", ""):
            whole.append(part)
    return Pattern(tuple(whole), symbols, tuple(target[s] for s in symbols), decimals)


@functools.lru_cache(maxsize=2)
def grammar_of(tokenizer: PreTrainedTokenizerBase, end_id: int) -> Grammar:
    """The grammar of a tokenizer, kept: its masks are worth more the longer they are collected."""
    return Grammar(tokenizer, end_id)


class Grammar:
    """The tokens of one tokenizer as a tree of characters, and the masks that have been asked for so far."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end_id: int) -> None:
        self.end_id = end_id
        special = set(tokenizer.all_special_ids)
        self.text = [
            "" if i in special else str(tokenizer.decode([i], clean_up_tokenization_spaces=False))
            for i in range(len(tokenizer))
        ]
        self._tree: dict = {}
        for token, text in enumerate(self.text):
            if text and "\ufffd" not in text:  # a part of a UTF-8 character has no place in a CIF
                node = self._tree
                for char in text:
                    node = node.setdefault(char, {})
                node.setdefault("", []).append(token)
        self._allowed: dict[tuple, torch.Tensor] = {}

    def allowed(self, pattern: Pattern, place: Place) -> torch.Tensor:
        """The tokens [n] int64 that may come next, at least one."""
        if pattern.ended(place):
            return torch.tensor([self.end_id])
        key = pattern.view(place)
        found = self._allowed.get(key)
        if found is None:
            found = self._allowed.get((pattern, place))
        if found is None:
            if len(self._allowed) > 20_000:
                self._allowed.clear()
            tokens: list[int] = []
            furthest = self._walk(pattern, place, self._tree, tokens)
            # What no token looks beyond allows the same wherever it stands, in whichever pattern.
            key = key if furthest < place[0] + VIEW else (pattern, place)
            found = self._allowed[key] = torch.tensor(tokens)
        return found

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


class Mask:
    """Where each answer stands in its pattern."""

    def __init__(self, grammar: Grammar, patterns: Sequence[Pattern]) -> None:
        self.grammar, self.patterns = grammar, patterns
        self.places = [p.start for p in patterns]

    def apply(self, logits: torch.Tensor, rows: list[int]) -> torch.Tensor:
        """Logits [R, V] of the answers `rows` [R] with -inf at what would break their patterns."""
        allowed = [self.grammar.allowed(self.patterns[i], self.places[i]) for i in rows]
        columns = torch.cat(allowed).to(logits.device)
        lines = torch.arange(len(rows)).repeat_interleave(torch.tensor([len(a) for a in allowed]))
        lines = lines.to(logits.device)
        return torch.full_like(logits, -torch.inf).index_put_((lines, columns), logits[lines, columns])

    def take(self, rows: list[int], ended: list[bool], token: list[int]) -> None:
        """Move each answer that has not ended past its token."""
        for i, over, t in zip(rows, ended, token):
            if not over and t != self.grammar.end_id:
                self.places[i] = self.grammar.after(self.patterns[i], self.places[i], t)
