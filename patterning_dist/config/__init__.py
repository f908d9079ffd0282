"""The experiment file: one strict schema, read from YAML with `--set` overrides; no torch, no ray."""

from patterning_dist.config.calibration import CalibrationConfig
from patterning_dist.config.load import AnyConfig, config_schema, dump_config, load_config
from patterning_dist.config.sampling import (
    ComponentConfig,
    ComponentLossConfig,
    FreeEnergyConfig,
    FunctionConfig,
    LlcConfig,
    ObservableConfig,
    SamplingConfig,
    SplitLossConfig,
)
from patterning_dist.config.schema import (
    Config,
    DataConfig,
    DirectionConfig,
    ModelConfig,
    ResponseConfig,
    RetrainConfig,
    SolveConfig,
    SourceConfig,
    TrainingConfig,
)
from patterning_dist.config.study import (
    FunctionDataConfig,
    HuggingFaceModelConfig,
    ModuleModelConfig,
    StudyConfig,
    TokensConfig,
    TracesConfig,
)
from patterning_dist.experiments.two_rules.config import ParenthesesConfig

__all__ = [
    "AnyConfig",
    "CalibrationConfig",
    "ComponentConfig",
    "ComponentLossConfig",
    "Config",
    "DataConfig",
    "DirectionConfig",
    "FreeEnergyConfig",
    "FunctionConfig",
    "FunctionDataConfig",
    "HuggingFaceModelConfig",
    "LlcConfig",
    "ModelConfig",
    "ModuleModelConfig",
    "ObservableConfig",
    "ParenthesesConfig",
    "ResponseConfig",
    "RetrainConfig",
    "SamplingConfig",
    "SolveConfig",
    "SourceConfig",
    "SplitLossConfig",
    "StudyConfig",
    "TokensConfig",
    "TracesConfig",
    "TrainingConfig",
    "config_schema",
    "dump_config",
    "load_config",
]
