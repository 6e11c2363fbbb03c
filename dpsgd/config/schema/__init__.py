"""The settings of a run, one frozen dataclass a section of the YAML file.

    data.py      data
    model.py     model, finetune
    privacy.py   privacy
    training.py  optimizer, ema, train, eval
    runtime.py   runtime, report

Public facts are fields; facts that depend on the data are arguments elsewhere.
Nothing in `runtime` and `report` changes what is learned, beyond float rounding.
"""

from dataclasses import dataclass, field

from dpsgd.config.schema.data import DataConfig
from dpsgd.config.schema.model import FinetuneConfig, ModelConfig
from dpsgd.config.schema.privacy import PrivacyConfig
from dpsgd.config.schema.runtime import ReportConfig, RuntimeConfig
from dpsgd.config.schema.training import (
    EmaConfig,
    EvalConfig,
    OptimizerConfig,
    TrainConfig,
)

__all__ = [
    "Config",
    "DataConfig",
    "EmaConfig",
    "EvalConfig",
    "FinetuneConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PrivacyConfig",
    "ReportConfig",
    "RuntimeConfig",
    "TrainConfig",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """All settings of a run."""

    data: DataConfig
    """Examples and views."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """Network."""

    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    """What is trained of it."""

    privacy: PrivacyConfig
    """Guarantee and mechanism."""

    optimizer: OptimizerConfig
    """Update rule."""

    ema: EmaConfig = field(default_factory=EmaConfig)
    """Parameter averaging."""

    train: TrainConfig
    """Length and seed."""

    eval: EvalConfig = field(default_factory=EvalConfig)
    """Evaluation."""

    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    """Machine."""

    report: ReportConfig = field(default_factory=ReportConfig)
    """Reporting."""

    @property
    def views_per_unit(self) -> int:
        """Views that a pass makes of one unit: K, or K of each of a user's examples."""
        examples = self.privacy.max_examples_per_user or 1
        return examples * self.data.augmentation_multiplicity
