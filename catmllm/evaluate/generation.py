"""How good sampled CIFs are: the mean PVCP, the paper's failure modes PF, VF, CM and PV, and AD, no real
adsorbate."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from catmllm.config import RewardConfig, SamplingConfig
from catmllm.data.batches import Collator
from catmllm.data.prompts import Sample, cif_prompt, design_prompt
from catmllm.design.constraints import adsorbate_faults, read_systems
from catmllm.design.reward import PVCP_TERMS, adsorbate_term
from catmllm.evaluate.metrics import generation_failures, generation_rates
from catmllm.models.catalytic_mllm import CatalyticMLLM
from catmllm.sample.answers import answer_limits
from catmllm.sample.engine import RolloutEngine
from catmllm.sample.grammar import answer_pattern
from catmllm.seeds import Stream
from catmllm.structure.adsorbed import Fault
from catmllm.structure.system import System
from catmllm.world import World
from rewards_fast import Scores


def generation_prompts(systems: Sequence[System], n: int) -> list[tuple[Sample, System]]:
    """n prompts, half of them CIF prompts and half design prompts: over the systems in turn, or over evenly
    spaced ones where there are more systems than prompts."""
    m = len(systems)
    chosen = [systems[i * m // n if n < m else i % m] for i in range(n)]
    return [
        (Sample(cif_prompt(s.identity) if i % 2 == 0 else design_prompt(s.identity, s.known_energy)), s)
        for i, s in enumerate(chosen)
    ]


def evaluate_generation(
    model: CatalyticMLLM,
    collate: Collator,
    systems: Sequence[System],
    n: int,
    sampling: SamplingConfig,
    reward: RewardConfig,
    seed: int,
    world: World,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Sample one answer to each of n prompts and score them all; ranks share the work.

    The prompts and seeds are the same for every stage, so that stages are compared on equal terms.
    `answers` has one row per text: what was asked (`energy` in eV, None where only the CIF was asked for),
    the text, its terms, why it could not be read and why its adsorbate is none.
    """
    prompts = generation_prompts(systems, n)
    mine = prompts[world.rank :: world.size]
    patterns = None
    if sampling.grammar:
        first, data, templates = world.rank, collate.data, collate.templates
        patterns = [
            answer_pattern(s.identity, s.target, (first + world.size * k) % 2 == 1, data, templates)
            for k, (_, s) in enumerate(mine)
        ]
    rollouts = RolloutEngine(model, collate, dtype).generate(
        [p for p, _ in mine],
        sampling,
        Stream.GENERATION.key(seed, world.rank),
        patterns=patterns,
        limits=answer_limits(collate, sampling, [(s.identity, s.target) for _, s in mine]),
    )
    rows = []
    for rollout in rollouts:
        s = mine[rollout.prompt][1]
        designs = (world.rank + world.size * rollout.prompt) % 2 == 1
        asked = {"identity": s.identity, "energy": s.known_energy if designs else None}
        rows.append((rollout.text, s.target, (s.adsorbate, s.miller), asked))
    rows = list(itertools.chain(*world.gather(rows)))
    texts = [text for text, *_ in rows]
    scores = reward.scorer().score(texts, [target for _, target, _, _ in rows])
    faults = adsorbate_faults(read_systems(scores, [wanted for _, _, wanted, _ in rows]))
    terms = {k: getattr(scores, k) for k in PVCP_TERMS} | {"adsorbate": adsorbate_term(faults)}
    counts, edges = np.histogram(scores.total, bins=np.arange(-15.0, 10.51, 0.5))
    failures, rates = generation_failures(scores, faults), generation_rates(scores, faults)
    rates["PV_eq41"] = rates.pop("PV")
    rates["PV"] = rates.pop("PV_0.7")
    return {
        "n": len(texts),
        "reward": float(scores.total.mean()),
        "reward_se": float(scores.total.std(ddof=1) / np.sqrt(len(texts))) if len(texts) > 1 else 0.0,
        "reward_hist": {"edges": edges.tolist(), "counts": counts.tolist()},
        "terms": {k: float(values.mean()) for k, values in terms.items()},
        **rates,
        "reasons": dict(collections.Counter(r for r in scores.reason if r)),
        "faults": dict(collections.Counter(f for f, r in zip(faults, scores.reason) if f and not r)),
        "examples": texts[:3],
        "answers": [
            {**asked, "text": text, **_scored(i, scores, terms, faults, failures)}
            for i, (text, _, _, asked) in enumerate(rows)
        ],
    }


def _scored(
    i: int,
    scores: Scores,
    terms: dict[str, NDArray[np.float64]],
    faults: Sequence[Fault | None],
    failures: dict[str, NDArray[np.bool_]],
) -> dict[str, Any]:
    """The reward of one answer, its terms, what is wrong with it and which checks it fails."""
    reason = scores.reason[i]
    return {
        "reward": round(float(scores.total[i]), 4),
        **{k: round(float(values[i]), 4) for k, values in terms.items()},
        "reason": reason,
        "fault": None if reason else faults[i],
        "fails": [name for name, failed in failures.items() if failed[i]],
    }
