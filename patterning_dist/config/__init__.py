"""The experiment file: one strict schema, read from YAML with `--set` overrides; no torch, no ray."""

from patterning_dist.config.load import config_schema, dump_config, load_config
from patterning_dist.config.sampling import (
    ComponentConfig,
    ComponentLossConfig,
    FunctionConfig,
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

__all__ = [
    "ComponentConfig",
    "ComponentLossConfig",
    "Config",
    "DataConfig",
    "DirectionConfig",
    "FunctionConfig",
    "ModelConfig",
    "ObservableConfig",
    "ResponseConfig",
    "RetrainConfig",
    "SamplingConfig",
    "SolveConfig",
    "SourceConfig",
    "SplitLossConfig",
    "TrainingConfig",
    "config_schema",
    "dump_config",
    "load_config",
]
