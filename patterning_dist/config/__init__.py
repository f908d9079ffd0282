"""The experiment file: one strict schema, read from YAML with `--set` overrides; no torch, no ray."""

from patterning_dist.config.calibration import CalibrationConfig
from patterning_dist.config.data import (
    DataConfig,
    FunctionDataConfig,
    LabelledConfig,
    PairsConfig,
    SourceConfig,
    TableConfig,
    TextConfig,
    TokensConfig,
)
from patterning_dist.config.load import config_schema, dump_config, load_config
from patterning_dist.config.model import (
    AttentionOnlyConfig,
    HuggingFaceConfig,
    ModelConfig,
    ModuleConfig,
    TaskConfig,
)
from patterning_dist.config.response import CheckConfig, DirectionConfig, PredictConfig, ResponseConfig, SolveConfig
from patterning_dist.config.root import Root
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
from patterning_dist.config.schema import BASELINE, Config, TracesConfig
from patterning_dist.config.training import ArmConfig, RetrainConfig, TrainingConfig
from patterning_dist.config.validation import ValidationConfig

__all__ = [
    "BASELINE",
    "ArmConfig",
    "AttentionOnlyConfig",
    "CalibrationConfig",
    "CheckConfig",
    "ComponentConfig",
    "ComponentLossConfig",
    "Config",
    "DataConfig",
    "DirectionConfig",
    "FreeEnergyConfig",
    "FunctionConfig",
    "FunctionDataConfig",
    "HuggingFaceConfig",
    "LabelledConfig",
    "LlcConfig",
    "ModelConfig",
    "ModuleConfig",
    "ObservableConfig",
    "PairsConfig",
    "PredictConfig",
    "ResponseConfig",
    "RetrainConfig",
    "Root",
    "SamplingConfig",
    "SolveConfig",
    "SourceConfig",
    "SplitLossConfig",
    "TableConfig",
    "TaskConfig",
    "TextConfig",
    "TokensConfig",
    "TracesConfig",
    "TrainingConfig",
    "ValidationConfig",
    "config_schema",
    "dump_config",
    "load_config",
]
