"""Plans for a terminal, and as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from catmllm.config import Config
from catmllm.plan.advise import Advice, advise
from catmllm.plan.cards import CARDS
from catmllm.plan.trace import GIB


def table(advice: Advice, limit: float) -> str:
    """The plan for a terminal."""
    p = advice.plan
    verdict = "fits" if p.fits(limit) else "DOES NOT FIT"
    lines = [
        f"{p.stage} on {p.ranks} ranks: {p.peak:.1f} GiB a rank, {verdict} in {limit:g} GiB "
        f"(micro-batch {p.micro_batch}, {p.passes} passes, {p.tokens} tokens a step and rank)",
        *(f"  {'peak of ' + k:34s}{v:9.2f} GiB" for k, v in p.phases.items()),
        "  the training step's peak:",
        *(f"    {k:32s}{v:9.2f} GiB" for k, v in p.parts.items() if v >= 0.005),
        f"  FLOPs a step and rank{sum(p.flops.values()) / 1e12:23.1f} T  ("
        + ", ".join(f"{k} {v / 1e12:.1f}" for k, v in p.flops.items())
        + f"; in float32 {p.wide_flops / 1e12:.2f})",
        f"  sent a step and rank{sum(p.sent.values()) / GIB:24.2f} GiB  ("
        + ", ".join(f"{k} {v / GIB:.2f}" for k, v in p.sent.items())
        + ")",
        f"  least seconds on {p.card}, not timed    "
        + ", ".join(f"{k} {v:.3f}" for k, v in p.seconds.items()),
        f"  kernels started, at least{p.launches:19d}    (above "
        f"{p.launch_bound * 1e6:.1f} µs each the host sets the pace)",
        f"  MFU at most{p.mfu_bound:34.0%}  (communication hidden, no operator waits; of the products "
        + ", ".join(f"{v:.0%} of {k}" for k, v in p.useful.items())
        + " are needed, others are made again)",
        "  believable seconds of a step     " + ", ".join(f"{k} {v:.1f}" for k, v in p.step.items()),
    ]
    lines.append(f"  the slowest rank takes{p.balance:23.3f} of the mean rank's time  (simulated)")
    lines.append(
        f"  measured after the stage{p.evaluation_share:21.1%} of its steps' least time  ("
        + ", ".join(f"{k} {v:.1f} s" for k, v in p.evaluation.items())
        + ")"
    )
    if p.decoding:
        lines.append(
            f"  own decoding, a token of each answer{p.decoding['operators']:9.0f} operators, "
            f"{p.decoding['waits']:.2f} waits of the host"
        )
    if p.sampler:
        lines.append(
            f"  new weights for the sampler{p.sampler['moved'] / 1e9:17.2f} GB moved by all ranks, "
            f"{p.sampler['held'] / 1e9:.2f} GB held for it"
        )
    if advice.turn_on:
        lines.append(f"  turn on: {' '.join(advice.turn_on)}")
    if advice.largest:
        how = ", without `batch_tokens`" if advice.unpacked else ""
        lines.append(
            f"  largest micro-batch that fits: {advice.largest} ({advice.largest_peak:.1f} GiB{how})"
        )
    elif advice.turn_on:
        lines.append("  nothing fits even so: take more ranks or a smaller model")
    return "\n".join(lines)


def print_plans(
    jobs: Sequence[tuple[str, Config, str]],
    ranks: int,
    card: str,
    limit: float | None,
    atoms: int,
    search: bool,
    as_json: bool,
) -> int:
    """`catmllm plan` of jobs (a heading or nothing, configuration, stage): 0 if every one fits, else 1. Of
    jobs with headings, which a study has many of, those that fit are not searched for what would fit too."""
    say = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
    limit = CARDS[card].limit if limit is None else limit
    found = []
    for heading, config, stage in jobs:
        one = heading == ""
        advice = advise(
            config, stage, ranks, limit, search=search, only_unfit=not one, say=say, card=card, atoms=atoms
        )
        found.append(advice)
        if not as_json:
            print(heading, end="\n" if heading else "")
            print(table(advice, limit), flush=True)
    if as_json:
        rows = [asdict(a) | {"limit": limit, "fits": a.plan.fits(limit)} for a in found]
        print(json.dumps([r | ({"of": of} if of else {}) for r, (of, _, _) in zip(rows, jobs)], indent=1))
    return int(not all(a.plan.fits(limit) for a in found))
