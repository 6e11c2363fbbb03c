"""The figure of a sweep: final accuracy over what was swept."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dpsgd.report.drawing import (
    add_legend,
    figure_of,
    line_style,
    new_axes,
    series_color,
    short_label,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Point", "sweep_figure"]

# Largest over smallest value of an axis: of any quantity, and of one that is a scale.
_LOGARITHMIC_FROM = (8.0, 2.0)
_MOST_TICKS = 8
_WIDE = 30.0  # span, above which round numbers would crowd a logarithmic axis


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
                color=series_color(rank),
                linestyle=line_style(rank) if is_numeric else "none",
                marker="o",
                markersize=4.5,
                capsize=3,
                label=short_label(label),
            )
        if is_numeric:
            _number_axis(axes, sorted(numbers), is_scale=is_scale)
        else:
            _word_axis(axes, [str(x) for x in ticks])
        axes.set_xlabel(x_label)
        if len(lines) > 1:
            add_legend(axes, [label for label, _ in lines])
        return figure_of(axes)


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
        [short_label(word, 24) for word in words],
        rotation=30 if is_long else 0,
        ha="right" if is_long else "center",
        rotation_mode="anchor",
    )
    axes.set_xlim(-0.5, len(words) - 0.5)


def _distinct(values: Sequence[float | str]) -> list[float | str]:
    """Returns values without repetition, in order of their first appearance."""
    return list(dict.fromkeys(values))
