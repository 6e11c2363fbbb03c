"""The figures of a report: curves of runs, bars of classes, results of sweeps."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from dpsgd.privacy import rounded_up
from dpsgd.report.drawing import LIGHT, SERIES, new_axes
from dpsgd.report.outcomes import Comparison
from dpsgd.report.runs import EvaluationLine, RunRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "Curve",
    "Point",
    "accuracy_figure",
    "curves_of",
    "epsilon_figure",
    "loss_figure",
    "outcomes_figure",
    "sweep_figure",
    "throughput_figure",
    "utility_figure",
]

_MOST_MARKED = 40  # points of a curve that are still told apart
_MOST_BARS = 24  # groups, above which only the best and worst are drawn
_LONGEST_LABEL = 34
_LEGEND_LETTERS = 68  # in a line of a legend
_LEGEND_ROW = 0.19  # inches
_STYLES: Final = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)))
# Largest over smallest value of an axis: of any quantity, and of one that is a scale.
_LOGARITHMIC_FROM = (8.0, 2.0)
_MOST_TICKS = 8
_WIDE = 30.0  # span, above which round numbers would crowd a logarithmic axis


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """The runs of a sweep that differ in nothing but their seed.

    Attributes:
        x: Value of the key on the axis: a number, or a word.
        mean: Of their accuracies, in [0, 1].
        low: Lower end of the error bar, <= mean.
        high: Upper end, >= mean.
    """

    x: float | str
    mean: float
    low: float
    high: float


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
    curves = []
    for rank, (label, run, chosen) in enumerate(named):
        place = over or _progress(run, in_epochs=_differ_in_steps(runs))
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
    return _over_steps("Test accuracy, %", runs, curves, scale=100.0)


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
        _legend(axes, [curve.label for curve in curves])
        return _figure(axes)


def loss_figure(runs: Sequence[RunRecord]) -> "Figure | None":
    """Draws test loss over progress; None if nothing was evaluated."""
    curves = curves_of(runs, lambda one: one.loss, lambda one: one.loss_ema)
    return _over_steps("Test loss, nats", runs, curves, from_zero=True)


def throughput_figure(runs: Sequence[RunRecord]) -> "Figure | None":
    """Draws views a second over steps; None if it was not recorded."""
    curves = curves_of(runs, lambda one: one.views_per_second)
    return _over_steps(
        "Throughput, views a second", runs, curves, from_zero=True, separates=True
    )


def epsilon_figure(runs: Sequence[RunRecord]) -> "Figure | None":
    """Draws the certified epsilon over steps; None if it is infinite or missing.

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
        return _figure(axes)


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
    title = f"Test accuracy by {_short(comparison.kind, 18)}, %"
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
        axes.set_yticks(rows, [_short(one.name, 18) for one in shown])
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(False)
        axes.set_xlim(0, 100)
        axes.invert_yaxis()
        return _figure(axes)


def sweep_figure(
    lines: Sequence[tuple[str, Sequence[Point]]],
    *,
    x_label: str,
    is_scale: bool = False,
) -> "Figure | None":
    """Draws final accuracy against a swept key, with error bars.

    Args:
        lines: Label and points of each line; x values are all numbers or all words.
        x_label: The key.
        is_scale: Whether ratios of it are what matters, as of noise.
    """
    lines = [(label, points) for label, points in lines if points]
    if not lines:
        return None
    ticks = _distinct([point.x for _, points in lines for point in points])
    numbers = [x for x in ticks if not isinstance(x, str)]
    is_numeric = len(numbers) == len(ticks)
    with new_axes("Test accuracy, %") as axes:
        for rank, (label, points) in enumerate(lines):
            places = [
                point.x if is_numeric else ticks.index(point.x) for point in points
            ]
            axes.errorbar(
                places,
                [100 * point.mean for point in points],
                yerr=[
                    [100 * (point.mean - point.low) for point in points],
                    [100 * (point.high - point.mean) for point in points],
                ],
                color=_color(rank),
                linestyle=_line_style(rank) if is_numeric else "none",
                marker="o",
                markersize=4.5,
                capsize=3,
                label=_short(label),
            )
        if is_numeric:
            _number_axis(axes, sorted(numbers), is_scale=is_scale)
        else:
            _word_axis(axes, [str(x) for x in ticks])
        axes.set_xlabel(x_label)
        if len(lines) > 1:
            _legend(axes, [label for label, _ in lines])
        return _figure(axes)


