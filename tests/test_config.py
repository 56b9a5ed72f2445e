"""The schema: what is accepted, what the errors name, how files compose,
and that a saved configuration comes back."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
import tempfile
import typing
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from catmllm import stages
from catmllm.config import (
    STAGES,
    Config,
    ConfigError,
    EncoderSizes,
    GRPOConfig,
    JointConfig,
    LLMConfig,
    OptimConfig,
    SamplingConfig,
    from_arguments,
    from_dict,
    load_config,
    to_dict,
)
from catmllm.config.help import describe, markdown, overview
from catmllm.config.section import Key, bound_words, keys
from catmllm.pipeline import differences

ROOT = Path(__file__).parents[1]


def leaves(tree: dict, prefix: str = "") -> dict[str, object]:
    """Every key with its dotted name."""
    out: dict[str, object] = {}
    for key, value in tree.items():
        out |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out


KEYS = list(keys(Config))


def test_no_argument_gives_the_defaults() -> None:
    assert load_config() == Config()
    assert Config().stages == STAGES == tuple(stages.STAGES)


def test_what_the_schema_says_of_a_key_is_what_a_configuration_has() -> None:
    """Help and page read defaults from the classes: a section made
    with other values would be told wrongly."""
    assert {k.name: k.default for k in KEYS} == {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in leaves(to_dict(Config())).items()
    }


@pytest.mark.parametrize("key", KEYS, ids=lambda k: k.name)
def test_every_key_has_its_help(key: Key) -> None:
    assert key.field.metadata["description"] and "unit" in key.field.metadata
    assert (
        bound_words(key.field.metadata)
        or not {int, float} & {key.type, *typing.get_args(key.type)[:1]}
        or key.name.endswith((".betas", ".budgets", ".property", ".generation"))  # a rule says it of all
    )


def test_a_subclass_with_another_default_keeps_help_and_bounds() -> None:
    base, own = ({f.name: f for f in dataclasses.fields(c)}["steps"] for c in (OptimConfig, JointConfig))
    assert base.metadata == own.metadata and (base.default, own.default) == (100, 600)
    with pytest.raises(ConfigError, match="`steps` must be positive, got 0"):
        JointConfig(steps=0)


def test_an_unknown_key_like_no_other_lists_the_valid_ones() -> None:
    with pytest.raises(ConfigError, match=r"valid keys: .*temperature.*top_p"):
        load_config(None, ["grpo.sampling.xyzxyz=1"])


def test_a_file_is_named_in_its_errors(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("grpo:\n  learning_rate: 1.0\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml:2: unknown key `grpo\.learning_rate`"):
        load_config(file)


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2\n", "just text", "a: b: c"])
def test_a_file_that_is_no_mapping_is_an_error(tmp_path: Path, text: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        load_config(file)


def test_a_file_that_is_not_there_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml: no such file$"):
        load_config(tmp_path / "absent.yaml")
    with pytest.raises(
        ConfigError, match=r"a100x8/joint_3b\.yaml: no such file; did you mean a100x8/joint\.yaml\?"
    ):
        load_config("a100x8/joint_3b.yaml")


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates()
NAMES = st.sampled_from([part for key in keys(Config) for part in key.name.split(".")]) | st.text(max_size=5)


@given(
    text=st.text()
    | st.recursive(
        SCALARS,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
        max_leaves=20,
    ).map(yaml.safe_dump)
)
@example("seed: 2026-13-45")
@example("stages: &a [*a]")
@example("grpo: &a {sampling: *a}")
@example("seed: " + "9" * 5000)
@example("? [a, b]\n: 1")
@example("<<: 3")
def test_whatever_is_written_gives_a_configuration_or_a_configuration_error(text: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "any.yaml"
        file.write_text(text, encoding="utf-8", errors="surrogatepass")
        for files, overrides in (([file], []), ([], [text]), ([], [f"grpo={text}"])):
            with contextlib.suppress(ConfigError):
                assert isinstance(load_config(files, overrides), Config)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("seed=1.5", "`seed` must be int"),
        ("seed=true", "`seed` must be int"),
        ("grpo.lr=fast", "`grpo.lr` must be float"),
        ("grpo.lr=true", "`grpo.lr` must be float"),
        ("grpo.lr=nan", "`grpo.lr` must be float, got 'nan'"),
        ("grpo.lr=.nan", "`grpo.lr` must be finite, got nan"),
        ("grpo.lr=.inf", "`grpo.lr` must be finite"),
        ("tensorboard=1", "`tensorboard` must be bool"),
        ("out=3", "`out` must be str"),
        ("seed=", "`seed` must be int, got None"),
        ("stages=align", "`stages` must be a list"),
        (
            "stages=[align, grppo]",
            f"`stages[1]` must be one of {', '.join(STAGES)}, got 'grppo'",
        ),
        ("stages=[align, grppo]", "did you mean grpo"),
        ("grpo.betas=[0.9, 1.0]", "`grpo.betas` must be from 0 to below 1, got [0.9, 1.0]"),
        ("evaluate.budgets=[4, 0]", "`evaluate.budgets` must be above 0, got [4, 0]"),
        ("grpo.betas=[0.9, x]", "`grpo.betas[1]` must be float, got 'x'"),
        ("grpo.encoder_lr=x", "`grpo.encoder_lr` must be float or null, got 'x'"),
        ("lora.dropout=2", "`lora.dropout` must be between 0 and 1, got 2"),
        ("data.workers=-1", "`data.workers` must be 0 or more, got -1"),
        (
            "grpo.updates_per_rollout=3",
            "`grpo.checkpoint_every` must be a multiple of `grpo.updates_per_rollout`",
        ),
        ("align.accumulate=2", "`align.accumulate` must be 1"),
        ("align.batch_tokens=64", "`align.batch_tokens` must be null"),
        ("data.images=true", "`data.images` needs the image tower"),
        ("model.llm.train_images=true", "trains nothing without `data.images`"),
        ("model.encoder.mmax=3", "`model.encoder.mmax` must be at most `model.encoder.lmax` (2), got 3"),
        ("model.llm.num_key_value_heads=4", "multiple of `model.llm.num_key_value_heads`, got 6 and 4"),
        ("temperature=1", "there is `align.temperature`, `grpo.sampling.temperature`"),
        ("lr.x=1", "unknown key `lr`; there is `encoder.lr`"),
        ("grpo.groupsize=1", "unknown key `grpo.groupsize`; did you mean `grpo.group_size`?"),
        (
            "ga_grpo.sampling.temprature=1",
            "unknown key `ga_grpo.sampling.temprature`; did you mean `ga_grpo.sampling.temperature`?",
        ),
        ("model.encoder.l_max=1", "unknown key `model.encoder.l_max`; did you mean `model.encoder.lmax`?"),
        ("modle=1", "unknown key `modle`; did you mean `model`?"),
        ("joint.mmtg_lamda=1", "unknown key `joint.mmtg_lamda`; did you mean `joint.mmtg_lambda`?"),
        ("grpo.betas=[0.9]", "`grpo.betas` must have 2 entries"),
        ("precision=fp8", "one of fp32, bf16, fp16"),
        ("model.projector=invarant", "did you mean invariant"),
        ("grpo.kl=k4", "one of k1, k2, k3"),
        ("grpo=3", "`grpo` is a section"),
        ("grpo.steps=0", "`grpo.steps` must be positive"),
        ("grpo.lr=-1", "`grpo.lr` must be positive"),
        ("grpo.sampling.top_p=1.1", "`grpo.sampling.top_p` must be above 0, at most 1"),
        ("ga_grpo.sampling.top_p=0", "`ga_grpo.sampling.top_p` must be above 0, at most 1, got 0"),
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
    with pytest.raises(ConfigError, match="`optimizer: apex` runs on GPUs only"):
        load_config(None, ["optimizer=apex", "cpu_offload=true"])


def test_vllm_excludes_what_it_cannot_do() -> None:
    for stage in ("grpo", "ga_grpo"):
        with pytest.raises(ConfigError, match=rf"`{stage}\.sampling\.stop` .* leave `{stage}\.vllm` empty"):
            load_config(None, [f"{stage}.vllm=python", f"{stage}.sampling.stop=[end]"])
        assert load_config(None, [f"{stage}.vllm=python", f"{stage}.sampling.grammar=true"])


def test_every_fault_is_a_line_with_the_place_where_it_was_written(tmp_path: Path) -> None:
    a, b = tmp_path / "a.yaml", tmp_path / "b.yaml"
    a.write_text("seed: 1\njoint:\n  lr: -1\n  steps: 3\nmodle: {}\n")
    b.write_text("\ngrpo: {lr: 1e-4, updates_per_rollout: 7}\njoint: {steps: 0}\n")
    with pytest.raises(ConfigError) as error:
        load_config([a, b], ["align.warmup=-2"])
    assert sorted(str(error.value).splitlines()) == [
        f"{a}:3: `joint.lr` must be positive, got -1",
        f"{a}:5: unknown key `modle`; did you mean `model`?",
        f"{b}:2: `grpo.checkpoint_every` must be a multiple of `grpo.updates_per_rollout`",
        f"{b}:3: `joint.steps` must be positive, got 0",
        "command line: `align.warmup` must be 0 or more, got -2",
    ]


def test_a_key_that_is_given_twice_in_a_file_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "twice.yaml"
    file.write_text("grpo:\n  lr: 1e-4\n  steps: 3\n  lr: 1e-5\n")
    with pytest.raises(ConfigError, match=r"twice\.yaml:4: `grpo\.lr` was given in line 2 already"):
        load_config(file)
    file.write_text("a: &a {lr: 1e-4, steps: 3}\n".replace("a:", "grpo:") + "joint: {<<: *a, steps: 5}\n")
    config = load_config(file)
    assert (config.joint.lr, config.joint.steps, config.grpo.steps) == (1e-4, 5, 3)


def test_files_compose_from_left_to_right(tmp_path: Path) -> None:
    a, b = tmp_path / "a.yaml", tmp_path / "b.yaml"
    a.write_text("name: big\nseed: 1\ngrpo: {lr: 1e-4, sampling: {stop: [x, y], top_p: 0.5}}\n")
    b.write_text("out: 'runs/{name}/b'\ninit: 'runs/{name}/a'\ngrpo: {sampling: {stop: [z]}}\nseed: 2\n")
    config = load_config([a, b], ["seed=3"])
    assert config == from_arguments([str(a), "seed=3", str(b)])
    assert (config.seed, config.grpo.lr, config.grpo.sampling.top_p) == (3, 1e-4, 0.5)
    assert (config.grpo.sampling.stop, config.out, config.init) == (("z",), "runs/big/b", "runs/big/a")
    assert load_config([b, a]).seed == 1 and load_config([b, a]).grpo.sampling.stop == ("x", "y")
    assert load_config([a, b], ["name=mine"]).init == "runs/mine/a"


def test_a_shipped_file_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config("tiny/pipeline.yaml") == load_config(ROOT / "configs/tiny/pipeline.yaml")
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny/pipeline.yaml").write_text("seed: 9\n")
    assert load_config("tiny/pipeline.yaml").seed == 9


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


def test_a_run_saved_before_sections_checked_themselves_still_loads() -> None:
    """`tests/saved_config.json` was written by version 0.2.0's dataclasses."""
    saved = json.loads((ROOT / "tests" / "saved_config.json").read_text())
    config = from_dict(saved, "metrics.json")
    now, then = leaves(to_dict(config)), leaves(saved) | {"name": "tiny"}
    assert {key: value for key, value in now.items() if key in then} == then  # newer keys have their defaults
    assert config.grpo.sampling.stop == ("data_",) and config.ga_grpo.reward.threads is None


