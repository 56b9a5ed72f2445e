"""Energies where no structure is known (paper, App. C): how many predictions lie among the true ones.

Adsorbate, composition and Miller index leave the site open, so a pair of them has a range of energies. PIR
(Eq. 57) is the share of predictions inside it. A wide range is easily hit, so the distance of predictions
from its middle stands beside it. What is compared is the text that is read: two parts, bonds of indicative
CIFs at several reaches, the true bonds, those of a random training system; and who reads it, the model or
ridge regression that was fitted to texts of that kind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from catmllm.config import SamplingConfig
from catmllm.data.batches import Collator
from catmllm.data.open import texts_only
from catmllm.design.indicative import CHARACTERS, indicated, indicative_systems
from catmllm.design.predict import predict_energies, question
from catmllm.evaluate.baselines import AdsorbateMean, Floats, TextRidge, some
from catmllm.evaluate.metrics import bootstrap_interval, inclusion_ratio
from catmllm.models.catalytic_mllm import CatalyticMLLM
from catmllm.seeds import Stream, generator
from catmllm.structure.system import System
from catmllm.structure.text import three_part_text, two_part_text, worded
from catmllm.world import World

SCALES = (1.0, 2.0, 4.0)  # of covalent radii; the paper's is 4
LEAST = 3  # configurations of a pair, below which their range says nothing
Texts = dict[str, list[System | None]]  # of a pair, by arm; None where a CIF could not be read


def pairs_of(systems: Sequence[System]) -> list[list[System]]:
    """Systems of one identity line (adsorbate, whole composition, Miller index), where there are `LEAST`.
    Raises ValueError where there are nowhere so many, and for texts without structures."""
    groups: dict[str, list[System]] = {}
    for system in systems:
        groups.setdefault(system.identity, []).append(system)
    found = [group for group in groups.values() if len(group) >= LEAST]
    if not found or texts_only(systems):
        raise ValueError(
            f"no adsorbate and catalyst of the test part have {LEAST} structures, so there is no range of "
            "energies to predict into; leave `evaluate.indicative` at 0"
        )
    return found


def evaluate_missing(
    model: CatalyticMLLM,
    collate: Collator,
    data: Mapping[str, Sequence[System]],
    candidates: int,
    sampling: SamplingConfig,
    seed: int,
    world: World,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """PIR and |E - middle| (eV) by arm, over the pairs of the test part with at least `LEAST` configurations;
    `candidates` CIFs and as many random training systems a pair; ranks share the work.

    A pair counts once however many predictions it has; `mean_pir` and `mean_distance` are of the mean of its
    predictions. A CIF that cannot be read is a prediction outside of
    the range, and has no distance. Intervals are by a bootstrap over (bulk, Miller index); those of `more`
    are of the difference to two parts, paired. Raises ValueError as `pairs_of`.
    """
    pairs = pairs_of(data["test"])
    numbers = range(world.rank, len(pairs), world.size)
    mine = [pairs[k] for k in numbers]
    asked = [(group[0].identity, group[0].target) for group in mine]
    written = indicative_systems(
        model, collate, asked, candidates, sampling, Stream.MISSING.key(seed, world.rank, 0), dtype
    )
    texts, train = [], list(some(data["train"]))
    for k, group, systems in zip(numbers, mine, written):
        rng = generator(Stream.MISSING.key(seed, k, 1))
        texts.append(arms_of(group, systems, _random(train, group[0].adsorbate, candidates, rng)))
    found: list[dict[str, list[float]]] = [{} for _ in pairs]
    for rank, part in enumerate(world.gather(_predicted(model, collate, texts))):
        found[rank :: world.size] = part
    every: list[Texts] = [{} for _ in pairs]
    for rank, words in enumerate(world.gather(texts)):
        every[rank :: world.size] = words
    by_others = _baselines(data, every) if world.main else None
    for mine_, others in zip(found, world.gather(by_others)[0]):
        mine_ |= others
    return _summary(pairs, found, candidates)


def arms_of(group: Sequence[System], written: Sequence[System | None], random: Sequence[System]) -> Texts:
    """The texts of a pair, each as a system without a structure: of its systems, of what the model wrote for
    it, and of random training systems, whose bonds are told as if they were its own."""
    known = two_part_text(group[0])
    arms: Texts = {"two_parts": [worded(group[0], known)]}
    for scale in SCALES:
        cap = None if scale == 1.0 else CHARACTERS
        arms[f"indicative_{scale:g}"] = [
            None if s is None else indicated(known, s, scale, cap) for s in written
        ]
    arms["true"] = [worded(s, three_part_text(s)) for s in group]
    arms["random"] = [indicated(known, s) for s in random]
    return arms


def _random(train: Sequence[System], adsorbate: str, n: int, rng: np.random.Generator) -> list[System]:
    """n training systems of an adsorbate, or where there is none, of any; some twice where they are few."""
    same = [k for k, s in enumerate(train) if s.adsorbate == adsorbate] or list(range(len(train)))
    return [train[same[i]] for i in rng.integers(len(same), size=n)]


def _predicted(
    model: CatalyticMLLM, collate: Collator, texts: Sequence[Texts]
) -> list[dict[str, list[float]]]:
    """The model's energies (eV) by pair and arm; NaN where there is no text. Equal texts are read once."""
    every = [s for arms in texts for read in arms.values() for s in read]
    different = {(s.text, s.relaxed): s for s in every if s is not None}
    energies = predict_energies(model, collate, [question(s) for s in different.values()]).tolist()
    of = dict(zip(different, energies))
    return [
        {arm: [np.nan if s is None else of[s.text, s.relaxed] for s in read] for arm, read in arms.items()}
        for arms in texts
    ]


