"""What every test may use: the folder of real data that lies beside the repository, where there is one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

# Triton reads this when it is first imported; the kernels are tested by its interpreter, on any machine.
os.environ.setdefault("TRITON_INTERPRET", "1")

pytest_plugins = ["tests.contexts", "tests.small_run"]  # fixtures of several folders

if TYPE_CHECKING:
    from catmllm.config import Config
    from catmllm.data.batches import Collator
    from catmllm.models.catalytic_mllm import CatalyticMLLM
    from catmllm.structure.system import System

REPOSITORY = Path(__file__).resolve().parents[1]

# The first call of a Numba function compiles it, and a shared machine stalls: time per example says nothing.
settings.register_profile("catmllm", deadline=None)
settings.load_profile("catmllm")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files whose tests start whole runs come first, so that no process ends with one of them."""
    items.sort(key=lambda item: not (item.path.name == "test_pipeline.py" or item.path.match("behaviour/*")))


def shared_folder() -> Path:
    """The folder that `CATMLLM_SHARED` names (relative to the repository, default ../shared);
    it need not exist."""
    return (REPOSITORY / os.environ.get("CATMLLM_SHARED", "../shared")).resolve()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data; tests that ask for it are skipped where it is absent."""
    folder = shared_folder()
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}; CATMLLM_SHARED names the real data")
    return folder


SMALL_MODEL = (
    "model.llm.hidden_size=64",
    "model.llm.num_hidden_layers=2",
    "model.llm.num_attention_heads=4",
    "model.llm.num_key_value_heads=2",
    "model.llm.intermediate_size=96",
    "model.encoder.num_layers=1",
    "model.encoder.sphere_channels=16",
    "model.encoder.attn_hidden_channels=16",
    "model.encoder.ffn_hidden_channels=16",
    "data.cutoff=5.0",
    "data.max_neighbours=8",
)


@pytest.fixture(scope="session")
def train_systems() -> list[System]:
    """The training part of the shipped systems."""
    from catmllm.data.open import open_data

    return open_data()["train"]


@pytest.fixture(scope="session")
def small_config() -> Config:
    """A configuration whose model answers in milliseconds."""
    from catmllm.config import load_config

    return load_config(None, SMALL_MODEL)


@pytest.fixture(scope="session")
def small_model(small_config: Config, train_systems: list[System]) -> tuple[CatalyticMLLM, Collator]:
    """A small random model, in eval mode, not to be changed: `copy.deepcopy` it first.

    Its weights are larger than usual (x 5, LM head x 25), so that what differs in the input shows in the
    output and some tokens are likelier than others.
    """
    import torch

    from catmllm.models.build import new_model

    model, collate = new_model(small_config, train_systems[::40])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and name.startswith(("llm.", "projector.", "energy_head.")):
                parameter.mul_(25 if "lm_head" in name else 5)
        # zero in a new model, so that nothing would hang on it
        model.energy_head.text.weight.uniform_(-0.6, 0.6)
        model.energy_head.correction.weight.copy_(model.energy_head.text.weight.flip(1))
        model.energy_head.graph[-1].weight.copy_(model.energy_head.graph[2].weight[:1])
        model.energy_mean.fill_(-1.25)
        model.energy_std.fill_(1.5)
    return model.eval(), collate
