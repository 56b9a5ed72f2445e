"""What is missing is told before anything is loaded, a line each with what to do."""

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from catmllm.config import ConfigError, load_config
from catmllm.config.needs import check_needs

ROOT = Path(__file__).parents[1]
MISSING = {
    "flash_attn": ("model.llm.attention=flash_attention_2", "pip install --no-build-isolation flash-attn"),
    "apex": ("optimizer=apex", "github.com/NVIDIA/apex"),
    "peft": ("lora.r=8", "pip install peft"),
    "sevenn": ("evaluate.judge=sevennet", "pip install sevenn"),
    "diep": ("evaluate.judge=diep", "pip install --no-deps --group weights"),
}


def without(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """As on a machine that does not have these packages."""
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *a: None if name.partition(".")[0] in names else find(name, *a),
    )


def test_nothing_is_missing_for_the_tiny_pipeline() -> None:
    check_needs(load_config())


@pytest.mark.parametrize("package", MISSING)
def test_a_missing_package_is_a_line_with_its_install_command(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    option, says = MISSING[package]
    without(monkeypatch, package)
    with pytest.raises(ConfigError) as error:
        check_needs(load_config(None, ["evaluate.judge=none", option]))
    message = str(error.value)
    key = option.partition("=")[0]
    assert says in message and "\n" not in message and message.startswith(f"`{key}")


def test_a_predictor_that_is_not_there_is_missed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"`ga_grpo.predictor: .*/none` is not there"):
        check_needs(load_config(None, ["evaluate.judge=none", f"ga_grpo.predictor={tmp_path}/none"]))
    check_needs(load_config(None, ["evaluate.judge=none", f"ga_grpo.predictor={tmp_path}"]))


def test_what_is_not_asked_for_is_not_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, *MISSING)
    check_needs(load_config(None, ["evaluate.judge=none"]))
    check_needs(load_config(None, ["stages=[align, joint]"]))
    check_needs(load_config(None, ["stages=[align]", "lora.r=8", "grpo.vllm=nowhere"]))


def test_pypis_apex_is_not_nvidias(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex/__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    with pytest.raises(ConfigError, match="the `apex` of PyPI is another package"):
        check_needs(load_config(None, ["optimizer=apex"]))
    (tmp_path / "apex/optimizers.py").write_text("")
    check_needs(load_config(None, ["optimizer=apex"]))
    for name in ("apex", "apex.optimizers"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_a_python_for_vllm_is_there_and_has_vllm(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"`grpo\.vllm: nowhere/python` is no program; .*pip install vllm"):
        check_needs(load_config(None, ["grpo.vllm=nowhere/python"]))
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env/bin/python"
    with pytest.raises(ConfigError, match=r"has no vLLM: .*env/bin/python -m pip install vllm"):
        check_needs(load_config(None, [f"grpo.vllm={python}"]))
    packages = next((tmp_path / "env/lib").glob("python*/site-packages"))
    (packages / "vllm.py").write_text("raise RuntimeError('looked for, not loaded')")
    check_needs(load_config(None, [f"grpo.vllm={python}"]))


def test_missing_files_are_told_with_where_they_come_from(tmp_path: Path) -> None:
    options = [
        f"out={tmp_path}/run",
        f"data.path={tmp_path}/oc20",
        f"model.encoder.checkpoint={tmp_path}/a.pt",
    ]
    with pytest.raises(ConfigError) as error:
        check_needs(load_config(None, options))
    lines = str(error.value).splitlines()
    assert len(lines) == 2
    assert f"`data.path: {tmp_path}/oc20` is not there: catmllm data oc20" in lines[0]
    assert f"`model.encoder.checkpoint: {tmp_path}/a.pt` is not there; docs/exporting.md" in lines[1]
    (tmp_path / "oc20").mkdir()
    check_needs(load_config(None, [*options, f"init={tmp_path}/before"]))  # the weights come from there
    (tmp_path / "run/encoder").mkdir(parents=True)
    (tmp_path / "run/encoder/model.safetensors").touch()
    check_needs(load_config(None, options))


def test_a_run_ends_before_it_begins(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "catmllm/train.py"),
        f"out={tmp_path}/run",
        f"data.path={tmp_path}/none",
    ]
    environment = {k: v for k, v in os.environ.items() if k != "CATMLLM_TRACEBACK"}
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert run.returncode == 2 and not (tmp_path / "run").exists()
    assert run.stderr.startswith("error: `data.path:") and run.stderr.count("\n") == 1
