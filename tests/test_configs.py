"""Every shipped configuration is valid under the schema."""

from pathlib import Path

import pytest

from catmllm.config import STAGES, ConfigError, load_config

CONFIGS = sorted((Path(__file__).parents[1] / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_configuration_loads(path: Path) -> None:
    config = load_config(path)
    assert set(config.stages) <= set(STAGES) and config.stages


def test_a_preset_asks_for_its_own_graph() -> None:
    with pytest.raises(ConfigError, match=r"data\.cutoff: 12"):
        load_config(None, ["model.encoder.preset=31M"])
    load_config(None, ["model.encoder.preset=31M", "data.cutoff=12", "data.max_neighbours=20"])


def test_there_are_configurations() -> None:
    assert CONFIGS
