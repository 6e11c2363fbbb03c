"""The report of a sweep: tables and figures for people, the privacy note first."""

from collections.abc import Sequence

from dpsgd.report import RunRecord
from dpsgd.report.figures import accuracy_figure, loss_figure
from dpsgd.report.markup import Markup, element
from dpsgd.report.page import Drawn, Report, draw, figures, page, section, table
from dpsgd.sweep.figure import sweep_figure
from dpsgd.sweep.groups import Group
from dpsgd.sweep.plan import ENTRY, SEED
from dpsgd.sweep.results import NOTE, SweepResults

__all__ = ["sweep_report"]

_MOST_CURVES = 16  # runs, above which curves could not be told apart


def sweep_report(results: SweepResults) -> Report:
    """Returns the page of a sweep, of what is there by now."""
    plan = results.plan
    drawn = _axes(results)
    keys = results.told_columns(SEED)
    records = [one.record for one in results.runs if one.record is not None]
    curves = _curves(records)
    body = [
        section("Privacy", element("p", NOTE), element("p", results.joint_in_words())),
        section("Summary", figures(drawn), _table(results.summary_table(), len(keys))),
        section("Runs", _table(results.runs_table(), 3)),
    ]
    failures = [
        element("li", element("b", label), f": {error}")
        for label, error in results.failures()
    ]
    if failures:
        body.append(section("Failed", element("ul", *failures)))
    if curves:
        body.append(section("Curves", figures(curves)))
    states = {one.state.status for one in results.runs}
    counts = [f"{len(results.with_status(one))} {one}" for one in sorted(states)]
    html = page(
        plan.path.stem, "Sweep", f"{len(results.runs)} runs: {', '.join(counts)}", *body
    )
    return Report(html, [*drawn, *curves])


def _axes(results: SweepResults) -> list[Drawn]:
    """Returns a figure for each axis."""
    drawn: list[Drawn] = []
    for number, axis in enumerate(results.plan.axes):
        drawn += draw(
            f"sweep-{number}" if number else "sweep",
            sweep_figure(
                results.lines(axis),
                x_label="" if axis == ENTRY else axis,
                is_scale=axis == "noise_multiplier",
            ),
            f"Final test accuracy over {axis}.",
            _error_bars_in_words(
                [one for one in results.groups() if one.place_on(axis) is not None]
            ),
        )
    return drawn


def _error_bars_in_words(groups: Sequence[Group]) -> str:
    """Returns what a figure shows of several seeds, and of single runs."""
    parts = ["Averaged weights where they are kept."]
    if any(group.std is not None for group in groups):
        parts.append("Of several seeds the mean, with bars of a standard deviation.")
    if any(group.interval is not None for group in groups):
        bars = "95 % intervals (Wilson) for the finite test set"
        parts.append(f"Bars of single runs are {bars}.")
    return " ".join(parts)


def _curves(records: Sequence[RunRecord]) -> list[Drawn]:
    """Returns the curves of the runs, unless they are too many."""
    if len(records) > _MOST_CURVES:
        return []
    return [
        *draw("accuracy", accuracy_figure(records), "Test accuracy over steps."),
        *draw("loss", loss_figure(records), "Test loss over steps."),
    ]


def _table(content: tuple[list[str], list[list[str]]], text_columns: int) -> Markup:
    """Returns a table, or that there is nothing to show yet."""
    headings, rows = content
    if not rows:
        return element("p", "No run has finished yet.", class_="muted")
    return table(
        headings, rows, label="Results of the sweep", text_columns=text_columns
    )
