"""The schema: what is accepted, what the errors name, and that a saved configuration comes back the same."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from catmllm.config import STAGES, Config, ConfigError, from_dict, load_config, to_dict

ROOT = Path(__file__).parents[1]


def leaves(tree: dict, prefix: str = "") -> dict[str, object]:
    """Every key with its dotted name."""
    out: dict[str, object] = {}
    for key, value in tree.items():
        out |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out


def test_no_argument_gives_the_defaults() -> None:
    assert load_config() == Config()
    assert Config().stages == STAGES


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("grpo.groupsize", "grpo.group_size"),
        ("ga_grpo.sampling.temprature", "ga_grpo.sampling.temperature"),
        ("model.encoder.l_max", "model.encoder.lmax"),
        ("modle", "model"),
        ("joint.mmtg_lamda", "joint.mmtg_lambda"),
    ],
)
def test_an_unknown_key_is_named_with_its_nearest(key: str, nearest: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(None, [f"{key}=1"])
    assert f"`{key}`" in str(error.value) and f"`{nearest}`" in str(error.value)


def test_an_unknown_key_like_no_other_lists_the_valid_ones() -> None:
    with pytest.raises(ConfigError, match=r"valid keys: .*temperature.*top_p"):
        load_config(None, ["grpo.sampling.xyzxyz=1"])


def test_a_file_is_named_in_its_errors(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("grpo:\n  learning_rate: 1.0\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml: unknown key `grpo\.learning_rate`"):
        load_config(file)


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2\n", "just text", "a: b: c"])
def test_a_file_that_is_no_mapping_is_an_error(tmp_path: Path, text: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        load_config(file)
    with pytest.raises(ConfigError, match="absent"):
        load_config(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("seed=1.5", "`seed` must be int"),
        ("seed=true", "`seed` must be int"),
        ("grpo.lr=fast", "`grpo.lr` must be float"),
        ("grpo.lr=true", "`grpo.lr` must be float"),
        ("grpo.lr=nan", "`grpo.lr` must be finite"),
        ("grpo.lr=.inf", "`grpo.lr` must be finite"),
        ("tensorboard=1", "`tensorboard` must be bool"),
        ("out=3", "`out` must be str"),
        ("seed=", "`seed` must be int, got None"),
        ("stages=align", "`stages` must be a list"),
        ("stages=[align, grppo]", "did you mean grpo"),
        ("grpo.betas=[0.9]", "`grpo.betas` must have 2 entries"),
        ("precision=fp8", "one of fp32, bf16, fp16"),
        ("model.projector=invarant", "did you mean invariant"),
        ("grpo.kl=k4", "one of k1, k2, k3"),
        ("grpo=3", "`grpo` is a section"),
        ("grpo.steps=0", "`grpo.steps` must be positive"),
        ("grpo.lr=-1", "`grpo.lr` must be positive"),
        ("grpo.sampling.top_p=1.1", "`grpo.sampling.top_p` must be between 0 and 1"),
        ("instruct.drop_text=-0.1", "`instruct.drop_text` must be between 0 and 1"),
        ("model.llm.hidden_size=100", "multiple of `model.llm.num_attention_heads`"),
        ("grpo.lr", "write key=value"),
        ("=3", "write key=value"),
        ("seed=[1", "not YAML"),
    ],
)
def test_a_wrong_value_is_an_error_that_says_so(override: str, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(None, [override])
    assert says in str(error.value)


def test_apex_and_shards_in_the_hosts_memory_exclude_each_other() -> None:
    assert load_config(None, ["optimizer=apex"]).optimizer == "apex"
    with pytest.raises(ConfigError, match="`optimizer: apex` runs on GPUs alone"):
        load_config(None, ["optimizer=apex", "cpu_offload=true"])


def test_overrides_win_over_the_file_and_the_last_one_wins(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("seed: 3\ngrpo: {lr: 1e-4, sampling: {temperature: 0.7}}\nstages: [align, joint]\n")
    config = load_config(file, ["grpo.lr=5e-7", "grpo.lr=2e-5", "grpo.sampling.top_p=0.9"])
    assert (config.seed, config.grpo.lr, config.stages) == (3, 2e-5, ("align", "joint"))
    assert (config.grpo.sampling.temperature, config.grpo.sampling.top_p) == (0.7, 0.9)
    assert config.ga_grpo.sampling == Config().ga_grpo.sampling  # sections of one type are not one object


def test_values_that_yaml_reads_in_its_own_way() -> None:
    config = load_config(None, ["joint.mmtg_sign=-", "grpo.lr=1e-4", "align.lr=1", "evaluate.judge=none"])
    assert (config.joint.mmtg_sign, config.grpo.lr, config.evaluate.judge) == ("-", 1e-4, "none")
    assert isinstance(config.align.lr, float)
    assert load_config(None, ["joint.mmtg_sign=+"]).joint.mmtg_sign == "+"
    assert (
        load_config(
            None, ["model.encoder.preset=31M", "data.cutoff=12", "data.max_neighbours=20"]
        ).model.encoder.preset
        == "31M"
    )
    for nothing in ("init=", "init=null", "init=~"):
        assert load_config(None, [nothing]).init is None


def test_what_to_dict_writes_json_and_yaml_keep_and_from_dict_reads() -> None:
    config = load_config(None, ["stages=[grpo]", "data.path=x.jsonl", "grpo.betas=[0.8, 0.99]", "init=a/b"])
    tree = to_dict(config)
    assert from_dict(json.loads(json.dumps(tree))) == config
    assert from_dict(yaml.safe_load(yaml.safe_dump(tree))) == config
    with pytest.raises(ConfigError, match=r"old\.json: unknown key `grpo\.lrr`"):
        from_dict({"grpo": {"lrr": 1}}, "old.json")


@given(data=st.data())
def test_every_key_can_be_overridden_and_nothing_else_moves(data: st.DataObject) -> None:
    before = leaves(to_dict(Config()))
    numbers = {k: v for k, v in before.items() if isinstance(v, float)}
    key = data.draw(st.sampled_from(sorted(numbers)))
    value = data.draw(st.floats(0.01, 1.0))
    after = leaves(to_dict(load_config(None, [f"{key}={value!r}"])))
    assert after == before | {key: value}


def test_the_shipped_configurations_are_valid() -> None:
    files = sorted((ROOT / "configs").rglob("*.yaml"))
    for file in files:
        assert load_config(file) is not None


def test_every_field_is_checked_by_type() -> None:
    """A field of a kind that the reader does not know would refuse every value."""
    config = Config()

    def visit(node: object, prefix: str) -> None:
        for f in dataclasses.fields(node):  # type: ignore[arg-type]
            value, name = getattr(node, f.name), f"{prefix}{f.name}"
            if dataclasses.is_dataclass(value):
                visit(value, f"{name}.")
            else:
                tree: dict = {}
                at = tree
                *path, last = name.split(".")
                for part in path:
                    at = at.setdefault(part, {})
                at[last] = list(value) if isinstance(value, tuple) else value
                assert from_dict(tree) == Config(), name

    visit(config, "")
