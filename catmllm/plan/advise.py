"""What would fit: the largest micro-batch of a plan, and what to turn on where not even one sample fits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from catmllm.config import Config
from catmllm.plan.trace import Plan, micro_batch_of, trace


def with_micro_batch(config: Config, stage: str, size: int) -> Config:
    """The same configuration with passes of so many samples, whatever tokens they have; a supervised stage
    then makes one pass a step."""
    o: Any = getattr(config, stage)
    changes = {"micro_batch": size} if hasattr(o, "micro_batch") else {"batch_size": size, "accumulate": 1}
    return replace(config, **{stage: replace(o, **changes, batch_tokens=None)})


def packs(config: Config, stage: str) -> bool:
    """Whether passes are packs of tokens, whose samples a plan does not know."""
    o: Any = getattr(config, stage)
    return not hasattr(o, "micro_batch") and o.batch_tokens is not None


def largest_micro_batch(
    plan: Plan, of: Callable[[int], Plan], limit: float, highest: int = 4096
) -> tuple[int, float]:
    """(micro-batch, its peak): the largest that fits, from a plan and a function that plans another size; (0,
    peak of 1) if none does. Memory is close to a straight line in it, so a few plans do."""
    known = {plan.micro_batch: plan.peak}
    while len(known) < 7:
        good = max((b for b, p in known.items() if p <= limit), default=0)
        bad = min((b for b, p in known.items() if p > limit), default=highest + 1)
        if bad - good <= max(1, good // 32):
            break
        if len(known) == 1:
            guess = 2 * good if good else bad // 2
        else:
            (b0, p0), (b1, p1) = sorted(known.items(), key=lambda kv: abs(kv[1] - limit))[:2]
            slope = (p1 - p0) / (b1 - b0)
            guess = int(b0 + (limit - p0) / slope) if slope > 1e-9 else 2 * good
        guess = min(max(guess, good + 1), bad - 1)
        known[guess] = of(guess).peak
    best = max((b for b, p in known.items() if p <= limit), default=0)
    return best, known[best or min(known)]


# What saves memory, by rising price; each is tried on top of those before.
SWITCHES = (
    ("checkpointing", "selective"),
    ("{stage}.sync_every_pass", True),
    ("checkpointing", "full"),
    ("{stage}.reshard", "all"),
    ("cpu_offload", True),
)


def _turned_on(config: Config, stage: str, key: str, value: Any) -> Config | None:
    """The configuration with a switch turned on, or None where it is on already."""
    name = key.rpartition(".")[2]
    node: Any = getattr(config, stage) if "." in key else config
    now = getattr(node, name)
    if now == value or (name == "checkpointing" and now == "full"):
        return None
    changed = replace(node, **{name: value})
    return changed if node is config else replace(config, **{stage: changed})


@dataclass
class Advice:
    """What `advise` found: the plan, the largest micro-batch that fits with it, and what to turn on where
    none does. `unpacked`: the plan's passes are packs by tokens, and that micro-batch is not: a pack of as
    many tokens may have more structures (one of 7,873 tokens took 15 % more)."""

    plan: Plan
    largest: int = 0
    largest_peak: float = 0.0
    turn_on: list[str] = field(default_factory=list)
    unpacked: bool = False


def advise(
    config: Config,
    stage: str,
    ranks: int,
    limit: float,
    *,
    search: bool = True,
    only_unfit: bool = False,
    say: Callable[[str], None] = lambda text: None,
    **options: Any,
) -> Advice:
    """Plan a stage; with `search` also find the largest micro-batch that fits in `limit` GiB, turning on what
    saves memory, one switch after the other, only where not even one sample fits; `only_unfit`: only where
    the stage does not fit as it is. `options` go to `trace`."""

    def plan(c: Config) -> Plan:
        say(f"{stage}: tracing {micro_batch_of(c, stage)} a pass")
        return trace(c, stage, ranks, **options)

    advice = Advice(plan(config))
    if not search or (only_unfit and advice.plan.fits(limit)):
        return advice
    advice.unpacked, again = packs(config, stage), partial(_again, plan, config, stage)
    first = again(micro_batch_of(config, stage)) if advice.unpacked else advice.plan
    advice.largest, advice.largest_peak = largest_micro_batch(first, again, limit)
    for key, value in SWITCHES:
        if advice.largest:
            break
        changed = _turned_on(config, stage, key, value)
        if changed is None:
            continue
        config = changed
        advice.turn_on.append(f"{key.format(stage=stage)}={str(value).lower()}")
        one = plan(with_micro_batch(config, stage, 1))
        if one.fits(limit):
            again = partial(_again, plan, config, stage)
            advice.largest, advice.largest_peak = largest_micro_batch(one, again, limit)
    return advice


def _again(plan: Callable[[Config], Plan], config: Config, stage: str, size: int) -> Plan:
    return plan(with_micro_batch(config, stage, size))
