"""What a run directory says, read tolerantly: what was not recorded is None.

Runs of any age, finished or not, are read; files that cannot be read at all are told.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from dpsgd.errors import ConfigError, fault
from dpsgd.report.metrics import read_metrics
from dpsgd.report.outcomes import Comparison, compare
from dpsgd.report.run_directory import FORMAT, RunDirectory

__all__ = ["EvaluationLine", "RunRecord", "read_evaluations", "read_run"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationLine:
    """One evaluation of metrics.jsonl.

    Attributes:
        step: Steps taken.
        epsilon: Upper bound spent after them; inf without noise, None if not recorded.
        accuracy: Of the last weights on the test set, in [0, 1].
        loss: Of the last weights, in nats; None if it was not finite.
        accuracy_ema: Of the averaged weights, or None.
        loss_ema: Of the averaged weights, or None.
        train_seconds: Time spent in steps, or None.
        views_per_second: Throughput so far, or None.
    """

    step: int
    epsilon: float | None
    accuracy: float
    loss: float | None
    accuracy_ema: float | None
    loss_ema: float | None
    train_seconds: float | None
    views_per_second: float | None


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What one run directory says.

    Attributes:
        name: What the run is called.
        path: The folder.
        settings: Sections of config.yaml.
        plan: plan.json; empty for runs of before it was written.
        result: report.json; empty for a run that is not finished.
        environment: environment.json; empty if it is missing.
        evaluations: Of metrics.jsonl, in the order of their steps.
        num_unprotected: Records of values that noise does not protect.
        checkpoint_step: Of the newest checkpoint, which the last evaluation of an
            interrupted run may be behind; None without any.
    """

    name: str
    path: Path
    settings: Mapping[str, Mapping[str, Any]]
    plan: Mapping[str, Any]
    result: Mapping[str, Any]
    environment: Mapping[str, Any]
    evaluations: tuple[EvaluationLine, ...]
    num_unprotected: int
    checkpoint_step: int | None = None

    @property
    def is_finished(self) -> bool:
        """Whether the run left its result."""
        return bool(self.result)

    @property
    def step(self) -> int:
        """Steps taken, as far as recorded: up to the last evaluation if unfinished."""
        last = self.evaluations[-1].step if self.evaluations else 0
        return int(_number(self.result.get("num_steps")) or last)

    @property
    def planned_steps(self) -> int | None:
        """Steps that the run shall take."""
        planned = self.plan.get("num_steps", self.setting("train", "num_steps"))
        number = _number(planned)
        return None if number is None else int(number)

    @property
    def epochs(self) -> float | None:
        """Passes over the training set that the steps taken amount to, or None."""
        share = self.epochs_per_step
        return None if share is None else self.step * share

    @property
    def epochs_per_step(self) -> float | None:
        """Expected share of the training set in a step, or None if not recorded."""
        size, total = (
            self.number("expected_batch_size"),
            self.number(f"num_{self.unit}s"),
        )
        return size / total if size is not None and total else None

    @property
    def epsilon(self) -> float | None:
        """Upper bound spent at `step`; inf without noise, None if not recorded."""
        if self.is_finished:
            return _epsilon(self.result)
        if self.evaluations:
            return self.evaluations[-1].epsilon
        return math.inf if self.planned_epsilon == math.inf else None

    @property
    def planned_epsilon(self) -> float | None:
        """Upper bound after all steps; inf without noise, None if not recorded."""
        privacy = _mapping(self.settings.get("privacy"))
        planned = _epsilon(self.plan)
        if planned is None:
            planned = _number(privacy.get("target_epsilon"))
        if planned is None and _number(privacy.get("noise_multiplier")) == 0:
            return math.inf
        limit = _number(privacy.get("max_epsilon"))
        return planned if planned is None or limit is None else min(planned, limit)

    @property
    def has_mechanism(self) -> bool:
        """Whether gradients are clipped and noise is added at all."""
        return self.setting("privacy", "enabled") is not False

    @property
    def is_seeded(self) -> bool:
        """Whether the random streams follow from a seed in the settings."""
        return self.setting("train", "seed") is not None

    @property
    def unit(self) -> str:
        """Whose presence is hidden: runs of before it was a choice name no unit."""
        return str(self.text("unit") or self.setting("privacy", "unit") or "example")

    @property
    def noise(self) -> str:
        """The kind of noise: runs of before it was a choice name none."""
        return str(self.text("noise") or self.setting("privacy", "noise") or "standard")

    @property
    def accuracy(self) -> float | None:
        """Test accuracy of the last weights, in [0, 1], at the last evaluation."""
        return self.evaluations[-1].accuracy if self.evaluations else None

    @property
    def accuracy_ema(self) -> float | None:
        """Test accuracy of the averaged weights, in [0, 1], or None."""
        return self.evaluations[-1].accuracy_ema if self.evaluations else None

    @property
    def main_accuracy(self) -> float | None:
        """Accuracy of the averaged weights if they are kept, else of the last."""
        return self.accuracy if self.accuracy_ema is None else self.accuracy_ema

    @property
    def keeps_average(self) -> bool:
        """Whether any evaluation measured averaged weights."""
        return any(line.accuracy_ema is not None for line in self.evaluations)

    @property
    def train_seconds(self) -> float | None:
        """Time spent in steps, as far as recorded, or None."""
        last = self.evaluations[-1].train_seconds if self.evaluations else None
        return self.number("train_seconds") or last

    @property
    def views_per_second(self) -> float | None:
        """Throughput, as far as recorded, or None."""
        last = self.evaluations[-1].views_per_second if self.evaluations else None
        return self.number("views_per_second") or last

    @cached_property
    def by_class(self) -> Comparison | None:
        """Outcomes by class of the weights that report.json measures, or None."""
        return _outcomes("class", self.result, "per_class")

    @cached_property
    def by_group(self) -> Comparison | None:
        """Outcomes by group of the test set; None without groups."""
        kind = str(self.setting("data", "group_column") or "group")
        return _outcomes(kind, self.result, "per_group")

    @property
    def num_test_examples(self) -> int | None:
        """Size of the test set."""
        return None if self.by_class is None else self.by_class.overall.num_examples

    def setting(self, section: str, key: str) -> Any:
        """Returns a setting, or None."""
        return _mapping(self.settings.get(section)).get(key)

    def number(self, name: str) -> float | None:
        """Returns a number of the result, the plan or the settings of privacy."""
        for source in (self.result, self.plan, _mapping(self.settings.get("privacy"))):
            value = _number(source.get(name))
            if value is not None:
                return value
        return None

    def text(self, name: str) -> str | None:
        """Returns a word that the result, the environment or the plan holds."""
        for source in (self.result, self.environment, self.plan):
            if isinstance(source.get(name), str):
                return str(source[name])
        return None

    @property
    def network(self) -> str | None:
        """What the network is called, None if not recorded."""
        model = _mapping(self.settings.get("model"))
        name = model.get("name")
        if name == "wide_resnet":  # the one title of before plan.json recorded it
            name = f"WRN-{model.get('depth')}-{model.get('width')}"
        return self.text("network") or name

    @property
    def versions(self) -> dict[str, str]:
        """Versions of packages by name, of those that were there."""
        found = _mapping(self.environment.get("versions", self.result.get("versions")))
        return {str(name): str(value) for name, value in found.items() if value}


