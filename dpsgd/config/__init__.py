"""Typed settings: YAML into frozen dataclasses, every fault told at once."""

from dpsgd.config.loader import (
    config_to_dict,
    load_config,
    parse_config,
    read_yaml,
    unknown_names,
    with_absolute_paths,
    with_later_settings,
)
from dpsgd.config.rules import AugmentationName, NoiseName, PrivacyUnit
from dpsgd.config.schema import (
    Config,
    DataConfig,
    EmaConfig,
    EvalConfig,
    FinetuneConfig,
    ModelConfig,
    OptimizerConfig,
    PrivacyConfig,
    ReportConfig,
    RuntimeConfig,
    TrainConfig,
)

__all__ = [
    "AugmentationName",
    "Config",
    "DataConfig",
    "EmaConfig",
    "EvalConfig",
    "FinetuneConfig",
    "ModelConfig",
    "NoiseName",
    "OptimizerConfig",
    "PrivacyConfig",
    "PrivacyUnit",
    "ReportConfig",
    "RuntimeConfig",
    "TrainConfig",
    "config_to_dict",
    "load_config",
    "parse_config",
    "read_yaml",
    "unknown_names",
    "with_absolute_paths",
    "with_later_settings",
]
