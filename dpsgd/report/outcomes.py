"""Accuracy by class or group, how sure it is, and what it lost against a twin.

Clipping and noise cost small and unusual groups more than others (Bagdasaryan et al.
2019, arXiv:1905.12101). A twin, trained without privacy and measured on the same
examples, shows how much of a gap is their doing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from rich.table import Table

from dpsgd.report.intervals import wilson_interval

__all__ = ["Comparison", "Gap", "GroupOutcome", "compare", "comparison_table"]

_CAUTION: Final = (
    "Wilson intervals, 95 %, each for its row alone: one in twenty misses by chance, "
    "and the largest gap of many rows is large by chance, too."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupOutcome:
    """How often a network, and perhaps its twin, is right on a group of examples.

    Attributes:
        name: Of the group.
        num_examples: Test examples of the group, >= 0.
        num_right: Those whose first guess is right.
        twin_right: The same of the twin; None without one.
    """

    name: str
    num_examples: int
    num_right: int
    twin_right: int | None = None

    @property
    def accuracy(self) -> float | None:
        """Share of right guesses, in [0, 1]; None without examples."""
        return self._share(self.num_right)

    @property
    def twin_accuracy(self) -> float | None:
        """The twin's share; None without examples or twin."""
        return self._share(self.twin_right)

    @property
    def change(self) -> float | None:
        """Accuracy less the twin's, in [-1, 1]; None without examples or twin."""
        if self.twin_right is None:
            return None
        return self._share(self.num_right - self.twin_right)

    def interval(self, accuracy: float | None) -> tuple[float, float] | None:
        """Returns the 95 % interval of one of the two accuracies, None if it is."""
        if accuracy is None:
            return None
        return wilson_interval(accuracy, self.num_examples)

    def to_dict(self) -> dict[str, Any]:
        """Returns counts, accuracies and intervals as plain values."""
        facts: dict[str, Any] = {
            "name": self.name,
            "num_examples": self.num_examples,
            "accuracy": self.accuracy,
            "interval": self.interval(self.accuracy),
        }
        if self.twin_right is not None:
            facts["twin_accuracy"] = self.twin_accuracy
            facts["twin_interval"] = self.interval(self.twin_accuracy)
            facts["change"] = self.change
        return facts

    def _share(self, count: int | None) -> float | None:
        """Returns a count as a share of the examples."""
        if count is None or not self.num_examples:
            return None
        return count / self.num_examples


@dataclass(frozen=True, kw_only=True, slots=True)
class Gap:
    """Between the group that something is highest for and the one it is lowest for."""

    size: float
    highest: str
    lowest: str

    def __str__(self) -> str:
        between = f" ({self.highest} - {self.lowest})" if self.size else ""
        return f"{100 * self.size:.1f}{between}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """The outcomes of all groups of one kind.

    Attributes:
        kind: What tells groups apart: `class`, or a column of the test files.
        groups: One outcome for each.
        overall: That of all examples together.
        gaps: Largest gap by what differs: `accuracy`, and with a twin `twin_accuracy`
            and `change`, which is what privacy cost one group more than another.
    """

    kind: str
    groups: tuple[GroupOutcome, ...]
    overall: GroupOutcome
    gaps: Mapping[str, Gap]

    @property
    def ranked(self) -> list[GroupOutcome]:
        """Groups with examples, best first."""
        known = [one for one in self.groups if one.num_examples]
        return sorted(known, key=lambda one: -one.num_right / one.num_examples)

    def to_dict(self) -> dict[str, Any]:
        """Returns outcomes and gaps as plain values, for JSON."""
        return {
            "kind": self.kind,
            "confidence": 0.95,
            "groups": [one.to_dict() for one in self.groups],
            "all": self.overall.to_dict(),
            "largest_gaps": {
                name: {"size": gap.size, "highest": gap.highest, "lowest": gap.lowest}
                for name, gap in self.gaps.items()
            },
        }


def compare(
    kind: str,
    accuracy: Mapping[str, float],
    *,
    num_examples: Mapping[str, int],
    twin_accuracy: Mapping[str, float] | None = None,
) -> Comparison:
    """Returns the outcomes by group of one network, or of two on the same examples.

    Args:
        kind: What tells groups apart.
        accuracy: In [0, 1] by group; anything where there is no example.
        num_examples: Test examples by group, at least one in all.
        twin_accuracy: The twin's accuracy by the same groups.
    """

    def right(shares: Mapping[str, float]) -> dict[str, int]:
        return {
            name: round(shares[name] * count) if count else 0
            for name, count in num_examples.items()
        }

    mine = right(accuracy)
    theirs = None if twin_accuracy is None else right(twin_accuracy)
    groups = tuple(
        GroupOutcome(
            name=name,
            num_examples=count,
            num_right=mine[name],
            twin_right=theirs[name] if theirs is not None else None,
        )
        for name, count in num_examples.items()
    )
    overall = GroupOutcome(
        name="all",
        num_examples=sum(num_examples.values()),
        num_right=sum(mine.values()),
        twin_right=sum(theirs.values()) if theirs is not None else None,
    )
    return Comparison(kind=kind, groups=groups, overall=overall, gaps=_gaps(groups))


def comparison_table(comparison: Comparison) -> Table:
    """Returns a table with a row for each group, all together, and the largest gaps."""
    has_twin = comparison.overall.twin_right is not None
    table = Table(
        title=f"Accuracy by {comparison.kind}, %",
        title_justify="left",
        caption=_CAUTION,
        caption_justify="left",
    )
    table.add_column(comparison.kind, style="bold", overflow="fold")
    headings = ("count", "accuracy", *(("twin", "change") if has_twin else ()))
    for heading in headings:
        table.add_column(heading, justify="right", overflow="fold")
    for one in comparison.groups:
        table.add_row(one.name, *_cells(one)[: len(headings)])
    table.add_section()
    table.add_row("all", *_cells(comparison.overall)[: len(headings)])
    if comparison.gaps:
        values = [str(gap) for gap in comparison.gaps.values()]
        table.add_row("largest gap", "", *values)
    return table


def _gaps(groups: Sequence[GroupOutcome]) -> dict[str, Gap]:
    """Returns the largest gap of every quantity that is known."""
    gaps = {}
    for quantity in ("accuracy", "twin_accuracy", "change"):
        values = {one.name: getattr(one, quantity) for one in groups}
        known = {name: value for name, value in values.items() if value is not None}
        if known:
            highest = max(known, key=known.__getitem__)
            lowest = min(known, key=known.__getitem__)
            size = known[highest] - known[lowest]
            gaps[quantity] = Gap(size=size, highest=highest, lowest=lowest)
    return gaps


def _cells(outcome: GroupOutcome) -> tuple[str, str, str, str]:
    """Returns count, accuracy, twin's accuracy and change as they are shown."""

    def shown(accuracy: float | None) -> str:
        interval = outcome.interval(accuracy)
        if accuracy is None or interval is None:
            return "no examples"
        low, high = interval
        return f"{100 * accuracy:.1f} ({100 * low:.1f}-{100 * high:.1f})"

    change = outcome.change
    return (
        f"{outcome.num_examples:,}",
        shown(outcome.accuracy),
        shown(outcome.twin_accuracy),
        "" if change is None else f"{100 * change:+.1f}",
    )