def read_run(path: Path) -> RunRecord:
    """Reads a run directory.

    Args:
        path: Folder that bin/dpsgd-train made.

    Raises:
        ConfigError: It holds no run or an audit, a file of it is damaged, or it was
            written by a newer version of dpsgd.
        UserError: It cannot be read.
    """
    directory = RunDirectory(path)
    directory.require()
    plan = _read(directory.plan, json.loads)
    written = _number(plan.get("format"))
    if written is not None and written > FORMAT:
        rule = f"has format {written:g}, and this version of dpsgd reads up to {FORMAT}"
        raise ConfigError(fault("run_dir", path, rule, "update dpsgd"))
    lines = read_metrics(directory.metrics)
    return RunRecord(
        name=path.resolve().name,
        path=path,
        settings=_read(directory.config, yaml.safe_load),
        plan=plan,
        result=_read(directory.report, json.loads),
        environment=_read(directory.environment, json.loads),
        evaluations=_evaluations(lines),
        num_unprotected=sum("unprotected" in _mapping(line) for line in lines),
        checkpoint_step=directory.newest_checkpoint(),
    )


def read_evaluations(path: Path) -> tuple[EvaluationLine, ...]:
    """Reads the evaluations of a metrics file, wherever it lies."""
    return _evaluations(read_metrics(path))


def _evaluations(lines: list[dict[str, Any]]) -> tuple[EvaluationLine, ...]:
    """Returns the lines that are evaluations, by step."""
    found = []
    for line in map(_mapping, lines):
        step, accuracy = _number(line.get("step")), _number(line.get("test_accuracy"))
        if step is None or accuracy is None:
            continue
        found.append(
            EvaluationLine(
                step=int(step),
                epsilon=_epsilon(line),
                accuracy=accuracy,
                loss=_number(line.get("test_loss")),
                accuracy_ema=_number(line.get("test_accuracy_ema")),
                loss_ema=_number(line.get("test_loss_ema")),
                train_seconds=_number(line.get("train_seconds")),
                views_per_second=_number(line.get("views_per_second")),
            )
        )
    return tuple(sorted(found, key=lambda one: one.step))


def _outcomes(kind: str, result: Mapping[str, Any], key: str) -> Comparison | None:
    """Returns outcomes by class or group; None unless shares and counts are there."""
    shares = _mapping(result.get(f"{key}_accuracy"))
    accuracy, counts = {}, {}
    for name, value in _mapping(result.get(f"{key}_num_examples")).items():
        share, count = _number(shares.get(name)), _number(value)
        if share is not None and count is not None and 0 <= share <= 1 <= count:
            accuracy[str(name)], counts[str(name)] = share, int(count)
    return compare(kind, accuracy, num_examples=counts) if counts else None


def _read(path: Path, parse: Any) -> Mapping[str, Any]:
    """Returns the mapping that a file holds, empty if there is no file."""
    if not path.exists():
        return {}
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        rule = f"{path.name} cannot be read ({reason})"
        remedy = "mend the file, or leave this run out"
        raise ConfigError(fault("run_dir", path.parent, rule, remedy)) from error
    return _mapping(content)


def _mapping(value: Any) -> Mapping[str, Any]:
    """Returns a mapping as it is, anything else as an empty one."""
    return value if isinstance(value, Mapping) else {}


def _number(value: Any) -> float | None:
    """Returns a finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def _epsilon(record: Mapping[str, Any]) -> float | None:
    """Returns a recorded epsilon, whose null stands for infinity."""
    if "epsilon" not in record:
        return None
    return math.inf if record["epsilon"] is None else _number(record["epsilon"])
