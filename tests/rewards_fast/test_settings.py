"""One schema for YAML files, queries, command lines and training configurations."""

from dataclasses import fields
from pathlib import Path

import pytest

from catmllm.config import ConfigError, RewardConfig, load_config
from rewards_fast import PVCP, RewardSettings, Thresholds, Weights
from rewards_fast.settings import LoopSettings, load_settings, read_settings
from tests.rewards_fast.cif_texts import SLAB, TARGET, cell_cif


def test_the_defaults_are_those_of_pvcp() -> None:
    scorer, plain = RewardSettings().scorer(), PVCP()
    assert (scorer.weights, scorer.thresholds) == (plain.weights, plain.thresholds)
    assert (scorer.threads, scorer.extract) == (plain.threads, plain.extract)
    names = {f.name for f in fields(RewardSettings)}
    assert names == {f.name for kind in (Weights, Thresholds) for f in fields(kind)} | {"extract", "threads"}


def test_every_key_reaches_the_scorer() -> None:
    for f in fields(RewardSettings):
        value = {"extract": False, "own_images": True, "threads": 3, "max_sites": 7}.get(f.name, 0.125)
        scorer = read_settings({f.name: value}).scorer()
        where = {**vars(scorer.weights), **vars(scorer.thresholds), **vars(scorer)}
        assert where[f.name] == value, f.name
        others = {k for k in where if k not in (f.name, "weights", "thresholds")}
        plain = {**vars(PVCP().weights), **vars(PVCP().thresholds), **vars(PVCP())}
        assert all(where[k] == plain[k] for k in others)


def test_texts_are_numbers_where_a_number_is_meant() -> None:
    settings = read_settings(
        {"near": "0.7", "max_sites": "50", "extract": "false", "threads": "2", "comp": "1e-1"}
    )
    assert (settings.near, settings.max_sites, settings.extract, settings.threads) == (0.7, 50, False, 2)
    assert settings.comp == 0.1
    assert read_settings({"threads": None}).threads is None and read_settings({"comp": 1}).comp == 1.0


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"nearr": 1}, "did you mean `near`"),
        ({"zzzz": 1}, "valid keys"),
        ({"near": "x"}, "`near` must be a number"),
        ({"near": None}, "`near` must be a number"),
        ({"near": True}, "`near` must be a number"),
        ({"near": "nan"}, "`near` must be a number"),
        ({"near": float("inf")}, "finite"),
        ({"near": 10**400}, "finite"),
        ({"near": -1e13}, r"at most 1e\+12"),
        ({"near": [1]}, "number"),
        ({"max_sites": 1.5}, "whole number"),
        ({"max_sites": "9" * 5000}, "whole number"),
        ({"comp": -1}, "from 0 to"),
        ({"comp": 1e300}, "from 0 to"),
        ({"comp": float("nan")}, "from 0 to"),
        ({"threads": 0}, "at least 1"),
        ({"extract": 1}, "true or false"),
        ({"extract": "perhaps"}, "true or false"),
    ],
)
def test_what_is_wrong_is_named(given: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        read_settings(given, "here")
    assert str(caught.value).startswith("here: ")


def test_files_and_overrides(tmp_path: Path) -> None:
    path = tmp_path / "reward.yaml"
    path.write_text("near: 0.7\ncomp: 5e-1\nthreads: null\n")
    settings = load_settings(path, ["near=0.9", "parse=0"])
    assert (settings.near, settings.comp, settings.parse) == (0.9, 0.5, 0.0)
    assert load_settings(None) == LoopSettings()
    with pytest.raises(ValueError, match=r"absent\.yaml"):
        load_settings(tmp_path / "absent.yaml")
    path.write_text("[1, 2]")
    with pytest.raises(ValueError, match="mapping"):
        load_settings(path)
    path.write_text("close: {}")
    with pytest.raises(ValueError, match=r"reward\.yaml: `close`"):
        load_settings(path)
    with pytest.raises(ValueError, match="key=value"):
        load_settings(None, ["near"])


def test_how_conversations_are_read_is_a_setting_of_the_bridges_alone() -> None:
    found = load_settings(None, ["answer=any", "missing_target=error", "near=0.7"])
    assert (found.answer, found.missing_target, found.near) == ("any", "error", 0.7)
    assert found.scorer() is RewardSettings(near=0.7).scorer()
    with pytest.raises(ValueError, match="here: `answer` must be one of last, any, got 'first'"):
        read_settings({"answer": "first"}, "here", LoopSettings())
    with pytest.raises(
        ValueError, match="unknown key `answer`"
    ):  # a training run has its own answers and targets
        read_settings({"answer": "any"})


def test_a_section_of_a_training_configuration_is_such_a_file(tmp_path: Path) -> None:
    section = "near: 0.8\nvolume_max: 5000\nown_images: true\nextract: false\n"
    (tmp_path / "reward.yaml").write_text(section)
    indented = "".join(f"    {line}\n" for line in section.splitlines())
    (tmp_path / "train.yaml").write_text(f"grpo:\n  reward:\n{indented}")
    training = load_config(tmp_path / "train.yaml").grpo.reward
    served = load_settings(tmp_path / "reward.yaml", ["threads=1"])
    assert training.scorer() is served.scorer()
    assert RewardConfig().near == 0.7 and RewardConfig().scorer().score([SLAB], TARGET).total[0] == 10


def test_training_sees_that_a_needle_touches_itself() -> None:
    needle = cell_cif((0.6, 0.6, 166, 90, 90, 90), [("Pt", 0, 0, 0), ("Pt", 0, 0, 0.5)])
    plain, training = (
        s.scorer().score([needle], {"Pt": 2}) for s in (RewardSettings(near=0.7), RewardConfig())
    )
    assert plain.min_distance[0] == pytest.approx(83) and plain.terms["distance_penalty"][0] == 0
    assert training.min_distance[0] == pytest.approx(0.6) and training.terms["distance_penalty"][0] == 3


def test_the_training_configuration_checks_the_same_ranges() -> None:
    with pytest.raises(ConfigError, match=r"`grpo\.reward\.comp` must be"):
        load_config(None, ["grpo.reward.comp=-1"])
    assert load_config(None, ["ga_grpo.reward.max_sites=10"]).ga_grpo.reward.max_sites == 10
