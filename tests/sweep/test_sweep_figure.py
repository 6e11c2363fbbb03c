"""What the figure of a sweep shows."""

import pytest
from made_up_runs import texts
from matplotlib.collections import LineCollection

from dpsgd.sweep.figure import Point, sweep_figure


def points(*values: tuple[float | str, float]) -> list[Point]:
    return [Point(x=x, mean=mean, low=mean - 0.01, high=1.0) for x, mean in values]


def test_a_sweep_is_drawn_over_numbers_or_words() -> None:
    numbers = [("B = 1", points((0.5, 0.9), (8.0, 0.95))), ("B = 2", points((2, 0.5)))]
    figure = sweep_figure(numbers, x_label="optimizer.learning_rate")
    assert figure is not None
    assert figure.axes[0].get_xscale() == "log"
    shown = texts(figure)
    assert {"0.5", "2", "8", "optimizer.learning_rate", "B = 1", "B = 2"} <= set(shown)

    words = sweep_figure(
        [("", points(("base", 0.9), ("+ ema", 0.95)))], x_label="entry"
    )
    assert {"base", "+ ema"} <= set(texts(words))
    assert sweep_figure([("empty", [])], x_label="x") is None


def test_error_bars_end_where_they_should() -> None:
    figure = sweep_figure([("", points((1, 0.5), (2, 0.75)))], x_label="x")
    assert figure is not None
    (bars,) = figure.axes[0].collections

    assert isinstance(bars, LineCollection)
    ends = [segment[:, 1].tolist() for segment in bars.get_segments()]
    assert ends == [pytest.approx([49, 100]), pytest.approx([74, 100])]


@pytest.mark.parametrize(
    ("values", "is_scale", "scale", "ticks"),
    [
        ((1, 2.56281, 7), False, "linear", ["1", "2.563", "7"]),
        ((6.144, 49.152, 12_345), False, "log", ["6.144", "49.15", "12,345"]),
        ((1.5, 2.9), True, "linear", ["1.5", "2.9"]),
        ((1.5, 3.0), True, "log", ["1.5", "3"]),
        ((0.0, 3.0), True, "linear", ["0", "3"]),
        ([0.9 * 1.2**n for n in range(10)], True, "log", ["1", "1.5", "2", "3"]),
        ([6.0 * 2**n for n in range(10)], False, "log", ["10", "30", "100", "3,000"]),
    ],
)
def test_an_axis_is_logarithmic_where_its_values_span_much(
    values: list[float], is_scale: bool, scale: str, ticks: list[str]
) -> None:
    lines = [("", points(*((value, 0.5) for value in values)))]
    figure = sweep_figure(lines, x_label="x", is_scale=is_scale)
    assert figure is not None

    assert figure.axes[0].get_xscale() == scale
    assert set(ticks) <= set(texts(figure))


def test_names_are_drawn_as_text_and_not_as_formulas() -> None:
    name = "$x^2$ <b>" + "long " * 20
    (label,) = [
        text
        for text in texts(
            sweep_figure(
                [(name, points((1, 0.5))), ("b", points((1, 0.6)))], x_label="x"
            )
        )
        if "x^2" in text
    ]

    assert label.startswith("$x^2$ &lt;b&gt;")
    assert len(label) < 50