def test_a_section_checks_itself_in_python_too() -> None:
    with pytest.raises(ConfigError, match="`temperature` must be positive, got 0"):
        SamplingConfig(temperature=0)
    with pytest.raises(ConfigError, match="unknown key `temprature`; did you mean `temperature`"):
        SamplingConfig(temprature=1.0)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="`hidden_size` must be a multiple of `num_attention_heads`"):
        LLMConfig(hidden_size=100)
    with pytest.raises(ConfigError, match="`mmax` must be at most `lmax`"):
        dataclasses.replace(EncoderSizes(), mmax=9)


def test_a_wrong_assignment_is_refused_and_leaves_what_was_there() -> None:
    config = Config()
    for section, name, value in (
        (config.grpo, "lr", -1.0),
        (config.grpo, "lr", "1e-4"),
        (config.grpo, "updates_per_rollout", 3),  # against a rule of the section
        (config.grpo, "learning_rate", 1.0),
        (config, "cpu_offload", 1),
        (config, "grpo", {"lr": 1.0}),
    ):
        with pytest.raises(ConfigError, match=name):
            setattr(section, name, value)
        assert config == Config()
    config.optimizer = "apex"
    with pytest.raises(ConfigError, match="`optimizer: apex`"):
        config.cpu_offload = True
    assert config == dataclasses.replace(Config(), optimizer="apex")
    config.grpo = GRPOConfig(lr=1)
    assert isinstance(config.grpo.lr, float)


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


