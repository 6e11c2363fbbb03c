"""The figures of a report: curves of runs, and bars of classes."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dpsgd.privacy import rounded_up
from dpsgd.report.drawing import (
    LIGHT,
    add_legend,
    figure_of,
    line_style,
    new_axes,
    series_color,
    short_label,
)
from dpsgd.report.outcomes import Comparison
from dpsgd.report.runs import EvaluationLine, RunRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "Curve",
    "accuracy_figure",
    "curves_of",
    "epsilon_figure",
    "loss_figure",
    "outcomes_figure",
    "throughput_figure",
    "utility_figure",
]

_MOST_MARKED = 40  # points of a curve that are still told apart
_MOST_BARS = 24  # groups, above which only the best and worst are drawn


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """One line of a figure.

    Attributes:
        label: Its name in the legend.
        points: (x, y), by x.
        rank: Place of its colour among all lines.
    """

    label: str
    points: tuple[tuple[float, float], ...]
    rank: int


def curves_of(
    runs: Sequence[RunRecord],
    value: Callable[[EvaluationLine], float | None],
    value_ema: Callable[[EvaluationLine], float | None] | None = None,
    *,
    over: Callable[[EvaluationLine], float | None] | None = None,
) -> list[Curve]:
    """Returns the lines of a quantity over another.

    Args:
        runs: One run has a line for each kind of weights; of several, each has one
            line, of its averaged weights if it keeps them.
        value: The quantity, of the last weights or of the run; None leaves it out.
        value_ema: The quantity of the averaged weights, if it has one.
        over: The other quantity, where its None leaves a point out; by default steps,
            or epochs if the steps of runs are not of one size.
    """
    if len(runs) == 1 and value_ema is not None and runs[0].keeps_average:
        (run,) = runs
        named = [("averaged weights", run, value_ema), ("last weights", run, value)]
    else:
        named = [
            (run.name, run, value_ema if value_ema and run.keeps_average else value)
            for run in runs
        ]
    curves, in_epochs = [], _differ_in_steps(runs)
    for rank, (label, run, chosen) in enumerate(named):
        place = over or _progress(run, in_epochs=in_epochs)
        found = [(place(one), chosen(one)) for one in run.evaluations]
        points = [(x, y) for x, y in found if x is not None and y is not None]
        finite = tuple(point for point in points if all(map(math.isfinite, point)))
        if finite:
            curves.append(Curve(label=label, points=finite, rank=rank))
    return curves


def _differ_in_steps(runs: Sequence[RunRecord]) -> bool:
    """Returns whether steps are known to be of several sizes."""
    shares = {run.epochs_per_step for run in runs}
    return len(shares) > 1 and None not in shares


def _progress(
    run: RunRecord, *, in_epochs: bool
) -> Callable[[EvaluationLine], float | None]:
    """Returns what tells how far a run was at an evaluation."""
    share = run.epochs_per_step if in_epochs else 1
    assert share is not None  # epochs are taken if all runs have them
    return lambda one: one.step * share


def accuracy_figure(runs: Sequence[RunRecord]) -> "Figure | None":
    """Draws test accuracy over progress; None if nothing was evaluated."""
    curves = curves_of(runs, lambda one: one.accuracy, lambda one: one.accuracy_ema)
    return _over_progress("Test accuracy, %", runs, curves, scale=100.0)


def utility_figure(runs: Sequence[RunRecord]) -> "Figure | None":
    """Draws test accuracy over the epsilon spent for it; None without any."""
    curves = curves_of(
        runs,
        lambda one: one.accuracy,
        lambda one: one.accuracy_ema,
        over=lambda one: one.epsilon,
    )
    if not curves:
        return None
    with new_axes("Test accuracy, %, over privacy spent") as axes:
        for curve in curves:
            _draw(axes, curve, scale=100.0)
        axes.set_xlabel("epsilon (upper bound)")
        axes.set_xlim(left=0)
        add_legend(axes, [curve.label for curve in curves])
        return figure_of(axes)


def loss_figure(runs: Sequence[RunRecord]) -> "Figure | None":
    """Draws test loss over progress; None if nothing was evaluated."""
    curves = curves_of(runs, lambda one: one.loss, lambda one: one.loss_ema)
    return _over_progress("Test loss, nats", runs, curves, from_zero=True)


def throughput_figure(runs: Sequence[RunRecord]) -> "Figure | None":
    """Draws views a second over progress; None if it was not recorded."""
    curves = curves_of(runs, lambda one: one.views_per_second)
    return _over_progress(
        "Throughput, views a second", runs, curves, from_zero=True, separates=True
    )


def epsilon_figure(runs: Sequence[RunRecord]) -> "Figure | None":
    """Draws the certified epsilon over progress; None if it is infinite or missing.

    It is certified at the steps that were evaluated; between two of them the later
    one bounds it, hence the stairs.
    """
    curves = [
        Curve(label=one.label, points=((0.0, 0.0), *one.points), rank=one.rank)
        for one in curves_of(runs, lambda one: one.epsilon)
    ]
    if not curves:
        return None
    with new_axes("Privacy spent, epsilon (upper bound)") as axes:
        for curve in curves:
            _draw(axes, curve, is_stairs=True)
        if len(runs) == 1 and math.isfinite(runs[0].planned_epsilon or math.inf):
            _draw_limit(axes, runs[0])
        _finish(axes, runs, curves, has_legend=len(runs) > 1)
        _start_at_zero(axes)
        return figure_of(axes)


def outcomes_figure(comparison: Comparison | None) -> "Figure | None":
    """Draws accuracy by class or group with 95 % intervals; None without any.

    Args:
        comparison: Outcomes; of very many groups, the best and the worst are drawn.
    """
    if comparison is None:
        return None
    ranked = comparison.ranked
    half = _MOST_BARS // 2
    shown = ranked
    if len(ranked) > _MOST_BARS:
        shown = [*ranked[:half], *ranked[-half:]]
    title = f"Test accuracy by {short_label(comparison.kind, 18)}, %"
    with new_axes(title, height=0.9 + 0.22 * len(shown)) as axes:
        rows = range(len(shown))
        shares = [100 * one.num_right / one.num_examples for one in shown]
        axes.barh(rows, shares, height=0.62, color=LIGHT["bar"])
        for row, one in zip(rows, shown, strict=True):
            interval = one.interval(one.accuracy)
            assert interval is not None  # a ranked group has examples
            ends = [100 * end for end in interval]
            axes.plot(ends, [row, row], color=LIGHT["ink"], linewidth=1.3)
        if len(shown) < len(ranked):
            axes.axhline(half - 0.5, color=LIGHT["muted"], linestyle=(0, (4, 3)))
            axes.set_xlabel(f"best and worst {half} of {len(ranked):,}")
        axes.set_yticks(rows, [short_label(one.name, 18) for one in shown])
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(False)
        axes.set_xlim(0, 100)
        axes.invert_yaxis()
        return figure_of(axes)


def _over_progress(
    title: str,
    runs: Sequence[RunRecord],
    curves: Sequence[Curve],
    *,
    scale: float = 1.0,
    from_zero: bool = False,
    separates: bool = False,
) -> "Figure | None":
    """Draws lines of runs over steps or epochs; None if there are none."""
    if not curves:
        return None
    with new_axes(title) as axes:
        for curve in curves:
            _draw(axes, curve, scale=scale)
        _finish(axes, runs, curves, has_legend=len(curves) > 1)
        if from_zero:
            _start_at_zero(axes)
        if separates:
            axes.yaxis.set_major_formatter("{x:,.0f}")
        return figure_of(axes)


def _draw(
    axes: "Axes", curve: Curve, *, scale: float = 1.0, is_stairs: bool = False
) -> None:
    """Draws one line; few points are marked, so that a single one is seen."""
    xs, ys = zip(*curve.points, strict=True)
    axes.plot(
        xs,
        [scale * y for y in ys],
        color=series_color(curve.rank),
        linestyle=line_style(curve.rank),
        drawstyle="steps-pre" if is_stairs else "default",
        marker="o" if len(xs) <= _MOST_MARKED else "",
        markersize=3.2,
        label=short_label(curve.label),
    )


def _draw_limit(axes: "Axes", run: RunRecord) -> None:
    """Draws what the run spends in all."""
    limit = run.planned_epsilon
    assert limit is not None  # the caller has looked
    axes.axhline(limit, color=LIGHT["muted"], linewidth=1.0, linestyle=(0, (4, 3)))
    axes.annotate(
        f"planned: {rounded_up(limit, 2)}",
        (0, limit),
        xytext=(4, -4),
        textcoords="offset points",
        va="top",
        color=LIGHT["muted"],
    )


def _finish(
    axes: "Axes",
    runs: Sequence[RunRecord],
    curves: Sequence[Curve],
    *,
    has_legend: bool,
) -> None:
    """Labels the steps or epochs, and names the lines below the axes."""
    from matplotlib.ticker import MaxNLocator

    in_epochs = _differ_in_steps(runs)
    axes.set_xlabel("epochs" if in_epochs else "steps")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=not in_epochs))
    axes.set_xlim(left=0)
    if has_legend:
        add_legend(axes, [curve.label for curve in curves])


def _start_at_zero(axes: "Axes") -> None:
    """Starts the vertical axis at 0, with room above for the highest point."""
    axes.update_datalim([(axes.dataLim.x0, 0.0)])
    axes.autoscale_view(scalex=False)
    axes.set_ylim(bottom=0)
