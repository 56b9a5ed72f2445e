"""The configuration of a run: its schema, how it is read, and its help.

`schema.py` has a class per section and a line per key. `load_config(files, overrides)` reads YAML files over
the defaults. `python -m catmllm.config` prints docs/configuration.md.
"""

from catmllm.config.load import from_arguments, from_dict, load_config, to_dict
from catmllm.config.schema import (
    PRESET_CUTOFF,
    PRESETS,
    STAGES,
    AlignConfig,
    Config,
    DataConfig,
    EncoderConfig,
    EncoderSizes,
    EncoderStageConfig,
    EvaluateConfig,
    GAGRPOConfig,
    GRPOConfig,
    InstructConfig,
    JointConfig,
    LLMConfig,
    LoRAConfig,
    MixedConfig,
    ModelConfig,
    OptimConfig,
    Preset,
    RewardConfig,
    SamplingConfig,
    Stage,
    SupervisedConfig,
)
from catmllm.config.section import ConfigError, section

__all__ = [
    "PRESETS",
    "PRESET_CUTOFF",
    "STAGES",
    "AlignConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "EncoderConfig",
    "EncoderSizes",
    "EncoderStageConfig",
    "EvaluateConfig",
    "GAGRPOConfig",
    "GRPOConfig",
    "InstructConfig",
    "JointConfig",
    "LLMConfig",
    "LoRAConfig",
    "MixedConfig",
    "ModelConfig",
    "OptimConfig",
    "Preset",
    "RewardConfig",
    "SamplingConfig",
    "Stage",
    "SupervisedConfig",
    "from_arguments",
    "from_dict",
    "load_config",
    "section",
    "to_dict",
]
