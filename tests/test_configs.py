"""Every shipped configuration is valid under the schema."""

from pathlib import Path

import pytest

from catmllm.config import STAGES, load_config

CONFIGS = sorted((Path(__file__).parents[1] / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_configuration_loads(path: Path) -> None:
    config = load_config(path)
    assert set(config.stages) <= set(STAGES) and config.stages


def test_there_are_configurations() -> None:
    assert CONFIGS
