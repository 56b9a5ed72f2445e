"""What a configuration needs that may not be there: packages, a Python with vLLM, files.

`check_needs` looks before anything is loaded, so that what is missing is one line with the command that
brings it, and not a traceback after hours of training. Reading a configuration does not look: a run can be
reported and planned elsewhere.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from catmllm.config.schema import Config
from catmllm.config.section import ConfigError

APEX = (
    "it is built from a clone of github.com/NVIDIA/apex by `APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v "
    "--no-build-isolation .` (the `apex` of PyPI is another package); or leave the default, `optimizer: "
    "torch`"
)


def check_needs(config: Config) -> None:
    """Raises ConfigError with a line for everything that is missing."""
    if missing := list(_missing(config)):
        raise ConfigError("\n".join(missing))


def _missing(config: Config) -> Iterator[str]:
    stages, llm, encoder = config.stages, config.model.llm, config.model.encoder
    if llm.attention == "flash_attention_2" and not _installed("flash_attn"):
        yield (
            "`model.llm.attention: flash_attention_2` needs flash-attn: "
            "pip install --no-build-isolation flash-attn; or leave the default, `varlen`"
        )
    if config.optimizer == "apex" and not _installed("apex", "apex.optimizers"):
        yield f"`optimizer: apex` needs NVIDIA's apex: {APEX}"
    if config.lora.r and {"joint", "instruct", "grpo"} & {*stages} and not _installed("peft"):
        yield "`lora.r` needs peft: pip install peft"
    if config.store is not None:
        yield from _missing_store("store", config.store)
    if config.init is not None and "://" in config.init:
        yield from _missing_store("init", config.init)
    if "ga_grpo" in stages and config.evaluate.judge == "sevennet" and not _installed("sevenn"):
        yield "`evaluate.judge: sevennet` needs sevenn: pip install sevenn; or take `evaluate.judge: none`"
    if "ga_grpo" in stages and config.evaluate.judge == "diep" and not _installed("diep"):
        yield (
            "`evaluate.judge: diep` needs DIEP's weights: pip install --no-deps --group weights; or take "
            "`evaluate.judge: none`"
        )
    for name, stage in (("grpo", config.grpo), ("ga_grpo", config.ga_grpo)):
        if name in stages and stage.vllm is not None:
            yield from _missing_vllm(name, stage.vllm)
    if config.data.path is not None and not Path(config.data.path).exists():
        yield (
            f"`data.path: {config.data.path}` is not there: "
            f"catmllm data oc20 SOURCES --out {config.data.path}"
        )
    predictor = config.ga_grpo.predictor
    if predictor is not None and not Path(predictor).is_dir():
        yield f"`ga_grpo.predictor: {predictor}` is not there; give the folder of a run or of a stage"
    begun = bool(stages) and (Path(config.out) / stages[0] / "model.safetensors").is_file()
    if encoder.checkpoint and config.init is None and not begun and not Path(encoder.checkpoint).is_file():
        yield (
            f"`model.encoder.checkpoint: {encoder.checkpoint}` is not there; "
            "docs/exporting.md has its address"
        )


def _installed(*names: str) -> bool:
    """Whether the modules can be found; those inside a package load the package."""
    try:
        return all(importlib.util.find_spec(name) is not None for name in names)
    except ImportError:
        return False


def _missing_store(key: str, address: str) -> Iterator[str]:
    from fsspec.registry import known_implementations

    scheme, found, _ = address.partition("://")
    if not found or scheme not in known_implementations:
        yield f"`{key}: {address}` is no address of a store, such as s3://bucket/runs/mine"
        return
    module = known_implementations[scheme]["class"].partition(".")[0]
    if not _installed(module):
        yield f"`{key}: {address}` needs {module}: pip install {module}"


def _missing_vllm(stage: str, python: str) -> Iterator[str]:
    found = shutil.which(python)
    if found is None:
        yield (
            f"`{stage}.vllm: {python}` is no program; it is the Python of an environment with vLLM: python "
            f"-m venv vllm && vllm/bin/pip install vllm, then {stage}.vllm=vllm/bin/python"
        )
        return
    look = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    if subprocess.run([found, "-c", look], capture_output=True, check=False).returncode:
        yield f"`{stage}.vllm: {python}` has no vLLM: {python} -m pip install vllm"