def test_the_page_of_every_key_is_that_of_the_schema() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == markdown(), "python -m catmllm.config > docs/configuration.md"
    assert all(f"| `{k.name}` |" in page for k in KEYS)


def test_help_of_a_section_of_a_key_and_of_all() -> None:
    joint = describe("joint")
    assert "joint.position_noise = 0.05" in joint and "float; 0 or more; Å" in joint and "grpo" not in joint
    assert "one of fp32, bf16, fp16" in describe("precision")
    assert "grpo.sampling.top_p" in describe("grpo") and "model.llm.hidden_size" in describe("model")
    everything = describe("all")
    assert all(f"  {k.name} = " in everything for k in KEYS)
    assert "evaluate.sampling" in overview() and "  precision = bf16" in overview()
    with pytest.raises(ConfigError, match="did you mean `joint`"):
        describe("jonit")
    assert max(map(len, f"{everything}\n{overview()}".splitlines())) <= 110


def test_help_into_a_closed_pipe_is_no_traceback(tmp_path: Path) -> None:
    script = ROOT / "catmllm" / "train.py"
    help_ = subprocess.Popen(
        [sys.executable, str(script), "--help", "all"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
    )
    assert help_.stdout is not None and help_.stderr is not None
    help_.stdout.close()  # before a byte was written
    assert help_.stderr.read() == b"" and help_.wait() == 0


def test_a_key_of_a_later_version_had_its_default() -> None:
    """So that a run goes on under a version that knows more keys."""
    old, new = to_dict(Config()), to_dict(Config())
    del old["joint"]["drop_configuration"], old["data"]
    assert list(differences(old, new)) == []
    new["joint"]["drop_configuration"] = 0.25
    old["joint"]["gone"] = 1
    assert list(differences(old, new)) == [
        ("joint.drop_configuration", 0.0, 0.25),
        ("joint.gone", 1, None),
    ]
