"""What a sweep has found: a row a run, and a row for all seeds of a setting."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from dpsgd.report import RunRecord, read_run, to_json
from dpsgd.report.statement import joint_epsilon
from dpsgd.report.words import (
    NONE,
    epsilon_in_words,
    percent,
    setting_in_words,
    significant,
    steps_in_words,
)
from dpsgd.sweep.figure import Point
from dpsgd.sweep.folder import RunState, SweepFolder
from dpsgd.sweep.groups import Group, group_of, without_seed
from dpsgd.sweep.plan import ENTRY, RECORDED, SEED, STEPS, SweepPlan, SweepRun

__all__ = ["NOTE", "RunResult", "SweepResults", "collect"]

NOTE: Final = (
    "Choosing settings by the results of runs on private data uses the data once for "
    "each run, which the epsilon of the run that is chosen does not cover. Tables of "
    "results are a release, too: of what all runs spend together."
)
"""What must stand beside the results of a sweep."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunResult:
    """One run and what it reached.

    Attributes:
        run: What was asked for.
        state: How far it has come.
        record: What it wrote; None if it has not begun.
    """

    run: SweepRun
    state: RunState
    record: RunRecord | None

    def row(self) -> dict[str, Any]:
        """Returns plain values by name, null where there is none."""
        record = self.record
        numbers = ("delta", "noise_multiplier", "views_per_second", "train_seconds",
                   "wall_time_seconds", "peak_memory_bytes")  # fmt: skip
        last = record.evaluations[-1] if record and record.evaluations else None
        return {
            "index": self.run.index,
            "run": self.run.label,
            "status": self.state.status,
            **self.run.values,
            "step": record.step if record else 0,
            "num_steps": self.run.config.train.num_steps,
            "test_accuracy": last.accuracy if last else None,
            "test_accuracy_ema": last.accuracy_ema if last else None,
            "test_loss": last.loss if last else None,
            "test_loss_ema": last.loss_ema if last else None,
            "epsilon": record.epsilon if record else None,
            "planned_epsilon": record.planned_epsilon if record else None,
            **{name: record.number(name) if record else None for name in numbers},
            "folder": self.run.folder,
            "error": self.state.error,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepResults:
    """All that a sweep has found so far.

    Attributes:
        plan: What was asked for.
        runs: In the order of the plan.
        others: Runs of other settings that an earlier sweep file asked for: they are
            in no table, but what they spent was spent.
    """

    plan: SweepPlan
    runs: Sequence[RunResult]
    others: Sequence[RunRecord] = ()

    def with_status(self, *statuses: str) -> list[RunResult]:
        """Returns the runs that have come so far."""
        return [one for one in self.runs if one.state.status in statuses]

    def groups(self) -> list[Group]:
        """Returns the finished runs, those of other seeds together."""
        members: dict[str, list[RunResult]] = {}
        for one in self.with_status("finished"):
            if one.record is not None and one.record.main_accuracy is not None:
                members.setdefault(to_json(without_seed(one.run)), []).append(one)
        return [
            group_of(found[0].run, [one.record for one in found if one.record])
            for found in members.values()
        ]

    def lines(self, axis: str) -> list[tuple[str, list[Point]]]:
        """Returns the lines of the figure that has one quantity on its axis.

        Args:
            axis: One of `plan.axes`.

        Returns:
            Label and points of each line, by x where it is a number. What else is
            swept tells the lines apart; on the axis of a recorded quantity, steps and
            what is on another figure's axis move along a line.
        """
        apart = [one for one in self.told_columns(SEED) if one != axis]
        if axis in RECORDED:
            apart = [one for one in apart if one not in (*self.plan.axes, STEPS)]
        if axis in self.plan.listed:  # which the names of entries stand for
            apart = [one for one in apart if one != ENTRY]
        found: dict[str, list[Point]] = {}
        for group in self.groups():
            x = group.place_on(axis)
            if x is None:
                continue
            told = _told({key: group.values[key] for key in apart})
            low, high = group.error_bar
            point = Point(x=x, mean=group.mean, low=low, high=high)
            found.setdefault(told, []).append(point)
        return [(label, _by_x(points)) for label, points in found.items()]

    def joint(self) -> tuple[float, float] | None:
        """Returns epsilon and delta of all runs that have begun, together."""
        begun = self._begun()
        if not begun or any(record.is_seeded for record in begun):
            return None
        return joint_epsilon(begun)

    def _begun(self) -> list[RunRecord]:
        """Returns the records of all runs that have begun, asked for or not."""
        asked = [one.record for one in self.runs if one.record is not None]
        return [*asked, *self.others]

    def json(self) -> str:
        """Returns everything as strict JSON."""
        joint = self.joint()
        content = {
            "note": NOTE,
            "joint_epsilon": joint and joint[0],
            "joint_delta": joint and joint[1],
            "joint_unit": joint and self._begun()[0].unit,
            "summary": [group.row() for group in self.groups()],
            "runs": [one.row() for one in self.runs],
        }
        return to_json(content, indent=1) + "\n"

    def markdown(self) -> str:
        """Returns the tables for people, the note first."""
        parts = [f"# {self.plan.path.stem}", NOTE, self.joint_in_words()]
        for heading, table in (
            ("Summary", self.summary_table()),
            ("Runs", self.runs_table()),
        ):
            parts += [f"## {heading}", _markdown(*table)]
        failures = self.failures()
        if failures:
            lines = [f"* {label}: {error}" for label, error in failures]
            parts += ["## Failed", "\n".join(lines)]
        return "\n\n".join(parts) + "\n"

    def summary_table(self) -> tuple[list[str], list[list[str]]]:
        """Returns headings and rows of the settings, in words."""
        columns = self.told_columns(SEED)
        rows = [
            [
                *(setting_in_words(group.values[one]) for one in columns),
                percent(group.mean, 2),
                "-" if group.std is None else percent(group.std, 2),
                str(len(group.accuracies)),
                significant(group.recorded["noise_multiplier"], 5)
                if group.has_mechanism
                else NONE,
                epsilon_in_words(group.recorded["epsilon"]),
            ]
            for group in self.groups()
        ]
        told = ["accuracy, mean", "std", "runs", "noise multiplier", "epsilon"]
        return [*columns, *told], rows

    def runs_table(self) -> tuple[list[str], list[list[str]]]:
        """Returns headings and rows of the runs, in words."""
        rows = []
        for one in self.runs:
            row = one.row()
            rows.append(
                [
                    str(row["index"]),
                    row["run"],
                    row["status"],
                    steps_in_words(
                        row["step"],
                        row["num_steps"],
                        one.record.checkpoint_step if one.record else None,
                    ),
                    _accuracy(row["test_accuracy_ema"]),
                    _accuracy(row["test_accuracy"]),
                    "-" if one.record is None else epsilon_in_words(row["epsilon"]),
                ]
            )
        headings = ["#", "run", "status", "steps", "averaged", "last", "epsilon"]
        return headings, rows

    def told_columns(self, *left_out: str) -> list[str]:
        """Returns the columns for people: the name of an entry stands for its keys."""
        named = ENTRY in self.plan.columns
        hidden = (*left_out, *(self.plan.listed if named else ()))
        return [one for one in self.plan.columns if one not in hidden]

    def failures(self) -> list[tuple[str, str]]:
        """Returns the runs that failed, with what they said last."""
        failed = self.with_status("failed")
        return [(one.run.label, one.state.error or "") for one in failed]

    def joint_in_words(self) -> str:
        """Returns what all runs have spent together."""
        joint, begun = self.joint(), self._begun()
        if not begun:
            return "No run has begun."
        told = []
        if any(record.is_seeded for record in begun):
            told.append("Runs are seeded: those may not be released as private.")
        spent = joint_epsilon(begun)
        if spent is not None and math.isinf(spent[0]):  # whatever is seeded
            told.append("Together the runs have no privacy guarantee.")
        if told:
            return " ".join(told)
        if joint is None:
            return (
                "What the runs spend together is not recorded, or is not of one unit "
                "of privacy."
            )
        ended = all(record.is_finished for record in begun)
        return (
            f"All {len(begun)} runs that have begun, on the same private data: "
            f"({epsilon_in_words(joint[0])}, {significant(joint[1])})-differentially "
            f"private per {begun[0].unit} together, by basic composition"
            f"{'' if ended else ', once they are finished'}."
        )

    def contents(self) -> dict[str, bytes]:
        """Returns the tables as files, by name."""
        return {
            "results.json": self.json().encode(),
            "results.csv": _csv([one.row() for one in self.runs]),
            "summary.csv": _csv([group.row() for group in self.groups()]),
            "results.md": self.markdown().encode(),
        }


def collect(folder: SweepFolder, plan: SweepPlan) -> SweepResults:
    """Reads what the runs of a sweep have left by now.

    Raises:
        ConfigError: A run directory is damaged.
    """
    found = []
    for run in plan.runs:
        directory = folder.directory(run)
        record = None
        if directory.config.is_file():
            record = replace(read_run(directory.path), name=run.label)
        found.append(RunResult(run=run, state=folder.state(run), record=record))
    others = [read_run(path) for path in folder.others(plan)]
    return SweepResults(plan=plan, runs=found, others=others)


def _told(values: Mapping[str, Any]) -> str:
    """Returns the label of a line."""
    return ", ".join(
        str(value)
        if key == ENTRY
        else f"{key.rpartition('.')[2]} {setting_in_words(value)}"
        for key, value in values.items()
    )


def _by_x(points: list[Point]) -> list[Point]:
    """Returns points by x if they are numbers, else as they come."""
    if all(isinstance(point.x, float) for point in points):
        return sorted(points, key=lambda point: float(point.x))
    return points


def _accuracy(value: float | None) -> str:
    """Returns an accuracy, or a dash."""
    return "-" if value is None else percent(value, 2)


def _csv(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Returns rows of plain values as CSV; lists stand as JSON."""
    names = dict.fromkeys(name for row in rows for name in row)
    stream = io.StringIO()
    writer = csv.DictWriter(stream, names, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        shown = {
            name: to_json(value) if isinstance(value, list) else value
            for name, value in row.items()
        }
        writer.writerow(shown)
    return stream.getvalue().encode()


def _markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table in Markdown."""
    lines = [headings, ["--"] * len(headings), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |"
        for line in lines
    )