def _baselines(data: Mapping[str, Sequence[System]], texts: Sequence[Texts]) -> list[dict[str, list[float]]]:
    """Energies (eV) by pair and arm of what reads the same: ridge regression fitted to texts of the arm's
    kind, and the mean of the adsorbate."""
    train, val = some(data["train"]), some(data["val"])

    def fitted(scale: float | None) -> TextRidge:
        def word(s: System) -> System:
            cap = None if scale == 1.0 else CHARACTERS
            return worded(s, two_part_text(s) if scale is None else three_part_text(s, scale, cap))

        return TextRidge.fit([word(s) for s in train], [word(s) for s in val])

    kinds: dict[str, float | None] = {"two_parts": None, "true": 1.0, "random": 1.0}
    kinds |= {f"indicative_{scale:g}": scale for scale in SCALES}
    ridges = {scale: fitted(scale) for scale in dict.fromkeys(kinds.values())}
    mean = AdsorbateMean.fit(train)
    found: list[dict[str, list[float]]] = []
    for arms in texts:
        row: dict[str, list[float]] = {}
        for arm, systems in arms.items():
            said = iter(ridges[kinds[arm]].predict([s for s in systems if s is not None]).tolist())
            row[f"ridge_{arm}"] = [np.nan if s is None else next(said) for s in systems]
        first = arms["two_parts"][0]
        assert first is not None
        row["adsorbate_mean"] = mean.predict([first]).tolist()
        found.append(row)
    return found


def hits_of(pairs: Sequence[Mapping[str, Any]], arm: str, means: bool = False) -> tuple[Floats, Floats]:
    """Of each pair of a record the share of an arm's predictions inside its range, and their mean distance
    (eV) from the middle, NaN where none could be read; with `means` those of the one mean prediction."""
    inside, distance = np.zeros(len(pairs)), np.full(len(pairs), np.nan)
    for k, pair in enumerate(pairs):
        low, high = min(pair["energies"]), max(pair["energies"])
        predicted = np.array(pair["predicted"][arm], dtype=np.float64)
        read = predicted[~np.isnan(predicted)]
        if means:
            predicted = read = np.array([read.mean()]) if len(read) else np.array([np.nan])
        inside[k] = inclusion_ratio(predicted, *np.repeat([[low], [high]], len(predicted), axis=1))
        if len(read):
            distance[k] = np.abs(read - (low + high) / 2).mean()
    return inside, distance


def _summary(
    pairs: Sequence[Sequence[System]], predicted: Sequence[Mapping[str, list[float]]], candidates: int
) -> dict[str, Any]:
    rows: list[dict[str, Any]] = [
        {
            "identity": group[0].identity,
            "surface": f"{group[0].bulk} {group[0].miller}",
            "energies": [round(s.known_energy, 4) for s in group],
            "predicted": {arm: np.round(said, 4).tolist() for arm, said in of_pair.items()},
        }
        for group, of_pair in zip(pairs, predicted)
    ]
    surfaces = [row["surface"] for row in rows]
    first, _ = hits_of(rows, "two_parts")
    arms: dict[str, dict[str, Any]] = {}
    for arm in predicted[0]:
        inside, distance = hits_of(rows, arm)
        of_means, from_means = hits_of(rows, arm, means=True)
        every = np.concatenate([row["predicted"][arm] for row in rows])
        arms[arm] = {
            "pir": float(inside.mean()),
            "interval": bootstrap_interval(inside, groups=surfaces),
            "more": float((inside - first).mean()),
            "more_interval": bootstrap_interval(inside - first, groups=surfaces),
            "distance": _mean(distance),
            "mean_pir": float(of_means.mean()),
            "mean_distance": _mean(from_means),
            "n": len(every),
            "unread": int(np.isnan(every).sum()),
        }
    width = float(np.median([np.ptp(row["energies"]) for row in rows]))
    return {
        "candidates": candidates,
        "width": width,
        "surfaces": len(set(surfaces)),
        "arms": arms,
        "pairs": rows,
    }


def _mean(distances: Floats) -> float:
    """Of those that are numbers; NaN where none is."""
    known = distances[~np.isnan(distances)]
    return float(known.mean()) if len(known) else float("nan")
