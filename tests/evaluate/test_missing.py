"""Predictions without a structure: what is read, that the numbers are those of the predictions, and whose."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from catmllm.config import SamplingConfig
from catmllm.data.batches import Collator
from catmllm.design.indicative import indicated, indicative_systems
from catmllm.design.predict import predict_energies, question
from catmllm.evaluate.baselines import AdsorbateMean
from catmllm.evaluate.missing import LEAST, arms_of, evaluate_missing, hits_of, pairs_of
from catmllm.models.catalytic_mllm import CatalyticMLLM
from catmllm.seeds import Stream
from catmllm.structure.formula import cell_counts, parse_identity
from catmllm.structure.system import System, text_system
from catmllm.structure.text import configuration, three_part_text, two_part_text
from catmllm.world import World

Model = tuple[CatalyticMLLM, Collator]


class Rank(World):
    """A rank whose gathering is played: it keeps what it gives, and finds what others gave."""

    given: list[Any]
    played: list[list[Any]]

    def gather(self, value: Any) -> list[Any]:
        self.given.append(value)
        if not self.played:
            return [value] * self.size
        at = len(self.given) - 1
        return [value if k == self.rank else given[at] for k, given in enumerate(self.played)]


def rank(k: int, size: int, played: list[list[Any]] | None = None) -> Rank:
    made = Rank(k, size, torch.device("cpu"))
    object.__setattr__(made, "given", [])
    object.__setattr__(made, "played", played or [])
    return made


@pytest.fixture(scope="module")
def data(train_systems: list[System]) -> dict[str, list[System]]:
    """Two pairs with three and four configurations, and one with two."""
    groups: dict[str, list[System]] = {}
    for s in train_systems:
        groups.setdefault(s.identity, []).append(s)
    some = sorted((g for g in groups.values() if len(g) > LEAST), key=lambda g: len(g[0]))[:3]
    test = [*some[0][:3], *some[1][:4], *some[2][:2]]
    rest = [s for s in train_systems if s not in test]
    return {"train": rest[::30], "val": rest[1::60], "test": test}


def test_pairs_have_three_configurations(data: dict[str, list[System]]) -> None:
    assert [len(group) for group in pairs_of(data["test"])] == [3, 4]
    assert all(len({s.identity for s in group}) == 1 for group in pairs_of(data["test"]))
    with pytest.raises(ValueError, match="`evaluate"):
        pairs_of(data["test"][:2])
    with pytest.raises(ValueError, match="no range of energies"):
        pairs_of([text_system("CO</s>Pt (1 1 1)</s>[]", float(k)) for k in range(5)])


def test_what_is_read_has_the_known_parts_and_the_bonds_of_others(data: dict[str, list[System]]) -> None:
    group, other = data["test"][:3], replace(data["train"][0], relaxed=False)
    arms = arms_of(group, [other, None], data["train"][1:3])
    known = two_part_text(group[0])
    assert [s.text for s in arms["two_parts"] if s is not None] == [known]
    for scale in (1.0, 2.0, 4.0):
        read, none = arms[f"indicative_{scale:g}"]
        assert none is None and read is not None and not read.relaxed
        cap = None if scale == 1 else 400
        assert read.text == f"{known}</s>{configuration(other, scale, cap)}"
        assert len(read.text) <= len(known) + 4 + (cap or 1000)
    assert [s.text for s in arms["true"] if s is not None] == [three_part_text(s) for s in group]
    assert all(s is not None and s.text and s.text.startswith(f"{known}</s>") for s in arms["random"])
    assert indicated(known, other).adsorbate == group[0].adsorbate


def test_shares_and_distances_by_hand() -> None:
    pairs = [
        {"energies": [-1.0, 0.0, -0.5], "predicted": {"a": [-1.0, 0.1, np.nan, -0.4], "b": [np.nan]}},
        {"energies": [2.0, 3.0, 2.1], "predicted": {"a": [2.5], "b": [3.5]}},
    ]
    inside, distance = hits_of(pairs, "a")
    np.testing.assert_allclose(inside, [0.5, 1.0])
    np.testing.assert_allclose(distance, [(0.5 + 0.6 + 0.1) / 3, 0.0])
    inside, distance = hits_of(pairs, "a", means=True)
    np.testing.assert_allclose(inside, [1.0, 1.0])
    np.testing.assert_allclose(distance, [abs((-1.0 + 0.1 - 0.4) / 3 + 0.5), 0.0])
    for means in (False, True):
        inside, distance = hits_of(pairs, "b", means)
        assert inside.tolist() == [0.0, 0.0] and np.isnan(distance[0]) and distance[1] == 1.0


def test_numbers_are_those_of_the_predictions_on_one_rank_and_two(
    small_model: Model, data: dict[str, list[System]]
) -> None:
    model, collate = small_model
    sampling = SamplingConfig(max_new_tokens=24)  # no CIF is so short: all are unread

    def measured(world: Rank) -> dict[str, Any]:
        return evaluate_missing(model, collate, data, 2, sampling, 0, world)

    found = measured(rank(0, 1))
    for pair, group in zip(found["pairs"], pairs_of(data["test"])):
        expected = predict_energies(model, collate, [question(s, "text") for s in group])
        np.testing.assert_allclose(pair["predicted"]["true"], expected, atol=1e-4)
        two = predict_energies(model, collate, [question(text_system(two_part_text(group[0])))])
        np.testing.assert_allclose(pair["predicted"]["two_parts"], two, atol=1e-4)
        np.testing.assert_allclose(
            pair["predicted"]["adsorbate_mean"],
            AdsorbateMean.fit(data["train"]).predict(group[:1]),
            atol=1e-4,
        )
        assert pair["energies"] == [round(s.known_energy, 4) for s in group]
        assert len(pair["predicted"]["random"]) == 2 and np.isnan(pair["predicted"]["indicative_4"]).all()
    arms = found["arms"]
    assert arms["indicative_1"]["n"] == arms["indicative_1"]["unread"] == 4
    assert arms["indicative_1"]["pir"] == 0 and np.isnan(arms["indicative_1"]["distance"])
    assert arms["true"]["n"] == 7 and arms["ridge_true"]["unread"] == 0
    assert arms["true"]["pir"] == pytest.approx(hits_of(found["pairs"], "true")[0].mean())
    measured(first := rank(0, 2))  # as if the other rank had the same
    measured(second := rank(1, 2, [first.given, first.given]))
    played = [first.given, second.given]
    of_two = measured(rank(0, 2, played))
    for arm in ("two_parts", "true", "random", "ridge_random", "adsorbate_mean"):
        for one, other in zip(found["pairs"], of_two["pairs"]):
            np.testing.assert_allclose(one["predicted"][arm], other["predicted"][arm], atol=2e-4)


def test_written_systems_are_of_what_was_asked(small_model: Model, data: dict[str, list[System]]) -> None:
    """A random model under the grammar: what can be read has the atoms asked for, the same again by the same
    seed, and is no relaxed structure."""
    model, collate = small_model
    line = "H</s>Cu3Pt (1 1 1)"
    counts = cell_counts(parse_identity(line))
    assert counts == {"Cu": 3, "Pt": 1, "H": 1}
    sampling = SamplingConfig(max_new_tokens=None)
    seed = Stream.MISSING.key(0)
    (some,) = indicative_systems(model, collate, [(line, counts)], 8, sampling, seed)
    read = [s for s in some if s is not None]
    assert len(some) == 8 and read
    for system in read:
        assert system.identity == line and system.target == counts and not system.relaxed
    (again,) = indicative_systems(model, collate, [(line, counts)], 8, sampling, seed)
    assert [s and s.frac.tolist() for s in again if s is not None] == [s.frac.tolist() for s in read]
