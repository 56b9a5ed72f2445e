"""Every shipped configuration is valid under the schema,
alone and in the combinations that it is made for."""

import itertools
from pathlib import Path

import pytest

from catmllm.config import STAGES, ConfigError, load_config, to_dict

ROOT = Path(__file__).parents[1]
STUDIES = ROOT / "configs" / "studies"  # cells of settings, of which tests/test_study.py has more
CONFIGS = sorted(p for p in (ROOT / "configs").rglob("*.yaml") if STUDIES not in p.parents)
A100, H100, ONE = (ROOT / "configs" / name for name in ("a100x8", "h100x8", "h100x1"))
SIZES = ("3b", "7b")
TRAINED = STAGES[1:]  # the encoder comes from a checkpoint


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_configuration_loads(path: Path) -> None:
    config = load_config(path)
    assert set(config.stages) <= set(STAGES) and config.stages


def test_the_papers_settings_go_over_any_file() -> None:
    for base in ("tiny/pipeline.yaml", "a100x8/3b.yaml"):
        c = load_config([base, "paper/printed.yaml"])
        assert (c.grpo.group_size, c.grpo.beta, c.ga_grpo.kl, c.joint.mmtg_sign) == (3, 0.1, "k1", "-")
        assert (c.grpo.sampling.temperature, c.grpo.sampling.top_p, c.grpo.sampling.grammar) == (
            0.7,
            0.9,
            False,
        )
        assert c.grpo.reward == c.ga_grpo.reward == c.evaluate.reward
        assert (c.evaluate.reward.near, c.ga_grpo.pvcp_scale) == (1.0, "raw")
        assert c.model.llm == load_config(base).model.llm


def test_there_are_a_base_per_size_and_a_file_per_stage() -> None:
    assert {p.stem for p in A100.iterdir()} == {*SIZES, *TRAINED}
    assert {p.stem for p in H100.iterdir()} == {*SIZES}  # the stages are a100x8's
    assert {p.stem for p in ONE.iterdir()} == {"3b", *TRAINED}


@pytest.mark.parametrize(
    ("base", "stages"),
    [(f"{folder}/{size}", "a100x8") for folder in ("a100x8", "h100x8") for size in SIZES]
    + [("h100x1/3b", "h100x1")],
)
def test_each_stage_starts_from_the_one_before(base: str, stages: str) -> None:
    """`init` names the folder that the stage before writes: <its out>/<its name>."""
    runs = [load_config([f"{base}.yaml", f"{stages}/{stage}.yaml"]) for stage in TRAINED]
    assert [run.stages for run in runs] == [(stage,) for stage in TRAINED]
    assert runs[0].init is None
    for before, run in itertools.pairwise(runs):
        assert run.init == f"{before.out}/{before.stages[0]}"
        assert (run.model, run.data) == (before.model, before.data)
    assert len({run.out for run in runs}) == len(TRAINED)


def test_the_sizes_are_the_papers() -> None:
    three, seven = (load_config(f"a100x8/{size}.yaml").model for size in SIZES)
    assert (three.llm.pretrained, three.encoder.preset) == ("Qwen/Qwen2.5-VL-3B-Instruct", "31M")
    assert (seven.llm.pretrained, seven.encoder.preset) == ("Qwen/Qwen2.5-VL-7B-Instruct", "153M")


@pytest.mark.parametrize("size", SIZES)
def test_eight_h100s_differ_from_eight_a100s_in_name_and_precision(size: str) -> None:
    a, h = (to_dict(load_config(f"{folder}/{size}.yaml")) for folder in ("a100x8", "h100x8"))
    assert {k for k in a if a[k] != h[k]} == {"name", "precision"}


def test_one_gpu_takes_the_steps_of_eight() -> None:
    """As many samples a step, in more passes."""
    for stage in ("joint", "instruct", "grpo"):
        eight, one = (
            getattr(load_config([f"{folder}/3b.yaml", f"{folder}/{stage}.yaml"]), stage)
            for folder in ("a100x8", "h100x1")
        )
        assert (one.batch_size, one.steps) == (8 * eight.batch_size, eight.steps)


def test_encoder_files_are_called_what_their_address_calls_them() -> None:
    page = (ROOT / "docs" / "exporting.md").read_text(encoding="utf-8")
    for size in SIZES:
        name = Path(str(load_config(f"a100x8/{size}.yaml").model.encoder.checkpoint)).name
        assert f"/{name}" in page, name


def test_a_preset_asks_for_its_own_graph() -> None:
    with pytest.raises(ConfigError, match=r"data\.cutoff: 12"):
        load_config(None, ["model.encoder.preset=31M"])
    load_config(None, ["model.encoder.preset=31M", "data.cutoff=12", "data.max_neighbours=20"])
