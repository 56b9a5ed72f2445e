"""Which systems train, validate and test: by (bulk, Miller index), by metal, adsorbate or formula, by a
column of the user's, or leaving out what is named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

from catmllm.config import DataConfig
from catmllm.data.slabs import SplitName, split_pairs
from catmllm.data.subsets import pairs as pairs_of
from catmllm.structure.formula import SEPARATOR, format_formula, parse_identity, reduce_counts
from catmllm.structure.system import System

By = Literal["pair", "metal", "adsorbate", "formula", "column"]

# The values of a column that are parts themselves.
_PARTS: dict[str, SplitName] = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test",
}  # fmt: skip


def parts_of(
    texts: Sequence[str],
    pairs: Sequence[str],
    groups: Sequence[str],
    by: By,
    hold_out: Sequence[str] | None,
    seed: int,
) -> list[SplitName]:
    """The part of each system [n], of its three-part text (its first two parts are enough), its pair
    `PdIr (1, 1, 1)` and its value in the user's column.

    With `hold_out` the systems that have one of the names are the test set, and a tenth of the rest (whole
    pairs) validates. Without, whole groups of equal names make about 80 / 10 / 10 %, by the seed. Raises
    ValueError for names that no system has, and for a column that is not there.
    """
    names = [_names(text, pair, group, by) for text, pair, group in zip(texts, pairs, groups, strict=True)]
    if by == "column":
        if missing := sum(not group for group in groups):
            raise ValueError(
                f"`data.split_by: column`: {missing} of {len(groups)} systems have no value; "
                "`catmllm data import --group COLUMN` names the column (`split` by default)"
            )
        values = {group.strip().lower() for group in groups}
        if hold_out is None and not values.isdisjoint(_PARTS):
            if odd := sorted(values - set(_PARTS)):
                raise ValueError(
                    "`data.split_by: column`: the column says train, val or test, and also "
                    f"{', '.join(odd[:5])}; give every system one of the three, or name what tests by "
                    "`data.hold_out`"
                )
            return [_PARTS[group.strip().lower()] for group in groups]
    if hold_out is None:
        joined = [" ".join(sorted(n)) for n in names]
        part_of = split_pairs(Counter(joined), seed)
        return [part_of[name] for name in joined]
    known = set().union(*names) if names else set()
    for name in hold_out:
        if name not in known:
            near = get_close_matches(name, sorted(known), 3) or sorted(known)[:8]
            raise ValueError(f"`data.hold_out: {name}`: no system has it; there are {', '.join(near)}")
    out = [bool(n & set(hold_out)) for n in names]
    part_of = split_pairs(Counter(p for p, test in zip(pairs, out) if not test), seed)
    rest = ["val" if part_of.get(pair) == "val" else "train" for pair in pairs]
    return ["test" if test else r for test, r in zip(out, rest)]  # type: ignore[misc]


def _names(text: str, pair: str, group: str, by: By) -> frozenset[str]:
    if by in ("pair", "column"):
        return frozenset((pair if by == "pair" else group,))
    adsorbate, _, rest = text.partition(SEPARATOR)
    if by == "adsorbate" and rest:
        return frozenset((adsorbate.strip(),))
    try:
        slab = parse_identity(SEPARATOR + rest).slab
    except ValueError:
        raise ValueError(
            f"`data.split_by: {by}`: the text {text[:60]!r} does not name it; split by column"
        ) from None
    return frozenset(slab) if by == "metal" else frozenset((format_formula(reduce_counts(slab)[0]),))


def held_out(parts: Mapping[str, Sequence[System]], config: DataConfig) -> Container[str]:
    """The pairs `PdIr (1, 1, 1)` of which nothing may be trained: those of validation and test, and where the
    split goes by metal or formula all that have a name that is held out, or the names of a group that is
    (the same metals, the same formula)."""
    ours = {part: pairs_of(parts[part]) for part in ("val", "test")}
    pairs = ours["val"] | ours["test"]
    by = config.split_by
    if by not in ("metal", "formula"):
        return pairs
    # beside held-out names, validation is whole pairs and no whole groups
    groups = pairs if config.hold_out is None else ours["test"]
    return _HeldOut(pairs, by, frozenset(config.hold_out or ()), frozenset(_of_pair(p, by) for p in groups))


@dataclass(frozen=True)
class _HeldOut(Container[str]):
    pairs: frozenset[str]
    by: By
    names: frozenset[str]
    groups: frozenset[frozenset[str]]

    def __contains__(self, pair: object) -> bool:
        mine = _of_pair(str(pair), self.by)
        return pair in self.pairs or not self.names.isdisjoint(mine) or mine in self.groups


def _of_pair(pair: str, by: By) -> frozenset[str]:
    return _names(SEPARATOR + pair.partition(" ")[0], pair, "", by)


def describe(by: By, hold_out: Sequence[str] | None, seed: int) -> str:
    """The split in words, for reports."""
    what = {"pair": "(bulk, Miller index) pair", "column": "value of the user's column"}.get(by, by)
    if hold_out is not None:
        return f"test: every system with {what} {', '.join(hold_out)}; a tenth of the rest validates"
    return f"whole groups of one {what}, about 80 / 10 / 10 %, seed {seed}"