def _over_steps(
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
        return _figure(axes)


def _draw(
    axes: "Axes", curve: Curve, *, scale: float = 1.0, is_stairs: bool = False
) -> None:
    """Draws one line; few points are marked, so that a single one is seen."""
    xs, ys = zip(*curve.points, strict=True)
    axes.plot(
        xs,
        [scale * y for y in ys],
        color=_color(curve.rank),
        linestyle=_line_style(curve.rank),
        drawstyle="steps-pre" if is_stairs else "default",
        marker="o" if len(xs) <= _MOST_MARKED else "",
        markersize=3.2,
        label=_short(curve.label),
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
        _legend(axes, [curve.label for curve in curves])


def _start_at_zero(axes: "Axes") -> None:
    """Starts the vertical axis at 0, with room above for the highest point."""
    axes.update_datalim([(axes.dataLim.x0, 0.0)])
    axes.autoscale_view(scalex=False)
    axes.set_ylim(bottom=0)


def _legend(axes: "Axes", labels: Sequence[str]) -> None:
    """Names the lines below the axes, in as many columns as their names allow."""
    longest = max(len(_short(label)) for label in labels)
    columns = max(1, min(len(labels), _LEGEND_LETTERS // (longest + 7)))
    rows = math.ceil(len(labels) / columns)
    figure = _figure(axes)
    figure.set_figheight(figure.get_figheight() + _LEGEND_ROW * (rows - 1))
    figure.legend(loc="outside lower left", ncols=columns, fontsize=9, handlelength=1.6)


def _number_axis(axes: "Axes", values: Sequence[float], *, is_scale: bool) -> None:
    """Puts ticks where values are; logarithmic where they span much."""
    from matplotlib.ticker import LogLocator, NullLocator

    is_few = len(values) <= _MOST_TICKS
    span = values[-1] / values[0] if values[0] > 0 else 0.0
    if span >= _LOGARITHMIC_FROM[is_scale]:
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
        subs = (1.0, 3.0) if span > _WIDE else (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
        axes.xaxis.set_major_locator(LogLocator(subs=subs))
        axes.xaxis.set_major_formatter("{x:,.6g}")
    if is_few:
        axes.set_xticks(list(values), [_tick(value) for value in values])


def _tick(value: float) -> str:
    """Returns a value as it stands at an axis."""
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.4g}"


def _word_axis(axes: "Axes", words: Sequence[str]) -> None:
    """Names the places of an axis, at an angle where the names are long."""
    is_long = len(words) * max(len(word) for word in words) > 50
    axes.set_xticks(
        range(len(words)),
        [_short(word, 24) for word in words],
        rotation=30 if is_long else 0,
        ha="right" if is_long else "center",
        rotation_mode="anchor",
    )
    axes.set_xlim(-0.5, len(words) - 0.5)


def _distinct(values: Sequence[float | str]) -> list[float | str]:
    """Returns values without repetition, in order of their first appearance."""
    return list(dict.fromkeys(values))


def _color(rank: int) -> str:
    """Returns the colour of a line."""
    return LIGHT[SERIES[rank % len(SERIES)]]


def _line_style(rank: int) -> "str | tuple[int, tuple[float, ...]]":
    """Returns the dashes of a line: another pattern once colours repeat."""
    return _STYLES[rank // len(SERIES) % len(_STYLES)]


def _short(text: str, longest: int = _LONGEST_LABEL) -> str:
    """Returns text that is not too long, and that matplotlib takes as it is."""
    if len(text) > longest:
        head = longest // 2 - 1
        text = f"{text[:head]}...{text[len(text) - (longest - head - 3) :]}"
    return text.replace("$", r"\$")


def _figure(axes: "Axes") -> "Figure":
    """Returns the figure that holds axes."""
    from matplotlib.figure import Figure

    assert isinstance(axes.figure, Figure)
    return axes.figure
