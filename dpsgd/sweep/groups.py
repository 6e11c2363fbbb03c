"""The finished runs of one setting, which differ in nothing but their seed."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpsgd.report import RunRecord
from dpsgd.report.intervals import wilson_interval
from dpsgd.report.words import setting_in_words
from dpsgd.sweep.plan import RECORDED, SEED, SweepRun

__all__ = ["Group", "group_of", "without_seed"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """The finished runs that differ in nothing but their seed.

    Attributes:
        values: What they have in common, by column.
        accuracies: Of averaged weights where they are kept, else of the last.
        recorded: Largest of what the runs recorded, by name; None if one did not.
        has_mechanism: Whether they are private ones.
        num_test_examples: That each was measured on; None if it is not recorded.
    """

    values: Mapping[str, Any]
    accuracies: tuple[float, ...]
    recorded: Mapping[str, float | None]
    has_mechanism: bool
    num_test_examples: int | None

    @property
    def mean(self) -> float:
        """Mean accuracy, in [0, 1]."""
        return statistics.fmean(self.accuracies)

    @property
    def std(self) -> float | None:
        """Sample standard deviation of the accuracies; None of a single one."""
        if len(self.accuracies) < 2:
            return None
        return statistics.stdev(self.accuracies)

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval of a single run for the finite test set; None of several."""
        if len(self.accuracies) > 1 or self.num_test_examples is None:
            return None
        return wilson_interval(self.mean, self.num_test_examples)

    @property
    def error_bar(self) -> tuple[float, float]:
        """Mean less and plus the deviation of several runs; the interval of one."""
        spread = self.std or 0.0
        return self.interval or (self.mean - spread, self.mean + spread)

    def place_on(self, axis: str) -> float | str | None:
        """Returns a number or a word; None if what runs record is not finite."""
        if axis in RECORDED:
            value = self.recorded[axis]
            return None if value is None or math.isinf(value) else value
        value = self.values[axis]
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return float(value) if is_number else setting_in_words(value)

    def row(self) -> dict[str, Any]:
        """Returns plain values by name."""
        return {
            **self.values,
            "runs": len(self.accuracies),
            "accuracy_mean": self.mean,
            "accuracy_std": self.std,
            **self.recorded,
        }


def group_of(run: SweepRun, records: Sequence[RunRecord]) -> Group:
    """Returns finished runs as one.

    Args:
        run: Any of them.
        records: What each of them wrote.
    """
    recorded: dict[str, float | None] = {}
    for name in RECORDED:
        values = [_recorded(record, name) for record in records]
        known = [value for value in values if value is not None]
        recorded[name] = max(known) if len(known) == len(values) else None
    return Group(
        values=without_seed(run),
        accuracies=tuple(
            record.main_accuracy
            for record in records
            if record.main_accuracy is not None
        ),
        recorded=recorded,
        has_mechanism=all(record.has_mechanism for record in records),
        num_test_examples=records[0].num_test_examples,
    )


def _recorded(record: RunRecord, name: str) -> float | None:
    """Returns one of the recorded quantities of a run."""
    if name == "epochs":
        return record.epochs
    return record.epsilon if name == "epsilon" else record.number(name)


def without_seed(run: SweepRun) -> dict[str, Any]:
    """Returns what tells a run from those that are no repetitions of it."""
    return {key: value for key, value in run.values.items() if key != SEED}
